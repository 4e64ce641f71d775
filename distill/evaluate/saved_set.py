"""`distill/evaluation.py`: a saved set, tested on fresh networks."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch

from distill.distilled_set import (
    READ_BY,
    DistilledSet,
    check_classes,
    checked_set,
    classes_of,
    other_space,
)
from distill.evaluate.evaluation_run import Session, evaluate_and_say, say_replaced, settle_threads
from distill.evaluate.networks import check_pool, pool
from distill.evaluate.option_checks import check_evaluation
from distill.evaluate.parts import RATES, Part, evaluate_parts, held_out
from distill.evaluate.protocols import under
from distill.evaluate.released_sets import are_pixels, in_space, made_with, read_set
from distill.evaluate.saved_accuracies import digest
from distill.result_files import OF_SET, Score, UnderProtocol, under_protocol
from utils import files
from utils.config import (
    AUTO,
    DataConfig,
    EvaluationConfig,
    canonical,
    from_repository,
    image_size,
    value_in_words,
)
from utils.data.datasets import Dataset
from utils.errors import UserError, note, some_of
from utils.networks import same_network
from utils.program import ranks
from utils.program.console import say, shown
from utils.program.prepare import load_data, take_device
from utils.program.seeds import generator

NO_DATASET = ("--dataset is missing: nothing says what the set of --data_dir was made of; give it, with --model, and "
              "--zca where the images are whitened")


def _other_network(own: Any, name: str) -> bool:
    """Whether a set says that it was made with another network, perhaps one that is unknown here."""
    with contextlib.suppress(UserError):
        return isinstance(own, str) and not same_network(own, name)
    return True


def evaluate_files(config: EvaluationConfig, given: Collection[str]) -> None:
    """All of `distill/evaluation.py` but `--robust_score`: saved tensors in, accuracies printed and written as JSON.

    Args:
        given: the names of the options that are given.

    Raises:
        UserError: files or options that do not fit the dataset.
    """
    dataset, distilled = opened(config, given)
    if "lr_teacher" in given and config.lr_teacher != AUTO:
        distilled = at_given_rate(config, distilled)
    what, notes = OF_SET, []
    if config.hard_labels:
        distilled, known_by = with_classes(distilled, dataset)
        what, notes = f"{what} with hard labels", [known_by]
    protocols = config.protocol.split(",")
    what = under_protocol(what, protocols[0])
    configs = {(protocol, network): under(config, given, protocol, network)
               for protocol in protocols for network in pool(config, dataset)}
    if config.lr_teacher == AUTO or any(each != config for each in configs.values()):
        _evaluate_each(config, configs, dataset, distilled, what, *notes)
    else:
        evaluate_and_say(config, dataset, [at_its_rate(config, distilled)], what, *notes)


def _evaluate_each(config: EvaluationConfig, configs: dict[tuple[str, str], EvaluationConfig], dataset: Dataset,
                   distilled: DistilledSet, what: str, *notes: str) -> None:
    """Evaluates each kind of network under each protocol with its own options and, with `--lr_teacher auto`, its own
    rate. Prints the scores and writes them to `--json`, the first protocol's in place of a single evaluation's."""
    auto = config.lr_teacher == AUTO
    rates = {f"{rate:g}": rate for rate in (float(distilled.lr), *RATES)} if auto else {}
    parts = {"/".join(of): Part(of[0], each, [at_its_rate(each, distilled)], tuple(sorted(rates.values())), (of[1],))
             for of, each in configs.items()}
    in_words = [f"{protocol}: {_in_words([part for part in parts.values() if part.what == protocol])}"
                for protocol in dict.fromkeys(part.what for part in parts.values())]
    session = Session(config, dataset, [distilled], what, *notes, *in_words[1:], trained=in_words[0],
                      configs=list(configs.values()))
    none = torch.tensor([], dtype=torch.long)  # a distilled set uses none of the real images
    chosen_on = held_out(dataset, none, generator(config.seed, "evaluation", "rates")) if auto else dataset
    results = evaluate_parts(parts, dataset, chosen_on, session, aloud=False)
    scores: dict[str, list[Score]] = {}
    trained: dict[str, dict[str, Any]] = {}
    for (protocol, network), each in configs.items():
        result = results[f"{protocol}/{network}"]
        (score,), rate = result["scores"], result["lr"][network]
        chosen = ", the best on a tenth of the training images" if auto else ""
        print(f"{f'{protocol} · ' if ',' in config.protocol else ''}{score}, learning rate {rate:.4g}{chosen}")
        scores.setdefault(protocol, []).append(score)
        trained.setdefault(protocol, {})[network] = {
            "epochs": each.epoch_eval_train, "batch_train": each.batch_train, "dsa": each.dsa and not each.no_aug,
            "lr": rate,
            **({"held_out": result["held_out"][network]} if auto else {})}
    session.write(next(iter(scores.values())), None, {
        protocol: UnderProtocol(scores[protocol], trained[protocol]) for protocol in scores})


def _in_words(parts: list[Part]) -> str:
    """How the kinds of networks are trained under one protocol, in words."""
    configs, (part, *_) = [part.config for part in parts], parts
    epochs = " or ".join(dict.fromkeys(str(each.epoch_eval_train) for each in configs))
    rate = f"the best of the rates {', '.join(f'{rate:.4g}' for rate in part.rates)}" if part.rates else (
        f"learning rate {float(part.sets[0].lr):.4g}")
    dsa = "with" if part.config.dsa and not part.config.no_aug else "without"
    return f"{epochs} epoch{'s' * (epochs != '1')} in batches of {part.config.batch_train} {dsa} DSA, {rate}"


def at_its_rate(config: EvaluationConfig, distilled: DistilledSet) -> DistilledSet:
    """The set with the learning rate that its protocol uses; DC's has one for all sets."""
    if config.protocol != "dc" or config.lr_teacher == AUTO:
        return distilled
    return distilled.at(config.lr_teacher)


