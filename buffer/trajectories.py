"""Expert files `replay_buffer_{n}.pt`: written in the published form, read memory-mapped.

A file is a list of experts; an expert is a list of snapshots; a snapshot is a list of CPU tensors in
`parameters()` order.
"""

import itertools
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import files
from utils.config import BaselineConfig, BufferConfig, DataConfig, DistillConfig, differences, influential
from utils.data.datasets import Dataset
from utils.errors import UserError
from utils.files import read_config, save_config
from utils.parameters import FlatModel, flatten
from utils.program.console import number_of

Expert = list[list[Tensor]]

_NAME = re.compile(r"replay_buffer_(\d+)\.pt")


def buffer_folder(config: BufferConfig | DistillConfig | BaselineConfig) -> Path:
    """The published folder of a network's experts on a dataset, below `buffer_path`."""
    dataset = Path(config.buffer_path) / config.dataset
    if config.dataset == "ImageNet":
        dataset = dataset / config.subset / str(config.res or 128)
    elif config.dataset in ("CIFAR10", "CIFAR100") and not config.zca:
        dataset = dataset.with_name(f"{dataset.name}_NO_ZCA")
    return dataset / config.model


def expert_files(folder: Path) -> list[Path]:
    """The expert files of a folder in the order of their numbers."""
    numbers = {path: int(match[1]) for path in folder.glob("*.pt") if (match := _NAME.fullmatch(path.name))}
    return sorted(numbers, key=numbers.__getitem__)


def count_experts(folder: Path) -> int:
    """How many experts the files of a folder hold.

    Raises:
        UserError: a file in between is missing, so that the next expert's number would be one that exists.
    """
    paths = expert_files(folder)
    for number, path in enumerate(paths):
        if path.name != f"replay_buffer_{number}.pt":
            raise UserError(f"{folder} holds {path.name} but no replay_buffer_{number}.pt; put it back, or give "
                            "another --buffer_path")
    return sum(len(load_experts(path)) for path in paths)


# Options in which experts of one folder may differ: how many there are, from which seed and for how long; and where the
# folder and the data were, as both may have been moved.
_MAY_DIFFER = ("num_experts", "save_interval", "seed", "train_epochs", "buffer_path", "data_path")
# What a manifest holds beside the options of the run.
_FACTS = ("fingerprint", "experts", "sha256")
# The options that decide which images an expert saw.
_DATA = ("dataset", "zca", "val_fraction")


def manifest_path(path: Path) -> Path:
    """Where the options, the dataset's fingerprint, the experts' accuracies and the checksum of an expert file are."""
    return path.with_suffix(".yaml")


def _manifests(folder: Path) -> dict[Path, dict[str, Any]]:
    """Those of the expert files that have one; published files have none."""
    paths = map(manifest_path, expert_files(folder))
    return {path: read_config(path) for path in paths if path.exists()}


def made_by(folder: Path) -> list[dict[str, Any]]:
    """The different options by which the experts of a folder were made, as far as manifests tell."""
    kinds = [{name: value for name, value in manifest.items() if name not in _FACTS}
             for manifest in _manifests(folder).values()]
    return [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]


def test_accuracies(folder: Path) -> list[float]:
    """Those of the experts of a folder after their last epoch, as far as manifests tell."""
    return [float(expert["test_accuracy"]) for manifest in _manifests(folder).values()
            for expert in manifest.get("experts", [])]


def hold_out(folder: Path) -> float:
    """The fraction of the training images that the experts of a folder did not see, as far as manifests tell."""
    return next((float(manifest["val_fraction"]) for manifest in _manifests(folder).values()
                 if "val_fraction" in manifest), 0.0)


def check_same_data(folder: Path, config: DataConfig) -> None:
    """Refuses experts that were trained on other data, by the options saved beside them; published ones have none.

    Raises:
        UserError: that, or experts of several kinds in the folder.
    """
    manifests = _manifests(folder)
    for path, saved in manifests.items():
        different = differences(saved, {name: getattr(config, name) for name in _DATA})
        if different:
            raise UserError(f"the experts of {path} were trained on other data: {different}; give the same options, or "
                            "another --buffer_path")
        _check_same_kind(path, saved, next(iter(manifests.values())))


