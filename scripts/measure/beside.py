"""`benchmark.py --beside FOLDER`: runs the commands of a checkout of the published code and ours by turns.

Each command runs at two lengths, as a process on one CPU thread. The difference of their CPU seconds is the cost of the
epochs or iterations alone: starting, loading, whitening and compiling cancel out. Other programs do not count.
"""

import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.config import DistillConfig, as_dict, make
from utils.errors import UserError, shortened
from utils.files import REPOSITORY, read_yaml

THEIRS = "published"
LENGTHS = {"experts": (1, 3), "matching": (2, 12)}  # epochs of one expert; iterations
UNITS = {"experts": "epoch", "matching": "iteration"}
BACKENDS = {"experts": {"eager": "eager", "compiled": "compile"}, "matching": {"exact": "eager", "compiled": "compile"}}
# How the published README trains experts.
EXPERTS = ("--num_experts=1", "--save_interval=1", "--rho_max=0.01", "--rho_min=0.01", "--alpha=0.3",
           "--lr_teacher=0.01", "--mom=0.", "--batch_train=256")
# What both programs are given besides a config: a GPU's number, which is not used, and next to no evaluation.
MATCHING = {"device": [0], "skip_first_eva": True, "eval_it": 10**6, "num_eval": 1, "epoch_eval_train": 1}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}


def check(folder: Path, data_path: Path | None, buffer_path: Path | None, parts: Sequence[str]) -> list[str]:
    """The parts that can be measured: experts, and distillation if there are experts to match.

    Raises:
        UserError: there are none, no real data, or the folder is no checkout.
    """
    chosen = [part for part in LENGTHS if part in parts and (part == "experts" or buffer_path)]
    if data_path is None or not chosen:
        raise UserError("--beside: give --data_path, the folder of the real data, and for the part matching "
                        f"--buffer_path, that of experts; the parts are {', '.join(LENGTHS)}")
    missing = [script for script in ("buffer/buffer_FTD.py", "distill/DATM.py") if not (folder / script).is_file()]
    if missing:
        raise UserError(f"--beside {folder}: there is no {missing[0]}; give the folder of a checkout of the published "
                        "code")
    return chosen


def arguments_of(part: str, options: dict[str, Any], length: int, into: Path) -> list[str]:
    """The arguments for `length` epochs or iterations, the same for both programs.

    Args:
        options: those of the distillation's config.
        into: a folder for the output.
    """
    if part == "experts":
        named = {name: options[name] for name in ("dataset", "model", "data_path")}
        return [*(f"--{name}={value}" for name, value in named.items()), *["--zca"] * options["zca"],
                f"--train_epochs={length}", f"--buffer_path={into}", *EXPERTS]
    path = into / "config.yaml"
    path.write_text(yaml.safe_dump(options | MATCHING | {"Iteration": length}))
    return ["--cfg", str(path)]


def command_of(part: str, folder: Path, backend: str | None, options: dict[str, Any], length: int,
               into: Path) -> tuple[list[str], Path]:
    """A command, and the folder to run it in: the published code's, or with a backend ours."""
    program = Path(*{"experts": ("buffer", "buffer_FTD.py"), "matching": ("distill", "DATM.py")}[part])
    arguments = arguments_of(part, options, length, into)
    if backend is None:
        python = folder / ".venv/bin/python"  # its own environment, if it has one
        return [str(python) if python.exists() else sys.executable, program.name, *arguments], folder / program.parent
    ours = [f"--backend={backend}", "--device=cpu", "--quiet"]
    ours += [f"--log_path={into}", "--wandb=disabled"] if part == "matching" else []
    return [sys.executable, str(program), *arguments, *ours], REPOSITORY


def cpu_seconds(command: Sequence[str], where: Path) -> float:
    """Runs a command; the CPU seconds of its process and those that it starts.

    Raises:
        UserError: the command failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=where, env=os.environ | ONE_THREAD, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise UserError(f"in {where}: {shlex.join(command)} ended with {done.returncode} and said: {shortened(said)}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(part: str, folder: Path, config: Path, paths: dict[str, Path], methods: Sequence[str], rounds: int,
            tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Rows of a report, the published code's first: CPU `seconds` of an epoch or iteration in each round, and in `runs`
    the CPU seconds of the round's two processes.

    Args:
        config: a YAML of a distillation.
        paths: `data_path` and `buffer_path`, where they are given.
        tick: called after each process.

    Raises:
        UserError: a command failed.
    """
    given = read_yaml(config)
    # Numbers are parsed here: the published code keeps as text what YAML reads as text. Its lr_img is an integer.
    options = {name: value for name, value in as_dict(make(DistillConfig, **given)).items() if name in given}
    if float(options.get("lr_img", 0.5)).is_integer():
        options["lr_img"] = int(options["lr_img"])
    options |= {name: str(path) for name, path in paths.items()}
    backends = {THEIRS: None} | {method: BACKENDS[part][method] for method in methods}
    runs: dict[str, list[list[float]]] = {method: [] for method in backends}
    for number in range(-1, rounds):  # the first round only warms up caches and compiled code
        for method, backend in backends.items():
            took = []
            for length in LENGTHS[part][:1 if number < 0 else None]:
                with tempfile.TemporaryDirectory() as into:
                    took.append(cpu_seconds(*command_of(part, folder, backend, options, length, Path(into))))
                tick()
            if number >= 0:
                runs[method].append(took)
    short, long = LENGTHS[part]
    return [{"method": method, "engine": backend or "", "status": "measured", "runs": runs[method],
             "seconds": [(more - less) / (long - short) for less, more in runs[method]]}
            for method, backend in backends.items()]