def at_given_rate(config: EvaluationConfig, distilled: DistilledSet) -> DistilledSet:
    """The set with the learning rate of the options; prints a note if the set's own is different."""
    given = distilled.at(config.lr_teacher)
    if not given.lr.equal(distilled.lr):
        note(f"--lr_teacher {config.lr_teacher:g} is used in place of the set's own learning rate, "
             f"{float(distilled.lr):.4g}")
    return given


def opened(config: EvaluationConfig, given: Collection[str],
           check: Callable[[DistilledSet], None] = lambda distilled: None) -> tuple[Dataset, DistilledSet]:
    """The dataset and the set, in the same space and on the device. Also writes the set to `--save`, if given.

    Args:
        given: the names of the options that are given.
        check: called with the set, to refuse it before anything large is loaded.

    Raises:
        UserError: files or options that do not fit.
    """
    # Read the set, and what is known of how it was made.
    check_evaluation(config)
    device = take_device(config)
    default_lr = EvaluationConfig.lr_teacher if config.lr_teacher == AUTO else config.lr_teacher
    read, rate_known = read_set(config.data_dir, config.label_dir, config.lr_dir, default_lr, config.factor)
    ranks.check_equal(lambda: digest(read), "sets")
    check(read)
    made = made_with(config.data_dir) or read.config
    read = dataclasses.replace(read, config=read.config or made)  # a run's three files say no more than their tensors

    # Load the data; refuse a set that was made of others.
    guessed = "dataset" not in {*given, *made} and config.dataset == EvaluationConfig.dataset
    if guessed and tuple(read.images.shape[2:]) != image_size(config):
        raise UserError(NO_DATASET)
    told = check_told(config, read, "--data_dir", made)
    if config.save and told and read.classes:  # a self-describing file; others' options are partly guessed
        raise UserError(f"--save writes the set for the data that it was made with, and {', '.join(told)} "
                        f"differ{'s' * (len(told) == 1)} here; leave out --{told[0]}, or --save")
    dataset = _default_data(config, device) if guessed else load_data(config, device)
    if not told and not are_pixels(read) and (why := other_space(read, dataset)):
        note(f"the set was prepared differently from the data here: {why}")
    check_classes(read, dataset, f"--data_dir {config.data_dir}", named=not {"dataset", "subset"} & set(told))
    read_from = [f"--{name}" if getattr(config, name) else "--data_dir" for name in ("data_dir", "label_dir", "lr_dir")]
    distilled = checked_set(read, dataset, read_from, config.label_kind, config.factor).to(device)
    distilled = in_space(distilled, dataset)

    # Say what nothing tells.
    searched = config.lr_teacher == AUTO
    if not rate_known and (searched or "lr_teacher" not in given) and (
            config.save or (config.protocol != "dc" and not searched)):
        uses = " and ".join(["used"] * (not searched) + ["saved as its own"] * bool(config.save))
        note(f"the set's learning rate is not among its files; {default_lr:g}, the default of --lr_teacher, is {uses}")
    if "zca" not in {*given, *made}:
        note("nothing says whether the set's images are whitened; they are taken for normalised: give --zca if they "
             "are whitened")
    if rate_known and "lr_teacher" not in given and config.protocol != "dc" and (
            others := [name for name in pool(config, dataset) if _other_network(made.get("model"), name)]):
        note(f"the set's learning rate was learned with {made['model']}; --lr_teacher auto looks for one that suits "
             f"{some_of(others)}")

    check_pool(config, dataset)
    settle_threads(config, dataset, len(distilled))
    say_replaced(config, config.save)
    if config.save and ranks.first():
        read_by = {name: from_repository(getattr(config, name)) for name in (*READ_BY, "factor", "data_path")}
        stated = {name: value for name, value in made.items() if name != "label_kind"}  # the labels are logits by now
        distilled.save_whole(files.resolved(config.save), dataset, {"model": config.model} | stated | read_by)
        say(config, f"set saved in {shown(config.save)}")
    return dataset, distilled


