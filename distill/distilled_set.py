"""A distilled set and its files.

The published ones are three: `images_{tag}.pt`, `labels_{tag}.pt`, `lr_{tag}.pt`. Beside them `distilled.safetensors`
holds the set whole, with its whitening, class names and config; safetensors hold data only, never code.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import files
from utils.data.datasets import Dataset, ImageSpace
from utils.data.zca import Whitening
from utils.errors import UserError

FORMAT = "datm-distilled-set-1"
WHOLE = "distilled.safetensors"  # the self-describing file


@dataclass(frozen=True, eq=False)
class DistilledSet(torch.utils.data.Dataset):
    """Images in the space that networks are trained in, their labels, and the learning rate to train with.

    A ready `torch.utils.data.Dataset` of (image [C, H, W], label). `space` and `classes` are there if the set was
    loaded from a self-describing file.
    """

    images: Tensor  # [N, C, H, W]
    labels: Tensor  # label logits [N, K], or classes [N] int64
    lr: Tensor  # α, a scalar
    classes: tuple[str, ...] = ()
    space: ImageSpace | None = None
    config: dict[str, Any] = field(default_factory=dict)  # the options that made it

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def pixels(self) -> Tensor:
        """The images as pictures [N, C, H, W]: un-whitened, around [0, 1], not clipped."""
        assert self.space is not None, "only a set from DistilledSet.load knows its space"
        return self.space.to_pixels(self.images)

    def detach(self) -> "DistilledSet":
        """A copy that later updates of this set do not touch."""
        return self._each(lambda tensor: tensor.detach().clone())

    def to(self, device: torch.device | str) -> "DistilledSet":
        return self._each(lambda tensor: tensor.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """What `DistilledSet(**tensors)` makes a set of again, without its space, classes and config."""
        return {"images": self.images, "labels": self.labels, "lr": self.lr}

    def _each(self, change: Callable[[Tensor], Tensor]) -> "DistilledSet":
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

    def save(self, folder: Path, tag: str | int, dataset: Dataset) -> None:
        """Writes the published files, on the CPU, and `images_zca_{tag}.pt` (un-whitened) for a whitened dataset."""
        for name, tensor in self.detach().to("cpu").tensors().items():
            files.save(tensor, folder / f"{name}_{tag}.pt")
        if dataset.whitening is not None:
            files.save(dataset.to_pixels(self.images.detach()).cpu(), folder / f"images_zca_{tag}.pt")

    def save_whole(self, path: Path, dataset: Dataset, config: dict[str, Any]) -> None:
        """Writes the one self-describing file that `load` reads.

        Args:
            config: the options that made the set, as JSON can hold them.
        """
        tensors = self.tensors()
        if dataset.whitening is not None:
            tensors |= {f"zca_{name}": tensor for name, tensor in dataset.whitening.tensors().items()}
        options = {name: str(value) if value == math.inf else value for name, value in config.items()}
        about = {"format": FORMAT, "dataset": dataset.name, "classes": json.dumps(dataset.classes),
                 "mean": json.dumps(dataset.mean), "std": json.dumps(dataset.std), "config": json.dumps(options)}
        files.save_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> "DistilledSet":
        """Reads a file of `save_whole`.

        Raises:
            UserError: missing, damaged, or another kind of file.
        """
        path = Path(path)
        files.check_is_file(path, "distilled set", set_in(path) or f"the path of a {WHOLE}")
        with files.reading(path, "write or copy it again", "is damaged or no distilled set"):
            tensors, about = files.load_tensors(path)
            if about.get("format") != FORMAT:
                raise UserError(f"{path} is not a distilled set (format {about.get('format')}, expected {FORMAT}); "
                                "give a distilled.safetensors")
            zca = {name.removeprefix("zca_"): tensors.pop(name) for name in list(tensors) if name.startswith("zca_")}
            space = ImageSpace(tuple(json.loads(about["mean"])), tuple(json.loads(about["std"])),
                               Whitening(**zca) if zca else None)
            return cls(**tensors, classes=tuple(json.loads(about["classes"])), space=space,
                       config=json.loads(about["config"]))


def set_in(folder: Path) -> Path | None:
    """The distilled set in a run's folder, which may be what was meant by the folder."""
    return next(iter(sorted(folder.glob(f"**/{WHOLE}"))), None) if folder.is_dir() else None


