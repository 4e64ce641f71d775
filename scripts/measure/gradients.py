"""How far cheaper gradients of matching are from the exact one, and what each reaches in the same time.

    python scripts/measure/gradients.py --cfg configs/MiniFashion/ConvIN/IPC1.yaml --buffer_path=BUFFERS
        --distilled=SET.safetensors [--key value …] [--json FILE] [--png FILE]

They are TESLA's, and the exact one truncated to the last three quarters, half and quarter of the inner steps
(DATM.py --adjoint_steps). For each number of steps T in `STEPS`, on the first set and on a distilled one: the cosine
with the exact gradient of the images over `SEEDS` sets of `DRAWS` draws (of expert, start epoch, batches and
augmentation; of each seed the first images too), and the time of a match beside the exact one's, in the median. Then
each distils the first set of every seed for as long as --Iteration exact iterations of --syn_steps take here, and the
set is evaluated as DATM.py would. Everything ± the standard deviation: of cosines over the draws, of accuracies over
the seeds, each the mean of its --num_eval networks.

With --json the same command goes on where it was stopped, by what it has kept in FILE.unfinished.
"""

import contextlib
import math
import sys
from collections.abc import Callable
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
from scripts.common import save_report
from utils.config import DistillConfig
from utils.files import check_output, given, read_json, write_json
from utils.program.command_line import config_of, typed
from utils.program.console import note, number_of, shown, table
from utils.program.entry import entry

if TYPE_CHECKING:
    from buffer.trajectories import Buffer
    from distill.distilled_set import DistilledSet
    from utils.data.datasets import Dataset

STEPS = (10, 20, 40, 60, 80)
SEEDS, DRAWS = 3, 4
GRADIENTS = {"exact": 1, "TESLA": None, "last 3/4": 3 / 4, "last 1/2": 1 / 2, "last 1/4": 1 / 4}  # share of the steps
KINDS = {"json": "json:report_of", "png": "png"}


class Measured(NamedTuple):
    """One match."""

    cosine: float
    seconds: float


def with_gradient(config: DistillConfig, steps: int, gradient: str) -> DistillConfig:
    share = GRADIENTS[gradient]
    return (replace(config, syn_steps=steps, matching="exact", adjoint_steps=math.ceil(share * steps)) if share else
            replace(config, syn_steps=steps, matching="tesla", adjoint_steps=None))


class Kept:
    """What was found so far, in a file beside that of the report, until that is written.

    Args:
        path: of the report; None: nothing is kept.
        key: what everything depends on; what was found for another key does not count.
    """

    def __init__(self, path: Path | None, key: Any) -> None:
        self._path = path and path.with_name(f"{path.name}.unfinished")
        self._saved: dict[str, Any] = {"key": key, "found": {}}
        if self._path and self._path.exists():
            with contextlib.suppress(Exception):  # whatever it is, it can be found again
                saved = read_json(self._path)
                if saved["key"] == key and isinstance(saved["found"], dict):
                    self._saved = saved
            kept = len(self._saved["found"])
            note(f"going on with the {number_of(kept, 'part')} in {shown(self._path)}" if kept else
                 f"note: {shown(self._path)} is of other options, experts, set or machine; starting over")

    def get(self, name: str, find: Callable[..., Any], *given: Any) -> Any:
        """What was found under a name, as JSON has it, or is found now."""
        if name not in self._saved["found"]:
            self._saved["found"][name] = find(*given)
            if self._path:
                write_json(self._path, self._saved)
        return self._saved["found"][name]

    def forget(self) -> None:
        if self._path:
            self._path.unlink(missing_ok=True)


def measured(config: DistillConfig, dataset: "Dataset", buffer: "Buffer", start: "DistilledSet",
             steps: int) -> dict[str, list[Measured]]:
    """The same draws by all gradients in turn, the exact one first."""
    import torch  # which takes seconds; so here, and not for --help and refusals

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
            found[gradient].append(Measured(cosine, seconds))
    return found


def reached(config: DistillConfig, dataset: "Dataset", buffer: "Buffer", start: "DistilledSet",
            iterations: int) -> dict[str, Any]:
    """What so many iterations make of a set."""
    from distill.distillation import Distillation
    from distill.evaluate.networks import evaluate

    state = Distillation(config, dataset, buffer, start)
    for iteration in range(iterations):
        segment = state.draw(iteration)
        state.learn(iteration, segment, state.match(segment))
    return {"iterations": iterations, "skipped": state.skipped,
            "accuracies": evaluate(config, dataset, state.set)[0].accuracies}


def spread(values: list[float]) -> tuple[float, float]:
    return mean(values), pstdev(values)


