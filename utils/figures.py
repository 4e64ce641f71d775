"""Pictures: distilled images beside real ones, curves of a run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.files import atomic_write


def clip_outliers(images: Tensor, deviations: float = 2.5) -> Tensor:
    """Values clamped at the mean ± 2.5 standard deviations of the whole tensor, as published pictures are."""
    mean, std = images.mean(), images.std()
    return images.clamp(mean - deviations * std, mean + deviations * std)


def save_images(path: Path, real: Tensor, distilled: Tensor, classes: tuple[str, ...], columns: int = 10) -> None:
    """A PNG with one row per class: its first real starting images, then what became of them.

    Args:
        real, distilled: pixels [K·ipc, C, H, W], classes in order; the distilled are clipped at ±2.5 σ and each
            image is scaled to its own range.
        columns: at most so many images a class on each side.
    """
    plt = _pyplot()
    ipc = len(distilled) // len(classes)
    shown = min(ipc, columns)
    distilled = clip_outliers(distilled)
    side = 0.8 if shown > 1 else 1.0
    figure, axes = plt.subplots(len(classes), 2 * shown, squeeze=False, layout="constrained",
                                figsize=(1.2 + 2 * shown * side, len(classes) * side))
    for row, label in enumerate(classes):
        for column in range(2 * shown):
            source = real if column < shown else distilled
            axis = axes[row][column]
            axis.imshow(_as_picture(source[row * ipc + column % shown]), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[row][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    axes[0][0].set_title("real", fontsize=9)
    axes[0][shown].set_title("distilled", fontsize=9)
    _save(figure, path)


def save_curves(path: Path, metrics: list[dict[str, Any]], threshold: float) -> None:
    """A PNG of a run's matching loss, accuracy, learning rate and start epochs.

    Args:
        metrics: the lines of `metrics.jsonl`.
    """
    plt = _pyplot()
    steps = [line for line in metrics if "start_epoch" in line]
    scores = [(line["iteration"], line["scores"][0]) for line in metrics if "scores" in line]
    iterations = [line["iteration"] for line in steps]
    figure, ((loss, accuracy), (lr, window)) = plt.subplots(2, 2, figsize=(9, 5.5), layout="constrained")

    losses = torch.tensor([line["loss"] if line["loss"] is not None else torch.nan for line in steps])
    loss.plot(iterations, losses, color="0.75", linewidth=0.6)
    if len(losses) >= 20:
        span = max(len(losses) // 50, 5)
        smooth = losses.unfold(0, span, 1).nanmean(dim=1)
        loss.plot(iterations[span // 2: span // 2 + len(smooth)], smooth, color="C0")
    skipped = [(line["iteration"], line["loss"] or threshold) for line in steps if not line["updated"]]
    if skipped:
        loss.scatter(*zip(*skipped), s=6, color="C3", label="skipped")
        loss.legend(fontsize=8)
    loss.set(title="matching loss", xlabel="iteration")

    if scores:
        mean = 100 * torch.tensor([score["mean"] for _, score in scores])
        std = 100 * torch.tensor([score["std"] for _, score in scores])
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


def _as_picture(image: Tensor) -> Tensor:
    """[C, H, W] of any range → [H, W] or [H, W, 3] in [0, 1]."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp(min=1e-8)
    return image[0] if len(image) == 1 else image.permute(1, 2, 0)


def _pyplot():
    import matplotlib  # slow to import, and only a finished run draws

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> None:
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
    _pyplot().close(figure)
