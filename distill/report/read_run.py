"""Reads a run's folder into plain data, from which its page is made."""

import datetime
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.report.names import PICTURES
from distill.result_files import (
    METRICS,
    OF_OTHER_SET,
    OF_REAL_IMAGES,
    OF_SET,
    RESULT,
    EvaluationResult,
    Metrics,
    RunResult,
    Score,
    images_tested,
    result_so_far,
    results_in,
    tested_on,
)
from utils.config import differences
from utils.errors import UserError
from utils.files import read_config

if TYPE_CHECKING:
    from distill.report.page_pictures import Pictures

# What must be alike for accuracies to be compared.
TRAINED_BY = ("dataset", "subset", "res", "zca", "ipc", "val_fraction", "epoch_eval_train", "batch_train", "dsa",
              "dsa_strategy", "no_aug")


@dataclass(frozen=True)
class SavedRun:
    """The contents of a run's folder."""

    path: Path
    config: dict[str, Any]
    metrics: Metrics
    result: RunResult  # of an unfinished run, what it has reached so far
    pictures: "Pictures | None"
    missing: list[str]  # what the folder does not hold, in words
    as_of: str = ""  # of an unfinished run, when its log was last written
    # Results that the user put there to compare with, by file name.
    beside: dict[str, EvaluationResult] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return not self.as_of

    @property
    def iteration(self) -> int:
        """How many iterations are done."""
        return max(step.iteration + number for number, lines in ((1, self.metrics.iterations),
                                                                 (0, self.metrics.evaluations)) for step in lines[-1:])

    @property
    def learned_nothing(self) -> bool:
        """Whether every update so far was skipped."""
        return 0 < len(self.metrics.iterations) == len(self.metrics.skipped)

    @property
    def tests(self) -> list[EvaluationResult]:
        """Evaluations of the best set, from results in the run's folder; none of an unfinished run, whose sets are not
        known by their checksums."""
        best, longest = self.result.better[1], {}
        for result in self.beside.values() if self.finished else ():
            if result.what == OF_SET and best.is_of(result.lr, result.images_sha256):
                # If several files hold the same test, the one with the most networks is used.
                same = str(self.trainings(result)[0]), result.tested_on, result.config.get("seed"), tuple(
                    score.network for score in result.scores)
                longest[same] = max(longest.get(same, result), result, key=lambda each: len(each.scores[0].accuracies))
        return list(longest.values())

    @property
    def real_images(self) -> dict[tuple[str, str], Score]:
        """Scores of as many real images under the same training, from results in the run's folder: their kind and what
        they were tested on, in words → score over all seeds, with its learning rate if there are several. If several
        results are of one seed, whose first networks are the same, the one with the most networks is used."""
        network = self.result.best.scores[0].network
        longest: dict[tuple[tuple[str, str], float | None, Any], list[float]] = {}  # by kind, rate and seed
        for result in self.beside.values():
            named = OF_REAL_IMAGES.fullmatch(result.what)
            for score in result.scores if named and not self._unlike(result) else ():
                if score.network == network:
                    kind = f"{named[2]}s{named[3]}", images_tested(result.tested_on)
                    key = kind, result.lr, result.config.get("seed")
                    longest[key] = max(longest.get(key, []), score.accuracies, key=len)
        found: dict[tuple[str, str], dict[float | None, list[float]]] = {}
        for (kind, lr, _), accuracies in longest.items():
            found.setdefault(kind, {}).setdefault(lr, []).extend(accuracies)
        return {(kind if len(rates) == 1 or rate is None else f"{kind}, learning rate {rate:.4g}", images):
                Score(network, accuracies)
                for (kind, images), rates in found.items() for rate, accuracies in rates.items()}

    @property
    def left_out(self) -> list[str]:
        """Results in the run's folder that are not shown, and why, in words."""
        return [f"{name}, {result.what}: {why}; see scripts/summary.py" for name, result in self.beside.items()
                if (why := self._why_left_out(result))]

    def _why_left_out(self, result: EvaluationResult) -> str:
        """Empty if it is shown."""
        best = self.result.better[1]
        if not result.what.startswith(OF_SET):
            named = OF_REAL_IMAGES.fullmatch(result.what)
            other = all(score.network != best.scores[0].network for score in result.scores)
            return self._unlike(result) or "another network" * other or "not as many images" * (not named)
        if not self.finished:
            return "the run is not finished"
        if result.what.startswith(OF_OTHER_SET):
            return "another set"
        if result.what != OF_SET:
            return "not trained as the run's own networks"
        if best.is_of(result.lr, result.images_sha256):
            return "" if result in self.tests else "the same test as another file's"
        if result.images_sha256 in {each.images_sha256 for each in self.result.versions.values()} - {
                None, best.images_sha256}:
            return "the run's other best set, and not the better one"
        return "at rates of their own" if result.lr is None else f"at learning rate {result.lr:.4g}"

    def _unlike(self, result: EvaluationResult) -> str:
        """The options in which its training or testing differs from the run's, in words; empty if there are none."""
        return differences(*self.trainings(result))

    def trainings(self, result: EvaluationResult) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of TRAINED_BY by which a result's networks were trained, and those of the run's own that must be
        alike: not the batch sizes if both take the whole set."""
        here, there = ({name: config.get(name) for name in TRAINED_BY} for config in (self.config, result.config))
        here["no_aug"] = False  # in a run, it is of the inner loop
        there["no_aug"] = there["no_aug"] or False
        batches = here["batch_train"], there["batch_train"]
        if all(isinstance(batch, int) and batch >= (result.labels or result.images) for batch in batches):
            del here["batch_train"]
        if not there["val_fraction"]:  # tested on the test images, whichever ones chose the set
            del here["val_fraction"]
        return there, here


def check_is_run(path: Path) -> Path:
    """The absolute path of a run's folder.

    Raises:
        UserError: the path is not a run's folder.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a run's folder, with config.yaml and {METRICS}")
    if not (path / RESULT).is_file() and not ((path / "config.yaml").is_file() and (path / METRICS).is_file()):
        raise UserError(f"{path} is not a run's folder, as it has no {RESULT}, and no config.yaml with {METRICS}; give "
                        "the folder of a run")
    return path


