"""`distill/evaluation.py`: a saved set, tested on fresh networks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.distilled_set import (
    FOLDERS,
    READ_BY,
    TOLD,
    DistilledSet,
    checked_set,
    class_indices,
    other_space,
)
from distill.evaluate.evaluation_run import evaluate_and_say
from distill.evaluate.networks import check_evaluation, check_pool
from distill.evaluate.released_sets import are_pixels, in_space, made_with, read_set
from utils.config import EvaluationConfig, as_meant, from_root, influential, make
from utils.data.datasets import Dataset
from utils.errors import UserError
from utils.files import given
from utils.program import ranks
from utils.program.console import note
from utils.program.prepare import load_data, take_device


def evaluate_files(config: EvaluationConfig) -> None:
    """The whole of `distill/evaluation.py`: saved tensors in, accuracies printed and written as JSON.

    Raises:
        UserError: files or options that do not fit the dataset.
    """
    dataset, distilled = opened(config)
    what, notes = "distilled images", []
    if config.hard_labels:
        distilled, known_by = with_classes(distilled, dataset)
        what, notes = f"{what} with hard labels", [known_by]
    evaluate_and_say(config, dataset, [distilled], what, *notes)


def opened(config: EvaluationConfig, check: Callable[[DistilledSet], None] = lambda distilled: None
           ) -> tuple[Dataset, DistilledSet]:
    """The dataset and, of the same kind, the set, both on the device; the set is saved whole where `save` says so.

    Args:
        check: refuses a set before anything large is loaded.

    Raises:
        UserError: files or options that do not fit.
    """
    check_evaluation(config)
    device = take_device(config)
    read = read_set(config.data_dir, config.label_dir, config.lr_dir, config.lr_teacher, config.factor)
    check(read)
    dataset = load_data(config, device)
    _note_other_space(config, read, dataset)
    distilled = checked_set(read, dataset, config.label_kind, factor=config.factor).to(device)
    distilled = in_space(distilled, dataset)
    check_pool(config, dataset)
    if config.save and ranks.first():
        distilled.save_whole(given(config.save), dataset, influential(config))
    return dataset, distilled


def with_classes(distilled: DistilledSet, dataset: Dataset) -> tuple[DistilledSet, str]:
    """The set with the images' classes in the place of soft labels, and by what they are known, in words."""
    classes, known_by = class_indices(distilled, dataset.num_classes)
    return dataclasses.replace(distilled, labels=classes), f"the class of an image is known by {known_by}"


def told_by_set(given: dict[str, Any]) -> dict[str, Any]:
    """The options that say how a set is read, as the set of `--data_dir` tells them: what it was made of, its network,
    and the folders of the real data and of the experts, where these are still there; but for those that are given.

    Raises:
        UserError: it tells what no option can be.
    """
    made = made_with(given.get("data_dir", ""))
    told = {name: from_root(made[name]) if name in FOLDERS else made[name]
            for name in (*TOLD, "label_kind") if name in made and name not in given}
    told = {name: value for name, value in told.items() if name not in FOLDERS or Path(str(value)).is_dir()}
    try:
        make(EvaluationConfig, **told)
    except UserError as error:
        raise UserError(f"--data_dir {given['data_dir']} says of itself: {error}; give what it is") from error
    return told


def _note_other_space(config: EvaluationConfig, distilled: DistilledSet, dataset: Dataset) -> None:
    """Says so where the images are of another space than the dataset: by the options that made the set, if they are
    known, or by the numbers of its space."""
    made = as_meant(distilled.config or made_with(config.data_dir))
    here = as_meant({name: getattr(config, name) for name in READ_BY})
    other = [name for name in READ_BY if name in made and made[name] != here[name]]
    for name in other:
        note(f"note: the set was made with {name} {made[name]}, and is tested with {name} {here[name]}")
    if not other and not are_pixels(distilled) and (why := other_space(distilled, dataset)):
        note(f"note: the set is of another space: {why}")
