"""Train a fresh network on a set, test it on real images; several times, mean and standard deviation."""

import contextlib
import copy
import dataclasses
import glob
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.distilled_set import DistilledSet, checked_set, class_indices, read_set
from utils import augment, parallel
from utils.config import BaselineConfig, EvaluationConfig, TrainConfig, influential
from utils.datasets import Dataset, check_dataset_name
from utils.engine import GRADIENT_ALONE, describe_engine, seconds_uncompiled
from utils.errors import UserError
from utils.files import check_writable, read_config, write_json
from utils.metrics import accuracy, percent
from utils.networks import check_network_name, evaluation_pool
from utils.parallel import in_processes
from utils.parameters import FlatModel
from utils.program.console import announce, say, shown
from utils.program.machine import environment
from utils.program.prepare import (
    Drawer,
    begin,
    drawer,
    dsa_groups,
    flat_model,
    network_for,
)
from utils.program.seeds import generator, seeded
from utils.progress import Progress

# The published evaluation's optimiser.
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

# Processes win at steps too short to keep all threads busy, and take a few seconds to start (on two cores they won 40 %
# at 5 ms a step, 18 % at 24 ms and 7 % at 98 ms).
SHORT_STEP = 0.03  # seconds
PROCESSES_PAY = 60.0  # seconds of training
MOST_PROCESSES = 8  # at once, each of which imports torch


class Score(NamedTuple):
    """Test accuracies in [0, 1] of the networks of one kind, each trained from its own initialisation."""

    network: str
    accuracies: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """The population's standard deviation (numpy's default), as published tables use."""
        return float(np.std(self.accuracies))

    def as_dict(self) -> dict[str, Any]:
        return {"network": self.network, "mean": self.mean, "std": self.std, "accuracies": self.accuracies}

    def __str__(self) -> str:
        return f"{self.network}: {percent(self.mean, self.std)} % over {len(self.accuracies)}"


def learning_rate(lr: float, epoch: int, epochs: int) -> float:
    """The rate of one epoch: a tenth after epoch `epochs // 2 + 1`."""
    return lr if epoch <= epochs // 2 + 1 else lr * 0.1


