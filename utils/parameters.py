"""A network as a function of one flat parameter vector θ."""

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from utils.derivatives.choose_engine import NOTHING, Work, select_engine
from utils.derivatives.engine import Adjoint, Captured, Engine, Maps, Step, describe_engine
from utils.errors import note
from utils.memory import available
from utils.networks import has_batch_norm

Result = TypeVar("Result")
MOST_FOR_MAPS = 1 << 30  # bytes
SHARE_FOR_MAPS = 1 / 16  # of the available memory; other processes of this run need some too


class FlatModel:
    """`model(theta, x)`: the network's forward pass with the parameters taken from θ.

    θ is the concatenation of the flattened parameters in `parameters()` order (the order of the published
    expert files). The wrapped network's own parameters are never changed; its buffers are shared. The gradient of
    parameters without effect, such as a convolution's bias before instance norm, may be exactly zero; then only
    weight decay moves them.

    Args:
        network: any `nn.Module`, on its device; it keeps the mode (train or eval) it is in.
        backend, precision, micro_batch, work: how derivatives are computed; see `select_engine` in
            `utils.derivatives.choose_engine`.

    Raises:
        UserError: the network or the machine does not support these options.
    """

    def __init__(self, network: nn.Module, backend: str = "eager", precision: str = "auto",
                 micro_batch: int | None = None, work: Work = NOTHING):
        self.network = network
        self.names = [name for name, _ in network.named_parameters()]
        self.shapes = [parameter.shape for parameter in network.parameters()]
        self.num_parameters = sum(map(math.prod, self.shapes))
        # Not bound methods: the reference cycle would keep model and engine alive until garbage collection.
        self.engine: Engine = select_engine(network, partial(_forward, network, self.names, self.shapes),
                                            partial(_unflatten, self.shapes), backend, precision, micro_batch, work)
        self._asked = micro_batch

    def flatten(self) -> Tensor:
        """The network's own parameters as a new vector [P], detached."""
        return flatten(list(self.network.parameters()))

    def unflatten(self, theta: Tensor) -> list[Tensor]:
        """Views of θ [P] in the parameters' shapes, in `parameters()` order."""
        return _unflatten(self.shapes, theta)

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """x [B, C, H, W] → logits [B, K], differentiable in θ and x to any order."""
        return _forward(self.network, self.names, self.shapes, theta, x)

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None
                 ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean cross entropy L(θ; x, y), the logits [B, K] and ∇L [P], all detached.

        Args:
            x, y: images [B, C, H, W]; label logits [B, K] or classes [B].
            maps: an empty list to fill with activations that `adjoint` reuses; None: keep none. See `kept_steps`.
        """
        return self._fitted(len(x), lambda: self.engine.gradient(theta, x, y, maps))

    def adjoint(self, theta: Tensor, co_state: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None) -> Adjoint:
        """s = ⟨∇L(θ; x, y), λ⟩ and its gradients in θ, x and y, all detached; `co_state` is λ [P].

        Args:
            maps: the list that `gradient` filled at the same θ, x and y; emptied here.
        """
        return self._fitted(len(x), lambda: self.engine.adjoint(theta, co_state, x, y, maps))

    def kept_steps(self, batch: int) -> int:
        """For how many steps of this batch size saved activations fit in memory. Affects time and memory only; results
        are bit-identical."""
        bytes_of_step = batch * self.engine.map_bytes
        return int(self._room_for_maps // bytes_of_step) if bytes_of_step else 0

    @cached_property
    def _room_for_maps(self) -> float:
        return min(MOST_FOR_MAPS, SHARE_FOR_MAPS * available())

    def keep(self, **tensors: Tensor) -> dict[str, Tensor]:
        """The tensors, for steps of `run` to modify in place. If steps are replayed from CUDA graphs: copies in the
        model's own memory, valid until the next call."""
        return self.engine.keep(**tensors) if isinstance(self.engine, Captured) else tensors

    def run(self, name: Any, step: Step, kept: dict[str, Tensor], batch: Tensor, *inputs: Tensor) -> Any:
        """`step(model, kept, batch, *inputs)`, replayed whole from one CUDA graph if the engine is captured.

        Args:
            name: identifies the step; must cover all it depends on besides the shapes of its inputs.
            step: modifies `kept` only after everything else, so that it can be retried when memory is full; its `model`
                provides `gradient` and `adjoint`.
            kept: from `keep`.
            batch: indices [B], or the samples themselves.
        """
        if not isinstance(self.engine, Captured):
            return step(self, kept, batch, *inputs)
        return self._fitted(len(batch), lambda: self.engine.run(name, step, kept, batch, *inputs))

    def state(self) -> dict[str, Any]:
        """What the rounding of later derivatives depends on besides their inputs, for `restore`: the micro-batch, which
        may have been halved, and the sizes that are compiled, which are the first ones that were met."""
        return {"engine": self.engine.name, "asked": self._asked, "micro_batch": self.engine.micro_batch,
                "compiled": sorted(self.engine.compiled_sizes)}

    def restore(self, state: dict[str, Any]) -> None:
        """Makes rounding continue as in the run that saved `state`; ignored if engine or `micro_batch` differ."""
        if (state["engine"], state["asked"]) == (self.engine.name, self._asked):
            self.engine.micro_batch = state["micro_batch"]
            self.engine.compiled_sizes.update(state["compiled"])

    def _halve(self, batch: int) -> bool:
        """Halves the micro-batch that a batch of this size uses from now on; False if that is impossible."""
        most = min(self.engine.micro_batch or batch, batch)
        if most == 1 or has_batch_norm(self.network):
            return False
        self.engine.micro_batch = math.ceil(most / 2)
        return True

    def _fitted(self, batch: int, step: Callable[[], Result]) -> Result:
        """Runs the step, and again with half the micro-batch for as long as the GPU's memory is full."""
        while True:
            try:
                return step()
            except torch.OutOfMemoryError as error:
                full = error.with_traceback(None)  # its frames would keep the step's tensors alive
            if not self._halve(batch):
                raise full
            torch.cuda.empty_cache()
            note(f"the GPU's memory is full; from here on {describe_engine(self.engine, batch)}")


def sgd_step(theta: Tensor, gradient: Tensor, velocity: Tensor | None, lr: float, momentum: float = 0.0,
             weight_decay: float = 0.0) -> None:
    """One in-place step of SGD, bit-identical to torch.optim.SGD; it can be captured in a CUDA graph.

    Args:
        theta, gradient: θ and ∇L [P].
        velocity: the momentum buffer [P], initially zero; None: no momentum.
    """
    if weight_decay:
        gradient = gradient.add(theta, alpha=weight_decay)
    if velocity is not None:
        gradient = velocity.mul_(momentum).add_(gradient)
    theta.add_(gradient, alpha=-lr)


def flatten(parameters: list[Tensor]) -> Tensor:
    """Tensors of any shapes → one new vector [P]."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def _unflatten(shapes: list[torch.Size], theta: Tensor) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(theta.split([math.prod(shape) for shape in shapes]), shapes)]


def _forward(network: nn.Module, names: list[str], shapes: list[torch.Size], theta: Tensor, x: Tensor) -> Tensor:
    return functional_call(network, dict(zip(names, _unflatten(shapes, theta))), (x,))
