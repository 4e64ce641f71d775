"""Surrogate gap guided sharpness-aware minimisation (Zhuang et al., ICLR 2022), with which FTD trains its experts.

All vectors are flat, [P], so that norms and products run over all parameters together.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from utils.derivatives.engine import Engine
from utils.parameters import FlatModel

EPSILON = 1e-12


def ascent(theta: Tensor, gradient: Tensor, rho: float, adaptive: bool) -> Tensor:
    """e: the step from θ to the worst point nearby, of length ρ (SAM, eq. 2; adaptive, ASAM, eq. 5: after division by
    |θ|)."""
    if adaptive:
        return rho * theta.square() * gradient / ((theta.abs() * gradient).norm() + EPSILON)
    return rho * gradient / (gradient.norm() + EPSILON)


def descent_direction(gradient: Tensor, perturbed: Tensor, alpha: float) -> Tensor:
    """∇L(θ + e) minus α times the component of ∇L(θ) that is orthogonal to ∇L(θ + e) (GSAM, alg. 1)."""
    norm, norm_perturbed = gradient.norm(), perturbed.norm()
    cosine = torch.dot(gradient, perturbed) / (norm_perturbed * norm + EPSILON)
    orthogonal = gradient - cosine * norm * perturbed / (norm_perturbed + EPSILON)
    return perturbed - alpha * orthogonal


def gsam_gradient(model: FlatModel | Engine, theta: Tensor, x: Tensor, y: Tensor, rho: float, alpha: float,
                  adaptive: bool, network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The descent direction of one GSAM step on an already augmented batch.

    With rho 0 this is the plain gradient, and the second pass is left out.

    Args:
        theta: θ [P].
        x, y: images [B, C, H, W] and classes [B].
        network: the network of `model`.

    Returns:
        (loss at θ, logits at θ [B, K], direction [P]), all detached.
    """
    loss, logits, gradient = model.gradient(theta, x, y)
    if rho == 0:
        return loss, logits, gradient
    with frozen_batch_norm_statistics(network):
        _, _, perturbed = model.gradient(theta + ascent(theta, gradient, rho, adaptive), x, y)
    return loss, logits, descent_direction(gradient, perturbed, alpha)


@contextlib.contextmanager
def frozen_batch_norm_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norm still normalises by the batch, but does not update its running means and variances."""
    layers = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
