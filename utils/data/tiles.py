"""Several small images stored in one, each a separate sample (IDC, Kim et al., ICML 2022).

An image of factor f is a grid of f × f tiles, in row-major order. For use, each tile is cut out and stretched
bilinearly to the full image size, with align_corners False as in IDC. If a side is not a multiple of f, tiles differ by
one pixel in size; none overlap, and nothing is padded.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError


def check_factor(factor: int, image_size: Sequence[int]) -> None:
    """Refuses a grid with more tiles along a side than images (H, W) have pixels."""
    if factor > min(image_size):
        raise UserError(f"--factor {factor}: images of {image_size[0]}×{image_size[1]} pixels cannot hold {factor} × "
                        f"{factor} smaller ones; give at most {min(image_size)}")


def cut(images: Tensor, factor: int) -> Tensor:
    """Images [N, C, H, W] → the samples that networks see [N·f², C, H, W], grouped by image; linear."""
    if factor == 1:
        return images
    rows, columns = _stretching(images, factor)
    return torch.einsum("ihy,ncyx,jwx->nijchw", rows, images, columns).flatten(0, 2)


def cut_adjoint(gradient: Tensor, factor: int) -> Tensor:
    """The gradient in `cut(images, factor)` [N·f², C, H, W] → the gradient in the images [N, C, H, W]."""
    if factor == 1:
        return gradient
    rows, columns = _stretching(gradient, factor)
    return torch.einsum("ihy,nijchw,jwx->ncyx", rows, gradient.unflatten(0, (-1, factor, factor)), columns)


def tiled(samples: Tensor, factor: int) -> Tensor:
    """Samples [N·f², C, H, W] → images [N, C, H, W]; each sample is shrunk to its tile by averaging over areas."""
    if factor == 1:
        return samples
    grid = samples.unflatten(0, (-1, factor, factor))
    heights, widths = ([end - begin for begin, end in _edges(side, factor)] for side in samples.shape[2:])
    return torch.cat([torch.cat([F.interpolate(grid[:, row, column], (height, width), mode="area")
                                 for column, width in enumerate(widths)], dim=3)
                      for row, height in enumerate(heights)], dim=2)


def _edges(side: int, factor: int) -> list[tuple[int, int]]:
    """Where each tile begins and ends along a side."""
    return list(itertools.pairwise(number * side // factor for number in range(factor + 1)))


def _stretching(images: Tensor, factor: int) -> list[Tensor]:
    return [_matrices(side, factor, images.dtype, images.device) for side in images.shape[-2:]]


# Matrices, because on a GPU the gradient of torch's own interpolation is not bit-reproducible.
@functools.lru_cache(maxsize=16)
def _matrices(side: int, factor: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[f, side, side]: for each tile along a side, the matrix that stretches it to the full side."""
    matrices = torch.zeros(factor, side, side, dtype=torch.float64)
    for matrix, (begin, end) in zip(matrices, _edges(side, factor)):
        pixels = torch.eye(end - begin, dtype=torch.float64)
        matrix[:, begin:end] = F.interpolate(pixels[None], side, mode="linear", align_corners=False)[0].T
    return matrices.to(device, dtype)
