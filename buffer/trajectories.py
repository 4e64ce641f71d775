"""Expert files `replay_buffer_{n}.pt`: written in the published format, read memory-mapped.

A file is a list of experts; an expert is a list of snapshots; a snapshot is a list of CPU tensors in
`parameters()` order.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buffer.manifests import checksums, expert_files, is_as_written, manifest_path, require_experts
from utils import files
from utils.data.watching import Watch, unwatched
from utils.errors import UserError
from utils.files import save_config
from utils.parameters import FlatModel, flatten

Expert = list[list[Tensor]]


def count_experts(folder: Path) -> int:
    """How many experts the files of a folder hold.

    Raises:
        UserError: a file number is missing, so that the next expert's number would already exist.
    """
    paths = expert_files(folder)
    for number, path in enumerate(paths):
        if path.name != f"replay_buffer_{number}.pt":
            raise UserError(f"{folder} holds {path.name} but no replay_buffer_{number}.pt; put it back, or give "
                            "another --buffer_path")
    return sum(len(load_experts(path)) for path in paths)


def write_experts(folder: Path, experts: Sequence[Expert], options: dict[str, Any],
                  epochs: Sequence[dict[str, Any]]) -> None:
    """Writes an expert file, and before it the manifest and each epoch's loss and accuracies (`.jsonl`) beside it.

    The file's number is the first free one, as in the published code, so no file is ever overwritten.

    Args:
        options: the run's options, the dataset's fingerprint and, on a CPU, the number of threads.
        epochs: the epochs of all the experts, in order; each names its expert.

    Raises:
        UserError: a file cannot be written.
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


def load_experts(path: Path) -> list[Expert]:
    """The experts of a file, of any network, memory-mapped.

    Raises:
        UserError: the file is missing or damaged, or is not a list of experts.
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

    As views of one storage, an expert takes one record in its file instead of (E+1)·(number of tensors), so that the
    file opens many times faster. It loads as the same lists of tensors.
    """
    return [model.unflatten(theta) for theta in snapshots]


class Buffer:
    """The experts of a folder, read without loading whole files.

    Args:
        folder: holds `replay_buffer_{n}.pt` files.
        model: the network whose experts they must be.
        max_files, max_experts: maximum number of files, and of experts from each.

    Raises:
        UserError: there is no file, or one is unreadable, empty, or of another network.
    """

    def __init__(self, folder: Path, model: FlatModel, max_files: int | None = None, max_experts: int | None = None):
        require_experts(folder)
        self.folder = folder
        self.model = model
        self._paths = expert_files(folder)[:max_files]
        self._files = [_load_checked(path, model)[:max_experts] for path in self._paths]
        self._experts = [expert for experts in self._files for expert in experts]

    def verify(self, watch: Watch = unwatched) -> dict[str, str]:
        """Checks every file against its manifest's checksum or, without one, for values that are not finite.

        Returns:
            The SHA-256 of each file, by its name.

        Raises:
            UserError: a file was changed or damaged, or an expert diverged.
        """
        found = checksums(self._paths, watch)
        unknown = [each for each in zip(self._paths, self._files) if not is_as_written(each[0], found[each[0].name])]
        with watch("checking the experts", sum(len(experts) for _, experts in unknown)) as advance:
            for path, experts in unknown:
                _check_finite(path, experts, advance)
        return found

    def __len__(self) -> int:
        """The number of experts."""
        return len(self._experts)

    @property
    def epochs(self) -> int:
        """The last epoch that every expert has a snapshot of; epoch 0 is the initialisation."""
        return min(map(len, self._experts)) - 1

    def snapshot(self, number: int, epoch: int) -> Tensor:
        """θ [P], a copy: expert `number` (counted through the files in order) after `epoch` epochs (−1: the last)."""
        return flatten(self._experts[number][epoch])

    def walk_order(self, random: torch.Generator) -> list[int]:
        """Every expert once: the files in random order, the experts within each in random order."""
        files = torch.arange(len(self)).split([len(experts) for experts in self._files])
        return [expert for file in torch.randperm(len(files), generator=random).tolist()
                for expert in files[file][torch.randperm(len(files[file]), generator=random)].tolist()]


def _load_checked(path: Path, model: FlatModel) -> list[Expert]:
    """The experts of a file, which must be this network's; checks the shapes without reading the values."""
    experts = load_experts(path)
    for snapshot in itertools.chain.from_iterable(experts):
        if [getattr(tensor, "shape", None) for tensor in snapshot] != model.shapes:
            shapes = [tuple(tensor.shape) if hasattr(tensor, "shape") else "none" for tensor in snapshot]
            pairs = itertools.zip_longest(shapes, map(tuple, model.shapes), fillvalue="missing")
            number, (its, ours) = next(each for each in enumerate(pairs, 1) if each[1][0] != each[1][1])
            raise UserError(f"{path} holds experts of another network: the shape of tensor {number} is {its}, and this "
                            f"network's is {ours}; give the network and data that they were trained with, or another "
                            "folder")
        other = {str(tensor.dtype) for tensor in snapshot} - {"torch.float32"}
        if other:
            raise UserError(f"{path} holds parameters in {', '.join(sorted(other))}; float32 is needed: save them with "
                            ".float()")
    return experts


def _check_finite(path: Path, experts: list[Expert], advance: Callable[[float], object]) -> None:
    for number, expert in enumerate(experts):
        for epoch, snapshot in enumerate(expert):
            if not all(bool(tensor.isfinite().all()) for tensor in snapshot):
                raise UserError(f"expert {number} of {path} is not finite after epoch {epoch}: it diverged, or the "
                                "file is damaged; move it away, or train the experts again with a lower --lr_teacher")
        advance(1)
