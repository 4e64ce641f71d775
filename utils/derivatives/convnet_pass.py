"""Hand-written derivatives of the ConvNet: ∇L, and in a single pass everything that the adjoint of a step needs.

`adjoint` propagates dual numbers a + ε ȧ forward and backward through the network, with the parameters θ + ε λ. The ε
part of the loss is then s = ⟨∇L, λ⟩, and the ε part of the backward pass is the gradient of s, since derivatives
commute (Pearlmutter 1994, "Fast exact multiplication by the Hessian"; here for inputs and labels as well as
parameters). Compared with autograd's reverse over reverse, this takes fewer operations and no graph, and each
convolution has the form that suits the machine (`utils.derivatives.convolution`).

Maps are [B, H, W, C]. Where a layer pools, they are viewed as windows [B, H/2, 2, W/2, 2, C], so that pooling is a sum
over two axes and its transpose a broadcast; when compiled, the elementwise work fuses into one loop per layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.derivatives.convolution import Columns, Convolution, Direct, Winograd
from utils.networks import LEAK, NORM_GROUPS, ConvNet, ConvNetPlan

# Where each form of the convolution is fastest on a CPU, compiled; measured.
FEW_CHANNELS = 4  # `Columns` up to this many input channels, as in a first layer
MANY_CHANNELS = 64  # `Winograd` from this many input and output channels
EPSILON = 1e-5  # of every norm, torch's default
PIXELS = (1, 2, 3, 4)  # the axes of a window view that hold one image's pixels
# What the derivatives are written out for; batch norm is not among it, and no kind that `ConvNetPlan` gets later.
COVERED = {"norm": ("none", "layer", "instance", "group"), "activation": ("sigmoid", "relu", "leaky"),
           "pooling": ("none", "max", "average")}


class BlockWeights(NamedTuple):
    """One block's parameters, or their tangents or gradients."""

    kernel: Tensor  # lifted
    bias: Tensor  # [C]
    gain: Tensor | None  # of the norm: [C], or windows of [H, W, C]
    shift: Tensor | None


class Weights(NamedTuple):
    blocks: list[BlockWeights]
    matrix: Tensor  # of the classifier [K, F]
    bias: Tensor  # [K]


@dataclass(frozen=True)
class Block:
    """One block: convolution, and the plan's norm, activation and pooling."""

    convolution: Convolution
    plan: ConvNetPlan

    @property
    def window(self) -> int:
        return 1 if self.plan.pooling == "none" else 2

    @property
    def ignores_bias(self) -> bool:
        """Instance norm subtracts the convolution's bias with the mean, so the bias has no effect and zero gradient."""
        return self.plan.norm == "instance"

    def windows(self, z: Tensor) -> Tensor:
        """[..., H, W, C] → [..., H/k, k, W/k, k, C]"""
        k = self.window
        return z.unflatten(-2, (-1, k)).unflatten(-4, (-1, k))

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each group of elements that the norm normalises together."""
        if self.plan.norm == "layer":
            return x.mean((*PIXELS, 5), keepdim=True)
        mean = x.mean(PIXELS, keepdim=True)
        if self.plan.norm == "instance":
            return mean
        return mean.unflatten(-1, (NORM_GROUPS, -1)).mean(-1).repeat_interleave(self.plan.width // NORM_GROUPS, -1)

    def sum_per_gain(self, x: Tensor) -> Tensor:
        """Sums x over the elements that share a gain."""
        return x.sum(0) if self.plan.norm == "layer" else x.sum((0, *PIXELS))

    def activate(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """f(h), f′(h) and f″(h); None for the last if it is zero everywhere."""
        if self.plan.activation == "relu":
            return h.relu(), (h > 0).to(h.dtype), None
        if self.plan.activation == "leaky":
            slope = torch.full_like(h, LEAK).masked_fill(h > 0, 1.0)
            return h * slope, slope, None
        f = h.sigmoid()
        slope = f * (1 - f)
        return f, slope, slope * (1 - 2 * f)

    def choice(self, a: Tensor) -> Tensor | float:
        """The weight of every pixel in its window's pooled value."""
        if self.plan.pooling != "max":
            return 1 / self.window**2
        flat = a.permute(0, 1, 3, 5, 2, 4).flatten(-2)  # [B, H/2, W/2, C, 4]
        first = F.one_hot(flat.argmax(-1), 4).to(a.dtype)  # the first of equal maxima, as in torch
        return first.unflatten(-1, (2, 2)).permute(0, 1, 4, 2, 5, 3)

    def pool(self, a: Tensor, choice: Tensor | float) -> Tensor:
        """[B, H/k, k, W/k, k, C] → [B, H/k, W/k, C]"""
        if isinstance(choice, Tensor):
            return (a * choice).sum((2, 4))
        if self.window == 1:
            return a[:, :, 0, :, 0]
        return choice * ((a[:, :, 0, :, 0] + a[:, :, 0, :, 1]) + (a[:, :, 1, :, 0] + a[:, :, 1, :, 1]))