def train_network(model: FlatModel, theta: Tensor, images: Tensor, labels: Tensor, lr: float, *, epochs: int,
                  batch_size: int, draw: Drawer, random: torch.Generator,
                  on_epoch: Callable[[], None] = lambda: None) -> Tensor:
    """Trains as the published evaluation does, and returns the θ [P] it ends at.

    SGD with momentum and weight decay, epochs 0..`epochs` inclusive; when the rate drops the optimiser is made
    anew, so its momentum is forgotten. Every batch is augmented.

    Args:
        theta: where it starts.
        images, labels: X [N, C, H, W]; label logits [N, K] or classes [N].
        draw: the augmentation of each batch.
        random: draws the order of the samples and the augmentation.
    """
    model.network.train()
    theta = theta.clone()
    rate = None
    for epoch in range(epochs + 1):
        if rate != learning_rate(lr, epoch, epochs):
            rate = learning_rate(lr, epoch, epochs)
            optimiser = torch.optim.SGD([theta], rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        order = torch.randperm(len(images), generator=random).to(images.device)
        for batch in order.split(batch_size):
            drawn = draw(len(batch), random)
            x = augment.apply(images[batch], drawn and drawn.to(images.device))
            _, _, theta.grad = model.gradient(theta, x, labels[batch])
            optimiser.step()
        on_epoch()
    return theta


def evaluate(config: TrainConfig, dataset: Dataset, distilled: DistilledSet | Sequence[DistilledSet],
             *address: int | str, augmented: bool = True, on_epoch: Callable[[], None] = lambda: None,
             known: "Known | None" = None, networks: Sequence[str] | None = None) -> list[Score]:
    """Trains `num_eval` networks of each kind in the pool of `eval_mode` and tests each after its last epoch.

    Several ranks share them. Else several are trained at once where that wins: on a CPU small ones in processes that
    divide its threads, which changes rounding. Every network has its own random numbers, so where it is trained does
    not matter.

    Args:
        dataset, distilled: on one device; the images of both in the same space. Of several sets, all of one size,
            network n is trained on set n, and again from the first when there are no more.
        address: tells this evaluation's random numbers from those of others with the same seed.
        augmented: False trains on the images as they are.
        on_epoch: called after each epoch of each network.
        known: accuracies found before, and where to put those found now.
        networks: these kinds, in the place of the pool.
    """
    known = Known() if known is None else known
    jobs = [Job(name, number) for name in networks or evaluation_pool(config.eval_mode, config.model)
            for number in range(config.num_eval)]
    test = dataclasses.replace(dataset, train_images=dataset.train_images[:0].clone(),
                               train_labels=dataset.train_labels[:0].clone(), whitening=None)
    sets = (distilled,) if isinstance(distilled, DistilledSet) else tuple(distilled)
    work = _work(config, sets[0])
    train = Training(config, test, sets, address, augmented, work)
    at_once = min(len(jobs), torch.get_num_threads(), MOST_PROCESSES)
    alone = jobs
    if parallel.size() > 1:
        found = {}
        for job in parallel.deal(known.missing(jobs)):
            found[job] = train(job, on_epoch)
            known.add(job, found[job])
        known.learn(parallel.gather(found))
    elif sets[0].images.device.type == "cpu" and at_once > 1 and _processes_pay(train, jobs):
        # What is left when no full round remains has all threads to itself.
        full_rounds = len(jobs) - len(jobs) % at_once
        # With a share of the threads and of the work, an engine is chosen as with all of both.
        shared = dataclasses.replace(train, sets=tuple(each.detach() for each in sets), work=work / at_once)
        in_processes(shared, known.missing(jobs[:full_rounds]), at_once, on_epoch, known.add)
        alone = jobs[full_rounds:]
    for job in known.missing(alone):
        known.add(job, train(job, on_epoch))
    return [Score(name, [known[Job(name, number)] for number in range(config.num_eval)])
            for name in dict.fromkeys(job.network for job in jobs)]


def _work(config: TrainConfig, distilled: DistilledSet) -> float:
    """What one network takes, as engines count it."""
    return GRADIENT_ALONE * len(distilled) * (config.epoch_eval_train + 1)


def epochs_to_come(config: TrainConfig, known: "Known") -> int:
    """How many epochs `evaluate` has yet to train here, of all networks; of several ranks, this one."""
    networks = len(evaluation_pool(config.eval_mode, config.model)) * config.num_eval - len(known)
    return len(parallel.deal(range(networks))) * (config.epoch_eval_train + 1)


class Job(NamedTuple):
    """One network of an evaluation."""

    network: str
    number: int


class Known:
    """The accuracies of an evaluation's networks, as they are found.

    Args:
        path: a JSON file that holds them, and the seconds that they took, until they are all found, so that an
            evaluation that was stopped goes on.
        key: what they depend on; those found for another key do not count.
    """

    def __init__(self, path: Path | None = None, key: str = ""):
        self._path, self._key, self._prefix = path, key, ""
        self._accuracies: dict[str, float] = {}
        self._seconds_before, self._began = 0.0, perf_counter()
        for each in self._files():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # whatever it is, it can be found again
                saved = json.loads(each.read_text())
                if saved["key"] == key:
                    self._accuracies |= saved["accuracies"]
                    self._seconds_before = max(self._seconds_before, float(saved["seconds"]))
                else:
                    print(f"note: {shown(each)} is of other options, another set or machine; starting over",
                          file=sys.stderr)

    def part(self, prefix: str) -> "Known":
        """Of several evaluations in one file, one."""
        found = copy.copy(self)  # which shares the accuracies
        found._prefix = prefix
        return found

    @property
    def seconds(self) -> float:
        """How long it took to find them."""
        return self._seconds_before + perf_counter() - self._began

    def __len__(self) -> int:
        return len(self._accuracies)

    def __getitem__(self, job: Job) -> float:
        return self._accuracies[self._name(job)]

    def so_far(self) -> list[str]:
        """The mean accuracy of the network that was tested last, in words; nothing before the first."""
        if not self._accuracies:
            return []
        kinds = [name.rsplit("/", 1)[0] for name in self._accuracies]
        found = [accuracy for kind, accuracy in zip(kinds, self._accuracies.values()) if kind == kinds[-1]]
        word = "accuracy" if len(set(kinds)) == 1 else kinds[-1]
        return [f"{word} {100 * float(np.mean(found)):.1f} %"]

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if self._name(job) not in self._accuracies]

    def add(self, job: Job, accuracy: float) -> None:
        self._accuracies[self._name(job)] = accuracy
        if self._path is not None:
            path = self._path if parallel.first() else f"{self._path}.{parallel.rank()}"
            write_json(path, {"key": self._key, "seconds": self.seconds, "accuracies": self._accuracies})

    def learn(self, found: dict[Job, float]) -> None:
        """Those of other ranks, who have written them. Nothing is written: the first rank may remove the files now."""
        self._accuracies |= {self._name(job): accuracy for job, accuracy in found.items()}

    def forget(self) -> None:
        """Removes the files, once what was found is kept elsewhere."""
        for path in self._files() if parallel.first() else ():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """The file, and those of other ranks."""
        return [] if self._path is None else sorted(self._path.parent.glob(f"{glob.escape(self._path.name)}*"))

    def _name(self, job: Job) -> str:
        return f"{self._prefix}{job.network}/{job.number}"


