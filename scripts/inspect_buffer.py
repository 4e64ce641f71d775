"""What is in a folder of experts, and how far they move: for choosing the difficulty window.

    python scripts/inspect_buffer.py buffer_storage/MiniFashion/ConvNetW32 [--png FILE] [--json FILE] [--beside FOLDER]

Prints the network, the experts, their epochs, accuracies and size on disk, those of an unfinished run too, and by start
epoch s the mean over the experts of

    step     ‖θ_{s+1} − θ_s‖ / ‖θ_s‖     what one epoch changes
    segment  ‖θ_{s+M} − θ_s‖ / ‖θ_s‖     what a segment of M = --expert_epochs epochs, which is matched, changes

with their standard deviations. Where these are large the experts learn what is easy; where they are small, what is hard
or nothing any more. Published files have no record of accuracies and options; what is unknown is said.

--beside FOLDER compares these experts with those of the same numbers there, θ′: experts of one seed begin with the same
parameters and see the same batches, so that what they differ in comes from their options.

    apart    ‖θ_s − θ′_s‖ / ‖θ′_s − θ′_0‖    how far from each other they are, of the way that the others have gone
"""

import argparse
import json
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from buffer.experts import SavedEpochs
from buffer.trajectories import expert_files, load_experts, manifest_path
from scripts.plots import save_buffer
from utils.errors import UserError
from utils.files import check_writable, finite, read_config, write_json
from utils.parameters import flatten
from utils.program.command_line import Parser
from utils.program.entry import entry
from utils.program.progress import Progress

ACCURACIES = ("train_accuracy", "test_accuracy")
OPTIONS = ("dataset", "model", "zca", "val_fraction", "lr_teacher", "batch_train", "mom", "l2", "rho_max", "alpha",
           "pad", "seed")  # those worth a line
MOST_ROWS = 20


class Trajectory(NamedTuple):
    """One expert as it was found."""

    number: int
    file: str
    epochs: int  # trained so far
    parameters: int
    accuracies: dict[str, list[float]]  # by epoch from 1; empty where nothing recorded them
    step: list[float]  # by start epoch
    segment: list[float]
    apart: list[float]  # by epoch from 1; empty where there is nothing to compare with


