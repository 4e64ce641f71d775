"""Progress of long steps, reported to a callback; the code here does not know what displays it."""

import contextlib
from collections.abc import Callable, Iterator

Watch = Callable[[str, float], contextlib.AbstractContextManager[Callable[[float], object]]]
"""(description of a step, its total in any unit) → a context manager that yields a function, to be called with each
further amount done."""


@contextlib.contextmanager
def unwatched(what: str, total: float) -> Iterator[Callable[[float], None]]:
    yield lambda done: None
