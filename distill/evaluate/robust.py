"""DD-Ranking's scores of a distilled set: how much of its accuracy is due neither to its labels nor to the evaluation.

For each kind of network, with A the mean accuracy in [0, 1]:

    HLR = A(real, hard labels) − A(distilled, hard labels)              hard label recovery; less is better
    IOR = A(distilled, its own labels) − A(random real, such labels)    improvement over random
    LRS = scaled(w · IOR − (1 − w) · HLR)                               label-robust score
    ARS = scaled(γ · IOR + (1 − γ) · IOR without augmentation)          augmentation-robust score
    scaled(x) = (exp(x) − exp(−1)) / (e − exp(−1)), w = γ = 0.5

(Li et al., DD-Ranking: Rethinking the Evaluation of Dataset Distillation, arXiv 2505.13300, its documentation and its
code.) There and here, each network has its own random images, and the rates for hard labels and for random images are
the best of five. Differences:

    there                                                       here
    the average of the scores of single runs                    the score of the mean accuracies
    the best of all tested epochs                               the accuracy after the last epoch
    a rate is chosen by one network each, on the test images    by the mean of all networks, on held-out training images
    hard labels: without augmentation, unless asked for         with it, as everything but the two without augmentation
    random images: labels of a teacher, or the mean of several  the mean of the experts that are right
    the rate drops and the momentum stays                       the momentum is reset, as in DATM's evaluation
    real data: a rate, drop and length set for each network     --lr_teacher and --epoch_eval_real, with the same drop
"""

import math
from collections.abc import Collection
from dataclasses import fields, replace

import torch

from distill.distilled_set import DistilledSet
from distill.evaluate.evaluation_run import Session
from distill.evaluate.networks import pool
from distill.evaluate.option_checks import as_experts_saw, check_experts
from distill.evaluate.parts import RATES, Part, evaluate_parts, held_out
from distill.evaluate.protocols import under
from distill.evaluate.real_images import drawn, real_sets, seen_by_experts
from distill.evaluate.saved_set import at_its_rate, opened, with_classes
from distill.result_files import OF_SET, as_json
from utils.config import BaselineConfig, EvaluationConfig, TrainConfig
from utils.errors import UserError, number_of
from utils.program.console import say
from utils.program.seeds import generator

WEIGHT = 0.5  # w and γ


# --- the scores ----------------------------------------------------------------------------------------------


def scaled(x: float) -> float:
    """[−1, 1] → [0, 1], growing faster for larger x."""
    return (math.exp(x) - math.exp(-1)) / (math.e - math.exp(-1))


def robust_scores(at: dict[str, float]) -> dict[str, float]:
    """The scores of one kind of network; see the top of this file.

    Args:
        at: its mean accuracies in [0, 1]: syn, syn_hard, random, syn_no_aug, random_no_aug, real.
    """
    hlr, ior, ior_no_aug = (at["real"] - at["syn_hard"], at["syn"] - at["random"],
                            at["syn_no_aug"] - at["random_no_aug"])
    return {"HLR": hlr, "IOR": ior, "LRS": scaled(WEIGHT * ior - (1 - WEIGHT) * hlr),
            "IOR_no_aug": ior_no_aug, "ARS": scaled(WEIGHT * ior + (1 - WEIGHT) * ior_no_aug)}


# --- their evaluations ---------------------------------------------------------------------------------------


def evaluate_robust(config: EvaluationConfig, given: Collection[str]) -> None:
    """A saved set in, scores printed and written as JSON: `evaluation.py --robust_score` except `option_checks`.

    Args:
        given: the names of the options that are given.

    Raises:
        UserError: files or options that do not fit the dataset, the experts or the scores.
    """
    def real_config(distilled: DistilledSet, ipc: int = 1) -> BaselineConfig:
        return BaselineConfig(
            **{field.name: getattr(config, field.name) for field in fields(TrainConfig)}, ipc=ipc,
            buffer_path=config.buffer_path, label_source="experts" if distilled.labels.is_floating_point() else "hard")

    dataset, distilled = opened(config, given, lambda distilled: check_experts(as_experts_saw(real_config(distilled))))
    if any(under(config, given, config.protocol, network) != config for network in pool(config, dataset)):
        raise UserError(f"--robust_score --protocol {config.protocol} --eval_mode {config.eval_mode}: the protocol "
                        "trains these networks for different numbers of epochs; give --epoch_eval_train")
    distilled = at_its_rate(config, distilled)
    ipc, rest = divmod(len(distilled.images), dataset.num_classes)
    if rest:
        raise UserError(f"--robust_score: {number_of(len(distilled.images), 'image')} of {dataset.num_classes} classes "
                        "cannot be compared with as many random ones of each class; give a set with equally many of "
                        "each")
    of_each = real_config(distilled, ipc)
    source, seen = seen_by_experts(of_each, dataset)
    random, of_random = real_sets(of_each, source)
    whole, of_whole = real_sets(replace(of_each, ipc=None, factor=1, label_source="hard"), dataset)
    chosen_on = held_out(source, torch.cat(drawn(of_each, source)), generator(config.seed, "robust", "rates"))
    (hard, known_by), what = with_classes(distilled, dataset), OF_SET
    bare = replace(config, no_aug=True)
    parts = {"syn": Part(what, config, [distilled]),
             "syn_hard": Part(f"{what} with hard labels", config, [hard], RATES),
             "random": Part(of_random, config, random, RATES),
             "syn_no_aug": Part(f"{what}, without augmentation", bare, [distilled]),
             "random_no_aug": Part(f"{of_random}, without augmentation", bare, random, RATES),
             "real": Part(of_whole, replace(config, epoch_eval_train=config.epoch_eval_real), whole)}
    session = Session(config, dataset, [distilled], what, known_by, *seen, beside=random, trained=(
        f"learning rate {float(distilled.lr):.4g}, {number_of(config.epoch_eval_train, 'epoch')} (the whole training "
        f"set: learning rate {config.lr_teacher:g}, {number_of(config.epoch_eval_real, 'epoch')})"))
    results = evaluate_parts(parts, dataset, chosen_on, session)
    scores = {}
    for at, network in enumerate(pool(config, dataset)):
        scores[network] = robust_scores({name: result["scores"][at].mean for name, result in results.items()})
        print(f"{network}: " + ", ".join(f"{name} {100 * value:.2f} %" for name, value in scores[network].items()))
    say(config, "HLR: what hard labels miss of the whole training set, less is better; IOR: the gain over random "
                "images; LRS, ARS: the label- and the augmentation-robust score of both, more is better")
    of_parts = {name: result | {"scores": list(map(as_json, result["scores"]))} for name, result in results.items()}
    session.write(results["syn"]["scores"], float(distilled.lr), robust_scores=scores, weight=WEIGHT, results=of_parts)
