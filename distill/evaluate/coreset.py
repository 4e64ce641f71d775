"""Coresets: the real images that best represent their class in an expert's features, its penultimate activations.

Features are used as they are; iCaRL scales each to length 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill.initialize import WALK, expert_logits
from utils.data.datasets import Dataset
from utils.parameters import FlatModel


def herding(features: Tensor, count: int) -> Tensor:
    """Indices [count] of features [n, F], n ≥ count: each choice brings the mean of the chosen ones nearest to the mean
    of all.

    Welling 2009, "Herding dynamical weights to learn", as in iCaRL (Rebuffi et al. 2017, algorithm 4).
    """
    # For centred features, ‖(Σ + φ) / k‖ is least where ‖φ‖² + 2⟨φ, Σ⟩ is, with Σ the sum of the chosen ones.
    features = features - features.mean(dim=0)
    lengths, total, chosen = features.square().sum(dim=1), torch.zeros_like(features[0]), []
    for _ in range(count):
        chosen.append((lengths + 2 * (features @ total)).argmin())
        lengths[chosen[-1]] = math.inf
        total = total + features[chosen[-1]]
    return torch.stack(chosen)


def k_center(features: Tensor, count: int) -> Tensor:
    """Indices [count] of features [n, F], n ≥ count: first the one nearest to the mean of all, then repeatedly the one
    farthest from its nearest chosen one.

    The greedy algorithm of Sener & Savarese 2018, https://arxiv.org/abs/1708.00489, which leaves the first choice open.
    """
    features = features - features.mean(dim=0)
    lengths = features.square().sum(dim=1)
    nearest, chosen = torch.full_like(lengths, math.inf), [lengths.argmin()]  # squared distances
    for _ in range(count - 1):
        last = chosen[-1]
        nearest = nearest.minimum(lengths + lengths[last] - 2 * (features @ features[last]))
        nearest[last] = -math.inf  # no image is chosen twice, even among equal ones
        chosen.append(nearest.argmax())
    return torch.stack(chosen)


CORESETS: dict[str, Callable[[Tensor, int], Tensor]] = {"herding": herding, "k_center": k_center}


def coreset(pick: str, model: FlatModel, theta: Tensor, dataset: Dataset, count: int) -> Tensor:
    """Indices [K·count] of training images, classes in order. Only one class's features are in memory at a time.

    Args:
        pick: a key of `CORESETS`.
        theta: the expert [P], on the dataset's device.
    """
    chosen = []
    for label in range(dataset.num_classes):
        members = dataset.class_indices(label)
        # Parts of about equal size, since batch norm uses their statistics.
        parts = members.chunk(math.ceil(len(members) / WALK))
        features = torch.cat([expert_features(model, theta, dataset.train_images[part]) for part in parts])
        chosen.append(members[CORESETS[pick](features, count)])
    return torch.cat(chosen)


def expert_features(model: FlatModel, theta: Tensor, x: Tensor) -> Tensor:
    """The input [B, F] of an expert's last linear layer for x [B, C, H, W], without a graph; θ is [P]."""
    *_, last = (module for module in model.network.modules() if isinstance(module, nn.Linear))
    features: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        expert_logits(model, theta, x)
    finally:
        hook.remove()
    return torch.cat(features)
