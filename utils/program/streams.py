"""Output streams that can show any text, and that keep a run alive when their reader goes away."""

import os
import sys
from collections.abc import Callable
from typing import Any

from utils.errors import printable


class Stream:
    """A stream that takes any text and never fails.

    Control characters are shown as escapes, and characters that the encoding lacks as question marks: the output
    contains class names, options and results of others. Once writing fails (a full disk, a reader or terminal that
    went away), all further output is discarded.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        start = "\r" if text.startswith("\r") else ""  # a progress bar redraws its line with it
        self._or_silence(self._stream.write, start + printable(text[len(start):], "\n\t"))
        return len(text)

    def flush(self) -> None:
        self._or_silence(self._stream.flush)

    def _or_silence(self, act: Callable[..., object], *arguments: str) -> None:
        try:
            act(*arguments)
        except (OSError, ValueError):  # a closed file is a ValueError
            # Redirects the descriptor itself, as the stream's buffer is still flushed to it at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            except (OSError, ValueError):
                self._stream = open(os.devnull, "w")
            finally:
                os.close(nowhere)


def make_safe() -> None:
    """Replaces stdout and stderr by a `Stream` each; output to a closed one is discarded."""
    for number in range(3):  # a closed number would be given to the next file opened, and output would go there
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            # Line-buffered, so that stdout and stderr keep their order in one file.
            stream.reconfigure(errors="replace", line_buffering=True)
        setattr(sys, name, stream if isinstance(stream, Stream) else Stream(stream))