def _default_data(config: EvaluationConfig, device: torch.device) -> Dataset:
    """The default dataset, for a set of which nothing says what it was made of."""
    try:
        dataset = load_data(config, device)
    except UserError as error:
        raise UserError(f"{NO_DATASET}; the default, {config.dataset}, cannot be loaded: {error}") from error
    note(f"nothing says what this set was made of; it is tested on {config.dataset}, the default")
    return dataset


def with_classes(distilled: DistilledSet, dataset: Dataset) -> tuple[DistilledSet, str]:
    """The set with the images' classes in place of soft labels, and where they were taken from, in words."""
    classes, known_by = classes_of(distilled, dataset.num_classes)
    return dataclasses.replace(distilled, labels=classes), f"classes are taken from {known_by}"


def check_told(config: DataConfig, distilled: DistilledSet, option: str, made: dict[str, Any]) -> list[str]:
    """Notes, before any data are loaded, which of the options that made a set differ here, and whether it may have
    learned from images that are held out here; refuses images of another size.

    Args:
        option: the option that gave the set, for messages.
        made: the options that made it, as far as they are known.

    Returns:
        The names of the options that differ.
    """
    made = canonical(made)
    here = canonical({name: getattr(config, name) for name in READ_BY})
    other = [name for name in READ_BY if name in made and made[name] != here[name]]
    for name in other:
        note(f"the set of {option} was made with {name} {value_in_words(made[name])}, and here {name} is "
             f"{value_in_words(here[name])}")
    fraction = made.get("val_fraction")  # the smaller share is a part of the larger one
    if isinstance(fraction, int | float) and config.val_fraction > fraction and not {"dataset", "subset"} & set(other):
        note(f"the set of {option} was made with val_fraction {fraction:g}, so that it may have learned from the "
             "images that are held out here")
    if distilled.mean and tuple(distilled.images.shape[2:]) != image_size(config):
        its, ours = ("×".join(map(str, size)) for size in (distilled.images.shape[2:], image_size(config)))
        raise UserError(f"{option}: the images of the set have {its} pixels, and those of {config.dataset} here "
                        f"{ours}; give the data that it was made of")
    return other
