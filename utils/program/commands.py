"""Commands to type next or to repeat: programs and options as shell text."""

import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.config import DataConfig
from utils.errors import wrapped
from utils.files import REPOSITORY
from utils.program.console import shown

WIDTH = 78  # columns per line of a command; a path may be longer


def command(script: str, options: dict[str, Any], place: Callable[[Path], str] = shown,
            argument: Path | None = None) -> str:
    """A program and its options as shell text, with lines continued by backslashes.

    Args:
        script: path of the program in the repository.
        options: a value that is a `Path` must be absolute.
        place: how to write a path; it decides in which folder the command works, by default in the current one.
        argument: a path to put before the options.
    """
    words = []
    for name, value in options.items():
        value = place(value) if isinstance(value, Path) else value
        words.append(f"--{name}" if value is True else shlex.quote(f"--{name}={value}"))
    lines: list[str] = []
    line = f"python {shlex.quote(place(REPOSITORY / script))}{f' {shlex.quote(place(argument))}' if argument else ''}"
    for word in words:
        if len(line) + len(word) > WIDTH - 3:
            lines, line = [*lines, line], "   "
        line += f" {word}"
    return " \\\n".join([*lines, line])


def say_next(config: DataConfig, what: str, *typed: str) -> None:
    """Prints commands to type next, unless `--quiet`."""
    if not config.quiet:
        print(f"{wrapped(what)}\n" + "\n".join(textwrap.indent(each, "  ") for each in typed))


def device_given(device: Any) -> dict[str, Any]:
    """The option that runs another program on the same device, if this one was given a device by name."""
    return {"device": device} if isinstance(device, str) and device != "auto" else {}
