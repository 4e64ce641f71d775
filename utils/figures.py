"""Pictures: distilled images beside real ones, curves of a run, what is in a buffer, what runs are worth."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

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
    figure, axes = _pyplot().subplots(len(pairs), len(pairs[0]), squeeze=False, layout="constrained",
                                      figsize=(1.2 + 0.9 * len(pairs[0]), 0.3 + 0.9 * len(pairs)))
    for row_axes, row, side_label in zip(axes, pairs, side_labels):
        for axis, image, top_label in zip(row_axes, row, top_labels):
            axis.imshow(_as_picture(image), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if row is pairs[0]:
                axis.set_title(top_label, fontsize=8)
        row_axes[0].set_ylabel(side_label, rotation=0, ha="right", va="center", fontsize=8)
    _save(figure, path)


def save_curves(path: Path, metrics: list[dict[str, Any]], threshold: float) -> None:
    """A PNG of a run's matching loss, accuracy, learning rate and start epochs.

    Args:
        metrics: the lines of `metrics.jsonl`.
    """
    plt = _pyplot()
    steps = [line for line in metrics if "start_epoch" in line]
    scores = [(line["iteration"], line["scores"][0]) for line in metrics
              if line.get("set") == "Normal"]
    iterations = [line["iteration"] for line in steps]
    figure, ((loss, accuracy), (lr, window)) = plt.subplots(2, 2, figsize=(9, 5.5), layout="constrained")

    losses = np.array([np.nan if line["loss"] is None else line["loss"] for line in steps])
    loss.plot(iterations, losses, color="0.75", linewidth=0.6)
    if len(losses) >= 20:
        span = max(len(losses) // 50, 5)
        smooth = np.convolve(losses, np.full(span, 1 / span), mode="valid")
        loss.plot(iterations[span // 2: span // 2 + len(smooth)], smooth, color="C0")
    skipped = [(line["iteration"], line["loss"] or threshold) for line in steps if not line["updated"]]
    if skipped:
        loss.scatter(*zip(*skipped), s=6, color="C3", label="skipped")
        loss.legend(fontsize=8)
    loss.set(title="matching loss", xlabel="iteration")

    if scores:
        mean = 100 * np.array([score["mean"] for _, score in scores])
        std = 100 * np.array([score["std"] for _, score in scores])
        at = [iteration for iteration, _ in scores]
        accuracy.plot(at, mean, marker=".", color="C2")
        accuracy.fill_between(at, mean - std, mean + std, alpha=0.2, color="C2", linewidth=0)
    accuracy.set(title=f"accuracy, % ({scores[0][1]['network'] if scores else ''})", xlabel="iteration")

    lr.plot(iterations, [line["lr"] for line in steps], color="C1")
    lr.set(title="synthetic learning rate α", xlabel="iteration")

    window.scatter(iterations, [line["start_epoch"] for line in steps], s=2, color="C4")
    window.step(iterations, [line["bound"] for line in steps], color="0.4", linewidth=0.8, label="bound, exclusive")
    window.set(title="start epoch", xlabel="iteration")
    window.legend(fontsize=8)
    _save(figure, path)


def save_buffer(path: Path, accuracies: dict[str, np.ndarray], distances: dict[str, np.ndarray]) -> None:
    """A PNG of how experts learned: accuracy by epoch, and relative distances between snapshots by start epoch.

    Args:
        accuracies: what of → [experts, epochs 1…E] in [0, 1], NaN where unknown; may be empty.
        distances: what of → [experts, start epochs 0…]; NaN where an expert has no such snapshot.
    """
    figure, (accuracy, distance) = _pyplot().subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for colour, (name, values) in zip(("C2", "C0"), accuracies.items()):
        _mean_and_spread(accuracy, range(1, values.shape[1] + 1), 100 * values, colour, name)
    if accuracies:
        accuracy.legend(fontsize=8)
    else:
        accuracy.text(0.5, 0.5, "not recorded", transform=accuracy.transAxes, ha="center", va="center", color="0.5")
    accuracy.set(title="accuracy of the experts, %", xlabel="epoch")
    for colour, (name, values) in zip(("C1", "C4"), distances.items()):
        _mean_and_spread(distance, range(values.shape[1]), values, colour, name)
    distance.set(title="relative distance between snapshots", xlabel="start epoch", ylim=(0, None))
    distance.legend(fontsize=8)
    _save(figure, path)


def save_by_images(path: Path, curves: dict[str, list[tuple[int, float, float]]], levels: dict[str, float]) -> None:
    """A PNG of accuracies by images per class.

    Args:
        curves: method → (images per class, mean, standard deviation), %; those of no point are left out.
        levels: what else there is to compare with → %.
    """
    figure, axes = _pyplot().subplots(figsize=(6, 4), layout="constrained")
    for method, points in curves.items():
        if points:
            at, means, deviations = zip(*points)
            axes.errorbar(at, means, deviations, marker="o", markersize=4, capsize=3, label=method)
    for name, level in levels.items():
        axes.axhline(level, color="0.4", linestyle="--", linewidth=1, label=name)
    at = sorted({point[0] for points in curves.values() for point in points})
    axes.set(xscale="log", xlabel="images a class", ylabel="test accuracy, %")
    axes.set_xticks(at, [str(each) for each in at])
    axes.minorticks_off()
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    _save(figure, path)


def save_windows(path: Path, panels: dict[str, list[tuple[str, float, float, bool]]]) -> None:
    """A PNG of what difficulty windows are worth, a panel for each number of images.

    Args:
        panels: title → (window in words, mean, standard deviation, %, whether most updates were made).
    """
    figure, rows = _pyplot().subplots(1, len(panels), figsize=(3 * len(panels), 3.2), layout="constrained",
                                      squeeze=False, sharey=True)
    for axes, (title, points) in zip(rows[0], panels.items()):
        for at, (_, mean, deviation, updated) in enumerate(points):
            axes.errorbar(at, mean, deviation, marker="o", capsize=3, color="C0", mfc=None if updated else "white")
        axes.set_xticks(range(len(points)), [name for name, *_ in points])
        axes.set(title=title, xlabel="start epochs", xlim=(-0.5, max(len(points), 1) - 0.5))
        if not all(updated for *_, updated in points):
            axes.plot([], [], "o", color="C0", mfc="white", label="most updates skipped")
            axes.legend(fontsize=8)
    rows[0][0].set_ylabel("test accuracy, %")
    _save(figure, path)


def save_races(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    """A PNG of accuracies on the way, a panel for each number of images.

    Args:
        panels: title → run → (minutes, accuracy, %).
    """
    figure, rows = _pyplot().subplots(1, len(panels), figsize=(3 * len(panels), 3.2), layout="constrained",
                                      squeeze=False)
    for axes, (title, runs) in zip(rows[0], panels.items()):
        for name, points in runs.items():
            if points:
                axes.plot(*zip(*points), marker=".", label=name)
        axes.set(title=title, xlabel="minutes")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    rows[0][0].set_ylabel("accuracy on held-out images, one network, %", fontsize=8)
    _save(figure, path)


def _mean_and_spread(axes, at: range, values: np.ndarray, colour: str, label: str) -> None:
    """Mean over the rows, a line, and one standard deviation on each side."""
    values = np.ma.masked_invalid(values)
    mean, std = values.mean(axis=0), values.std(axis=0)
    axes.plot(at, mean, marker="." if len(at) < 30 else None, color=colour, label=label)
    axes.fill_between(at, mean - std, mean + std, alpha=0.2, color=colour, linewidth=0)


def _as_picture(image: Tensor) -> np.ndarray:
    """[C, H, W] of any range → [H, W] or [H, W, 3] in [0, 1]."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp(min=1e-8)
    return (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()


def _pyplot():
    import matplotlib  # slow to import, and only a finished run draws

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> None:
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
    _pyplot().close(figure)
