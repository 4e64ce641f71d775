"""Runs twenty distillation iterations in float64 on made-up experts, as a single process or under torchrun.

    [torchrun --nproc_per_node=N] tests/ranks_worker.py FILE IMAGES MATCHING FACTOR [BACKEND]
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from distill import suggest
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from utils.config import DistillConfig, make
from utils.networks import build_network
from utils.parameters import FlatModel
from utils.program import ranks


class MadeUpBuffer:
    """Three experts whose trajectories are straight lines."""

    epochs = 9

    def __init__(self, backend: str = "eager") -> None:
        self.model = FlatModel(build_network("ConvNetD1W4", 1, 3, (8, 8)).double(), backend)
        random = torch.Generator().manual_seed(0)
        shape = 3, self.model.num_parameters
        self.starts, self.ways = (size * torch.randn(shape, generator=random, dtype=torch.float64)
                                  for size in (0.1, 0.02))

    def __len__(self) -> int:
        return 3

    def snapshot(self, number: int, epoch: int) -> torch.Tensor:
        return self.starts[number] + epoch * self.ways[number]

    def walk_order(self, random: torch.Generator) -> list[int]:
        return torch.randperm(3, generator=random).tolist()


def main(path: str, images: str, matching: str, factor: str, backend: str = "eager") -> None:
    ranks.start(torch.device("cpu"))
    random = torch.Generator().manual_seed(1)
    start = DistilledSet(torch.randn(int(images), 1, 8, 8, generator=random, dtype=torch.float64),
                         torch.randn(int(images) * int(factor)**2, 3, generator=random, dtype=torch.float64),
                         torch.tensor(0.05, dtype=torch.float64))
    config = make(DistillConfig, matching=matching, syn_steps=5, batch_syn=4, max_start_epoch=4, threshold="inf",
                  Sequential_Generation=False, lr_img=10.0, lr_lr=1e-4, ema=True, factor=factor)
    dataset = SimpleNamespace(image_size=(8, 8), device=start.images.device)
    buffer = MadeUpBuffer(backend)
    state = Distillation(config, dataset, buffer, start)
    measured = suggest.measured(config, dataset, buffer, start, [1, 2], [3, 5], [0.01, 0.1], [0, 7])
    rates = suggest.fitting_rates(config, dataset, buffer, start)
    losses = []
    for iteration in range(20):
        segment = state.draw(iteration)
        losses.append(state.learn(iteration, segment, state.match(segment)).loss)
    fixed = state.fixed_loss(state.set)
    if ranks.first():
        torch.save({"images": state.set.images, "labels": state.set.labels, "lr": state.set.lr, "ema": state.ema,
                    "momentum": state.velocity["images"], "labels' momentum": state.velocity["labels"],
                    "measured": torch.tensor(measured.values), "rates": torch.tensor([*rates.values()]),
                    "losses": torch.tensor(losses), "fixed": torch.tensor(fixed)}, path)
    ranks.barrier()
    ranks.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
