"""Runs every row of README's Fashion-MNIST tables, and makes the tables and plots. Started by reproduce.sh.

    bash scripts/reproduce.sh --small                          # everything, or what is missing of it
    bash scripts/reproduce.sh --small --list                   # the commands, and nothing else
    bash scripts/reproduce.sh --small --tables                 # tables and plots of what is there
    python scripts/reproduce.py --small --tables --results results/FashionMNIST/small

`--small` is ConvNetW32 with four experts of ten epochs on a CPU, else it is ConvNet with twenty of forty on a GPU. The
experts and the distillations see nine tenths of the training images: the best set of a run and all settings are chosen
on the other tenth, and the test images are met by the last evaluation alone. Everything is kept in reproduce/small or
reproduce/full: experts/, logged_files/, results/ (a JSON file for each row, the runs' metrics, tables.md and plots),
output/ (what each command printed) and commands.json (each command and its seconds, so that a result that was made
otherwise is not taken for this one's).
"""

import argparse
import fnmatch
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import BufferConfig, DistillConfig, Parser, read_yaml
from utils.errors import UserError
from utils.files import REPOSITORY, atomic_write, write_text
from utils.progress import duration
from utils.run import entry, write_json

PER_FILE = BufferConfig().save_interval
# Test accuracies of the published ConvNet on Fashion-MNIST at 1, 10 and 50 images a class: random, DC and DSA from
# their papers (Zhao et al. 2021, Zhao & Bilen 2021), MTT from its authors' later comparisons.
PUBLISHED = {"random": (51.4, 73.8, 82.5), "DC": (70.5, 82.3, 83.6), "DSA": (70.6, 84.6, 88.7),
             "MTT": (75.3, 87.2, 88.3)}
PUBLISHED_IPCS, PUBLISHED_WHOLE = (1, 10, 50), 93.5
# Of the experts' GSAM: FTD's published command, none, and the option's default, which suits its adaptive perturbation.
RHO = {"FTD": 0.01, "SGD": 0.0, "FTD_2": 2.0}


@dataclass(frozen=True)
class Form:
    """What differs between the small and the full form."""

    root: Path
    dataset: str
    model: str
    configs: str  # their folder
    experts: int
    epochs: int
    windows: dict[str, tuple[int, int]]  # (first start epoch, end, exclusive)
    windows_at: tuple[int, ...]  # the images per class at which these are compared
    at: int  # those at which single ideas are taken away
    seeds: tuple[int, ...]  # with which the ideas that differ by no more than chance are distilled once more
    cross: int  # the images per class of the cross-architecture table
    cross_lr: dict[str, float]  # networks there for which the learned rate is too high, and one that suits them
    networks: int  # of each evaluation
    epoch_eval: dict[int, int]  # epochs of an evaluation, by images per class
    whole_epochs: int
    random_lr: dict[int, float]  # learning rates of random images, chosen on the held-out ones
    whole_lr: float
    backend: str  # of the experts; the configs have their own
    threads: int | None  # of each command; the bits depend on it
    tried: tuple[tuple[str, int, str, tuple[str, ...]], ...]  # where a row fell short: what, images, name, options

    @property
    def ipcs(self) -> tuple[int, ...]:
        return tuple(self.epoch_eval)

    def config(self, ipc: int) -> str:
        return f"{self.configs}/IPC{ipc}.yaml"


SMALL = Form(
    Path("reproduce/small"), "FashionMNIST", "ConvNetW32", "configs/FashionMNIST/ConvIN_W32", experts=4, epochs=10,
    windows={"early": (0, 3), "middle": (3, 6), "late": (6, 9)}, windows_at=(1, 10, 50), at=10, seeds=(1, 2), cross=1,
    cross_lr={"AlexNet": 0.01, "VGG11": 0.01}, networks=5, epoch_eval={1: 300, 10: 300, 50: 100}, whole_epochs=8,
    random_lr={1: 0.01, 10: 0.03, 50: 0.01}, whole_lr=0.01, backend="compile", threads=1,
    tried=(("the middle window at 1 a class, without the threshold and from a smaller α", 1, "window_middle_unskipped",
            ("--min_start_epoch=3", "--max_start_epoch=6", "--Sequential_Generation=False", "--threshold=inf",
             "--lr_teacher=0.01")),))