def spread(delta: Tensor, choice: Tensor | float) -> Tensor:
    """The transpose of `Block.pool`."""
    return delta[:, :, None, :, None, :] * choice


class ConvNetPass:
    """The two derivatives of a ConvNet, as pure functions of lifted weights.

    Args:
        plan, image_shape: of a network that `covers` accepts; image_shape is [C, H, W].
        device: where it runs; decides the form of each convolution.
        dtype: type of the convolutions' operands; None: the images' type.
    """

    map_bytes = 0  # see `Engine`

    def __init__(self, plan: ConvNetPlan, image_shape: tuple[int, ...], device: torch.device,
                 dtype: torch.dtype | None = None) -> None:
        self.blocks: list[Block] = []
        channels, *size = image_shape
        for padding in plan.paddings(channels):
            block = Block(_form(channels, plan.width, padding, tuple(size), device, dtype), plan)
            self.blocks.append(block)
            channels, size = plan.width, [(side + 2 * padding - 2) // block.window for side in size]
        self.features = (plan.width, *size)

    def lift(self, parameters: Sequence[Tensor]) -> Weights:
        """θ in `parameters()` order → the weights that `gradient` and `adjoint` take; called once per step."""
        rest = iter(parameters)
        blocks = []
        for block in self.blocks:
            kernel, bias = block.convolution.lift_kernel(next(rest)), next(rest)
            gain, shift = (None, None) if block.plan.norm == "none" else (next(rest), next(rest))
            if block.plan.norm == "layer":  # torch has [C, H, W]
                gain, shift = (block.windows(each.permute(1, 2, 0)) for each in (gain, shift))
            blocks.append(BlockWeights(kernel, bias, gain, shift))
        return Weights(blocks, next(rest), next(rest))

    def lower(self, gradient: Weights) -> Tensor:
        """A gradient in lifted weights → the gradient in θ [P]."""
        parts: list[Tensor] = []
        for block, of in zip(self.blocks, gradient.blocks):
            parts += [block.convolution.lower_kernel(of.kernel), of.bias]
            if of.gain is not None:
                both = (of.gain, of.shift)
                if block.plan.norm == "layer":
                    both = (each.flatten(-3, -2).flatten(-4, -3).permute(2, 0, 1) for each in both)
                parts += both
        return torch.cat([part.reshape(-1) for part in (*parts, gradient.matrix, gradient.bias)])

    def gradient(self, weights: Weights, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Weights]:
        """The loss, the logits [B, K] and ∇L.

        Args:
            x, y: images [B, C, H, W]; label logits [B, K] or classes [B].
        """
        a = x.permute(0, 2, 3, 1)
        saved = []
        for block, w in zip(self.blocks, weights.blocks):
            v = block.convolution.lift_input(a)
            z = block.windows(block.convolution.lower_output(block.convolution.forward(v, w.kernel)))
            if not block.ignores_bias:
                z = z + w.bias
            normed, inverse, h = self._normalise(block, w, z)
            a, slope, _ = block.activate(h)
            choice = block.choice(a)
            a = block.pool(a, choice)
            saved.append((v, normed, inverse, slope, choice))

        features = a.permute(0, 3, 1, 2).flatten(1)
        logits = features @ weights.matrix.T + weights.bias
        loss, delta, _ = loss_at_logits(logits, y)
        of_matrix, of_bias = delta.T @ features, delta.sum(0)

        delta = self._to_map(delta @ weights.matrix)
        blocks: list[BlockWeights] = []
        for index in reversed(range(len(self.blocks))):
            block, w = self.blocks[index], weights.blocks[index]
            v, normed, inverse, slope, choice = saved.pop()
            delta = spread(delta, choice) * slope
            of_gain = of_shift = None
            if block.plan.norm != "none":
                of_gain, of_shift = block.sum_per_gain(delta * normed), block.sum_per_gain(delta)
                delta = delta * w.gain
                delta = inverse * (delta - block.mean(delta) - normed * block.mean(delta * normed))
            d = block.convolution.lift_output(_flat(delta))
            blocks.insert(0, BlockWeights(block.convolution.weight(v, d), _of_bias(block, w, delta), of_gain, of_shift))
            if index:
                delta = block.convolution.lower_input(block.convolution.backward(d, w.kernel))
        return loss, logits, Weights(blocks, of_matrix, of_bias)

    def adjoint(self, weights: Weights, tangents: Weights, x: Tensor, y: Tensor
                ) -> tuple[Tensor, Weights, Tensor, Tensor | None]:
        """s = ⟨∇L, λ⟩ with its gradients in θ, in x and, if y are label logits, in y.

        A trailing `_` marks an ε part: `a_` is ȧ.

        Args:
            tangents: λ, lifted.
            x, y: as for `gradient`.
        """
        a, a_ = x.permute(0, 2, 3, 1), None  # the images have no ε part
        saved = []
        for block, w, w_ in zip(self.blocks, weights.blocks, tangents.blocks):
            form = block.convolution
            v = form.lift_input(a)
            z = block.windows(form.lower_output(form.forward(v, w.kernel)))
            product = form.forward(v, w_.kernel)
            v_ = None
            if a_ is not None:
                v_ = form.lift_input(a_)
                product = product + form.forward(v_, w.kernel)
            z_ = block.windows(form.lower_output(product))
            if not block.ignores_bias:
                z, z_ = z + w.bias, z_ + w_.bias

            normed, inverse, h = self._normalise(block, w, z)
            normed_, h_, decay = z_, z_, None
            if block.plan.norm != "none":
                along = block.mean(normed * z_)
                normed_ = inverse * (z_ - block.mean(z_) - normed * along)
                decay = inverse * along  # −(1/σ)˙ / (1/σ)
                h_ = normed_ * w.gain + normed * w_.gain + w_.shift

            a, slope, curvature = block.activate(h)
            slope_ = None if curvature is None else curvature * h_
            choice = block.choice(a)
            a, a_ = block.pool(a, choice), block.pool(slope * h_, choice)
            saved.append((v, v_, normed, normed_, inverse, decay, slope, slope_, choice))

        features, features_ = (each.permute(0, 3, 1, 2).flatten(1) for each in (a, a_))
        logits = features @ weights.matrix.T + weights.bias
        logits_ = features_ @ weights.matrix.T + features @ tangents.matrix.T + tangents.bias
        _, delta, targets = loss_at_logits(logits, y)
        s = (delta * logits_).sum()
        delta_ = softmax_tangent(logits.softmax(1), logits_) / len(x)
        s_y = -softmax_tangent(targets, logits_) / len(x) if y.is_floating_point() else None
        s_matrix, s_bias = delta_.T @ features + delta.T @ features_, delta_.sum(0)

        delta, delta_ = (self._to_map(each) for each in (
            delta @ weights.matrix, delta_ @ weights.matrix + delta @ tangents.matrix))
        blocks: list[BlockWeights] = []
        for index in reversed(range(len(self.blocks))):
            block, w, w_ = self.blocks[index], weights.blocks[index], tangents.blocks[index]
            form = block.convolution
            v, v_, normed, normed_, inverse, decay, slope, slope_, choice = saved.pop()
            pooled, delta_ = spread(delta, choice), spread(delta_, choice) * slope
            delta = pooled * slope
            if slope_ is not None:
                delta_ = delta_ + pooled * slope_

            s_gain = s_shift = None
            if block.plan.norm != "none":
                s_gain, s_shift = block.sum_per_gain(delta_ * normed + delta * normed_), block.sum_per_gain(delta_)
                delta, delta_ = delta * w.gain, delta_ * w.gain + delta * w_.gain
                along = block.mean(delta * normed)
                along_ = block.mean(delta_ * normed + delta * normed_)
                delta = inverse * (delta - block.mean(delta) - normed * along)
                delta_ = inverse * (delta_ - block.mean(delta_) - normed_ * along - normed * along_) - decay * delta
            d, d_ = form.lift_output(_flat(delta)), form.lift_output(_flat(delta_))
            s_kernel = form.weight(v, d_)
            if v_ is not None:
                s_kernel = s_kernel + form.weight(v_, d)
            blocks.insert(0, BlockWeights(s_kernel, _of_bias(block, w, delta_), s_gain, s_shift))
            if index:
                delta = form.lower_input(form.backward(d, w.kernel))
            delta_ = form.lower_input(form.backward(d_, w.kernel) + form.backward(d, w_.kernel))
        return s, Weights(blocks, s_matrix, s_bias), delta_.permute(0, 3, 1, 2), s_y

    @staticmethod
    def _normalise(block: Block, w: BlockWeights, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """(z − μ)/σ, 1/σ and the input of the activation."""
        if block.plan.norm == "none":
            return z, None, z
        centred = z - block.mean(z)
        inverse = (block.mean(centred.square()) + EPSILON).rsqrt()
        normed = centred * inverse
        return normed, inverse, normed * w.gain + w.shift

    def _to_map(self, features: Tensor) -> Tensor:
        return features.unflatten(1, self.features).permute(0, 2, 3, 1)


def covers(network: nn.Module) -> bool:
    """Whether the pass supports this network: a ConvNet of `COVERED` parts whose pooling never rounds a size."""
    if type(network) is not ConvNet or any(  # a subclass may compute something else
            getattr(network.plan, part) not in kinds for part, kinds in COVERED.items()):
        return False
    channels, *size = network.image_shape
    grown = 2 * network.plan.paddings(channels)[0] - 2
    return network.plan.pooling == "none" or all((side + grown) % 2**network.plan.depth == 0 for side in size)


def _form(channels: int, width: int, padding: int, size: tuple[int, int], device: torch.device,
          dtype: torch.dtype | None) -> Convolution:
    """The fastest form of the convolution; on a GPU `Direct`, since the library there contains all of them."""
    if device.type != "cpu" or dtype is not None:
        return Direct(channels, width, padding, dtype)
    if channels <= FEW_CHANNELS:
        return Columns(channels, width, padding, size)
    if min(channels, width) >= MANY_CHANNELS and size[0] % 4 == size[1] % 4 == 0:
        return Winograd(channels, width, size)
    return Direct(channels, width, padding)


def _flat(z: Tensor) -> Tensor:
    """Windows → [B, H, W, C]."""
    return z.flatten(3, 4).flatten(1, 2)


def _of_bias(block: Block, w: BlockWeights, delta: Tensor) -> Tensor:
    return torch.zeros_like(w.bias) if block.ignores_bias else delta.sum((0, *PIXELS))


def loss_at_logits(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, its gradient in the logits, and the target distribution."""
    targets = y.softmax(1) if y.is_floating_point() else F.one_hot(y.long(), logits.shape[1]).to(logits.dtype)
    loss = -(targets * logits.log_softmax(1)).sum(1).mean()
    return loss, (logits.softmax(1) - targets) / len(logits), targets


def softmax_tangent(p: Tensor, moved: Tensor) -> Tensor:
    """The ε part of p = softmax(logits), given that of the logits, `moved`; this linear map is symmetric."""
    return p * (moved - (p * moved).sum(1, keepdim=True))
