"""The published training of an evaluation: a pure function of a set and the initial parameters."""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.data import augment
from utils.data.augment import Drawer
from utils.parameters import FlatModel, sgd_step

# The published optimiser.
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


def learning_rate(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of one epoch: `lr`, and a tenth of it after epoch `epochs // 2 + 1`."""
    return lr if epoch <= epochs // 2 + 1 else lr * 0.1


def train_network(model: FlatModel, theta: Tensor, images: Tensor, labels: Tensor, lr: float, *, epochs: int,
                  batch_size: int, draw: Drawer, random: torch.Generator,
                  on_epoch: Callable[[], None] = lambda: None) -> Tensor:
    """Trains as the published evaluation does, and returns the final θ [P].

    SGD with momentum and weight decay, epochs 0..`epochs` inclusive. The momentum is reset when the rate drops, as the
    published code makes a new optimiser. Every batch is augmented.

    Args:
        theta: the initial parameters [P].
        images, labels: X [N, C, H, W]; label logits [N, K] or classes [N].
        draw: the augmentation of each batch.
        random: draws the order of the samples and the augmentation.
    """
    model.network.train()
    kept = model.keep(theta=theta.clone(), velocity=torch.zeros_like(theta))
    rate = None
    for epoch in range(epochs + 1):
        if rate != learning_rate(lr, epoch, epochs):
            rate = learning_rate(lr, epoch, epochs)
            kept["velocity"].zero_()
        batches = torch.randperm(len(images), generator=random).split(batch_size)
        for batch, drawn in augment.drawn_ahead(batches, draw, random, images.device):
            def step(model, kept, x, y, *parameters, drawn=drawn, rate=rate):
                x = augment.apply(x, drawn.with_tensors(parameters))
                _, _, gradient = model.gradient(kept["theta"], x, y)
                sgd_step(kept["theta"], gradient, kept["velocity"], rate, MOMENTUM, WEIGHT_DECAY)

            model.run(("descend", rate, drawn.operations), step, kept, images[batch], labels[batch], *drawn.tensors)
        on_epoch()
    return kept["theta"].clone()
