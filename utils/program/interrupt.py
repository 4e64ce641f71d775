"""Signals that stop a run: Ctrl-C (SIGINT), a lost terminal (SIGHUP), a scheduler's SIGTERM and its warning, SIGUSR1.

A signal stops a run at once. Where that would lose work (`deferred`), the first one only asks, and the run stops at its
next safe point, with everything saved; a second one does not wait.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PART_OF = "DATM_PART_OF"  # in the environment: the program that started this one, hands signals on and speaks for it


class Stopped(KeyboardInterrupt):
    """A signal stops the run; not an error, so `except Exception` lets it pass.

    Args:
        waited: for a safe point; else it may have come in the middle of anything.
    """

    def __init__(self, number: int, waited: bool = False) -> None:
        super().__init__(number)
        self.signal, self.waited = signal.Signals(number), waited


# Ctrl-C reaches a rank twice: from the terminal, and from torchrun, which hands it on.
TWICE_SECONDS = 2.0 if "LOCAL_RANK" in os.environ else 0.0

_received: int | None = None
_received_at = 0.0
_deferring = False
_saved = _if_given = ""


def install() -> None:
    """Lets the signals raise `Stopped` in the main thread, but for those that whoever started this wants ignored."""
    global _received, _saved, _if_given
    _received, _saved, _if_given = None, "", ""
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _receive)


def restore() -> None:
    """Once a rank has nothing more to do, when a signal may simply end it."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)


def ignore() -> None:
    """Once a run has stopped, when a further signal would only disturb its exit."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Inside, the thread's signals wait; processes that it starts inside never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(number: int, frame: object) -> None:
    global _received, _received_at
    if _received is not None and time.monotonic() - _received_at < TWICE_SECONDS:
        return
    first, _received, _received_at = _received is None, number, time.monotonic()
    if not (first and _deferring):
        raise Stopped(number)
    if PART_OF in os.environ:
        return
    # Not print: the signal may have come while the main program was printing.
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(sys.stderr.fileno(), f"\n{name}: finishing this step and saving; once more to stop at once\n".encode())


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first signal waits for the next `check`."""
    global _deferring
    _deferring = True
    try:
        yield
        check()
    finally:
        _deferring = False


def saves(what: str, if_given: str = "") -> None:
    """From here on this is saved, and the same command goes on from it; whoever stops the program is told so.

    Args:
        if_given: the option that was not given, and without which it is lost.
    """
    global _saved, _if_given
    _saved, _if_given = what, if_given


def saved() -> tuple[str, str]:
    """What `saves` said last; empty: nothing is saved, as far as is known."""
    return _saved, _if_given


def requested() -> bool:
    """Whether a signal waits."""
    return _received is not None


def stop() -> NoReturn:
    """Stops at a safe point, for this process's signal or another rank's."""
    raise Stopped(_received or signal.SIGTERM, waited=True)


def check() -> None:
    """A safe point.

    Raises:
        Stopped: a signal waits.
    """
    if requested():
        stop()
