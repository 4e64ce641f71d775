"""Printed lines: routine output, durations, paths and tables; evenly spaced samples of long lists."""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from utils.config import DataConfig
from utils.errors import number_of, printable, wrapped
from utils.files import REPOSITORY

Item = TypeVar("Item")


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


def say(config: DataConfig, text: str) -> None:
    """Prints a routine line, unless `--quiet`."""
    if not config.quiet:
        print(wrapped(text))


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


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
