"""The state of a running distillation: its iteration, its best sets, what is saved, and what is shown meanwhile."""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch

from distill import plan
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.evaluate.networks import epochs_to_come, evaluate
from distill.evaluate.saved_accuracies import Accuracies, key_of
from distill.load import Inputs
from distill.report.frames import Frames
from distill.report.wandb_log import Tracker
from distill.result_files import NORMAL, THEN, Evaluation, Iteration, Metrics, Score, append_metrics, skipped_advice
from distill.run_folder import RunFolder
from utils.config import DistillConfig, as_dict
from utils.derivatives.engine import describe_engine
from utils.errors import note
from utils.program import interrupt, ranks
from utils.program.console import say
from utils.program.machine import environment
from utils.program.progress import Progress

DRAW_SHARE = 0.1  # the most of a run's time that goes into drawing its pictures and page
FIRST_DRAWING = 0.5  # seconds assumed for the first drawing
SKIPPED_AT_FIRST = 10  # first updates of a run; if all are skipped, it says so


class Candidate(NamedTuple):
    """A set at one of a run's evaluations, and its scores.

    The first network of the pool decides which set is the best; in the published code, any network that beats its own
    best does.
    """

    iteration: int
    set: DistilledSet
    scores: list[Score]


class RunState:
    """A running distillation, and its state in the run's folder.

    Args:
        start: the initial set.
        saved: the state to resume from; None: a new run.
    """

    def __init__(self, config: DistillConfig, inputs: Inputs, distillation: Distillation, start: DistilledSet,
                 folder: RunFolder, saved: dict[str, Any] | None):
        self.config, self.dataset, self.checksums = config, inputs.dataset, inputs.checksums
        self.distillation, self.start, self.folder = distillation, start, folder
        self.iteration = 0
        self.evaluated = False  # whether this iteration's evaluation is done
        self.best: dict[str, Candidate] = {}
        self.frames = Frames()
        self.drew_for(FIRST_DRAWING)
        self.on = rounding(start.images.device)  # also where it was before, if it was resumed elsewhere
        self._seconds_before, self._began = 0.0, perf_counter()
        if saved:
            self._restore(saved)
        self.tracker = Tracker(config.wandb if ranks.first() else "disabled", config.project, folder.path.name,
                               as_dict(config), folder.path, saved and saved["tracker"], config.quiet)

    def drew_for(self, seconds: float) -> None:
        """Sets when pictures and page are drawn again, so that drawing takes at most `DRAW_SHARE` of the time."""
        self.draw_from = perf_counter() + seconds / DRAW_SHARE

    @property
    def seconds(self) -> float:
        return self._seconds_before + perf_counter() - self._began

    def save(self) -> None:
        """Saves what the run needs to resume from here."""
        self.folder.save_state(self._state)

    def _state(self) -> dict[str, Any]:
        """The state to resume from. It shares the run's tensors, so it must be saved before the next step."""
        best = {name: {"iteration": candidate.iteration, "set": candidate.set.tensors(),
                       "scores": [[score.network, score.accuracies, score.confusion] for score in candidate.scores]}
                for name, candidate in self.best.items()}
        return {"iteration": self.iteration, "evaluated": self.evaluated, "best": best, "seconds": self.seconds,
                "start": self.start.tensors(), "engine": self.engine, "data": self.checksums,
                "derivatives": self.distillation.buffer.model.state(), "environment": self.on,
                "threads": torch.get_num_threads(),
                "distillation": self.distillation.state(), "tracker": self.tracker.state(),
                "frames": vars(self.frames)}

    @property
    def engine(self) -> str:
        """How derivatives are computed, in words; a full memory may have halved the micro-batch since the start."""
        return describe_engine(self.distillation.buffer.model.engine, plan.share_of_batch(self.config, self.dataset))

    def _restore(self, state: dict[str, Any]) -> None:
        """Takes over a saved state; says at which iteration, and if results may now be rounded differently."""
        device = self.start.images.device
        self.iteration, self.evaluated, self._seconds_before = state["iteration"], state["evaluated"], state["seconds"]
        self.best, self.frames = best_of(state, device), Frames(**state["frames"])
        self.distillation.restore(state["distillation"])
        say(self.config, f"resuming at iteration {self.iteration}, where the run was saved")
        last = {name: where.split(THEN)[-1] for name, where in state["environment"].items()}
        if (state["engine"], last) != (self.engine, self.on):
            note(f"it was last on {state['engine']}, torch {last['torch']}, {last['device']}; what follows may be "
                 "rounded differently")
        self.on = {name: where if last[name] == self.on[name] else f"{where}{THEN}{self.on[name]}"
                   for name, where in state["environment"].items()}

    def evaluate(self, view: "DistillView") -> None:
        """Evaluates the set and, with `ema`, the one of averaged images; writes each that is the best so far, and saves
        the state.

        Raises:
            Stopped: a signal came; the accuracies so far are saved, and this evaluation resumes from there.
        """
        if ranks.size() > 1:  # a rank waiting for the others' networks cannot save on a signal
            self.save()
        versions = self.distillation.versions()
        unfinished = {name: ranks.from_first_rank(partial(
            Accuracies, self.folder.path / f"{name}.unfinished",
            f"{key_of([self.config], self.dataset, distilled)} {self.iteration}"))
            for name, distilled in versions.items()}
        epochs = sum(epochs_to_come(self.config, accuracies) for accuracies in unfinished.values())
        try:  # evaluate all sets before recording any, so that a signal leaves the state as it was
            with view.aside("evaluating", epochs) as tick:
                scores = {name: evaluate(self.config, self.dataset, distilled, "iteration", self.iteration,
                                         on_epoch=partial(_after_epoch, tick), accuracies=unfinished[name])
                          for name, distilled in versions.items()}
        except interrupt.Stopped as stopped:
            if stopped.waited:
                self.save()
            raise
        view.evaluated(scores[NORMAL], max(accuracies.seconds for accuracies in unfinished.values()))

        for name, distilled in versions.items():
            now = Candidate(self.iteration, distilled, scores[name])
            if name not in self.best or now.scores[0].mean > self.best[name].scores[0].mean:
                self.best[name] = now
                self._write(name, distilled, "best", self.iteration)
            self._log(Evaluation(self.iteration, scores[name], name))
            which = "" if name == NORMAL else f", {name}"
            view.say(f"iteration {self.iteration}{which}: {', '.join(map(str, scores[name]))}")
        normal = versions[NORMAL]
        self.frames.add(self.iteration, normal, self.dataset)
        self.tracker.log_scores(self.iteration, scores[NORMAL])
        self.tracker.log_set(self.iteration, normal.images, float(normal.lr), self.dataset, self.config.ipc,
                             self.config.force_save)
        self.evaluated = True
        self.save()
        for accuracies in unfinished.values():
            accuracies.forget()

    def write_current(self) -> None:
        """Writes the current set, under the iteration's number."""
        for name, distilled in self.distillation.versions().items():
            self._write(name, distilled, self.iteration)

    def _write(self, name: str, distilled: DistilledSet, *tags: str | int) -> None:
        for tag in tags if ranks.first() else ():
            distilled.save(self.folder.path / name, tag, self.dataset)

    def record(self, record: Iteration) -> None:
        """Records an iteration, and moves on to the next. Notes early on, once, if all updates were skipped so far."""
        self._log(record)
        self.tracker.log_step(record)
        if record.iteration + 1 == self.distillation.skipped == SKIPPED_AT_FIRST and ranks.first():
            note(f"the first {SKIPPED_AT_FIRST} updates were all skipped: "
                 f"{skipped_advice(record.loss, as_dict(self.config))}")
        self.iteration, self.evaluated = self.iteration + 1, False

    def _log(self, line: Iteration | Evaluation) -> None:
        """Appends a line to metrics.jsonl."""
        if ranks.first():
            append_metrics(self.folder.log, line)


