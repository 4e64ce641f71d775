"""Compares cheaper matching gradients with the exact one, and what each reaches in the same time.

    python scripts/measure/gradients.py --cfg configs/MiniFashion/ConvIN/IPC1.yaml --buffer_path=BUFFERS
        --distilled=SET.safetensors [--key value …] [--json FILE] [--png FILE]

The cheaper gradients are TESLA's, and the exact one truncated to the last three quarters, half and quarter of the inner
steps (DATM.py --adjoint_steps). For --syn_steps and each number of steps T in `STEPS`, on the initial set and on a
distilled one, it measures

* the cosine with the exact gradient of the images, over `SEEDS` seeds of `DRAWS` draws each (of expert, start epoch,
  batches and augmentation; each seed has its own initial set);
* the time of a match relative to the exact gradient's of the same draw, the median over all draws.

Then each gradient distils every seed's initial set, for as many iterations as fit into the time that --Iteration exact
iterations of --syn_steps take here, and the set is evaluated as by DATM.py. ± is the standard deviation: of cosines
over the draws, of accuracies over the seeds, each the mean of its --num_eval networks.

With --json, results so far are kept in FILE.unfinished, and the same command resumes from them; without it nothing is
kept.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, median, pstdev
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.option_checks import check_options
from scripts.common import report_kind, save_report
from utils.config import AUTO, DistillConfig, how_much, identity
from utils.errors import UserError, note, number_of
from utils.files import check_outputs, read_json, reading, resolved, write_json
from utils.program import interrupt
from utils.program.command_line import config_of, typed
from utils.program.console import shown, table
from utils.program.entry import entry

if TYPE_CHECKING:
    from buffer.trajectories import Buffer
    from distill.distilled_set import DistilledSet
    from utils.data.datasets import Dataset

STEPS = (10, 20, 40, 60, 80)
SEEDS, DRAWS = 3, 4
GRADIENTS = {"exact": 1, "TESLA": None, "last 3/4": 3 / 4, "last 1/2": 1 / 2, "last 1/4": 1 / 4}  # share of the steps


class Measured(NamedTuple):
    """One match: its gradient's cosine with the exact one, and its time."""

    cosine: float
    seconds: float


def with_gradient(config: DistillConfig, steps: int, gradient: str) -> DistillConfig:
    share = GRADIENTS[gradient]
    return (replace(config, syn_steps=steps, matching="exact", adjoint_steps=math.ceil(share * steps)) if share else
            replace(config, syn_steps=steps, matching="tesla", adjoint_steps=None))


class Kept:
    """The results so far, in a file beside the report until that is written.

    Args:
        path: of the report; None: nothing is kept.
        of: everything that the results depend on, by name.

    Raises:
        UserError: the file is damaged, or holds results that depend on something else, kept because they took long.
    """

    def __init__(self, path: Path | None, of: dict[str, str]) -> None:
        self._path = path and path.with_name(f"{path.name}.unfinished")
        self._saved: dict[str, dict[str, Any]] = {"of": of, "found": {}}
        if self._path and self._path.exists():
            advice = "give another --json, or delete it"
            with reading(shown(self._path), advice):
                saved = read_json(self._path)
                before, found = (dict(saved[name]) for name in self._saved)
            different = sorted(name for name in before | of if before.get(name) != of.get(name))
            if different:
                raise UserError(f"{shown(self._path)} was begun with other options, files or another machine; what "
                                f"differs: {', '.join(different)}; give what it had to resume it, or {advice}")
            self._saved["found"] = found
            note(f"resuming from the {number_of(len(found), 'part')} in {shown(self._path)}")
        if not self._path:
            note("without --json FILE nothing is kept, and a stopped run starts over")
        interrupt.saves("the parts that are done", "" if self._path else "--json FILE")

    def __contains__(self, name: str) -> bool:
        return name in self._saved["found"]

    def get(self, name: str, find: Callable[..., Any], *given: Any) -> Any:
        """The result of that name, as JSON has it; computed if it is not there yet."""
        if name not in self:
            self._saved["found"][name] = find(*given)
            if self._path:
                write_json(self._path, self._saved)
        return self._saved["found"][name]

    def forget(self) -> None:
        if self._path:
            self._path.unlink(missing_ok=True)


