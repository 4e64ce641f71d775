"""A page's charts: loss, accuracy, learning rate, difficulty window and skipped updates, of one run or of several."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

from markupsafe import Markup

from distill.report.page_pictures import SAVED
from distill.report.read_run import SavedRun
from distill.report.svg import Chart
from distill.report.template import draw
from distill.result_files import NORMAL, Iteration, Score, images_tested

STYLES, WIDTHS = 6, 3  # colours with their dashes, and widths, of curves, in report.css
LEVELS = 7  # dashes of reference accuracies, in report.css
LEAST_ACCURACY = 10.0  # %: the accuracy axis covers at least 0 to this, so that noise looks like noise


def charts(runs: dict[str, SavedRun]) -> list[Markup]:
    """The charts of one run, or of several by name."""
    several = len(runs) > 1
    drawn = [_losses(runs), _accuracies(runs), _rates(runs),
             *(_window(run, f", {name}" if several else "") for name, run in runs.items()), _skipped(runs)]
    return [chart for chart in drawn if chart]


def _style(number: int) -> str:
    """How a chart's curve of this number looks."""
    return f"s{number % STYLES} t{number // STYLES % WIDTHS}"


def loss_in_words(step: Iteration, form: str = ".3g") -> str:
    return "not finite" if math.isnan(step.loss) else f"{step.loss:{form}}"


def _losses(runs: dict[str, SavedRun]) -> Markup | None:
    """Every loss and the running mean; for several runs only the means."""
    alone = len(runs) == 1
    chart = Chart("Matching loss", "matching loss")
    spans = []
    for number, (name, run) in enumerate(runs.items()):
        skipped = run.metrics.skipped
        points = [(step.iteration, step.loss if step.updated else math.nan) for step in run.metrics.iterations]
        span, mean = run.metrics.running_mean()
        spans.append(span)
        if alone and mean:
            chart.line(points, "raw", "each iteration")
        chart.line(mean or points, _style(number),
                   (f"mean over {span}" if mean else "each iteration") if alone else name)
        if alone and skipped:
            chart.crosses([(step.iteration, step.loss) for step in skipped], "bad", "update skipped")
    if chart.empty:
        return None
    first, words = next(iter(runs.values())), ""
    threshold = first.config.get("threshold")
    if alone and isinstance(threshold, int | float) and math.isfinite(threshold):
        words = f" Updates whose loss exceeds {threshold:g} are skipped" + (
            ", and not in the mean; losses above the scale stand at its upper edge." if first.metrics.skipped else ".")
    elif not alone and any(spans):
        words = f" Running means over {', '.join(f'{span} iterations' for span in dict.fromkeys(spans) if span)}"
        words += "." if all(spans) else "; of runs too short for that, every iteration."
    return chart.figure(f"The first and the last iteration: {_ends(runs, loss_in_words)}.{words}")


def _ends(runs: dict[str, SavedRun], in_words: Callable[[Iteration], str]) -> str:
    """The first and last value of each run, in words."""
    return _of_each(runs, lambda run: f"from {in_words(run.metrics.iterations[0])} to "
                                      f"{in_words(run.metrics.iterations[-1])}" if run.metrics.iterations else "")


def _of_each(runs: dict[str, SavedRun], in_words: Callable[[SavedRun], str]) -> str:
    """The words for each run, after its name if there are several."""
    said = {name: in_words(run) for name, run in runs.items()}
    return "; ".join(f"{name}: {words}" if len(runs) > 1 else words for name, words in said.items() if words)


def _accuracies(runs: dict[str, SavedRun]) -> Markup | None:
    measured_on = {name: f"{images_tested(run.result.chosen_on)} images" for name, run in runs.items()}
    alike = len(set(measured_on.values())) == 1
    chart = Chart(f"Accuracy on {next(iter(measured_on.values()))}" if alike else "Accuracy", "accuracy, %",
                  shows=(0.0, LEAST_ACCURACY))
    lines: dict[str, list[tuple[int, Score]]] = {}
    styles: dict[str, str] = {}
    further = itertools.count(len(runs))  # a run's first line looks as in the other charts
    for number, (run_name, run) in enumerate(runs.items()):
        numbers = itertools.chain([number], further)
        for evaluation in run.metrics.evaluations:
            for score in evaluation.scores:
                name = (score.network if len(runs) == 1 else f"{run_name}, {score.network}") + (
                    "" if evaluation.set == NORMAL else f", {evaluation.set}") + (
                    "" if alike else f", {measured_on[run_name]}")
                lines.setdefault(name, []).append((evaluation.iteration, score))
                if name not in styles:
                    styles[name] = _style(next(numbers))
    for name, points in lines.items():
        style = styles[name]
        chart.band([(at, 100 * (score.mean - score.std), 100 * (score.mean + score.std))
                    for at, score in points if score.std is not None], style)
        means = [(at, 100 * score.mean) for at, score in points]
        chart.line(means, style, name)
        chart.dots(means, style, radius=2.5)
    if chart.empty:
        return None
    last = "; ".join(f"{name}: last {points[-1][1].percent} %" for name, points in lines.items())
    counts = sorted({len(score.accuracies) for points in lines.values() for _, score in points})
    of_what = "Of one network each" if counts == [1] else (
        f"Mean, and a band of ± one standard deviation, over {' or '.join(map(str, counts))} networks")
    levels = _levels(next(iter(runs.values()))) if len(runs) == 1 else []
    for number, (name, level) in enumerate(levels):
        last += f"; {name}: {100 * level:.2f} %"
        chart.line([(0, 100 * level), (next(iter(runs.values())).iteration, 100 * level)], f"r{number}", name)
    return chart.figure(f"{of_what}. {last}.")