FULL = Form(
    Path("reproduce/full"), "FashionMNIST", "ConvNet", "configs/FashionMNIST/ConvIN", experts=20, epochs=40,
    windows={"early": (0, 10), "middle": (14, 24), "late": (28, 38)}, windows_at=(1, 50), at=10, seeds=(), cross=10,
    cross_lr={}, networks=5, epoch_eval={1: 1000, 10: 1000, 50: 1000}, whole_epochs=60,
    random_lr={1: 0.01, 10: 0.01, 50: 0.01}, whole_lr=0.01, backend="auto", threads=None, tried=())


@dataclass(frozen=True)
class Step:
    """A command, and the file that is there when it is done."""

    name: str
    result: Path
    command: tuple[str, ...]
    needs: tuple["Step", ...] = ()

    def __str__(self) -> str:
        return shlex.join(self.command)

    @property
    def asked(self) -> str:
        """The command but for the number of its ranks, which changes nothing."""
        return shlex.join(self.command[next(at for at, word in enumerate(self.command) if word.endswith(".py")):])

    @property
    def config(self) -> dict[str, Any] | None:
        """What its YAML says, if it has one."""
        path = next((word.removeprefix("--cfg=") for word in self.command if word.startswith("--cfg=")), None)
        return path and read_yaml(path, DistillConfig)


@dataclass(frozen=True)
class Row:
    """A line of a table: what it says, its evaluation, and what made the set."""

    says: str
    name: str
    evaluation: Step
    made_by: Step | None = None


