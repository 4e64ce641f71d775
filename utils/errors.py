"""The one exception for mistakes that a user can mend, and words for what is said."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence

LONGEST = 900  # characters of a refusal
LONGEST_GIVEN = 200  # of what was given, in a refusal


class UserError(Exception):
    """Says what was given, what is allowed and what to do, in one line.

    Entry scripts print it on stderr and exit with code 2 (`utils.program.entry.entry`).
    """


def out_of_memory(error: BaseException | None) -> str:
    """Whose memory is full, `GPU` or `host`, if an error says so, or one that it followed from; empty: it does not.

    Torch's errors are known by name and text: torch need not be there.
    """
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError":
            return "GPU"
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return "host"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ""


def reason(error: BaseException) -> str:
    """What a foreign error says, on one line and short; its type where it says nothing."""
    return " ".join((str(error) or type(error).__name__).split())[:160]


def one_line(error: Exception | str) -> str:
    """A message as one line that a terminal can show: no line ends, no control characters, its middle left out if long.

    What was given is part of it, and may hold anything.
    """
    return shortened(printable(" ".join(str(error).split())), LONGEST)


def printable(text: str, kept: str = "") -> str:
    """The text, each character that a terminal obeys as an escape, but for those that are kept."""
    return "".join(each.encode("unicode_escape").decode() if obeyed(each) and each not in kept else each
                   for each in text)


def obeyed(character: str) -> bool:
    """Whether it is no text: a control character, half a character, a line's end, or a change of direction."""
    return (unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
            or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))


def shortened(text: str, most: int = LONGEST_GIVEN) -> str:
    """The text, its middle left out if it is longer than so many characters."""
    return text if len(text) <= most else f"{text[:most * 2 // 3]} … {text[-most // 4:]}"


def number_of(count: int, noun: str) -> str:
    """Such as 1 file, 2 files."""
    return f"{count} {noun}{'s' * (count != 1)}"


def unknown_name(kind: str, given: object, allowed: Iterable[str]) -> UserError:
    """The refusal of a name that is not in a table, naming the nearest one that is."""
    allowed = list(allowed)
    guess = nearest(str(given), allowed)
    # A long list after a good guess buries it.
    rest = "(--help lists all)" if guess and len(allowed) > 40 else f"allowed: {', '.join(allowed)}"
    return UserError(f"unknown {kind} {shortened(str(given))!r}; {f'{guess} ' if guess else ''}{rest}")


def unknown_names(kind: str, given: Sequence[str], allowed: Sequence[str]) -> UserError:
    """The refusal of all names that are not in a table, each with the nearest one that is."""
    if len(given) == 1:
        return unknown_name(kind, given[0], allowed)
    guesses = [(name, nearest(name, allowed)) for name in given]
    words = ", ".join(f"{shortened(name)!r}{f' ({guess})' if guess else ''}" for name, guess in guesses)
    return UserError(f"unknown {kind}s {words}; --help lists all")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A question, or nothing where no name is near."""
    by_lower = {name.lower().lstrip("-"): name for name in allowed}
    near = difflib.get_close_matches(given.lower().lstrip("-"), list(by_lower), n=1, cutoff=0.65)
    return f"did you mean {by_lower[near[0]]!r}?" if near else ""
