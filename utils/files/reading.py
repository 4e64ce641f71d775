"""One way to read any file, of our own or of others: without running code, and what is wrong is one line."""

import codecs
import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from utils.errors import UserError


@contextlib.contextmanager
def reading(what: str | Path, advice: str, problem: str = "is damaged") -> Iterator[None]:
    """Whatever goes wrong inside, while a file is read and understood, is said in one line.

    Args:
        what: the file, or it as the user knows it.
        advice: what to do about it.

    Raises:
        UserError
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged bytes make the readers fail in every way there is
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        # The system names the file that it cannot open; a place that damaged bytes send it to has no name.
        unopened = isinstance(error, OSError) and error.filename is not None
        raise UserError(f"{what}{f': {error.strerror}' if unopened else f' {problem} ({reason})'}; {advice}") from error


def check_is_file(path: Path, what: str, instead: str | Path = "the path of a file") -> None:
    """Refuses what is no file.

    Args:
        instead: what to give.

    Raises:
        UserError
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{what} {path} {problem}; give {instead}")


# How a file begins, by its kind; a safetensors with the length of its head.
BEGINS = {"png": rb"\x89PNG", "html": rb"(?i)\s*<!doctype html", "bz2": b"BZh", "safetensors": rb"(?s).{8}\{",
          "json": rb"\s*\{", "torch": rb"PK\x03\x04|\x80[\x02-\x05]"}
_IN_WORDS = {"png": "a picture", "safetensors": "a safetensors file", "torch": "a torch file"}


def check_kind(path: Path, what: str, kind: str, advice: str) -> None:
    """Refuses a file that is plainly of another kind; whether one is damaged, whoever reads it will see.

    Args:
        kind: torch or safetensors.
        advice: what to do.

    Raises:
        UserError
    """
    with path.open("rb") as file:
        begin = file.read(512)
    found = next((its for each, its in _IN_WORDS.items() if re.match(BEGINS[each], begin)), "")
    if not found:
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder("utf-8")().decode(begin)  # its last character may be cut
            found = "a text" if text and all(each.isprintable() or each.isspace() for each in text) else ""
    if found not in ("", _IN_WORDS[kind]):
        raise UserError(f"{what} {path} is {found}, not {_IN_WORDS[kind]}; {advice}")


def load(path: str | os.PathLike, what: str = "file", mmap: bool = False, advice: str | None = None,
         instead: str | Path | None = None):
    """`torch.load` of tensors and plain containers on the CPU; code in the file is never run.

    Args:
        what: what the file should be, for the message ("image file", "buffer", …).
        mmap: leave the tensors' bytes on disk until they are touched.
        advice: what to do about one that is damaged or refused; None: write it again.
        instead: what may have been meant by a path that is none, or by a file of another kind.

    Raises:
        UserError: missing, truncated, not a torch file, or holding more than tensors.
    """
    path = Path(path)
    check_is_file(path, what, instead or "the path of a file")
    check_kind(path, what, "torch", advice or (f"give {instead}" if instead else "write or copy it again"))
    with (reading(f"{what} {path}", advice or "write or copy it again",
                  "cannot be read (truncated, or not a torch file)"), warnings.catch_warnings()):
        warnings.simplefilter("ignore")  # what torch has to say about foreign files is said here
        try:
            # A file of torch's older, non-zip form cannot be memory-mapped; it is read whole.
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
                raise UserError(f"{what} {path} holds more than tensors (it would run code when loaded) and was "
                                f"refused; {advice or 'save plain tensors with torch.save'}") from error
            raise UserError(f"{what} {path} is damaged or not a torch file; {advice or 'write it again'}") from error
    odd = _odd_tensor(value)
    if odd:
        raise UserError(f"{what} {path} holds {odd}; {advice or 'save plain tensors of real numbers'}")
    return value


def _odd_tensor(value: object) -> str | None:
    """A tensor in nested containers that arithmetic does not take as it takes others, in words."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            kinds = {"a sparse tensor": each.layout != torch.strided, "a tensor without values": each.is_meta,
                     "a quantized tensor": each.is_quantized, "complex numbers": each.is_complex()}
            if odd := next((kind for kind, it_is in kinds.items() if it_is), None):
                return odd
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:  # one may hold another many times
            seen.add(id(each))
            waiting += each.values() if isinstance(each, dict) else each
    return None


def load_tensors(path: Path) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """What `save_tensors` wrote: the tensors, and the metadata."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if odd := _odd_tensor(tensors):
            raise ValueError(f"it holds {odd}")
        return tensors, file.metadata() or {}


def read_text(path: str | os.PathLike) -> str:
    """A text in UTF-8, whoever wrote it, from a file or a pipe. Nobody is waited for at a pipe without a writer.

    Raises:
        OSError: it cannot be read, or is a folder or a device, which may have no end.
        UnicodeDecodeError
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is a folder or a device", os.fspath(path))
    os.set_blocking(handle, True)
    with open(handle, encoding="utf-8-sig") as file:  # editors put a mark at its beginning
        return file.read()


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds; inside `reading`, for it fails in many ways."""
    return json.loads(read_text(path))


def read_yaml(path: str | os.PathLike, loader: type[yaml.SafeLoader | yaml.BaseLoader] = yaml.SafeLoader
              ) -> dict[Any, Any]:
    """The options in a YAML file, whoever wrote it: each once, and no aliases, by which a few lines become more than a
    machine holds.

    Raises:
        OSError: it cannot be read.
        ValueError: what is wrong, in words that go on from its name, and what to do.
    """
    try:
        text = read_text(path)
        node = yaml.compose(text, yaml.BaseLoader)  # first, for it soon gives up on what is nested deeply
        alias = next((event for event in yaml.parse(text) if isinstance(event, yaml.AliasEvent)), None)
        options = None if alias else yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        where = f" near line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise ValueError(f"is not YAML{where}; write one `key: value` a line") from error
    if alias:
        raise ValueError(f"holds the alias *{alias.anchor} in line {alias.start_mark.line + 1}; write its value there")
    if not isinstance(options, dict):
        raise ValueError("is not a list of options; write one `key: value` a line")
    (name, times), = Counter(key.value for key, _ in node.value).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"gives {name!r} {times} times; keep one of them")
    return options


def read_config(path: Path) -> dict[str, Any]:
    """What `save_config` wrote.

    Raises:
        UserError: it is damaged.
    """
    with reading(path, "it held the options of what lies beside it: put it back, or move what lies beside it away"):
        return read_yaml(path)


def sha256(path: str | os.PathLike) -> str:
    """A file's SHA-256, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