@dataclass
class Plan:
    """All steps of a form, in the order in which they are begun, and the tables that they fill."""

    form: Form
    jobs: int
    steps: list[Step] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        form, exact, distilled = self.form, "exact gradient (DATM)", {}
        self.experts = {kind: self._experts(kind, rho) for kind, rho in RHO.items()}
        self.looks = {kind: self._look(kind) for kind in RHO}
        for ipc in reversed(form.ipcs):  # the longest first
            self.tables[_images(ipc)] = [
                self._baseline("random real images", f"ipc{ipc}_random", ipc),
                self._distilled("random real images with expert labels", ipc, "expert_labels", "--Iteration=0",
                                "--pix_init=real", f"--lr_teacher={form.random_lr[ipc]:g}"),
                self._distilled("TESLA's gradient", ipc, "tesla", "--matching=tesla"),
                self._distilled(exact, ipc, "exact")]
            distilled[ipc] = self.tables[_images(ipc)][-1]
        at = form.at
        for ipc in form.windows_at:
            self.tables[f"the difficulty window, {ipc} a class"] = [
                self._distilled(f"{name}: start epochs {first} to {end - 1}", ipc, f"window_{name}",
                                f"--min_start_epoch={first}", f"--max_start_epoch={end}",
                                "--Sequential_Generation=False")
                for name, (first, end) in form.windows.items()]
        self.tables[f"single ideas, {at} a class"] = [
            distilled[at],
            self._distilled("the whole window from the beginning", at, "no_expansion",
                            "--Sequential_Generation=False"),
            self._distilled("soft labels that are not learned", at, "soft_labels", "--labels=soft"),
            self._distilled("hard labels", at, "hard_labels", "--labels=hard"),
            self._distilled("experts by plain SGD", at, "sgd_experts", experts="SGD"),
            self._distilled("experts by GSAM with ρ = 2", at, "rho_2_experts", experts="FTD_2"),
            next(row for row in self.tables[_images(at)] if row.name == f"ipc{at}_tesla")]
        if form.seeds:
            self.tables[f"other seeds of the distillation, {at} a class"] = [
                self._distilled(f"{says}, seed {seed}", at, f"{name}_seed_{seed}", *options, f"--seed={seed}",
                                experts=experts)
                for says, name, options, experts in ((exact, "exact", (), "FTD"),
                                                     ("experts by plain SGD", "sgd_experts", (), "SGD"),
                                                     ("hard labels", "hard_labels", ("--labels=hard",), "FTD"))
                for seed in form.seeds]
        self.tables["the whole training set"] = [self._baseline(
            "the whole training set", "whole", None, f"--epoch_eval_train={form.whole_epochs}",
            f"--lr_teacher={form.whole_lr:g}")]
        if form.tried:
            self.tables["tried where a row fell short"] = [self._distilled(says, ipc, name, *options)
                                                           for says, ipc, name, options in form.tried]
        cross = form.cross
        self.tables[f"other networks, {cross} a class"] = [
            self._baseline("random real images", f"ipc{cross}_random_networks", cross, "--eval_mode=M"),
            self._evaluated(exact, f"ipc{cross}_exact_networks", cross, distilled[cross].made_by, "--eval_mode=M"),
            self._baseline("random real images", f"ipc{cross}_random_mlp", cross, "--model=MLP"),
            self._evaluated(exact, f"ipc{cross}_exact_mlp", cross, distilled[cross].made_by, "--model=MLP"),
            *(self._evaluated(f"{exact}, α {lr:g} instead of the learned one", f"ipc{cross}_exact_{network.lower()}_lr",
                              cross, distilled[cross].made_by, f"--model={network}", f"--lr_teacher={lr:g}")
              for network, lr in form.cross_lr.items())]
        # Experts, distillations, and of the evaluations first those that take long.
        order = ("buffer_FTD.py", "DATM.py", "--eval_mode=M", "--ipc=None")
        self.steps.sort(key=lambda step: next((at for at, word in enumerate(order) if word in str(step)), len(order)))

    @property
    def rows(self) -> Iterator[Row]:
        for table in self.tables.values():
            yield from table

    def _add(self, step: Step) -> Step:
        if step not in self.steps:
            self.steps.append(step)
        return step

    def _experts(self, kind: str, rho: float) -> Step:
        form = self.form
        start = ["torchrun", "--standalone", f"--nproc_per_node={self.jobs}"] if self.jobs > 1 else ["python"]
        folder = form.root / "experts" / kind
        last = folder / form.dataset / form.model / f"replay_buffer_{(form.experts - 1) // PER_FILE}.pt"
        return self._add(Step(f"experts_{kind}", last, (
            *start, "buffer/buffer_FTD.py", f"--dataset={form.dataset}", f"--model={form.model}", "--zca",
            "--val_fraction=0.1", f"--num_experts={form.experts}",
            f"--train_epochs={form.epochs}", f"--rho_max={rho:g}", f"--rho_min={rho:g}", "--alpha=0.3",
            "--lr_teacher=0.01", f"--backend={form.backend}", f"--buffer_path={folder}")))

    def _look(self, kind: str) -> Step:
        """At experts, beside those by plain SGD."""
        result = self.form.root / "results" / f"experts_{kind}.json"
        return self._add(Step(f"experts_{kind}_seen", result, (
            "python", "scripts/inspect_buffer.py", str(self.experts[kind].result.parent),
            f"--beside={self.experts['SGD'].result.parent}", f"--json={result}"),
            (self.experts[kind], self.experts["SGD"])))

    def _distilled(self, says: str, ipc: int, name: str, *options: str, experts: str = "FTD") -> Row:
        if experts != "FTD":  # which are those of the configs
            options = (f"--buffer_path={self.form.root}/experts/{experts}", *options)
        made_by = self._add(Step(f"ipc{ipc}_{name}", self._run(ipc, name) / "result.json", (
            "python", "distill/DATM.py", f"--cfg={self.form.config(ipc)}", *options, f"--run_name={name}"),
            (self.experts[experts],)))
        return self._evaluated(says, f"ipc{ipc}_{name}", ipc, made_by)

    def _run(self, ipc: int, name: str) -> Path:
        return self.form.root / "logged_files" / self.form.dataset / str(ipc) / self.form.model / name

    def _evaluated(self, says: str, name: str, ipc: int, made_by: Step | None, *options: str) -> Row:
        if made_by is None:
            raise ValueError(f"{name} is no distilled set")
        files = made_by.result.parent / "Normal"
        given = [f"--data_dir={files / 'distilled.safetensors'}"]
        if any(option.startswith("--lr_teacher=") for option in options):  # the set without its own rate
            given = [f"--data_dir={files / 'images_best.pt'}", f"--label_dir={files / 'labels_best.pt'}"]
        return Row(says, name, self._evaluation("evaluation", name, *given, *options,
                                                f"--epoch_eval_train={self.form.epoch_eval[ipc]}", needs=(made_by,)),
                   made_by)

    def _baseline(self, says: str, name: str, ipc: int | None, *options: str) -> Row:
        if ipc is not None:
            options = (*options, f"--epoch_eval_train={self.form.epoch_eval[ipc]}",
                       f"--lr_teacher={self.form.random_lr[ipc]:g}", "--batch_train=128")
        return Row(says, name, self._evaluation("baseline", name, f"--ipc={ipc}", *options))

    def _evaluation(self, program: str, name: str, *options: str, needs: tuple[Step, ...] = ()) -> Step:
        result = self.form.root / "results" / f"{name}.json"
        model = [] if any(option.startswith("--model=") for option in options) else [f"--model={self.form.model}"]
        return self._add(Step(f"{name}_tested", result, (
            "python", f"distill/{program}.py", f"--dataset={self.form.dataset}", *model, "--zca", *options,
            f"--num_eval={self.form.networks}", f"--json={result}"), needs))


