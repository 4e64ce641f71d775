"""One process at a time in a folder."""

import contextlib
import errno
import fcntl
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from utils.errors import UserError, note
from utils.files import no_links
from utils.program import ranks


@contextlib.contextmanager
def locked(folder: Path, advice: str) -> Iterator[TextIO]:
    """Locks a folder against other processes. However this process ends, the system releases the lock, once processes
    that were given the open file have ended too.

    Args:
        advice: what a second process can do, for its message.

    Raises:
        UserError: another process holds the lock, or the folder cannot be made or written.
    """
    path = folder / ".lock"
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    for tried in itertools.count():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", opener=no_links)
        except OSError as error:
            # The previous holder removed the folder in between. But below /proc, for one, no folder can ever be made.
            if isinstance(error, FileNotFoundError) and tried < 100:
                continue
            _remove_empty(made)
            raise UserError(f"cannot write {folder}: {error.strerror or error}; give a folder that can be written"
                            ) from error
        with file:
            _lock(file, folder, advice)
            if not _is_at(file, path):
                continue  # the previous holder removed the file in between
            sign(file)
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
                _remove_empty(made)
            return


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it was used, or never made
            folder.rmdir()


def kept_to_this_run(folder: Path, advice: str) -> contextlib.AbstractContextManager[object]:
    """As `locked`; the first rank holds the lock for all ranks."""
    return locked(folder, advice) if ranks.first() else contextlib.nullcontext()


def sign(lock: TextIO, more: str = "") -> None:
    """Writes who holds the lock into its file, for the message of a second process; skipped on a full disk."""
    with contextlib.suppress(OSError):  # unbuffered: a buffer would be written again, and fail, when it is closed
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}{more}".encode())


def _is_at(file: TextIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _lock(file: TextIO, folder: Path, advice: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "just started"
        raise UserError(f"another run ({holder}) is writing to {folder}; wait for it to end, or {advice}") from error
    except OSError as error:  # some network file systems have no locks
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
        note(f"{folder} is on a file system without locks; make sure that only one run writes there")
