"""Engines for a step's derivatives: autograd or hand-written, compiled or captured; see choose_engine.py.

An engine computes the two kinds of derivatives that training, matching and evaluation need:

    gradient(θ, x, y)    → (L, logits, ∇L)
    adjoint(θ, λ, x, y)  → (s, ∂s/∂θ, ∂s/∂x, ∂s/∂y)   of s = ⟨∇L(θ; x, y), λ⟩

`Autograd` computes both for every network and is the reference; `HandWritten` covers ConvNets, compiled
(`convnet_pass`) or not (`eager_pass`). Both can split a batch into micro-batches, which is exact: networks without
batch norm treat samples independently, so the loss is a weighted sum over the parts. `Captured` replays either from
CUDA graphs.
"""

import contextlib
import gc
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from utils.derivatives.convnet_pass import ConvNetPass
from utils.derivatives.eager_pass import BlockMaps, EagerPass
from utils.errors import note, shortened
from utils.loss_and_accuracy import cross_entropy


class Adjoint(NamedTuple):
    """s = ⟨∇L, λ⟩ and its gradients; `labels` is None for hard labels."""

    s: Tensor
    theta: Tensor
    images: Tensor
    labels: Tensor | None


Maps = list[BlockMaps]
"""What a gradient saves for the adjoint of the same step, per micro-batch and in order; the adjoint consumes it."""


class Engine(Protocol):
    """Shapes: θ, λ [P]; x [B, C, H, W]; y label logits [B, K] or classes [B]. Everything returned is detached."""

    name: str
    micro_batch: int | None  # samples at a time; None: all
    compiled_sizes: set[int]  # sizes of micro-batches with compiled derivatives
    map_bytes: int  # bytes per sample that a gradient may save for its adjoint; 0: it saves nothing

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None
                 ) -> tuple[Tensor, Tensor, Tensor]: ...

    def adjoint(self, theta: Tensor, co_state: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None) -> Adjoint: ...


def describe_engine(engine: Engine, batch: int) -> str:
    """The engine in words, for batches of this size."""
    most = max(equal_parts(batch, engine.micro_batch))
    return f"{engine.name}, {f'micro-batch {most} of {batch}' if most < batch else f'batch {batch}'}"


