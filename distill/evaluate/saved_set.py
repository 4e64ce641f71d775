"""`distill/evaluation.py`: a saved set, tested on fresh networks."""

import contextlib
import dataclasses
from pathlib import Path

import torch

from distill.distilled_set import DistilledSet, checked_set, class_indices, read_set
from distill.evaluate.evaluation_run import evaluate_and_say
from distill.evaluate.networks import check_evaluation, check_pool
from utils.config import EvaluationConfig, influential
from utils.data.datasets import Dataset
from utils.errors import UserError
from utils.files import check_writable, given, read_config
from utils.program import ranks
from utils.program.console import note
from utils.program.prepare import load_data, take_device


def evaluate_files(config: EvaluationConfig) -> None:
    """The whole of `distill/evaluation.py`: saved tensors in, accuracies printed and written as JSON.

    Raises:
        UserError: files or options that do not fit the dataset.
    """
    check_evaluation(config)
    device = take_device(config)
    opened = read_set(config.data_dir, config.label_dir, config.lr_dir, config.lr_teacher)
    dataset, distilled = prepared(config, opened, device)
    what, notes = "distilled images", []
    if config.hard_labels:
        distilled, known_by = with_classes(distilled, dataset)
        what, notes = f"{what} with hard labels", [known_by]
    evaluate_and_say(config, dataset, [distilled], what, *notes)


def prepared(config: EvaluationConfig, opened: DistilledSet, device: torch.device) -> tuple[Dataset, DistilledSet]:
    """The dataset and, of the same kind, the set, both on the device; the set is saved whole where `save` says so.

    Args:
        opened: the set as it was saved.

    Raises:
        UserError: files or options that do not fit.
    """
    dataset = load_data(config, device)
    _note_other_space(config, opened)
    distilled = checked_set(opened, dataset).to(device)
    check_pool(config, dataset)
    if config.json:
        check_writable(config.json)  # a refusal comes before anything is written, or long work
    if config.save and ranks.first():
        distilled.save_whole(given(config.save), dataset, influential(config))
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
            note(f"note: the set was made with {name} {made[name]}, and is tested with {name} {getattr(config, name)}")
