"""What to type next, or again: programs and options as shell text."""

import contextlib
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.config import (
    BufferConfig,
    DataConfig,
    DistillConfig,
    from_root,
    make,
)
from utils.errors import UserError
from utils.files import REPOSITORY
from utils.program.command_line import read_yaml
from utils.program.console import shown, wrapped

CONFIGS = REPOSITORY / "configs"
FOR_ANY = CONFIGS / "MiniFashion" / "ConvIN" / "IPC1.yaml"  # the smallest, for data that no config is made for
WIDTH = 78  # columns of a command's lines; a path may be longer


def command(script: str, options: dict[str, Any], place: Callable[[Path], str] = shown,
            argument: Path | None = None) -> str:
    """A program and its options as shell text, in lines that the shell joins.

    Args:
        script: its path in the repository.
        options: a value that is a `Path` must be absolute.
        place: how a path is written, which decides where the command can be typed; as is: where the user stands.
        argument: what stands before the options.
    """
    words = []
    for name, value in options.items():
        value = place(value) if isinstance(value, Path) else value
        words.append(f"--{name}" if value is True else shlex.quote(f"--{name}={value}"))
    lines: list[str] = []
    line = f"python {shlex.quote(place(REPOSITORY / script))}{f' {shlex.quote(place(argument))}' if argument else ''}"
    for word in words:
        if len(line) + len(word) > WIDTH - 3:
            lines, line = [*lines, line], "   "
        line += f" {word}"
    return " \\\n".join([*lines, line])


def say_next(config: DataConfig, what: str, *typed: str) -> None:
    """Tells what can be typed next; nothing where only results are wanted."""
    if not config.quiet:
        print(f"{wrapped(what)}\n" + "\n".join(textwrap.indent(each, "  ") for each in typed))


def device_given(device: Any) -> dict[str, Any]:
    """The option with which another program runs on the device that this one was told to take, if it was."""
    return {"device": device} if isinstance(device, str) and device != "auto" else {}


def distillation(config: BufferConfig) -> tuple[str, dict[str, Any]]:
    """What distils with new experts: a remark, empty if there is none, and the options of `DATM.py`.

    The config is the one in `configs/` for their dataset and network with the fewest images a class; what the experts
    were made with otherwise than it expects is given beside it.
    """
    found = []
    for path in sorted(CONFIGS.glob("*/*/IPC*.yaml")):
        with contextlib.suppress(UserError):  # a file that is being written there must not end finished experts
            made = _read(path)
            if made.dataset == config.dataset:
                found.append((made.model != config.model, path.parent.name != "ConvIN", made.ipc, path))
    path = min(found)[-1] if found else FOR_ANY
    made = _read(path)
    options: dict[str, Any] = {"cfg": path}
    for name in ("dataset", "subset", "res", "model", "zca", "val_fraction"):
        if getattr(made, name) != getattr(config, name):
            options[name] = getattr(config, name)
    if config.dataset != "ImageNet":
        options.pop("subset", None)
    for name in ("data_path", "buffer_path"):
        if from_root(getattr(made, name)) != getattr(config, name):
            options[name] = Path(getattr(config, name))
    remark = "" if found else (f"no file in {shown(CONFIGS)} is for {config.dataset}: write one with your own ipc, "
                               "Iteration, syn_steps, expert_epochs, max_start_epoch, lr_img and lr_y, or try that of "
                               "other data")
    return remark, options | _window(made, config.train_epochs) | device_given(config.device)


def _window(made: DistillConfig, epochs: int) -> dict[str, int]:
    """What must be changed for the difficulty window to lie inside trajectories of so many epochs."""
    options = {}
    segment = min(made.expert_epochs, epochs)
    if segment != made.expert_epochs:
        options["expert_epochs"] = segment
    end = min(made.max_start_epoch, epochs - segment + 1)
    if end != made.max_start_epoch:
        options["max_start_epoch"] = end
    first = min(end, made.current_max_start_epoch) if made.Sequential_Generation else end
    if made.min_start_epoch >= first:
        options["min_start_epoch"] = 0
    return options


def _read(path: Path) -> DistillConfig:
    return make(DistillConfig, **read_yaml(path, DistillConfig))
