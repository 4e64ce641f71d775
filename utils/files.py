"""Whole files only: written aside and renamed, read without running code."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
ASIDE = ".datm-"  # in the names of files that are not whole yet, and in no other's


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success flushes it to disk and renames it over `path`.

    A reader sees the old file or the new one, never a part. If the block raises, nothing is left behind; what a killed
    process left of the same file is removed. A link in the place is replaced, and what it points to stays: somebody
    else may have put it there. For a link of the user's, see `given`.

    Raises:
        UserError: the folder cannot be made or written, the disk is full, or a folder, device or pipe is in the place.
    """
    path = Path(path)
    handle, aside = _begin(path)
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; results are as readable as any other file of the user's.
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        os.replace(aside, path)
        with contextlib.suppress(OSError):  # not every file system flushes folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        # Safetensors report a full disk by a class of their own, torch's zip writer by a RuntimeError.
        library_could_not = isinstance(error, SafetensorError) or (
            isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error)))
        if isinstance(error, OSError) or library_could_not:
            reason = "the disk is full, or the file was cut" if library_could_not else error
            raise UserError(f"cannot write {path}: {reason}; free space or give another folder") from error
        raise
    finally:
        os.close(handle)


def given(path: str | os.PathLike) -> Path:
    """Where to write what the user wants at a path: where that is a link, in the file that it points to."""
    return Path(os.path.realpath(path))


def _begin(path: Path) -> tuple[int, Path]:
    """What `_make_aside` makes, once nothing is in the way of a write of `path`."""
    try:
        if path.exists() and not path.is_file() and not path.is_symlink():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise UserError(f"cannot write {path}, which is {kind}; give the path of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        return _make_aside(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give a folder that can be written") from error


def _make_aside(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, locked through the handle, so that it can be told from one whose writer was killed."""
    while True:
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{ASIDE}", suffix=path.suffix)
        taken = False  # whether another process, quicker than the lock, takes it for abandoned
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # no locks here; then nothing is taken for abandoned either
            pass
        if not taken and os.path.exists(aside):
            return handle, Path(aside)
        os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Removes what killed processes left of their writes of `path`: nobody holds the lock of those."""
    for left in path.parent.glob(f".{glob.escape(path.name)}{ASIDE}????????{glob.escape(path.suffix)}"):
        # It may be gone meanwhile, another user's, or being written.
        with contextlib.suppress(OSError), open(left, "rb", opener=own) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def check_writable(path: str | os.PathLike) -> None:
    """Makes the folder of a file that will be written later, and tries to write there: better now than after hours.

    Raises:
        UserError: it cannot be made or written.
    """
    handle, aside = _begin(given(path))
    os.close(handle)
    aside.unlink()


def save(value: object, path: str | os.PathLike) -> None:
    """`torch.save`, whole or not at all."""
    # Through a handle, for given a path torch writes its name into the file, and equal tensors make unequal files.
    with atomic_write(path) as aside, aside.open("wb") as file:
        torch.save(value, file)


def save_tensors(path: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> None:
    """Writes a safetensors file, which holds data only, never code."""
    from safetensors.torch import save_file  # here, not above: with it comes torch, which other writes do without

    with atomic_write(path) as aside:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside, metadata)


def load_tensors(path: Path) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """What `save_tensors` wrote: the tensors, and the metadata."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def sha256(path: str | os.PathLike) -> str:
    """A file's SHA-256, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path | str, text: str) -> None:
    """Writes a whole text file, or leaves what is there."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


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


def load(path: str | os.PathLike, what: str = "file", mmap: bool = False, advice: str | None = None,
         instead: str | Path = "the path of a file"):
    """`torch.load` of tensors and plain containers on the CPU; code in the file is never run.

    Args:
        what: what the file should be, for the message ("image file", "buffer", …).
        mmap: leave the tensors' bytes on disk until they are touched.
        advice: what to do about one that is damaged or refused; None: write it again.
        instead: what may have been meant by a path that is none.

    Raises:
        UserError: missing, truncated, not a torch file, or holding more than tensors.
    """
    path = Path(path)
    check_is_file(path, what, instead)
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


def cut_lines(path: Path, size: int) -> None:
    """Keeps so many bytes of a file of lines, and makes it if there is none; a link in its place is refused."""
    with _lines(path) as file:
        file.truncate(size)


def append_json(path: Path, value: Any) -> None:
    """Adds one line to a JSONL file.

    Raises:
        UserError: it cannot be written; the file is as it was.
    """
    with _lines(path) as file:
        before = file.seek(0, os.SEEK_END)
        line = (json.dumps(value) + "\n").encode()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)  # half a line may have found room
            raise


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[io.FileIO]:
    """A file to add lines to, opened."""
    try:
        with io.FileIO(path, "a", opener=own) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or give another folder") from error


def own(path: str | os.PathLike, flags: int) -> int:
    """Opens a file of our own to write to it (an `opener`): through a link in its place it might be anybody's.

    Raises:
        OSError: it is a link, or no file at all.
    """
    in_the_way = OSError(errno.ELOOP, f"{os.path.basename(path)} is a link or no file; move it away", os.fspath(path))
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise in_the_way if error.errno in (errno.ELOOP, errno.ENXIO) else error from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise in_the_way
    return handle


def remove(path: Path) -> None:
    """Removes a file, or a folder with what is in it, if it is there; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
        raise OSError(errno.EINVAL, "Is a directory, or a device", os.fspath(path))
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
    names = [key.value for key, _ in node.value]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"gives {twice!r} {names.count(twice)} times; keep one of them")
    return options


def read_config(path: Path) -> dict[str, Any]:
    """What `save_config` wrote.

    Raises:
        UserError: it is damaged.
    """
    with reading(path, "it held the options of what lies beside it: put it back, or move what lies beside it away"):
        return read_yaml(path)


def save_config(path: Path, options: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(options, sort_keys=False))


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def finite(value: float) -> float | None:
    """The number, or None (JSON's null) for NaN and infinities, which JSON has no words for."""
    return value if math.isfinite(value) else None


def cache_folder() -> Path:
    """`$DATM_CACHE`, else `$XDG_CACHE_HOME/datm`, else `~/.cache/datm`.

    Raises:
        UserError: this user has no home, or may not enter it.
    """
    folder = os.environ.get("DATM_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/datm"
    try:
        path = Path(folder).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):  # it will be made, or said not to be
        pass
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this user has no home"
        raise UserError(f"the cache folder {folder}: {reason}; let DATM_CACHE name a folder that can be written"
                        ) from error
    return path
