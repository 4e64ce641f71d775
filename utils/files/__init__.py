"""Files, read and written safely. Import from here."""

from pathlib import Path

from utils import later
from utils.files.reading import (
    check_is_file,
    check_kind,
    read_config,
    read_json,
    read_text,
    read_yaml,
    reading,
    sha256,
)
from utils.files.writing import (
    ASIDE,
    append_json,
    atomic_write,
    cache_folder,
    check_outputs,
    check_writable,
    cut_lines,
    finite,
    no_links,
    remove,
    resolved,
    save_config,
    write_json,
    write_text,
)

REPOSITORY = Path(__file__).resolve().parent.parent.parent

__getattr__ = later("utils.files.tensors", "load", "load_tensors", "metadata_of", "save", "save_tensors")
