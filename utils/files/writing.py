"""Atomic writes: to a temporary file that is then renamed, and never over somebody else's file."""

import contextlib
import errno
import fcntl
import glob
import io
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from utils.errors import UserError
from utils.files.reading import BEGINS, read_json

ASIDE = ".datm-"  # marks the names of temporary files; no other file has it


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success flushes it to disk and renames it over `path`.

    A reader sees the old file or the new one, never a part. If the block raises, nothing is left behind; leftovers of
    killed processes that wrote the same file are removed. A link at `path` is replaced and its target left alone, as
    somebody else may have put the link there. For a user's own link, see `resolved`.

    Raises:
        UserError: the folder cannot be made or written, the disk is full, or `path` is a folder, device or pipe.
    """
    path = Path(path)
    handle, aside = _begin(path)
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; results get the user's usual permissions.
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
        # Safetensors reports a full disk by its own exception class, torch's zip writer by a RuntimeError.
        library_could_not = isinstance(error, SafetensorError) or (
            isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error)))
        if isinstance(error, OSError) or library_could_not:
            reason = "the disk is full, or the file was cut" if library_could_not else error
            raise UserError(f"cannot write {path}: {reason}; free space or give another folder") from error
        raise
    finally:
        os.close(handle)


def resolved(path: str | os.PathLike) -> Path:
    """Resolves a path that the user gave for output: if it is a link, the file that it points to is written."""
    return Path(os.path.realpath(path))


def _begin(path: Path) -> tuple[int, Path]:
    """Makes a temporary file for `path` (`_make_aside`), after checking that `path` can be written."""
    try:
        if path.exists() and not path.is_file() and not path.is_symlink():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise UserError(f"cannot write {path}, which is {kind}; give the path of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        return _make_aside(path)
    except OSError as error:
        lost = next((folder for folder in path.parents if folder.is_symlink() and not folder.exists()), None)
        why = f"{lost} is a link to {os.readlink(lost)}, which is not there" if lost else error.strerror or error
        raise UserError(f"cannot write {path}: {why}; give a folder that can be written") from error


def _make_aside(path: Path) -> tuple[int, Path]:
    """A new file beside `path`; the lock held by its handle tells it from one whose writer was killed."""
    while True:
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{ASIDE}", suffix=path.suffix)
        taken = False  # whether another process locked it first, taking it for abandoned
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks, where nothing is taken for abandoned either
            pass
        if not taken and os.path.exists(aside):
            return handle, Path(aside)
        os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Removes temporary files for `path` that killed processes left: those that nobody holds the lock of."""
    for left in path.parent.glob(f".{glob.escape(path.name)}{ASIDE}????????{glob.escape(path.suffix)}"):
        # The file may be gone meanwhile, belong to another user, or still be written.
        with contextlib.suppress(OSError), open(left, "rb", opener=no_links) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def check_writable(path: str | os.PathLike) -> None:
    """Checks that a file can be written later, before hours of work; leaves nothing behind.

    Raises:
        UserError: it cannot be written.
    """
    path = resolved(path)
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        handle, aside = _begin(path)
        aside.unlink(missing_ok=True)  # while its lock still shows that it is not abandoned
        os.close(handle)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not made after all, or another process has put something there
                folder.rmdir()


def check_outputs(given: Mapping[str, str | os.PathLike], kinds: Mapping[str, str]) -> None:
    """Refuses an output file that cannot be written, that another option names too, or whose path holds a file of
    another kind, which must be somebody else's.

    Args:
        given: the files that options name, inputs too, by the option as messages call it.
        kinds: of the outputs among them: png, html, bz2, json:KEY (has this key), or safetensors:FORMAT (its metadata's
            `format` begins with this).
    """
    for option in (option for option in kinds if option in given):
        path = resolved(given[option])
        other = next((other for other in given if other != option and resolved(given[other]) == path), None)
        if other:
            raise UserError(f"{option} {path} is the file of {other} too; give another one")
        check_writable(path)
        if path.exists() and path.stat().st_size and not _is_of_kind(path, *kinds[option].split(":")):
            raise UserError(f"{option} {path} is there and holds something else; give another file, or move it away")


def _is_of_kind(path: Path, kind: str, mark: str = "") -> bool:
    with path.open("rb") as file:
        if not re.match(BEGINS[kind], file.read(512)):
            return False
    with contextlib.suppress(Exception):  # unreadable, so not one of ours
        if kind == "json":
            values, (name, _, value) = read_json(path), mark.partition("=")
            return isinstance(values, dict) and (values.get(name) == value if value else name in values)
        if kind == "safetensors":
            with safe_open(path, framework="np") as file:  # reads only the header
                return file.metadata()["format"].startswith(mark)
        return True
    return False


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file atomically; undecodable bytes, as in file names, are written as escapes."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_config(path: Path, options: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(options, sort_keys=False))


def write_json(path: Path | str, value: Any) -> None:
    """Writes indented JSON, with each list of integers on one line."""
    text = json.dumps(value, indent=2, allow_nan=False)  # no raw newlines in strings, so the pattern matches none
    text = re.sub(r"\[\n\s+(-?\d+(?:,\n\s+-?\d+)*)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, text + "\n")


def finite(value: float) -> float | None:
    """The number, or None (JSON's null) for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None


def cut_lines(path: Path, size: int) -> None:
    """Truncates a file of lines to `size` bytes, creating it if missing; refuses a link."""
    with _lines(path) as file:
        file.truncate(size)


def append_json(path: Path, value: Any) -> None:
    """Adds one line to a JSONL file.

    Raises:
        UserError: the line cannot be written; the file is unchanged.
    """
    with _lines(path) as file:
        before = file.seek(0, os.SEEK_END)
        line = (json.dumps(value) + "\n").encode()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)  # part of the line may have been written
            raise


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[io.FileIO]:
    """Opens a file for appending lines."""
    try:
        with io.FileIO(path, "a", opener=no_links) as file:
            yield file
    except OSError as error:
        advice = "" if error.errno == errno.ELOOP else "; free space or give another folder"
        raise UserError(f"cannot write {path}: {error.strerror}{advice}") from error


def no_links(path: str | os.PathLike, flags: int) -> int:
    """An `opener` for files of our own; refuses links, through which we might open somebody else's file.

    Raises:
        OSError: the file cannot be opened, or is a link or not a regular file.
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
    """Removes a file, or a folder with its contents, if it exists; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """`$DATM_CACHE`, else `$XDG_CACHE_HOME/datm`, else `~/.cache/datm`.

    Raises:
        UserError: this user has no home, or may not access the folder.
    """
    folder = os.environ.get("DATM_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/datm"
    try:
        path = Path(folder).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):  # made when it is needed, or refused then
        pass
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this user has no home"
        raise UserError(f"the cache folder {folder}: {reason}; let DATM_CACHE name a folder that can be written"
                        ) from error
    return path
