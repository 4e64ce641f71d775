"""The streams that everything is said through: they show any text, and nobody who stops listening ends a run."""

import os
import sys
from collections.abc import Callable
from typing import Any

from utils.errors import printable


class Stream:
    """A stream that takes any text and never fails.

    What a terminal would obey is shown as an escape, and what the encoding lacks as a question mark: class names,
    options and results of others are part of what is said. Once it cannot be written (a full disk, a reader or a
    terminal that went away), what is left to be said goes nowhere.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        start = "\r" if text.startswith("\r") else ""  # with which a bar is drawn over itself
        self._or_silence(self._stream.write, start + printable(text[len(start):], "\n\t"))
        return len(text)

    def flush(self) -> None:
        self._or_silence(self._stream.flush)

    def _or_silence(self, act: Callable[..., object], *arguments: str) -> None:
        try:
            act(*arguments)
        except (OSError, ValueError):  # a closed file is a ValueError
            # The descriptor itself, to which what is still in the stream's buffer goes at the exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            except (OSError, ValueError):
                self._stream = open(os.devnull, "w")
            finally:
                os.close(nowhere)


def make_safe() -> None:
    """Puts a `Stream` in the place of stdout and of stderr; one that was closed goes nowhere."""
    for number in range(3):  # else the next file that is opened would take its number, and what is said with it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            # By lines: in one file with stderr, they come in the order they were said in.
            stream.reconfigure(errors="replace", line_buffering=True)
        setattr(sys, name, stream if isinstance(stream, Stream) else Stream(stream))
