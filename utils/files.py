"""Whole files only: written aside and renamed, read without running code."""

import contextlib
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success flushes it to disk and renames it over `path`.

    A reader sees the old file or the new one, never a part. If the block raises, nothing is left behind.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give a folder that can be written") from error
    os.close(handle)
    aside = Path(aside)
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; results are as readable as any other file of the user's.
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        # torch's zip writer reports a full disk as a RuntimeError of its own.
        if isinstance(error, OSError) or (isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error)):
            raise UserError(f"cannot write {path}: {error}; free space or give another folder") from error
        raise


def save(value: object, path: str | os.PathLike) -> None:
    """`torch.save`, whole or not at all."""
    with atomic_write(path) as aside:
        torch.save(value, aside)


def load(path: str | os.PathLike, what: str = "file", mmap: bool = False):
    """`torch.load` of tensors and plain containers on the CPU; code in the file is never run.

    Args:
        what: what the file should be, for the message ("image file", "buffer", …).
        mmap: leave the tensors' bytes on disk until they are touched.

    Raises:
        UserError: missing, truncated, not a torch file, or holding more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist; give the path of a file")
    try:
        # A file of torch's older, non-zip form cannot be memory-mapped; it is read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise UserError(f"{what} {path} holds more than tensors (it would run code when loaded) and was refused; "
                            "save plain tensors with torch.save") from error
        raise UserError(f"{what} {path} is damaged or not a torch file; write it again") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{what} {path} cannot be read (truncated, or not a torch file): {reason}; write or copy it "
                        "again") from error
