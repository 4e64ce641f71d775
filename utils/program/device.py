"""The device that a run uses, and the lines with which a run announces itself."""

import functools
import warnings

import torch

from utils.config import DataConfig, changed, influential
from utils.derivatives.choose_engine import has_tf32
from utils.errors import UserError, note, number_of
from utils.program import ranks
from utils.program.console import say


def gpu_count() -> int:
    """The number of GPUs of this machine that torch can use. If it can use none of those present, prints why."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    present = torch.cuda.device_count()  # may ask the driver's library, which works even if too old for torch
    if present and not usable:
        _say_unusable(present, " ".join(str(told[0].message).split()) if told else "CUDA does not start")
    return present if usable else 0


@functools.cache
def _say_unusable(present: int, why: str) -> None:
    note(f"torch cannot use the {number_of(present, 'GPU')} of this machine: {why}")


def listed_gpus(device: str | list[int]) -> list[int]:
    """The GPUs of this machine that `device` lists."""
    count = gpu_count()
    return list(dict.fromkeys(index for index in device if 0 <= index < count)) if isinstance(device, list) else []


def select_device(device: str | list[int]) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N`, or a list of GPU indices, of which the first that exists is used.

    A GPU is returned with its index. If none of the listed GPUs exists, falls back to GPU 0 or the CPU with a note; [0]
    falls back without one.

    Raises:
        UserError: not a device, or a GPU asked for by name that does not exist.
    """
    gpus = gpu_count()
    if isinstance(device, list):
        present = listed_gpus(device)
        chosen = torch.device("cuda", present[0]) if present else torch.device("cuda:0" if gpus else "cpu")
        if device != [0] and not present:
            note(f"no GPU {device} here; using {chosen}")
        return chosen
    if device == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: allowed are auto, cpu, cuda, cuda:N or a list of GPU indices such as [0]")
    if chosen.type == "cpu":
        return chosen
    if (chosen.index or 0) >= gpus:
        raise UserError(f"--device {device}: this machine has {number_of(gpus, 'GPU')}; give --device auto or cpu")
    return torch.device("cuda", chosen.index or 0)


def kind_of(device: torch.device) -> str:
    """What rounding depends on: the kind of GPU, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({number_of(torch.get_num_threads(), 'thread')})"


def describe(device: torch.device) -> str:
    """The device in words."""
    here = f"{device} ({kind_of(device)})" if device.type == "cuda" else kind_of(device)
    return here if ranks.size() == 1 else f"{ranks.size()} ranks, the first on {here}"


def describe_precision(precision: str, device: torch.device) -> str:
    """The arithmetic of convolutions and matrix products in words."""
    if precision == "auto":
        return "float32, convolutions in TF32" if has_tf32(device) else "float32"
    return {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16"}[precision]


def announce(config: DataConfig, device: torch.device, engine: str, *lines: str) -> None:
    """Prints what a run runs on, what it is, and which of its options differ from the defaults.

    Args:
        engine: see `describe_engine`.
    """
    options = ", ".join(f"{name} {value}" for name, value in changed(influential(config), type(config)).items())
    for line in (f"on {describe(device)}, {describe_precision(config.precision, device)}, {engine}", *lines,
                 f"options: {options or 'all defaults'}"):
        say(config, line)
