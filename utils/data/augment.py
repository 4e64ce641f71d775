"""Differentiable Siamese augmentation (Zhao & Bilen, ICML 2021): draw the parameters, then apply them.

A strategy such as `color_crop_cutout_flip_scale_rotate` names groups of operations. One group is drawn per
batch, uniformly; its parameters are drawn per sample. The older augmentation, used with `--dsa False`,
draws one operation per image instead (`draw_per_image`). Drawing is the only random part and always runs on the
CPU, so a seed gives the same augmentation on every device; `apply` is pure and differentiable in the images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import memory
from utils.data.names import GROUPS

# The published strengths.
BRIGHTNESS = 1.0
SATURATION = 2.0
CONTRAST = 0.5
SCALE = 1.2
ROTATE_DEGREES = 15.0
CROP_FRACTION = 0.125
CUTOUT_FRACTION = 0.5
FLIP_PROBABILITY = 0.5

# The strengths of the older augmentation.
OLD_CROP = 4
OLD_SCALE = 0.2
OLD_ROTATE_DEGREES = 45.0
OLD_NOISE = 0.001
SENT_BYTES = 32 << 20  # drawn ahead: mostly a whole epoch, but noise is as large as the images


@dataclass(frozen=True)
class Draw:
    """The drawn operations of one batch, in order: name → its parameters, tensors with a row per image (see
    `OPERATIONS`); `Draw()` leaves the batch as it is."""

    parameters: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def operations(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    @property
    def tensors(self) -> list[Tensor]:
        return [value for values in self.parameters.values() for value in values]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Draw":
        """The same draw with its `tensors` replaced by these."""
        rest = iter(tensors)
        return Draw({name: tuple(next(rest) for _ in values) for name, values in self.parameters.items()})

    def rows(self, rows: slice) -> "Draw":
        """The draw for some of the batch's images."""
        return Draw({name: tuple(value[rows] for value in values) for name, values in self.parameters.items()})


Drawer = Callable[[int, torch.Generator], Draw]
"""(batch size, generator) → the augmentation of that batch."""


def to_device(draws: Sequence[Draw], others: Sequence[Tensor], device: torch.device | str
              ) -> tuple[list[Draw], list[Tensor]]:
    """Several draws and other host tensors, all moved to `device` in one copy; see `memory.to_device`."""
    there = iter(memory.to_device([*others, *(each for drawn in draws for each in drawn.tensors)], device))
    others = [next(there) for _ in others]
    return [drawn.with_tensors([next(there) for _ in drawn.tensors]) for drawn in draws], others


def drawn_ahead(batches: Sequence[Tensor], draw: Drawer, random: torch.Generator, device: torch.device | str
                ) -> Iterator[tuple[Tensor, Draw]]:
    """Yields batches of indices [B], each with its draw, on `device`; one copy moves many of them."""
    waiting, size = [], 0
    for batch in batches:
        waiting.append((batch, draw(len(batch), random)))
        size += sum(each.nbytes for each in (batch, *waiting[-1][1].tensors))
        if size >= SENT_BYTES or batch is batches[-1]:
            draws, there = to_device([drawn for _, drawn in waiting], [each for each, _ in waiting], device)
            yield from zip(there, draws)
            waiting, size = [], 0


def draw(groups: tuple[str, ...], batch: int, image_size: tuple[int, int], generator: torch.Generator) -> Draw:
    """Draws one group and its parameters for `batch` images of `image_size` (H, W); nothing without groups.

    Args:
        generator: a CPU generator, the only source of randomness.
    """
    if not groups:
        return Draw()
    group = groups[int(torch.randint(len(groups), (), generator=generator))]
    return Draw({name: OPERATIONS[name].draw(batch, image_size, generator) for name in GROUPS[group]})


def draw_per_image(operations: tuple[str, ...], batch: int, image_size: tuple[int, int], channels: int,
                   generator: torch.Generator) -> Draw:
    """The older augmentation (DC, Zhao et al., ICLR 2021): one of `operations` for each image, uniformly.

    Shifts by up to 4 pixels (`crop`), scales by 0.8 … 1.2, rotates by ±45°, or adds noise of deviation 0.001. The other
    operations get parameters that leave the image unchanged. Published: shifts of −3 … 4, whole degrees of −45 … 44,
    uncovered pixels filled with the batch's mean instead of zeros, and other interpolation.
    """
    if not operations:
        return Draw()
    chosen = torch.randint(len(operations), (batch,), generator=generator)
    one, zero = torch.ones(batch), torch.zeros(batch)
    parameters: dict[str, tuple[Tensor, ...]] = {}
    for number, name in enumerate(operations):
        here = chosen == number
        if name == "crop":
            values = tuple(_integers(-OLD_CROP, OLD_CROP, batch, generator) * here for _ in range(2))
        elif name == "scale":
            values = tuple(torch.where(here, _uniform(batch, generator, 1 - OLD_SCALE, 1 + OLD_SCALE), one)
                           for _ in range(2))
        elif name == "rotate":
            angle = _uniform(batch, generator, -OLD_ROTATE_DEGREES, OLD_ROTATE_DEGREES)
            values = (torch.where(here, torch.deg2rad(angle), zero),)
        else:
            noise = torch.randn(batch, channels, *image_size, generator=generator)
            values = (OLD_NOISE * noise * here[:, None, None, None],)
        parameters[name] = values
    return Draw(parameters)


OLDER_FOR_EXPERTS = ("crop", "scale", "rotate")  # for every dataset, as in the trainers that DATM's is based on


