"""Reading files, our own and others', without running code; any failure becomes a one-line message."""

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

PART = 1 << 22  # bytes of a file that are read at a time


@contextlib.contextmanager
def reading(what: str | Path, advice: str, problem: str = "is damaged") -> Iterator[None]:
    """Turns any failure inside, while a file is read and parsed, into a one-line refusal.

    Args:
        what: the file, as the user knows it.
        advice: what to do about the failure.

    Raises:
        UserError: the file cannot be opened, or is damaged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # readers of damaged bytes may raise anything
        if out_of_memory(error):
            raise
        # An OSError names a file that cannot be opened, but none if damaged bytes lead to an invalid position in it.
        unopened = isinstance(error, OSError) and error.filename is not None
        why = f": {error.strerror}" if unopened else f" {problem} ({reason(error)})"
        raise UserError(f"{what}{why}; {advice}") from error


def check_is_file(path: Path, what: str, instead: str | Path) -> None:
    """Refuses a path that is not a file.

    Args:
        instead: what to give instead.
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{what} {path} {problem}; give {instead}")


# First bytes of a file, by kind; a safetensors file begins with the length of its header.
BEGINS = {"png": rb"\x89PNG", "html": rb"(?i)\s*<!doctype html", "bz2": b"BZh", "safetensors": rb"(?s).{8}\{",
          "json": rb"\s*\{", "torch": rb"PK\x03\x04|\x80[\x02-\x05]"}
_IN_WORDS = {"png": "a picture", "safetensors": "a safetensors file", "torch": "a torch file"}


def check_kind(path: Path, what: str, kind: str, advice: str) -> None:
    """Refuses a file that is plainly of another kind; damage is found later, when the file is read.

    Args:
        kind: torch or safetensors.
        advice: what to do.
    """
    with path.open("rb") as file:
        begin = file.read(512)
    found = next((its for each, its in _IN_WORDS.items() if re.match(BEGINS[each], begin)), "")
    if not found:
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder("utf-8")().decode(begin)  # the last character may be cut off
            found = "a text file" if text and all(each.isprintable() or each.isspace() for each in text) else ""
    if found not in ("", _IN_WORDS[kind]):
        raise UserError(f"{what} {path} is {found}, not {_IN_WORDS[kind]}; {advice}")


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file or a pipe, our own or others'; does not block on a pipe without a writer.

    Raises:
        OSError: the file cannot be read, or is a folder or a device, which may be endless.
        UnicodeDecodeError: the text is not UTF-8.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is a folder or a device", os.fspath(path))
    os.set_blocking(handle, True)
    with open(handle, encoding="utf-8-sig") as file:  # some editors write a byte order mark
        return file.read()


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file; to be called inside `reading`, as it fails in many ways."""
    return json.loads(read_text(path))


def read_yaml(path: str | os.PathLike, loader: type[yaml.SafeLoader | yaml.BaseLoader] = yaml.SafeLoader
              ) -> dict[Any, Any]:
    """The options in a YAML file, our own or others'. Duplicate keys are refused, and so are aliases, with which a few
    lines can expand beyond any memory.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is refused; the message follows the file's name, and says what is wrong and what to do.
    """
    try:
        text = read_text(path)
        node = yaml.compose(text, yaml.BaseLoader)  # first, as it fails early on deep nesting
        alias = next((event for event in yaml.parse(text) if isinstance(event, yaml.AliasEvent)), None)
        options = None if alias else yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        where = f" near line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise ValueError(f"is not YAML{where}; write one `key: value` a line, without tabs") from error
    if alias:
        raise ValueError(f"holds the alias *{alias.anchor} in line {alias.start_mark.line + 1}; write its value there")
    if not isinstance(options, dict):
        raise ValueError("is not a list of options; write one `key: value` a line")
    (name, times), = Counter(key.value for key, _ in node.value).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"gives {name!r} {times} times; keep one of them")
    return options


def read_config(path: Path) -> dict[str, Any]:
    """The options that `save_config` wrote.

    Raises:
        UserError: the file is damaged.
    """
    with reading(path, "it held the options of what lies beside it: put it back, or move what lies beside it away"):
        return read_yaml(path)


def sha256(path: str | os.PathLike, report: Callable[[int], object] = lambda size: None) -> str:
    """A file's SHA-256, in hex.

    Args:
        report: called with the number of bytes of each part read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(PART):
            digest.update(part)
            report(len(part))
    return digest.hexdigest()
