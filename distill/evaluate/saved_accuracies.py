"""The accuracies of an evaluation's networks, saved to a file while it runs, so that it can resume if stopped."""

import contextlib
import copy
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from distill.distilled_set import DistilledSet
from utils.config import TrainConfig, identity
from utils.data.datasets import Dataset
from utils.errors import note
from utils.files import read_json, write_json
from utils.program import ranks
from utils.program.console import shown
from utils.program.machine import environment


class Job(NamedTuple):
    """One network of an evaluation."""

    network: str
    number: int


class Tested(NamedTuple):
    """The result of one network."""

    accuracy: float
    confusion: list[list[int]] | None = None  # as in a `Score`


class Accuracies:
    """The results of an evaluation's networks, collected as they are tested.

    Args:
        path: a JSON file that holds the results and the seconds they took until all are known, so that a stopped
            evaluation can resume; None: no file.
        key: identifies what the results depend on; saved ones with another key are ignored.
    """

    def __init__(self, path: Path | None = None, key: str = ""):
        self._path, self._key, self._prefix = path, key, ""
        self._found: dict[str, Tested] = {}
        self._seconds_before, self._began = 0.0, perf_counter()
        for file in self._files():
            with contextlib.suppress(Exception):  # whatever is wrong, the results can be computed again
                saved = read_json(file)
                if saved["key"] == key:
                    self._found |= {name: Tested(float(accuracy), saved["confusions"][name])
                                    for name, accuracy in saved["accuracies"].items()}
                    self._seconds_before = max(self._seconds_before, float(saved["seconds"]))
                else:
                    note(f"{shown(file)} is of other options, another set or machine; starting over")

    def part(self, prefix: str) -> "Accuracies":
        """One of several evaluations that share a file."""
        part = copy.copy(self)  # shares the results; its clock goes on from now (`__setstate__`)
        part._prefix = prefix
        return part

    @property
    def seconds(self) -> float:
        """How long the results took, including the time before a stop."""
        return self._seconds_before + perf_counter() - self._began

    # The first rank sends this to other machines, whose clocks differ: send the elapsed time and count on from there.
    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_seconds_before": self.seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _began=perf_counter())

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, job: Job) -> Tested:
        return self._found[self._name(job)]

    def so_far(self) -> list[str]:
        """The mean accuracy of the kind of network that was tested last, in words; empty before the first."""
        if not self._found:
            return []
        kinds = [name.rsplit("/", 1)[0] for name in self._found]
        latest = [tested.accuracy for kind, tested in zip(kinds, self._found.values()) if kind == kinds[-1]]
        word = "accuracy" if len(set(kinds)) == 1 else kinds[-1]
        return [f"{word} {100 * float(np.mean(latest)):.1f} %"]

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if self._name(job) not in self._found]

    def add(self, job: Job, tested: Tested) -> None:
        self._found[self._name(job)] = tested
        if self._path is not None:
            path = self._path if ranks.first() else f"{self._path}.{ranks.rank()}"
            write_json(path, {"key": self._key, "threads": torch.get_num_threads(), "seconds": self.seconds,
                              **{kind: {name: getattr(tested, of) for name, tested in self._found.items()}
                                 for kind, of in (("accuracies", "accuracy"), ("confusions", "confusion"))}})

    def learn(self, found: dict[Job, Tested]) -> None:
        """Adds other ranks' results. Writes nothing: they have, and the first rank may be removing the files now."""
        self._found |= {self._name(job): tested for job, tested in found.items()}

    def forget(self) -> None:
        """Removes the files, once the results are stored elsewhere."""
        for path in self._files() if ranks.first() else ():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """The file and those of other ranks, if they exist."""
        if self._path is None:
            return []
        name = re.compile(re.escape(self._path.name) + r"(\.[0-9]+)?")
        return sorted(path for path in self._path.parent.glob("*") if name.fullmatch(path.name))

    def _name(self, job: Job) -> str:
        return f"{self._prefix}{job.network}/{job.number}"


def threads_of(path: Path | None) -> int | None:
    """The thread count with which the accuracies in such a file were computed; None: there is none."""
    with contextlib.suppress(Exception):  # whatever is wrong, they can be computed again
        return int(read_json(path)["threads"]) if path else None


def key_of(configs: Sequence[TrainConfig], dataset: Dataset, *sets: DistilledSet) -> str:
    """A hash of the options, the dataset, the sets, torch's version and the device."""
    here = environment(sets[0].images.device)
    key = hashlib.sha256(json.dumps([*map(identity, configs), configs[0].backend, here["torch"], here["device"],
                                     dataset.fingerprint, *map(digest, sets)]).encode())
    return key.hexdigest()


def digest(distilled: DistilledSet) -> str:
    """A hash that is equal for bit-identical sets."""
    content = hashlib.sha256()
    for tensor in distilled.tensors().values():
        content.update(tensor.cpu().contiguous().numpy())
    return content.hexdigest()