def main() -> None:
    options = typed(DistillConfig, __doc__, yaml_file=True, json="write every draw's numbers to this file",
                    png="draw them", distilled="a set that was distilled from these experts")
    files = {name: given(options.pop(name)) for name in KINDS if name in options}
    for name, path in files.items():
        check_output(f"--{name}", path, KINDS[name], {f"--{each}": files[each] for each in files if each != name})
    saved = {"pix_init": options.pop("distilled")} if "distilled" in options else {}
    config, _ = config_of(DistillConfig, options)
    of_saved, _ = config_of(DistillConfig, options | saved)

    for each in (config, of_saved):
        check_options(each)

    from distill.checks import check_window  # and torch, which takes seconds
    from distill.evaluate.networks import evaluate
    from distill.initialize import checksums, initial_set, labellers_of
    from distill.loop import opened
    from utils.program.machine import environment
    from utils.program.progress import Progress

    # The experts, the first set of each seed, and the distilled one.
    dataset, buffer = opened(config)
    check_window(config, buffer)
    labellers = labellers_of(config, dataset, buffer)
    seeded = [replace(config, seed=config.seed + number) for number in range(SEEDS)]
    starts = {"first set": [initial_set(each, dataset, labellers)[0].to(dataset.device) for each in seeded]}
    if saved:
        starts["distilled set"] = [initial_set(of_saved, dataset, labellers)[0].to(dataset.device)] * SEEDS

    # The gradients.
    here, read = environment(dataset.device), checksums(of_saved, dataset, buffer, labellers)
    kept = Kept(files.get("json"), [options | saved, read, here["torch"], here["device"]])
    found: dict[tuple[str, int, str], list[Measured]] = {}
    steps = sorted({*STEPS, config.syn_steps})
    with Progress(len(starts) * len(steps) * SEEDS, "gradients", quiet=config.quiet) as bar:
        measured(config, dataset, buffer, starts["first set"][0], steps[0])  # the first calls allocate
        for (what, sets), number in product(starts.items(), steps):
            for each, start in zip(seeded, sets):
                matches = kept.get(f"{what}, {number} steps, seed {each.seed}",
                                   measured, each, dataset, buffer, start, number)
                for gradient, of_draws in matches.items():
                    found.setdefault((what, number, gradient), []).extend(Measured(*each) for each in of_draws)
                bar.update()
    settings = list(product(steps, GRADIENTS))
    seconds = {setting: median(match.seconds for match in found["first set", *setting]) for setting in settings}

    # The distillations.
    budget = config.Iteration * seconds[config.syn_steps, "exact"]
    ends: dict[tuple[int, str], list[dict[str, Any]]] = {setting: [] for setting in settings}
    with Progress(len(settings) * SEEDS, "distillations", quiet=config.quiet) as bar:
        for (each, start), setting in product(zip(seeded, starts["first set"]), settings):
            ends[setting].append(kept.get(
                "{}, {}, seed {}".format(*setting, each.seed), reached, with_gradient(each, *setting), dataset, buffer,
                start, max(1, round(budget / seconds[setting]))))
            bar.update()
    before = [evaluate(each, dataset, start)[0].mean for each, start in zip(seeded, starts["first set"])]

    # The table, the numbers and the plot.
    columns = {f"cosine, {what}": {setting: spread([match.cosine for match in found[what, *setting]])
                                   for setting in settings} for what in starts}
    columns[f"accuracy in {budget:.0f} s, %"] = {
        setting: spread([100 * mean(end["accuracies"]) for end in ends[setting]]) for setting in settings}
    print(table([["T", "gradient", "time / exact", "iterations", *columns], *(
        [str(number), gradient, f"{seconds[number, gradient] / seconds[number, 'exact']:.2f}",
         str(ends[number, gradient][0]["iterations"]),
         *("{:.2f} ± {:.2f}".format(*column[number, gradient]) for column in columns.values())]
        for number, gradient in settings)]))
    print("accuracy of the first sets: {:.2f} ± {:.2f} %".format(*spread([100 * each for each in before])))
    save_report(files.get("json"), {
        "options": options | saved, "seeds": SEEDS, "draws": DRAWS, "budget_seconds": budget, "before": before,
        "matches": [{"set": what, "steps": number, "gradient": gradient, "cosines": [each.cosine for each in matches],
                     "seconds": [each.seconds for each in matches]}
                    for (what, number, gradient), matches in found.items()],
        "distillations": [{"steps": number, "gradient": gradient, "seeds": ends[number, gradient]}
                          for number, gradient in settings]})
    kept.forget()
    if "png" in files:
        from scripts.plots import save_by_steps

        save_by_steps(files["png"], columns)


if __name__ == "__main__":
    entry(main)
