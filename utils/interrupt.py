"""Signals that stop a run: Ctrl-C (SIGINT), a scheduler's SIGTERM, and SIGUSR1, its warning before the time limit.

A signal stops a run at once. Where that would lose work (`deferred`), the first one only asks, and the run stops at its
next safe point, with everything saved; a second one does not wait.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal stops the run; not an error, so `except Exception` lets it pass.

    Args:
        waited: for a safe point; else it may have come in the middle of anything.
    """

    def __init__(self, number: int, waited: bool = False) -> None:
        super().__init__(number)
        self.signal, self.waited = signal.Signals(number), waited


_received: int | None = None
_deferring = False


def install() -> None:
    """Lets the signals raise `Stopped` in the main thread."""
    global _received
    _received = None
    for each in SIGNALS:
        signal.signal(each, _receive)


def ignore() -> None:
    """Once a run has stopped, when a further signal would only disturb its exit."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Inside, signals wait; processes that are started inside never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(number: int, frame: object) -> None:
    global _received
    first, _received = _received is None, number
    if not (first and _deferring):
        raise Stopped(number)
    # Not print: the signal may have come while the main program was printing.
    os.write(sys.stderr.fileno(), f"\n{signal.Signals(number).name}: finishing this step and saving; once more to stop "
             "at once\n".encode())


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


def check() -> None:
    """A safe point.

    Raises:
        Stopped: a signal waits.
    """
    if _received is not None:
        raise Stopped(_received, waited=True)
