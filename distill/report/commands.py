"""What to type to have a run again, and to test what it made."""

import math
from pathlib import Path
from typing import Any

import yaml

from distill.distilled_set import WHOLE
from distill.report.read_run import SavedRun
from distill.result_files import NORMAL
from utils.config import BufferConfig, DistillConfig, EvaluationConfig, changed, defaults, from_repository, worth_giving
from utils.files import REPOSITORY
from utils.program.commands import command


def commands(run: SavedRun) -> list[tuple[str, str]]:
    """What to type, in the repository's root, to have the run again: (what it does, shell text)."""
    if not run.config:
        return []
    experts = (run.pictures.about or {}).get("experts") if run.pictures else None
    steps = [("Add more experts to them" if number else "Train the experts",
              command("buffer/buffer_FTD.py", worth_giving(options, BufferConfig), from_repository))
             for number, options in enumerate(experts or [])]
    on_cpu = str(run.result.environment.get("device", "")).startswith("cpu")
    options = evaluation(run.config, run.path / NORMAL / WHOLE)
    return [*steps, ("Distil, with the options that differ from the defaults",
                     again(run.config, f"{run.name}_again", on_cpu)),
            *([("Evaluate the best set of this run on fresh networks",
                command("distill/evaluation.py", options, from_repository))] if run.finished else []),
            ("Make this page again", command("scripts/report.py", {}, from_repository, run.path))]


def evaluation(config: dict[str, Any], data_dir: Path) -> dict[str, Any]:
    """The options with which `evaluation.py` tests a distilled set as its run does, but on the test images.

    Args:
        config: the run's, as its folder holds it.
        data_dir: a distilled.safetensors.
    """
    given = worth_giving({name: value for name, value in config.items() if name not in (
        "no_aug", "val_fraction", "lr_teacher", "precision", "buffer_path")}, EvaluationConfig)
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
