"""A distilled set and its files.

The published format is three files: `images_{tag}.pt`, `labels_{tag}.pt` and `lr_{tag}.pt`. Beside them,
`distilled.safetensors` holds the whole set, as networks see it and as pictures, with its class names and config;
safetensors hold data only, never code. The whitening is far larger: it is in the disk cache, or beside the set if it
was exported with it.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.set_files import check_whole, whole_set
from utils import files
from utils.data.datasets import Dataset, ImageSpace
from utils.data.tiles import check_factor, cut
from utils.data.zca import KeptWhitening
from utils.errors import UserError, note, number_of, some_of

FORMAT = "datm-distilled-set-2"
READ_BY = "dataset", "subset", "res", "zca"  # the options that determine a set's images
FOLDERS = "data_path", "buffer_path"  # where the dataset and its experts were
TOLD = *READ_BY, "model", "factor", *FOLDERS  # options that an evaluation takes from the set if not given


@dataclass(frozen=True, eq=False, repr=False)
class DistilledSet(torch.utils.data.Dataset):
    """Images in the space that networks are trained in, their labels, and the learning rate to train with.

    A `torch.utils.data.Dataset` of (sample [C, H, W], label) as networks see them: an image of factor f gives f²
    samples, its tiles stretched to full size (see `utils.data.tiles`). The attributes below `lr` are set if the set was
    loaded from a self-describing file; `config` also if something else tells it. Mean 0 and deviation 1, each one
    number, mark images of any number of channels as pixels in [0, 1].
    """

    images: Tensor  # [N, C, H, W], as stored
    labels: Tensor  # label logits [N·f², K] or classes [N·f²] int64, grouped by image
    lr: Tensor  # α, a scalar
    classes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)  # the options that made it
    mean: tuple[float, ...] = ()  # see `ImageSpace`
    std: tuple[float, ...] = ()
    whitening: KeptWhitening | None = None
    pictures: Tensor | None = None  # [N, C, H, W], see `pixels`; None: not saved with it

    def __repr__(self) -> str:
        made = "".join(f", {name} {self.config[name]}" for name in ("dataset", "model") if name in self.config)
        return (f"DistilledSet(images {list(self.images.shape)}, labels {list(self.labels.shape)}, factor "
                f"{self.factor}, lr {float(self.lr.float().mean()):.4g}{made})")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        if self.factor == 1 or not isinstance(index, int):
            return self.samples()[index], self.labels[index]
        image, tile = divmod(range(len(self))[index], self.factor**2)
        return cut(self.images[image:image + 1], self.factor)[tile], self.labels[index]

    @property
    def factor(self) -> int:
        """How many samples an image holds along each side."""
        return math.isqrt(len(self.labels) // len(self.images))

    def samples(self) -> Tensor:
        """The samples that networks see [N·f², C, H, W]; with factor 1 the images themselves."""
        return cut(self.images, self.factor)

    def seen(self) -> "DistilledSet":
        """The set with `samples()` as its images: factor 1, no pictures. A set of factor 1 is returned as it is."""
        return self if self.factor == 1 else replace(self, images=self.samples(), pictures=None)

    @property
    def size(self) -> str:
        """The number of images and labels, in words."""
        parts = f" of {self.factor} × {self.factor} smaller ones ({len(self)} labels)" if self.factor > 1 else ""
        return f"{number_of(len(self.images), 'image')}{parts}"

    @functools.cached_property
    def space(self) -> ImageSpace:
        """The conversion between pixels and what networks see.

        Raises:
            UserError: the images are whitened, and the whitening is neither in the disk cache nor beside the set.
        """
        assert self.mean, "only a set from DistilledSet.load knows its space"
        whitening = None if self.whitening is None else self.whitening.read(
            self.images[0].numel(), "run distill/evaluation.py once on the set with its dataset, or write it where the "
            "set was made with scripts/export.py SET --whitening")
        return ImageSpace(self.mean, self.std, whitening)

    def pixels(self) -> Tensor:
        """The images as pictures [N, C, H, W]: un-whitened; 0 is black and 1 white, not clipped. Stored pictures are
        used if there are any, so no whitening is needed."""
        return self.space.to_pixels(self.images) if self.pictures is None else self.pictures

    def copy(self) -> "DistilledSet":
        """A copy that later updates of this set do not affect."""
        return self._each(lambda tensor: tensor.detach().clone())

    def at(self, lr: float) -> "DistilledSet":
        """The set with another learning rate."""
        return replace(self, lr=self.lr.new_tensor(lr))

    def to(self, device: torch.device | str) -> "DistilledSet":
        return self._each(lambda tensor: tensor.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors from which `DistilledSet(**tensors)` makes the set again, without its metadata."""
        return {"images": self.images, "labels": self.labels, "lr": self.lr}

    def _each(self, change: Callable[[Tensor], Tensor]) -> "DistilledSet":
        pictures = None if self.pictures is None else change(self.pictures)
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()}, pictures=pictures)

    def save(self, folder: Path, tag: str | int, dataset: Dataset) -> None:
        """Writes the published files as CPU tensors, and for a whitened dataset `images_zca_{tag}.pt` (un-whitened)."""
        for name, tensor in self.copy().to("cpu").tensors().items():
            files.save(tensor, folder / f"{name}_{tag}.pt")
        if dataset.space.whitening is not None:
            files.save(dataset.space.to_pixels(self.images.detach()).cpu(), folder / f"images_zca_{tag}.pt")

    def save_whole(self, path: Path, dataset: Dataset, config: dict[str, Any]) -> None:
        """Writes the self-describing file that `load` reads.

        Args:
            config: the options that made the set, serialisable as JSON.
        """
        options = {name: str(value) if value == math.inf else value for name, value in config.items()}
        about = {"format": FORMAT, "dataset": dataset.name, "classes": json.dumps(dataset.classes),
                 "mean": json.dumps(dataset.space.mean), "std": json.dumps(dataset.space.std),
                 "config": json.dumps(options)}
        if dataset.space.whitening is not None:
            about["whitening"] = dataset.space.whitening.fingerprint
        files.save_tensors(path, self.tensors() | {"pixels": dataset.space.to_pixels(self.images.detach())}, about)

    @property
    def images_sha256(self) -> str:
        """A checksum of the images, kept in results to say which set they are of."""
        return hashlib.sha256(self.images.cpu().contiguous().numpy()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "DistilledSet":
        """Reads a file written by `save_whole`. For folders see `whole_set`.

        Raises:
            UserError: missing, damaged, another kind of file, or tensors that do not fit each other or are not finite.
        """
        path = whole_set(Path(path))
        check_whole(path)
        with files.reading(path, "write or copy it again", "is damaged or no distilled set"):
            tensors, about = files.load_tensors(path)
            if about.get("format") != FORMAT:
                raise UserError(f"{path} is not a distilled set (format {about.get('format')}, expected {FORMAT}); "
                                "give a distilled.safetensors")
            config = _options(about)
            classes = tuple(map(str, json.loads(about["classes"])))
            mean, std = (tuple(map(float, json.loads(about[name]))) for name in ("mean", "std"))
            whitening = None
            if fingerprint := about.get("whitening"):
                if not re.fullmatch("[0-9a-f]{32}", fingerprint):  # becomes part of a file name
                    raise ValueError("its whitening's fingerprint is none")
                whitening = KeptWhitening(fingerprint, path.parent)
            pictures, factor = tensors.pop("pixels", None), int(config.get("factor", 1))
            distilled = cls(**tensors, classes=classes, config=config, mean=mean, std=std, whitening=whitening,
                            pictures=pictures)
        # Checked here once, so that exports and pages need no checks of their own.
        return _checked(distilled, "it", tuple(distilled.images.shape[1:]), len(classes), [str(path)] * 3, factor)


def recorded_options(path: Path) -> dict[str, Any]:
    """The options in a file written by `save_whole`, from its header alone.

    Raises:
        UserError: the file is damaged, or of another kind.
    """
    with files.reading(path, "write or copy it again", "is damaged or no distilled set"):
        return _options(files.metadata_of(path))


def _options(about: dict[str, str]) -> dict[str, Any]:
    options = json.loads(about["config"], parse_constant=str)
    if not isinstance(options, dict):
        raise ValueError("its config is no table of options")
    return options


def other_space(distilled: DistilledSet, dataset: Dataset) -> str:
    """How a set's images were prepared differently from a dataset's, in words; empty if they agree, or if the set's
    files do not say."""
    if not distilled.mean:
        return ""
    its, ours = distilled.whitening, dataset.space.whitening
    if (its is None) != (ours is None):
        return f"it is {'' if its else 'not '}whitened (zca), and the data here {'is' if ours else 'is not'}"
    if its and ours and its.fingerprint != ours.fingerprint:
        return (f"it was whitened by other training images than those of {dataset.name} here (fingerprint "
                f"{its.fingerprint} there, {ours.fingerprint} here)")
    if not ours and not np.allclose((distilled.mean, distilled.std), dataset.space[:2], atol=1e-3):
        its, ours = (" and ".join(", ".join(f"{value:.4g}" for value in values) for values in (of.mean, of.std))
                     for of in (distilled, dataset.space))
        return f"it was normalised by mean and deviation {its}, and the data here by {ours}"
    return ""


def check_classes(distilled: DistilledSet, dataset: Dataset, option: str, named: bool = True) -> None:
    """Refuses a set whose classes, if it names them, are not the dataset's.

    Args:
        option: the option that gave the set, for messages.
        named: also refuse the same number of classes with other names.
    """
    its, ours = distilled.classes, dataset.classes
    if not its or (len(its) == len(ours) and (its == ours or not named)):
        return
    counts = f"the set has {len(its)} classes and {dataset.name} has {len(ours)} here" if len(its) != len(ours) else ""
    only = [f"only {whose} {some_of(names)}" for whose, names in (
        ("the set has", [name for name in its if name not in ours]),
        ("the images have", [name for name in ours if name not in its])) if names]
    said = ", ".join(filter(None, [counts, *only])) or "the classes of the set are in another order"
    raise UserError(f"{option}: {said}, so its labels do not fit; give the data it was made from")


def checked_set(distilled: DistilledSet, dataset: Dataset, read_from: Sequence[str], label_kind: str = "logits",
                factor: int = 1) -> DistilledSet:
    """The set as float32 (classes as int64), if its tensors fit each other, the dataset and the factor.

    Args:
        read_from: where images, labels and learning rate come from, for messages.
        label_kind: what floating-point labels are: "logits", or "probabilities", which are converted to logits.

    Raises:
        UserError: they do not fit, hold values that are not finite, or are not of the given `label_kind`.
    """
    distilled = _checked(distilled, dataset.name, (dataset.channels, *dataset.image_size), dataset.num_classes,
                         read_from, factor)
    labels, soft = distilled.labels, distilled.labels.is_floating_point()
    probable = are_probabilities(labels)
    if label_kind == "probabilities":
        if not probable:
            raise UserError("--label_kind probabilities: the labels are "
                            f"{'not rows of at least 0 that sum to 1' if soft else 'classes'}; leave it out")
        # Softmax restores the probabilities. The smallest normal number replaces 0, whose logarithm is infinite.
        return replace(distilled, labels=labels.clamp_min(torch.finfo(labels.dtype).tiny).log())
    if probable:
        note("each row of labels is at least 0 and sums to 1, as probabilities do; they are taken for logits, as "
             "published: give evaluation.py --label_kind probabilities if they are probabilities")
    return distilled


def are_probabilities(labels: Tensor) -> bool:
    """Whether labels are non-negative rows that sum to 1."""
    return (labels.is_floating_point() and labels.dim() == 2 and bool((labels >= 0).all())
            and bool((labels.sum(dim=1) - 1).abs().max() < 1e-3))


def _checked(distilled: DistilledSet, whose: str, image_shape: tuple[int, ...], num_classes: int,
             read_from: Sequence[str], factor: int) -> DistilledSet:
    """The set as float32 (classes as int64), if its tensors fit these images and classes and the factor.

    Args:
        whose: whose images and classes these are, for messages.
        read_from: where images, labels and learning rate come from, for messages.

    Raises:
        UserError: they do not fit, or hold values that are not finite in float32.
    """
    # Cast before checking, as large values become infinite in float32.
    images, labels, lr = (_cast(tensor) for tensor in distilled.tensors().values())
    pictures = images if distilled.pictures is None else _cast(distilled.pictures)
    in_images, in_labels, in_lr = read_from
    if (not images.is_floating_point() or images.dim() != 4 or tuple(images.shape[1:]) != image_shape
            or not images.numel() or pictures.shape != images.shape):
        raise UserError(f"{in_images} holds {distilled.images.dtype} {list(images.shape)}; {whose} needs "
                        f"floating-point images [N, {', '.join(map(str, image_shape))}], N at least 1")
    check_factor(factor, images.shape[2:])
    count, other = factor**2 * len(images), math.isqrt(len(labels) // len(images)) if labels.dim() else 0
    if not _labels_fit(labels, count, num_classes):
        hint = f"; give --factor {other}" if (
            in_labels.startswith("--") and 0 < other != factor and len(labels) == other**2 * len(images)) else ""
        raise UserError(f"{in_labels} holds {distilled.labels.dtype} {list(labels.shape)}; these {len(images)} images "
                        f"of {whose}{f' of factor {factor}' if factor > 1 else ''} need label logits [{count}, "
                        f"{num_classes}], or int64 classes [{count}] with no classes outside 0 … "
                        f"{num_classes - 1}{hint}")
    if lr.numel() != 1 or not lr.isfinite().all() or lr.item() <= 0:
        held = distilled.lr.tolist() if lr.numel() < 5 else list(lr.shape)
        raise UserError(f"{in_lr} holds {held} as learning rate; it must be one positive learning rate")
    for name, tensor in ((in_images, images), (in_labels, labels), (in_images, pictures)):
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds values that are not finite in float32; that set cannot be used")
    return replace(distilled, images=images, labels=labels, lr=lr.float().reshape(()),
                   pictures=None if distilled.pictures is None else pictures)


def _cast(tensor: Tensor) -> Tensor:
    """Casts floating-point tensors to float32 and integers to int64; boolean ones stay as they are."""
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _labels_fit(labels: Tensor, count: int, num_classes: int) -> bool:
    """Whether these are label logits or valid classes of `count` samples."""
    if labels.is_floating_point():
        return tuple(labels.shape) == (count, num_classes)
    named = set(labels.unique().tolist())
    return labels.dtype == torch.int64 and tuple(labels.shape) == (count,) and named <= set(range(num_classes))


def classes_of(distilled: DistilledSet, num_classes: int) -> tuple[Tensor, str]:
    """The class of each sample [N·f²] int64, and where it was taken from, in words.

    A learned label need not be largest at the class that its image started from, so if a distillation made the set,
    the order of its images gives the class.
    """
    if not distilled.labels.is_floating_point():
        return distilled.labels, "the labels, which are classes"
    ipc = distilled.config.get("ipc")
    if isinstance(ipc, int) and len(distilled.images) == ipc * num_classes:
        classes = torch.arange(num_classes, device=distilled.labels.device)
        classes = classes.repeat_interleave(len(distilled) // num_classes)
        return classes, "the order of the images, grouped by class"
    return distilled.labels.argmax(dim=1), "the largest soft label"