@dataclasses.dataclass(frozen=True)
class Training:
    """What all networks of an evaluation are trained and tested on; called with a job, one network's accuracy."""

    config: TrainConfig
    dataset: Dataset  # its test images
    sets: tuple[DistilledSet, ...]  # of one size; network n is trained on number n, and again from the first
    address: tuple[int | str, ...]
    augmented: bool
    work: float  # of one network, as engines count it

    def __call__(self, job: Job, on_epoch: Callable[[], None]) -> float:
        config, dataset = self.config, self.dataset
        distilled = self.sets[job.number % len(self.sets)]
        address = config.seed, "evaluation", *self.address, *job
        model = flat_model(config, self.network(job).to(distilled.images.device), self.work)
        older = augment.older_operations(dataset.name, job.network)
        draw = drawer(config, dataset, older) if self.augmented else lambda batch, random: None
        theta = train_network(model, model.flatten(), distilled.images, distilled.labels, float(distilled.lr),
                              epochs=config.epoch_eval_train, batch_size=config.batch_train, draw=draw,
                              random=generator(*address, "order"), on_epoch=on_epoch)
        model.network.eval()
        return accuracy(partial(model, theta), dataset.test_images, dataset.test_labels)

    def network(self, job: Job) -> nn.Module:
        """As it is before its training."""
        with seeded(self.config.seed, "evaluation", *self.address, *job):
            return network_for(job.network, self.dataset)


def _processes_pay(train: Training, jobs: Sequence[Job]) -> bool:
    """Whether these networks are small enough, and train for long enough, to be trained in processes of their own."""
    networks = [train.network(Job(name, 0)) for name in dict.fromkeys(job.network for job in jobs)]
    step = GRADIENT_ALONE * min(train.config.batch_train, len(train.sets[0]))
    seconds = sum(seconds_uncompiled(network, train.work) for network in networks) * train.config.num_eval
    return max(seconds_uncompiled(network, step) for network in networks) < SHORT_STEP and seconds > PROCESSES_PAY


def check_evaluation(config: TrainConfig) -> None:
    """Refuses what cannot be evaluated whatever the data; asks nothing of them, so it comes first.

    Raises:
        UserError: an unknown dataset, network, mode or augmentation.
    """
    check_dataset_name(config.dataset)
    check_network_name(config.model)
    dsa_groups(config)
    evaluation_pool(config.eval_mode, config.model)


def check_pool(config: TrainConfig, dataset: Dataset) -> None:
    """Builds each network that will be evaluated once, so that what cannot be is refused at the start.

    Raises:
        UserError: a network that cannot read these images.
    """
    for name in evaluation_pool(config.eval_mode, config.model):
        network_for(name, dataset)


def evaluate_and_report(config: EvaluationConfig | BaselineConfig, dataset: Dataset, sets: Sequence[DistilledSet],
                        what: str, *notes: str) -> None:
    """Evaluates with a progress bar, prints the scores and writes them to `--json`.

    Args:
        sets: one, or several of one size, as `evaluate` takes them.
        notes: what else there is to say of the set at the beginning.
    """
    if config.json:
        check_writable(config.json)
    first = sets[0]
    device = first.images.device
    names = evaluation_pool(config.eval_mode, config.model)
    networks = len(names) * config.num_eval
    announce_evaluation(config, dataset, first, names, f"{what}: {len(first)} images, learning rate "
                        f"{float(first.lr):.4g}, {config.epoch_eval_train} epochs", *notes)
    beside = Path(f"{config.json}.unfinished") if config.json else None
    known = parallel.from_first(lambda: Known(beside, known_key(config, dataset, *sets)))
    if len(known):
        say(config, f"going on with an evaluation that was stopped: {len(known)} of {networks} networks were tested")
    before = len(known) * (config.epoch_eval_train + 1)
    with Progress(before + epochs_to_come(config, known), "evaluate", initial=before, quiet=config.quiet,
                  images=len(first), device=device) as bar:
        def show() -> None:
            bar.show(f"{len(known)} of {networks} networks", *known.so_far())

        def after_epoch() -> None:
            show()
            bar.update()

        show()
        # The same networks and the same order of samples for every set, so that sets are compared like with like.
        scores = evaluate(config, dataset, sets, augmented=not config.no_aug, on_epoch=after_epoch, known=known)
        show()
    for score in scores:
        print(score)
    if config.json and parallel.first():
        write_json(config.json, {
            "what": what, "images": len(first), "lr": float(first.lr), "scores": [score.as_dict() for score in scores],
            "tested_on": "validation" if config.val_fraction else "test", "seconds": known.seconds,
            "config": influential(config), "environment": environment(device)})
        known.forget()
        say(config, f"in {shown(config.json)}")


