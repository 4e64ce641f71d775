"""How far something long is, for whoever shows it; who that is, nobody here knows."""

import contextlib
from collections.abc import Callable, Iterator

Watch = Callable[[str, float], contextlib.AbstractContextManager[Callable[[float], object]]]
"""What is done, in words, and how much of it there is, in any unit → inside it, what to call with how much more is
done."""


@contextlib.contextmanager
def unwatched(what: str, total: float) -> Iterator[Callable[[float], None]]:
    yield lambda done: None
