"""Trajectory matching: the loss of T training steps on synthetic data, and its gradient.

The student starts at an expert's θ₀ and takes T steps of gradient descent on the synthetic set,
θₜ₊₁ = θₜ − α ∇L(θₜ; xₜ, yₜ); the loss is how far it ends from the expert's θ* (MTT, eq. 2; DATM, eq. 1):

    loss = ‖θ_T − θ*‖² / ‖θ₀ − θ*‖²

Three methods compute its gradient with respect to images, labels and α:

* `exact`, the default: the adjoint recursion, one step's graph in memory at a time. With the co-state λ = ∂loss/∂θ_T
  and s = ⟨∇L(θₜ; xₜ, yₜ), λ⟩, step t contributes ∂α −= s, ∂xₜ = −α ∂s/∂xₜ, ∂yₜ = −α ∂s/∂yₜ, and passes
  λ ← λ − α ∂s/∂θₜ to the step before it. Truncated to the last K steps, it treats the earlier steps as constant:
  they contribute nothing.
* `unroll`: autograd through all T steps. The same numbers, with T graphs in memory; a readable reference to compare
  with.
* `tesla` (Cui et al., ICML 2023, as in the published DATM_tesla): λ is never passed back. No cheaper than `exact`,
  and not the same gradient.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from utils.data import augment as dsa
from utils.derivatives.engine import Maps
from utils.loss_and_accuracy import cross_entropy
from utils.parameters import FlatModel

METHODS = ("exact", "unroll", "tesla")

Part = Callable[[Tensor, Tensor], Tensor]
"""(θ_T, θ*) → which parameters are matched, booleans [P]; no gradient flows through the choice."""


class Match(NamedTuple):
    """A matching loss (scalar) and its gradients, shaped as images, labels and lr; all detached.

    `grad_labels` is None for hard labels.
    """

    loss: Tensor
    grad_images: Tensor
    grad_labels: Tensor | None
    grad_lr: Tensor


def match_trajectory(model: FlatModel, theta_start: Tensor, theta_target: Tensor, images: Tensor, labels: Tensor,
                     lr: Tensor, batches: Sequence[Tensor], augment: Sequence[dsa.Draw] | None = None,
                     method: str = "exact", part: Part | None = None, adjoint_steps: int | None = None) -> Match:
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
        part: sum both distances over these parameters only (PAD); None: over all.
        adjoint_steps: K, for `exact` only: the gradient goes through the last K steps; None: through all.

    Returns:
        The loss and its gradients; a sample that no step used has gradient zero.
    """
    augment = augment if augment is not None else [dsa.Draw()] * len(batches)
    assert len(augment) == len(batches), "one augmentation draw per inner step"
    assert adjoint_steps is None or method == "exact", "the exact gradient alone is truncated"
    if method == "unroll":
        return _unrolled(model, theta_start, theta_target, images, labels, lr, batches, augment, part)
    assert method in METHODS, method
    return _adjoint(model, theta_start, theta_target, images, labels, lr, batches, augment,
                    part, carry_back=method == "exact", steps=adjoint_steps)


def matching_loss(model: FlatModel, theta_start: Tensor, theta_target: Tensor, images: Tensor, labels: Tensor,
                  lr: Tensor, batches: Sequence[Tensor], augment: Sequence[dsa.Draw] | None = None,
                  part: Part | None = None) -> Tensor:
    """The loss of `match_trajectory` without its gradient, for a third of the work."""
    return losses_on_the_way(model, theta_start, [theta_target], images, labels, lr, batches, augment, part,
                             steps=[len(batches)])[0, 0]


def losses_on_the_way(model: FlatModel, theta_start: Tensor, targets: Sequence[Tensor], images: Tensor, labels: Tensor,
                      lr: Tensor, batches: Sequence[Tensor], augment: Sequence[dsa.Draw] | None = None,
                      part: Part | None = None, *, steps: Sequence[int]) -> Tensor:
    """The losses after different numbers of inner steps, to several targets, from a single training.

    Args:
        steps: the numbers of steps after which to compute the loss, each at least 1.

    Returns:
        Losses [targets, steps].
    """
    augment = augment if augment is not None else [dsa.Draw()] * len(batches)
    thetas, _ = _train(model, theta_start, images, labels, lr, batches, augment)
    return torch.stack([torch.stack([_loss(thetas[each], theta_start, target, part)[0] for each in steps])
                        for target in targets])


def deep_part(depth_ratio: float) -> Part:
    """All but the first `depth_ratio` of θ, which are the shallow layers (PAD, section 3.3)."""
    return lambda final, target: torch.arange(len(final), device=final.device) >= int(depth_ratio * len(final))


def far_part(loss_ratio: float) -> Part:
    """All but the `loss_ratio` of θ's elements that are nearest to the target (PAD's published code)."""
    def far(final: Tensor, target: Tensor) -> Tensor:
        mask = torch.ones_like(final, dtype=torch.bool)
        mask[(final - target).abs().topk(int(loss_ratio * len(final)), largest=False).indices] = False
        return mask
    return far