def _images(ipc: int) -> str:
    return f"{ipc} images a class" if ipc > 1 else "1 image a class"


# --- running ---------------------------------------------------------------------------------------------------


class Ledger:
    """What each result was made by, and how long that took; written before a command begins, so that one that finished
    unseen is known too."""

    def __init__(self, path: Path):
        self._path = path
        self.made: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def has(self, step: Step) -> bool:
        """Whether the step is done.

        Raises:
            UserError: its result is there, made by another command or with another config.
        """
        if not step.result.exists():
            return False
        made = self.made.get(step.name, {})
        if made.get("asked") != step.asked or made.get("config") != step.config:
            how = f"by another command ({made['asked']})" if "asked" in made else "otherwise"
            how = "with other options in its YAML" if made.get("asked") == step.asked else how
            old = step.result.parent if step.config else step.result
            raise UserError(f"{step.result} was made {how}; delete {old} to make it again")
        return True

    def add(self, step: Step, seconds: float) -> None:
        """So many seconds were spent on it, beside those before."""
        before = self.made.get(step.name, {})
        same = before.get("asked") == step.asked and before.get("config") == step.config
        self.made[step.name] = {"asked": step.asked, "config": step.config,
                                "seconds": round(seconds + (before["seconds"] if same else 0.0), 1)}
        write_json(self._path, self.made)


