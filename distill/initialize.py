"""Which real images a distillation starts from, and which soft labels they get (DATM, section 3.3).

"Experts" below are snapshots θ from a buffer, by default the last ones; they see images without augmentation.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from buffer.trajectories import Buffer
from distill.distilled_set import DistilledSet, check_classes, checked_set, classes_of, other_space
from utils.config import AUTO, STARTS, DistillConfig
from utils.data.datasets import Dataset
from utils.data.tiles import cut, tiled
from utils.errors import UserError, number_of, some_of
from utils.loss_and_accuracy import at_once
from utils.networks import has_batch_norm
from utils.parameters import FlatModel
from utils.program.progress import watched
from utils.program.seeds import generator

WALK = 256  # images of a class that are classified at a time


def initial_set(config: DistillConfig, dataset: Dataset, buffer: Buffer) -> tuple[DistilledSet, list[str]]:
    """The set that a distillation starts from, on the CPU, and notes for the user.

    Its learning rate is NaN if `distill.suggest` is to measure it. Images of class c occupy rows
    c·ipc … (c+1)·ipc − 1. With factor f each is made of f² real ones, and each of its samples has a label.

    Args:
        buffer: the experts that label the images.

    Raises:
        UserError: the experts have no snapshot `Label_Model_Timestamp`, or a saved set does not fit.
    """
    if config.pix_init not in STARTS:
        distilled, rate = saved_start(config, dataset), config.lr_teacher
        own = f"{float(distilled.lr):.4g}"
        other = rate != AUTO and own != f"{rate:.4g}"
        return distilled, [f"the learning rate starts at {own}, that of the set of --pix_init, and not at --lr_teacher "
                           f"{rate:g}"] if other else []
    device = dataset.device
    random = generator(config.seed, "initialize")
    model, timestamp = buffer.model, config.Label_Model_Timestamp
    if config.uses_snapshot and not -1 <= timestamp <= buffer.epochs:
        raise UserError(f"--Label_Model_Timestamp {timestamp}: the experts in {buffer.folder} have snapshots 0 … "
                        f"{buffer.epochs}, and -1 for the last")

    def experts() -> Iterator[Tensor]:
        return (buffer.snapshot(number, timestamp).to(device) for number in range(len(buffer)))

    per_class = config.ipc * config.factor**2  # samples
    notes = [] if config.pix_init == "noise" else notes_on_small_classes(dataset, per_class)
    classes = torch.arange(dataset.num_classes, device=device).repeat_interleave(per_class)
    if config.pix_init == "noise":
        shape = (config.ipc * dataset.num_classes, dataset.channels, *dataset.image_size)
        images = torch.randn(shape, generator=random).to(device)
    elif config.pix_init == "real":
        images = tiled(dataset.train_images[random_real(dataset, per_class, random).to(device)], config.factor)
    else:
        with watched("choosing images", dataset.num_classes, config.quiet) as advance:
            chosen, said = predicted_correctly(model, experts, dataset, per_class, random, advance)
        notes += said
        images = tiled(dataset.train_images[chosen.to(device)], config.factor)
    samples = cut(images, config.factor)

    if config.labels == "hard":
        labels = classes
    elif config.pix_init == "noise":
        labels = class_labels(model, next(experts()), dataset, per_class, random)
    elif config.pix_init == "real":
        labels = expert_logits(model, buffer.snapshot(0, -1).to(device), samples)
    else:
        with watched("labelling images", len(buffer), config.quiet) as advance:
            labels, unknown = expert_labels(model, experts(), samples, classes, advance)
        if unknown:
            kind = "image" if config.factor == 1 else "smaller image"
            notes.append(f"{number_of(unknown, kind)} that no expert predicts correctly "
                         f"{'has' if unknown == 1 else 'have'} the mean label of all experts")
    lr = math.nan if config.lr_teacher == AUTO else config.lr_teacher
    return DistilledSet(images, labels, torch.tensor(lr)).to("cpu"), notes


def saved_start(config: DistillConfig, dataset: Dataset) -> DistilledSet:
    """The set of `--pix_init FILE`, on the CPU; with `labels: hard`, its labels are classes.

    Raises:
        UserError: it is of another dataset or number of images per class, not sorted by class, or without soft labels
            though they are needed.
    """
    given = f"--pix_init {config.pix_init}"
    distilled = DistilledSet.load(config.pix_init)
    check_classes(distilled, dataset, given)
    distilled = checked_set(distilled, dataset, [given] * 3, factor=config.factor)
    if why := other_space(distilled, dataset):
        raise UserError(f"{given}: {why}; give the --zca and the data that it was made with")
    classes, _ = classes_of(distilled, dataset.num_classes)
    if len(distilled.images) != config.ipc * dataset.num_classes:
        raise UserError(f"{given} holds {number_of(len(distilled.images), 'image')}; --ipc "
                        f"{config.ipc} of {dataset.num_classes} classes are {config.ipc * dataset.num_classes}: give "
                        "the --ipc that it was made with")
    # A new run takes each image's class from its place. A learned label may be largest elsewhere, but not most of them.
    in_place = classes == torch.arange(dataset.num_classes).repeat_interleave(len(classes) // dataset.num_classes)
    if float(in_place.float().mean()) < (0.5 if distilled.labels.is_floating_point() else 1):
        raise UserError(f"{given}: its images are not sorted by class, {config.ipc} of each; sort them")
    if config.labels != "hard" and not distilled.labels.is_floating_point():
        raise UserError(f"{given} holds classes and no soft labels; give a set with soft labels, or --labels hard")
    labels = classes if config.labels == "hard" else distilled.labels
    return DistilledSet(distilled.images, labels, distilled.lr)


def random_real(dataset: Dataset, per_class: int, random: torch.Generator) -> Tensor:
    """Indices [K·per_class] of random training images of each class, classes in order; a class with fewer images
    repeats them."""
    return torch.cat([_repeated(_shuffled(dataset, label, random), per_class)
                      for label in range(dataset.num_classes)])


def predicted_correctly(model: FlatModel, experts: Callable[[], Iterable[Tensor]], dataset: Dataset,
                        per_class: int, random: torch.Generator,
                        advance: Callable[[float], object] = lambda done: None) -> tuple[Tensor, list[str]]:
    """Indices [K·per_class] of training images that an expert predicts correctly, classes in order.

    The images of each class are tried in random order until `per_class` are found; when the class is exhausted, the
    next expert tries the rest. If all experts together find too few, the images with the highest true-class logit of
    the first expert are added.

    Args:
        experts: returns a new iterator over θ [P], on the dataset's device.
        advance: called after each class.

    Returns:
        The indices, and a note if classes had to be filled.
    """
    chosen: list[Tensor] = []
    filled: list[str] = []
    for label in range(dataset.num_classes):
        members: list[int] = []
        left = _shuffled(dataset, label, random)
        for theta in experts():
            wrong = []
            for indices in left.split(WALK):
                right = expert_logits(model, theta, dataset.train_images[indices]).argmax(dim=1).cpu() == label
                members += indices[right].tolist()
                wrong.append(indices[~right])
                if len(members) >= per_class:
                    break
            if len(members) >= per_class:
                break
            left = torch.cat(wrong)
        missing = min(per_class, len(dataset.class_indices(label))) - len(members)
        if missing > 0:
            theta = next(iter(experts()))
            confidence = expert_logits(model, theta, dataset.train_images[left])[:, label].cpu()
            filled.append(f"{dataset.classes[label]}: {len(members)} of {len(members) + missing} wanted")
            members += left[confidence.topk(missing).indices].tolist()
        chosen.append(_repeated(torch.tensor(members), per_class))
        advance(1)
    return torch.cat(chosen), [f"experts predict too few images of {number_of(len(filled), 'class')} correctly "
                               f"({some_of(filled)}); the rest have the class's highest logits"] if filled else []


def expert_labels(model: FlatModel, experts: Iterable[Tensor], images: Tensor, classes: Tensor,
                  advance: Callable[[float], object] = lambda done: None) -> tuple[Tensor, int]:
    """Soft labels: for each image the mean logits of the experts that predict it correctly, or of all if none does.

    Args:
        experts: θ [P] each.
        images: [N, C, H, W].
        classes: the true classes [N].
        advance: called after each expert.

    Returns:
        Label logits [N, K], and the number of images that no expert predicts correctly.
    """
    total = total_right = count = count_right = 0
    for theta in experts:
        logits = expert_logits(model, theta, images)
        right = (logits.argmax(dim=1) == classes)[:, None].to(logits.dtype)
        total, total_right = total + logits, total_right + right * logits
        count, count_right = count + 1, count_right + right
        advance(1)
    by_all = total / count
    labels = torch.where(count_right > 0, total_right / count_right.clamp(min=1), by_all)
    return labels, int((count_right == 0).sum())


def class_labels(model: FlatModel, theta: Tensor, dataset: Dataset, per_class: int,
                 random: torch.Generator) -> Tensor:
    """Labels [K·per_class, K] for noise images: an expert's mean logits over real images of each class."""
    prototypes = [
        expert_logits(model, theta, dataset.train_images[_shuffled(dataset, label, random)[:WALK]]).mean(dim=0)
        for label in range(dataset.num_classes)]
    return torch.stack(prototypes).repeat_interleave(per_class, dim=0)


