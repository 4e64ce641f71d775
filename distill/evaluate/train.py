"""The published training of an evaluation: a pure function of a set and where a network starts."""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.data import augment
from utils.data.augment import Drawer
from utils.memory import sent
from utils.parameters import FlatModel

# The published optimiser.
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


def learning_rate(lr: float, epoch: int, epochs: int) -> float:
    """The rate of one epoch: a tenth after epoch `epochs // 2 + 1`."""
    return lr if epoch <= epochs // 2 + 1 else lr * 0.1


def train_network(model: FlatModel, theta: Tensor, images: Tensor, labels: Tensor, lr: float, *, epochs: int,
                  batch_size: int, draw: Drawer, random: torch.Generator,
                  on_epoch: Callable[[], None] = lambda: None) -> Tensor:
    """Trains as the published evaluation does, and returns the θ [P] it ends at.

    SGD with momentum and weight decay, epochs 0..`epochs` inclusive; when the rate drops the optimiser is made
    anew, so its momentum is forgotten. Every batch is augmented.

    Args:
        theta: where it starts.
        images, labels: X [N, C, H, W]; label logits [N, K] or classes [N].
        draw: the augmentation of each batch.
        random: draws the order of the samples and the augmentation.
    """
    model.network.train()
    theta = theta.clone()
    rate = None
    for epoch in range(epochs + 1):
        if rate != learning_rate(lr, epoch, epochs):
            rate = learning_rate(lr, epoch, epochs)
            optimiser = torch.optim.SGD([theta], rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        (order,) = sent([torch.randperm(len(images), generator=random)], images.device)
        for batch in order.split(batch_size):
            drawn = draw(len(batch), random)
            x = augment.apply(images[batch], drawn and drawn.to(images.device))
            _, _, theta.grad = model.gradient(theta, x, labels[batch])
            optimiser.step()
        on_epoch()
    return theta
