"""PAD's expert curriculum: which training images an epoch uses, from easy to hard (Li et al., PAD, section 3.2).

An image's difficulty is measured by GraNd (Paul et al., NeurIPS 2021): the norm of the loss gradient for that image
alone, early in training, averaged over networks. PAD's code uses GraNd too, although its paper says EL2N.
"""

import contextlib
import hashlib
import math

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from utils.config import BufferConfig
from utils.data.datasets import Dataset
from utils.errors import UserError, note
from utils.files import cache_folder, load, save
from utils.loss_and_accuracy import cross_entropy
from utils.program.prepare import network_for
from utils.program.progress import Progress
from utils.program.seeds import generator, seeded

NETWORKS = 10  # number of networks over which GraNd is averaged
EPOCHS = 5  # epochs of plain SGD before GraNd is measured
HELD = 1 << 25  # numbers in the gradients that are held at a time, each image having P of them
MOST_AT_ONCE = 64  # images


def epoch_share(epoch: int, config: BufferConfig) -> tuple[float, float]:
    """The share (first, last) of a class's images, sorted from easy to hard, that an epoch uses; epochs count from 0.

    Starts with the easiest `init_ratio` and grows linearly to all images at `add_end_epoch`. From `rm_epoch_first` the
    easiest `rm_easy_ratio_first` are left out, from `rm_epoch_second` the easiest `rm_easy_ratio_second`.
    """
    if epoch < config.add_end_epoch:
        return 0.0, config.init_ratio + (1 - config.init_ratio) * epoch / config.add_end_epoch
    if epoch < config.rm_epoch_first:
        return 0.0, 1.0
    return (config.rm_easy_ratio_first if epoch < config.rm_epoch_second else config.rm_easy_ratio_second), 1.0


class Curriculum:
    """The images of each epoch; `indices(epoch)` → [n], ordered by class.

    Args:
        scores: GraNd of every training image [N]; larger is harder.
    """

    def __init__(self, config: BufferConfig, dataset: Dataset, scores: Tensor):
        self._config = config
        by_class = (dataset.class_indices(label).cpu() for label in range(dataset.num_classes))
        self._classes = [indices[scores[indices].argsort(stable=True)] for indices in by_class]

    def indices(self, epoch: int) -> Tensor:
        first, last = epoch_share(epoch, self._config)
        return torch.cat([easy_to_hard[int(first * len(easy_to_hard)):math.ceil(last * len(easy_to_hard))]
                          for easy_to_hard in self._classes])


def grand_scores(config: BufferConfig, dataset: Dataset) -> Tensor:
    """GraNd of every training image [N] on the CPU, cached per dataset, network, training settings and seed.

    The network must be without batch norm, with which an image's loss depends on the rest of the batch.
    """
    key = (dataset.fingerprint, config.zca, config.model, config.lr_teacher, config.batch_train, config.precision,
           config.seed, NETWORKS, EPOCHS)
    path = cache_folder() / f"grand_{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.pt"
    with contextlib.suppress(UserError):  # a missing or damaged file is made again
        kept = load(path, "GraNd cache file")
        if isinstance(kept, Tensor) and kept.shape == dataset.train_labels.shape and kept.isfinite().all():
            return kept
    scores = torch.zeros(len(dataset.train_labels))
    with Progress(NETWORKS, "GraNd", quiet=config.quiet) as bar:
        for number in range(NETWORKS):
            scores += _grand_of_one(config, dataset, number) / NETWORKS
            bar.update()
    try:
        save(scores, path)
    except UserError as error:
        note(f"GraNd is not kept for the next run: {error} (DATM_CACHE names another folder)")
    return scores


def _grand_of_one(config: BufferConfig, dataset: Dataset, number: int) -> Tensor:
    with seeded(config.seed, "GraNd", number):
        network = network_for(config.model, dataset).to(dataset.device)
    random = generator(config.seed, "GraNd", number)
    optimiser = torch.optim.SGD(network.parameters(), config.lr_teacher)
    for _ in range(EPOCHS):
        order = torch.randperm(len(dataset.train_labels), generator=random).to(dataset.device)
        for batch in order.split(config.batch_train):
            optimiser.zero_grad()
            cross_entropy(network(dataset.train_images[batch]), dataset.train_labels[batch]).backward()
            optimiser.step()

    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(network, parameters, (x[None],)), y[None])

    norms, at_once = [], max(1, min(MOST_AT_ONCE, HELD // sum(map(Tensor.numel, parameters.values()))))
    for x, y in zip(dataset.train_images.split(at_once), dataset.train_labels.split(at_once)):
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
        norms.append(sum(gradient.flatten(1).square().sum(dim=1) for gradient in gradients.values()).sqrt())
    return torch.cat(norms).cpu()
