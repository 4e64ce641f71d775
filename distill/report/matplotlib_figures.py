"""Pictures: distilled images beside real ones, curves of a run, what is in a buffer, what runs are worth."""

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from distill.result_files import NORMAL, Metrics
from utils.files import atomic_write


def clip_outliers(images: Tensor, deviations: float = 2.5) -> Tensor:
    """Values clamped at the mean ± 2.5 standard deviations of the whole tensor, as published pictures are."""
    mean, std = images.mean(), images.std()
    return images.clamp(mean - deviations * std, mean + deviations * std)


def save_images(path: Path, real: Tensor, distilled: Tensor, classes: tuple[str, ...], columns: int = 10) -> None:
    """A PNG of each class's first real starting images and what became of them, at most 20 classes.

    One image a class: a column for each class, the real one above the distilled one. More: a row for each class.

    Args:
        real, distilled: pixels [K·ipc, C, H, W], classes in order; the distilled are clipped at ±2.5 σ and each
            image is scaled to its own range.
        columns: at most so many images a class on each side.
    """
    ipc = len(distilled) // len(classes)
    shown, classes = min(ipc, columns), classes[:20]
    distilled = clip_outliers(distilled)
    firsts = range(0, len(classes) * ipc, ipc)
    pairs = [[*real[first:first + shown], *distilled[first:first + shown]] for first in firsts]
    side_labels, top_labels = list(classes), ["real", *[""] * (shown - 1), "distilled", *[""] * (shown - 1)]
    if ipc == 1:
        pairs, side_labels, top_labels = list(zip(*pairs)), top_labels, side_labels
    figure, axes = pyplot().subplots(len(pairs), len(pairs[0]), squeeze=False, layout="constrained",
                                      figsize=(1.2 + 0.9 * len(pairs[0]), 0.3 + 0.9 * len(pairs)))
    for row_axes, row, side_label in zip(axes, pairs, side_labels):
        for axis, image, top_label in zip(row_axes, row, top_labels):
            axis.imshow(_as_picture(image), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if row is pairs[0]:
                axis.set_title(top_label, fontsize=8)
        row_axes[0].set_ylabel(side_label, rotation=0, ha="right", va="center", fontsize=8)
    save_figure(figure, path)


def save_curves(path: Path, metrics: Metrics, threshold: float) -> None:
    """A PNG of a run's matching loss, accuracy, learning rate and start epochs."""
    steps = metrics.iterations
    scores = [(evaluation.iteration, evaluation.scores[0]) for evaluation in metrics.of_set(NORMAL)]
    iterations = [step.iteration for step in steps]
    figure, ((loss, accuracy), (lr, window)) = pyplot().subplots(2, 2, figsize=(9, 5.5), layout="constrained")

    # As in the page: losses of skipped updates are gaps in the line, and not in the mean.
    loss.plot(iterations, [step.loss if step.updated else math.nan for step in steps], color="0.75", linewidth=0.6)
    _, means = metrics.running_mean()
    loss.plot([at for at, _ in means], [mean for _, mean in means], color="C0")
    skipped = [(step.iteration, step.loss if math.isfinite(step.loss) else threshold) for step in metrics.skipped]
    if skipped:
        loss.scatter(*zip(*skipped), s=6, color="C3", label="skipped")
        loss.legend(fontsize=8)
    loss.set(title="matching loss", xlabel="iteration")

    if scores:
        at = [iteration for iteration, _ in scores]
        mean, std = (100 * np.array(values) for values in zip(*((score.mean, score.std) for _, score in scores)))
        accuracy.plot(at, mean, marker=".", color="C2")
        accuracy.fill_between(at, mean - std, mean + std, alpha=0.2, color="C2", linewidth=0)
    accuracy.set(title=f"accuracy, % ({scores[0][1].network if scores else ''})", xlabel="iteration")

    lr.plot(iterations, [step.lr for step in steps], color="C1")
    lr.set(title="synthetic learning rate α", xlabel="iteration")

    window.scatter(iterations, [step.start_epoch for step in steps], s=2, color="C4")
    window.step(iterations, [step.bound for step in steps], color="0.4", linewidth=0.8, label="bound, exclusive")
    window.set(title="start epoch", xlabel="iteration")
    window.legend(fontsize=8)
    save_figure(figure, path)


def _as_picture(image: Tensor) -> np.ndarray:
    """[C, H, W] of any range → [H, W] or [H, W, 3] in [0, 1]."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp(min=1e-8)
    return (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()


def pyplot():
    import matplotlib  # slow to import, and only a finished run draws

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path: Path) -> None:
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
    pyplot().close(figure)
