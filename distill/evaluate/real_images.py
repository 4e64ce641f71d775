"""`distill/baseline.py`: real images in the place of a distilled set, which distillation has to beat."""

import torch
from torch import Tensor

from buffer.trajectories import Buffer, buffer_folder, check_same_data, check_same_images, require_experts
from distill.distilled_set import DistilledSet
from distill.evaluate.evaluation_run import evaluate_and_say
from distill.evaluate.networks import check_evaluation, check_pool
from distill.initialize import drawn_again, expert_labels, random_real
from utils.config import BaselineConfig
from utils.data.datasets import Dataset
from utils.data.tiles import check_factor, cut, tiled
from utils.errors import UserError
from utils.parameters import FlatModel
from utils.program.prepare import begin, network_for
from utils.program.seeds import generator


def evaluate_real(config: BaselineConfig) -> None:
    """The whole of `distill/baseline.py`: real images in, accuracies printed and written as JSON.

    Raises:
        UserError: options that do not fit the dataset or the experts.
    """
    check_evaluation(config)
    check_experts(config)
    _, dataset = begin(config)
    check_pool(config, dataset)
    check_factor(config.factor, dataset.image_size)
    sets, what = real_sets(config, dataset)
    notes = ["each network is trained on images of its own"] if len(sets) > 1 else []
    notes += drawn_again(dataset, config.ipc * config.factor**2) if config.ipc else []
    evaluate_and_say(config, dataset, sets, what, *notes)


def check_experts(config: BaselineConfig) -> None:
    """Refuses a factor of all images, and experts that cannot label the images, where they are to.

    Raises:
        UserError
    """
    if config.ipc is None and config.factor > 1:
        raise UserError(f"--factor {config.factor} --ipc None: the whole training set is used as it is; give --ipc a "
                        "number")
    if config.label_source == "experts":
        if config.ipc is None:
            raise UserError("--label_source experts --ipc None: expert labels are for random images; give --ipc a "
                            "number")
        require_experts(buffer_folder(config))
        check_same_data(buffer_folder(config), config)


def drawn(config: BaselineConfig, dataset: Dataset) -> list[Tensor]:
    """Indices [K·ipc·f²] of random training images, classes in order; others for each network evaluated, because
    at few images a class the draw weighs more than the initialisation.
    """
    return [random_real(dataset, config.ipc * config.factor**2, generator(config.seed, "baseline", number))
            for number in range(config.num_eval)]


def real_sets(config: BaselineConfig, dataset: Dataset) -> tuple[list[DistilledSet], str]:
    """Real images as sets, on the dataset's device, and what they are, in words.

    Random ones: `num_eval` sets, each drawn anew. The whole training set: one.

    Raises:
        UserError: experts of other images, or damaged.
    """
    images, labels, device = dataset.train_images, dataset.train_labels, dataset.device
    lr = torch.tensor(config.lr_teacher, device=device)
    if config.ipc is None:
        return [DistilledSet(images.to(device), labels, lr)], "the whole training set"
    what = f"{config.ipc} random real images per class"
    chosen = torch.cat(drawn(config, dataset)).to(device)
    images, labels = tiled(images[chosen], config.factor), labels[chosen]
    if config.label_source == "experts":
        model = FlatModel(network_for(config.model, dataset).to(device))
        check_same_images(buffer_folder(config), dataset)
        buffer = Buffer(buffer_folder(config), model)
        buffer.verify()
        thetas = (buffer.snapshot(number, -1).to(device) for number in range(len(buffer)))
        labels, _ = expert_labels(model, thetas, cut(images, config.factor), labels)
        what += " with expert labels"
    if config.factor > 1:
        what += f", factor {config.factor}"
    each_has = config.ipc * dataset.num_classes
    sets = [DistilledSet(*parts, lr) for parts in zip(images.split(each_has),
                                                      labels.split(each_has * config.factor**2))]
    return sets, what
