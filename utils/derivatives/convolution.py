"""The 3×3 convolution as a bilinear map z = out(V · U), in several forms; `convnet_pass` picks the fastest.

Each form lifts its operands into a space of its own, where the three products that make up a convolution and its
derivatives are cheap, and lowers the results. Lifts and products are linear, and each lowering is the transpose of the
lift of the same name. Sums may therefore be taken in the lifted space, and derivatives of any order need nothing else:

    z  = lower_output(V · U)          V = lift_input(a)     a [B, H, W, I]
    ∂a = lower_input(D · Uᵀ)          D = lift_output(δ)    δ, z [B, H, W, O]
    ∂w = lower_kernel(Vᵀ · D)         U = lift_kernel(w)    w [O, I, 3, 3]

Maps are [B, H, W, C] throughout; padding is symmetric, strides are one.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Direct:
    """Torch's convolution, in the memory format it prefers; nothing is lifted.

    Args:
        dtype: convolve in this type and convert the result back; None: convolve in the operands' type.
    """

    def __init__(self, channels: int, width: int, padding: int, dtype: torch.dtype | None = None) -> None:
        self.shape = (width, channels, 3, 3)
        self.padding, self.dtype = padding, dtype

    def lift_kernel(self, w: Tensor) -> Tensor:
        return w.contiguous(memory_format=torch.channels_last)

    def lower_kernel(self, tensor: Tensor) -> Tensor:
        return tensor

    lift_input = lower_input = lift_output = lower_output = lower_kernel

    def forward(self, v: Tensor, u: Tensor) -> Tensor:
        a, w = _planes(v, self.dtype), _typed(u, self.dtype)
        return F.conv2d(a, w, padding=self.padding).permute(0, 2, 3, 1).to(v.dtype)

    def backward(self, d: Tensor, u: Tensor) -> Tensor:
        delta, w = _planes(d, self.dtype), _typed(u, self.dtype)
        return F.conv_transpose2d(delta, w, padding=self.padding).permute(0, 2, 3, 1).to(d.dtype)

    def weight(self, v: Tensor, d: Tensor) -> Tensor:
        a, delta = _planes(v, self.dtype), _planes(d, self.dtype)
        return torch.nn.grad.conv2d_weight(a, self.shape, delta, padding=self.padding).to(d.dtype)


class Columns:
    """Each of the three products as one matrix product over all 3×3 patches; for a first layer with few channels."""

    def __init__(self, channels: int, width: int, padding: int, size: tuple[int, int]) -> None:
        self.shape = (width, channels, 3, 3)
        self.padding = padding
        self.size = size
        self.size_out = (size[0] + 2 * padding - 2, size[1] + 2 * padding - 2)

    def lift_kernel(self, w: Tensor) -> Tensor:
        return w.flatten(1).T.contiguous()

    def lower_kernel(self, product: Tensor) -> Tensor:
        return product.T.reshape(self.shape)

    def lift_input(self, a: Tensor) -> Tensor:
        patches = F.unfold(a.permute(0, 3, 1, 2), 3, padding=self.padding)
        return patches.transpose(1, 2).flatten(0, 1)

    def lower_input(self, product: Tensor) -> Tensor:
        patches = product.unflatten(0, (-1, self.size_out[0] * self.size_out[1])).transpose(1, 2)
        return F.fold(patches, self.size, 3, padding=self.padding).permute(0, 2, 3, 1)

    def lift_output(self, z: Tensor) -> Tensor:
        return z.flatten(0, 2)

    def lower_output(self, product: Tensor) -> Tensor:
        return product.unflatten(0, (-1, *self.size_out))

    def forward(self, v: Tensor, u: Tensor) -> Tensor:
        return v @ u

    def backward(self, d: Tensor, u: Tensor) -> Tensor:
        return d @ u.T

    def weight(self, v: Tensor, d: Tensor) -> Tensor:
        return v.T @ d


class Winograd:
    """F(4×4, 3×3) of Lavin & Gray (CVPR 2016): 36 matrix products instead of 144, on 6×6 tiles.

    For a CPU, a padding of one, and maps whose sides are multiples of four. With the interpolation points 0, ±3/4, ±3/2
    the float32 error is six times that of the direct sum (about 1e-6); with the textbook's 0, ±1, ±2, thirteen times.
    """

    def __init__(self, channels: int, width: int, size: tuple[int, int]) -> None:
        assert size[0] % 4 == size[1] % 4 == 0, size
        self.channels, self.width = channels, width
        self.rows, self.columns = size[0] // 4, size[1] // 4
        # Two-dimensional transforms of data [36, 36], kernel [36, 9] and output [16, 36].
        squares = [torch.kron(each, each) for each in _cook_toom((0.0, 0.75, -0.75, 1.5, -1.5))]
        self._transforms = {dtype: [square.to(dtype) for square in squares]
                            for dtype in (torch.float32, torch.float64)}

    def lift_kernel(self, w: Tensor) -> Tensor:
        _, kernel, _ = self._transforms[torch.float64]  # kernels are small, so float64 costs little
        lifted = kernel @ w.double().permute(2, 3, 1, 0).reshape(9, -1)
        return lifted.to(w.dtype).view(36, self.channels, self.width)

    def lower_kernel(self, product: Tensor) -> Tensor:
        _, kernel, _ = self._transforms[product.dtype]
        return (kernel.T @ product.view(36, -1)).view(3, 3, self.channels, self.width).permute(3, 2, 0, 1)

    def lift_input(self, a: Tensor) -> Tensor:
        data, _, _ = self._transforms[a.dtype]
        tiles = F.pad(a, (0, 0, 1, 1, 1, 1)).unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)
        return (data @ tiles.reshape(36, -1)).view(36, -1, self.channels)

    def lower_input(self, product: Tensor) -> Tensor:
        data, _, _ = self._transforms[product.dtype]
        tiles = (data.T @ product.view(36, -1)).view(6, 6, -1, self.rows, self.columns, self.channels)
        columns = _overlap(tiles.permute(2, 3, 0, 4, 1, 5))           # [B, rows, 6, W, C]
        return _overlap(columns.permute(0, 3, 1, 2, 4)).transpose(1, 2)  # [B, W, H, C] → [B, H, W, C]

    def lift_output(self, z: Tensor) -> Tensor:
        _, _, output = self._transforms[z.dtype]
        tiles = z.view(-1, self.rows, 4, self.columns, 4, self.width).permute(2, 4, 0, 1, 3, 5)
        return (output.T @ tiles.reshape(16, -1)).view(36, -1, self.width)

    def lower_output(self, product: Tensor) -> Tensor:
        _, _, output = self._transforms[product.dtype]
        tiles = (output @ product.view(36, -1)).view(4, 4, -1, self.rows, self.columns, self.width)
        return tiles.permute(2, 3, 0, 4, 1, 5).reshape(-1, 4 * self.rows, 4 * self.columns, self.width)

    def forward(self, v: Tensor, u: Tensor) -> Tensor:
        return torch.bmm(v, u)

    def backward(self, d: Tensor, u: Tensor) -> Tensor:
        return torch.bmm(d, u.transpose(1, 2))

    def weight(self, v: Tensor, d: Tensor) -> Tensor:
        return torch.bmm(v.transpose(1, 2), d)


def _planes(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    """[B, H, W, C] → [B, C, H, W], a view unless the type changes."""
    return _typed(a.permute(0, 3, 1, 2), dtype)


def _typed(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    return a if dtype is None else a.to(dtype)


def _overlap(tiles: Tensor) -> Tensor:
    """Sums overlapping tiles [..., n, 6, C] that start four apart and drops one element at each end: [..., 4n, C]."""
    own = F.pad(tiles[..., :4, :], (0, 0, 0, 0, 0, 1))
    spilled = F.pad(tiles[..., 4:, :], (0, 0, 0, 2, 1, 0))  # into the next tile
    sides = (own + spilled).flatten(-3, -2)
    return sides[..., 1:sides.shape[-2] - 3, :]


def _cook_toom(points: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """F(4, 3) at five points and infinity: the transforms of data [6, 6], kernel [6, 3] and output [4, 6]."""
    p = torch.tensor(points, dtype=torch.float64)
    powers = torch.arange(4)
    others = [torch.cat([p[:i], p[i + 1:]]) for i in range(5)]
    scale = torch.stack([(p[i] - others[i]).prod() for i in range(5)])
    last = torch.zeros(1, 4, dtype=torch.float64)
    last[0, 3] = 1
    output = torch.cat([p[:, None] ** powers, last]).T
    kernel = torch.cat([p[:, None] ** powers[:3] / scale[:, None], last[:, 1:]])
    polynomials = [torch.from_numpy(np.poly(roots)[::-1].copy()) for roots in [*others, p]]  # lowest coefficient first
    data = torch.stack([F.pad(each, (0, 6 - len(each))) for each in polynomials])
    return data, kernel, output


Convolution = Direct | Columns | Winograd
