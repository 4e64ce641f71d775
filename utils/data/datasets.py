"""Name → whole dataset as tensors: `load_dataset(name, data_path) -> Dataset`.

Existing files are used as they are; torchvision downloads only missing ones. `DATASETS`, at the end, is the table of
names; each loader documents what it reads. The means and deviations of CIFAR, Tiny and ImageNet are the published ones.
"""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.data.disk_layouts import Loader, Split, cifar, fashion_mnist, minifashion, mnist, svhn
from utils.data.image_folders import image_folder, imagenet, imagenet_1k, tiny
from utils.data.names import NAMES, check_dataset_name
from utils.data.watching import Watch, unwatched
from utils.data.zca import Whitening, chunk_size, fit, to_unit
from utils.errors import UserError, some_of
from utils.memory import empty_on_host

HOLD_OUT_SEED = 0  # for choosing held-out images: the same choice in every run
PUBLISHED_RES = 32  # in published configs for every dataset; ignored where the dataset has its own size


class ImageSpace(NamedTuple):
    """The space in which networks see images: normalised by mean and std, or whitened if there is a whitening."""

    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    whitening: Whitening | None

    def from_pixels(self, images: Tensor) -> Tensor:
        """Images [n, C, H, W] in [0, 1], or of bytes → the same in this space.

        Raises:
            UserError: the images have another size or number of channels.
        """
        self._check(images)
        images = to_unit(images, images.device)
        if self.whitening is not None:
            return self.whitening.apply(images)
        return (images - _per_channel(self.mean, images)) / _per_channel(self.std, images)

    def to_pixels(self, images: Tensor) -> Tensor:
        """The inverse of `from_pixels`, with the same errors; not clipped."""
        self._check(images)
        if self.whitening is not None:
            return self.whitening.invert(images)
        return images * _per_channel(self.std, images) + _per_channel(self.mean, images)

    def _check(self, images: Tensor) -> None:
        values = None if self.whitening is None else self.whitening.mean.numel()
        if images.dim() != 4 or images.shape[1] != len(self.mean) or values not in (None, images.shape[1:].numel()):
            each = f" with {values} values in each image" if values else ""
            raise UserError(f"images {list(images.shape)} are not of this space; give [N, {len(self.mean)}, H, W]"
                            f"{each}")


class HostImages:
    """Images [N, C, H, W] that stay on the host but are indexed like a tensor on `device`, which gets the result."""

    def __init__(self, images: Tensor, device: torch.device):
        self.images, self.device, self.shape = images, device, images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        return self.images[chosen.cpu() if isinstance(chosen, Tensor) else chosen].to(self.device)

    def to(self, device: torch.device | str) -> Tensor:
        """All images, on `device`."""
        return self.images.to(device)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A training and a test set in the space that networks see: normalised by mean and std, or ZCA-whitened.

    All tensors are on `device` except two that would fill a GPU and are seldom needed there: the training images, which
    `to` moves there for a program that trains on them, and the whitening.
    """

    name: str
    train_images: Tensor | HostImages  # [N, C, H, W] float32
    train_labels: Tensor  # [N] int64, 0 … num_classes − 1
    test_images: Tensor  # [M, C, H, W] float32
    test_labels: Tensor  # [M] int64
    classes: tuple[str, ...]
    space: ImageSpace
    fingerprint: str  # SHA-256, in hex, of the name and the raw images and labels
    # [N] if whitened: `Whitening.energy` of the training images' pixels, which are costly to recover.
    train_energy: Tensor | None = None

    def __repr__(self) -> str:
        kind = "normalised" if self.space.whitening is None else "whitened"
        return (f"Dataset({self.name}, {len(self.train_images)} training and {len(self.test_images)} test images "
                f"{list(self.test_images.shape[1:])}, {self.num_classes} classes, {kind})")

    @property
    def device(self) -> torch.device:
        """The device that computes with the dataset."""
        return self.test_images.device

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)"""
        return tuple(self.train_images.shape[2:])

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def class_indices(self, c: int) -> Tensor:
        """Indices [n] of the training images of class `c`, ascending, on `device`."""
        return self._indices_by_class[c]

    @functools.cached_property
    def _indices_by_class(self) -> tuple[Tensor, ...]:
        counts = self.train_labels.bincount(minlength=self.num_classes).tolist()  # the only host sync, done once
        return self.train_labels.argsort(stable=True).split(counts)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same dataset with every tensor on `device`, including the training images but not the whitening."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | HostImages)}
        return dataclasses.replace(self, **moved)


