"""Trajectory matching: the loss of T training steps on synthetic data, and its gradient.

The student starts at an expert's θ₀ and takes T steps of gradient descent on the synthetic set,
θₜ₊₁ = θₜ − α ∇L(θₜ; xₜ, yₜ); the loss is how far it ends from the expert's θ* (MTT, eq. 2; DATM, eq. 1):

    loss = ‖θ_T − θ*‖² / ‖θ₀ − θ*‖²

Its gradient with respect to images, labels and α comes in three forms of one signature:

* `exact`, the default: the adjoint recursion, one step's graph in memory at a time. With λ = ∂loss/∂θ_T and
  s = ⟨∇L(θₜ; xₜ, yₜ), λ⟩, step t contributes ∂α −= s, ∂xₜ = −α ∂s/∂xₜ, ∂yₜ = −α ∂s/∂yₜ, and hands
  λ ← λ − α ∂s/∂θₜ to the step before it.
* `unroll`: autograd through all T steps. The same numbers, T graphs in memory; kept to be read and to be
  compared with.
* `tesla` (Cui et al., ICML 2023, as the published DATM_tesla does it): λ is never handed back. No cheaper than
  `exact` and not its gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils import augment as dsa
from utils.losses import cross_entropy
from utils.parameters import FlatModel

METHODS = ("exact", "unroll", "tesla")


class Match(NamedTuple):
    """A matching loss (scalar) and its gradients, shaped as images, labels and lr; all detached.

    `grad_labels` is None for hard labels.
    """

    loss: Tensor
    grad_images: Tensor
    grad_labels: Tensor | None
    grad_lr: Tensor


def match_trajectory(model: FlatModel, theta_start: Tensor, theta_target: Tensor, images: Tensor, labels: Tensor,
                     lr: Tensor, batches: Sequence[Tensor], augment: Sequence[dsa.Draw | None] | None = None,
                     method: str = "exact") -> Match:
    """The loss of one simulated training and its gradient; a pure function of its arguments.

    Args:
        model: the student network as a function of θ.
        theta_start, theta_target: θ₀ and θ* [P], two snapshots of one expert.
        images: X [N, C, H, W].
        labels: label logits Y [N, K], or classes [N] of an integer dtype.
        lr: α, a scalar tensor.
        batches: one index tensor [B] per inner step, in order; sizes may differ.
        augment: one draw per inner step, or None for no augmentation.
        method: `exact`, `unroll` or `tesla`.

    Returns:
        The loss and its gradients; a sample that no step used has gradient zero.
    """
    augment = augment if augment is not None else [None] * len(batches)
    assert len(augment) == len(batches), "one augmentation draw per inner step"
    if method == "unroll":
        return _unrolled(model, theta_start, theta_target, images, labels, lr, batches, augment)
    assert method in METHODS, method
    return _adjoint(model, theta_start, theta_target, images, labels, lr, batches, augment,
                    carry_back=method == "exact")


def matching_loss(model: FlatModel, theta_start: Tensor, theta_target: Tensor, images: Tensor, labels: Tensor,
                  lr: Tensor, batches: Sequence[Tensor], augment: Sequence[dsa.Draw | None] | None = None) -> Tensor:
    """The loss of `match_trajectory` alone, a third of the work."""
    augment = augment if augment is not None else [None] * len(batches)
    final = _train(model, theta_start, images, labels, lr, batches, augment)[-1]
    return _distance(final, theta_target) / _distance(theta_start, theta_target)


def _step_loss(model: FlatModel, theta: Tensor, x: Tensor, y: Tensor, draw: dsa.Draw | None) -> Tensor:
    """L(θ; x, y): the loss whose gradient one inner step follows."""
    return cross_entropy(model(theta, dsa.apply(x, draw)), y)


def _train(model, theta_start, images, labels, lr, batches, augment) -> list[Tensor]:
    """The inner loop: θ₀ … θ_T, detached; P numbers a step and no graph are kept."""
    images, labels, lr = images.detach(), labels.detach(), lr.detach()
    thetas = [theta_start.detach()]
    for batch, draw in zip(batches, augment):
        theta = thetas[-1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_step_loss(model, theta, images[batch], labels[batch], draw), theta)
        thetas.append(theta.detach() - lr * gradient)
    return thetas


def _unrolled(model, theta_start, theta_target, images, labels, lr, batches, augment) -> Match:
    """The textbook: build the graph of all steps, then call autograd once."""
    soft = labels.is_floating_point()
    images, lr = images.detach().requires_grad_(), lr.detach().requires_grad_()
    labels = labels.detach().requires_grad_(soft)

    theta = theta_start.detach().requires_grad_()
    for batch, draw in zip(batches, augment):
        loss = _step_loss(model, theta, images[batch], labels[batch], draw)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - lr * gradient

    loss = _distance(theta, theta_target) / _distance(theta_start, theta_target)
    grad_images, grad_lr, *rest = torch.autograd.grad(loss, [images, lr, labels] if soft else [images, lr])
    return Match(loss.detach(), grad_images, rest[0] if soft else None, grad_lr)


def _adjoint(model, theta_start, theta_target, images, labels, lr, batches, augment, carry_back: bool) -> Match:
    """The recursion of the module's docstring; without `carry_back` it is TESLA's."""
    soft = labels.is_floating_point()
    images, labels, lr = images.detach(), labels.detach(), lr.detach()
    grad_images, grad_lr = torch.zeros_like(images), torch.zeros_like(lr)
    grad_labels = torch.zeros_like(labels) if soft else None

    thetas = _train(model, theta_start, images, labels, lr, batches, augment)
    theta_final = thetas.pop()
    distance_start = _distance(theta_start, theta_target)
    loss = _distance(theta_final, theta_target) / distance_start
    co_state = 2 * (theta_final - theta_target) / distance_start  # λ

    # The same steps in reverse, each revisited with its own draw.
    for batch, draw in zip(reversed(batches), reversed(augment)):
        theta = thetas.pop().requires_grad_()
        x = images[batch].requires_grad_()
        y = labels[batch].requires_grad_(soft)
        (gradient,) = torch.autograd.grad(_step_loss(model, theta, x, y, draw), theta, create_graph=True)
        s = torch.dot(gradient, co_state)
        s_theta, s_x, *s_y = torch.autograd.grad(s, [theta, x, y] if soft else [theta, x])
        # Steps share samples, so their contributions add up.
        grad_lr -= s.detach()
        grad_images.index_add_(0, batch, -lr * s_x)
        if soft:
            grad_labels.index_add_(0, batch, -lr * s_y[0])
        if carry_back:
            co_state = co_state - lr * s_theta
    return Match(loss, grad_images, grad_labels, grad_lr)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum()
