"""Where the files of a distilled set are; works without torch."""

from pathlib import Path
from typing import NamedTuple

from distill.result_files import METRICS, NORMAL, RESULT, VERSIONS, Metrics, RunResult, result_so_far
from utils import files
from utils.errors import UserError

WHOLE = "distilled.safetensors"  # the self-describing file
PUBLISHED = "images_best.pt", "labels_best.pt", "lr_best.pt"  # the same set, as published


def sets_in(folder: Path) -> list[Path]:
    """The distilled sets anywhere below a folder, to suggest if the folder itself is no set."""
    return sorted(folder.glob(f"**/{WHOLE}")) if folder.is_dir() else []


def whole_set(path: Path) -> Path:
    """The self-describing file that a path stands for: in a run's folder, the better of its best sets according to its
    result; any other path is returned as it is."""
    return next((file for file in (path / _better(path) / WHOLE, path / WHOLE) if file.is_file()), path)


class SetFiles(NamedTuple):
    """The files of a set; "" for one that is missing, or whose contents the file of the images holds too."""

    images: str
    labels: str = ""
    lr: str = ""


def set_files(data_dir: str) -> SetFiles | None:
    """The files of the set in a run's folder: its `whole_set`, which holds everything, or, if the run is unfinished or
    the published code's, the published files of its best set. None: `--data_dir` is something else."""
    path = Path(data_dir)
    if (whole := whole_set(path)) != path:
        return SetFiles(str(whole))
    published = [path / _better(path) / name for name in PUBLISHED]
    return SetFiles(*map(str, published)) if all(file.is_file() for file in published) else None


def _better(path: Path) -> str:
    """Which of a run's best sets is the better one: if there are both, by its result, or by its log so far."""
    there = [name for name in VERSIONS if (path / name).is_dir()]
    if len(there) < 2:
        return (there or [NORMAL])[0]
    result, log = path / RESULT, path / METRICS
    if result.is_file():
        return RunResult.read(result).better[0]
    so_far = result_so_far(Metrics.read(log, finished=False), "test", {}) if log.is_file() else None
    return so_far.better[0] if so_far else NORMAL


def check_whole(path: Path) -> None:
    """Refuses a path that is not a file, or a file that is plainly of another kind."""
    if path.is_dir() and set_files(str(path)):
        advice = "" if (path / RESULT).is_file() else ", which a run writes at its end; resume it with its command"
        raise UserError(f"{path} has no {WHOLE}{advice or '; give another run'}, or have evaluation.py --save FILE "
                        "write its best set")
    files.check_is_file(path, "distilled set", next(iter(sets_in(path)), f"the path of a {WHOLE}"))
    files.check_kind(path, "distilled set", "safetensors", f"give the path of a {WHOLE}")
