"""`distill/baseline.py`: real images in place of a distilled set, the baseline that distillation has to beat."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from buffer.manifests import buffer_folder, check_same_images, check_same_on_ranks
from buffer.trajectories import Buffer
from distill.distilled_set import DistilledSet
from distill.evaluate.coreset import CORESETS, coreset
from distill.evaluate.evaluation_run import evaluate_and_say, settle_threads
from distill.evaluate.networks import check_pool
from distill.evaluate.option_checks import as_experts_saw, asks_experts, labelled_by_experts
from distill.initialize import expert_labels, notes_on_small_classes, predicted_correctly, random_real
from utils.config import BaselineConfig
from utils.data.datasets import Dataset
from utils.data.tiles import check_factor, cut, tiled
from utils.errors import UserError, note, number_of
from utils.parameters import FlatModel
from utils.program.prepare import begin, load_data, network_for
from utils.program.progress import watched
from utils.program.seeds import generator


def evaluate_real(config: BaselineConfig) -> None:
    """Real images in, accuracies printed and written as JSON: all of `distill/baseline.py` except `option_checks`.

    Raises:
        UserError: options that do not fit the dataset or the experts.
    """
    dataset = begin(config)
    check_pool(config, dataset)
    check_factor(config.factor, dataset.image_size)
    source, seen = seen_by_experts(config, dataset)
    check_sizes(config, source)
    samples = per_class(config) * dataset.num_classes if config.ipc else len(dataset.train_labels)
    settle_threads(config, dataset, samples)
    sets, what = real_sets(config, source)
    several = (f"each chosen by one of {len(sets)} experts, for the networks in turn" if config.pick in CORESETS else
               "each network is trained on images of its own")
    notes = [several] * (len(sets) > 1) + seen
    notes += notes_on_small_classes(source, per_class(config)) if config.ipc else []
    evaluate_and_say(config, dataset, sets, what, *notes)


def seen_by_experts(config: BaselineConfig, dataset: Dataset) -> tuple[Dataset, list[str]]:
    """The data that real images are taken from (see `as_experts_saw`), and notes for the user on that."""
    if asks_experts(config):
        check_same_on_ranks(buffer_folder(config))
    as_seen = as_experts_saw(config)
    if as_seen == config:
        return dataset, []
    return load_data(as_seen, dataset.device), [
        f"the experts held out {as_seen.val_fraction:g} of the training images; real images are taken from the others"]


def per_class(config: BaselineConfig) -> int:
    """The number of real images per class: f² in each of ipc."""
    return config.ipc * config.factor**2


def check_sizes(config: BaselineConfig, dataset: Dataset) -> None:
    """Refuses a coreset of more images than a class has."""
    if config.pick in CORESETS:
        size, name = min((len(dataset.class_indices(label)), name) for label, name in enumerate(dataset.classes))
        if size < per_class(config):
            chosen = number_of(per_class(config), "image")
            raise UserError(f"--pick {config.pick} chooses {chosen} per class, and class {name} has {size}; give a "
                            "smaller --ipc, or another --pick")


def drawn(config: BaselineConfig, dataset: Dataset) -> list[Tensor]:
    """Indices [K·ipc·f²] of random training images, classes in order, drawn anew for each network: with few images per
    class, the draw matters more than the initialisation.
    """
    return [random_real(dataset, per_class(config), random) for random in _draws(config)]


def _draws(config: BaselineConfig) -> list[torch.Generator]:
    return [generator(config.seed, "baseline", number) for number in range(config.num_eval)]


def chosen_by(buffer: Buffer, config: BaselineConfig, dataset: Dataset) -> list[Tensor]:
    """Indices as from `drawn`, of images that experts choose. For coresets, each of up to `num_eval` experts chooses
    one."""
    if config.pick in CORESETS:
        order = torch.randperm(len(buffer), generator=generator(config.seed, "baseline"))[:config.num_eval].tolist()
        return [coreset(config.pick, buffer.model, theta, dataset, per_class(config))
                for theta in last_snapshots(buffer, dataset, order)]
    found = [predicted_correctly(buffer.model, lambda: last_snapshots(buffer, dataset), dataset, per_class(config),
                                 random) for random in _draws(config)]
    for line in dict.fromkeys(line for _, lines in found for line in lines):
        note(line)
    return [indices for indices, _ in found]


def last_snapshots(buffer: Buffer, dataset: Dataset, order: Sequence[int] | None = None) -> Iterator[Tensor]:
    """The last snapshots of all experts, or of those in `order`."""
    return (buffer.snapshot(number, -1).to(dataset.device) for number in order or range(len(buffer)))


ADJECTIVES = {"random": "random", "correct": "correctly predicted", "herding": "herded", "k_center": "k-center"}


def real_sets(config: BaselineConfig, dataset: Dataset) -> tuple[list[DistilledSet], str]:
    """Real images as sets, on the dataset's device, and what they are, in words.

    Random images: `num_eval` sets, each drawn anew. Images chosen by experts: see `chosen_by`. The whole training set:
    one set.

    Raises:
        UserError: the experts were trained on other images, or their files are damaged.
    """
    images, labels, device = dataset.train_images, dataset.train_labels, dataset.device
    lr = torch.tensor(config.lr_teacher, device=device)
    if config.ipc is None:
        return [DistilledSet(images.to(device), labels, lr)], "the whole training set"
    what = f"{number_of(config.ipc, f'{ADJECTIVES[config.pick]} real image')} per class"
    by_experts, picked = labelled_by_experts(config), config.pick != "random"
    if asks_experts(config):
        check_same_images(buffer_folder(config), dataset)
        buffer = Buffer(buffer_folder(config), FlatModel(network_for(config.model, dataset).to(device)))
        buffer.verify(partial(watched, quiet=config.quiet))
    chosen = torch.cat(chosen_by(buffer, config, dataset) if picked else drawn(config, dataset)).to(device)
    images, labels = tiled(images[chosen], config.factor), labels[chosen]
    if by_experts:
        labels, _ = expert_labels(buffer.model, last_snapshots(buffer, dataset), cut(images, config.factor), labels)
        what += " with expert labels"
    if config.factor > 1:
        what += f", factor {config.factor}"
    each_has = config.ipc * dataset.num_classes
    sets = [DistilledSet(*parts, lr) for parts in zip(images.split(each_has),
                                                      labels.split(per_class(config) * dataset.num_classes))]
    return sets, what