def _loss(final: Tensor, start: Tensor, target: Tensor, part: Part | None) -> tuple[Tensor, Tensor]:
    """The loss of the module's docstring over `part` of θ, and its gradient with respect to `final`."""
    offset, offset_start = final - target, start - target
    if part is not None:
        mask = part(final.detach(), target)
        offset, offset_start = offset * mask, offset_start * mask
    distance_start = offset_start.square().sum()
    return offset.square().sum() / distance_start, 2 * offset / distance_start


def _train(model, theta_start, images, labels, lr, batches, augment, keep_maps: int = 0
           ) -> tuple[list[Tensor], list[Maps | None]]:
    """The inner loop: θ₀ … θ_T, detached (P numbers a step, no graph), and the activations that the last `keep_maps`
    steps keep for their adjoints."""
    kept = model.keep(images=images.detach(), labels=labels.detach(), lr=lr.detach())
    thetas = [theta_start.detach()]
    maps = [[] if left <= keep_maps else None for left in range(len(batches), 0, -1)]
    for batch, draw, of_step in zip(batches, augment, maps):
        def step(model, kept, batch, theta, *parameters, draw=draw, maps=of_step):
            x = dsa.apply(kept["images"][batch], draw.with_tensors(parameters))
            _, _, gradient = model.gradient(theta, x, kept["labels"][batch], maps)
            return theta - kept["lr"] * gradient

        thetas.append(model.run(("train", draw.operations), step, kept, batch, thetas[-1], *draw.tensors))
    return thetas, maps


def _unrolled(model, theta_start, theta_target, images, labels, lr, batches, augment, part) -> Match:
    """The textbook: build the graph of all steps, then call autograd once."""
    soft = labels.is_floating_point()
    images, lr = images.detach().requires_grad_(), lr.detach().requires_grad_()
    labels = labels.detach().requires_grad_(soft)

    theta = theta_start.detach().requires_grad_()
    for batch, draw in zip(batches, augment):
        loss = cross_entropy(model(theta, dsa.apply(images[batch], draw)), labels[batch])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - lr * gradient

    loss, _ = _loss(theta, theta_start, theta_target, part)
    grad_images, grad_lr, *rest = torch.autograd.grad(loss, [images, lr, labels] if soft else [images, lr])
    return Match(loss.detach(), grad_images, rest[0] if soft else None, grad_lr)


def _adjoint(model, theta_start, theta_target, images, labels, lr, batches, augment, part, carry_back: bool,
             steps: int | None) -> Match:
    """The adjoint recursion of the module's docstring over the last `steps`; without `carry_back`, TESLA's."""
    soft = labels.is_floating_point()
    images, labels, lr = images.detach(), labels.detach(), lr.detach()
    keep_maps = min(model.kept_steps(max(map(len, batches))), len(batches) if steps is None else steps)
    thetas, maps = _train(model, theta_start, images, labels, lr, batches, augment, keep_maps)
    loss, co_state = _loss(thetas.pop(), theta_start, theta_target, part)

    kept = model.keep(images=images, labels=labels, lr=lr, co_state=co_state, grad_images=torch.zeros_like(images),
                      grad_lr=torch.zeros_like(lr), **({"grad_labels": torch.zeros_like(labels)} if soft else {}))

    # The same steps in reverse, each with its own augmentation draw.
    for batch, draw, of_step in islice(zip(*map(reversed, (batches, augment, maps))), steps):
        def step(model, kept, batch, theta, *parameters, draw=draw, maps=of_step):
            x = kept["images"][batch].requires_grad_()
            augmented = dsa.apply(x, draw.with_tensors(parameters))
            s, s_theta, s_augmented, s_y = model.adjoint(theta, kept["co_state"], augmented.detach(),
                                                         kept["labels"][batch], maps)
            (s_x,) = torch.autograd.grad(augmented, x, s_augmented)
            # All of `kept` is read before any of it is changed: the step may be repeated if it runs out of memory.
            changes = [-kept["lr"] * each for each in ((s_x, s_y) if soft else (s_x,))]
            of_theta = kept["lr"] * s_theta if carry_back else None
            # Steps share samples, so their contributions add up.
            kept["grad_lr"] -= s
            for name, change in zip(("grad_images", "grad_labels"), changes):
                kept[name].index_add_(0, batch, change)
            if carry_back:
                kept["co_state"] -= of_theta

        model.run(("revisit", carry_back, draw.operations), step, kept, batch, thetas.pop(), *draw.tensors)
    # Copies, since the next match may reuse the memory of the kept tensors.
    grad_images, grad_lr, grad_labels = (kept[name].clone() if name in kept else None
                                         for name in ("grad_images", "grad_lr", "grad_labels"))
    return Match(loss, grad_images, grad_labels, grad_lr)
