"""Train experts and keep the whole trajectory of their parameters (MTT, section 3.1; FTD, section 3.3)."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from buffer.curriculum import Curriculum
from buffer.gsam import gsam_gradient
from utils import files
from utils.config import BufferConfig
from utils.data import augment
from utils.data.datasets import Dataset
from utils.derivatives.choose_engine import Work
from utils.errors import UserError
from utils.loss_and_accuracy import accuracy, count_correct
from utils.memory import sent
from utils.parameters import FlatModel
from utils.program import interrupt
from utils.program.prepare import drawer, flat_model, network_for
from utils.program.seeds import generator, seeded


class DivergedError(UserError):
    """An expert's parameters are no longer finite."""


class Epoch(NamedTuple):
    """What one epoch of an expert reached; accuracies in [0, 1]."""

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float


class SavedEpochs:
    """The epochs of one expert while it is in training: a file each, from which training goes on.

    Epoch 0 is the initialisation. A file holds θ and whatever else the next epoch needs: the momentum, and batch norm's
    running statistics.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __len__(self) -> int:
        """How many follow each other without a gap, the initialisation included."""
        return next(number for number in itertools.count() if not self._path(number).exists())

    @property
    def done(self) -> int:
        """Epochs of training."""
        return max(0, len(self) - 1)

    def __getitem__(self, epoch: int) -> dict[str, Any]:
        return files.load(self._path(epoch), "file of an unfinished expert", mmap=True,
                          advice="delete it, and training goes on from the epoch before")

    def save(self, epoch: int, theta: Tensor, optimiser: torch.optim.Optimizer, network: nn.Module,
             reached: Epoch | None) -> None:
        momentum = optimiser.state.get(theta, {}).get("momentum_buffer")
        files.save({"theta": theta.detach().cpu(), "momentum": None if momentum is None else momentum.cpu(),
                    "buffers": {name: each.cpu() for name, each in network.named_buffers()},
                    "reached": reached and reached._asdict()}, self._path(epoch))

    def snapshots(self) -> Tensor:
        """θ after every epoch, [E+1, P]."""
        return torch.stack([self[epoch]["theta"] for epoch in range(len(self))])

    def reached(self) -> list[dict[str, Any]]:
        """What each epoch reached, from the first."""
        return [self[epoch]["reached"] for epoch in range(1, len(self))]

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch}.pt"


def train_expert(config: BufferConfig, dataset: Dataset, number: int,
                 report: Callable[[Epoch], None] = lambda epoch: None, curriculum: Curriculum | None = None,
                 saved: SavedEpochs | None = None, progress: Callable[[float], None] = lambda done: None,
                 ) -> tuple[FlatModel, Tensor]:
    """Trains the expert of that number; the same seed and number give the same expert.

    Args:
        report: called after every epoch.
        curriculum: PAD's choice of each epoch's images; None: all of them.
        saved: where every epoch is saved, and from where training goes on; None: nowhere.
        progress: called after every batch with the epochs that are done, in parts of one.

    Returns:
        The network, and the snapshots [train_epochs + 1, P] on the CPU, the first at initialisation.

    Raises:
        DivergedError
        Stopped: a signal came; the finished epochs are saved.
    """
    device = dataset.device
    with seeded(config.seed, "expert", number):
        network = network_for(config.model, dataset)
    model = flat_model(config, network.to(device), work_of(config, dataset), config.micro_batch)
    draw = drawer(config, dataset, augment.OLDER_FOR_EXPERTS)

    theta = model.flatten()
    optimiser = torch.optim.SGD([theta], config.lr_teacher, momentum=config.mom, weight_decay=config.l2)
    snapshots = torch.empty(config.train_epochs + 1, model.num_parameters)
    snapshots[0] = theta
    first = 0 if saved is None else _restore(saved, snapshots, theta, optimiser, network, report)
    for epoch in range(first, config.train_epochs):
        random = generator(config.seed, "expert", number, "epoch", epoch)
        network.train()
        total_loss = torch.zeros((), device=device)
        correct = torch.zeros((), dtype=torch.long, device=device)
        images = torch.arange(len(dataset.train_labels)) if curriculum is None else curriculum.indices(epoch)
        (order,) = sent([images[torch.randperm(len(images), generator=random)]], device)
        batches = order.split(config.batch_train)
        for step, batch in enumerate(batches, start=1):
            interrupt.check()
            drawn = draw(len(batch), random)
            x = augment.apply(dataset.train_images[batch], drawn and drawn.to(device))
            y = dataset.train_labels[batch]
            loss, logits, theta.grad = gsam_gradient(model, theta, x, y, config.rho_max, config.alpha, config.adaptive)
            optimiser.step()
            total_loss += loss * len(batch)
            correct += count_correct(logits, y)
            progress(epoch + step / len(batches))

        snapshots[epoch + 1] = theta
        network.eval()
        tested = accuracy(partial(model, theta), dataset.test_images, dataset.test_labels)
        if not theta.isfinite().all():
            raise DivergedError(f"expert {number} diverged in epoch {epoch + 1}: its parameters are no longer finite; "
                            f"lower --lr_teacher (now {config.lr_teacher:g}) or --rho_max (now {config.rho_max:g})")
        reached = Epoch(epoch + 1, float(total_loss) / len(order), float(correct) / len(order), tested)
        if saved is not None:
            saved.save(epoch + 1, theta, optimiser, network, reached)
        report(reached)
    return model, snapshots


def _restore(saved: SavedEpochs, snapshots: Tensor, theta: Tensor, optimiser: torch.optim.Optimizer,
             network: nn.Module, report: Callable[[Epoch], None]) -> int:
    """Takes up the saved epochs, or saves the initialisation; returns how many there are beside that."""
    if not len(saved):
        saved.save(0, theta, optimiser, network, None)
    for epoch in range(len(saved)):
        state = saved[epoch]
        if state["theta"].shape != snapshots[epoch].shape:
            raise UserError(f"{saved.folder} holds another network; give --resume never to start over")
        snapshots[epoch] = state["theta"]
        if state["reached"]:
            report(Epoch(**state["reached"]))
    theta.copy_(snapshots[len(saved) - 1])
    if state["momentum"] is not None:
        optimiser.state[theta]["momentum_buffer"] = state["momentum"].clone().to(theta)
    for name, each in network.named_buffers():
        each.copy_(state["buffers"][name])
    return len(saved) - 1


def work_of(config: BufferConfig, dataset: Dataset) -> Work:
    """What one expert takes; not all of them, so that their number changes none."""
    passes = 2 if config.rho_max else 1
    return Work(gradients=passes * len(dataset.train_labels) * config.train_epochs)
