"""The one exception for mistakes that a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Says what was given, what is allowed and what to do, in one line.

    Entry scripts print it on stderr and exit with code 2 (`utils.run.entry`).
    """


def unknown_name(kind: str, given: object, allowed: Iterable[str]) -> UserError:
    """The refusal of a name that is not in a table, naming the nearest one that is."""
    allowed = list(allowed)
    by_lower = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(str(given).lower(), list(by_lower), n=1, cutoff=0.5)
    guess = f"did you mean {by_lower[near[0]]!r}? " if near else ""
    # A long list after a good guess buries it.
    rest = "(--help lists all)" if guess and len(allowed) > 40 else f"allowed: {', '.join(allowed)}"
    return UserError(f"unknown {kind} {str(given)!r}; {guess}{rest}")
