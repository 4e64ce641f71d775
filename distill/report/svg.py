"""Curves as inline SVG: axes, lines, bands, dots and crosses, coloured by the style sheet of the page."""

import itertools
import math
from collections.abc import Sequence
from functools import partialmethod
from typing import Any

from markupsafe import Markup, escape

from distill.report.template import draw
from utils.program.console import thinned

MOST_POINTS = 2000
LOG_FROM = 50.0  # ratio of the largest to the smallest value above which a scale of positive values is logarithmic

Point = tuple[float, ...]


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, with at most `most` steps between them."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    if whole:
        step = max(round(step), 1)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and twice and five times as much if there are few; the bounds are logarithms."""
    powers = [10.0**each for each in ticks(low, high, 5, whole=True)]
    if len(powers) > 2:
        return powers
    values = [times * 10.0**power for power in range(math.floor(low), math.ceil(high)) for times in (1, 2, 5)]
    return [value for value in values if low <= math.log10(value) <= high]


class Chart:
    """A line chart over iterations, of at most `MOST_POINTS` points a line. Values that are not finite are gaps.

    Args:
        whole: the values are whole numbers, and so are the ticks.
        shows: values that the scale always includes; the scale is linear then.
    """

    width, height = 440, 250
    right, top, bottom = 22, 10, 42

    def __init__(self, title: str, y_label: str, whole: bool = False, shows: Sequence[float] = ()):
        self.title, self.y_label, self.whole, self.shows = title, y_label, whole, shows
        self._marks: list[tuple[str, str, str, list[Point], dict[str, Any]]] = []

    @property
    def empty(self) -> bool:
        return not self._ys()

    def _add(self, kind: str, points: Sequence[Point], style: str, name: str = "", **how: Any) -> None:
        if points and (kind == "crosses" or any(math.isfinite(y) for point in points for y in point[1:])):
            self._marks.append((kind, style, name, thinned(points, MOST_POINTS), how))

    line = partialmethod(_add, "line")
    # Of points (x, low, high); with `steps`, each holds until the next x.
    band = partialmethod(_add, "band")
    dots = partialmethod(_add, "dots")  # with a `radius`
    # Exceptions, which do not widen the scale: values above it, or not finite, are drawn at its upper edge.
    crosses = partialmethod(_add, "crosses")

    def figure(self, words: str) -> Markup:
        """The chart as a `figure`; the words say what it shows, also to screen readers."""
        legend = list(dict.fromkeys((Markup(_swatch(kind, style)), name)
                                    for kind, style, name, _, _ in self._marks if name))
        title = f"{self.title}{' (logarithmic scale)' if self._log() else ''}"
        label = f"{title}: {self.y_label} over iterations. {words}"
        return draw.chart(title, label, self.width, self.height, Markup(self._drawn()), legend, words)

    def _ys(self) -> list[float]:
        marks = [mark for mark in self._marks if mark[0] != "crosses"] or self._marks
        return [y for _, _, _, points, _ in marks for point in points for y in point[1:] if math.isfinite(y)]

    def _log(self) -> bool:
        """Whether the values span so much that a linear scale would hide most of them."""
        ys = self._ys()
        return not self.whole and not self.shows and bool(ys) and min(ys) > 0 and max(ys) / min(ys) > LOG_FROM

    def _drawn(self) -> str:
        log, ys = self._log(), self._ys()
        xs = [point[0] for _, _, _, points, _ in self._marks for point in points]
        scale = math.log10 if log else float
        x_low, x_high = _apart(min(xs), max(xs))
        low, high = _apart(*(scale(of([*ys, *self.shows])) for of in (min, max)))
        edge = 0.04 * (high - low)
        low, high = low - edge, high + edge
        values = _log_ticks(low, high) if log else ticks(low, high, 5, self.whole)
        left = max(52, 28 + 8 * max((len(_tick(value)) for value in values), default=0))  # letters are 7 to 8 wide

        def x(value: float) -> float:
            return left + (value - x_low) / (x_high - x_low) * (self.width - left - self.right)

        def y(value: float) -> float:
            share = min((scale(value) - low) / (high - low), 1) if math.isfinite(value) else 1
            return self.height - self.bottom - share * (self.height - self.top - self.bottom)

        return self._axes(x, y, left, (x_low, x_high), values) + "".join(
            _mark(kind, style, [(x(point[0]), *(y(each) if math.isfinite(each) or kind == "crosses" else math.nan
                                                for each in point[1:])) for point in points], **how)
            for kind, style, _, points, how in self._marks)

    def _axes(self, x: Any, y: Any, left: float, x_range: Point, values: Sequence[float]) -> str:
        right, base = self.width - self.right, self.height - self.bottom
        return "".join([
            f'<path class="axis" d="M{left} {base}H{right}"/>',
            *(f'<path class="axis" d="M{left} {y(value):.1f}H{right}"/><text x="{left - 6}" y="{y(value) + 4:.1f}" '
              f'text-anchor="end">{_tick(value)}</text>' for value in values),
            *(f'<text x="{x(value):.1f}" y="{base + 16}" text-anchor="middle">{_tick(value)}</text>'
              for value in ticks(*x_range, 5, whole=True)),
            f'<text x="{(left + right) / 2}" y="{self.height - 8}" text-anchor="middle">iteration</text>',
            f'<text transform="translate(14 {(self.top + base) / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y_label)}</text>"])


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}" if value >= 1e6 else f"{value:.6g}"


def _apart(low: float, high: float) -> tuple[float, float]:
    """The range, widened if it is empty."""
    if high > low:
        return low, high
    half = abs(low) * 0.1 or 0.5
    return low - half, high + half


def _mark(kind: str, style: str, points: Sequence[Point], radius: float = 2.0, steps: bool = False) -> str:
    if kind == "line":
        path = [f"L{x:.1f} {y:.1f}" if math.isfinite(before) else f"M{x:.1f} {y:.1f}h0"  # a point alone is drawn too
                for (_, before), (x, y) in itertools.pairwise([(0, math.nan), *points]) if math.isfinite(y)]
    elif kind == "band":
        edges = [point for point in points if all(map(math.isfinite, point))]
        if steps:
            edges = [each for now, then in zip(edges, [*edges[1:], edges[-1]]) for each in (now, (then[0], *now[1:]))]
        way = [(x, high) for x, _, high in edges] + [(x, low) for x, low, _ in reversed(edges)]
        path = [f"{'L' if number else 'M'}{x:.1f} {y:.1f}" for number, (x, y) in enumerate(way)] + ["Z"] * bool(way)
    elif kind == "dots":  # a circle of two arcs; one path for all keeps the page small
        path = [f"M{x - radius:.1f} {y:.1f}a{radius} {radius} 0 1 0 {2 * radius} 0a{radius} {radius} 0 1 0 "
                f"{-2 * radius} 0" for x, y in points if math.isfinite(y)]
    else:
        path = [f"M{x - 3:.1f} {y - 3:.1f}l6 6m0-6l-6 6" for x, y in points]
    return f'<path class="{kind} {style}" d="{"".join(path)}"/>'


def _swatch(kind: str, style: str) -> str:
    if kind == "band":
        return f'<path class="band {style}" d="M0 0H28V12H0Z"/>'
    middle = [(2.0, 6.0), (26.0, 6.0)] if kind == "line" else [(14.0, 6.0)]
    return _mark(kind, style, middle, 3.0)
