"""Chooses the engine for a network's derivatives, the size of its micro-batches and its arithmetic."""

import copy
import functools
import multiprocessing
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.derivatives.convnet_pass import covers
from utils.derivatives.eager_pass import EagerPass, covers_eagerly
from utils.derivatives.engine import (
    Autograd,
    Captured,
    Engine,
    HandWritten,
    quietly_compiled,
    shared_pass,
)
from utils.errors import UserError, note, shortened
from utils.memory import available
from utils.networks import has_batch_norm

# Bytes of activations in a micro-batch on a CPU.
CACHED_BYTES = 24 << 20  # compiled: as much as the cache still serves
EAGER_BYTES = 64 << 20  # not compiled: fewer waits between threads matter more than the cache
PLAIN_BYTES = 128 << 20  # autograd: for its larger kernels
SHARE_OF_MEMORY = 0.7  # of a GPU's free memory that a micro-batch may use
ADJOINT_FACTOR = 6.0  # an adjoint's peak memory over its activations, at most (measured: 5)
# Seconds of uncompiled work above which compiling pays: it takes a minute or two on a CPU, 3 to 14 seconds on a GPU.
COMPILING_PAYS = {"cpu": 600.0, "cuda": 30.0}
# For that estimate, bytes of activations per second through gradient and adjoint: on one CPU core; on an H100, which
# reached 36e9 with 500 images per step, 10e9 with 10, and 53e9 and 24e9 in the gradients of experts and evaluations.
ACTIVATIONS_PER_SECOND = {"cpu": 0.19e9, "cuda": 25e9}
GRADIENT_ALONE = 1 / 3  # a gradient's share of the work of a gradient and its adjoint


class Work(NamedTuple):
    """The amount of computation ahead, in samples times steps."""

    gradients: float = 0.0  # with a gradient only
    matched: float = 0.0  # with a gradient and its adjoint

    @property
    def total(self) -> float:
        """The equivalent amount of matched work."""
        return self.matched + GRADIENT_ALONE * self.gradients


NOTHING = Work()


def select_engine(network: nn.Module, forward: Callable[[Tensor, Tensor], Tensor],
                  unflatten: Callable[[Tensor], list[Tensor]], backend: str, precision: str,
                  micro_batch: int | None, work: Work) -> Engine:
    """The engine for a network, on the network's device.

    Args:
        backend: `plain`: autograd, the reference. `eager`: the hand-written `EagerPass`, for the published ConvNet on a
            CPU. `compile`: the hand-written pass for every ConvNet, compiled; on a GPU also captured. `graph`:
            autograd, replayed from CUDA graphs. `auto`: compile if `work` repays it and there is a compiler; else graph
            on a GPU and eager on a CPU. Networks that a pass does not cover use autograd.
        micro_batch: samples at a time; None: chosen by `micro_batch_for`.
        work: the work ahead; decides whether `auto` compiles.

    Raises:
        UserError: the backend is not available here, or micro-batches are given for a network with batch norm.
    """
    device = next(network.parameters()).device
    check_backend(backend, device)
    if micro_batch is not None and has_batch_norm(network):
        raise UserError(f"--micro_batch {micro_batch}: batch norm ties the samples of a batch together, so that it "
                        "cannot be split; leave --micro_batch out, or take a network without batch norm")
    dtype = torch.bfloat16 if precision == "bf16" else None
    fast = backend != "plain" and covers(network)
    worthwhile = fast and backend == "auto" and (device.type != "cpu" or _compiler()) and repays(network, work)
    compiled = fast and bool(backend == "compile" or (worthwhile and _can_compile(device)))
    engine: Engine
    if compiled:
        size = micro_batch or micro_batch_for(network, CACHED_BYTES)
        network_pass = shared_pass(network.plan, network.image_shape, device, dtype)
        engine = HandWritten(network_pass, unflatten, size, compiled=True)
    elif fast and device.type == "cpu" and dtype is None and covers_eagerly(network):
        size = micro_batch or micro_batch_for(network, EAGER_BYTES)
        engine = HandWritten(EagerPass(network.plan, network.image_shape), unflatten, size)
    else:
        size = micro_batch or micro_batch_for(network, PLAIN_BYTES)
        engine = Autograd(forward, size, dtype)
    # Warm-up calls and replays would corrupt batch norm's running statistics, which change with every call.
    captured = device.type == "cuda" and backend in ("auto", "compile", "graph") and not has_batch_norm(network)
    return Captured(engine) if captured else engine


