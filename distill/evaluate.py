"""Train a fresh network on a set, test it on real images; several times, mean and standard deviation."""

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.distilled_set import DistilledSet, load_set
from utils import augment
from utils.config import BaselineConfig, EvaluationConfig, TrainConfig
from utils.datasets import Dataset, load_configured
from utils.files import check_writable
from utils.losses import cross_entropy
from utils.metrics import accuracy
from utils.networks import evaluation_pool, network_for
from utils.run import Progress, describe, environment, generator, influential, seeded, select_device, write_json

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


def train_network(network: nn.Module, images: Tensor, labels: Tensor, lr: float, *, epochs: int, batch_size: int,
                  groups: tuple[str, ...], random: torch.Generator,
                  on_epoch: Callable[[], None] = lambda: None) -> None:
    """Trains in place as the published evaluation does.

    SGD with momentum and weight decay, epochs 0..`epochs` inclusive; when the rate drops the optimiser is made
    anew, so its momentum is forgotten. Every batch is augmented.

    Args:
        images, labels: X [N, C, H, W]; label logits [N, K] or classes [N].
        groups: of DSA (`augment.parse_strategy`); none, no augmentation.
        random: draws the order of the samples and the augmentation.
    """
    network.train()
    rate = None
    for epoch in range(epochs + 1):
        if rate != learning_rate(lr, epoch, epochs):
            rate = learning_rate(lr, epoch, epochs)
            optimiser = torch.optim.SGD(network.parameters(), rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        order = torch.randperm(len(images), generator=random).to(images.device)
        for batch in order.split(batch_size):
            draw = augment.draw(groups, len(batch), images.shape[2:], random)
            x = augment.apply(images[batch], draw and draw.to(images.device))
            loss = cross_entropy(network(x), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        on_epoch()


def evaluate(config: TrainConfig, dataset: Dataset, distilled: DistilledSet, *address: int | str,
             groups: tuple[str, ...], on_epoch: Callable[[], None] = lambda: None) -> list[Score]:
    """Trains `num_eval` networks of each kind in the pool of `eval_mode` and tests each after its last epoch.

    Args:
        dataset, distilled: on one device; the images of both in the same space.
        address: tells this evaluation's random numbers from those of others with the same seed.
        groups: of DSA.
        on_epoch: called after each epoch of each network.
    """
    scores = []
    for name in evaluation_pool(config.eval_mode, config.model):
        accuracies = []
        for number in range(config.num_eval):
            own = (config.seed, "evaluation", *address, name, number)
            with seeded(*own):
                network = network_for(name, dataset)
            network = network.to(distilled.images.device)
            train_network(network, distilled.images, distilled.labels, float(distilled.lr),
                          epochs=config.epoch_eval_train, batch_size=config.batch_train, groups=groups,
                          random=generator(*own), on_epoch=on_epoch)
            network.eval()
            accuracies.append(accuracy(network, dataset.test_images, dataset.test_labels))
        scores.append(Score(name, accuracies))
    return scores


def check_pool(config: TrainConfig, dataset: Dataset) -> list[str]:
    """The networks that will be evaluated, each built once so that what cannot be is refused at the start.

    Raises:
        UserError: an unknown mode or network, or one that cannot read these images.
    """
    pool = evaluation_pool(config.eval_mode, config.model)
    for name in pool:
        network_for(name, dataset)
    return pool


def evaluate_and_report(config: EvaluationConfig | BaselineConfig, dataset: Dataset, distilled: DistilledSet,
                        what: str) -> None:
    """Evaluates with a progress bar, prints the scores and writes them to `--json`."""
    groups = augment.parse_strategy(config.dsa_strategy) if config.dsa and not config.no_aug else ()
    pool = check_pool(config, dataset)
    if config.json:
        check_writable(config.json)
    device = distilled.images.device
    print(f"{what}: {len(distilled)} images, learning rate {float(distilled.lr):.4g}, {config.epoch_eval_train} epochs "
          f"· {describe(device)}")
    began = perf_counter()
    with Progress(len(pool) * config.num_eval * (config.epoch_eval_train + 1), "evaluate") as bar:
        # The same networks and the same order of samples for every set, so that sets are compared like with like.
        scores = evaluate(config, dataset, distilled, groups=groups, on_epoch=bar.update)
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
    device = select_device(config.device)
    dataset = load_configured(config, device)
    distilled = load_set(config.data_dir, config.label_dir, config.lr_dir, dataset, config.lr_teacher).to(device)
    evaluate_and_report(config, dataset, distilled, "distilled images")