def run(steps: Sequence[Step], jobs: int, form: Form, ledger: Ledger) -> None:
    """Runs the steps that are not done, so many at once, each after those it needs.

    A signal stops the commands as it would stop each of them alone: they save, and go on the next time.

    Raises:
        UserError: a command failed; the others were stopped.
    """
    output = form.root / "output"
    output.mkdir(parents=True, exist_ok=True)
    (form.root / "results").mkdir(exist_ok=True)
    waiting = [step for step in steps if not ledger.has(step)]
    done, total = {step for step in steps if step not in waiting}, len(waiting)
    running: dict[subprocess.Popen, tuple[Step, float]] = {}
    environment = os.environ | ({"OMP_NUM_THREADS": str(form.threads)} if form.threads else {})
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    try:
        while waiting or running:
            # Experts are trained by several ranks, so nothing else beside them.
            free = jobs - sum(jobs if "torchrun" in step.command else 1 for step, _ in running.values())
            ready = next((step for step in waiting if done.issuperset(set(step.needs) & set(steps))), None)
            if ready and (free >= jobs if "torchrun" in ready.command else free > 0):
                waiting.remove(ready)
                print(f"[{total - len(waiting)} of {total}] {ready}", flush=True)
                with open(output / f"{ready.name}.txt", "a") as log:
                    # A session of its own, so that a terminal's Ctrl-C reaches it once, from here.
                    ledger.add(ready, 0.0)
                    process = subprocess.Popen(ready.command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                                               stdin=subprocess.DEVNULL, start_new_session=True)
                running[process] = ready, perf_counter()
                continue
            sleep(0.2)
            for process in [each for each in running if each.poll() is not None]:
                step, began = running.pop(process)
                if process.returncode or not step.result.exists():
                    said = (output / f"{step.name}.txt").read_text().strip().splitlines()[-1:]
                    raise UserError(f"{step} ended with exit code {process.returncode}: {' '.join(said)} (all of it in "
                                    f"{output / step.name}.txt); the same command goes on once that is mended")
                done.add(step)
                ledger.add(step, perf_counter() - began)
                print(f"    {step.name} done in {duration(perf_counter() - began)}", flush=True)
    finally:
        for process in running:
            process.terminate()
        for process, (step, began) in running.items():
            process.wait()
            ledger.add(step, perf_counter() - began)


# --- tables and plots ------------------------------------------------------------------------------------------


def read(results: Path, name: str) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def accuracy(result: dict[str, Any] | None, network: str | None = None) -> str:
    """Mean and standard deviation, %, of that network, or of the first."""
    scores = [score for score in (result or {}).get("scores", []) if network in (None, score["network"])]
    return _mean_std(scores[0]) if scores else "–"


def _mean_std(score: dict[str, Any]) -> str:
    """In %."""
    return f"{100 * score['mean']:.2f} ± {100 * score['std']:.2f}"


def gather(plan: Plan, ledger: Ledger) -> None:
    """Puts what the runs recorded beside the results: metrics, and what the run ended with.

    Raises:
        UserError: a result is not that of its command.
    """
    results = plan.form.root / "results"
    for row in plan.rows:
        ledger.has(row.evaluation)
        if row.made_by and ledger.has(row.made_by):
            folder, name = row.made_by.result.parent, row.made_by.name
            with atomic_write(results / f"{name}.metrics.jsonl") as aside:
                aside.write_bytes((folder / "metrics.jsonl").read_bytes())
            with atomic_write(results / f"{name}.run.json") as aside:
                aside.write_bytes((folder / "result.json").read_bytes())
    write_json(results / "commands.json", ledger.made)