@torch.no_grad()
def expert_logits(model: FlatModel, theta: Tensor, x: Tensor) -> Tensor:
    """The logits [B, K] of an expert θ [P] for x [B, C, H, W], without a graph."""
    # Expert files hold no running statistics, so batch norm uses those of the batch at hand (published: those of a
    # fresh network, mean 0 and variance 1).
    model.network.train()
    return torch.cat([model(theta, part) for part in x.split(WALK if has_batch_norm(model.network) else
                                                             at_once(x, WALK))])


def _shuffled(dataset: Dataset, label: int, random: torch.Generator) -> Tensor:
    indices = dataset.class_indices(label).cpu()
    return indices[torch.randperm(len(indices), generator=random)]


def _repeated(indices: Tensor, count: int) -> Tensor:
    """The first `count` indices, starting over if there are fewer."""
    return indices[torch.arange(count) % len(indices)]


def notes_on_small_classes(dataset: Dataset, per_class: int) -> list[str]:
    """A note on the classes that have fewer than `per_class` training images, if there are any."""
    sizes = {name: len(dataset.class_indices(label)) for label, name in enumerate(dataset.classes)}
    small = sorted((name for name in sizes if sizes[name] < per_class), key=sizes.__getitem__)
    return [f"{number_of(len(small), 'class')} {'has' if len(small) == 1 else 'have'} fewer than {per_class} training "
            f"images ({small[0]}: {sizes[small[0]]}); some are used more than once"] if small else []
