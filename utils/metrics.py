"""Accuracy on whole tensors, and in words."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of logits [B, K] have their largest entry at labels [B]; stays on the device."""
    return (logits.argmax(dim=1) == labels).sum()


@torch.no_grad()
def accuracy(predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """The share of images [N, C, H, W] that `predict` (images → logits) puts into their class, in [0, 1]."""
    correct = sum(count_correct(predict(x), y) for x, y in zip(images.split(batch), labels.split(batch)))
    return float(correct) / len(labels)  # the only wait for the device


def percent(mean: float, std: float) -> str:
    """An accuracy in [0, 1] and its standard deviation as tables have them: 82.14 ± 0.42."""
    return f"{100 * mean:.2f} ± {100 * std:.2f}"
