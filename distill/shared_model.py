"""A model whose batches are spread over ranks."""

from typing import Any

import torch
from torch import Tensor

from utils.derivatives.engine import Adjoint, Maps, Step
from utils.parameters import FlatModel
from utils.program.ranks import sum_


class SharedModel:
    """A `FlatModel` whose batches are spread over the ranks: each passes its own samples and gets the gradient of the
    whole batch in θ, and that of its own samples in them.

    A rank without samples in a batch passes an empty one. Each call sums one vector of P + 2 numbers over the ranks.
    """

    def __init__(self, model: FlatModel) -> None:
        self.model = model

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None
                 ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `FlatModel.gradient`; the logits are those of this rank's samples, or None if it has none."""
        loss, logits, of_theta = (self.model.gradient(theta, x, y, maps) if len(x)
                                  else (theta.new_zeros(()), None, 0 * theta))
        loss, of_theta, _ = self._mean(len(x), loss, of_theta)
        return loss, logits, of_theta

    def adjoint(self, theta: Tensor, co_state: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None) -> Adjoint:
        """As `FlatModel.adjoint`: s of the whole batch, and its gradients in x and y for this rank's samples."""
        if len(x):
            here = self.model.adjoint(theta, co_state, x, y, maps)
        else:
            of_labels = torch.zeros_like(y) if y.is_floating_point() else None
            here = Adjoint(theta.new_zeros(()), 0 * theta, torch.zeros_like(x), of_labels)
        s, of_theta, samples = self._mean(len(x), here.s, here.theta)
        share = len(x) / samples
        return Adjoint(s, of_theta, here.images * share, None if here.labels is None else here.labels * share)

    def kept_steps(self, batch: int) -> int:
        """As `FlatModel.kept_steps`."""
        return self.model.kept_steps(batch)

    def keep(self, **tensors: Tensor) -> dict[str, Tensor]:
        """As `FlatModel.keep`."""
        return tensors

    def run(self, name: Any, step: Step, kept: dict[str, Tensor], batch: Tensor, *inputs: Tensor) -> Any:
        """As `FlatModel.run`, but never captured, because of the sums over ranks."""
        return step(self, kept, batch, *inputs)

    @staticmethod
    def _mean(samples: int, scalar: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means over all ranks, weighted by their numbers of samples, and the total number of samples."""
        weighted = torch.cat([vector * samples, (scalar * samples).reshape(1), vector.new_full((1,), samples)])
        sum_(weighted)
        total = weighted[-1]
        return weighted[-2] / total, weighted[:-2] / total, total
