"""Printed lines: routine output, notes, and the options that differ from the defaults."""

import contextlib
import datetime
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from utils.config import DataConfig, changed, influential
from utils.errors import number_of, printable
from utils.files import REPOSITORY

if TYPE_CHECKING:
    import torch


def duration(seconds: float) -> str:
    """A duration in words, in suitable units: 0.034 s, 3 min 20 s, 2 days 3 h."""
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    left = datetime.timedelta(seconds=round(seconds))
    hours, minutes = divmod(left.seconds // 60, 60)
    if left.days:
        return f"{number_of(left.days, 'day')} {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left.seconds % 60} s"


def short_count(number: float) -> str:
    """A number in about three digits: 0.42, 8.1, 812, 12.3k."""
    if number < 99.5:
        return f"{number:.2g}"
    return f"{number:.0f}" if number < 999.5 else tqdm.format_sizeof(number)


def percent(mean: float, std: float | None) -> str:
    """An accuracy in [0, 1] and its standard deviation (None: a single value) as in tables: 82.14 ± 0.42."""
    return f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f}"


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
    """Prints a line on stderr without running into a progress bar."""
    (tqdm.write if sys.stderr.isatty() else print)(wrapped(text, sys.stderr), file=sys.stderr)


def columns_of(stream: Any) -> int:
    """Width of a stream's terminal; 80 if unknown."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def say(config: DataConfig, text: str) -> None:
    """Prints a routine line, unless `--quiet`."""
    if not config.quiet:
        print(wrapped(text))


def announce(config: DataConfig, device: "torch.device", engine: str, *lines: str) -> None:
    """Prints what a run runs on, what it is, and which of its options differ from the defaults.

    Args:
        engine: see `describe_engine`.
    """
    from utils.program.device import describe, describe_precision  # imports torch, already loaded here

    options = ", ".join(f"{name} {value}" for name, value in changed(influential(config), type(config)).items())
    for line in (f"on {describe(device)}, {describe_precision(config.precision, device)}, {engine}", *lines,
                 f"options: {options or 'all defaults'}"):
        say(config, line)


def shown(path: Path | str) -> str:
    """A path as the user would type it: relative to the current folder if it lies below that folder, or if both are
    in the repository; else as given."""
    path = Path(path)
    try:
        here = Path.cwd()
    except OSError:  # the current folder was removed
        return str(path)
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    together = path.is_relative_to(REPOSITORY) and here.is_relative_to(REPOSITORY)
    return os.path.relpath(path) if together else str(path)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first being the header, as a Markdown table with aligned columns."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)