def best_of(state: dict[str, Any], device: torch.device) -> dict[str, Candidate]:
    """The best sets in a run's saved state."""
    return {name: Candidate(saved["iteration"], DistilledSet(**saved["set"]).to(device),
                            [Score(*score) for score in saved["scores"]]) for name, saved in state["best"].items()}


def _after_epoch(tick: Callable[[], None]) -> None:
    tick()
    interrupt.check()


def rounding(device: torch.device) -> dict[str, str]:
    """What determines rounding besides the engine: torch's version and the device."""
    here = environment(device)
    return {name: here[name] for name in ("torch", "device")}


class DistillView(Progress):
    """The progress bar of a distillation."""

    def __init__(self, run: RunState):
        config, dataset = run.config, run.dataset
        self._run = run
        reached = Metrics.read(run.folder.log).of_set(NORMAL) if ranks.first() else []
        self._accuracy = reached[-1].scores[0].mean if reached else None
        self._evaluation: float | None = None  # seconds of the last one
        self._record: Iteration | None = None  # of the last iteration
        self._in_iterations = plan.evaluation_in_iterations(config, dataset)
        super().__init__(config.Iteration, "distil", initial=run.iteration, quiet=config.quiet,
                         images=config.syn_steps * plan.batch_size(config, dataset), later=self._evaluations_left,
                         device=dataset.device)

    def evaluated(self, scores: list[Score], seconds: float) -> None:
        self._accuracy, self._evaluation = scores[0].mean, seconds
        self._show()

    def stepped(self, record: Iteration) -> None:
        self._record = record
        self._show()
        self.update()

    def _show(self) -> None:
        accuracy = [] if self._accuracy is None else [f"accuracy {100 * self._accuracy:.1f} %"]
        if self._record is None:
            return self.show(*accuracy)
        self.show(f"loss {self._record.loss:.3f}", *accuracy, f"α {self._record.lr:.3g}",
                  f"start epoch {self._record.start_epoch}",
                  f"skipped {self._run.distillation.skipped}")

    def _evaluations_left(self) -> float:
        """Seconds; estimated from the pace of the iterations until the first evaluation."""
        run = self._run
        seconds = self._evaluation or self._in_iterations * (self.pace.seconds or 0.0)
        left = plan.evaluations(run.config, run.iteration)
        if run.evaluated and plan.is_evaluated(run.config, run.iteration):
            left -= 1
        return max(0.0, left * seconds - self.pace.paused_for)
