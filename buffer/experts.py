"""Train experts and keep the whole trajectory of their parameters (MTT, section 3.1; FTD, section 3.3)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from buffer.curriculum import Curriculum, grand_scores
from buffer.gsam import gsam_gradient
from buffer.trajectories import (
    Expert,
    as_expert,
    buffer_folder,
    check_same_data,
    check_same_images,
    count_experts,
    next_file,
)
from utils import augment
from utils.config import BufferConfig
from utils.datasets import Dataset, check_dataset_name, load_configured
from utils.engine import GRADIENT_ALONE, describe_engine
from utils.errors import UserError
from utils.files import save
from utils.metrics import accuracy, count_correct
from utils.networks import check_network_name, network_for
from utils.parameters import FlatModel
from utils.run import (
    Progress,
    announce,
    append_json,
    describe,
    drawer,
    dsa_groups,
    flat_model,
    generator,
    influential,
    save_config,
    seeded,
    shown,
    start_device,
)
from utils.zca import available_memory


class Epoch(NamedTuple):
    """What one epoch of an expert reached; accuracies in [0, 1]."""

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float


def train_expert(config: BufferConfig, dataset: Dataset, number: int, device: torch.device,
                 report: Callable[[Epoch], None] = lambda epoch: None,
                 curriculum: Curriculum | None = None) -> tuple[FlatModel, Tensor]:
    """Trains the expert of that number; the same seed and number give the same expert.

    Args:
        dataset: on `device`.
        report: called after every epoch.
        curriculum: PAD's choice of each epoch's images; None: all of them.

    Returns:
        The network, and the snapshots [train_epochs + 1, P] on the CPU, the first at initialisation.
    """
    with seeded(config.seed, "expert", number):
        network = network_for(config.model, dataset)
    model = flat_model(config, network.to(device), _work(config, dataset), config.micro_batch)
    draw = drawer(config, dataset, augment.OLDER_FOR_EXPERTS)

    theta = model.flatten()
    optimiser = torch.optim.SGD([theta], config.lr_teacher, momentum=config.mom, weight_decay=config.l2)
    snapshots = torch.empty(config.train_epochs + 1, model.num_parameters)
    snapshots[0] = theta
    for epoch in range(config.train_epochs):
        random = generator(config.seed, "expert", number, "epoch", epoch)
        network.train()
        total_loss = torch.zeros((), device=device)
        correct = torch.zeros((), dtype=torch.long, device=device)
        images = torch.arange(len(dataset.train_labels)) if curriculum is None else curriculum.indices(epoch)
        order = images[torch.randperm(len(images), generator=random)].to(device)
        for batch in order.split(config.batch_train):
            drawn = draw(len(batch), random)
            x = augment.apply(dataset.train_images[batch], drawn and drawn.to(device))
            y = dataset.train_labels[batch]
            loss, logits, theta.grad = gsam_gradient(model, theta, x, y, config.rho_max, config.alpha, config.adaptive)
            optimiser.step()
            total_loss += loss * len(batch)
            correct += count_correct(logits, y)

        snapshots[epoch + 1] = theta
        network.eval()
        tested = accuracy(partial(model, theta), dataset.test_images, dataset.test_labels)
        if not theta.isfinite().all():
            raise UserError(f"expert {number} diverged in epoch {epoch + 1}: its parameters are no longer finite; "
                            f"lower --lr_teacher (now {config.lr_teacher:g}) or --rho_max (now {config.rho_max:g})")
        report(Epoch(epoch + 1, float(total_loss) / len(order), float(correct) / len(order), tested))
    return model, snapshots


def _work(config: BufferConfig, dataset: Dataset) -> float:
    """What one expert takes, as engines count it; not all of them, so that their number changes none."""
    passes = 2 if config.rho_max else 1
    return GRADIENT_ALONE * passes * len(dataset.train_labels) * config.train_epochs


def _check_memory(config: BufferConfig, model: FlatModel) -> None:
    """Refuses trajectories that cannot be held until their file is written.

    Raises:
        UserError
    """
    held = min(config.num_experts, config.save_interval)
    need, free = 4 * held * (config.train_epochs + 1) * model.num_parameters, available_memory()
    if free is not None and need > free:
        raise UserError(f"--train_epochs {config.train_epochs} --save_interval {config.save_interval}: {held} experts "
                        f"of {model.num_parameters} parameters are held at a time, which takes {need >> 30} GiB "
                        f"of memory, {free >> 30} GiB is available; give smaller ones")


def train_buffer(config: BufferConfig) -> None:
    """The whole of `buffer/buffer_FTD.py`: trains `num_experts` experts and writes them, `save_interval` to a file.

    Raises:
        UserError: whatever in the config or the data does not fit together.
    """
    if config.rho_max != config.rho_min:
        raise UserError(f"--rho_max {config.rho_max:g} --rho_min {config.rho_min:g}: rho follows the learning rate, "
                        "which is constant here; give both the same value")
    check_dataset_name(config.dataset)  # these two become folders
    check_network_name(config.model)
    dsa_groups(config)
    if config.pad and not config.add_end_epoch <= config.rm_epoch_first <= config.rm_epoch_second:
        raise UserError(f"--add_end_epoch {config.add_end_epoch} --rm_epoch_first {config.rm_epoch_first} "
                        f"--rm_epoch_second {config.rm_epoch_second}: give them in rising order")
    folder = buffer_folder(config)
    check_same_data(folder, config)
    device = start_device(config)
    dataset = load_configured(config, device)
    check_same_images(folder, dataset)
    first = count_experts(folder)  # a second run goes on counting, so that it trains other experts
    # Refuses what cannot be built before anything is printed or written.
    model = flat_model(config, network_for(config.model, dataset).to(device), _work(config, dataset),
                       config.micro_batch)
    _check_memory(config, model)
    path = next_file(folder)
    save_config(path.with_suffix(".yaml"), influential(config) | {"fingerprint": dataset.fingerprint})
    print(f"{config.num_experts} experts of {config.train_epochs} epochs: {config.model} on {config.dataset} "
          f"({len(dataset.train_labels)} images) · {describe(device)}, "
          f"{describe_engine(model.engine, min(config.batch_train, len(dataset.train_labels)))} · {shown(folder)}")
    announce(config)

    curriculum = Curriculum(config, dataset, grand_scores(config, dataset, device)) if config.pad else None
    epochs_path = path.with_suffix(".jsonl")
    waiting: list[Expert] = []

    def write_waiting() -> None:
        if waiting:
            path = next_file(folder)
            save(waiting, path)
            print(f"{len(waiting)} experts in {shown(path)}")
            waiting.clear()

    def train(number: int) -> Expert:
        with Progress(config.train_epochs, f"expert {number}") as bar:
            def report(epoch: Epoch) -> None:
                append_json(epochs_path, {"expert": number, **epoch._asdict()})
                bar.set_postfix_str(f"loss {epoch.loss:.3f}, train {100 * epoch.train_accuracy:.1f} %, "
                                    f"test {100 * epoch.test_accuracy:.1f} %", refresh=False)
                bar.update()
            return as_expert(*train_expert(config, dataset, number, device, report, curriculum))

    try:
        for number in range(first, first + config.num_experts):
            waiting.append(train(number))
            if len(waiting) == config.save_interval:
                write_waiting()
    finally:
        write_waiting()  # the last ones; also when a later one was interrupted or diverged
        if not path.exists():
            path.with_suffix(".yaml").unlink()
            epochs_path.unlink(missing_ok=True)
