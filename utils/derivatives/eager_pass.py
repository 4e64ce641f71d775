"""The derivatives of `convnet_pass` for the published ConvNet on a CPU, uncompiled, in few passes over memory.

Uncompiled, every operation reads and writes whole maps, which without care takes more time than the convolutions.
With instance norm, everything a block does between its convolutions is linear in a few maps once their means over each
plane are known. Both derivatives therefore need only two operations, for which torch has fused kernels: means of
products, and sums of maps with one factor per plane. With ẑ = (z − μ)/σ, means ⟨·⟩ over a plane, and k = ⟨ẑ ż⟩:

    ẑ˙ = (ż − ⟨ż⟩ − ẑ k)/σ                  ∂z = γ (δ − ⟨δ⟩ − ẑ ⟨δ ẑ⟩)/σ

Maps are [B, C, H, W]; a plane is one channel of one image, and values per plane are [B·C]. Torch is given them as one
image with B·C channels, on which group norm with B·C groups normalises each plane separately.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.derivatives.convnet_pass import EPSILON, FEW_CHANNELS, covers, loss_at_logits, softmax_tangent
from utils.networks import ConvNetPlan

Weights = list[Tensor]
"""θ in `parameters()` order: kernel, bias, gain and shift of each block, matrix and bias of the classifier."""


class BlockMaps(NamedTuple):
    """What a gradient saves for the adjoint at the same θ, x and y: per block, the results of 2 of the 11 convolutions
    that both take. Convolutions take most of the time, their results little of the memory."""

    z: list[Tensor]  # the norm's input in each block
    delta: list[Tensor]  # ∂L of the output of each block but the last


class EagerPass:
    """The two derivatives, as pure functions of θ's tensors; see `ConvNetPass`."""

    def __init__(self, plan: ConvNetPlan, image_shape: tuple[int, ...]) -> None:
        channels, *size = image_shape
        first, *others = plan.paddings(channels)
        self.convolutions = [_Patches(first, size) if channels <= FEW_CHANNELS else _Convolution(first),
                             *map(_Convolution, others)]
        elements, pooled = 0, 0
        for convolution in self.convolutions:
            before = [side + 2 * convolution.padding - 2 for side in size]
            size = [side // 2 for side in before]
            elements += pooled + plan.width * math.prod(before)
            pooled = plan.width * math.prod(size)
        self.map_bytes = 4 * elements  # of one sample's `BlockMaps`, in float32

    @staticmethod
    def lift(parameters: Sequence[Tensor]) -> Weights:
        return list(parameters)

    @staticmethod
    def lower(gradient: Weights) -> Tensor:
        return torch.cat([part.reshape(-1) for part in gradient])

    def gradient(self, weights: Weights, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Weights, BlockMaps]:
        """The loss, the logits [B, K], ∇L, and the maps that `adjoint` can reuse."""
        *_, matrix, bias = weights
        a, saved, deltas = x.contiguous(), [], []
        for convolution, (kernel, _, gain, shift) in zip(self.convolutions, _blocks(weights)):
            v = convolution.lift(a)
            norm, h = _Norm.of(convolution.forward(v, kernel), gain.repeat(len(x)), shift.repeat(len(x)))
            a = h.relu_()
            saved.append((v, norm, a))
            a = _pool(a)

        features = a.flatten(1)
        logits = torch.addmm(bias, features, matrix.T)
        loss, delta, _ = loss_at_logits(logits, y)
        parts = [delta.sum(0), delta.T @ features]

        delta = (delta @ matrix).view_as(a)
        zs = [norm.z for _, norm, _ in saved]
        for convolution, (kernel, of_bias, gain, _) in zip(reversed(self.convolutions), reversed(_blocks(weights))):
            v, norm, a = saved.pop()
            delta, p, q = norm.backward(_masked(_spread(delta), a), gain.repeat(len(x)))
            # The norm subtracts the bias with the plane's mean.
            parts += [norm.of_channels(q), norm.of_channels(p), torch.zeros_like(of_bias)]
            delta, of_kernel = convolution.backward(delta, v, kernel, images=bool(saved))
            parts.append(of_kernel)
            deltas.insert(0, delta)
        return loss, logits, parts[::-1], BlockMaps(zs, deltas[1:])  # without the images' own, which is None

    def adjoint(self, weights: Weights, tangents: Weights, x: Tensor, y: Tensor, maps: BlockMaps | None = None
                ) -> tuple[Tensor, Weights, Tensor, Tensor | None]:
        """s = ⟨∇L, λ⟩ with its gradients in θ, in x and, if y are label logits, in y; `_` marks ε parts.

        Args:
            maps: what `gradient` returned at the same θ, x and y; saves time and changes nothing else.
        """
        number = len(x)
        (*_, matrix, bias), (*_, matrix_, bias_) = weights, tangents
        a, a_, saved = x.contiguous(), None, []
        for convolution, (kernel, _, gain, shift), (kernel_, _, gain_, shift_) in zip(
                self.convolutions, _blocks(weights), _blocks(tangents)):
            v = convolution.lift(a)
            z = maps.z[len(saved)] if maps else convolution.forward(v, kernel)
            z_ = convolution.forward(v, kernel_)
            v_ = None
            if a_ is not None:  # the images have no ε part
                v_ = convolution.lift(a_)
                z_ += convolution.forward(v_, kernel)
            gain, shift, gain_, shift_ = (each.repeat(number) for each in (gain, shift, gain_, shift_))
            norm, h = _Norm.of(z, gain, shift)
            k, mean_ = norm.means(z_)
            scale = gain * norm.inverse
            a = h.relu_()
            h_ = norm.affine(gain_ - scale * k, shift_ - scale * mean_, (scale, z_))
            saved.append((v, v_, norm, z_, k, mean_, a))
            a, a_ = _pool(a), _pool(_masked(h_, a))

        features, features_ = a.flatten(1), a_.flatten(1)
        logits = torch.addmm(bias, features, matrix.T)
        logits_ = features_ @ matrix.T + features @ matrix_.T + bias_
        _, delta, targets = loss_at_logits(logits, y)
        s = (delta * logits_).sum()
        delta_ = softmax_tangent(logits.softmax(1), logits_) / number
        s_y = -softmax_tangent(targets, logits_) / number if y.is_floating_point() else None
        parts = [delta_.sum(0), delta_.T @ features + delta.T @ features_]

        delta, delta_ = (each.view_as(a) for each in (delta @ matrix, delta_ @ matrix + delta @ matrix_))
        for convolution, (kernel, of_bias, gain, _), (kernel_, _, gain_, _) in zip(
                *(reversed(each) for each in (self.convolutions, _blocks(weights), _blocks(tangents)))):
            v, v_, norm, z_, k, mean_, a = saved.pop()
            gain, gain_ = gain.repeat(number), gain_.repeat(number)
            delta, delta_ = (_masked(_spread(each), a) for each in (delta, delta_))
            dz, p, q = norm.backward(delta, gain)
            p_, q_ = norm.means(delta_)
            moved = norm.product(delta, z_, mean_) - norm.inverse * k * p  # ⟨δ ẑ˙⟩
            parts += [norm.of_channels(q_), norm.of_channels(p_ + moved), torch.zeros_like(of_bias)]

            inverse = norm.inverse
            scale, along, along_ = inverse * gain, gain * p, gain * (p_ + moved) + gain_ * p
            decay = inverse * k  # −(1/σ)˙ σ
            # The ε part of ∂z = (γ δ − means)/σ by the product rule: of ẑ, of 1/σ and of the terms that they multiply.
            delta_ = norm.affine(inverse * (2 * decay * along - along_),
                                 inverse * (decay * gain * q - gain * q_ - gain_ * q + inverse * along * mean_),
                                 (scale, delta_), (inverse * gain_ - decay * scale, delta),
                                 (-inverse.square() * along, z_))
            back, s_kernel = convolution.backward(delta_, v, kernel)
            back_, s_kernel_ = convolution.backward(dz, v if v_ is None else v_, kernel_, weight=v_ is not None)
            delta_ = back.add_(back_)
            if v_ is not None:
                s_kernel.add_(s_kernel_)
                delta = maps.delta[len(saved) - 1] if maps else convolution.backward(dz, v, kernel, weight=False)[0]
            parts.append(s_kernel)
        return s, parts[::-1], delta_, s_y


class _Norm(NamedTuple):
    """The input of an instance norm, with its moments."""

    z: Tensor  # [B, C, H, W]
    mean: Tensor  # μ [B·C]
    inverse: Tensor  # 1/σ [B·C]

    @classmethod
    def of(cls, z: Tensor, gain: Tensor, shift: Tensor) -> tuple["_Norm", Tensor]:
        """The norm of z, and its output γ ẑ + β."""
        planes = z.shape[0] * z.shape[1]
        h, mean, inverse = torch.native_group_norm(_one_image(z), gain, shift, 1, planes, z[0, 0].numel(), planes,
                                                   EPSILON)
        return cls(z, mean.view(-1), inverse.view(-1)), h.view_as(z)

    def affine(self, of_normed: Tensor, constant: Tensor, *others: tuple[Tensor, Tensor]) -> Tensor:
        """Σ factor · map over ẑ, 1 and `others`; the factors are [B·C]."""
        _, total = self.of(self.z, of_normed, constant)
        for factor, each in others:
            total.addcmul_(each, factor.view(*each.shape[:2], 1, 1))
        return total

    def means(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """⟨δ ẑ⟩ and ⟨δ⟩ [B·C]"""
        return _means(delta, self.z, self.mean, self.inverse)

    def product(self, delta: Tensor, moved: Tensor, mean: Tensor) -> Tensor:
        """⟨δ (ż − ⟨ż⟩)⟩/σ [B·C]"""
        return _means(delta, moved, mean, self.inverse)[0]

    def backward(self, delta: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """∂z [B, C, H, W], ⟨δ ẑ⟩ and ⟨δ⟩ [B·C]"""
        back, *sums = _group_norm_backward(delta, self.z, self.mean, self.inverse, gain, True)
        return (back.view_as(self.z), *(each / self.z[0, 0].numel() for each in sums))

    def of_channels(self, mean: Tensor) -> Tensor:
        """Sums over images and pixels [C], from means over planes [B·C]."""
        return (self.z[0, 0].numel() * mean).view(len(self.z), -1).sum(0)


def _group_norm_backward(delta: Tensor, z: Tensor, mean: Tensor, inverse: Tensor, gain: Tensor, images: bool
                         ) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_group_norm_backward(
        _one_image(delta), _one_image(z), mean.view(1, -1), inverse.view(1, -1), gain, 1, len(mean), z[0, 0].numel(),
        len(mean), [images, True, True])


def _means(delta: Tensor, z: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    some_gain = inverse  # any: the sums do not depend on it, but torch 2.11 needs one
    _, *sums = _group_norm_backward(delta, z, mean, inverse, some_gain, False)
    return tuple(each / z[0, 0].numel() for each in sums)


def _one_image(z: Tensor) -> Tensor:
    return z.view(1, -1, *z.shape[2:])


class _Convolution:
    """Torch's convolution, with stride one."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def lift(self, a: Tensor) -> Tensor:
        return a

    def forward(self, v: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(v, kernel, padding=self.padding)

    def backward(self, delta: Tensor, v: Tensor, kernel: Tensor, images: bool = True, weight: bool = True
                 ) -> tuple[Tensor | None, Tensor | None]:
        back, of_kernel, _ = torch.ops.aten.convolution_backward(
            delta, v, kernel, None, (1, 1), (self.padding, self.padding), (1, 1), False, (0, 0), 1,
            (images, weight, False))
        return back, of_kernel


class _Patches(_Convolution):
    """Matrix products over all 3×3 patches; for a first layer with few channels."""

    def __init__(self, padding: int, size: Sequence[int]) -> None:
        super().__init__(padding)
        self.size = size

    def lift(self, a: Tensor) -> Tensor:
        return F.unfold(a, 3, padding=self.padding)  # [B, 9 I, H W]

    def forward(self, v: Tensor, kernel: Tensor) -> Tensor:
        height, width = (side + 2 * self.padding - 2 for side in self.size)
        return (kernel.flatten(1) @ v).unflatten(2, (height, width))

    def backward(self, delta: Tensor, v: Tensor, kernel: Tensor, images: bool = True, weight: bool = True
                 ) -> tuple[Tensor | None, Tensor | None]:
        delta = delta.flatten(2)
        of_kernel = (delta @ v.transpose(1, 2)).sum(0).view_as(kernel) if weight else None
        back = F.fold(kernel.flatten(1).T @ delta, self.size, 3, padding=self.padding) if images else None
        return back, of_kernel


def covers_eagerly(network: nn.Module) -> bool:
    """Whether the pass supports this network: the published ConvNet, of any depth and width."""
    published = ConvNetPlan()
    return covers(network) and replace(network.plan, depth=published.depth, width=published.width) == published


def _blocks(weights: Weights) -> list[Weights]:
    return [weights[first:first + 4] for first in range(0, len(weights) - 2, 4)]


@cache
def _pairs(width: int, dtype: torch.dtype) -> Tensor:
    """The matrix [2 W, W/2] that averages two rows of pixels to one row of window means."""
    return torch.eye(width // 2, dtype=dtype).repeat_interleave(2, 0).repeat(2, 1) / 4


def _pool(a: Tensor) -> Tensor:
    """[B, C, H, W] → [B, C, H/2, W/2]"""
    *planes, height, width = a.shape
    return (a.view(-1, 2 * width) @ _pairs(width, a.dtype)).view(*planes, height // 2, width // 2)


def _spread(delta: Tensor) -> Tensor:
    """The transpose of `_pool`."""
    *planes, height, width = delta.shape
    return (delta.reshape(-1, width) @ _pairs(2 * width, delta.dtype).T).view(*planes, 2 * height, 2 * width)


def _masked(delta: Tensor, a: Tensor) -> Tensor:
    """The backward of a ReLU with output a, applied to delta in place."""
    return torch.ops.aten.threshold_backward.grad_input(delta, a, 0, grad_input=delta)