def read_run(path: Path) -> SavedRun:
    """Reads the folder of a run, finished or not. `missing` names what the folder lacks.

    Raises:
        UserError: not a run's folder, a run that was not evaluated yet, or a damaged file.
    """
    from distill.report.page_pictures import Pictures  # imports torch

    path = check_is_run(path)
    finished, missing = (path / RESULT).is_file(), []

    def read(name: str, reader: Any, otherwise: Any, what: str) -> Any:
        if (path / name).is_file():
            return reader(path / name)
        if finished:
            missing.append(f"{name}{what}")
        return otherwise

    config = read("config.yaml", read_config, {}, ": the options and the commands")
    metrics = read(METRICS, partial(Metrics.read, finished=finished), Metrics([], []), ": the curves")
    pictures = read(PICTURES, Pictures.read, None, ": the images, the experts' command, the machine")
    as_of = ""
    if finished:
        result = RunResult.read(path / RESULT)
    else:
        machine = pictures.machine if pictures else {}
        result = result_so_far(metrics, tested_on(config.get("val_fraction")), machine)
        if result is None:
            raise UserError(f"{path} holds a run that was not evaluated yet; look again after its first evaluation "
                            "(every --eval_it iterations), or resume it with the command that began it")
        written = datetime.datetime.fromtimestamp((path / METRICS).stat().st_mtime).astimezone()
        as_of = written.strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    return SavedRun(path, {str(name): value for name, value in config.items()}, metrics, result, pictures, missing,
                    as_of, results_in(path))
