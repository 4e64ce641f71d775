"""Distilled sets as other projects release them, and ours, recognised by the files' names and contents.

    DC, DSA, DM         res_[METHOD_]DATASET_MODEL_Nipc.pt, {"data": [[images, classes], …]}: one set for each of
                        their experiments; the first is taken
    MTT, FTD, TESLA     a folder of images_TAG.pt and labels_TAG.pt, where TAG is `best` or an iteration; FTD's
                        averaged images are ema_images_TAG.pt with ema_labels_TAG.pt. Labels are classes, TESLA's soft
                        ones probabilities. The learned rate is not saved. If the images are whitened there are
                        pictures of some, images_zca_TAG.pt; never of `best`, and of 50 or more images per class only
                        if they were asked for
    DATM, PAD           the same with lr_TAG.pt and label logits, in a folder or in its Normal/
    NCFM, IDC           data_TAG.pt, [images, classes]: pixels in [0, 1], normalised in use and never whitened; smaller
                        images that share one image have one class

All but the last hold images as networks see them: normalised or whitened. (As the code of each project saves them:
VICO-UoE/DatasetCondensation, GeorgeCazenavette/mtt-distillation, AngusDujw/FTD-distillation, justincui03/tesla,
NUS-HPC-AI-Lab/DATM and PAD, gszfwsb/NCFM.)
"""

import contextlib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.distilled_set import DistilledSet, are_probabilities, recorded_options
from distill.evaluate.option_checks import IMAGES, check_given
from distill.result_files import NORMAL
from distill.set_files import WHOLE, SetFiles, set_files, sets_in
from utils import files
from utils.data.datasets import Dataset
from utils.data.names import check_dataset_name
from utils.errors import UserError, note, some_of
from utils.networks import check_network_name

PIXELS = {"mean": (0.0,), "std": (1.0,)}  # identity normalisation: the images are pixels
_OF_DC = re.compile(r"res_(?:(DC|DSA|DM)_)?([A-Za-z0-9]+)_(\w+)_\d+ipc\.pt")


def read_set(data_dir: str, label_dir: str, lr_dir: str, default_lr: float, factor: int) -> tuple[DistilledSet, bool]:
    """Reads a saved set.

    Args:
        data_dir: a run's folder or a `distilled.safetensors`, or what another project released (see above). If it is a
            file of images alone, `label_dir` and `lr_dir` are the *files* of the labels and of the learning rate.
        default_lr: used if there is no file of the learning rate.
        factor: how many smaller images an image of NCFM or IDC holds along each side.

    Returns:
        The set, and whether its learning rate is known: from its files, or as DC, DSA and DM always use 0.01.

    Raises:
        UserError: a missing or unreadable file.
    """
    if found := _files_of(data_dir):
        _check_alone(data_dir, "images and labels", label_dir=label_dir)
        if found.lr or found.images.endswith(".safetensors"):
            _check_alone(data_dir, "images, labels and learning rate", lr_dir=lr_dir)
        data_dir, label_dir, lr_dir = found.images, found.labels, found.lr or lr_dir
    elif Path(data_dir).is_dir():
        if inside := sets_in(Path(data_dir)):
            raise UserError(f"--data_dir {data_dir} is not the folder of one run; give {'one of ' * (len(inside) > 1)}"
                            f"{some_of([str(path) for path in inside])}")
        if sets := sorted(path.name for path in Path(data_dir).glob("*.safetensors")):
            raise UserError(f"--data_dir {data_dir} is a folder of sets; give one of them: {', '.join(sets)}")
        raise UserError(f"--data_dir {data_dir} is a folder without a set ({NORMAL}/{WHOLE}, images_best.pt with "
                        "labels_best.pt, data_best.pt, or one res_….pt); give a folder that has one, or a set's file")
    if data_dir.endswith(".safetensors"):
        _check_alone(data_dir, "images, labels and learning rate", label_dir=label_dir, lr_dir=lr_dir)
        return DistilledSet.load(data_dir), True
    if named := re.fullmatch(r"((?:ema_)?images)_zca(_\w+\.pt)", Path(data_dir).name):
        raise UserError(f"--data_dir {data_dir} holds un-whitened pictures, and not what networks see; give "
                        f"{named[1]}{named[2]}")
    images, about, of_dc = _read(data_dir, "--data_dir", IMAGES), {}, False
    if isinstance(images, list) and images and isinstance(images[0], list):
        raise UserError(f"--data_dir {data_dir} is not a set, but perhaps a file of experts (see "
                        "scripts/inspect_buffer.py); give a set that distill/DATM.py made from them")
    if isinstance(images, dict) and "data" in images:
        (images, labels), about, of_dc = _condensed(images["data"], data_dir), {"config": {"zca": False}}, True
    elif isinstance(images, list | tuple) and len(images) == 2:
        (images, labels), about = images, {"config": {"zca": False}, **PIXELS}
        if isinstance(labels, Tensor) and labels.dim() == 1:
            labels = labels.repeat_interleave(factor**2)
    else:
        images = _tensor(images, "--data_dir", data_dir)
        check_given(label_dir, "--label_dir", "the labels' file, such as labels_best.pt beside the images")
        labels = _read(label_dir, "--label_dir", "labels_best.pt")
    if about:
        _check_alone(data_dir, "images and labels", label_dir=label_dir)
        label_dir = data_dir
    of_labels = "--data_dir" if label_dir == data_dir else "--label_dir"
    lr = _read(lr_dir, "--lr_dir", "lr_best.pt") if lr_dir else default_lr
    distilled = DistilledSet(_tensor(images, "--data_dir", data_dir), _tensor(labels, of_labels, label_dir),
                             _tensor(lr, "--lr_dir", lr_dir), **about)
    return distilled, bool(lr_dir) or of_dc


