"""Shows what a folder of experts holds and how far they move, for choosing the difficulty window.

    python scripts/inspect_buffer.py buffer_storage/MiniFashion/ConvNetW32 [--png FILE] [--json FILE] [--beside FOLDER]
    python scripts/inspect_buffer.py buffer_storage/MiniFashion/ConvNetW32 --suggest --ipc 1 [--png FILE] [--json FILE]

Prints the network, the experts, their epochs, accuracies and size on disk, and how far an unfinished run is. For each
start epoch s it prints mean and standard deviation over the experts of

    step     ‖θ_{s+1} − θ_s‖ / ‖θ_s‖     the change in one epoch
    segment  ‖θ_{s+M} − θ_s‖ / ‖θ_s‖     the change over a matched segment of M = --expert_epochs epochs

Where these are large, the experts learn what is easy; where they are small, what is hard, or nothing any more.
Published files do not record accuracies and options; the output says what is unknown.

--beside FOLDER compares each expert with the expert of the same number in FOLDER, θ′. Experts of one seed begin with
the same parameters and see the same batches, so their differences come from their options.

    apart    ‖θ_s − θ′_s‖ / ‖θ′_s − θ′_0‖    the distance between the two, relative to how far θ′ has moved

--suggest proposes settings for distilling to --ipc images per class. It starts from the initial set (real images with
the experts' labels) and measures its matching loss at several learning rates, numbers of steps and segments along the
whole trajectory (distill/suggest.py). It prints the losses as a table, draws them with --png, and prints the command to
distil with.
"""

import itertools
import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

import numpy as np

from buffer.manifests import (
    ACCURACIES,
    accuracies_by_epoch,
    buffer_folder,
    expert_files,
    experts_in_words,
    made_by,
    manifest_path,
    manifests_of,
    require_experts,
    run_file,
    unfinished_run,
)
from distill.option_checks import check_options
from distill.result_files import images_tested, tested_on
from scripts.common import ScriptParser, positive, save_report
from utils.config import BufferConfig, DistillConfig, defaults, make
from utils.errors import UserError, some_of
from utils.files import REPOSITORY, finite
from utils.program import console
from utils.program.command_line import parse
from utils.program.commands import command, say_next
from utils.program.entry import entry

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "configs/MiniFashion/ConvIN/IPC1.yaml"  # for options that are neither known from the experts nor measured
OF_DATA = ("dataset", "subset", "model", "zca", "res", "val_fraction", "data_path")
OPTIONS = ("dataset", "model", "zca", "val_fraction", "lr_teacher", "batch_train", "mom", "l2", "rho_max", "alpha",
           "pad", "seed")  # the ones that are printed
MOST_ROWS = 32


def distances(snapshots: Iterable["Tensor"], expert_epochs: int) -> tuple[list[float], list[float]]:
    """Relative distances ‖θ_{s+1} − θ_s‖ / ‖θ_s‖ and ‖θ_{s+M} − θ_s‖ / ‖θ_s‖ of a trajectory, by s.

    Args:
        snapshots: θ_0, θ_1, … [P]; at most M + 1 of them are held at once.
        expert_epochs: M.
    """
    step, segment, last = [], [], deque(maxlen=expert_epochs + 1)
    for theta in snapshots:
        last.append(theta)
        if len(last) > 1:
            step.append(float((theta - last[-2]).norm() / last[-2].norm()))
        if len(last) > expert_epochs:
            segment.append(float((theta - last[0]).norm() / last[0].norm()))
    return step, segment


def apart(snapshots: Iterable["Tensor"], others: Iterable["Tensor"]) -> list[float]:
    """Relative distances ‖θ_s − θ′_s‖ / ‖θ′_s − θ′_0‖ of two trajectories, by s from 1 to the end of the shorter one.

    Args:
        snapshots: θ_0, θ_1, … [P].
        others: θ′_0, θ′_1, … [P].

    Raises:
        UserError: they begin with different parameters.
    """
    pairs = zip(snapshots, others)
    first, start = next(pairs)
    if not first.equal(start):
        raise UserError("the experts begin with other parameters than those beside them; give experts of the same "
                        "--seed")
    return [float((theta - other).norm() / (other - start).norm()) for theta, other in pairs]


