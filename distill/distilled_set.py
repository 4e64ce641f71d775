"""A distilled set and its files: `images_{tag}.pt`, `labels_{tag}.pt`, `lr_{tag}.pt`, as published."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils import files
from utils.datasets import Dataset
from utils.errors import UserError


@dataclass(frozen=True)
class DistilledSet:
    """Images [N, C, H, W] in the space that networks are trained in, label logits [N, K] (or classes [N]), and α."""

    images: Tensor
    labels: Tensor
    lr: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def detach(self) -> "DistilledSet":
        """A copy that later updates of this set do not touch."""
        return DistilledSet(*(tensor.detach().clone() for tensor in (self.images, self.labels, self.lr)))

    def to(self, device: torch.device | str) -> "DistilledSet":
        return DistilledSet(self.images.to(device), self.labels.to(device), self.lr.to(device))

    def save(self, folder: Path, tag: str | int, dataset: Dataset) -> None:
        """Writes the published files, on the CPU, and `images_zca_{tag}.pt` (un-whitened) for a whitened dataset."""
        images = self.images.detach().cpu().clone()
        files.save(images, folder / f"images_{tag}.pt")
        files.save(self.labels.detach().cpu().clone(), folder / f"labels_{tag}.pt")
        files.save(self.lr.detach().cpu().clone(), folder / f"lr_{tag}.pt")
        if dataset.whitening is not None:
            files.save(dataset.to_pixels(self.images.detach()).cpu(), folder / f"images_zca_{tag}.pt")


def load_set(data_dir: str, label_dir: str, lr_dir: str, dataset: Dataset, default_lr: float) -> DistilledSet:
    """Reads saved tensors and checks them against the dataset they are to be tested on.

    Args:
        data_dir, label_dir, lr_dir: the three *files* (published names); an empty lr_dir means `default_lr`.

    Raises:
        UserError: a missing or unreadable file, or tensors that do not fit each other or the dataset.
    """
    images = _tensor(data_dir, "--data_dir")
    labels = _tensor(label_dir, "--label_dir")
    lr = _tensor(lr_dir, "--lr_dir") if lr_dir else torch.tensor(default_lr)
    expected = (dataset.channels, *dataset.image_size)
    if not images.is_floating_point() or tuple(images.shape[1:]) != expected or not len(images):
        raise UserError(f"--data_dir {data_dir} holds {images.dtype} {list(images.shape)}; {dataset.name} needs "
                        f"floating-point images [N, {', '.join(map(str, expected))}], N at least 1")
    soft = labels.is_floating_point() and tuple(labels.shape) == (len(images), dataset.num_classes)
    hard = labels.dtype == torch.int64 and tuple(labels.shape) == (len(images),)
    if not soft and not hard:
        raise UserError(f"--label_dir {label_dir} holds {labels.dtype} {list(labels.shape)}; these {len(images)} "
                        f"images of {dataset.name} need label logits [{len(images)}, {dataset.num_classes}] or int64 "
                        f"classes [{len(images)}]")
    if hard and not ((labels >= 0) & (labels < dataset.num_classes)).all():
        raise UserError(f"--label_dir {label_dir} names classes outside 0 … {dataset.num_classes - 1}")
    if lr.numel() != 1 or not torch.isfinite(lr).all() or lr.item() <= 0:
        raise UserError(f"--lr_dir {lr_dir} holds {lr.tolist() if lr.numel() < 5 else list(lr.shape)}; it must be one "
                        "positive learning rate")
    if not torch.isfinite(images).all() or (soft and not torch.isfinite(labels).all()):
        raise UserError(f"{data_dir} or {label_dir} holds values that are not finite; that set cannot be evaluated")
    return DistilledSet(images.float(), labels.float() if soft else labels, lr.float().reshape(()))


def _tensor(path: str, option: str) -> Tensor:
    if not path:
        raise UserError(f"{option} is missing; give the file, such as …/Normal/images_best.pt")
    value = files.load(path, what=f"{option} file")
    if isinstance(value, float):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise UserError(f"{option} {path} holds a {type(value).__name__}, not a tensor; give a tensor's file")
    return value.detach()
