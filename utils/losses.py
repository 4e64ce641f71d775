"""The loss of the inner loop and of the evaluation."""

import torch.nn.functional as F
from torch import Tensor


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
