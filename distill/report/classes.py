"""A page's sections by class: predictions and mean soft labels, as heat maps and in words."""

from collections.abc import Sequence

import torch
from markupsafe import Markup, escape
from torch import Tensor

from distill.report.svg import ticks
from distill.report.template import draw, joined, png
from distill.result_files import Score

MOST_NAMED, MOST_NUMBERED = 20, 12  # classes up to which a map has names beside it, and numbers in its cells
LONGEST = 14  # characters of a name beside a map
WORST = 5
COLOUR = (31, 119, 190)  # dark enough for white text; smaller shares are more transparent


def predictions(score: Score, names: Sequence[str], iteration: int, best: int) -> Markup:
    """Accuracy by class, and the confusion matrix.

    Args:
        iteration: of the last evaluation, which made the predictions.
        best: the iteration of the best set, which the rest of the page shows.
    """
    which = "that of the best set" if iteration == best else f"not that of the best set, iteration {best:,}"
    counts = torch.tensor(score.confusion, dtype=torch.double)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    own, networks = shares.diagonal(), len(score.accuracies)
    right = f"{100 * float(counts.diagonal().sum() / counts.sum().clamp(min=1)):.1f}\N{NO-BREAK SPACE}%"
    words = draw.paragraph(
        f"Predictions at the last evaluation (iteration {iteration:,}, {which}) by {networks} {score.network} "
        f"network{'s together' if networks > 1 else ''}: {int(counts.sum()):,} in all, {right} of them right.")
    # All classes in order; if there are many, only the best and the worst.
    many, named = len(names) > MOST_NAMED, _named(names)
    order = own.argsort(descending=True, stable=True).tolist()
    shown = [*order[:WORST], *order[-WORST:]] if many else range(len(names))
    bars = [{"name": names[number], "long": len(names[number]) > LONGEST, "now": 100 * float(own[number]),
             "start": None, "own": False} for number in shown]
    by_class = draw.chart_of("Accuracy by class", draw.bars("Accuracy by class", bars, ""),
                             f"The {WORST} best and the {WORST} worst of {len(names)} classes." if many else "")
    map_ = heat_map("Confusion matrix", shares, names, "class", "prediction",
                    _worst(shares, names, "Most frequent confusions", "{0} mistaken for {1}: {2}",
                           "No class is mistaken for another."))
    rows = [[name if named else f"{number + 1}: {name}", f"{100 * share:.1f} %", _taken_for(row, names, number)]
            for number, (name, share, row) in enumerate(zip(names, own.tolist(), shares))]
    table = draw.folded("Accuracy by class as a table", draw.table(
        "Accuracy by class", ["class", "accuracy", "most often mistaken for"], rows))
    return joined(words, draw.charts([by_class, map_]), table)


def labels(means: Tensor, names: Sequence[str]) -> Markup:
    """The mean soft label of each class's images, as a heat map."""
    means = means.double()
    own = means.diagonal()
    words = (f"On average, the labels of a class give {100 * float(own.mean()):.0f} % to that class "
             f"({100 * float(own.min()):.0f} to {100 * float(own.max()):.0f} %). ")
    words += _worst(means, names, "Largest shares of another class", "{1} in labels of {0}: {2}", "")
    return draw.charts([heat_map("Mean soft label of each class", means, names, "class of the images",
                                 "class in the label", words)])


def heat_map(title: str, shares: Tensor, names: Sequence[str], rows: str, columns: str, words: str) -> Markup:
    """Shares [K, K] as a chart; larger shares have a stronger colour."""
    count, most = len(names), float(shares.max().clamp(min=1e-9))
    strong = (shares / most).clamp(0, 1).sqrt()
    pixels = torch.cat([torch.tensor(COLOUR).view(3, 1, 1).expand(3, count, count),
                        (255 * strong).round()[None]]).byte()
    named = _named(names)
    margin = 34 + 8 * (max(min(len(name), LONGEST) for name in names) if named else len(str(count)))
    width, right, top = 440, 8, 6
    side = width - margin - right
    cell = side / count
    marks = [f'<rect class="empty" x="{margin}" y="{top}" width="{side}" height="{side}"/><image x="{margin}" '
             f'y="{top}" width="{side}" height="{side}" preserveAspectRatio="none" '
             f'href="data:image/png;base64,{png(pixels)}"/>']
    shown = range(count) if named else [int(tick) - 1 for tick in ticks(1, count, 8, whole=True)]
    for number in shown:
        at = (number + 0.5) * cell
        name = escape(short(names[number]) if named else str(number + 1))
        marks.append(f'<text x="{margin - 6}" y="{top + at + 4:.1f}" text-anchor="end">{name}</text><text '
                     f'transform="translate({margin + at + 4:.1f} {top + side + 6}) rotate(-90)" text-anchor="end">'
                     f"{name}</text>")
    if count <= MOST_NUMBERED:
        marks += [f'<text class="{"on" if float(strong[row, column]) > 0.85 else "in"}" '
                  f'x="{margin + (column + 0.5) * cell:.1f}" y="{top + (row + 0.5) * cell + 4:.1f}" '
                  f'text-anchor="middle">{100 * share:.0f}</text>'
                  for row in range(count) for column, share in enumerate(shares[row].tolist()) if round(100 * share)]
    height = top + side + margin
    marks.append(f'<text x="{margin + side / 2}" y="{height - 5}" text-anchor="middle">{columns}</text><text '
                 f'transform="translate(14 {top + side / 2}) rotate(-90)" text-anchor="middle">{rows}</text>')
    scale = (f"In %; each row adds up to 100. The strongest colour is {100 * most:.0f} %; small shares are drawn "
             "more strongly, so that they can be seen."
             + ("" if named else " Classes by their numbers."))
    return draw.chart(title, f"{title}: {columns} by {rows}. {words}", width, f"{height:.0f}", Markup("".join(marks)),
                      [], f"{words} {scale}".strip())


def _worst(shares: Tensor, names: Sequence[str], lead: str, form: str, none: str) -> str:
    """The largest shares outside the diagonal, in words."""
    others = shares.clone().fill_diagonal_(0)
    values, places = others.flatten().sort(descending=True, stable=True)
    said = [form.format(names[place // len(names)], names[place % len(names)], f"{100 * value:.0f} %")
            for value, place in zip(values[:WORST].tolist(), places[:WORST].tolist()) if value >= 0.005]
    return f"{lead}: {'; '.join(said)}." if said else none


def _taken_for(row: Tensor, names: Sequence[str], own: int) -> str:
    others = row.clone()
    others[own] = 0
    value, place = others.max(0)
    return f"{names[int(place)]} ({100 * float(value):.1f} %)" if value > 0 else "none"


def _named(names: Sequence[str]) -> bool:
    """Whether a map has these names beside it: if they are few, and still differ when they are shortened."""
    return len(names) <= MOST_NAMED and len(set(map(short, names))) == len(set(names))


def short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[:LONGEST - 1]}…"
