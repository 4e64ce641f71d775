"""The commands that reproduce a run and test its best set."""

import math
import shlex
from pathlib import Path
from typing import Any

import yaml

from distill.distilled_set import TOLD
from distill.report.read_run import SavedRun
from distill.result_files import EVALUATION, THEN
from utils.config import (
    BufferConfig,
    DistillConfig,
    EvaluationConfig,
    canonical,
    changed,
    defaults,
    from_repository,
    worth_giving,
)
from utils.program.commands import command

LABELLING = "labelling"  # marks the options of experts that only label the initial images


def commands(run: SavedRun) -> list[tuple[str, str]]:
    """The commands that reproduce the run, typed in the repository's root: (what it does, shell text)."""
    if not run.config:
        return []
    experts = run.pictures.experts if run.pictures else []
    matched = [each for each in experts if not each.get(LABELLING)]
    if len({each.get("buffer_path") for each in matched}) == 1:  # wherever they were trained
        matched = [each | {"buffer_path": run.config["buffer_path"]} for each in matched]
    steps = [*_training("Train the experts", matched), *_training(
        "Train the experts that label the first images", [each for each in experts if each.get(LABELLING)])]
    on_cpu = all(device.startswith("cpu") for device in str(run.result.environment.get("device", "")).split(THEN))
    options = evaluation(run.config, run.path)
    return [*steps, ("Distil, with the options that differ from the defaults",
                     again(run.config, f"{run.name}_again", on_cpu)),
            *([("Evaluate the best set of this run on fresh networks",
                command("distill/evaluation.py", options, from_repository))] if run.finished else []),
            ("Make this page again", command("scripts/report.py", {}, from_repository, run.path))]


def _training(what: str, experts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The commands that train experts and, if they were trained in several folders, put them into one."""
    steps = [("Train more experts" if number else what, command(
        "buffer/buffer_FTD.py", worth_giving(options, BufferConfig), from_repository))
             for number, options in enumerate(experts)]
    folders = {Path(options.get("buffer_path", "")) for options in experts}
    if len(folders) > 1:
        parts, *others = {folder.parent for folder in folders}
        steps.append(("Put them into one folder", "# move their files into one folder, numbered in this order"
                      if others or parts.name != "parts" else
                      f"BUFFERS={shlex.quote(from_repository(parts.parent))} bash scripts/datm.slurm gather"))
    return steps


def evaluation(config: dict[str, Any], run: Path) -> dict[str, Any]:
    """Options of `evaluation.py` that test a run's best set as the run does, but on the test images, with the default
    number of networks, and with the result in the run's folder.

    Args:
        config: the run's options, as its folder holds them.
    """
    usual = {"num_eval": defaults(EvaluationConfig)["num_eval"]}
    of_run = {name: value for name, value in config.items() if name not in (
        "no_aug", "val_fraction", "lr_teacher", "precision", "num_eval")}
    return {"data_dir": run, "json": run / EVALUATION} | usual | unlike_set(of_run, config)


def unlike_set(options: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """The evaluation options that must be given for a set: those that differ from what the set records itself or, if it
    does not record them, from the defaults.

    Args:
        made: the options that made the set.
    """
    told, meant = canonical({name: made[name] for name in TOLD if name in made}), canonical(options)
    others = worth_giving({name: value for name, value in options.items() if name not in told}, EvaluationConfig)
    return {name: options[name] for name in told if name in options and meant[name] != told[name]} | others


def again(config: dict[str, Any], run_name: str, on_cpu: bool) -> str:
    """Shell text that writes a YAML of the run's options that differ from the defaults, and runs it again."""
    default = defaults(DistillConfig)
    always = {name: config[name] for name in ("dataset", "model", "ipc", "seed") if name in config}
    options = always | {name: value for name, value in changed(config, DistillConfig).items() if name in default}
    # Numbers in a YAML are read as text, where infinity is "inf".
    text = yaml.safe_dump({name: str(value) if isinstance(value, float) and math.isinf(value) else value
                           for name, value in options.items()}, sort_keys=False, allow_unicode=True)
    placed = {"cfg": "again.yaml", "run_name": run_name} | ({"device": "cpu"} if on_cpu else {})
    return f"cat > again.yaml <<'END'\n{text}END\n{command('distill/DATM.py', placed, from_repository)}"