def write_tables(plan: Plan, results: Path) -> str:
    """`tables.md`: the accuracies that are there, each with what made it."""
    form = plan.form
    found = {row.name: read(results, row.name) for row in plan.rows}
    lines = [f"# {form.dataset}, {form.model}, {form.experts} experts of {form.epochs} epochs", ""]
    any_result = next((result for result in found.values() if result), None)
    if any_result:
        about = any_result["environment"]
        lines += [f"Test accuracy, %, mean ± standard deviation over {form.networks} networks (seeds: `--seed 0` and "
                  f"what each program derives from it); {about['device']} for each command, torch {about['torch']}, "
                  f"{about['date']}.", ""]
    lines += _main_table(plan, found, results)
    for title, rows in plan.tables.items():
        networks = list(dict.fromkeys(score["network"] for row in rows if found[row.name]
                                      for score in found[row.name]["scores"]))
        several = len(networks) > 1  # of one set, so its evaluation is what tells the rows apart
        lines += ["", f"## {title[0].upper()}{title[1:]}", "",
                  f"| set | {' | '.join(networks) if several else 'accuracy, %'} | made in | command |",
                  "|---" * (max(len(networks), 1) + 3) + "|"]
        for row in rows:
            step = row.evaluation if several or row.made_by is None else row.made_by
            took = found[row.name] if step is row.evaluation else read(results, f"{step.name}.run")
            cells = [accuracy(found[row.name], network) for network in networks or [form.model]]
            cells.append(duration(took["seconds"]) if took else "–")
            lines.append(f"| {row.says} | {' | '.join(cells)} | `{step}` |")
    made = read(results, "commands") or {}
    lines += ["", "## Experts", "",
              "Apart: how far they are in the end from those by plain SGD, which begin with the same parameters and "
              "see the same batches, of the way that these have gone.", "",
              "| experts | accuracy on held-out images, % | apart, % | trained in | command |", "|---" * 5 + "|"]
    for kind, step in plan.experts.items():
        seen = (read(results, f"experts_{kind}") or {}).get("by_epoch")
        cells = [_mean_std(seen[name][-1]) if seen else "–" for name in ("test_accuracy", "apart")]
        took = made.get(step.name, {}).get("seconds")
        lines.append(f"| ρ = {RHO[kind]:g} | {' | '.join(cells)} | {duration(took) if took else '–'} | `{step}` |")
    tested = next(row.evaluation for row in plan.rows if row.made_by)
    lines += ["", "## Evaluations", "", "Each distilled set is tested by", "", "```", str(tested), "```", ""]
    text = "\n".join(lines)
    write_text(results / "tables.md", text)
    return text


def _main_table(plan: Plan, found: dict[str, Any], results: Path) -> list[str]:
    ipcs = plan.form.ipcs
    rows = {"random real images": "ipc{}_random", "… with expert labels": "ipc{}_expert_labels",
            "TESLA's gradient": "ipc{}_tesla", "exact gradient (DATM)": "ipc{}_exact"}
    lines = ["| | " + " | ".join(f"{ipc} a class" for ipc in ipcs) + " |", "|---" * (len(ipcs) + 1) + "|"]
    lines += [f"| {says} | " + " | ".join(accuracy(found.get(name.format(ipc))) for ipc in ipcs) + " |"
              for says, name in rows.items()]
    lines += [f"| the whole training set | {accuracy(found['whole'])} |" + " |" * (len(ipcs) - 1)]
    for method, figures in PUBLISHED.items():
        at = dict(zip(PUBLISHED_IPCS, figures))
        lines.append(f"| published: {method} | " + " | ".join(str(at.get(ipc, "–")) for ipc in ipcs) + " |")
    return [*lines, f"| published: the whole training set | {PUBLISHED_WHOLE} |" + " |" * (len(ipcs) - 1), "",
            "The published figures are of ConvNet with 128 channels."]