def check_same_kind(folder: Path, config: BufferConfig) -> None:
    """Refuses to add experts to others that were trained in another way.

    Raises:
        UserError
    """
    for path, saved in _manifests(folder).items():
        _check_same_kind(path, saved, influential(config))


def _check_same_kind(path: Path, saved: dict[str, Any], options: dict[str, Any]) -> None:
    fixed = {name: value for name, value in options.items() if name not in _MAY_DIFFER + _FACTS}
    different = differences(saved, fixed)
    if different:
        raise UserError(f"{path.parent} holds experts of another kind ({path.name}): {different}; give the same "
                        "options, or another --buffer_path")


def check_same_images(folder: Path, dataset: Dataset) -> None:
    """As `check_same_data`, by the images themselves: two datasets of one name, such as ImageFolder, may differ.

    Raises:
        UserError
    """
    for path, saved in _manifests(folder).items():
        if saved.get("fingerprint", dataset.fingerprint) != dataset.fingerprint:
            raise UserError(f"the experts of {path} were trained on other images than those of {dataset.name} here; "
                            "give the same --data_path and options, or another --buffer_path")


def write_experts(folder: Path, experts: Sequence[Expert], options: dict[str, Any],
                  epochs: Sequence[dict[str, Any]]) -> None:
    """Writes an expert file, and beside it first its manifest and what each epoch reached (`.jsonl`).

    Its number is the first free one, as the published code counts: no file is ever overwritten.

    Args:
        options: the run's, and the dataset's fingerprint.
        epochs: of all the experts, in order; each says of which.

    Raises:
        UserError: it cannot be written.
    """
    paths = (folder / f"replay_buffer_{number}.pt" for number in itertools.count())
    path = next(path for path in paths if not path.exists())
    last = {epoch["expert"]: epoch for epoch in epochs}
    reached = [{"number": number, "train_accuracy": epoch["train_accuracy"], "test_accuracy": epoch["test_accuracy"]}
               for number, epoch in last.items()]
    with files.atomic_write(path) as aside:
        with aside.open("wb") as file:
            torch.save(list(experts), file)
        files.write_text(path.with_suffix(".jsonl"), "".join(json.dumps(epoch) + "\n" for epoch in epochs))
        save_config(manifest_path(path), options | {"experts": reached, "sha256": files.sha256(aside)})


def require_experts(folder: Path) -> None:
    """Refuses a folder without expert files, before anything expensive is done.

    Raises:
        UserError
    """
    if not expert_files(folder):
        raise UserError(f"no replay_buffer_*.pt in {folder}; train experts with buffer/buffer_FTD.py "
                        "(same --dataset, --model, --zca and --buffer_path), or give --buffer_path")


def in_words(experts: int, epochs: int) -> str:
    """Such as `4 experts of 10 epochs`."""
    return f"{number_of(experts, 'expert')} of {number_of(epochs, 'epoch')}"


def load_experts(path: Path) -> list[Expert]:
    """The experts of a file, of whatever network, memory-mapped.

    Raises:
        UserError: it is missing or damaged, or no list of experts.
    """
    experts = files.load(path, what="expert file", mmap=True)
    if not isinstance(experts, list) or not experts:
        raise UserError(f"expert file {path} is not a list of experts, or is empty; move it away and train the experts "
                        "again")
    for number, expert in enumerate(experts):
        if not isinstance(expert, list) or not expert or not all(isinstance(snapshot, list) for snapshot in expert):
            raise UserError(f"expert {number} of {path} is not a list of snapshots; train the experts again")
    return experts


def as_expert(model: FlatModel, snapshots: Tensor) -> Expert:
    """Snapshots [E+1, P] → the published nested lists, as views.

    Saved as views of one storage, an expert is one record of its file instead of (E+1)·(number of tensors),
    which makes a file open many times faster; it is the same lists of tensors to whoever loads it.
    """
    return [model.unflatten(theta) for theta in snapshots]


