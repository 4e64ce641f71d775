"""What must be set before anything else is imported, torch above all: by programs alone, when they start."""

import ctypes
import os
import sys
from types import TracebackType

# Options of <malloc.h>.
MMAP_MAX, TRIM_THRESHOLD = -4, -1


def tune_process() -> None:
    """Changes this process: how it ends on Ctrl-C, how threads wait, and what becomes of freed memory.

    Ends it where it stands nowhere: torch's own libraries cannot be loaded there, and blame themselves.
    """
    sys.excepthook = _end

    try:
        os.getcwd()
    except OSError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: the current folder: {error.strerror}; it was removed or may "
              "not be entered: change to another (cd)", file=sys.stderr)
        sys.exit(2)

    # Read by torch's thread pool (libgomp) when torch is first imported. By default a thread that waits for the others
    # spins for milliseconds; where other programs want the cores too, that is time in which those that it waits for do
    # not run, and everything becomes ten times slower. This bound is a hundredth of the default. A tenth of it would be
    # twice as fast there, but a fifth slower on an idle machine, and `--threads auto` takes one thread where others are
    # no help. Who gives a policy has it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    # glibc hands large blocks back to the system as soon as they are freed, and the next tensor of that size pays a
    # page fault for every 4 KB: a fifth of a training step on a CPU, and more. Freed memory is kept and used again.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C before `utils.program.entry` answers it, while modules are imported, ends a program without a word."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)