def _levels(run: SavedRun) -> list[tuple[str, float]]:
    """Known reference values for a run's accuracies: (what, accuracy)."""
    pictures, evaluations = run.pictures, run.metrics.of_set(NORMAL)
    if not evaluations:
        return []
    first = evaluations[0].scores[0]
    levels = [(kind, score.mean) for (kind, images), score in run.real_images.items()
              if images == images_tested(run.result.chosen_on)]
    if pictures and evaluations[0].iteration == 0:
        began = {"noise": "noise", SAVED: "the saved set"}.get(pictures.began, "real images")
        labelled = "" if pictures.hard or pictures.began == SAVED else ", expert labels"
        levels.append((f"the start ({began}{labelled})", first.mean))
    if pictures and (reached := pictures.experts_reached):
        levels.append(("the experts' mean", sum(reached) / len(reached)))
    return levels[:LEVELS]


def _rates(runs: dict[str, SavedRun]) -> Markup | None:
    chart = Chart("Synthetic learning rate α", "α")
    for number, (name, run) in enumerate(runs.items()):
        iterations = run.metrics.iterations
        chart.line([(step.iteration, step.lr) for step in iterations], _style(number), "" if len(runs) == 1 else name)
        chart.crosses([(step.iteration, step.lr) for step in iterations if step.held], "bad", "update held back")
    if chart.empty:
        return None
    return chart.figure(f"After each update: {_ends(runs, lambda step: f'{step.lr:.4g}')}.")


def _window(run: SavedRun, of_which: str) -> Markup | None:
    """The allowed start epochs as a band, the drawn ones as dots in it."""
    iterations = run.metrics.iterations
    if not iterations:
        return None
    lowest = run.config.get("min_start_epoch", min(step.start_epoch for step in iterations))
    lowest = lowest if isinstance(lowest, int) else 0
    chart = Chart(f"Difficulty window{of_which}", "start epoch", whole=True)
    # Half an epoch wider on either side, so that dots lie inside; the bound itself is exclusive.
    allowed = [(step.iteration, lowest - 0.5, step.bound - 0.5) for step in iterations]
    chart.band([*allowed, (iterations[-1].iteration + 1, *allowed[-1][1:])], "window", "allowed start epochs",
               steps=True)
    chart.dots([(step.iteration, step.start_epoch) for step in iterations if step.updated], "s0",
               "drawn, updated", radius=1.2 if len(iterations) > 500 else 2.0)
    chart.crosses([(step.iteration, step.start_epoch) for step in run.metrics.skipped], "bad", "drawn, update skipped")
    first, last = iterations[0].bound - 1, iterations[-1].bound - 1
    grew = f"{lowest} to {first} at first, {lowest} to {last} at the end" if first != last else f"{lowest} to {last}"
    counts = Counter(step.start_epoch for step in iterations)
    drawn = ", ".join(f"{epoch}: {count:,}" for epoch, count in sorted(counts.items())) if len(counts) <= 12 else ""
    return chart.figure(f"Allowed start epochs: {grew}." + (f" How often each was drawn: {drawn}." if drawn else ""))


def _skipped(runs: dict[str, SavedRun]) -> Markup | None:
    if not any(run.metrics.iterations for run in runs.values()):
        return None
    total = _of_each(runs, lambda run: f"{len(run.metrics.skipped):,} of {len(run.metrics.iterations):,}")
    if not any(run.metrics.skipped for run in runs.values()):
        return draw.chart_of("Skipped updates", "", f"None was skipped ({total}).")
    chart = Chart("Skipped updates", "skipped so far", whole=True)
    for number, (name, run) in enumerate(runs.items()):
        counts = itertools.accumulate(not step.updated for step in run.metrics.iterations)
        points = [(step.iteration, count) for step, count in zip(run.metrics.iterations, counts)]
        chart.line(points, _style(number), "" if len(runs) == 1 else name)
    return chart.figure(f"Skipped: {total}.")