def measured(config: DistillConfig, dataset: "Dataset", buffer: "Buffer", start: "DistilledSet",
             steps: int) -> dict[str, list[Measured]]:
    """Measures all gradients on the same draws in turn, the exact one first."""
    import torch  # takes seconds, and --help and refusals do without it

    from distill.distillation import Distillation

    found: dict[str, list[Measured]] = {gradient: [] for gradient in GRADIENTS}
    for draw in range(DRAWS):
        exact = None
        for gradient in GRADIENTS:
            state = Distillation(with_gradient(config, steps, gradient), dataset, buffer, start)
            segment = state.draw(draw)
            began = perf_counter()
            match = state.match(segment)
            float(match.grad_lr)  # waits for the device
            seconds = perf_counter() - began
            of_images = match.grad_images.double().flatten()
            exact = of_images if exact is None else exact
            cosine = float(torch.cosine_similarity(of_images, exact, dim=0))
            if not math.isfinite(cosine):
                raise UserError(f"the {gradient} gradient of {steps} steps is not finite at a learning rate of "
                                f"{float(start.lr):.4g}; give a smaller --lr_teacher")
            found[gradient].append(Measured(cosine, seconds))
    return found


def reached(config: DistillConfig, dataset: "Dataset", buffer: "Buffer", start: "DistilledSet",
            iterations: int) -> dict[str, Any]:
    """Distils a set for this many iterations and evaluates it."""
    from distill.distillation import Distillation
    from distill.evaluate.networks import evaluate

    state = Distillation(config, dataset, buffer, start)
    for iteration in range(iterations):
        segment = state.draw(iteration)
        state.learn(iteration, segment, state.match(segment))
    return {"iterations": iterations, "skipped": state.skipped,
            "accuracies": evaluate(config, dataset, state.set)[0].accuracies}


def tested(config: DistillConfig, dataset: "Dataset", start: "DistilledSet") -> dict[str, float]:
    """The accuracy of a set as it is, and the seconds that its evaluation takes."""
    from distill.evaluate.networks import evaluate

    began = perf_counter()
    return {"accuracy": evaluate(config, dataset, start)[0].mean, "seconds": perf_counter() - began}


