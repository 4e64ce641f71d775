"""Train experts and save the whole trajectory of their parameters (MTT, section 3.1; FTD, section 3.3)."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buffer.curriculum import Curriculum
from buffer.gsam import gsam_gradient
from utils import files
from utils.config import BufferConfig
from utils.data import augment
from utils.data.datasets import Dataset
from utils.derivatives.choose_engine import Work
from utils.errors import UserError
from utils.loss_and_accuracy import accuracy
from utils.parameters import FlatModel, sgd_step
from utils.program import interrupt
from utils.program.prepare import drawer, flat_model, network_for
from utils.program.seeds import generator, seeded


class DivergedError(UserError):
    """An expert's parameters are no longer finite."""


class Epoch(NamedTuple):
    """Loss and accuracies of one epoch of an expert; accuracies in [0, 1]."""

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float


class SavedEpochs:
    """The epochs of one expert in training, one file each, from which training resumes.

    Epoch 0 is the initialisation. A file holds θ and all else that the next epoch needs: the momentum, batch norm's
    running statistics, and `FlatModel.state`.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __len__(self) -> int:
        """The number of consecutive files, including the initialisation."""
        return next(number for number in itertools.count() if not self._path(number).exists())

    @property
    def done(self) -> int:
        """The number of training epochs done."""
        return max(0, len(self) - 1)

    def __getitem__(self, epoch: int) -> dict[str, Any]:
        return files.load(self._path(epoch), "file of an unfinished expert", mmap=True,
                          advice="delete it, and training resumes from the epoch before")

    def save(self, epoch: int, theta: Tensor, velocity: Tensor | None, model: FlatModel,
             reached: Epoch | None) -> None:
        files.save({"theta": theta.cpu(), "momentum": None if velocity is None else velocity.cpu(),
                    "buffers": {name: each.cpu() for name, each in model.network.named_buffers()},
                    "derivatives": model.state(), "reached": reached and reached._asdict()}, self._path(epoch))

    def snapshots(self) -> Tensor:
        """θ after every epoch, [E+1, P]."""
        return torch.stack([self[epoch]["theta"] for epoch in range(len(self))])

    def reached(self) -> list[dict[str, Any]]:
        """Each epoch's loss and accuracies (`Epoch`), from the first epoch."""
        return [self[epoch]["reached"] for epoch in range(1, len(self))]

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch}.pt"


def train_expert(config: BufferConfig, dataset: Dataset, number: int, saved: SavedEpochs,
                 report: Callable[[Epoch], None] = lambda epoch: None, curriculum: Curriculum | None = None,
                 progress: Callable[[float], None] = lambda done: None) -> None:
    """Trains the expert with this number; the same seed and number give the same expert.

    Args:
        saved: holds the initialisation and every epoch; training resumes from the last one.
        report: called after every epoch, and once for the last one that is already saved.
        curriculum: PAD's choice of each epoch's images; None: all of them.
        progress: called after every batch with the number of epochs done, as a fraction.

    Raises:
        DivergedError: the parameters are no longer finite after an epoch.
        UserError: a saved epoch is damaged.
        Stopped: a signal came; the finished epochs are saved.
    """
    device = dataset.device
    with seeded(config.seed, "expert", number):
        network = network_for(config.model, dataset)
    model = flat_model(config, network.to(device), work_of(config, dataset), config.micro_batch)
    draw = drawer(config, dataset, augment.OLDER_FOR_EXPERTS)

    theta = model.flatten()
    velocity = torch.zeros_like(theta) if config.mom else None
    first = _restore(saved, theta, velocity, model, report)
    kept = kept_of(model, theta, velocity)
    theta, velocity = kept["theta"], kept.get("velocity")
    for epoch in range(first, config.train_epochs):
        random = generator(config.seed, "expert", number, "epoch", epoch)
        network.train()
        kept["total_loss"].zero_()
        kept["correct"].zero_()
        images = torch.arange(len(dataset.train_labels)) if curriculum is None else curriculum.indices(epoch)
        batches = images[torch.randperm(len(images), generator=random)].split(config.batch_train)
        for count, (batch, drawn) in enumerate(augment.drawn_ahead(batches, draw, random, device), start=1):
            interrupt.check()
            train_step(config, model, kept, dataset.train_images[batch], dataset.train_labels[batch], drawn)
            progress(epoch + count / len(batches))

        network.eval()
        tested = accuracy(partial(model, theta), dataset.test_images, dataset.test_labels)
        if not theta.isfinite().all():
            rho = f" or --rho_max (now {config.rho_max:g})" if config.rho_max else ""
            raise DivergedError(f"expert {number} diverged in epoch {epoch + 1}: its parameters are no longer finite; "
                                "give another --seed with --resume never, or in another --buffer_path a lower "
                                f"--lr_teacher (now {config.lr_teacher:g}){rho}")
        reached = Epoch(epoch + 1, float(kept["total_loss"]) / len(images), float(kept["correct"]) / len(images),
                        tested)
        saved.save(epoch + 1, theta, velocity, model, reached)
        report(reached)


def kept_of(model: FlatModel, theta: Tensor, velocity: Tensor | None) -> dict[str, Tensor]:
    """The tensors that `train_step` updates: θ [P], the momentum [P] if any, and sums over the samples of an epoch."""
    return model.keep(theta=theta, total_loss=theta.new_zeros(()), correct=theta.new_zeros((), dtype=torch.long),
                      **({} if velocity is None else {"velocity": velocity}))


def train_step(config: BufferConfig, model: FlatModel, kept: dict[str, Tensor], x: Tensor, y: Tensor,
               drawn: augment.Draw) -> None:
    """One GSAM step on a batch [B, C, H, W], augmented as drawn; one CUDA graph if the engine is captured."""
    def step(engine, kept, x, y, *parameters):
        x = augment.apply(x, drawn.with_tensors(parameters))
        loss, logits, direction = gsam_gradient(engine, kept["theta"], x, y, config.rho_max, config.alpha,
                                                config.adaptive, model.network)
        sgd_step(kept["theta"], direction, kept.get("velocity"), config.lr_teacher, config.mom, config.l2)
        kept["total_loss"] += loss * len(x)
        kept["correct"] += (logits.argmax(dim=1) == y).sum()

    model.run(("descend", drawn.operations), step, kept, x, y, *drawn.tensors)


def _restore(saved: SavedEpochs, theta: Tensor, velocity: Tensor | None, model: FlatModel,
             report: Callable[[Epoch], None]) -> int:
    """Restores the last saved epoch, or saves the initialisation; returns the number of epochs done."""
    if not len(saved):
        saved.save(0, theta, velocity, model, None)
    if reached := saved.reached():  # all are read, so that a damaged one is found now
        report(Epoch(**reached[-1]))
    state = saved[saved.done]
    theta.copy_(state["theta"])
    if velocity is not None:
        velocity.copy_(state["momentum"])
    for name, each in model.network.named_buffers():
        each.copy_(state["buffers"][name])
    if "derivatives" in state:  # else of an earlier version
        model.restore(state["derivatives"])
    return saved.done


def work_of(config: BufferConfig, dataset: Dataset) -> Work:
    """The work of one expert: it selects the engine, which must not depend on how many experts are trained (the number
    of threads may)."""
    passes = 2 if config.rho_max else 1
    return Work(gradients=passes * len(dataset.train_labels) * config.train_epochs)