class Buffer:
    """The experts of a folder, read without loading whole files.

    Args:
        folder: holds `replay_buffer_{n}.pt` files.
        model: the network whose experts they must be.
        max_files, max_experts: use at most so many files, and experts of each.

    Raises:
        UserError: no file, an unreadable one, an empty one, or one of another network.
    """

    def __init__(self, folder: Path, model: FlatModel, max_files: int | None = None, max_experts: int | None = None):
        require_experts(folder)
        self.folder = folder
        self.model = model
        self._paths = expert_files(folder)[:max_files]
        self._files = [_load_checked(path, model)[:max_experts] for path in self._paths]
        self._experts = [expert for experts in self._files for expert in experts]

    def verify(self) -> dict[str, str]:
        """Reads every file, against its manifest's checksum or, without one, for values that are not finite.

        Returns:
            The SHA-256 of each file, by its name.

        Raises:
            UserError: a file was changed or damaged, or an expert diverged.
        """
        manifests = _manifests(self.folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter
            checksums = dict(zip([path.name for path in self._paths], pool.map(files.sha256, self._paths)))
        for path, experts in zip(self._paths, self._files):
            expected = manifests.get(manifest_path(path), {}).get("sha256")
            if expected is None:
                _check_finite(path, experts)
            elif checksums[path.name] != expected:
                raise UserError(f"expert file {path} is damaged: it is not the file that {manifest_path(path).name} "
                                "was written for; copy it again, or move both away and train the experts again")
        return checksums

    def __len__(self) -> int:
        """The number of experts."""
        return len(self._experts)

    @property
    def experts_per_file(self) -> list[int]:
        return [len(experts) for experts in self._files]

    @property
    def epochs(self) -> int:
        """The last epoch that every expert has a snapshot of; epoch 0 is the initialisation."""
        return min(map(len, self._experts)) - 1

    def snapshot(self, number: int, epoch: int) -> Tensor:
        """θ [P], a copy: expert `number` (counted through the files in order) after `epoch` epochs (−1: the last)."""
        return flatten(self._experts[number][epoch])

    def walk_order(self, random: torch.Generator) -> list[int]:
        """Every expert once: the files in random order, the experts within each in random order."""
        sizes = self.experts_per_file
        firsts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [firsts[file] + expert
                for file in torch.randperm(len(sizes), generator=random).tolist()
                for expert in torch.randperm(sizes[file], generator=random).tolist()]


def _load_checked(path: Path, model: FlatModel) -> list[Expert]:
    """The experts of a file, if they are this network's: shapes are known without touching the bytes."""
    experts = load_experts(path)
    for snapshot in itertools.chain.from_iterable(experts):
        if [getattr(tensor, "shape", None) for tensor in snapshot] != model.shapes:
            shapes = [tuple(getattr(tensor, "shape", ())) for tensor in snapshot]
            raise UserError(f"{path} holds experts of another network: {len(shapes)} tensors, first {shapes[:1]}, last "
                            f"{shapes[-1:]}; this one has {len(model.shapes)}, first {[tuple(model.shapes[0])]}, last "
                            f"{[tuple(model.shapes[-1])]}; give the --model, --dataset and --buffer_path that trained "
                            "them")
        other = {str(tensor.dtype) for tensor in snapshot} - {"torch.float32"}
        if other:
            raise UserError(f"{path} holds parameters in {', '.join(sorted(other))}; float32 is needed: save them with "
                            ".float()")
    return experts


def _check_finite(path: Path, experts: list[Expert]) -> None:
    for number, expert in enumerate(experts):
        for epoch, snapshot in enumerate(expert):
            if not all(bool(tensor.isfinite().all()) for tensor in snapshot):
                raise UserError(f"expert {number} of {path} is not finite after epoch {epoch}: it diverged, or the "
                                "file is damaged; move it away, or train the experts again with a lower --lr_teacher")
