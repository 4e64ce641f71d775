"""Train a fresh network on a set, test it on real images; several times, mean and standard deviation."""

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.distilled_set import DistilledSet, checked_set, read_set
from utils import augment
from utils.config import BaselineConfig, EvaluationConfig, TrainConfig
from utils.datasets import Dataset, check_dataset_name, load_configured
from utils.engine import GRADIENT_ALONE, seconds_uncompiled
from utils.errors import UserError
from utils.files import check_writable
from utils.metrics import accuracy
from utils.networks import check_network_name, evaluation_pool, network_for
from utils.parallel import in_processes
from utils.parameters import FlatModel
from utils.run import (
    Drawer,
    Progress,
    announce,
    describe,
    drawer,
    dsa_groups,
    environment,
    flat_model,
    generator,
    influential,
    read_config,
    seeded,
    start_device,
    write_json,
)

# The published evaluation's optimiser.
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

# Processes win at steps too short to keep all threads busy, and take a few seconds to start (on two cores they won 40 %
# at 5 ms a step, 18 % at 24 ms and 7 % at 98 ms).
SHORT_STEP = 0.03  # seconds
PROCESSES_PAY = 60.0  # seconds of training


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
        return f"{self.network}: {100 * self.mean:.2f} ± {100 * self.std:.2f} % over {len(self.accuracies)}"


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


def evaluate(config: TrainConfig, dataset: Dataset, distilled: DistilledSet, *address: int | str,
             augmented: bool = True, on_epoch: Callable[[], None] = lambda: None) -> list[Score]:
    """Trains `num_eval` networks of each kind in the pool of `eval_mode` and tests each after its last epoch.

    Several are trained at once where that wins: on a CPU small ones in processes that divide its threads, which
    changes rounding; with `parall_eva` on all GPUs, in a thread each. Every network has its own random numbers, so
    where it is trained does not matter.

    Args:
        dataset, distilled: on one device; the images of both in the same space.
        address: tells this evaluation's random numbers from those of others with the same seed.
        augmented: False trains on the images as they are.
        on_epoch: called after each epoch of each network.
    """
    jobs = [Job(name, number) for name in evaluation_pool(config.eval_mode, config.model)
            for number in range(config.num_eval)]
    test = dataclasses.replace(dataset, train_images=dataset.train_images[:0], train_labels=dataset.train_labels[:0],
                               whitening=None)
    work = GRADIENT_ALONE * len(distilled) * (config.epoch_eval_train + 1)
    train = partial(_tested, config, test, distilled, address, augmented, work)
    devices = _devices(config, distilled.images.device)
    at_once = min(len(jobs), torch.get_num_threads())
    if len(devices) > 1:
        accuracies = _on_devices(train, jobs, devices, on_epoch)
    elif devices[0].type == "cpu" and at_once > 1 and _processes_pay(config, jobs, dataset, len(distilled), work):
        # What is left when no full round remains has all threads to itself.
        full_rounds = len(jobs) - len(jobs) % at_once
        accuracies = in_processes(train, jobs[:full_rounds], at_once, on_epoch)
        accuracies += [train(job, on_epoch) for job in jobs[full_rounds:]]
    else:
        accuracies = [train(job, on_epoch) for job in jobs]
    return [Score(jobs[first].network, accuracies[first:first + config.num_eval])
            for first in range(0, len(jobs), config.num_eval)]


class Job(NamedTuple):
    """One network of an evaluation."""

    network: str
    number: int


_INITIALISING = threading.Lock()  # layers draw from torch's one global generator


def _tested(config: TrainConfig, dataset: Dataset, distilled: DistilledSet, address: tuple[int | str, ...],
            augmented: bool, work: float, job: Job, on_epoch: Callable[[], None],
            device: torch.device | None = None) -> float:
    """Trains one network and returns its accuracy on the test images.

    Args:
        device: where; None: where the set is.
    """
    device = device or distilled.images.device
    dataset, distilled = dataset.to(device), distilled.to(device)
    with _INITIALISING, seeded(config.seed, "evaluation", *address, *job):
        network = network_for(job.network, dataset)
    model = flat_model(config, network.to(device), work)
    older = augment.older_operations(dataset.name, job.network)
    draw = drawer(config, dataset, older) if augmented else lambda batch, random: None
    theta = train_network(model, model.flatten(), distilled.images, distilled.labels, float(distilled.lr),
                          epochs=config.epoch_eval_train, batch_size=config.batch_train, draw=draw,
                          random=generator(config.seed, "evaluation", *address, *job, "order"), on_epoch=on_epoch)
    model.network.eval()
    return accuracy(partial(model, theta), dataset.test_images, dataset.test_labels)