def main() -> None:
    parser = ScriptParser(__doc__, json="the numbers, of every expert,")
    parser.add_argument("folder", type=Path, help="holds replay_buffer_*.pt")
    parser.add_argument("--expert_epochs", type=positive, metavar="M", help="epochs of a segment [2]")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="other experts, to compare these with")
    parser.add_output("png", "png", "draw the report or, with --suggest, the losses")
    parser.add_argument("--suggest", action="store_true", help="measure which settings fit, and print the command")
    parser.add_argument("--ipc", type=positive, help="images per class, with --suggest")
    options = parser.parse_args()
    if options.suggest != (options.ipc is not None):
        raise UserError("give --suggest and --ipc N together; N is the number of images per class of the set to come")
    if options.suggest:
        if options.expert_epochs or options.beside:
            raise UserError("--suggest takes neither --expert_epochs, as it measures which M fits, nor --beside; leave "
                            "them out")
        suggest_settings(options.folder, options.ipc, options.png, options.json)
        return
    expert_epochs = options.expert_epochs or 2
    report = inspect(options.folder, expert_epochs, options.beside)
    print_report(report, expert_epochs)
    save_report(options.json, report, "cpu")
    if options.png:
        from scripts.plots import save_buffer

        experts = report["trajectories"]
        accuracies = {of: of_all(name, experts)
                      for of, name in zip(("training batches", f"{experts_tested_on(report)} images"), ACCURACIES)}
        save_buffer(options.png, {name: values for name, values in accuracies.items() if np.isfinite(values).any()},
                    {"one epoch": of_all("step", experts), f"segment of {expert_epochs}": of_all("segment", experts)}
                    # Distances begin at epoch 1.
                    | ({"from --beside, at this epoch": np.pad(of_all("apart", experts), ((0, 0), (1, 0)),
                                                               constant_values=np.nan)} if options.beside else {}))


def suggest_settings(folder: Path, ipc: int, png: Path | None, json: Path | None) -> None:
    """Measures which settings fit the experts of a folder, and prints how to distil them.

    Raises:
        UserError: no experts, experts without a manifest, or data that is no longer there.
    """
    options = distilling(folder, ipc)
    config = parse(DistillConfig, "", [f"--{name}={value}" for name, value in options.items()], yaml_file=True)
    check_options(config)

    from distill.load import data_and_experts  # imports torch, which takes seconds
    from distill.suggest import suggestion
    from utils.program.progress import watched

    dataset, buffer = data_and_experts(config)
    buffer.verify(watched)
    suggested = suggestion(config, dataset, buffer, buffer)
    print(f"{suggested}\n")
    save_report(json, suggested.as_json(), dataset.device)
    if png:
        from scripts.plots import save_losses

        save_losses(png, suggested)
    say_next(config, "next, to distil them (the config sets the rest):",
             command("distill/DATM.py", options | suggested.options))


def distilling(folder: Path, ipc: int) -> dict[str, Any]:
    """Options for distilling these experts that follow from their manifest and the images per class: one image per
    class gets factor 2 (four in one), which was better wherever it was tried (results/suggestion).

    Raises:
        UserError: no experts, no manifest, or a folder in which distill/DATM.py would not look for them.
    """
    check_folder(folder)
    made = made_by(folder)
    if not made:
        raise UserError(f"{folder} has no replay_buffer_*.yaml, which would say what its experts were trained on; give "
                        "distill/DATM.py --dry_run with the options of the distillation, which measures the same")
    made_with = defaults(BufferConfig) | made[0]
    known = {name: made_with[name] for name in OF_DATA if made_with[name] is not None}
    below = buffer_folder(make(DistillConfig, **known, buffer_path="experts")).relative_to("experts")
    folder = Path(os.path.abspath(folder))  # without resolving symbolic links
    if not str(folder).endswith(f"/{below}"):
        raise UserError(f"{folder} holds experts that distill/DATM.py looks for in <buffer_path>/{below}; move them "
                        "there, or give DATM.py --dry_run")
    if known["dataset"] != "ImageNet":
        known.pop("subset", None)
    if not known["val_fraction"]:
        del known["val_fraction"]
    return {"cfg": REPOSITORY / CONFIG, **known, "data_path": REPOSITORY / known["data_path"],
            "buffer_path": folder.parents[len(below.parts) - 1], "ipc": ipc,
            **({"factor": 2} if ipc == 1 else {})}


