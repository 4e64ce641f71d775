"""The one exception for mistakes that a user can fix, notes to the user, and helpers that word messages."""

import contextlib
import difflib
import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

LONGEST = 900  # characters of an error message, at most
LONGEST_GIVEN = 200  # characters of a value quoted in it, at most


class UserError(Exception):
    """A mistake of the user; the message says what was given, what is allowed and what to do, in one line.

    Entry scripts print it on stderr and exit with code 2 (`utils.program.entry.entry`).
    """


def out_of_memory(error: BaseException | None) -> str:
    """`GPU` or `host` if this error, or one that led to it, says that this memory is full; empty otherwise.

    Torch's errors are recognised by name and text, so torch need not be imported.
    """
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError":
            return "GPU"
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return "host"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ""


def reason(error: BaseException) -> str:
    """The first sentences of another library's error, short and on one line; its type if it has no message."""
    said = " ".join((str(error) or type(error).__name__).split())
    sentences, stop, _ = said[:LONGEST_GIVEN].rpartition(". ")
    return sentences if stop and len(said) > LONGEST_GIVEN else shortened(said)


def one_line(error: Exception | str) -> str:
    """The message as one line that a terminal can show: no line breaks or control characters, its middle cut if long.

    It quotes the user's input, which may contain anything.
    """
    return shortened(printable(" ".join(str(error).split())), LONGEST)


def printable(text: str, kept: str = "") -> str:
    """The text with each character that a terminal would act on escaped, except those in `kept`."""
    return "".join(each.encode("unicode_escape").decode() if is_control(each) and each not in kept else each
                   for each in text)


def is_control(character: str) -> bool:
    """Whether it is a control character, a lone surrogate, a line separator or a bidirectional control."""
    return (unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
            or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))


def shortened(text: str, most: int = LONGEST_GIVEN) -> str:
    """The text, with its middle left out if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:most * 2 // 3]} … {text[-most // 4:]}"


def some_of(names: Sequence[str]) -> str:
    """Names for a message: a, b, c and 7 more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def number_of(count: int, noun: str) -> str:
    """A count with its noun: 1 file, 2 files, 3 classes."""
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def unknown_name(kind: str, given: object, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not allowed; it suggests the closest one that is."""
    allowed = list(allowed)
    guess = nearest(str(given), allowed)
    # A long list would bury a good guess.
    rest = "(--help lists all)" if guess and len(allowed) > 40 else f"allowed: {', '.join(allowed)}"
    return UserError(f"unknown {kind} {shortened(str(given))!r}; {f'{guess} ' if guess else ''}{rest}")


def unknown_names(kind: str, given: Sequence[str], allowed: Sequence[str]) -> UserError:
    """The error for several names that are not allowed, each with the closest one that is."""
    if len(given) == 1:
        return unknown_name(kind, given[0], allowed)
    guesses = [(name, nearest(name, allowed)) for name in given]
    words = ", ".join(f"{shortened(name)!r}{f' ({guess})' if guess else ''}" for name, guess in guesses)
    return UserError(f"unknown {kind}s {words}; --help lists all")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A question that suggests the closest name; empty if none is close."""
    by_lower = {name.lower().lstrip("-"): name for name in allowed}
    near = difflib.get_close_matches(given.lower().lstrip("-"), list(by_lower), n=1, cutoff=0.65)
    return f"did you mean {by_lower[near[0]]!r}?" if near else ""


def wrapped(text: str, stream: Any = None) -> str:
    """Wrapped to the terminal's width, with lines after the first indented; unchanged where there is no terminal.

    Args:
        stream: where the text is printed; None: stdout.
    """
    stream = stream or sys.stdout
    if not stream.isatty():
        return text
    return textwrap.fill(text, max(20, columns_of(stream)), subsequent_indent="  ", break_long_words=False,
                         break_on_hyphens=False)


def note(text: str) -> None:
    """Prints a note on stderr without running into a progress bar."""
    (tqdm.write if sys.stderr.isatty() else print)(wrapped(f"note: {text}", sys.stderr), file=sys.stderr)


def columns_of(stream: Any) -> int:
    """Width of a stream's terminal; 80 if unknown."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80