def distances(snapshots: Iterable[Tensor], expert_epochs: int) -> tuple[list[float], list[float]]:
    """Relative distances ‖θ_{s+1} − θ_s‖ / ‖θ_s‖ and ‖θ_{s+M} − θ_s‖ / ‖θ_s‖ of a trajectory, by s.

    Args:
        snapshots: θ_0, θ_1, … [P]; never more than M + 1 of them are held.
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


def apart(snapshots: Iterable[Tensor], others: Iterable[Tensor]) -> list[float]:
    """Relative distances ‖θ_s − θ′_s‖ / ‖θ′_s − θ′_0‖ of two trajectories, by s from 1 to the end of the shorter one.

    Args:
        snapshots: θ_0, θ_1, … [P].
        others: θ′_0, θ′_1, … [P].

    Raises:
        UserError: they begin elsewhere.
    """
    pairs = zip(snapshots, others)
    first, start = next(pairs)
    if not torch.equal(first, start):
        raise UserError("the experts begin with other parameters than those beside them; give experts of the same "
                        "--seed")
    return [float((theta - other).norm() / (other - start).norm()) for theta, other in pairs]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds replay_buffer_*.pt")
    parser.add_argument("--expert_epochs", type=int, default=2, metavar="M", help="epochs of a segment [2]")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="other experts, to compare these with")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, of every expert")
    options = parser.parse_args()
    if options.expert_epochs < 1:
        raise UserError(f"--expert_epochs {options.expert_epochs}: a segment has at least 1 epoch")
    for path in filter(None, (options.png, options.json)):
        check_writable(path)
    report, trajectories = inspect(options.folder, options.expert_epochs, options.beside)
    print_report(report, options.expert_epochs)
    if options.json:
        write_json(options.json, report)
    if options.png:
        tested = "validation" if (report["options"] or {}).get("val_fraction") else "test"
        accuracies = {of: table([each.accuracies.get(name, []) for each in trajectories])
                      for of, name in zip(("training batches", f"{tested} images"), ACCURACIES)}
        save_buffer(options.png, {name: values for name, values in accuracies.items() if np.isfinite(values).any()},
                    {"one epoch": table([each.step for each in trajectories]),
                     f"segment of {options.expert_epochs}": table([each.segment for each in trajectories])})


def inspect(folder: Path, expert_epochs: int, beside: Path | None) -> tuple[dict[str, Any], list[Trajectory]]:
    """All that there is to know of a folder's experts: for JSON, and each expert.

    Raises:
        UserError: no experts, damaged files, or experts of several networks; so of those to compare with.
    """
    unfinished = folder / "unfinished" / "run.yaml"
    files = [(path, load_experts(path)) for path in _paths(folder, or_unfinished=True)]
    other_files = [(path, load_experts(path)) for path in _paths(beside)] if beside else []
    others = [expert for _, experts in other_files for expert in experts]
    shapes = {}
    for path, experts in [*files, *other_files]:
        for snapshot in (snapshot for expert in experts for snapshot in expert):
            shapes.setdefault(tuple(tuple(getattr(each, "shape", (None,))) for each in snapshot), path)
    if len(shapes) > 1 or any(None in shape for found in shapes for shape in found):
        names = sorted({str(path) for path in shapes.values()})
        raise UserError(f"{', '.join(names)}: the snapshots are not all of one network; move away or leave out what "
                        "does not belong there")
    manifests = {path: read_config(manifest_path(path)) for path, _ in files if manifest_path(path).is_file()}
    started = read_config(unfinished) if unfinished.is_file() else None
    trajectories: list[Trajectory] = []
    with Progress(sum(len(experts) for _, experts in files), "experts") as bar:
        for path, experts in files:
            recorded = _recorded(path)
            for expert in experts:
                number = len(trajectories)
                step, segment = distances(_thetas(expert), expert_epochs)
                trajectories.append(Trajectory(
                    number, path.name, len(expert) - 1, sum(map(Tensor.numel, expert[0])), recorded.get(number, {}),
                    step, segment, apart(_thetas(expert), _thetas(others[number])) if number < len(others) else []))
                bar.update()
    known = next(iter(manifests.values()), started)
    report = {
        "folder": str(folder), "experts": len(trajectories), "bytes": sum(path.stat().st_size for path, _ in files),
        "files": [{"name": path.name, "experts": len(experts), "bytes": path.stat().st_size,
                   "manifest": path in manifests} for path, experts in files],
        "epochs": sorted({each.epochs for each in trajectories}),
        "options": known and {name: known[name] for name in OPTIONS if name in known}, "unfinished": None,
        "beside": str(beside) if beside else None}
    if started is not None:
        report["unfinished"] = _unfinished(unfinished.parent, started, expert_epochs, len(trajectories), trajectories)
    report["parameters"] = trajectories[0].parameters if trajectories else None
    report["trajectories"] = [_as_json(each) for each in trajectories]
    report["by_start_epoch"] = {name: _mean_std([getattr(each, name) for each in trajectories])
                                for name in ("step", "segment")}
    report["by_epoch"] = {name: _mean_std([each.accuracies.get(name, []) for each in trajectories])
                          for name in ACCURACIES}
    report["by_epoch"]["apart"] = _mean_std([each.apart for each in trajectories])
    return report, trajectories


def _paths(folder: Path, or_unfinished: bool = False) -> list[Path]:
    """The expert files of a folder, which has some (or an unfinished run)."""
    paths = expert_files(folder)
    if not paths and not (or_unfinished and (folder / "unfinished" / "run.yaml").is_file()):
        below = sorted({str(path.parent) for path in folder.glob("**/replay_buffer_*.pt")})
        advice = f"there are some in {', '.join(below)}: give one of these" if below else (
            "give the folder of a network's experts, <buffer_path>/<dataset>/<model>")
        raise UserError(f"no replay_buffer_*.pt in {folder}; {advice}")
    return paths


def _thetas(expert: Iterable[Iterable[Tensor]]) -> Iterator[Tensor]:
    """Its snapshots, each as a vector [P]."""
    return (flatten(snapshot).float() for snapshot in expert)


def _recorded(path: Path) -> dict[int, dict[str, list[float]]]:
    """Each epoch's accuracies by the number of the expert, from the file beside an expert file, if it is there."""
    found: dict[int, dict[str, list[float]]] = {}
    log = path.with_suffix(".jsonl")
    if not log.is_file():
        return found
    try:
        for line in log.read_text().splitlines():
            epoch = json.loads(line)
            of_expert = found.setdefault(epoch["expert"], {name: [] for name in ACCURACIES})
            for name in ACCURACIES:
                of_expert[name].append(float(epoch[name]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log} is damaged ({type(error).__name__}: {error}); copy it again, or move it away, and its "
                        "accuracies are unknown") from error
    return found


def _unfinished(folder: Path, started: dict[str, Any], expert_epochs: int, written: int,
                trajectories: list[Trajectory]) -> dict[str, Any]:
    """What there is of a run that was stopped or still goes on; its experts are added to the trajectories."""
    begun = []
    for number in range(written, started.get("first_expert", 0) + started.get("num_experts", 0)):
        saved = SavedEpochs(folder / f"expert_{number}")
        if not len(saved):
            continue
        step, segment = distances((saved[epoch]["theta"] for epoch in range(len(saved))), expert_epochs)
        reached = saved.reached()
        trajectories.append(Trajectory(number, "unfinished", len(reached), saved[0]["theta"].numel(),
                                       {name: [each[name] for each in reached] for name in ACCURACIES}, step, segment,
                                       []))
        begun.append({"expert": number, "epochs": len(reached)})
    if len({each.parameters for each in trajectories}) > 1:
        raise UserError(f"{folder} holds experts of another network than the files beside it; move them away")
    return {"experts": begun, "num_experts": started.get("num_experts"), "first_expert": started.get("first_expert"),
            "train_epochs": started.get("train_epochs"),
            "bytes": sum(path.stat().st_size for path in folder.rglob("*.pt"))}


