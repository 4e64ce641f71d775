"""Code that the whole program shares; it imports nothing from buffer/ or distill/."""

import importlib
from collections.abc import Callable
from typing import Any


def later(module: str, *names: str) -> Callable[[str], Any]:
    """A package's `__getattr__` that imports `module` when one of `names` is first accessed.

    This defers importing torch, which takes two seconds and is not needed for `--help`, a refusal or a finished run.
    """
    def named(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module.rpartition('.')[0]!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module), name)

    return named
