"""The accuracies of an evaluation's networks while it runs, in a file, so that one that was stopped goes on."""

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
from utils.files import read_json, write_json
from utils.program import ranks
from utils.program.console import note, shown
from utils.program.machine import environment


class Job(NamedTuple):
    """One network of an evaluation."""

    network: str
    number: int


class Tested(NamedTuple):
    """What one network reached."""

    accuracy: float
    confusion: list[list[int]] | None = None  # as that of a `Score`


class Accuracies:
    """What an evaluation's networks reached, as it is found.

    Args:
        path: a JSON file that holds them, and the seconds that they took, until they are all found, so that an
            evaluation that was stopped goes on.
        key: what they depend on; those found for another key do not count.
    """

    def __init__(self, path: Path | None = None, key: str = ""):
        self._path, self._key, self._prefix = path, key, ""
        self._found: dict[str, Tested] = {}
        self._seconds_before, self._began = 0.0, perf_counter()
        for file in self._files():
            with contextlib.suppress(Exception):  # whatever it is, it can be found again
                saved = read_json(file)
                if saved["key"] == key:
                    counts = saved.get("confusions", {})  # which those of an earlier version do not hold
                    self._found |= {name: Tested(float(accuracy), counts.get(name))
                                    for name, accuracy in saved["accuracies"].items()}
                    self._seconds_before = max(self._seconds_before, float(saved["seconds"]))
                else:
                    note(f"note: {shown(file)} is of other options, another set or machine; starting over")

    def part(self, prefix: str) -> "Accuracies":
        """Of several evaluations in one file, one."""
        part = copy.copy(self)  # which shares what is found
        part._prefix = prefix
        return part

    @property
    def seconds(self) -> float:
        """How long it took to find them."""
        return self._seconds_before + perf_counter() - self._began

    # A clock means nothing on another machine, to which the first rank sends this: what has passed goes, and counts on.
    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_seconds_before": self.seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _began=perf_counter())

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, job: Job) -> Tested:
        return self._found[self._name(job)]

    def so_far(self) -> list[str]:
        """The mean accuracy of the network that was tested last, in words; nothing before the first."""
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
        """Those of other ranks, who have written them. Nothing is written: the first rank may remove the files now."""
        self._found |= {self._name(job): tested for job, tested in found.items()}

    def forget(self) -> None:
        """Removes the files, once what was found is kept elsewhere."""
        for path in self._files() if ranks.first() else ():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """The file, and those of other ranks."""
        if self._path is None:
            return []
        name = re.compile(re.escape(self._path.name) + r"(\.[0-9]+)?")
        return sorted(path for path in self._path.parent.glob("*") if name.fullmatch(path.name))

    def _name(self, job: Job) -> str:
        return f"{self._prefix}{job.network}/{job.number}"


def threads_of(path: Path | None) -> int | None:
    """With how many threads the accuracies in such a file were found, where there is one."""
    with contextlib.suppress(Exception):  # whatever it is, they can be found again
        return int(read_json(path).get("threads", torch.get_num_threads())) if path else None


def key_of(configs: Sequence[TrainConfig], dataset: Dataset, *sets: DistilledSet) -> str:
    """The same for the same options, dataset and sets, on the same kind of machine."""
    here = environment(sets[0].images.device)
    key = hashlib.sha256(json.dumps([*map(identity, configs), configs[0].backend, here["torch"], here["device"],
                                     dataset.fingerprint, *map(digest, sets)]).encode())
    return key.hexdigest()


def digest(distilled: DistilledSet) -> str:
    """The same for the same set, to the bit."""
    content = hashlib.sha256()
    for tensor in distilled.tensors().values():
        content.update(tensor.cpu().numpy().tobytes())
    return content.hexdigest()
