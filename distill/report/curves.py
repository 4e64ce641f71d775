"""A page's charts: loss, accuracy, learning rate, difficulty window and skipped updates, of one run or of several."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from markupsafe import Markup

from distill.report.record import FinishedRun
from distill.report.svg import Chart, thinned
from distill.report.template import draw
from distill.results import NORMAL, Iteration
from utils.metrics import percent

STYLES = 6  # colours and dashes


def of_one(run: FinishedRun) -> list[Markup]:
    charts = [_losses([run], [run.name]), _accuracies([run], [run.name]), _rates([run], [run.name]), _window(run),
              _skipped([run], [run.name])]
    return [chart for chart in charts if chart]


def of_several(runs: Sequence[FinishedRun], names: list[str]) -> list[Markup]:
    charts = [_losses(runs, names), _accuracies(runs, names), _rates(runs, names), _skipped(runs, names),
              *(_window(run, name) for run, name in zip(runs, names))]
    return [chart for chart in charts if chart]


def how_many(iterations: Sequence[Iteration]) -> str:
    """Of the iterations are drawn, in words."""
    drawn = len(thinned(iterations))
    return f"{len(iterations):,} iterations" + (
        f", of which {drawn:,}, evenly spaced, are drawn; averages are over all of them"
        if drawn < len(iterations) else "") + "."


def running_mean(iterations: Sequence[Iteration]) -> tuple[int, list[tuple[float, float]]]:
    """Over how many iterations, and the mean loss around each, without the skipped ones; nothing of a short run."""
    if len(iterations) < 20:
        return 0, []
    span = max(len(iterations) // 50, 5)
    losses = [step.loss if step.updated else 0.0 for step in iterations]
    updated = [float(step.updated) for step in iterations]
    sums = [torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0) for values in (losses, updated)]
    total, number = (running[span:] - running[:-span] for running in sums)
    means = (total / number).tolist()  # NaN where all were skipped, which is a gap in the line
    return span, [(iterations[first + span // 2].iteration, mean) for first, mean in enumerate(means)]


def loss_in_words(step: Iteration, form: str = ".3g") -> str:
    return "not finite" if math.isnan(step.loss) else f"{step.loss:{form}}"


def _losses(runs: Sequence[FinishedRun], names: list[str]) -> Markup | None:
    """Every loss and its running mean; of several runs the means alone."""
    alone = len(runs) == 1
    chart = Chart("Matching loss", "iteration", "matching loss")
    spans = []
    for number, (run, name) in enumerate(zip(runs, names)):
        iterations, skipped = run.metrics.iterations, run.metrics.skipped
        points = [(step.iteration, step.loss if step.updated else math.nan) for step in iterations]
        span, mean = running_mean(iterations)
        spans.append(span)
        if alone and mean:
            chart.line(thinned(points), "raw", "each iteration")
        chart.line(thinned(mean or points), f"s{number % STYLES}",
                   (f"mean over {span}" if mean else "each iteration") if alone else name)
        if alone and skipped:
            chart.crosses(thinned([(step.iteration, step.loss) for step in skipped]), "bad", "update skipped")
    if chart.empty:
        return None
    threshold, words = runs[0].config.get("threshold"), ""
    if alone and isinstance(threshold, int | float):
        words = f" Updates whose loss exceeds {threshold:g} are skipped" + (
            ", and not in the mean; losses above the scale stand at its upper edge."
            if runs[0].metrics.skipped else ".")
    elif not alone and any(spans):
        words = f" Running means over {', '.join(f'{span} iterations' for span in dict.fromkeys(spans) if span)}."
    ends = "; ".join(f"{_of(name, alone)}from {loss_in_words(run.metrics.iterations[0])} to "
                     f"{loss_in_words(run.metrics.iterations[-1])}"
                     for name, run in zip(names, runs) if run.metrics.iterations)
    return chart.figure(f"From the first iteration to the last: {ends}.{words}")


def _of(name: str, alone: bool) -> str:
    return "" if alone else f"{name}: "


def _accuracies(runs: Sequence[FinishedRun], names: list[str]) -> Markup | None:
    alone = len(runs) == 1
    chart = Chart("Accuracy", "iteration", "accuracy, %")
    lines: dict[tuple[str, str, str], list[tuple[int, float, float, int]]] = {}
    for run, run_name in zip(runs, names):
        for evaluation in run.metrics.evaluations:
            for score in evaluation.scores:
                lines.setdefault((run_name, evaluation.set, score.network), []).append(
                    (evaluation.iteration, score.mean, score.std, len(score.accuracies)))
    spoken = []
    for number, ((run_name, which, network), points) in enumerate(lines.items()):
        name = (network if alone else f"{run_name}, {network}") + ("" if which == NORMAL else f", {which}")
        style = f"s{number % STYLES}"
        chart.band([(at, 100 * (mean - std), 100 * (mean + std)) for at, mean, std, _ in points], style)
        means = [(at, 100 * mean) for at, mean, _, _ in points]
        chart.line(means, style, name)
        chart.dots(means, style, 2.5)
        spoken.append(f"{name}: last {percent(*points[-1][1:3])} %")
    if chart.empty:
        return None
    counts = sorted({count for points in lines.values() for *_, count in points})
    over = f"{' or '.join(map(str, counts))} network{'' if counts == [1] else 's'}"
    return chart.figure(f"Mean, and a band of ± one standard deviation, over {over}. {'; '.join(spoken)}.")


def _rates(runs: Sequence[FinishedRun], names: list[str]) -> Markup | None:
    alone = len(runs) == 1
    chart = Chart("Synthetic learning rate α", "iteration", "α")
    spoken = []
    for number, (run, name) in enumerate(zip(runs, names)):
        iterations = run.metrics.iterations
        chart.line(thinned([(step.iteration, step.lr) for step in iterations]), f"s{number % STYLES}",
                   "" if alone else name)
        held = [(step.iteration, step.lr) for step in iterations if step.held]
        if held:
            chart.crosses(thinned(held), "bad", "held back")
        if iterations:
            spoken.append(f"{_of(name, alone)}from {iterations[0].lr:.4g} to {iterations[-1].lr:.4g}")
    return None if chart.empty else chart.figure(f"After each update: {'; '.join(spoken)}.")


def _window(run: FinishedRun, name: str = "") -> Markup | None:
    """The allowed start epochs as a band, the drawn ones as dots in it."""
    iterations = run.metrics.iterations
    if not iterations:
        return None
    lowest = run.config.get("min_start_epoch", min(step.start_epoch for step in iterations))
    lowest = lowest if isinstance(lowest, int) else 0
    chart = Chart(f"Difficulty window{f', {name}' if name else ''}", "iteration", "start epoch", whole=True)
    # Half an epoch wider on either side, so that dots lie inside; the bound itself is exclusive.
    chart.band(thinned([(step.iteration, lowest - 0.5, step.bound - 0.5) for step in iterations]), "window",
               "allowed start epochs", steps=True)
    chart.dots(thinned([(step.iteration, step.start_epoch) for step in iterations if step.updated]), "s0",
               1.2 if len(iterations) > 500 else 2.0, "drawn, updated")
    chart.crosses(thinned([(step.iteration, step.start_epoch) for step in run.metrics.skipped]), "bad",
                  "drawn, update skipped")
    first, last = iterations[0].bound - 1, iterations[-1].bound - 1
    grew = f"{lowest} to {first} at first, {lowest} to {last} at the end" if first != last else f"{lowest} to {last}"
    counts = Counter(step.start_epoch for step in iterations)
    drawn = ", ".join(f"{epoch}: {count:,}" for epoch, count in sorted(counts.items())) if len(counts) <= 12 else ""
    return chart.figure(f"Allowed start epochs: {grew}." + (f" How often each was drawn: {drawn}." if drawn else ""))


def _skipped(runs: Sequence[FinishedRun], names: list[str]) -> Markup | None:
    if not any(run.metrics.iterations for run in runs):
        return None
    alone = len(runs) == 1
    total = "; ".join(f"{_of(name, alone)}{len(run.metrics.skipped):,} of {len(run.metrics.iterations):,}"
                      for run, name in zip(runs, names))
    if not any(run.metrics.skipped for run in runs):
        return draw.chart("Skipped updates", "", 0, 0, "", [], f"None was skipped ({total}).")
    chart = Chart("Skipped updates", "iteration", "skipped so far", whole=True)
    for number, (run, name) in enumerate(zip(runs, names)):
        count, points = 0, []
        for step in run.metrics.iterations:
            count += not step.updated
            points.append((step.iteration, count))
        chart.line(thinned(points), f"s{number % STYLES}", "" if alone else name)
    return chart.figure(f"Skipped: {total}.")