def inspect(folder: Path, expert_epochs: int, beside: Path | None) -> dict[str, Any]:
    """The report on a folder's experts, as JSON holds it.

    Raises:
        UserError: no experts, damaged files, or experts of several networks, here or among those to compare with.
    """
    check_folder(folder, or_unfinished=True)
    if beside:
        check_folder(beside)

    from buffer.trajectories import load_experts  # imports torch, which takes seconds
    from utils.program.progress import Progress

    started, paths = unfinished_run(folder), expert_files(folder)  # not before: a run may be going on
    other_paths = expert_files(beside) if beside else []
    files, other_files = ([(path, load_experts(path)) for path in each] for each in (paths, other_paths))
    others = [expert for _, experts in other_files for expert in experts]
    shapes = {}
    for path, experts in [*files, *other_files]:
        for snapshot in (snapshot for expert in experts for snapshot in expert):
            shapes.setdefault(tuple(tuple(getattr(each, "shape", (None,))) for each in snapshot), path)
    if len(shapes) > 1 or any(None in shape for found in shapes for shape in found):
        names = sorted({str(path) for path in shapes.values()})
        raise UserError(f"{', '.join(names)}: the snapshots are not all of one network; give other experts, "
                        "or move away what does not belong there")
    manifests = manifests_of(folder)
    # One per expert. `step` and `segment` are by start epoch; accuracies, if recorded, and `apart`, if there is another
    # to compare with, by epoch from 1.
    trajectories: list[dict[str, Any]] = []
    with Progress(sum(len(experts) for _, experts in files), "experts") as bar:
        for path, experts in files:
            # Matched by order: in a folder with the files of several runs, recorded numbers are not the folder's.
            for expert, recorded in itertools.zip_longest(experts, accuracies_by_epoch(path)[:len(experts)]):
                number = len(trajectories)
                step, segment = distances(_thetas(expert), expert_epochs)
                beyond = apart(_thetas(expert), _thetas(others[number])) if number < len(others) else []
                series = {name: list(map(finite, values)) for name, values in
                          (("step", step), ("segment", segment), ("apart", beyond))}
                trajectories.append({"expert": number, "file": path.name, "epochs": len(expert) - 1,
                                     "finite": None not in series["step"],
                                     **(recorded or dict.fromkeys(ACCURACIES)), **series})
                bar.update()
    known = list(manifests.values()) or ([started] if started else [])
    by_name = {name: _mean_std(of_all(name, trajectories)) for name in ("step", "segment", *ACCURACIES, "apart")}
    return {
        "folder": str(folder), "experts": len(trajectories), "bytes": sum(path.stat().st_size for path, _ in files),
        "files": [{"name": path.name, "experts": len(experts), "bytes": path.stat().st_size,
                   "manifest": manifest_path(path) in manifests} for path, experts in files],
        "epochs": sorted({each["epochs"] for each in trajectories}),
        "options": {name: _shared([each[name] for each in known if name in each])
                    for name in OPTIONS if any(name in each for each in known)} or None,
        "unfinished": _progress(folder, started) if started else None,
        "beside": str(beside) if beside else None,
        "parameters": sum(map(math.prod, next(iter(shapes)))) if trajectories else None,
        "trajectories": trajectories,
        "by_start_epoch": {name: by_name.pop(name) for name in ("step", "segment")}, "by_epoch": by_name}


def check_folder(folder: Path, or_unfinished: bool = False) -> None:
    """Refuses a folder without expert files; with `or_unfinished`, an unfinished run will do."""
    if not expert_files(folder) and not run_file(folder).is_file():
        below = sorted({str(path.parent) for path in folder.glob("**/replay_buffer_*.pt")})
        raise UserError(f"no replay_buffer_*.pt in {folder}; " + (
            f"there are some in {some_of(below)}: give one of these" if below else
            "give the folder of a network's experts, <buffer_path>/<dataset>/<model>"))
    if not or_unfinished:
        require_experts(folder, "folder")


def _shared(values: list[Any]) -> Any:
    """The value that all have, or the list of the different ones."""
    different = [value for number, value in enumerate(values) if value not in values[:number]]
    return different[0] if len(different) == 1 else different


def _thetas(expert: Iterable[Iterable["Tensor"]]) -> Iterator["Tensor"]:
    """An expert's snapshots, each as a vector [P]."""
    from utils.parameters import flatten

    return (flatten(snapshot).float() for snapshot in expert)


def _progress(folder: Path, started: dict[str, Any]) -> dict[str, Any]:
    """How far a run is that was stopped or is still going on."""
    from buffer.experts import SavedEpochs

    numbers = range(started["first_expert"], started["first_expert"] + started["num_experts"])
    saved = {number: SavedEpochs(run_file(folder).parent / f"expert_{number}") for number in numbers}
    return {"experts": [{"expert": number, "epochs": each.done} for number, each in saved.items() if len(each)],
            **{name: started.get(name) for name in ("num_experts", "first_expert", "train_epochs")}}


def of_all(name: str, trajectories: list[dict[str, Any]]) -> np.ndarray:
    """A series of all experts [experts, epochs], NaN where there is none."""
    rows = [each[name] or [] for each in trajectories]
    values = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for row, each in zip(values, rows):
        row[:len(each)] = each
    return values


def _mean_std(values: np.ndarray) -> list[dict[str, float | None]]:
    """Mean and standard deviation of each column, over the rows that reach it and are finite there."""
    columns = [column[np.isfinite(column)] for column in values.T]
    return [{"mean": float(column.mean()) if len(column) else None,
             "std": float(column.std()) if len(column) > 1 else None} for column in columns]  # none over a single value


