"""Several evaluations run as one, with one progress bar and one file of partial results. If asked for, each learning
rate is chosen among several on a tenth of the training images, never on the test images."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.distilled_set import DistilledSet
from distill.evaluate.evaluation_run import Session
from distill.evaluate.networks import evaluate, pool
from distill.evaluate.saved_accuracies import Accuracies, Job
from utils.config import TrainConfig
from utils.data.datasets import Dataset
from utils.errors import UserError
from utils.program import ranks
from utils.program.progress import Progress

RATES = (0.001, 0.005, 0.01, 0.05, 0.1)  # DD-Ranking's
HELD_OUT = 0.1  # share of each class's training images, to choose a rate on


class Part(NamedTuple):
    """One of the evaluations."""

    what: str
    config: TrainConfig
    sets: list[DistilledSet]  # of one size
    rates: tuple[float, ...] = ()  # one of these is chosen; empty: the sets' own
    networks: tuple[str, ...] = ()  # these kinds of the pool; empty: all

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(len(self.sets[0]) / self.config.batch_train)

    def at(self, rate: float) -> list[DistilledSet]:
        """The sets, with this learning rate."""
        return [each.at(rate) for each in self.sets]

    def kinds(self, dataset: Dataset) -> list[str]:
        return [name for name in pool(self.config, dataset) if name in self.networks or not self.networks]


def held_out(dataset: Dataset, used: Tensor, random: torch.Generator) -> Dataset:
    """The dataset with a share of its training images, none of them in `used`, in place of the test images.

    Raises:
        UserError: of some class, fewer images are left than that share.
    """
    left = torch.ones(len(dataset.train_labels), dtype=torch.bool)
    left[used.cpu()] = False
    chosen = []
    for label, name in enumerate(dataset.classes):
        members = dataset.class_indices(label).cpu()
        count = max(1, round(HELD_OUT * len(members)))
        members = members[left[members]]
        if len(members) < count:
            raise UserError(f"--robust_score: the random images to compare with leave {len(members)} of class {name}, "
                            f"and the learning rates are chosen on {count} others; give a smaller --num_eval, as each "
                            "network has random images of its own, or a smaller set")
        chosen.append(members[torch.randperm(len(members), generator=random)[:count]])
    indices = torch.cat(chosen).to(dataset.train_labels.device)
    return replace(dataset, test_images=dataset.train_images[indices], test_labels=dataset.train_labels[indices])


def evaluate_parts(parts: dict[str, Part], dataset: Dataset, chosen_on: Dataset, session: Session,
                   aloud: bool = True) -> dict[str, dict[str, Any]]:
    """Evaluates all parts; returns the result of each by name, with its scores and learning rates.

    Args:
        chosen_on: learning rates are chosen on its test images.
        aloud: print each score as soon as it is known.
    """
    config, accuracies = session.config, session.accuracies

    # One bar for all, counted in batches: an epoch of the training set takes far longer than one of the set.
    runs = [(part.batches_per_epoch * part.config.epochs_trained,
             _saved(accuracies, name, rate).missing([Job(network, number) for number in range(config.num_eval)]))
            for name, part in parts.items() for network in part.kinds(dataset) for rate in (*part.rates, None)]
    done = sum(batches * (config.num_eval - len(missing)) for batches, missing in runs)
    total = done + sum(batches * len(ranks.deal(missing)) for batches, missing in runs)
    number = config.num_eval * len(runs)
    session.say_resumed(number - sum(len(missing) for _, missing in runs), number)
    results = {}
    with Progress(total, "evaluate", initial=done, quiet=config.quiet, device=dataset.device) as bar:
        for at, (name, part) in enumerate(parts.items(), start=1):
            bar.count = f"part {at} of {len(parts)}"
            run = partial(evaluate, part.config, augmented=not part.config.no_aug,
                          on_epoch=partial(bar.update, part.batches_per_epoch))
            result: dict[str, Any] = {
                "what": part.what, "images": len(part.sets[0].images), "augmented": not part.config.no_aug,
                "epochs": part.config.epoch_eval_train, "lr": {}, "scores": []}
            for network in part.kinds(dataset):
                reached = {rate: run(chosen_on, part.at(rate), networks=[network],
                                     accuracies=_saved(accuracies, name, rate))[0].mean for rate in part.rates}
                rate = max(reached, key=reached.__getitem__, default=float(part.sets[0].lr))
                if reached:
                    result.setdefault("held_out", {})[network] = {f"{each:g}": mean for each, mean in reached.items()}
                (score,) = run(dataset, part.at(rate), networks=[network], accuracies=_saved(accuracies, name))
                result["lr"][network] = rate
                result["scores"].append(score)
                if aloud:
                    bar.say(f"{part.what}, learning rate {rate:.4g} · {score}")
            results[name] = result
    return results


def _saved(accuracies: Accuracies, name: str, rate: float | None = None) -> Accuracies:
    """The accuracies of one part, at a candidate rate, or (None) at the rate that is used."""
    return accuracies.part(f"{name}/" if rate is None else f"{name} at {rate:g}/")