def activation_bytes(network: nn.Module) -> int:
    """Bytes of the outputs of all layers for one image, in float32.

    The network must come from `build_network`, which records the shape of its images.
    """
    # Not on the meta device: torch would import its compiler, which takes seconds. The values do not matter.
    network_copy = copy.deepcopy(network).to_empty(device="cpu").eval()
    elements: list[int] = []
    for module in network_copy.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: elements.append(output.numel()))
    with torch.no_grad():
        network_copy(torch.zeros(1, *network.image_shape, dtype=next(network_copy.parameters()).dtype))
    return 4 * sum(elements)


def micro_batch_for(network: nn.Module, cpu_bytes: int) -> int | None:
    """Samples at a time: on a CPU those whose activations take `cpu_bytes`; on a GPU as many as fit its free memory.

    None if a batch cannot be split, or if the shape of the network's images is unknown.
    """
    if has_batch_norm(network) or not hasattr(network, "image_shape"):
        return None
    device = next(network.parameters()).device
    if device.type != "cuda":
        return max(1, cpu_bytes // activation_bytes(network))
    free = SHARE_OF_MEMORY * available(device) / ADJOINT_FACTOR
    # Rounded down to a power of two, which changes less from run to run.
    return 1 << max(0, int(free // activation_bytes(network)).bit_length() - 1)


def seconds_uncompiled(network: nn.Module, work: Work) -> float:
    """Roughly how long the work takes, uncompiled, on this machine's CPU or on a data-centre GPU.

    Estimated from the network and the number of threads, not measured, so the same run always gets the same answer.
    """
    kind = next(network.parameters()).device.type
    workers = torch.get_num_threads() if kind == "cpu" else 1
    return work.total * activation_bytes(network) / (ACTIVATIONS_PER_SECOND[kind] * workers)


def repays(network: nn.Module, work: Work) -> bool:
    """Whether the work takes long enough, uncompiled, to repay compiling."""
    return seconds_uncompiled(network, work) > COMPILING_PAYS[next(network.parameters()).device.type]


def check_backend(backend: str, device: torch.device) -> None:
    """Refuses a backend that this machine cannot run.

    Raises:
        UserError: CUDA graphs on a CPU, or compiling without a working compiler.
    """
    if backend == "graph" and device.type != "cuda":
        raise UserError("--backend graph captures CUDA graphs, and this runs on the CPU; give auto, eager or compile")
    if backend == "compile" and device.type == "cpu" and not _compiler():
        raise UserError("--backend compile needs a C++ compiler (g++ or clang++), and none is on the PATH; install one "
                        "or give --backend eager")
    if backend == "compile" and _why_not_compiled(device):
        raise UserError(f"--backend compile: {_why_not_compiled(device)}; fix that, or give --backend auto")


def set_precision(precision: str, device: torch.device) -> None:
    """Sets the precision of float32 products for the whole process, and on a GPU makes convolutions deterministic.

    bf16 is left to the engines.

    Raises:
        UserError: the device has no TF32.
    """
    if precision == "tf32" and not has_tf32(device):
        where = "the CPU" if device.type == "cpu" else "an older one"
        raise UserError(f"--precision tf32 is for NVIDIA GPUs of Ampere or later, and this runs on {where}; give auto, "
                        "fp32 or bf16")
    if precision in ("fp32", "tf32"):
        leaf = "ieee" if precision == "fp32" else "tf32"
        torch.backends.cuda.matmul.fp32_precision = leaf
        torch.backends.cudnn.conv.fp32_precision = leaf
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True  # else a resumed expert would differ from an uninterrupted one


def has_tf32(device: torch.device) -> bool:
    """Whether the device computes in TF32, as torch by default lets convolutions do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _can_compile(device: torch.device) -> bool:
    """Whether code can be compiled here; if not, prints a note once."""
    reason = _why_not_compiled(device)
    if reason and multiprocessing.parent_process() is None:  # helpers leave it to their parent
        note(f"not compiled, though this is long enough to repay it: {reason}")
    return reason is None


@functools.cache
def _why_not_compiled(device: torch.device) -> str | None:
    """Why code cannot be compiled here, in words; None if it can. Found by compiling a trivial function: it takes not
    only a compiler, but Python's headers, a temporary folder that allows executables and, for a GPU, Triton."""
    try:
        quietly_compiled(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # compilers raise exceptions of every kind
        lines = str(error).splitlines() or [type(error).__name__]
        told = next((line for line in lines if "error: " in line), lines[0])
        who = f"{_compiler()} is here and" if device.type == "cpu" else f"Triton for {device}"
        return f"{who} cannot build what torch compiles ({shortened(' '.join(told.split()))})"
    return None


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)