def write_plots(plan: Plan, results: Path) -> None:
    """`accuracy.png` (methods by images per class), `windows.png`, `gradients.png` (exact and TESLA on the way)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> None:
        with atomic_write(results / f"{name}.png") as aside:
            figure.savefig(aside, dpi=130, format="png")
        plt.close(figure)

    def points(names: Sequence[tuple[Any, str]]) -> tuple[list[Any], list[float], list[float]]:
        found = [(at, read(results, name)) for at, name in names]
        found = [(at, result["scores"][0]) for at, result in found if result]
        return ([at for at, _ in found], [100 * score["mean"] for _, score in found],
                [100 * score["std"] for _, score in found])

    form = plan.form
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for says, name in (("exact gradient (DATM)", "exact"), ("TESLA's gradient", "tesla"),
                       ("random, expert labels", "expert_labels"), ("random", "random")):
        at, means, stds = points([(ipc, f"ipc{ipc}_{name}") for ipc in form.ipcs])
        if at:
            axes.errorbar(at, means, stds, marker="o", markersize=4, capsize=3, label=says)
    whole = read(results, "whole")
    if whole:
        axes.axhline(100 * whole["scores"][0]["mean"], color="0.4", linestyle="--", linewidth=1,
                     label="the whole training set")
    axes.set(xscale="log", xlabel="images a class", ylabel="test accuracy, %", title=f"{form.dataset}, {form.model}")
    axes.set_xticks(form.ipcs, [str(ipc) for ipc in form.ipcs])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    save(figure, "accuracy")

    figure, panels = plt.subplots(1, len(form.windows_at), figsize=(3.5 * len(form.windows_at), 3.2),
                                  layout="constrained", squeeze=False)
    for axes, ipc in zip(panels[0], form.windows_at):
        at, means, stds = points([(name, f"ipc{ipc}_window_{name}") for name in form.windows])
        axes.errorbar(range(len(at)), means, stds, marker="o", capsize=3, linestyle=":")
        axes.set_xticks(range(len(at)), at)
        axes.set(title=f"{ipc} a class", xlabel="difficulty window", ylabel="test accuracy, %")
    save(figure, "windows")

    figure, panels = plt.subplots(1, len(form.ipcs), figsize=(3.5 * len(form.ipcs), 3.2), layout="constrained",
                                  squeeze=False)
    for axes, ipc in zip(panels[0], form.ipcs):
        for says, name in (("exact", "exact"), ("TESLA", "tesla")):
            path = results / f"ipc{ipc}_{name}.metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            scores = [(line["iteration"], line["scores"][0]) for line in lines if line.get("set") == "Normal"]
            if scores:
                axes.plot(*zip(*((at, 100 * score["mean"]) for at, score in scores)), marker=".", label=says)
        axes.set(title=_images(ipc), xlabel="iteration", ylabel="accuracy on held-out images, %")
        axes.legend(fontsize=8)
    save(figure, "gradients")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="the form for a CPU")
    parser.add_argument("--jobs", type=int, metavar="N", help="commands at once [a CPU's cores; 1 on a GPU]")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="rows whose name fits, as in 'ipc1_*', and what "
                        "they need [*]")
    parser.add_argument("--list", action="store_true", help="print the commands, and nothing else")
    parser.add_argument("--tables", action="store_true", help="make tables and plots of the results that are there")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="with --tables: other results than one's own")
    options = parser.parse_args()
    form = SMALL if options.small else FULL
    jobs = options.jobs if options.jobs is not None else len(os.sched_getaffinity(0)) if options.small else 1
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: it must be at least 1")
    if options.results and not options.tables:
        raise UserError("--results is for --tables; leave it out")
    os.chdir(REPOSITORY)
    plan = Plan(form, jobs)
    wanted = {step for row in plan.rows if fnmatch.fnmatch(row.name, options.only)
              for step in (row.evaluation, *((row.made_by, *row.made_by.needs) if row.made_by else ()))}
    wanted |= {step for kind, look in plan.looks.items() if fnmatch.fnmatch(f"experts_{kind}", options.only)
               for step in (look, *look.needs)}
    if not wanted:
        names = [*dict.fromkeys(row.name for row in plan.rows), *(f"experts_{kind}" for kind in plan.looks)]
        raise UserError(f"--only {options.only}: no row fits; the rows are {', '.join(names)}")
    steps = [step for step in plan.steps if step in wanted]
    if options.list:
        print("\n".join(map(str, steps)))
        return
    results = options.results or form.root / "results"
    ledger = Ledger(form.root / "commands.json")
    if not options.tables:
        run(steps, jobs, form, ledger)
    if not results.is_dir():
        raise UserError(f"{results} is no folder of results; leave out --tables to make them")
    if not options.results:
        gather(plan, ledger)
    print(write_tables(plan, results))
    write_plots(plan, results)
    print(f"in {results}: tables.md, accuracy.png, windows.png, gradients.png, a JSON file for each row")


if __name__ == "__main__":
    entry(main)
