"""How every program ends: with its result, a one-line refusal, a signal, or out of memory."""

import errno
import os
import shlex
import sys
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError, one_line, out_of_memory, reason
from utils.program import interrupt, ranks
from utils.program.streams import Stream, make_safe

RANK_WAITS = 3.0  # seconds that other ranks give the first one to print the error


def entry(main: Callable[[], None]) -> None:
    """Runs an entry script; a user's mistake becomes one line on stderr and exit code 2, a signal 128 + its number."""
    name = Path(sys.argv[0]).name
    make_safe()
    interrupt.install()
    if not ranks.first():  # the first rank prints for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    try:
        ranks.check_variables()
        main()
        interrupt.ignore()  # nothing is left to stop
        ranks.barrier()
        ranks.leave(0)
    except UserError as error:
        _last_line(f"{name}: error: {one_line(error)}", 2)
    except (MemoryError, RuntimeError) as error:
        full, said = out_of_memory(error), reason(error)
        if full == "GPU":
            _last_line(f"{name}: error: the GPU's memory is full ({said}…); give a smaller batch (or --micro_batch, "
                       "for experts and distillation), fewer or smaller images, or --device cpu", 2)
        if isinstance(error, RuntimeError) and ranks.lost_contact(error):
            if interrupt.requested():  # all ranks got the signal, and another exited first
                _last_line(f"{name}: stopped; every file is whole{_to_resume()}", 143)
            _last_line(f"{name}: error: contact with another rank was lost ({said}…); "
                       f"start again{_to_resume()}", 1)
        if not full:
            raise
        _last_line(f"{name}: error: not enough memory ({said}); give a smaller batch (or --micro_batch, for "
                   "experts and distillation), or use a machine with more", 2)
    except interrupt.Stopped as stopped:
        code = 128 + stopped.signal
        if not ranks.first():
            ranks.leave(code)
        _last_line(f"\n{name}: stopped by {stopped.signal.name}; every file is whole{_to_resume()}", code)
    except OSError as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        _last_line(f"{name}: error: {one_line(refusal)}", 2)


def _refusal(error: OSError) -> str | None:
    """What the system refused, in words: a path, the current folder, or disk space; None if it may be a bug of ours.

    Any call that takes a path may raise such an error, even one that only checks whether it exists.
    """
    said = error.strerror or error
    if isinstance(error.filename, str | bytes | os.PathLike):
        return f"{os.fsdecode(error.filename)}: {said}; give a path that can be read and written by this user"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE):
        return f"a file cannot be read or written: {said}; free space, or use another disk"
    try:
        os.getcwd()
    except OSError as gone:
        return f"the current folder: {gone.strerror}; it was removed or may not be entered: change to another (cd)"
    return None


def _to_resume() -> str:
    """If something is saved, the command that resumes from it: the given one without its `--resume`, which may discard
    what is saved. Several ranks do not print it, as torchrun's command line is unknown."""
    saved, if_given = interrupt.saved()
    if not saved or interrupt.PART_OF in os.environ:
        return ""
    if if_given:
        return f". {saved[0].upper()}{saved[1:]} are lost; with {if_given} they are kept, and it resumes from them"
    says = f". The same command resumes from {saved}"
    if ranks.size() > 1:
        return says
    kept: list[str] = []
    for argument in sys.argv:
        if kept and kept[-1] == "--resume":
            kept.pop()
        elif not argument.startswith("--resume="):
            kept.append(argument)
    return f"{says}: {shlex.join(['python', *kept])}"


def _last_line(text: str, code: int) -> typing.NoReturn:
    """Prints the program's last line and exits."""
    if ranks.first():
        interrupt.ignore()  # a further signal would only disturb the exit
    else:
        # The first rank prints errors that concern all, and torchrun then ends the others; a rank that is still alive
        # after the wait has an error of its own.
        interrupt.restore()
        time.sleep(RANK_WAITS)
        text = f"rank {ranks.rank()}: {text.strip()}"
        sys.stderr = Stream(sys.__stderr__ or sys.stderr)
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    ranks.leave(code)
    sys.exit(code)
