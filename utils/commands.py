"""What to type next, or again: programs and options as shell text."""

import math
import os
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from utils.config import DistillConfig, EvaluationConfig, parse
from utils.files import REPOSITORY
from utils.run import shown

WIDTH = 78  # columns of a command's lines; a path may be longer


def from_repository(value: Any) -> Any:
    """A path inside the repository relative to it, as saved configs have it."""
    return str(value).removeprefix(f"{REPOSITORY}{os.sep}") if isinstance(value, str | Path) else value


def defaults(config_type: type) -> dict[str, Any]:
    """What each option is when it is not given."""
    config = parse(config_type, "", [])
    return {field.name: from_repository(getattr(config, field.name)) for field in fields(config_type)}


def changed(config: dict[str, Any], config_type: type) -> dict[str, Any]:
    """The options that differ from the defaults, in the order in which they are declared; unknown ones last."""
    default = defaults(config_type)
    names = [*(name for name in default if name in config), *(name for name in config if name not in default)]
    return {name: config[name] for name in names if name not in default or config[name] != default[name]}


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


def evaluation(config: dict[str, Any], data_dir: Path) -> dict[str, Any]:
    """The options with which `evaluation.py` tests a distilled set as its run does, but on the test images.

    Args:
        config: the run's, as its folder holds it.
        data_dir: a distilled.safetensors.
    """
    allowed = defaults(EvaluationConfig)
    shared = {name: value for name, value in config.items()
              if name in allowed and name not in ("no_aug", "val_fraction", "lr_teacher", "precision")}
    given = {name: shared[name] for name in ("dataset", "model") if name in shared} | changed(shared, EvaluationConfig)
    if "data_path" in given:
        given["data_path"] = REPOSITORY / given["data_path"]
    return given | {"data_dir": data_dir}


def again(config: dict[str, Any], run_name: str, on_cpu: bool) -> str:
    """A YAML of a run's options that differ from the defaults, and the command that runs it again."""
    default = defaults(DistillConfig)
    always = {name: config[name] for name in ("dataset", "model", "ipc", "seed") if name in config}
    options = always | {name: value for name, value in changed(config, DistillConfig).items() if name in default}
    # A YAML's numbers are read as text, in which infinity is "inf".
    text = yaml.safe_dump({name: str(value) if isinstance(value, float) and math.isinf(value) else value
                           for name, value in options.items()}, sort_keys=False, allow_unicode=True)
    placed = {"cfg": "again.yaml", "run_name": run_name} | ({"device": "cpu"} if on_cpu else {})
    return f"cat > again.yaml <<'END'\n{text}END\n{command('distill/DATM.py', placed, from_repository)}"
