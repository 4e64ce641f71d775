"""Signals that stop a run: Ctrl-C (SIGINT), a lost terminal (SIGHUP), a scheduler's SIGTERM and its warning, SIGUSR1.

A signal stops a run at once. Where that would lose work (`deferred`), the first signal is a request: the run stops at
its next safe point, with everything saved. A second signal stops it at once.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PART_OF = "DATM_PART_OF"  # environment variable: the parent program, which forwards signals and reports for this one


class Stopped(KeyboardInterrupt):
    """A signal stops the run; not an error, so `except Exception` lets it pass.

    Args:
        waited: the run stopped at a safe point; False: it may have been in the middle of anything.
    """

    def __init__(self, number: int, waited: bool = False) -> None:
        super().__init__(number)
        self.signal, self.waited = signal.Signals(number), waited


# Within these seconds a signal counts once: Ctrl-C reaches a rank from the terminal and again from torchrun.
TWICE_SECONDS = 2.0 if "LOCAL_RANK" in os.environ else 0.0

_received: int | None = None
_received_at = 0.0
_deferring = False
_queue: list[int] | None = None  # of `queued`
_saved = _if_given = ""


def install() -> None:
    """Makes the signals raise `Stopped` in the main thread, except those that the parent process set to be ignored."""
    global _received, _saved, _if_given
    _received, _saved, _if_given = None, "", ""
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _receive)


def restore() -> None:
    """Restores the default handlers, when a signal may simply end a rank; ignored signals stay ignored."""
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, signal.SIG_DFL)


def ignore() -> None:
    """Ignores signals once a run has stopped, as a further one would only disturb its exit."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Blocks this thread's signals until the end of the block; processes that it starts inside never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def queued() -> Iterator[list[int]]:
    """Inside, signals are only appended to the list that this gives, for a program that passes them on to others.
    (Were they blocked, another thread, such as one of a library, would get them.)

    Raises:
        Stopped: at the end, a signal is left in the list.
    """
    global _queue
    _queue = queue = []
    try:
        yield queue
    finally:
        _queue = None
    if queue:
        raise Stopped(queue[0])


def _receive(number: int, frame: object) -> None:
    global _received, _received_at
    if _received is not None and time.monotonic() - _received_at < TWICE_SECONDS:
        return
    first, _received, _received_at = _received is None, number, time.monotonic()
    if _queue is not None:
        _queue.append(number)
        return
    if not (first and _deferring):
        raise Stopped(number)
    if PART_OF in os.environ:
        return
    # Not print: the signal may have interrupted one.
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):  # stderr is gone
        said = f"\n{name}: finishing this step and saving; send it again to stop at once\n"
        os.write(sys.stderr.fileno(), said.encode())


@contextlib.contextmanager
def deferred(check_at_end: bool = True) -> Iterator[None]:
    """Defers the first signal to the next `check`, at the latest at the end of the block. A RuntimeError after a signal
    counts as its consequence: Ctrl-C reaches every process in the terminal, also the compilers that torch waits for.

    Args:
        check_at_end: False: a signal after the last `check` is dropped, as nothing is left to be stopped.
    """
    global _deferring
    _deferring = True
    try:
        yield
        if check_at_end:
            check()
    except RuntimeError as error:
        if requested():
            raise Stopped(_received) from error
        raise
    finally:
        _deferring = False


def saves(what: str, if_given: str = "") -> None:
    """Declares that from here on `what` is saved and the same command resumes from it; a stopped program says so.

    Args:
        if_given: an option that was not given and without which `what` is lost; empty: nothing is lost.
    """
    global _saved, _if_given
    _saved, _if_given = what, if_given


def saved() -> tuple[str, str]:
    """The arguments of the last `saves`; empty: nothing is known to be saved."""
    return _saved, _if_given


def requested() -> bool:
    """Whether a signal has come."""
    return _received is not None


def stop() -> NoReturn:
    """Stops at a safe point, for this process's signal or another rank's."""
    raise Stopped(_received or signal.SIGTERM, waited=True)


def check() -> None:
    """Marks a safe point.

    Raises:
        Stopped: a signal has come.
    """
    if requested():
        stop()
