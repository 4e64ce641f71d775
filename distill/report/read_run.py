"""A finished run's folder, read: plain data, of which its page is made."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.report.page_pictures import PICTURES, Pictures
from distill.result_files import METRICS, RESULT, Metrics, RunResult
from utils.errors import UserError
from utils.files import read_config


@dataclass(frozen=True)
class FinishedRun:
    """What lies in a finished run's folder."""

    path: Path
    config: dict[str, Any]
    metrics: Metrics
    result: RunResult
    pictures: Pictures | None
    missing: list[str]  # what the folder does not hold, in words

    @property
    def name(self) -> str:
        return self.path.name


def read_run(path: Path) -> FinishedRun:
    """A finished run's folder. What an older one does not hold is named in `missing`.

    Raises:
        UserError: not a run's folder, an unfinished run, or a damaged file.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a run's folder, with config.yaml and {RESULT}")
    if not (path / RESULT).is_file():
        begun = any((path / name).exists() for name in ("config.yaml", "checkpoint.pt", METRICS))
        raise UserError(f"{path} holds an unfinished run; finish it by the command that began it" if begun else
                        f"{path} is not a run's folder, as it has no {RESULT}; give the folder of a finished run")
    missing = []

    def read(name: str, reader: Any, otherwise: Any, what: str) -> Any:
        if (path / name).is_file():
            return reader(path / name)
        missing.append(f"{name}{what}")
        return otherwise

    result = RunResult.read(path / RESULT)
    config = read("config.yaml", read_config, {}, ": the options and the commands")
    metrics = read(METRICS, Metrics.read, Metrics([], []), ": the curves")
    pictures = read(PICTURES, Pictures.read, None, ", which runs of an older version did not write: starting images, "
                    "real neighbours, the experts' command, the machine")
    return FinishedRun(path, {str(name): value for name, value in config.items()}, metrics, result, pictures, missing)
