"""Process settings that must precede all other imports, torch above all; only programs apply them, at their start."""

import ctypes
import os
import sys
from types import TracebackType

# Options of <malloc.h>.
MMAP_MAX, TRIM_THRESHOLD = -4, -1


def tune_process() -> None:
    """Changes how this process ends on Ctrl-C, how its threads wait, and what becomes of freed memory.

    Exits if the current folder is gone: torch's libraries cannot be loaded there, and report a misleading error.
    """
    sys.excepthook = _end

    try:
        os.getcwd()
    except OSError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: the current folder: {error.strerror}; it was removed or may "
              "not be entered: change to another (cd)", file=sys.stderr)
        sys.exit(2)

    # Read by torch's thread pool (libgomp) when torch is first imported. By default a thread that waits for the others
    # spins for milliseconds. If other programs use the cores too, the spinning keeps the awaited threads from running,
    # and everything becomes ten times slower. This bound is a thirtieth of the default (300000). A tenth of it would be
    # twice as fast there but a fifth slower on an idle machine, and `--threads auto` uses one thread where more do not
    # help. A user's OMP_WAIT_POLICY is respected.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    # glibc returns large blocks to the system as soon as they are freed, so the next tensor of that size costs a page
    # fault per 4 KB: a fifth of a training step on a CPU, or more. These settings keep freed memory for reuse.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends the program silently on Ctrl-C during imports, before `utils.program.entry` handles signals."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)