def are_pixels(distilled: DistilledSet) -> bool:
    return {"mean": distilled.mean, "std": distilled.std} == PIXELS


def in_space(distilled: DistilledSet, dataset: Dataset) -> DistilledSet:
    """The set as networks see it on a dataset, against which it must have been checked: pixels are converted."""
    if not are_pixels(distilled):
        return distilled
    low, high = distilled.images.aminmax()
    if low < -0.5 or high > 1.5:
        note(f"the set's images are taken for pixels in [0, 1], as those of NCFM are, and lie in [{low:.3g}, "
             f"{high:.3g}]")
    return replace(distilled, images=dataset.space.from_pixels(distilled.images), mean=(), std=())


def made_with(data_dir: str) -> dict[str, Any]:
    """The options that made the set of `--data_dir`, according to its file, its run's config.yaml, or the names and
    files that another project released; empty if unknown or unreadable (reading the set then reports it)."""
    if not data_dir:
        return {}
    with contextlib.suppress(UserError, OSError, ValueError, RuntimeError):
        found = _files_of(data_dir) or SetFiles(data_dir)
        path = Path(found.images)
        if path.suffix == ".safetensors":
            options = recorded_options(path)
            return {name: value for name, value in options.items() if name != "label_kind"}  # its labels are logits
        if of_dc := _OF_DC.fullmatch(path.name):
            method, dataset, model = of_dc.groups()
            told: dict[str, Any] = {"zca": False} | ({"method": method} if method else {})
            with contextlib.suppress(UserError):  # their names may be unknown here
                check_dataset_name(dataset)
                check_network_name(model)
                told |= {"dataset": dataset, "model": model}
            return told
        with contextlib.suppress(UserError):
            options = files.read_config(path.parent.parent / "config.yaml")
            if {"dataset", "model"} <= options.keys():  # it may be another project's file
                return options
        told = {}
        named = re.fullmatch(r"(?:ema_)?images_(?:best|\d+)\.pt", path.name)
        if named and any(path.parent.glob("images_zca_*.pt")):
            told["zca"] = True
        if found.labels and not found.lr and are_probabilities(_tensor(files.load(found.labels), "", found.labels)):
            told["label_kind"] = "probabilities"
        return told
    return {}


def _files_of(data_dir: str) -> SetFiles | None:
    """The files of the set that a folder stands for. None: `--data_dir` is something else.

    Raises:
        UserError: the folder holds several sets, none of which is marked as the best.
    """
    if found := set_files(data_dir):
        return found
    folder = Path(data_dir)
    for prefix in ("", "ema_"):
        labels = {_tag(path): path for path in folder.glob(f"{prefix}labels_*.pt")}
        if images := _best(path for path in folder.glob(f"{prefix}images_*.pt") if _tag(path) in labels):
            lr = folder / f"lr_{_tag(images)}.pt"
            return SetFiles(str(images), str(labels[_tag(images)]), str(lr) if lr.is_file() else "")
    if whole := _best(folder.glob("data_*.pt")):
        return SetFiles(str(whole))
    results = sorted(folder.glob("res_*.pt"))
    if len(results) > 1:
        raise UserError(f"--data_dir {data_dir} holds {len(results)} sets, such as {results[0].name}; give the file of "
                        "one")
    return SetFiles(str(results[0])) if results else None


def _tag(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def _best(paths: Iterable[Path]) -> Path | None:
    """Of one set's states, the one tagged `best`, or else the last iteration's."""
    tagged = [path for path in paths if _tag(path) == "best" or _tag(path).isdecimal()]
    tagged = [path for path in tagged if not re.fullmatch(r"(ema_)?images_zca_\w+", path.stem)]
    return max(tagged, key=lambda path: (_tag(path) == "best", int(_tag(path)) if _tag(path) != "best" else 0),
               default=None)


def _check_alone(data_dir: str, what: str, **others: str) -> None:
    """Refuses files that are given beside one that already holds the same."""
    if given := [option for option, path in others.items() if path]:
        raise UserError(f"--{given[0]} with --data_dir {data_dir}, which holds {what}; leave it out")


# Types that unpickling DC's files needs: their accuracies are numpy scalars, whose module has had two names.
_scalar = np.float64().__reduce__()[0]
_NUMBERS = [(_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_NUMBERS += [np.dtype, type(np.dtype(np.float64))]


def _read(path: str, option: str, usual_name: str) -> Any:
    with torch.serialization.safe_globals(_NUMBERS):
        return files.load(path, what=f"{option} file", instead=next(iter(sets_in(Path(path))), usual_name))


def _condensed(sets: Any, path: str) -> tuple[Any, Any]:
    """The images and classes of the first set in a file of DC, DSA or DM: [[images, classes], …], one pair for each
    repetition of their experiment."""
    if not isinstance(sets, list) or not sets or not all(isinstance(each, list) and len(each) == 2 for each in sets):
        raise UserError(f"--data_dir {path} is no res_*.pt of DC, DSA or DM, whose \"data\" is [[images, classes], …]; "
                        "give files of one tensor each, with --label_dir")
    if len(sets) > 1:
        note(f"{path} holds {len(sets)} sets; the first is taken")
    return sets[0]


def _tensor(value: Any, option: str, path: str) -> Tensor:
    if isinstance(value, float):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise UserError(f"{option} {path} holds no tensor ({type(value).__name__}); give a tensor's file")
    return value.detach()