@contextlib.contextmanager
def of_distilled() -> Iterator[None]:
    """Inside, the distilled set is given as --pix_init; refusals name the option that the user gave, --distilled."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--pix_init", "--distilled")) from error


def spread(values: list[float]) -> tuple[float, float]:
    return mean(values), pstdev(values)


def main() -> None:
    options = typed(DistillConfig, __doc__, yaml_file=True, json="write every draw's numbers to this file",
                    png="draw them", distilled="a set that was distilled from these experts")
    files = {name: resolved(options.pop(name)) for name in ("json", "png") if name in options}
    check_outputs({f"--{name}": path for name, path in files.items()}, {"--json": report_kind(), "--png": "png"})
    saved = {"pix_init": options.pop("distilled")} if "distilled" in options else {}
    config, _ = config_of(DistillConfig, options)
    of_saved, _ = config_of(DistillConfig, options | saved)

    check_options(config)
    with of_distilled():
        check_options(of_saved)
    if config.adjoint_steps:
        raise UserError(f"--adjoint_steps {config.adjoint_steps}: full and truncated gradients are compared anyway; "
                        "leave it out")
    if config.lr_teacher == AUTO or config.dry_run:
        given = "--dry_run" if config.dry_run else f"--lr_teacher {AUTO}"
        raise UserError(f"{given}: all gradients are compared at one given rate, and measured at once; leave it out")

    from distill.checks import check_start, check_window  # imports torch, which takes seconds
    from distill.initialize import initial_set
    from distill.load import data_and_experts, data_checksums, labellers_of
    from utils.program.machine import machine
    from utils.program.progress import Progress

    # The experts, the first set of each seed, and the distilled one.
    with of_distilled():
        check_start(of_saved)
    dataset, buffer = data_and_experts(config)
    check_window(config, buffer)
    labellers = labellers_of(config, dataset, buffer)
    seeded = [replace(config, seed=config.seed + number) for number in range(SEEDS)]
    starts = {"first set": [initial_set(each, dataset, labellers)[0].to(dataset.device) for each in seeded]}
    if saved:
        with of_distilled():
            starts["distilled set"] = [initial_set(of_saved, dataset, labellers)[0].to(dataset.device)] * SEEDS

    # Earlier results, and the accuracy of the first sets.
    here, asked = machine(dataset.device), identity(config) | how_much(config)
    kept = Kept(files.get("json"), {name: str(value) for name, value in {
        **asked, **data_checksums(of_saved, dataset, buffer, labellers),
        **{name: here[name] for name in ("torch", "device", "processor")},
        # These decide the time of an iteration, and so how many fit into the same time.
        **{name: getattr(config, name) for name in ("backend", "micro_batch")}
    }.items()})
    before: list[dict[str, float]] = []
    with Progress(SEEDS, "first sets", quiet=config.quiet) as bar:
        for each, start in zip(seeded, starts["first set"]):
            before.append(kept.get(f"first set, seed {each.seed}", tested, each, dataset, start))
            bar.update()

    # The gradients; the bar counts inner steps, each of all gradients.
    found: dict[tuple[str, int, str], list[Measured]] = {}
    steps = sorted({*STEPS, config.syn_steps})
    settings, parts = list(product(steps, GRADIENTS)), {
        f"{what}, {number} steps, seed {each.seed}": (what, number, each, start)
        for (what, sets), number in product(starts.items(), steps) for each, start in zip(seeded, sets)}

    def seconds_of_distillations() -> float:
        an_exact_match = (bar.pace.seconds or 0) * config.syn_steps / (DRAWS * len(GRADIENTS))
        return len(settings) * SEEDS * (config.Iteration * an_exact_match + mean(each["seconds"] for each in before))

    with Progress(sum(number for _, number, _, _ in parts.values()), "gradients", quiet=config.quiet,
                  initial=sum(number for name, (_, number, _, _) in parts.items() if name in kept),
                  later=seconds_of_distillations) as bar:
        measured(config, dataset, buffer, starts["first set"][0], steps[0])  # the first calls allocate
        for name, (what, number, each, start) in parts.items():
            new = name not in kept
            for gradient, of_draws in kept.get(name, measured, each, dataset, buffer, start, number).items():
                found.setdefault((what, number, gradient), []).extend(Measured(*each) for each in of_draws)
            bar.update(new * number)
    times = {setting: median(match.seconds / exact.seconds for what in starts for match, exact in
                             zip(found[what, *setting], found[what, setting[0], "exact"])) for setting in settings}
    seconds = {(number, gradient): time * median(match.seconds for match in found["first set", number, "exact"])
               for (number, gradient), time in times.items()}

    # The distillations.
    budget = config.Iteration * seconds[config.syn_steps, "exact"]
    ends: dict[tuple[int, str], list[dict[str, Any]]] = {setting: [] for setting in settings}
    names = {(each.seed, *setting): "{}, {}, seed {}".format(*setting, each.seed)
             for each, setting in product(seeded, settings)}
    with Progress(len(names), "distillations", quiet=config.quiet,
                  initial=sum(name in kept for name in names.values())) as bar:
        for (each, start), setting in product(zip(seeded, starts["first set"]), settings):
            name = names[each.seed, *setting]
            new = name not in kept
            ends[setting].append(kept.get(name, reached, with_gradient(each, *setting), dataset, buffer, start,
                                          max(1, round(budget / seconds[setting]))))
            bar.update(new)
    worth = [each["accuracy"] for each in before]

    # The table, the numbers and the plot.
    columns = {f"cosine, {what}": {setting: spread([match.cosine for match in found[what, *setting]])
                                   for setting in settings} for what in starts}
    columns[f"accuracy in {budget:.0f} s, %"] = {
        setting: spread([100 * mean(end["accuracies"]) for end in ends[setting]]) for setting in settings}
    print(table([["T", "gradient", "time / exact", "iterations", *columns], *(
        [str(number), gradient, f"{times[number, gradient]:.2f}", str(ends[number, gradient][0]["iterations"]),
         *("{:.2f} ± {:.2f}".format(*column[number, gradient]) for column in columns.values())]
        for number, gradient in settings)]))
    print("accuracy of the first sets: {:.2f} ± {:.2f} %".format(*spread([100 * each for each in worth])))
    save_report(files.get("json"), {
        "options": options | saved, "seeds": SEEDS, "draws": DRAWS, "budget_seconds": budget, "before": worth,
        "matches": [{"set": what, "steps": number, "gradient": gradient, "cosines": [each.cosine for each in matches],
                     "seconds": [each.seconds for each in matches]}
                    for (what, number, gradient), matches in found.items()],
        "distillations": [{"steps": number, "gradient": gradient, "seeds": ends[number, gradient]}
                          for number, gradient in settings]}, dataset.device)
    if "png" in files:
        from scripts.plots import save_by_steps

        save_by_steps(files["png"], columns)
    kept.forget()


if __name__ == "__main__":
    entry(main)
