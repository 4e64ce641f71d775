"""DD-Ranking's scores of a distilled set: what of its accuracy is neither its labels' nor the evaluation's merit.

By network, accuracies A in [0, 1] and means over the networks:

    HLR = A(real, hard labels) − A(distilled, hard labels)              hard label recovery; less is better
    IOR = A(distilled, its own labels) − A(random real, such labels)    improvement over random
    LRS = scaled(w · IOR − (1 − w) · HLR)                               label-robust score
    ARS = scaled(γ · IOR + (1 − γ) · IOR without augmentation)          augmentation-robust score
    scaled(x) = (exp(x) − exp(−1)) / (e − exp(−1)), w = γ = 0.5

(Li et al., DD-Ranking: Rethinking the Evaluation of Dataset Distillation, arXiv 2505.13300, its documentation and its
code.) There and here each network is trained on random images of its own, and the rates for hard labels and for random
images are the best of five. It differs in this:

    there                                                       here
    the average of the scores of single runs                    the score of the mean accuracies
    the best of all tested epochs                               the accuracy after the last epoch
    a rate is chosen by one network each, on the test images    by the mean of all networks, on held-out training images
    hard labels: without augmentation, unless asked for         with it, as everything but the two without augmentation
    random images: labels of a teacher, or the mean of several  the mean of the experts that are right
    the rate drops and the momentum stays                       the momentum is forgotten, as DATM's evaluation does
    real data: a rate, drop and length set for each network     --lr_teacher and --epoch_eval_real, with the same drop
"""

import math
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.distilled_set import DistilledSet
from distill.evaluate.evaluation_run import Session
from distill.evaluate.networks import evaluate, pool
from distill.evaluate.real_images import check_experts, drawn, real_sets
from distill.evaluate.saved_accuracies import Accuracies, Job
from distill.evaluate.saved_set import opened, with_classes
from distill.result_files import as_json
from utils.config import BaselineConfig, EvaluationConfig, TrainConfig
from utils.data.datasets import Dataset
from utils.errors import UserError
from utils.program import ranks
from utils.program.console import say
from utils.program.progress import Progress
from utils.program.seeds import generator

WEIGHT = 0.5  # w and γ
RATES = (0.001, 0.005, 0.01, 0.05, 0.1)  # DD-Ranking's
HELD_OUT = 0.1  # of each class's training images, to choose a rate on


# --- the scores ----------------------------------------------------------------------------------------------


def scaled(x: float) -> float:
    """[−1, 1] → [0, 1], growing faster where x is larger."""
    return (math.exp(x) - math.exp(-1)) / (math.e - math.exp(-1))


def robust_scores(at: dict[str, float]) -> dict[str, float]:
    """One network's scores; see the top of this file.

    Args:
        at: its mean accuracies in [0, 1]: syn, syn_hard, random, syn_no_aug, random_no_aug, real.
    """
    hlr, ior, ior_no_aug = (at["real"] - at["syn_hard"], at["syn"] - at["random"],
                            at["syn_no_aug"] - at["random_no_aug"])
    return {"HLR": hlr, "IOR": ior, "LRS": scaled(WEIGHT * ior - (1 - WEIGHT) * hlr),
            "IOR_no_aug": ior_no_aug, "ARS": scaled(WEIGHT * ior + (1 - WEIGHT) * ior_no_aug)}


# --- their evaluations ---------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """One of the evaluations that the scores are made of."""

    what: str
    config: TrainConfig
    sets: list[DistilledSet]  # of one size
    searched: bool  # whether its learning rate is chosen among RATES

    @property
    def rates(self) -> tuple[float, ...]:
        """Those that are tried."""
        return RATES if self.searched else ()

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(len(self.sets[0]) / self.config.batch_train)

    def at(self, rate: float) -> list[DistilledSet]:
        """The sets, with this learning rate."""
        return [replace(each, lr=torch.tensor(rate, device=each.lr.device)) for each in self.sets]