def _processes_pay(config: TrainConfig, jobs: Sequence[Job], dataset: Dataset, samples: int, work: float) -> bool:
    """Whether these networks are small enough, and train for long enough, to be trained in processes of their own."""
    networks = [network_for(job.network, dataset) for job in jobs]
    step = GRADIENT_ALONE * min(config.batch_train, samples)
    return (max(seconds_uncompiled(network, step) for network in networks) < SHORT_STEP
            and sum(seconds_uncompiled(network, work) for network in networks) > PROCESSES_PAY)


def _on_devices(train: Callable[..., float], jobs: Sequence[Job], devices: Sequence[torch.device],
                on_epoch: Callable[[], None]) -> list[float]:
    """The accuracies of all jobs, spread over several devices, a thread each."""
    stop = threading.Event()

    def after_epoch() -> None:
        if stop.is_set():
            raise InterruptedError
        on_epoch()

    def share(first: int) -> list[float]:
        return [train(job, after_epoch, devices[first]) for job in jobs[first::len(devices)]]

    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(share, first) for first in range(len(devices))]
        try:
            found = [future.result() for future in futures]
        except BaseException:
            stop.set()
            raise
    return [found[number % len(devices)][number // len(devices)] for number in range(len(jobs))]


def _devices(config: TrainConfig, device: torch.device) -> list[torch.device]:
    """Those that an evaluation uses; with `parall_eva` all GPUs, or the ones that `device` lists."""
    if not config.parall_eva or device.type == "cpu":
        return [device]
    present = range(torch.cuda.device_count())
    listed = [index for index in config.device if index in present] if isinstance(config.device, list) else []
    return [torch.device("cuda", index) for index in listed or present]


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


def evaluate_and_report(config: EvaluationConfig | BaselineConfig, dataset: Dataset, distilled: DistilledSet,
                        what: str) -> None:
    """Evaluates with a progress bar, prints the scores and writes them to `--json`."""
    if config.json:
        check_writable(config.json)
    device = distilled.images.device
    print(f"{what}: {len(distilled)} images, learning rate {float(distilled.lr):.4g}, {config.epoch_eval_train} epochs "
          f"· {describe(device)}")
    announce(config)
    began = perf_counter()
    networks = len(evaluation_pool(config.eval_mode, config.model)) * config.num_eval
    with Progress(networks * (config.epoch_eval_train + 1), "evaluate") as bar:
        # The same networks and the same order of samples for every set, so that sets are compared like with like.
        scores = evaluate(config, dataset, distilled, augmented=not config.no_aug, on_epoch=bar.update)
    for score in scores:
        print(score)
    if config.json:
        write_json(config.json, {
            "what": what, "images": len(distilled), "scores": [score.as_dict() for score in scores],
            "tested_on": "validation" if config.val_fraction else "test", "seconds": perf_counter() - began,
            "config": influential(config), "environment": environment(device)})


def evaluate_files(config: EvaluationConfig) -> None:
    """The whole of `distill/evaluation.py`: saved tensors in, accuracies printed and written as JSON.

    Raises:
        UserError: files or options that do not fit the dataset.
    """
    check_evaluation(config)
    device = start_device(config)
    distilled = read_set(config.data_dir, config.label_dir, config.lr_dir, config.lr_teacher)
    _note_other_space(config, distilled)
    dataset = load_configured(config, device)
    distilled = checked_set(distilled, dataset).to(device)
    check_pool(config, dataset)
    if config.save:
        if config.json:
            check_writable(config.json)  # a refusal comes before anything is written
        distilled.save_whole(Path(config.save), dataset, influential(config))
    evaluate_and_report(config, dataset, distilled, "distilled images")


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
