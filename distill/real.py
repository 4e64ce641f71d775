"""Real images in the place of a distilled set: what distillation has to beat."""

import torch
from torch import Tensor

from buffer.trajectories import Buffer, buffer_folder, check_same_data, check_same_images, require_experts
from distill.distilled_set import DistilledSet
from distill.evaluate import check_evaluation, check_pool, evaluate_and_report
from distill.initialize import expert_labels, random_real
from utils import parallel
from utils.config import BaselineConfig
from utils.datasets import Dataset, load_configured
from utils.errors import UserError
from utils.networks import network_for
from utils.parameters import FlatModel
from utils.run import generator, spread, start_device


def evaluate_real(config: BaselineConfig) -> None:
    """The whole of `distill/baseline.py`: real images in, accuracies printed and written as JSON.

    Raises:
        UserError: options that do not fit the dataset or the experts.
    """
    check_evaluation(config)
    check_experts(config)
    spread(config)
    device = start_device(config)
    dataset = parallel.first_then_others(lambda: load_configured(config, device))
    check_pool(config, dataset)
    evaluate_and_report(config, dataset, *real_set(config, dataset))


def check_experts(config: BaselineConfig) -> None:
    """Refuses experts that cannot label the images, where they are to.

    Raises:
        UserError
    """
    if config.label_source == "experts":
        if config.ipc is None:
            raise UserError("--label_source experts --ipc None: expert labels are for random images; give --ipc a "
                            "number")
        require_experts(buffer_folder(config))
        check_same_data(buffer_folder(config), config)


def drawn(config: BaselineConfig, dataset: Dataset) -> Tensor:
    """Indices [K·ipc] of the seed's random training images, classes in order.

    Raises:
        UserError: a class has fewer images.
    """
    return random_real(dataset, config.ipc, generator(config.seed, "baseline"))


def real_set(config: BaselineConfig, dataset: Dataset) -> tuple[DistilledSet, str]:
    """Real images as a set, on the dataset's device, and what they are, in words.

    Raises:
        UserError: a class has fewer images; experts of other images, or damaged.
    """
    images, labels, what = dataset.train_images, dataset.train_labels, "the whole training set"
    device = images.device
    if config.ipc is not None:
        chosen = drawn(config, dataset).to(device)
        images, labels, what = images[chosen], labels[chosen], f"{config.ipc} random real images a class"
    if config.label_source == "experts":
        model = FlatModel(network_for(config.model, dataset).to(device))
        check_same_images(buffer_folder(config), dataset)
        buffer = Buffer(buffer_folder(config), model)
        buffer.verify()
        thetas = (buffer.snapshot(number, -1).to(device) for number in range(len(buffer)))
        labels, _ = expert_labels(model, thetas, images, labels)
        what += " with expert labels"
    return DistilledSet(images, labels, torch.tensor(config.lr_teacher, device=device)), what