def evaluate_robust(config: EvaluationConfig) -> None:
    """The whole of `distill/evaluation.py --robust_score`: saved tensors in, scores printed and written as JSON.

    Raises:
        UserError: files or options that do not fit the dataset, the experts or the scores.
    """
    for name in ("hard_labels", "no_aug"):
        if getattr(config, name):
            raise UserError(f"--robust_score beside --{name}: the scores compare with and without it; leave it out")

    def real_config(distilled: DistilledSet, ipc: int = 1) -> BaselineConfig:
        return BaselineConfig(
            **{field.name: getattr(config, field.name) for field in fields(TrainConfig)}, ipc=ipc,
            buffer_path=config.buffer_path, label_source="experts" if distilled.labels.is_floating_point() else "hard")

    dataset, distilled = opened(config, lambda distilled: check_experts(real_config(distilled)))
    ipc, rest = divmod(len(distilled.images), dataset.num_classes)
    if rest:
        raise UserError(f"--robust_score: {len(distilled.images)} images of {dataset.num_classes} classes cannot be "
                        "compared with as many random ones of each class; give a set with equally many of each")
    of_each = real_config(distilled, ipc)
    random, of_random = real_sets(of_each, dataset)
    whole, of_whole = real_sets(replace(of_each, ipc=None, factor=1, label_source="hard"), dataset)
    chosen_on = held_out(dataset, torch.cat(drawn(of_each, dataset)), generator(config.seed, "robust", "rates"))
    (hard, known_by), what = with_classes(distilled, dataset), "distilled images"
    bare = replace(config, no_aug=True)
    parts = {"syn": Comparison(what, config, [distilled], False),
             "syn_hard": Comparison(f"{what} with hard labels", config, [hard], True),
             "random": Comparison(of_random, config, random, True),
             "syn_no_aug": Comparison(f"{what}, without augmentation", bare, [distilled], False),
             "random_no_aug": Comparison(f"{of_random}, without augmentation", bare, random, True),
             "real": Comparison(of_whole, replace(config, epoch_eval_train=config.epoch_eval_real), whole, False)}
    session = Session(config, dataset, [distilled], what, known_by, beside=random,
                      aside=f" (the whole training set: {config.epoch_eval_real})")
    results = _evaluate_parts(parts, dataset, chosen_on, session)
    scores = {}
    for at, network in enumerate(pool(config, dataset)):
        scores[network] = robust_scores({name: result["scores"][at].mean for name, result in results.items()})
        print(f"{network}: " + ", ".join(f"{name} {100 * value:.2f} %" for name, value in scores[network].items()))
    say(config, "HLR: what hard labels miss of the whole training set, less is better; IOR: the gain over random "
                "images; LRS, ARS: the label- and the augmentation-robust score of both, more is better")
    of_parts = {name: result | {"scores": list(map(as_json, result["scores"]))} for name, result in results.items()}
    session.write(results["syn"]["scores"], None, robust_scores=scores, weight=WEIGHT, results=of_parts)


def held_out(dataset: Dataset, used: Tensor, random: torch.Generator) -> Dataset:
    """The dataset with a share of its training images, none of them used, in the place of the test images.

    Raises:
        UserError: all are used.
    """
    left = torch.ones(len(dataset.train_labels), dtype=torch.bool)
    left[used.cpu()] = False
    chosen = []
    for label in range(dataset.num_classes):
        members = dataset.class_indices(label).cpu()
        count = max(1, round(HELD_OUT * len(members)))
        members = members[left[members]]
        chosen.append(members[torch.randperm(len(members), generator=random)[:count]])
    indices = torch.cat(chosen).to(dataset.train_labels.device)
    if not len(indices):
        raise UserError("--robust_score: the set holds as many images as the training set, which leaves none to choose "
                        "the learning rates of the comparison on; give a smaller set")
    return replace(dataset, test_images=dataset.train_images[indices], test_labels=dataset.train_labels[indices])


def _evaluate_parts(parts: dict[str, Comparison], dataset: Dataset, chosen_on: Dataset,
                    session: Session) -> dict[str, dict[str, Any]]:
    """What each part reached: what a file of the single evaluation says, and the learning rates.

    Args:
        chosen_on: its test images are those on which learning rates are chosen.
    """
    config, accuracies, networks = session.config, session.accuracies, pool(session.config, dataset)

    # One bar over them all, in batches, as an epoch of the training set takes far longer than one of the set.
    runs = [(part.batches_per_epoch * (part.config.epoch_eval_train + 1),
             _saved(accuracies, name, rate).missing([Job(network, number) for number in range(config.num_eval)]))
            for name, part in parts.items() for network in networks for rate in (*part.rates, None)]
    done = sum(batches * (config.num_eval - len(missing)) for batches, missing in runs)
    total = done + sum(batches * len(ranks.deal(missing)) for batches, missing in runs)
    number = config.num_eval * len(runs)
    session.say_going_on(number - sum(len(missing) for _, missing in runs), number)
    results = {}
    with Progress(total, "evaluate", initial=done, quiet=config.quiet, device=dataset.device) as bar:
        for at, (name, part) in enumerate(parts.items(), start=1):
            bar.count = f"set {at} of {len(parts)}"
            run = partial(evaluate, part.config, augmented=not part.config.no_aug,
                          on_epoch=partial(bar.update, part.batches_per_epoch))
            result: dict[str, Any] = {
                "what": part.what, "images": len(part.sets[0].images), "augmented": not part.config.no_aug,
                "epochs": part.config.epoch_eval_train, "lr": {}, "scores": []}
            for network in networks:
                reached = {rate: run(chosen_on, part.at(rate), networks=[network],
                                     accuracies=_saved(accuracies, name, rate))[0].mean for rate in part.rates}
                rate = max(reached, key=reached.__getitem__, default=float(part.sets[0].lr))
                if reached:
                    result.setdefault("held_out", {})[network] = {f"{rate:g}": at for rate, at in reached.items()}
                (score,) = run(dataset, part.at(rate), networks=[network], accuracies=_saved(accuracies, name))
                result["lr"][network] = rate
                result["scores"].append(score)
                bar.say(f"{part.what}, learning rate {rate:.4g} · {score}")
            results[name] = result
    return results


def _saved(accuracies: Accuracies, name: str, rate: float | None = None) -> Accuracies:
    """Those of one part, at a rate that is tried or at the one that is used."""
    return accuracies.part(f"{name}/" if rate is None else f"{name} at {rate:g}/")