def read_set(data_dir: str, label_dir: str, lr_dir: str, default_lr: float) -> DistilledSet:
    """Reads a saved set, as it is.

    Args:
        data_dir, label_dir, lr_dir: the three *files* (published names); an empty lr_dir means `default_lr`. Or
            data_dir alone, a `distilled.safetensors`.

    Raises:
        UserError: a missing or unreadable file.
    """
    if data_dir.endswith(".safetensors"):
        given = [option for option, path in (("--label_dir", label_dir), ("--lr_dir", lr_dir)) if path]
        if given:
            raise UserError(f"{given[0]} beside --data_dir {data_dir}, which holds images, labels and learning rate; "
                            "leave it out")
        return DistilledSet.load(data_dir)
    images = _tensor(data_dir, "--data_dir", "images_best.pt")
    labels = _tensor(label_dir, "--label_dir", "labels_best.pt")
    lr = _tensor(lr_dir, "--lr_dir", "lr_best.pt") if lr_dir else torch.tensor(default_lr)
    return DistilledSet(images, labels, lr)


def checked_set(distilled: DistilledSet, dataset: Dataset) -> DistilledSet:
    """The set as float32 (classes as int64), if its tensors fit each other and the dataset.

    Raises:
        UserError: they do not, or hold values that are not finite.
    """
    images, labels, lr = distilled.images, distilled.labels, distilled.lr
    expected = (dataset.channels, *dataset.image_size)
    if not images.is_floating_point() or tuple(images.shape[1:]) != expected or not len(images):
        raise UserError(f"--data_dir holds {images.dtype} {list(images.shape)}; {dataset.name} needs floating-point "
                        f"images [N, {', '.join(map(str, expected))}], N at least 1")
    if not labels_fit(labels, len(images), dataset.num_classes):
        raise UserError(f"--label_dir holds {labels.dtype} {list(labels.shape)}; these {len(images)} images of "
                        f"{dataset.name} need label logits [{len(images)}, {dataset.num_classes}], or int64 classes "
                        f"[{len(images)}] with no classes outside 0 … {dataset.num_classes - 1}")
    if lr.numel() != 1 or not torch.isfinite(lr).all() or lr.item() <= 0:
        raise UserError(f"--lr_dir holds {lr.tolist() if lr.numel() < 5 else list(lr.shape)}; it must be one positive "
                        "learning rate")
    if not images.isfinite().all() or not labels.isfinite().all():
        raise UserError("--data_dir or --label_dir holds values that are not finite; that set cannot be evaluated")
    return replace(distilled, images=images.float(), lr=lr.float().reshape(()),
                   labels=labels.float() if labels.is_floating_point() else labels)


def labels_fit(labels: Tensor, count: int, num_classes: int) -> bool:
    """Whether these are label logits of so many images, or their classes."""
    if labels.is_floating_point():
        return tuple(labels.shape) == (count, num_classes)
    named = set(labels.unique().tolist())
    return labels.dtype == torch.int64 and tuple(labels.shape) == (count,) and named <= set(range(num_classes))


def class_indices(distilled: DistilledSet, num_classes: int) -> tuple[Tensor, str]:
    """The class of each image [N] int64, and by what it is known.

    A learned label need not be largest at the class that its image started from, so where a distillation made the set,
    the order of its images says the class.
    """
    if not distilled.labels.is_floating_point():
        return distilled.labels, "the labels, which are classes"
    ipc = distilled.config.get("ipc")
    if isinstance(ipc, int) and len(distilled) == ipc * num_classes:
        classes = torch.arange(num_classes, device=distilled.labels.device).repeat_interleave(ipc)
        return classes, "the order of the images, those of a class together"
    return distilled.labels.argmax(dim=1), "the largest soft label"


def _tensor(path: str, option: str, usual_name: str) -> Tensor:
    if not path:
        raise UserError(f"{option} is missing; give the file, such as …/Normal/{usual_name}")
    value = files.load(path, what=f"{option} file", instead=set_in(Path(path)) or "the path of a file")
    if isinstance(value, float):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise UserError(f"{option} {path} holds a {type(value).__name__}, not a tensor; give a tensor's file")
    return value.detach()
