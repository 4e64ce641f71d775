"""`report.safetensors`: a page's pictures, and other data for it that no other file of the run's folder holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.distilled_set import DistilledSet
from distill.report.frames import Frames, positions
from distill.report.pixels import clip_outliers, scaled_bytes
from utils.data.datasets import Dataset
from utils.files import load_tensors, reading, save_tensors
from utils.program.machine import machine

FORMAT = "datm-report-1"
SAVED = "saved"  # a kind of start (`Pictures.began`): the set of an earlier run
IMAGE_BYTES = 4_500_000  # a page's pictures; with frames, base64 and the rest the page stays below 10 MB
MOST_CLASSES = 200  # above which mean labels by class are left out
MOST_PER_CLASS = 10
OPTIONAL = ("means", "frames", "stored")  # tensors that a file may be without
NEAR = 4  # nearest real images that are compared exactly


@dataclass(frozen=True)
class Pictures:
    """Some images of a set as bytes, as networks see them, and what is shown beside them; None: too many or none."""

    classes: tuple[str, ...]
    ipc: int  # for a factor above 1, samples per class
    version: str  # which set: Normal or EMA
    which: list[int]  # positions of these images in the set
    distilled: Tensor  # [n, C, H, W] uint8
    labels: Tensor  # [n, K] probabilities
    start: Tensor  # [n, C, H, W] uint8
    start_labels: Tensor  # [n, K] probabilities
    began: str  # what the start was: "real", "noise" or SAVED
    change: Tensor  # [n, 1, H, W] uint8; 128: no change
    rms: Tensor  # [n], of the change of pixels in [0, 1]
    neighbour: Tensor  # [n, C, H, W] uint8
    frames_of: tuple[list[int], list[int]]  # iterations [F] of the frames, and positions among the stored images [m]
    machine: dict[str, str]
    experts: list[dict[str, Any]]  # the options that made them
    experts_reached: list[float]  # their accuracies
    factor: int = 1
    means: Tensor | None = None  # [K, K] the mean label of each class of the whole set, in probabilities
    frames: Tensor | None = None  # [F, m, C, h, w] uint8, see `Frames`
    stored: Tensor | None = None  # [m, C, H, W] uint8: for a factor above 1, the images that hold these samples

    @property
    def start_in_words(self) -> str:
        """What one initial image is, in words."""
        return {"noise": "noise", SAVED: "image of a saved set"}.get(self.began, "real image")

    @property
    def hard(self) -> bool:
        """Whether every label is one-hot."""
        return bool(((self.labels == 0) | (self.labels == 1)).all())

    @property
    def stored_per_class(self) -> int:
        """Stored images per class; samples per class if the stored images are not known."""
        return self.ipc if self.stored is None else self.ipc // self.factor**2

    def rows(self) -> dict[int, list[int]]:
        """Row numbers in these tensors, by class."""
        rows: dict[int, list[int]] = {}
        for row, position in enumerate(self.which):
            rows.setdefault(position // self.ipc, []).append(row)
        return rows

    def stored_of(self, rows: list[int]) -> list[Tensor]:
        """The stored images that hold the samples of these rows, each once."""
        if self.stored is None:
            return []
        holding = [position // self.factor**2 for position in self.which]
        images = dict(zip(dict.fromkeys(holding), self.stored))
        return [images[number] for number in dict.fromkeys(holding[row] for row in rows)]

    @classmethod
    def read(cls, path: Path) -> "Pictures":
        """Reads what `save_pictures` wrote.

        Raises:
            UserError: the file is damaged.
        """
        with reading(path, "put it back, or run again under another --run_name"):
            tensors, metadata = load_tensors(path)
            about = json.loads(metadata["about"])
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, expected {FORMAT}")
            classes, which = tuple(map(str, about["classes"])), [int(each) for each in about["which"]]
            machine, experts, factor = about["machine"], about["experts"], int(about.get("factor", 1))
            at, of = ([int(each) for each in part] for part in about["frames_of"])
            n, k, count = len(which), len(classes), len({position // factor**2 for position in which})
            _, c, h, w = tensors["distilled"].shape
            expected = {**dict.fromkeys(("distilled", "start", "neighbour"), (torch.uint8, (n, c, h, w))),
                        "change": (torch.uint8, (n, 1, h, w)), "rms": (torch.float32, (n,)),
                        **dict.fromkeys(("labels", "start_labels"), (torch.float32, (n, k))),
                        "means": (torch.float32, (k, k)), "stored": (torch.uint8, (count, c, h, w)),
                        "frames": (torch.uint8, (len(at), len(of), c))}  # frames are smaller
            for name, (kind, shape) in expected.items():
                tensor = tensors[name] if name not in OPTIONAL else tensors.get(name)
                if tensor is not None and (
                        tensor.dtype, tuple(tensor.shape[:3] if name == "frames" else tensor.shape)) != (kind, shape):
                    raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
            if int(about["ipc"]) < 1 or not all(0 <= each // int(about["ipc"]) < len(classes) for each in which):
                raise ValueError("positions outside the classes")
            if not isinstance(machine, dict) or not all(isinstance(each, dict) for each in experts):
                raise ValueError("the machine or the experts are not tables")
            if not all(0 <= each // int(about["ipc"]) < len(classes) for each in of):
                raise ValueError("frames of images outside the classes")
            reached = [float(each) for each in about["experts_reached"]]
            return cls(classes, int(about["ipc"]), str(about["version"]), which, began=str(about["began"]),
                       frames_of=(at, of), machine=machine, experts=experts, experts_reached=reached, factor=factor,
                       **{name: tensors.get(name) for name in expected})


def chosen(num_classes: int, ipc: int, image_bytes: int) -> list[int]:
    """Positions in a set of the images that a page shows."""
    room = max(IMAGE_BYTES // (3 * image_bytes + 3000), 1)  # three pictures per image, and its label's bars
    return positions(num_classes, ipc, min(room, MOST_PER_CLASS * num_classes))


@torch.no_grad()
def save_pictures(path: Path, dataset: Dataset, start: DistilledSet, best: DistilledSet, version: str, began: str,
                  frames: Frames, experts: list[dict[str, Any]], reached: list[float]) -> None:
    """Writes `report.safetensors`: what a page shows of a set that no other file of the run's folder holds.

    Args:
        version: the name of the best set.
        began: what the initial images were: see `Pictures`.
        frames: the set over the run.
        experts: the options that made the experts.
        reached: the experts' accuracies.
    """
    factor, images = best.factor, best.images
    start, best = start.seen(), best.seen()
    ipc = len(best) // dataset.num_classes
    which = chosen(dataset.num_classes, ipc, best.images[0].numel())
    # Clipped by the standard deviation of the whole set, as published pictures are, then each scaled to its own range.
    unclipped = dataset.space.to_pixels(best.images)
    pixels = clip_outliers(unclipped)[which]
    first = dataset.space.to_pixels(start.images[which])
    changes = unclipped[which] - first  # before clipping, as that is not learned
    change = changes.mean(1, keepdim=True)
    most = change.abs().max().clamp(min=1e-8)
    tensors = {"distilled": scaled_bytes(pixels), "start": scaled_bytes(first),
               "change": (128 + 127 * change / most).byte(),
               "neighbour": scaled_bytes(_neighbours(dataset, pixels, [each // ipc for each in which])),
               "rms": changes.square().mean((1, 2, 3)).sqrt(),
               "labels": probabilities(best.labels[which], dataset.num_classes),
               "start_labels": probabilities(start.labels[which], dataset.num_classes)}
    if dataset.num_classes <= MOST_CLASSES:  # the labels are grouped by class
        every = probabilities(best.labels, dataset.num_classes)
        tensors["means"] = every.unflatten(0, (dataset.num_classes, -1)).mean(1)
    if factor > 1:
        holding = sorted({position // factor**2 for position in which})
        tensors["stored"] = scaled_bytes(clip_outliers(dataset.space.to_pixels(images))[holding])
    if frames.images:
        tensors["frames"] = torch.stack(frames.images)
    about = {"format": FORMAT, "classes": dataset.classes, "ipc": ipc, "which": which, "version": version,
             "began": began, "experts": experts,
             "experts_reached": reached, "frames_of": [frames.iterations, frames.which],
             "machine": machine(best.images.device), **({"factor": factor} if factor > 1 else {})}
    save_tensors(path, tensors, {"about": json.dumps(about)})


def _neighbours(dataset: Dataset, pixels: Tensor, classes: list[int]) -> Tensor:
    """The training image of the same class that is nearest in pixel space, for each image [n, C, H, W]."""
    space, labels = dataset.space, torch.tensor(classes, device=pixels.device)
    if dataset.train_energy is not None:  # they are whitened
        # For pixels x, whitened a, and M the un-whitening, ‖x − p‖² = ‖x − μ‖² − 2 a·M(p − μ) + ‖p − μ‖². This avoids
        # un-whitening all images, which would take as long as whitening the dataset: minutes in many dimensions.
        towards = space.whitening.pulled_back(pixels)

        def distances(rows: Tensor, members: Tensor) -> Tensor:
            return dataset.train_energy[members] - 2 * towards[rows] @ dataset.train_images[members].flatten(1).T
    else:
        def distances(rows: Tensor, members: Tensor) -> Tensor:
            real = dataset.space.to_pixels(dataset.train_images[members])
            return torch.cdist(pixels[rows].flatten(1), real.flatten(1))

    near = torch.empty(len(pixels), NEAR, dtype=torch.long, device=pixels.device)
    for number in sorted(set(classes)):
        rows, members = (labels == number).nonzero().flatten(), dataset.class_indices(number)
        few = members[distances(rows, members).topk(min(NEAR, len(members)), largest=False).indices]  # [rows, ≤ NEAR]
        near[rows] = few[:, torch.arange(NEAR, device=few.device).clamp(max=few.shape[1] - 1)]
    # Rounding errors may swap the nearest few, so these are compared as pictures.
    real = dataset.space.to_pixels(dataset.train_images[near.flatten()]).view(len(pixels), NEAR, *pixels.shape[1:])
    best = (real - pixels[:, None]).square().sum((2, 3, 4)).argmin(1)
    return real[torch.arange(len(pixels), device=pixels.device), best]


def probabilities(labels: Tensor, num_classes: int) -> Tensor:
    if labels.is_floating_point():
        return labels.float().softmax(1)
    return torch.nn.functional.one_hot(labels, num_classes).float()