def equal_parts(batch: int, most: int | None) -> list[int]:
    """Sizes of micro-batches of at most `most` samples.

    Equal if that takes less than twice the smallest number of micro-batches, since compiled and captured code then
    sees a single shape; else sizes that differ by one.
    """
    fewest = 1 if most is None else math.ceil(batch / most)
    for number in range(fewest, 2 * fewest):
        if batch % number == 0:
            return [batch // number] * number
    return [batch // fewest + (part < batch % fewest) for part in range(fewest)]


PartResult = tuple[Any, Sequence[Tensor]]
"""The results for one micro-batch: a tree of means over its samples, and tensors with one row per sample."""


def _in_parts(part: Callable[[Tensor, Tensor], PartResult], x: Tensor, y: Tensor, most: int | None
              ) -> tuple[Any, Sequence[Tensor]]:
    """Calls `part` on each micro-batch: the means over the whole batch, and the rows of each tensor, concatenated."""
    sizes = equal_parts(len(x), most)
    if len(sizes) == 1:
        return part(x, y)
    total, rows = None, []
    for x_part, y_part in zip(x.split(sizes), y.split(sizes)):
        means, of_samples = part(x_part, y_part)
        total = _add(total, means, len(x_part) / len(x))
        rows.append(of_samples)
    return total, [torch.cat(pieces) for pieces in zip(*rows)]


def _scaled(rows: Sequence[Tensor], share: float) -> Sequence[Tensor]:
    return rows if share == 1 else [each * share for each in rows]


class Autograd:
    """For every network: autograd, with reverse over reverse for the adjoint.

    Args:
        forward: (θ, x) → logits.
        micro_batch: samples at a time; None: all.
        dtype: run the network in this type by autocast.
    """

    name = "autograd"
    map_bytes = 0

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], micro_batch: int | None,
                 dtype: torch.dtype | None) -> None:
        self.forward, self.micro_batch, self.dtype = forward, micro_batch, dtype
        self.compiled_sizes = set[int]()

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None
                 ) -> tuple[Tensor, Tensor, Tensor]:
        def part(x: Tensor, y: Tensor) -> PartResult:
            leaf = theta.detach().requires_grad_()
            logits, loss = self._loss(leaf, x, y)
            (of_theta,) = torch.autograd.grad(loss, leaf)
            return (loss.detach(), of_theta), (logits.detach(),)

        (loss, of_theta), (logits,) = _in_parts(part, x.detach(), y.detach(), self.micro_batch)
        return loss, logits, of_theta

    def adjoint(self, theta: Tensor, co_state: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None) -> Adjoint:
        soft = y.is_floating_point()

        def part(x_part: Tensor, y_part: Tensor) -> PartResult:
            leaves = [theta.detach().requires_grad_(), x_part.detach().requires_grad_()]
            if soft:
                leaves.append(y_part.detach().requires_grad_())
            _, loss = self._loss(*leaves[:2], leaves[2] if soft else y_part)
            (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
            s = torch.dot(gradient, co_state)
            s_theta, *of_samples = torch.autograd.grad(s, leaves)
            return (s.detach(), s_theta), _scaled(of_samples, len(x_part) / len(x))

        sums, (s_x, *s_y) = _in_parts(part, x.detach(), y.detach(), self.micro_batch)
        return Adjoint(*sums, s_x, s_y[0] if soft else None)

    def _loss(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, self.dtype) if self.dtype else contextlib.nullcontext():
            logits = self.forward(theta, x)
        logits = logits.to(x.dtype)
        return logits, cross_entropy(logits, y)


MOST_SIZES = 8  # of micro-batches that are compiled; with PAD's curriculum, each epoch has another last batch


class HandWritten:
    """For ConvNets: `ConvNetPass` or `EagerPass`.

    Args:
        network_pass: the pass; its `gradient` and `adjoint` are pure functions.
        unflatten: θ [P] → tensors in `parameters()` order.
        micro_batch: samples at a time; None: all.
        compiled: compile both functions.
    """

    def __init__(self, network_pass: ConvNetPass | EagerPass, unflatten: Callable[[Tensor], list[Tensor]],
                 micro_batch: int | None = None, compiled: bool = False) -> None:
        self.network_pass, self.unflatten, self.micro_batch = network_pass, unflatten, micro_batch
        self.name = "hand-written, compiled" if compiled else "hand-written"
        self.map_bytes = network_pass.map_bytes
        self.compiled_sizes, self._compiles = set[int](), compiled
        # Enough for all networks and shapes of a run; torch keeps the setting per thread.
        if compiled:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    @torch.no_grad()
    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None
                 ) -> tuple[Tensor, Tensor, Tensor]:
        weights = self._lift(theta)

        def part(x: Tensor, y: Tensor) -> PartResult:
            gradient, _ = self._derivatives(len(x))
            loss, logits, of_weights, *left = gradient(weights, x, y)
            if maps is not None:
                maps.extend(left)
            return (loss, of_weights), (logits,)

        (loss, of_weights), (logits,) = _in_parts(part, x, y, self.micro_batch)
        return loss, logits, self.network_pass.lower(of_weights)

    @torch.no_grad()
    def adjoint(self, theta: Tensor, co_state: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None) -> Adjoint:
        weights, tangents = self._lift(theta), self._lift(co_state)

        def part(x_part: Tensor, y_part: Tensor) -> PartResult:
            left = [maps.pop(0)] if maps else []
            _, adjoint = self._derivatives(len(x_part))
            s, of_weights, *of_samples = adjoint(weights, tangents, x_part, y_part, *left)
            return (s, of_weights), _scaled([each for each in of_samples if each is not None], len(x_part) / len(x))

        (s, of_weights), (s_x, *s_y) = _in_parts(part, x, y, self.micro_batch)
        assert not maps, "the gradient went through more micro-batches than its adjoint"
        return Adjoint(s, self.network_pass.lower(of_weights), s_x, s_y[0] if s_y else None)

    def _derivatives(self, samples: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Gradient and adjoint for micro-batches of this size: compiled, unless many other sizes were."""
        if self._compiles and (samples in self.compiled_sizes or len(self.compiled_sizes) < MOST_SIZES):
            self.compiled_sizes.add(samples)
            return _compiled(self.network_pass)
        return self.network_pass.gradient, self.network_pass.adjoint

    def _lift(self, theta: Tensor) -> Any:
        return self.network_pass.lift(self.unflatten(theta))


@cache
def _compiled(network_pass: ConvNetPass) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both derivatives, compiled once per pass."""
    return tuple(map(quietly_compiled, (network_pass.gradient, network_pass.adjoint)))


def quietly_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call, for fixed shapes: that is faster, and a run has few shapes."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns on every machine without a GPU
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores for float32 matrix multiplication")  # see --precision
    return torch.compile(function, fullgraph=True, dynamic=False)


shared_pass = cache(ConvNetPass)
"""One pass for all networks of the same plan, so that an evaluation of ten networks compiles only once."""


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures on a GPU, since libraries keep memory for every stream they have used."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Disables garbage collection during a capture, which would fail if an old graph or compiled module were freed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


Step = Callable[..., Any]
"""(engine, kept tensors by name, *inputs) → a tree of tensors; it may modify the kept tensors in place."""


class Captured:
    """Replays an engine's calls from CUDA graphs, one graph per kind of call and input shapes.

    A replay launches all kernels of a call at once. Results are copied out of the graph's own memory, so that they stay
    valid after the next call. If a capture fails, a note is printed and all later calls run without graphs.
    """

    map_bytes = 0  # a graph has its own memory

    def __init__(self, engine: Engine) -> None:
        self.engine, self.compiled_sizes = engine, engine.compiled_sizes
        self.name = f"{engine.name}, captured"
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}
        self._kept: dict[Any, Tensor] = {}
        self._pool: Any = None
        self._refused = False

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None
                 ) -> tuple[Tensor, Tensor, Tensor]:
        return self.run("gradient", lambda engine, kept, *given: engine.gradient(*given), {}, theta, x, y)

    def adjoint(self, theta: Tensor, co_state: Tensor, x: Tensor, y: Tensor, maps: Maps | None = None) -> Adjoint:
        return self.run("adjoint", lambda engine, kept, *given: engine.adjoint(*given), {}, theta, co_state, x, y)

    @property
    def micro_batch(self) -> int | None:
        return self.engine.micro_batch

    @micro_batch.setter
    def micro_batch(self, most: int | None) -> None:
        self._graphs.clear()  # also frees their memory
        self._pool = None
        self.engine.micro_batch = most

    def keep(self, **tensors: Tensor) -> dict[str, Tensor]:
        """The tensors copied into memory that is the same for every graph; see `FlatModel.keep`."""
        keys = {name: (name, each.shape, each.dtype, each.device) for name, each in tensors.items()}
        for name, key in keys.items():
            if key not in self._kept:
                self._kept[key] = torch.empty_like(tensors[name])
        kept = {name: self._kept[key] for name, key in keys.items()}
        _copy(kept.values(), tensors.values())
        return kept

    def run(self, name: Any, function: Step, kept: dict[str, Tensor], *inputs: Tensor) -> Any:
        """See `FlatModel.run`."""
        key = (name, *(each.data_ptr() for each in kept.values()),
               *((each.shape, each.dtype, each.device) for each in inputs))
        if key not in self._graphs and not self._refused:
            with torch.cuda.device(inputs[0].device):
                captured = self._capture(function, kept, inputs)
            if captured is None:
                self._refused, self.name = True, self.engine.name
                self._graphs.clear()
            else:
                self._graphs[key] = captured
        if self._refused:
            return function(self.engine, kept, *inputs)
        graph, held, outputs = self._graphs[key]
        _copy(held, [each.detach() for each in inputs])
        graph.replay()
        leaves, form = pytree.tree_flatten(outputs)
        own = [each if each is None else torch.empty_like(each) for each in leaves]
        _copy(*([each for each in some if each is not None] for some in (own, leaves)))
        return pytree.tree_unflatten(own, form)

    def _capture(self, function: Step, kept: dict[str, Tensor], inputs: Sequence[Tensor]
                 ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any] | None:
        """The graph, its inputs and its outputs; None, after printing a note, if the capture fails."""
        held = [each.detach().clone() for each in inputs]
        stream, current = _capture_stream(inputs[0].device), torch.cuda.current_stream()
        # The first calls choose algorithms, compile and allocate, none of which can be captured.
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(self.engine, {name: each.clone() for name, each in kept.items()}, *held)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Before torch 2.15, a failed capture leaves its stream as the current one.
            with torch.cuda.stream(current), _no_garbage_collected(), torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                outputs = function(self.engine, kept, *held)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the same calls have just succeeded uncaptured
            note("not replayed from CUDA graphs, since the capture failed: "
                 f"{shortened(str(error.__context__ or error).splitlines()[0])}")
            return None
        self._pool = graph.pool()
        return graph, held, outputs


def _copy(to: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copies all tensors at once, with one kernel per dtype."""
    pairs = sorted(zip(to, values), key=lambda pair: str(pair[0].dtype))
    for _, some in itertools.groupby(pairs, key=lambda pair: pair[0].dtype):
        torch._foreach_copy_(*map(list, zip(*some)))


def _add(total: Any, part: Any, share: float) -> Any:
    """total + share · part, over trees of tensors; a total of None is zero."""
    if total is None:
        return pytree.tree_map_only(Tensor, lambda each: each * share, part)
    return pytree.tree_map(lambda old, new: None if old is None else old.add_(new, alpha=share), total, part)