def load_dataset(name: str, data_path: str | os.PathLike, *, subset: str = "imagenette", zca: bool = False,
                 res: int | str | None = None, val_fraction: float = 0.0,
                 device: torch.device | str = "cpu", watch: Watch = unwatched) -> Dataset:
    """Reads a dataset whole.

    Args:
        name: a key of `DATASETS`.
        data_path: the folder that holds the dataset, or into which it is downloaded. MiniFashion needs none.
        subset: which ten classes, for ImageNet.
        zca: whiten (`utils.data.zca`, fitted on the training images) instead of normalising by mean and std.
        res: side in pixels, or `HxW`, for ImageNet (128 unless given) and ImageFolder (32); the others have their own.
        val_fraction: hold out this fraction of each class's training images and use it as the test set. The choice is
            drawn from a generator seeded with HOLD_OUT_SEED. The whitening is fitted on all training images.
        device: the dataset's device, which also normalises and whitens. If it is a GPU, the training images stay on
            the host.
        watch: shows the progress of long steps.

    Raises:
        UserError: unknown names; files that are missing, damaged or not in the expected layout; a failed download.
    """
    check_dataset_name(name)
    data_path = Path(data_path).expanduser()
    size = None if res is None else (tuple(map(int, str(res).split("x"))) * 2)[:2]
    try:
        train, test, classes, normal = DATASETS[name](data_path, subset, size, watch)
    except OSError as error:
        raise UserError(f"{name} in {data_path} cannot be read: {error}; check its files and permissions") from error
    height, width = train.images.shape[2:]
    if size not in (None, (height, width)) and res != PUBLISHED_RES:
        raise UserError(f"res is {res}, but {name} has images of {height}×{width} pixels; leave res out, or use "
                        "dataset ImageFolder, which resizes")
    _check_labels(name, "training", train.labels, classes)
    _check_labels(name, "test", test.labels, classes)
    mean, std = normal or _measure(train.images)
    # Fitted before images are held out, so that results with and without a hold-out share one space.
    whitening = fit(train.images, _sha256(*train), device, watch) if zca else None
    if val_fraction:
        train, test = _hold_out(train, val_fraction, classes)
    fingerprint = _sha256(name, *train, *test)

    (train_images, train_labels), (test_images, test_labels) = train, test
    del train, test  # so that each raw copy is freed as soon as it is converted
    device = torch.device(device)
    there = ImageSpace(mean, std, whitening and whitening.to(device))  # only while it whitens
    with watch("whitening the images" if zca else "normalising the images",
               len(train_images) + len(test_images)) as advance:
        train_images, energy = _converted(train_images, there, device, advance)
        test_images, _ = _converted(test_images, there, device, advance)
    if device.type != "cpu":
        train_images = HostImages(train_images, device)
    return Dataset(name, train_images, train_labels.to(device), test_images.to(device), test_labels.to(device), classes,
                   ImageSpace(mean, std, whitening), fingerprint, energy)


def _converted(raw: Tensor, space: ImageSpace, device: torch.device, advance: Callable[[float], object]
               ) -> tuple[Tensor, Tensor | None]:
    """Raw images → images as networks see them, on the host, and, if whitened, the pixels' energy [N] on `device`.

    Both are computed on `device`, which holds only a chunk of the images at a time.
    """
    images, energy, size = empty_on_host(raw.shape), [], chunk_size(raw)
    for some, place in zip(raw.split(size), images.split(size)):
        pixels = to_unit(some, device)
        if space.whitening is not None:
            energy.append(space.whitening.energy(pixels))
        place.copy_(space.from_pixels(pixels))
        advance(len(some))
    return images, torch.cat(energy) if energy else None


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return images.new_tensor(values).view(-1, 1, 1)


def _sha256(*parts: str | Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy())
        else:
            digest.update(part.encode())
    return digest.hexdigest()


def _measure(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels in [0, 1]; a constant channel gets the std 1."""
    total = square = torch.zeros(images.shape[1], dtype=torch.float64)
    for some in images.split(1024):  # in pieces, so that the float64 copy stays small
        some = some.double() / (255 if images.dtype == torch.uint8 else 1)
        total, square = total + some.sum((0, 2, 3)), square + some.square().sum((0, 2, 3))
    count = images.numel() // images.shape[1]
    mean = total / count
    std = (square / count - mean**2).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(value if value > 1e-6 else 1.0 for value in std.tolist())


def _check_labels(name: str, split: str, labels: Tensor, classes: Sequence[str]) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{name}: {split} labels reach from {labels.min()} to {labels.max()}, expected 0 to "
                        f"{len(classes) - 1}; the label file is not this dataset's, fetch it again")
    empty = (labels.bincount(minlength=len(classes)) == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(f"{name}: no {split} image of {some_of([classes[c] for c in empty])} ({len(empty)} of "
                        f"{len(classes)} classes); add images or leave the class out")


def _hold_out(train: Split, fraction: float, classes: Sequence[str]) -> tuple[Split, Split]:
    """Holds out a rounded fraction of each class, at least one image → (remaining, held out), both in file order."""
    generator = torch.Generator().manual_seed(HOLD_OUT_SEED)
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    for c, name in enumerate(classes):
        members = (train.labels == c).nonzero().flatten()
        count = max(1, math.floor(fraction * len(members) + 0.5))
        if count >= len(members):
            raise UserError(f"val_fraction {fraction} would hold out all {len(members)} training images of class "
                            f"{name}; {'give a smaller one' if len(members) > 1 else 'add images to it'}, or give 0 "
                            "for none")
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return _rows(train, ~held), _rows(train, held)


def _rows(split: Split, which: Tensor) -> Split:
    """Some of its images, on the disk if the memory is too small."""
    rows = which.nonzero().flatten()
    images = empty_on_host((len(rows), *split.images.shape[1:]), split.images.dtype)
    return Split(torch.index_select(split.images, 0, rows, out=images), split.labels[rows])


DATASETS: dict[str, Loader] = {
    "MiniFashion": minifashion,
    "FashionMNIST": fashion_mnist,
    "MNIST": mnist,
    "CIFAR10": functools.partial(cifar, "CIFAR10"),
    "CIFAR100": functools.partial(cifar, "CIFAR100"),
    "SVHN": svhn,
    "Tiny": tiny,
    "ImageNet": imagenet,
    "ImageNet1K": imagenet_1k,
    "ImageFolder": image_folder,
}
# A dataset's name is also in `names.NAMES` and, with its size, in `utils.config`, which imports nothing of this folder.
assert tuple(DATASETS) == NAMES
