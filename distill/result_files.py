"""The formats of results; only this module writes and reads them.

    metrics.jsonl      of a distillation: each line is an `Iteration`, or an `Evaluation` during the run
    result.json        of a finished distillation: `RunResult`
    --json FILE        of evaluation.py and baseline.py: `EvaluationResult`

Accuracies are shares in [0, 1]; None means not recorded. Reading a file with other contents raises a `UserError`.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, RootModel, ValidationError, computed_field
from pydantic.dataclasses import dataclass

from utils.config import AUTO, STARTS, EvaluationConfig
from utils.errors import UserError
from utils.files import append_json, read_json, read_text, reading, resolved, write_json
from utils.program.console import percent

METRICS, RESULT = "metrics.jsonl", "result.json"
THEN = ", then "  # between the devices, or versions of torch, of a run that was resumed elsewhere
EVALUATION = "evaluation.json"  # of the best set, written by the command that a run prints at its end
VERSIONS = NORMAL, EMA = "Normal", "EMA"  # folders of the sets as published, and with averaged images
_AGAIN = "put it back, or run again under another --run_name"


def _square(counts: list[list[int]]) -> list[list[int]]:
    if any(len(row) != len(counts) for row in counts):
        raise ValueError("not as many columns as rows")
    return counts


Counts = Annotated[list[list[Annotated[int, Field(ge=0)]]], Field(min_length=1), AfterValidator(_square)]


@dataclass(frozen=True)
class Score:
    """Test accuracies of the networks of one kind, each trained from its own initialisation."""

    network: str
    accuracies: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    # Counts over all these networks, true classes in rows, predicted ones in columns; None: not counted.
    confusion: Counts | None = None

    @computed_field
    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @computed_field
    @property
    def std(self) -> float | None:
        """The population standard deviation (numpy's default), as in the published code; None for a single network."""
        return float(np.std(self.accuracies)) if len(self.accuracies) > 1 else None

    @property
    def percent(self) -> str:
        """Mean and standard deviation in percent, for tables."""
        return percent(self.mean, self.std)

    def __str__(self) -> str:
        return f"{self.network}: {self.percent} % over {len(self.accuracies)}"


Scores = Annotated[list[Score], Field(min_length=1)]
"""One for each kind of network; the first decides which set is the best."""


@dataclass(frozen=True)
class Iteration:
    """One iteration of a distillation."""

    iteration: int
    # NaN if it was not finite; null in JSON.
    loss: Annotated[float, BeforeValidator(lambda loss: math.nan if loss is None else loss)]
    updated: bool
    lr: float  # α after the iteration
    start_epoch: int
    bound: int  # exclusive upper bound of the start epochs that could be drawn
    held: bool = False  # whether α was held back
    expert: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation during a distillation."""

    iteration: int
    scores: Scores
    set: Literal["Normal", "EMA"] = NORMAL  # VERSIONS


def append_metrics(path: Path, line: Iteration | Evaluation) -> None:
    """Adds one line to a metrics.jsonl."""
    append_json(path, as_json(line))


class Metrics(NamedTuple):
    """All lines of a metrics.jsonl."""

    iterations: list[Iteration]
    evaluations: list[Evaluation]

    @classmethod
    def read(cls, path: Path, advice: str = _AGAIN, finished: bool = True) -> "Metrics":
        """Reads the file.

        Args:
            finished: whether the run is finished; if not, an incomplete last line is ignored.
        """
        metrics = cls([], [])
        with reading(path, advice):
            lines = read_text(path)
            for text in filter(str.strip, (lines if finished else lines.rpartition("\n")[0]).splitlines()):
                if "start_epoch" in (line := json.loads(text)):
                    metrics.iterations.append(_validated(Iteration, line))
                elif "scores" in line:
                    metrics.evaluations.append(_validated(Evaluation, line))
        return metrics

    @property
    def skipped(self) -> list[Iteration]:
        return [iteration for iteration in self.iterations if not iteration.updated]

    @property
    def mean_loss(self) -> float:
        """Over all finite losses, skipped updates included; NaN if there are none."""
        losses = [step.loss for step in self.iterations if math.isfinite(step.loss)]
        return sum(losses) / len(losses) if losses else math.nan

    def running_mean(self) -> tuple[int, list[tuple[int, float]]]:
        """The window's length, and (iteration, mean loss around it) without skipped ones; empty for a short run."""
        if len(self.iterations) < 20:
            return 0, []
        span = max(len(self.iterations) // 50, 5)
        losses = np.array([step.loss if step.updated else math.nan for step in self.iterations])
        spans = np.lib.stride_tricks.sliding_window_view(np.nan_to_num(losses), span)
        counted = np.lib.stride_tricks.sliding_window_view(~np.isnan(losses), span)
        with np.errstate(invalid="ignore"):  # NaN if all were skipped: a gap in the curve
            means = spans.sum(1, where=counted) / counted.sum(1)
        return span, [(step.iteration, mean) for step, mean in zip(self.iterations[span // 2:], means.tolist())]

    def of_set(self, name: str) -> list[Evaluation]:
        return [evaluation for evaluation in self.evaluations if evaluation.set == name]


@dataclass(frozen=True)
class Best:
    """The best set of a run."""

    iteration: int
    lr: float
    scores: Scores
    images_sha256: str | None = None  # None in results of earlier versions

    def is_of(self, lr: float | None, images_sha256: str | None) -> bool:
        """Whether the set with this learning rate and this checksum of its images is this one, as far as known."""
        return same_rate(lr, self.lr) and same_images(images_sha256, self.images_sha256)


def tested_on(val_fraction: float | None) -> Literal["test", "validation"]:
    """The images that a program with this `--val_fraction` tests and selects on, as named in results."""
    return "validation" if val_fraction else "test"


def images_tested(on: str | None) -> str:
    """The images that a set was tested or chosen on, in words; `validation` means held-out training images."""
    return "held-out" if on == "validation" else "test"


def tested_in_words(val_fraction: float | None, count: int) -> str:
    """For example `10,000 test images`."""
    return f"{count:,} {images_tested(tested_on(val_fraction))} image{'s' * (count != 1)}"


@dataclass(frozen=True)
class FixedLoss:
    """The mean matching loss over fixed segments, of a run's initial set and of its last one."""

    before: float | None = None
    after: float | None = None
    segments: int | None = None


@dataclass(frozen=True)
class RunResult:
    """The result of a finished distillation."""

    summary: str
    best: Best
    best_ema: Best | None = None
    chosen_on: Literal["test", "validation"] | None = None
    skipped: int | None = None  # updates
    held: int | None = None  # times that α was held back
    seconds: float | None = None
    fixed_loss: FixedLoss = FixedLoss()
    environment: dict[str, Any] = Field(default_factory=dict)
    data: str | None = None  # `data_id` of what the run read; earlier versions saved none

    @property
    def versions(self) -> dict[str, Best]:
        """The best sets, by the names of their folders."""
        return {NORMAL: self.best} | ({EMA: self.best_ema} if self.best_ema else {})

    @property
    def better(self) -> tuple[str, Best]:
        """The better set by `better_of`: its folder's name and its result."""
        name = better_of(self.versions)
        return name, self.versions[name]

    def write(self, path: Path) -> None:
        write_json(path, as_json(self))

    @classmethod
    def read(cls, path: Path, advice: str = _AGAIN) -> "RunResult":
        with reading(path, advice):
            return _validated(cls, read_json(path))


def better_of(best: Mapping[str, Any]) -> str:
    """Which of the best sets, as published or with averaged images (VERSIONS), has the better `scores`."""
    return max((name for name in VERSIONS if name in best), key=lambda name: best[name].scores[0].mean)


def result_so_far(metrics: Metrics, chosen_on: Literal["test", "validation"],
                  environment: dict[str, Any]) -> RunResult | None:
    """The result of an unfinished run if it ended at the last iteration of its log; None before an evaluation."""
    best = {}
    for name in VERSIONS:
        # The first of equally good ones, as a run keeps it.
        first = max(metrics.of_set(name), key=lambda evaluation: evaluation.scores[0].mean, default=None)
        if first:
            lr = [step.lr for step in metrics.iterations if step.iteration < first.iteration][-1:] or [math.nan]
            best[name] = Best(first.iteration, lr[0], first.scores)
    return RunResult("not finished", best[NORMAL], best.get(EMA), chosen_on, len(metrics.skipped),
                     sum(step.held for step in metrics.iterations), environment=environment) if NORMAL in best else None


def skipped_advice(loss: float, options: dict[str, Any]) -> str:
    """What to change, in order, in a run whose updates were all skipped; printed by the run and shown on its page.

    Args:
        loss: that of skipped updates, or their mean; NaN: none was finite.
        options: those of the run.
    """
    finite, threshold = math.isfinite(loss), options["threshold"]
    too_large = f"({loss:.4g}) is above --threshold {threshold:g}" if finite else "is not finite"
    if options.get("pix_init", STARTS[0]) not in STARTS:
        rate = "another set as --pix_init, whose learning rate is its own"
    elif options.get("lr_teacher") == AUTO:
        rate = "a smaller --lr_teacher than the one that auto measured"
    else:
        rate = "--lr_teacher auto, which measures the rate that fits these experts; a smaller --lr_teacher by hand"
    # Below 1 the student ends nearer to the target than it started, so there is something to learn.
    first, last = ("a larger --threshold; ", "") if loss < 1 else ("", "--threshold inf; " * finite)
    return (f"the matching loss {too_large}, so nothing is learned. DATM.py --dry_run "
            f"measures what fits; to tune by hand, change in this order: {first}{rate}; a window that "
            f"starts earlier (--min_start_epoch, --max_start_epoch) or a larger --expert_epochs; {last}"
            "and give another --run_name with it")


@dataclass(frozen=True)
class UnderProtocol:
    """Scores under one of several protocols, or with a learning rate chosen for each kind of network."""

    scores: Scores
    trained: dict[str, dict[str, Any]]  # by network: epochs, batch_train, dsa, lr; held_out if the rate was chosen


OF_SET = "distilled images"  # how `EvaluationResult.what` begins for a distilled set
OF_OTHER_SET = f"{OF_SET} (not this run's best)"
# For real images: how many per class, of which kind, and with which labels; earlier versions wrote "a class".
OF_REAL_IMAGES = re.compile(r"(\d+) (.+ real image)s? (?:per|a) class(.*)")


def under_protocol(what: str, protocol: str) -> str:
    """A set under a protocol, in words."""
    return what if protocol == EvaluationConfig.protocol else f"{what} under {protocol}"


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation: the scores of networks that were trained on a set."""

    what: str  # the set, in words
    images: int
    scores: Scores
    lr: float | None = None
    tested_on: Literal["test", "validation"] = "test"
    seconds: float | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    labels: int | None = None  # their number if the factor is above 1: factor² for each image
    protocols: dict[str, UnderProtocol] = Field(default_factory=dict)  # by name; `scores` are those of the first
    images_sha256: str | None = None  # of a distilled set; None in results of earlier versions

    @property
    def size(self) -> str:
        """The number of images and labels, for tables."""
        return str(self.images) if self.labels is None else f"{self.images} ({self.labels} labels)"

    def write(self, path: str | Path, **more: Any) -> None:
        """Writes the file.

        Args:
            more: entries that `--robust_score` adds; its file still reads as that of an evaluation.
        """
        values, optional = as_json(self) | more, ("lr", "labels", "protocols", "images_sha256")
        write_json(resolved(path), {name: value for name, value in values.items()
                                    if name not in optional or value not in (None, {})})

    def by_protocol(self) -> list[tuple[str, list[Score], list["Trained"]]]:
        """For tables: for each protocol, or once, the set in words, the scores, and how their networks were trained."""
        if not self.protocols:
            trained = Trained.of(self.config | {"lr": self.lr, "epochs": self.config.get("epoch_eval_train")}, self)
            return [(self.what, self.scores, [trained] * len(self.scores))]
        what = self.what.removesuffix(under_protocol("", next(iter(self.protocols))))
        return [(under_protocol(what, protocol), reached.scores,
                 [Trained.of(reached.trained.get(score.network, {}), self) for score in reached.scores])
                for protocol, reached in self.protocols.items()]

    @classmethod
    def read(cls, path: Path, advice: str, problem: str = "is not the result of an evaluation") -> "EvaluationResult":
        with reading(path, advice, problem):
            return _validated(cls, read_json(path))


class Trained(NamedTuple):
    """How the networks of a score were trained, in words; a batch is no larger than the set."""

    rate: str
    epochs: str
    batch: str

    @classmethod
    def of(cls, trained: dict[str, Any], result: EvaluationResult) -> "Trained":
        lr, auto, batch = trained.get("lr"), " (auto)" * ("held_out" in trained), trained.get("batch_train")
        return cls(f"{lr:.4g}{auto}" if isinstance(lr, int | float) else "-", str(trained.get("epochs") or "-"),
                   str(min(batch, result.labels or result.images)) if isinstance(batch, int) else "-")


def same_rate(one: float | None, other: float) -> bool:
    """Whether two learning rates are equal up to the rounding of float32; None: a rate that is not known."""
    return one is not None and math.isclose(one, other, rel_tol=1e-6)


def same_images(one: str | None, other: str | None) -> bool:
    """Whether two sets have equal images, by their checksums; None: not known, which counts as equal."""
    return None in (one, other) or one == other


def results_in(folder: Path) -> dict[str, EvaluationResult]:
    """The evaluation results in a folder, by file name. In a run's folder, those of other sets than its best ones, such
    as what it had reached before it was extended, say so."""
    results, best = {}, set()
    with contextlib.suppress(UserError):  # no run, or not finished
        best = {each.images_sha256 for each in RunResult.read(folder / RESULT).versions.values()} - {None}
    earlier = {file.name.replace(Path(RESULT).stem, Path(EVALUATION).stem, 1)  # of a run that is or was extended
               for file in folder.glob(f"{Path(RESULT).stem}_*.json")}
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(UserError):  # not the result of an evaluation
            result = EvaluationResult.read(file, "")
            known = file.name in earlier or (best and result.images_sha256)
            other = known and result.images_sha256 not in best
            results[file.name] = replace(result, what=result.what.replace(OF_SET, OF_OTHER_SET)) if other else result
    return results


def read_result(path: Path, name: str, advice: str) -> RunResult | EvaluationResult:
    """The result of an evaluation or of a run.

    Args:
        name, advice: for the message if it is neither.
    """
    with reading(name, advice, "is not a result"):
        values = read_json(path)
        return _validated(RunResult if "best" in values else EvaluationResult, values)


def as_json(record: Any) -> Any:
    """A record as plain data; numbers that are not finite become None."""
    return json.loads(RootModel[type(record)](record).model_dump_json())


def _validated(kind: type, value: Any) -> Any:
    try:
        return RootModel[kind].model_validate(value).root
    except ValidationError as error:
        problem = error.errors()[0]
        where = " ".join(map(str, problem["loc"])) or "all of it"
        missing = problem["type"] == "missing"
        raise ValueError(f"it has no {where!r}" if missing else f"{where}: {problem['msg']}") from None
