"""What every part of the program uses; knows nothing of buffer/ or distill/."""

import importlib
from collections.abc import Callable
from typing import Any


def later(module: str, *names: str) -> Callable[[str], Any]:
    """A package's `__getattr__` for names of one of its modules, which is imported when the first of them is asked for:
    with it comes torch, which takes two seconds, and which `--help`, a refusal and a finished run do without.
    """
    def named(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module.rpartition('.')[0]!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module), name)

    return named