def experts_tested_on(report: dict[str, Any]) -> str:
    """Which images the experts were tested on, in words."""
    fraction = (report["options"] or {}).get("val_fraction")
    return "test or held-out" if isinstance(fraction, list) else images_tested(tested_on(fraction))


def print_report(report: dict[str, Any], expert_epochs: int) -> None:
    known, unfinished, epochs = report["options"], report["unfinished"], report["epochs"]

    def say(what: str, text: str) -> None:
        print(f"{what:12}{text}")

    say("network", ((known or {}).get("model") or f"{Path(report['folder']).resolve().name}, by the folder's name")
        + (f", {report['parameters']:,} parameters" if report["parameters"] else ", no snapshot yet"))
    say("options", ", ".join(f"{key} {' and '.join(map(str, value)) if isinstance(value, list) else value}"
                             for key, value in known.items() if key != "model") if known else
        "unknown: no manifest beside the files, as with published ones")
    say("experts", f"{report['experts']} in {console.number_of(len(report['files']), 'file')}, "
        f"{console.short_count(report['bytes'])}B"
        + (f", epochs 0 … {epochs[0]}" + (f" (some to {epochs[-1]})" if len(epochs) > 1 else "") if epochs else ""))
    without = [file["name"] for file in report["files"] if not file["manifest"]]
    if known and without:
        say("unknown", f"options and checksums of {', '.join(without)}")
    if unfinished:
        begun = ", ".join(f"expert {each['expert']}: {each['epochs']}" for each in unfinished["experts"])
        say("unfinished", f"a run of {experts_in_words(unfinished['num_experts'], unfinished['train_epochs'])}, from "
            f"expert {unfinished['first_expert']} on; epochs so far: {begun or 'none'}")
    diverged = [str(each["expert"]) for each in report["trajectories"] if not each["finite"]]
    if diverged:
        say("not finite", f"experts {', '.join(diverged)}: they diverged, or their file is damaged")
    reached = [[row[name][-1] for row in report["trajectories"] if row[name]] for name in ACCURACIES]
    said = [f"{of} {_spread(values)}" for of, values in zip(("train", experts_tested_on(report)), reached) if values]
    say("accuracy", f"after the last epoch: {'; '.join(said)}" if said else
        "unknown: recorded for no finished expert")
    if report["beside"]:
        compared = sum(bool(each["apart"]) for each in report["trajectories"])
        say("beside", f"{console.number_of(compared, 'expert')} with the same number in {report['beside']}")
    if epochs:
        most = epochs[0] - expert_epochs + 1
        say("window", f"--expert_epochs {expert_epochs} allows "
            + (f"--max_start_epoch {most} or less" if most > 0 else "no window: the experts are too short"))
    if not report["trajectories"]:
        return
    rows = _by_epoch(report, expert_epochs)
    print(f"\n{console.table(rows)}")
    last = len(report["by_start_epoch"]["step"])
    if len(rows) - 1 <= last:
        print(f"{len(rows) - 1} of {last + 1} epochs; --json has all")


def _spread(values: list[float]) -> str:
    """Accuracies in words: their range and mean, or the only one."""
    least, most, mean = (100 * of(values) for of in (min, max, np.mean))
    return f"{least:.1f} … {most:.1f} %, mean {mean:.1f} %" if len(values) > 1 else f"{mean:.1f} %"


def _by_epoch(report: dict[str, Any], expert_epochs: int) -> list[list[str]]:
    """The rows of the table."""
    by_start, by_epoch = report["by_start_epoch"], report["by_epoch"]
    # Accuracies are recorded from epoch 1 on.
    columns = [(f"{of}, %", [None, *by_epoch[name]], 100, ".1f")
               for of, name in zip(("train", experts_tested_on(report)), ACCURACIES)]
    columns += [("step", by_start["step"], 1, ".4f"), (f"segment of {expert_epochs}", by_start["segment"], 1, ".4f")]
    if report["beside"]:
        columns.append(("apart", [None, *by_epoch["apart"]], 1, ".4f"))
    rows = [["epoch s", *(head for head, *_ in columns)]]
    for epoch in console.thinned(range(len(by_start["step"]) + 1), MOST_ROWS):
        rows.append([str(epoch), *(_cell(values[epoch] if epoch < len(values) else None, scale, digits)
                                   for _, values, scale, digits in columns)])
    return rows


def _cell(value: dict[str, float | None] | None, scale: float, digits: str) -> str:
    if value is None or value["mean"] is None:
        return "-"
    spread = "" if value["std"] is None else f" ± {scale * value['std']:{digits}}"
    return f"{scale * value['mean']:{digits}}{spread}"


if __name__ == "__main__":
    entry(main)
