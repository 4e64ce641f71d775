"""Cross entropy, and accuracy on whole tensors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def predictions(predict: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The classes [N] that `predict` (images → logits) gives to images [N, C, H, W]; they stay on the device."""
    most = 500 if images.is_cuda else 100  # a CPU's caches hold few images' activations; more only cost memory
    return torch.cat([predict(x).argmax(dim=1) for x in images.split(at_once(images, most))])


def at_once(images: Tensor, most: int) -> int:
    """How many images a network sees at a time where none ties them together: `most`, or fewer if they are larger than
    64×64, so that the activations take no more memory."""
    return max(1, min(most, most * 64 * 64 // (images.shape[-2] * images.shape[-1])))


def accuracy(predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """The share of images [N, C, H, W] that `predict` (images → logits) classifies correctly, in [0, 1]."""
    return share_correct(predictions(predict, images), labels)


def share_correct(predicted: Tensor, labels: Tensor) -> float:
    """The share of predicted classes [N] that equal the labels [N], in [0, 1]; waits for the device."""
    return float((predicted == labels).sum()) / len(labels)


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The confusion matrix [K, K] int64 of predicted classes [N] (columns) and labels [N] (rows)."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the batch, with labels as logits or as classes.

    Soft: L = −(1/B) Σᵢ softmax(yᵢ) · log_softmax(f(xᵢ)) (DATM, section 3.3), differentiable in both arguments.

    Args:
        logits: the network's output [B, K].
        labels: label *logits* [B, K] of a floating dtype (soft), or classes [B] of an integer dtype (hard).
    """
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels.long())
    return -(labels.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()