def table(rows: list[list[float]]) -> np.ndarray:
    """Rows of different lengths as one array, NaN where a row has ended."""
    values = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for row, each in zip(values, rows):
        row[:len(each)] = each
    return values


def _mean_std(rows: list[list[float]]) -> list[dict[str, float | None]]:
    """Mean and standard deviation of each column, over the rows that reach it and are finite there."""
    columns = [column[np.isfinite(column)] for column in table(rows).T]
    return [{"mean": float(column.mean()), "std": float(column.std())} if len(column) else {"mean": None, "std": None}
            for column in columns]


def _as_json(each: Trajectory) -> dict[str, Any]:
    return {"expert": each.number, "file": each.file, "epochs": each.epochs, "finite": _is_finite(each),
            **{name: each.accuracies.get(name) for name in ACCURACIES},
            **{name: [finite(value) for value in getattr(each, name)] for name in ("step", "segment", "apart")}}


def _is_finite(each: Trajectory) -> bool:
    return all(map(math.isfinite, each.step))


def print_report(report: dict[str, Any], expert_epochs: int) -> None:
    known, unfinished = report["options"], report["unfinished"]
    name = (known or {}).get("model") or f"{Path(report['folder']).resolve().name}, by the folder's name"
    count = f"{report['parameters']:,} parameters" if report["parameters"] else "no snapshot yet"
    print(f"{'network':12}{name}, {count}")
    if known:
        print(f"{'options':12}" + ", ".join(f"{key} {value}" for key, value in known.items() if key != "model"))
    else:
        print(f"{'options':12}unknown: no manifest beside the files, as with published ones")
    epochs = report["epochs"]
    print(f"{'experts':12}{report['experts']} in {len(report['files'])} files, {_size(report['bytes'])}"
          + (f", epochs 0 … {epochs[0]}" + (f" (some to {epochs[-1]})" if len(epochs) > 1 else "") if epochs else ""))
    without = [file["name"] for file in report["files"] if not file["manifest"]]
    if known and without:
        print(f"{'unknown':12}options and checksums of {', '.join(without)}")
    if unfinished:
        begun = ", ".join(f"expert {each['expert']}: {each['epochs']}" for each in unfinished["experts"])
        print(f"{'unfinished':12}a run of {unfinished['num_experts']} experts of {unfinished['train_epochs']} epochs, "
              f"from expert {unfinished['first_expert']} on; epochs so far: {begun or 'none'}; "
              f"{_size(unfinished['bytes'])}")
    diverged = [str(each["expert"]) for each in report["trajectories"] if not each["finite"]]
    if diverged:
        print(f"{'not finite':12}experts {', '.join(diverged)}: they diverged, or their file is damaged")
    last = [[row[name][-1] for row in report["trajectories"] if row[name]] for name in ACCURACIES]
    if any(last):
        tested = "validation" if known and known.get("val_fraction") else "test"
        print(f"{'accuracy':12}after the last epoch: " + "; ".join(
            f"{of} {100 * min(values):.1f} … {100 * max(values):.1f} %, mean {100 * np.mean(values):.1f} %"
            for of, values in zip(("train", tested), last) if values))
    else:
        print(f"{'accuracy':12}unknown: not recorded beside the files")
    if report["beside"]:
        compared = sum(bool(each["apart"]) for each in report["trajectories"])
        print(f"{'beside':12}{compared} experts of the same numbers in {report['beside']}")
    if epochs:
        most = epochs[0] - expert_epochs + 1
        print(f"{'window':12}--expert_epochs {expert_epochs} allows "
              + (f"--max_start_epoch {most} or less" if most > 0 else "no window: the experts are too short"))
    _print_table(report, expert_epochs)


def _print_table(report: dict[str, Any], expert_epochs: int) -> None:
    by_start, by_epoch = report["by_start_epoch"], report["by_epoch"]
    total = max(len(by_start["step"]) + 1, 1)
    rows = [("epoch s", "train, %", "test, %", "step", f"segment of {expert_epochs}")]
    # Accuracies are recorded from epoch 1 on.
    columns = [([None, *by_epoch[name]], 100, ".1f") for name in ACCURACIES]
    columns += [(by_start[name], 1, ".4f") for name in ("step", "segment")]
    if report["beside"]:
        rows = [(*rows[0], "apart")]
        columns.append(([None, *by_epoch["apart"]], 1, ".4f"))
    for epoch in dict.fromkeys(np.linspace(0, total - 1, min(total, MOST_ROWS)).round().astype(int).tolist()):
        rows.append((str(epoch), *(_cell(values[epoch] if epoch < len(values) else None, scale, digits)
                                   for values, scale, digits in columns)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def _cell(value: dict[str, float | None] | None, scale: float, digits: str) -> str:
    if value is None or value["mean"] is None:
        return "-"
    return f"{scale * value['mean']:{digits}} ± {scale * value['std']:{digits}}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    entry(main)
