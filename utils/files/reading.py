"""One way to read any file, of our own or of others: without running code, and what is wrong is one line."""

import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError, out_of_memory, reason

PART = 1 << 22  # bytes of a large file that are read at once


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
    except UserError:
        raise
    except Exception as error:  # damaged bytes make the readers fail in every way there is
        if out_of_memory(error):
            raise
        # The system names the file that it cannot open; a place that damaged bytes send it to has no name.
        unopened = isinstance(error, OSError) and error.filename is not None
        why = f": {error.strerror}" if unopened else f" {problem} ({reason(error)})"
        raise UserError(f"{what}{why}; {advice}") from error


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


def sha256(path: str | os.PathLike, report: Callable[[int], object] = lambda size: None) -> str:
    """A file's SHA-256, in hex.

    Args:
        report: told how many bytes more are read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(PART):
            digest.update(part)
            report(len(part))
    return digest.hexdigest()
