"""Pictures by matplotlib: distilled images beside real ones, and the curves of a run."""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distill.report.classes import short
from distill.report.curves import LEAST_ACCURACY
from distill.report.page_pictures import Pictures
from distill.result_files import EMA, NORMAL, Metrics
from utils.errors import printable
from utils.files import atomic_write


def save_images(path: Path, pictures: Pictures) -> None:
    """A PNG of the first initial and distilled images of at most 20 classes. For a factor above 1, they are shown as
    networks see them, after the stored images.

    One image per class: a column for each class, the initial image above the distilled one. More: a row for each class.
    """
    rows = list(pictures.rows().items())[:20]
    per_class = min(len(of_class) for _, of_class in rows)
    stored = [pictures.stored_of(of_class[:per_class]) for _, of_class in rows]
    pairs = [[*images, *pictures.start[of_class[:per_class]], *pictures.distilled[of_class[:per_class]]]
             for images, (_, of_class) in zip(stored, rows)]
    side_labels = [short(printable(pictures.classes[number])) for number, _ in rows]
    counts = {"stored": len(stored[0]), pictures.began: per_class, "distilled": per_class}
    top_labels = ["" if at else word for word, count in counts.items() for at in range(count)]
    if per_class == 1:
        pairs, side_labels, top_labels = list(zip(*pairs)), top_labels, side_labels
    # A single mosaic, as separate axes take a second for every fifty images.
    _, height, width = pairs[0][0].shape
    gap = max(1, width // 12)
    mosaic = np.full((len(pairs) * (height + gap), len(pairs[0]) * (width + gap), 3), 255, dtype=np.uint8)
    for at, row in enumerate(pairs):
        for across, image in enumerate(row):
            top, left = at * (height + gap), across * (width + gap)
            mosaic[top:top + height, left:left + width] = image.permute(1, 2, 0)
    size = 1.2 + 0.9 * len(pairs[0]), 0.3 + 0.9 * len(pairs) * (height + gap) / (width + gap)
    with drawing(path, size=size) as ((axis,),):
        axis.imshow(mosaic[:-gap, :-gap], interpolation="nearest")
        axis.xaxis.tick_top()
        axis.set_xticks([(width + gap) * across + width / 2 for across in range(len(top_labels))], top_labels)
        axis.set_yticks([(height + gap) * at + height / 2 for at in range(len(side_labels))], side_labels)
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)


def save_curves(path: Path, metrics: Metrics, threshold: float | None, images: str) -> None:
    """A PNG of a run's matching loss, accuracy, learning rate and start epochs.

    Args:
        threshold: the height at which skipped updates with a non-finite loss are drawn; None: they are not drawn.
        images: which ones accuracies were measured on, in words.
    """
    steps = metrics.iterations
    scores = [(evaluation.iteration, evaluation.scores[0]) for evaluation in metrics.of_set(NORMAL)]
    iterations = [step.iteration for step in steps]
    threshold = math.nan if threshold is None else threshold
    with drawing(path, 2, 2, size=(9, 5.5)) as axes:
        (loss, accuracy), (lr, window) = axes
        # As on the page, losses of skipped updates are gaps in the line and left out of the mean.
        loss.plot(iterations, [step.loss if step.updated else math.nan for step in steps], color="0.75", linewidth=0.6)
        _, means = metrics.running_mean()
        loss.plot([at for at, _ in means], [mean for _, mean in means], color="C0")
        # Losses of skipped updates do not widen the scale.
        top = loss.get_ylim()[1] if any(step.updated for step in steps) else math.inf
        skipped = [(step.iteration, min(step.loss if math.isfinite(step.loss) else threshold, top))
                   for step in metrics.skipped]
        if skipped:
            loss.scatter(*zip(*skipped), s=6, color="C3", label="skipped")
            loss.legend(fontsize=8)
        loss.set(title="matching loss", xlabel="iteration")

        if scores:
            at = [iteration for iteration, _ in scores]
            mean = 100 * np.array([score.mean for _, score in scores])
            std = 100 * np.array([score.std or 0 for _, score in scores])  # no band for one network
            accuracy.plot(at, mean, marker=".", color="C2")
            accuracy.fill_between(at, mean - std, mean + std, alpha=0.2, color="C2", linewidth=0)
            accuracy.set_ylim(0, max(LEAST_ACCURACY, 1.05 * float((mean + std).max())))
        accuracy.set(title=f"accuracy on {images} images, %\n({scores[0][1].network if scores else ''}"
                     f"{', images as they are' * bool(metrics.of_set(EMA))})", xlabel="iteration")

        lr.plot(iterations, [step.lr for step in steps], color="C1")
        lr.set(title="synthetic learning rate α", xlabel="iteration")

        window.scatter(iterations, [step.start_epoch for step in steps], s=2, color="C4")
        window.step(iterations, [step.bound for step in steps], color="0.4", linewidth=0.8)
        window.set(title="start epoch, and its bound (exclusive)", xlabel="iteration")
        for axis in (*(each.xaxis for each in axes.flat), window.yaxis):
            axis.get_major_locator().set_params(integer=True)


@contextlib.contextmanager
def drawing(path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any) -> Iterator[Any]:
    """Axes [rows, columns] to draw on, written as a PNG at the end.

    The user's own matplotlib settings are ignored.

    Args:
        size: width and height in inches.
        options: for matplotlib's `subplots`.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook sets its own backend, which may not be installed here
    import matplotlib  # slow to import, so only when something is drawn
    from matplotlib.figure import Figure  # needs no window system, unlike pyplot

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        figure = Figure(figsize=size, layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False, **options)
        with atomic_write(path) as aside:
            figure.savefig(aside, dpi=130, format="png")
