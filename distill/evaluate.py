"""Train a fresh network on a set, test it on real images; several times, mean and standard deviation."""

import contextlib
import sys
import threading
from collections.abc import Callable
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
from utils.engine import GRADIENT_ALONE
from utils.errors import UserError
from utils.files import check_writable
from utils.metrics import accuracy
from utils.networks import check_network_name, evaluation_pool, network_for
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

    With `parall_eva` the networks are spread over all GPUs, a thread each; every network has its own random numbers,
    so where it is trained does not matter.

    Args:
        dataset, distilled: on one device; the images of both in the same space.
        address: tells this evaluation's random numbers from those of others with the same seed.
        augmented: False trains on the images as they are.
        on_epoch: called after each epoch of each network.
    """
    jobs = [(name, number) for name in evaluation_pool(config.eval_mode, config.model)
            for number in range(config.num_eval)]
    networks = []
    for name, number in jobs:
        with seeded(config.seed, "evaluation", *address, name, number):
            networks.append(network_for(name, dataset))

    devices = _devices(config, distilled.images.device)
    work = GRADIENT_ALONE * len(distilled) * (config.epoch_eval_train + 1)
    stop = threading.Event()

    def tested(device: torch.device, share: range) -> list[float]:
        """The accuracies of a device's share of the networks."""
        here = distilled.to(device)
        test_images, test_labels = dataset.test_images.to(device), dataset.test_labels.to(device)
        accuracies = []
        for job in share:
            name, number = jobs[job]
            model = flat_model(config, networks[job].to(device), work)
            networks[job] = None  # so that it is freed when it has been tested

            def after_epoch() -> None:
                if stop.is_set():
                    raise InterruptedError
                on_epoch()

            older = augment.older_operations(dataset.name, name)
            draw = drawer(config, dataset, older) if augmented else lambda batch, random: None
            theta = train_network(model, model.flatten(), here.images, here.labels, float(here.lr),
                                  epochs=config.epoch_eval_train, batch_size=config.batch_train, draw=draw,
                                  random=generator(config.seed, "evaluation", *address, name, number, "order"),
                                  on_epoch=after_epoch)
            model.network.eval()
            accuracies.append(accuracy(partial(model, theta), test_images, test_labels))
        return accuracies

    shares = [range(first, len(jobs), len(devices)) for first in range(len(devices))]
    if len(devices) == 1:
        found = [tested(devices[0], shares[0])]  # in this thread, which an interrupt reaches
    else:
        with ThreadPoolExecutor(len(devices)) as pool:
            futures = [pool.submit(tested, *work) for work in zip(devices, shares)]
            try:
                found = [future.result() for future in futures]
            except BaseException:
                stop.set()
                raise
    accuracies = [found[job % len(devices)][job // len(devices)] for job in range(len(jobs))]
    return [Score(jobs[first][0], accuracies[first:first + config.num_eval])
            for first in range(0, len(jobs), config.num_eval)]


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