def _engine_in_words(config: TrainConfig, dataset: Dataset, distilled: DistilledSet, name: str) -> str:
    """The one that networks of that name get; made for this alone, which costs next to nothing."""
    model = flat_model(config, network_for(name, dataset).to(distilled.images.device), _work(config, distilled))
    return describe_engine(model.engine, min(config.batch_train, len(distilled)))


def announce_evaluation(config: TrainConfig, dataset: Dataset, distilled: DistilledSet, networks: Sequence[str],
                        what: str, *notes: str) -> None:
    """Says what is evaluated, how and where, and the options that differ from the defaults."""
    announce(config, distilled.images.device, _engine_in_words(config, dataset, distilled, networks[0]),
             f"{what} · {config.num_eval} × {' and '.join(networks)}", *notes)


def known_key(config: TrainConfig, dataset: Dataset, *sets: DistilledSet) -> str:
    """The same for the same options, dataset and sets, on the same kind of machine."""
    here = environment(sets[0].images.device)
    key = hashlib.sha256(json.dumps([influential(config), config.backend, here["torch"], here["device"],
                                     dataset.fingerprint, *map(digest, sets)]).encode())
    return key.hexdigest()


def digest(distilled: DistilledSet) -> str:
    """The same for the same set, to the bit."""
    found = hashlib.sha256()
    for tensor in (distilled.images, distilled.labels, distilled.lr):
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def evaluate_files(config: EvaluationConfig) -> None:
    """The whole of `distill/evaluation.py`: saved tensors in, accuracies printed and written as JSON.

    Raises:
        UserError: files or options that do not fit the dataset.
    """
    check_evaluation(config)
    dataset, distilled = prepared(config, read_set(config.data_dir, config.label_dir, config.lr_dir, config.lr_teacher))
    what, notes = "distilled images", []
    if config.hard_labels:
        distilled, note = with_classes(distilled, dataset)
        what, notes = f"{what} with hard labels", [note]
    evaluate_and_report(config, dataset, [distilled], what, *notes)


def prepared(config: EvaluationConfig, opened: DistilledSet) -> tuple[Dataset, DistilledSet]:
    """The dataset and, of the same kind, the set, both on the device; the set is saved whole where `save` says so.

    Args:
        opened: the set as it was saved.

    Raises:
        UserError: files or options that do not fit.
    """
    device, dataset = begin(config)
    _note_other_space(config, opened)
    distilled = checked_set(opened, dataset).to(device)
    check_pool(config, dataset)
    if config.save and parallel.first():
        if config.json:
            check_writable(config.json)  # a refusal comes before anything is written
        distilled.save_whole(Path(config.save), dataset, influential(config))
    return dataset, distilled


def with_classes(distilled: DistilledSet, dataset: Dataset) -> tuple[DistilledSet, str]:
    """The set with the images' classes in the place of soft labels, and by what they are known, in words."""
    classes, known_by = class_indices(distilled, dataset.num_classes)
    return dataclasses.replace(distilled, labels=classes), f"the class of an image is known by {known_by}"


def _note_other_space(config: EvaluationConfig, distilled: DistilledSet) -> None:
    """Says so where the options that made the set, if they lie beside it, are not those of this evaluation."""
    beside = Path(config.data_dir).parent.parent / "config.yaml"
    made = distilled.config
    if not made and beside.is_file():
        with contextlib.suppress(UserError):  # whatever lies there need not be ours
            made = read_config(beside)
    for name in ("dataset", "zca"):
        if name in made and made[name] != getattr(config, name):
            print(f"note: the set was made with {name} {made[name]}, and is tested with {name} "
                  f"{getattr(config, name)}", file=sys.stderr)