def older_operations(dataset: str, network: str) -> tuple[str, ...]:
    """The older augmentation's operations in DC's evaluation: for MNIST and for ConvNetBN; otherwise none. DATM's
    published evaluation has the same table, but fails with `--dsa False`."""
    if network == "ConvNetBN":
        return ("crop", "noise")
    return ("crop", "scale", "rotate") if dataset == "MNIST" else ()


def apply(x: Tensor, drawn: Draw) -> Tensor:
    """The drawn operations applied to x [B, C, H, W], in order; x itself if it is empty or nothing was drawn."""
    if not len(x):
        return x
    for name, values in drawn.parameters.items():
        x = OPERATIONS[name].apply(x, *values)
    return x


# --- the operations: a draw and a pure function each ---------------------------------------------------------


def _uniform(batch: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(batch, generator=generator) * (high - low) + low


def _integers(low: int, high: int, batch: int, generator: torch.Generator) -> Tensor:
    """Uniform integers low … high, both included."""
    return torch.randint(low, high + 1, (batch,), generator=generator)


def _per_image(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype).view(-1, 1, 1, 1)


def brightness(x: Tensor, offset: Tensor) -> Tensor:
    return x + _per_image(offset, x)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    grey = x.mean(dim=1, keepdim=True)
    return (x - grey) * _per_image(factor, x) + grey


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * _per_image(factor, x) + mean


def flip(x: Tensor, flipped: Tensor) -> Tensor:
    return torch.where(flipped.view(-1, 1, 1, 1), x.flip(3), x)


def noise(x: Tensor, added: Tensor) -> Tensor:
    return x + added.to(x.dtype)


def scale(x: Tensor, scale_x: Tensor, scale_y: Tensor) -> Tensor:
    zero = torch.zeros_like(scale_x)
    return _affine(x, scale_x, zero, zero, scale_y)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """angle [B] in radians."""
    return _affine(x, angle.cos(), (-angle).sin(), angle.sin(), angle.cos())


def _affine(x: Tensor, xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    zero = torch.zeros_like(xx)
    theta = torch.stack([torch.stack([xx, xy, zero], dim=1), torch.stack([yx, yy, zero], dim=1)], dim=1)
    grid = F.affine_grid(theta.to(x.dtype), list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def crop(x: Tensor, shift_rows: Tensor, shift_cols: Tensor) -> Tensor:
    """Shifts each image by whole pixels and fills with zeros."""
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device) + shift_rows[:, None]
    cols = torch.arange(width, device=x.device) + shift_cols[:, None]
    inside = (((rows >= 0) & (rows < height))[:, None, :, None] & ((cols >= 0) & (cols < width))[:, None, None, :])
    rows, cols = rows.clamp(0, height - 1), cols.clamp(0, width - 1)
    # Two gathers along one axis each: their backward is a scatter along one axis, cheaper than a pixel index.
    x = x.gather(2, rows[:, None, :, None].expand_as(x))
    x = x.gather(3, cols[:, None, None, :].expand_as(x))
    return torch.where(inside, x, torch.zeros((), dtype=x.dtype, device=x.device))


def cutout(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Zeroes a square of half the image's size centred at (row, col); indices past a border are clamped to it."""
    height, width = x.shape[2:]
    inside_rows = _cut(row, height, x)
    inside_cols = _cut(col, width, x)
    cut = inside_rows[:, None, :, None] & inside_cols[:, None, None, :]
    return x.masked_fill(cut, 0.0)


def _cut_size(size: int) -> int:
    return int(size * CUTOUT_FRACTION + 0.5)


def _cut(centre: Tensor, size: int, x: Tensor) -> Tensor:
    """Which of `size` positions the square covers: [B, size]."""
    side = _cut_size(size)
    first = centre - side // 2
    last = first + side - 1
    position = torch.arange(size, device=x.device)
    return ((position >= first.clamp(0, size - 1)[:, None]) & (position <= last.clamp(0, size - 1)[:, None]))


def _draw_crop(batch: int, image_size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(_integers(-reach, reach, batch, generator)
                 for reach in (int(size * CROP_FRACTION + 0.5) for size in image_size))


def _draw_cutout(batch: int, image_size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
    # A square of even side has no centre pixel; the published code then draws from one more position.
    return tuple(_integers(0, size - _cut_size(size) % 2, batch, generator) for size in image_size)


@dataclass(frozen=True)
class Operation:
    draw: Callable[[int, tuple[int, int], torch.Generator], tuple[Tensor, ...]] | None
    apply: Callable[..., Tensor]


OPERATIONS = {
    "brightness": Operation(lambda n, _, g: (_uniform(n, g, -0.5 * BRIGHTNESS, 0.5 * BRIGHTNESS),), brightness),
    "saturation": Operation(lambda n, _, g: (_uniform(n, g, 0.0, SATURATION),), saturation),
    "contrast": Operation(lambda n, _, g: (_uniform(n, g, CONTRAST, CONTRAST + 1.0),), contrast),
    "crop": Operation(_draw_crop, crop),
    "cutout": Operation(_draw_cutout, cutout),
    "flip": Operation(lambda n, _, g: (_uniform(n, g) < FLIP_PROBABILITY,), flip),
    "scale": Operation(lambda n, _, g: (_uniform(n, g, 1 / SCALE, SCALE), _uniform(n, g, 1 / SCALE, SCALE)), scale),
    "noise": Operation(None, noise),  # only drawn per image
    "rotate": Operation(lambda n, _, g: (torch.deg2rad(_uniform(n, g, -ROTATE_DEGREES, ROTATE_DEGREES)),), rotate),
}
