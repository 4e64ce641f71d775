"""Runs every row of the Fashion-MNIST tables in results/ and makes the tables and plots. Started by reproduce.sh.

    bash scripts/reproduce.sh --small                          # everything, or what is missing of it
    bash scripts/reproduce.sh --small --only ipc1_exact        # this row, and what it needs
    bash scripts/reproduce.sh --small --list [--only …]        # the commands, and nothing else
    bash scripts/reproduce.sh --small --tables [--results results/FashionMNIST/small]    # of what is there

There are three forms. `--small`: ConvNetW32 on a CPU; four experts of ten epochs each by FTD, by plain SGD and by
GSAM with ρ = 2, and ten experts of seven epochs by plain SGD, used to compare numbers of experts and of inner steps.
`--cpu`: ConvNet, the published network, on a CPU; four experts of twenty epochs by FTD. Neither: ConvNet on a GPU;
twenty experts of forty epochs each by FTD, by plain SGD and by GSAM with ρ = 2.

Experts and distillations see nine tenths of the training images. The best set of a run is chosen on the other tenth;
only the last evaluation sees the test images.

Everything is kept in reproduce/small, reproduce/cpu or reproduce/full: experts/, logged_files/, results/ (a JSON file
for each evaluation, the runs' metrics, tables.md and plots), output/ (what each command printed) and commands.json (the
command that made each result, and how long it took). A result made by another command is made again. Rows of another
form, or made by other commands, are left out of the tables, and their names are printed.
"""

import fnmatch
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from buffer.manifests import manifest_path, run_file
from distill.result_files import EMA, NORMAL, EvaluationResult, Metrics, RunResult, Score
from distill.set_files import WHOLE
from scripts.common import ScriptParser, positive
from scripts.reproduce_steps import Ledger, Step, StepsFailedError, in_order, run_steps
from utils.config import BufferConfig, DistillConfig
from utils.errors import UserError, nearest, note
from utils.files import REPOSITORY, atomic_write, read_json, reading, write_json, write_text
from utils.program import interrupt
from utils.program.command_line import read_yaml
from utils.program.console import duration, percent, shown, table
from utils.program.entry import entry
from utils.program.locks import locked
from utils.program.ranks import cores

# In the order in which they are begun: the longest first.
KINDS = EXPERTS, LOOK, DISTILLATION, LONG_EVALUATION, EVALUATION, REPETITION = (
    "experts", "look", "distillation", "long evaluation", "evaluation", "repetition")
METHODS = {"random": "random real images",
           "expert_labels": "real images that experts get right, labelled by them",
           "herding": "herded real images, labelled by experts", "tesla": "TESLA's gradient",
           "exact": "exact gradient (DATM)", "averaged": "exact gradient, averaged images (--ema)",
           "random_factor_2": "random real images, four in one",
           "factor_2": "exact gradient, four images in one (--factor 2)"}
MANY = "many"
# ρ of each kind of experts: FTD's published one, 0 (plain SGD), the option's default; MANY: plain SGD, which takes
# half the time.
RHO = {"FTD": 0.01, "SGD": 0.0, "FTD_2": 2.0, MANY: 0.0}
PER_FILE = BufferConfig().save_interval
DRAWS = 5  # sets of real images, drawn for each row of expert-labelled ones
RANDOM_LRS = (0.003, 0.01, 0.03, 0.1)  # tried for random images, in a table of held-out accuracies
OTHER_LR = WHOLE_LR = 0.01  # for random images on networks other than the form's; for the whole training set
PUBLISHED = {"random": (51.4, 73.8, 82.5), "DC": (70.5, 82.3, 83.6), "DSA": (70.6, 84.6, 88.7),
             "IDC-I": (70.7, 85.3, 89.1), "IDC, four images in one": (81.0, 86.0, 86.2),
             "MTT, by later papers": (75.3, 87.2, 88.3)}
PUBLISHED_IPCS, PUBLISHED_WHOLE = (1, 10, 50), 93.5
SOURCES = ("The published figures are of ConvNet with 128 channels: random images, "
           "[DC](https://arxiv.org/abs/2006.05929) and the whole set from DC's table 1, "
           "[DSA](https://arxiv.org/abs/2102.08259) and [IDC](https://arxiv.org/abs/2205.14959) from their own papers, "
           "MTT from tables of later papers, as its own has none.")
AGAIN = "restore it, or delete it to make it again"


@dataclass(frozen=True)
class Form:
    """What is run, on what, and how long."""

    root: Path
    dataset: str
    model: str
    configs: str  # folder of the configs
    experts: int
    epochs: int
    windows: dict[str, tuple[int, int]]  # (first start epoch, end, exclusive)
    epoch_eval: dict[int, int]  # epochs of an evaluation, by images per class
    whole_epochs: int
    random_lr: float  # of RANDOM_LRS, the best on the held-out images
    backend: str  # for training experts; the configs have their own
    # Images per class at which numbers of experts and of inner steps are compared, and the seeds of those runs.
    spent_at: dict[int, tuple[int, ...]]
    experts_tried: tuple[int, ...]  # besides all
    steps_tried: tuple[int, ...]  # besides the config's
    ideas_at: int | None = None  # images per class of the ablations; None: no such table, and no experts for it
    seeds: tuple[int, ...] = (0,)  # of the ablations
    cross: int | None = None  # images per class of the cross-architecture table; None: no such table
    window_options: dict[int, tuple[str, ...]] = field(default_factory=dict)  # images per class → further options
    threads: int | None = None  # of each command, on a CPU; results are bit-identical only with the same number
    networks: int = 5  # of each evaluation
    whole_networks: int = 5  # of the whole training set's
    cross_lr: dict[str, float] = field(default_factory=dict)  # in that table: network → another rate to test
    coreset: bool = False  # add a row of herded images to the main rows
    factor_2: dict[int, tuple[str, ...]] = field(default_factory=dict)  # images per class → options of a factor-2 run
    many: tuple[int, int] | None = None  # experts for comparing numbers of them, and their epochs; None: the FTD ones
    wider: str | None = None  # another network on which the sets of the largest T are tested too

    @property
    def environment(self) -> dict[str, str]:
        """Variables of each command."""
        return {"OMP_NUM_THREADS": str(self.threads), "CUDA_VISIBLE_DEVICES": ""} if self.threads else {}

    @property
    def ipcs(self) -> tuple[int, ...]:
        return tuple(self.epoch_eval)

    def config(self, ipc: int) -> str:
        return f"{self.configs}/IPC{ipc}.yaml"

    def window(self, name: str, ipc: int) -> list[str]:
        """Options of a window that does not grow; every update is made, whatever its loss."""
        first, end = self.windows[name]
        return [f"--min_start_epoch={first}", f"--max_start_epoch={end}", "--Sequential_Generation=False",
                "--threshold=inf", *self.window_options.get(ipc, ())]


SMALL = Form(
    Path("reproduce/small"), "FashionMNIST", "ConvNetW32", "configs/FashionMNIST/ConvIN_W32", experts=4, epochs=10,
    windows={"early": (0, 3), "middle": (3, 6), "late": (6, 9)}, ideas_at=10, seeds=(0, 1), cross=1,
    cross_lr={"AlexNet": 0.01, "VGG11": 0.01}, epoch_eval={1: 300, 10: 300, 50: 100}, whole_epochs=8, random_lr=0.03,
    backend="compile", threads=1, spent_at={1: (0, 1), 10: (0,)}, experts_tried=(1, 2, 5),
    steps_tried=(5, 10, 40, 80), many=(10, 7), wider="ConvNet")
CPU = Form(
    Path("reproduce/cpu"), "FashionMNIST", "ConvNet", "configs/FashionMNIST/ConvIN_cpu", experts=4, epochs=20,
    windows={"early": (0, 3), "middle": (7, 10), "late": (14, 17)},
    # The rate is fixed, as a learned one falls to zero in the late window.
    window_options={1: ("--syn_steps=40", "--lr_lr=0"), 10: ("--batch_syn=50", "--Iteration=120", "--lr_lr=0"), 50: (
        "--batch_syn=50", "--Iteration=120", "--lr_lr=0")},
    epoch_eval={1: 1000, 10: 300, 50: 100}, whole_epochs=30, whole_networks=2, random_lr=0.01, backend="compile",
    threads=1, spent_at={1: (0,)}, experts_tried=(1, 2), steps_tried=(10, 20, 40), coreset=True,
    factor_2={1: ("--syn_steps=50", "--lr_img=200", "--max_start_epoch=6", "--Iteration=750", "--eval_it=250"), 10: (
        "--lr_y=5", "--min_start_epoch=0", "--max_start_epoch=4", "--Sequential_Generation=False", "--Iteration=100",
        "--eval_it=25")})
FULL = Form(
    Path("reproduce/full"), "FashionMNIST", "ConvNet", "configs/FashionMNIST/ConvIN", experts=20, epochs=40,
    windows={"early": (0, 10), "middle": (14, 24), "late": (28, 38)}, ideas_at=10, seeds=(0,), cross=10,
    epoch_eval={1: 1000, 10: 1000, 50: 1000}, spent_at={1: (0,), 10: (0,)}, experts_tried=(1, 2, 5, 10),
    steps_tried=(10, 20, 80), whole_epochs=60, random_lr=0.01, backend="auto", coreset=True,
    window_options=dict.fromkeys((1, 10, 50), ("--lr_lr=0",)),
    factor_2={1: ("--lr_img=200", "--max_start_epoch=6"), 10: (
        "--lr_y=5", "--min_start_epoch=0", "--max_start_epoch=4", "--Sequential_Generation=False")})


@dataclass(frozen=True)
class Row:
    """A row of a table: its text, its evaluations, and the step that made the set of each, if any."""

    says: str
    name: str
    evaluations: tuple[Step, ...]
    made_by: tuple[Step, ...] = ()


@dataclass
class Plan:
    """All steps of a form, in the order in which they are begun, and the tables that they fill."""

    form: Form
    jobs: int
    steps: list[Step] = field(default_factory=list)
    main: dict[int, dict[str, Row]] = field(default_factory=dict)  # by images per class and method
    tables: dict[str, list[Row]] = field(default_factory=dict)
    windows: dict[int, dict[str, Row]] = field(default_factory=dict)  # by images per class and start epochs in words
    spent: dict[str, dict[int, dict[int, Row]]] = field(default_factory=dict)  # by cost, images per class and amount

    def __post_init__(self) -> None:
        form = self.form
        counts = dict.fromkeys(RHO if form.ideas_at else ["FTD"], (form.experts, form.epochs)) | {MANY: form.many}
        self.experts = {kind: self._experts(kind, rho, *counts[kind]) for kind, rho in RHO.items() if counts.get(kind)}
        self.looks = {kind: self._look(kind) for kind in self.experts}
        for ipc in form.ipcs:
            self.main[ipc] = self._main_rows(ipc)
            self.tables[_images(ipc)] = list(self.main[ipc].values())
        self.tables["the whole training set"] = [self._baseline(
            "the whole training set", "whole", None, f"--epoch_eval_train={form.whole_epochs}",
            f"--lr_teacher={WHOLE_LR:g}", "--batch_train=256", networks=form.whole_networks)]
        for ipc in form.ipcs:
            self.windows[ipc] = self._window_rows(ipc)
            self.tables[f"the difficulty window, {ipc} per class"] = list(self.windows[ipc].values())
        if form.ideas_at:
            self.tables[f"single ideas, {form.ideas_at} per class"] = self._single_ideas(form.ideas_at)
        # The rows below share some of the main rows' sets.
        experts = {ipc: self._by_experts(ipc, seeds) for ipc, seeds in form.spent_at.items()}
        steps = {ipc: self._by_inner_steps(ipc, seeds, experts[ipc]) for ipc, seeds in form.spent_at.items()}
        self.spent = {"experts that are matched": experts, "inner steps T": steps}
        for ipc in form.spent_at:
            rows = [*experts[ipc].values(), *steps[ipc].values()]
            self.tables[f"experts and inner steps, {ipc} per class"] = list({row.name: row for row in rows}.values())
        if form.wider:
            self.tables[f"tested on {form.wider}"] = [
                row for ipc, rows in steps.items() for row in self._on_wider(ipc, max(rows), rows[max(rows)])]
        if form.cross:
            self.tables[f"other networks, {form.cross} per class"] = self._other_networks(form.cross)
        self.tables["the learning rate of random images, on held-out ones"] = [
            self._baseline(f"{_images(ipc)}, {lr:g}", f"ipc{ipc}_random_lr_{lr:g}", ipc, "--val_fraction=0.1", lr=lr,
                           networks=1)
            for ipc in form.ipcs for lr in RANDOM_LRS]
        self.steps.sort(key=lambda step: KINDS.index(step.kind))

    @property
    def rows(self) -> Iterator[Row]:
        for rows in self.tables.values():
            yield from rows

    def _add(self, step: Step) -> Step:
        if step not in self.steps:
            self.steps.append(step)
        return step

    def _experts(self, kind: str, rho: float, count: int, epochs: int) -> Step:
        form = self.form
        ranks = min(self.jobs, count)
        start = ["torchrun", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else ["python"]
        path = form.root / "experts" / kind
        folder = path / form.dataset / form.model
        files = [folder / f"replay_buffer_{number}.pt" for number in range(-(-count // PER_FILE))]
        return self._add(Step(f"experts_{kind}", EXPERTS, (
            *start, "buffer/buffer_FTD.py", f"--dataset={form.dataset}", f"--model={form.model}", "--zca",
            "--val_fraction=0.1", f"--num_experts={count}", f"--train_epochs={epochs}", f"--rho_max={rho:g}",
            f"--rho_min={rho:g}", "--alpha=0.3", "--lr_teacher=0.01", f"--backend={form.backend}",
            f"--buffer_path={path}"), files[-1], tuple(map(manifest_path, files)), folder, run_file(folder),
            alone=ranks > 1))

    def _look(self, kind: str) -> Step:
        """Inspects experts; those with as many epochs as the plain SGD ones, if any, are compared with these."""
        result, beside = self.form.root / "results" / f"experts_{kind}.json", self.experts.get("SGD")
        compared = [f"--beside={beside.result.parent}"] if beside and kind != MANY else []
        return self._add(Step(f"experts_{kind}_seen", LOOK, (
            "python", "scripts/inspect_buffer.py", str(self.experts[kind].result.parent), *compared,
            f"--json={result}"), result, needs=(self.experts[kind], *([beside] if compared else []))))

    def _distilled(self, says: str, ipc: int, name: str, *options: str, experts: str = "FTD",
                   seeds: Sequence[int] = (0,)) -> Row:
        """A distillation for each seed. With --Iteration=0 it only draws images, and one network tests each set."""
        if experts != "FTD":  # the configs already name the FTD ones
            options = (f"--buffer_path={self.form.root}/experts/{experts}", *options)
        networks = 1 if "--Iteration=0" in options else self.form.networks
        path, steps = self.form.config(ipc), []
        for seed in seeds:
            run_name = f"{name}_seed_{seed}" if seed else name
            folder = self.form.root / "logged_files" / self.form.dataset / str(ipc) / self.form.model / run_name
            steps.append(self._add(Step(
                f"ipc{ipc}_{run_name}", REPETITION if seed and networks > 1 else DISTILLATION,
                ("python", "distill/DATM.py", f"--cfg={path}", *options, *([f"--seed={seed}"] if seed else []),
                 f"--run_name={run_name}"), folder / "result.json", (folder / NORMAL / WHOLE,),
                folder, needs=(self.experts[experts],), config=read_yaml(path, DistillConfig))))
        return self._tested(says, f"ipc{ipc}_{name}", ipc, steps, networks=networks)

    def _main_rows(self, ipc: int) -> dict[str, Row]:
        """Rows by method."""
        form = self.form
        rows = {"random": self._baseline(METHODS["random"], f"ipc{ipc}_random", ipc),
                "expert_labels": self._distilled(METHODS["expert_labels"], ipc, "expert_labels", "--Iteration=0",
                                                 f"--lr_teacher={form.random_lr:g}", seeds=range(DRAWS)),
                "tesla": self._distilled(METHODS["tesla"], ipc, "tesla", "--matching=tesla"),
                "exact": self._distilled(METHODS["exact"], ipc, "exact")}
        if read_yaml(form.config(ipc), DistillConfig).get("ema"):
            rows["averaged"] = self._tested(METHODS["averaged"], f"ipc{ipc}_averaged", ipc, rows["exact"].made_by,
                                            version=EMA)
        if form.coreset:
            rows["herding"] = self._baseline(METHODS["herding"], f"ipc{ipc}_herding", ipc, "--pick=herding",
                                             experts="FTD")
        if ipc in form.factor_2:
            rows["random_factor_2"] = self._baseline(METHODS["random_factor_2"], f"ipc{ipc}_random_factor_2", ipc,
                                                     "--factor=2")
            rows["factor_2"] = self._distilled(METHODS["factor_2"], ipc, "factor_2", "--factor=2", *form.factor_2[ipc])
        return rows

    def _window_rows(self, ipc: int) -> dict[str, Row]:
        """Rows by start epochs in words."""
        return {f"{first} – {end - 1}": self._distilled(f"{name}: start epochs {first} to {end - 1}", ipc,
                                                        f"window_{name}", *self.form.window(name, ipc))
                for name, (first, end) in self.form.windows.items()}

    def _by_experts(self, ipc: int, seeds: Sequence[int]) -> dict[int, Row]:
        """Rows by number of matched experts (all of them choose and label the initial images)."""
        form, asked = self.form, self._asked_steps(ipc)
        # --max_experts limits the experts of each file.
        assert all(number <= PER_FILE or number % PER_FILE == 0 for number in form.experts_tried)
        rows = {number: self._of_cost(ipc, number, asked, seeds, f"experts_{number}",
                                      f"--max_files={-(-number // PER_FILE)}",
                                      f"--max_experts={min(number, PER_FILE)}") for number in form.experts_tried}
        if form.many:
            return rows | {form.many[0]: self._of_cost(ipc, form.many[0], asked, seeds, "all_experts")}
        return rows | {form.experts: replace(self.main[ipc]["exact"], says=f"experts: {form.experts}, T: {asked}")}

    def _by_inner_steps(self, ipc: int, seeds: Sequence[int], by_experts: Mapping[int, Row]) -> dict[int, Row]:
        """Rows by number of inner steps, with all experts."""
        total, asked = max(by_experts), self._asked_steps(ipc)
        rows = {number: self._of_cost(ipc, total, number, seeds, f"steps_{number}", f"--syn_steps={number}")
                for number in self.form.steps_tried if number != asked}
        return dict(sorted((rows | {asked: by_experts[total]}).items()))

    def _of_cost(self, ipc: int, experts: int, steps: int, seeds: Sequence[int], name: str, *options: str) -> Row:
        return self._distilled(f"experts: {experts}, T: {steps}", ipc, name, *options,
                               experts=MANY if self.form.many else "FTD", seeds=seeds)

    def _asked_steps(self, ipc: int) -> int:
        return int(read_yaml(self.form.config(ipc), DistillConfig)["syn_steps"])

    def _single_ideas(self, ipc: int) -> list[Row]:
        """Rows that differ from the exact one in one thing."""
        return [self._distilled(says, ipc, name, *options, experts=experts,
                                seeds=self.form.seeds if experts != "FTD_2" else (0,))
                for says, name, options, experts in (
                    (METHODS["exact"], "exact", (), "FTD"),
                    (METHODS["tesla"], "tesla", ("--matching=tesla",), "FTD"),
                    ("the whole window from the beginning", "no_expansion", ("--Sequential_Generation=False",), "FTD"),
                    ("soft labels that are not learned", "soft_labels", ("--labels=soft",), "FTD"),
                    ("hard labels", "hard_labels", ("--labels=hard",), "FTD"),
                    ("experts by plain SGD", "sgd_experts", (), "SGD"),
                    ("experts by GSAM with ρ = 2", "rho_2_experts", (), "FTD_2"))]

    def _other_networks(self, ipc: int) -> list[Row]:
        """Random images and the exact row's set on other architectures."""
        (exact,) = self.main[ipc]["exact"].made_by
        return [
            self._baseline(METHODS["random"], f"ipc{ipc}_random_networks", ipc, "--eval_mode=M", lr=OTHER_LR),
            self._baseline(METHODS["random"], f"ipc{ipc}_random_mlp", ipc, "--model=MLP", lr=OTHER_LR),
            self._tested(METHODS["exact"], f"ipc{ipc}_exact_networks", ipc, [exact], "--eval_mode=M"),
            self._tested(METHODS["exact"], f"ipc{ipc}_exact_mlp", ipc, [exact], "--model=MLP"),
            *(self._tested(f"{METHODS['exact']}, α {lr:g} instead of the learned one",
                           f"ipc{ipc}_exact_{network.lower()}_lr", ipc, [exact], f"--model={network}",
                           f"--lr_teacher={lr:g}") for network, lr in self.form.cross_lr.items())]

    def _on_wider(self, ipc: int, inner_steps: int, row: Row) -> Iterator[Row]:
        """The row's sets on the wider network, and random images if no other table has them."""
        on = f"--model={self.form.wider}"
        if ipc != self.form.cross:
            yield self._baseline(f"{METHODS['random']}, {ipc} per class", f"ipc{ipc}_random_wider", ipc, on,
                                 lr=OTHER_LR)
        yield self._tested(f"{METHODS['exact']}, T {inner_steps}, {ipc} per class", f"{row.name}_wider", ipc,
                           row.made_by, on)

    def _tested(self, says: str, name: str, ipc: int, made_by: Sequence[Step], *options: str,
                networks: int | None = None, version: str = NORMAL) -> Row:
        evaluations = []
        for seed, step in enumerate(made_by):
            best = step.made / version
            given = [f"--data_dir={best / WHOLE}"]
            if any(option.startswith("--lr_teacher=") for option in options):  # the set without its own rate
                given = [f"--data_dir={best / 'images_best.pt'}", f"--label_dir={best / 'labels_best.pt'}"]
            evaluations.append(self._evaluation(
                "evaluation", f"{name}_seed_{seed}" if seed else name, *given, *options,
                f"--epoch_eval_train={self.form.epoch_eval[ipc]}",
                # Each of several sets of real images gets another network, as in the rows of random images.
                *([f"--seed={seed}"] if networks == 1 and seed else []), networks=networks, needs=(step,)))
        return Row(says, name, tuple(evaluations), tuple(made_by))

    def _baseline(self, says: str, name: str, ipc: int | None, *options: str, lr: float | None = None,
                  networks: int | None = None, experts: str | None = None) -> Row:
        if ipc is not None:
            options = (*options, f"--epoch_eval_train={self.form.epoch_eval[ipc]}",
                       f"--lr_teacher={lr or self.form.random_lr:g}", "--batch_train=128")
        needs = ()
        if experts:
            needs, options = (self.experts[experts],), (*options, f"--buffer_path={self.form.root}/experts/{experts}")
        return Row(says, name, (self._evaluation("baseline", name, f"--ipc={ipc}", *options, networks=networks,
                                                 needs=needs),))

    def _evaluation(self, program: str, name: str, *options: str, networks: int | None,
                    needs: tuple[Step, ...] = ()) -> Step:
        result = self.form.root / "results" / f"{name}.json"
        model = [] if any(option.startswith("--model=") for option in options) else [f"--model={self.form.model}"]
        long = {"--eval_mode=M", "--ipc=None", f"--model={self.form.wider}"} & set(options)
        return self._add(Step(
            f"{name}_tested", LONG_EVALUATION if long else EVALUATION,
            ("python", f"distill/{program}.py", f"--dataset={self.form.dataset}", *model, "--zca", *options,
             f"--num_eval={networks or self.form.networks}", f"--json={result}"), result, needs=needs))

    def wanted(self, patterns: Sequence[str]) -> tuple[list[Row], list[Step]]:
        """The rows whose names match, and all steps for them and for the matching inspections of experts.

        Raises:
            UserError: nothing matches one of the patterns.
        """
        rows = {row.name: row for row in self.rows}
        looks = {f"experts_{kind}": look for kind, look in self.looks.items()}
        names = [*rows, *looks]
        wanted: set[str] = set()
        for pattern in patterns:
            fitting = fnmatch.filter(names, pattern)
            if not fitting:
                advice = nearest(pattern, names) or f"the rows are {', '.join(names)}"
                raise UserError(f"--only {pattern}: no row fits; {advice}")
            wanted.update(fitting)
        rows = [row for name, row in rows.items() if name in wanted]
        steps = {step for row in rows for step in (*row.evaluations, *row.made_by)}
        steps |= {look for name, look in looks.items() if name in wanted}
        while missing := {need for step in steps for need in step.needs} - steps:
            steps |= missing
        return rows, [step for step in self.steps if step in steps]


def _images(ipc: int) -> str:
    return f"{ipc} images per class" if ipc > 1 else "1 image per class"


# --- what was found --------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What a row reached: over its sets if there are several, else over the networks of its one set."""

    score: Score
    count: str  # of sets or networks that the score is over, in words

    def __str__(self) -> str:
        return self.score.percent


class Results:
    """The results of a plan that are in a folder.

    Args:
        folder: holds commands.json too, unless `ledger` is given.
    """

    def __init__(self, plan: Plan, folder: Path, ledger: Ledger | None = None):
        self.folder, self.ledger = folder, ledger or Ledger(folder / "commands.json")
        self.others: list[str] = []  # steps that other commands made, or that need such a step
        self._found: dict[str, Any] = {}  # by name of the step
        self._tested: set[Step] = set()
        for step in plan.steps:
            path = folder / step.result.name
            if step.kind not in (LOOK, LONG_EVALUATION, EVALUATION) or not path.exists():
                continue
            if not self._is_of_plan(step):
                self.others.append(step.name)
            elif step.kind == LOOK:
                self._found[step.name] = _read_look(path)
            else:
                self._found[step.name] = EvaluationResult.read(path, AGAIN, problem="is damaged")
                self._tested.update(step.needs)
        if self.others and not self._found:
            raise UserError(f"nothing in {shown(folder)} is of this form ({self.others[0]} was made by another "
                            "command); give that of --small, --cpu or neither, or another folder")

    def _is_of_plan(self, step: Step) -> bool:
        return self.ledger.knows(step) and all(map(self._is_of_plan, step.needs))

    def of(self, step: Step) -> Any:
        """The `EvaluationResult` of an evaluation, or the report on experts; None until it is there."""
        return self._found.get(step.name)

    def made_on(self) -> str:
        """Machines, versions of torch and dates of the evaluations, as far as they are recorded."""
        said = [found.environment for found in self._found.values()
                if isinstance(found, EvaluationResult) and found.environment]
        dates = sorted(each["date"] for each in said)
        return ", ".join([*sorted({f"{each['device']}, torch {each['torch']}" for each in said}),
                          " to ".join(dict.fromkeys((*dates[:1], *dates[-1:])))]) if said else ""

    def cell(self, row: Row, network: str | None = None) -> Cell | None:
        """A row's cell, for this network or the first one; None until all sets of the row are tested."""
        if not all(map(self.of, row.evaluations)):
            return None
        of_network = [[score for score in self.of(step).scores if network in (None, score.network)]
                      for step in row.evaluations]
        scores = [scores[0] for scores in of_network if scores]
        if len(scores) < 2:
            return Cell(scores[0], str(len(scores[0].accuracies))) if scores else None
        return Cell(Score(scores[0].network, [score.mean for score in scores]),
                    f"{len(scores)} sets × {len(scores[0].accuracies)}")

    def networks(self, rows: Sequence[Row]) -> list[str]:
        return list(dict.fromkeys(score.network for row in rows for step in row.evaluations
                                  if (found := self.of(step)) for score in found.scores))

    def run(self, step: Step) -> RunResult | None:
        """What a distillation ended with, if its set was tested."""
        path = self.folder / f"{step.name}.run.json"
        return RunResult.read(path, AGAIN) if step in self._tested and path.exists() else None

    def metrics(self, row: Row) -> Metrics:
        """The metrics of a row's first distillation; empty unless its set was tested."""
        path = self.folder / f"{row.made_by[0].name}.metrics.jsonl" if row.made_by else None
        if path is None or row.made_by[0] not in self._tested or not path.exists():
            return Metrics([], [])
        return Metrics.read(path, AGAIN)

    def took(self, row: Row) -> str:
        """The time of the first set's distillation and of its evaluation, in words."""
        times = [self.run(step) for step in row.made_by[:1]] + [self.of(step) for step in row.evaluations[:1]]
        return " + ".join(duration(found.seconds) for found in times if found and found.seconds) or "–"


def _read_look(path: Path) -> dict[str, Any]:
    with reading(path, AGAIN):
        look = read_json(path)
        for name in ("test_accuracy", "apart"):
            _at_the_end(look, name)
        return look


def _at_the_end(look: dict[str, Any], name: str) -> str:
    """Mean ± deviation over experts after their last epoch; a dash if they diverged, or have none to compare with."""
    values = look["by_epoch"][name]
    return percent(**values[-1]) if values and values[-1]["mean"] is not None else "–"


def gather(plan: Plan, results: Results) -> None:
    """Copies what the runs recorded into the results folder: metrics, run results, pictures of the main sets, and the
    experts' manifests and accuracies."""
    def copy(source: Path, name: str) -> None:
        if source.exists():
            with atomic_write(results.folder / name) as aside:
                aside.write_bytes(source.read_bytes())

    pictured = {rows["exact"].made_by[0] for rows in plan.main.values()}
    for row in plan.rows:
        for step, evaluation in zip(row.made_by, row.evaluations):
            if results.of(evaluation) is not None:
                copy(step.result.parent / "metrics.jsonl", f"{step.name}.metrics.jsonl")
                copy(step.result, f"{step.name}.run.json")
                if step in pictured:
                    copy(step.result.parent / "images.png", f"{step.name}.png")
    untimed = {step.name for step in plan.experts.values()}
    for kind, step in plan.experts.items():
        if step.done and results.ledger.knows(step):
            for number, manifest in enumerate(step.products):  # of each file
                name = f"experts_{kind}{f'_{number}' if number else ''}"
                copy(manifest, f"{name}.yaml")
                copy(manifest.with_suffix(".jsonl"), f"{name}.jsonl")
    # Results record their own times; experts do not.
    made = {step.name: {key: value for key, value in results.ledger.made[step.name].items()
                        if key != "seconds" or step.name in untimed}
            for step in plan.steps if step.name in results.ledger.made}
    write_json(results.folder / "commands.json", made)


# --- tables and plots ------------------------------------------------------------------------------------------


def write_tables(plan: Plan, results: Results) -> None:
    """Writes `tables.md`: the accuracies that are there, each with its command."""
    form = plan.form
    lines = [f"# {form.dataset}, {form.model}, {form.experts} experts of {form.epochs} epochs", "",
             "Accuracy, %, on the test images where a table does not say otherwise: mean ± standard deviation (the "
             "population's) over the networks that are trained on a set, or, of several sets, over the sets. `--seed "
             "0` where a command gives no other. Each random row's networks have random images of their own. Of "
             "several sets the first one's command and times are shown; `reproduce.sh --list --only ROW` prints all."]
    if made_on := results.made_on():
        lines[-1] += f" Each command: {f'`OMP_NUM_THREADS={form.threads}`, ' if form.threads else ''}{made_on}."
    lines += ["", _main_table(plan, results), "", SOURCES]
    for title, rows in plan.tables.items():
        networks = results.networks(rows)
        many = len(networks) > 1
        listed = [("row", "set", *(networks if many else ["accuracy, %"]), "networks", "distillation + test",
                   "command")]
        for row in rows:
            cells = [results.cell(row, network) for network in (networks if many else [None])]
            count = next((cell.count for cell in cells if cell), "–")
            # On other networks, rows share sets that another row made, so the evaluation tells them apart.
            step = row.made_by[0] if row.made_by and networks in ([], [form.model]) else row.evaluations[0]
            listed.append((row.name, row.says, *(str(cell or "–") for cell in cells), count, results.took(row),
                           f"`{results.ledger.command(step)}`"))
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", table(listed)]
    lines += ["", "## Experts", ""]
    if "SGD" in plan.experts:
        lines += ["Apart: the final distance from the plain-SGD experts, which begin with the same parameters and see "
                  "the same batches, relative to how far these have moved.", ""]
    listed = [("row", "ρ", "accuracy on held-out images, %", "apart, %", "trained in", "command")]
    for kind in plan.looks:
        step, look = plan.experts[kind], results.of(plan.looks[kind])
        cells = [_at_the_end(look, name) if look else "–" for name in ("test_accuracy", "apart")]
        seconds = look and results.ledger.made.get(step.name, {}).get("seconds")
        listed.append((f"experts_{kind}", f"{RHO[kind]:g}", *cells, duration(seconds) if seconds else "–",
                       f"`{results.ledger.command(step)}`"))
    tested = plan.main[form.ideas_at or form.ipcs[0]]["exact"].evaluations[0]
    lines += [table(listed), "", "## Evaluations", "", "A distilled set is tested like this one:", "",
              "```", str(tested), "```", ""]
    write_text(results.folder / "tables.md", "\n".join(lines))


def methods_of(plan: Plan) -> dict[str, str]:
    """The methods of the main table, in its order."""
    return {name: says for name, says in METHODS.items() if any(name in rows for rows in plan.main.values())}


def _main_table(plan: Plan, results: Results) -> str:
    ipcs = plan.form.ipcs
    none = [""] * (len(ipcs) - 1)
    rows = [["", *(f"{ipc} per class" for ipc in ipcs)]]
    rows += [[says, *(str((name in plan.main[ipc] and results.cell(plan.main[ipc][name])) or "–") for ipc in ipcs)]
             for name, says in methods_of(plan).items()]
    (whole,) = plan.tables["the whole training set"]
    rows.append(["the whole training set", str(results.cell(whole) or "–"), *none])
    for method, figures in PUBLISHED.items():
        at = dict(zip(PUBLISHED_IPCS, figures))
        rows.append([f"published: {method}", *(str(at.get(ipc, "–")) for ipc in ipcs)])
    return table([*rows, ["published: the whole training set", str(PUBLISHED_WHOLE), *none]])


def write_plots(plan: Plan, results: Results) -> None:
    """Writes `accuracy.png` (methods by images per class), `windows.png` and `spent.png`."""
    from scripts.plots import save_by_images, save_spent, save_windows

    curves = {says: _points(results, {ipc: rows[name] for ipc, rows in plan.main.items() if name in rows})
              for name, says in methods_of(plan).items()}
    whole = results.cell(plan.tables["the whole training set"][0])
    levels = {"the whole training set": 100 * whole.score.mean} if whole else {}
    published = {f"published: {method}": list(zip(PUBLISHED_IPCS, figures)) for method, figures in PUBLISHED.items()}
    save_by_images(results.folder / "accuracy.png", curves, levels, published,
                   {"published: the whole training set": PUBLISHED_WHOLE})
    save_windows(results.folder / "windows.png", windows(plan, results))
    save_spent(results.folder / "spent.png", spent(plan, results))


def _points(results: Results, rows: Mapping[Any, Row]) -> list[tuple[Any, float, float]]:
    """Points of a plot: position, mean and standard deviation, %, of the rows that have results."""
    cells = {at: cell for at, row in rows.items() if (cell := results.cell(row))}
    return [(at, 100 * cell.score.mean, 100 * (cell.score.std or 0)) for at, cell in cells.items()]


def windows(plan: Plan, results: Results) -> dict[str, list[tuple[str, float, float]]]:
    """Images per class in words → points of the windows, at their start epochs in words."""
    return {_images(ipc): _points(results, rows) for ipc, rows in plan.windows.items()}


def spent(plan: Plan, results: Results) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """Cost in words → images per class in words → points by amount. One network has no deviation: NaN."""
    iterations = {_images(ipc): [(each.iteration, 100 * each.scores[0].mean, 100 * (each.scores[0].std or math.nan))
                                 for each in results.metrics(rows["exact"]).of_set(NORMAL)]
                  for ipc, rows in plan.main.items()}
    return {"iterations\n(held-out images)": iterations} | {
        f"{what}\n(test images)": {_images(ipc): _points(results, rows) for ipc, rows in by_ipc.items()}
        for what, by_ipc in plan.spent.items()}


def main() -> None:
    parser = ScriptParser(__doc__)
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--small", action="store_true", help="the short form, for a CPU")
    of.add_argument("--cpu", action="store_true", help="the published network, on a CPU")
    parser.add_argument("--jobs", type=positive, metavar="N",
                        help="commands at once [a CPU's cores; 1 on a GPU]")
    parser.add_argument("--only", nargs="+", action="extend", metavar="PATTERN",
                        help="rows whose names match, as in 'ipc1_*', and whatever they need [all]")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the commands, and nothing else")
    instead.add_argument("--tables", action="store_true", help="make tables and plots of the results that are there")
    parser.add_argument("--results", type=Path, metavar="FOLDER",
                        help="with --tables: make them of the results in this folder, and write them there "
                             "[the form's own]")
    options = parser.parse_args()
    form = SMALL if options.small else CPU if options.cpu else FULL
    jobs = options.jobs if options.jobs is not None else 1 if form is FULL else cores()
    if options.results and not options.tables:
        raise UserError("--results is for --tables; leave it out")
    folder = options.results.absolute() if options.results else None
    os.chdir(REPOSITORY)
    plan = Plan(form, jobs)
    rows, steps = plan.wanted(options.only or ["*"])
    if options.list:
        given = "".join(f"{name}={value} " for name, value in form.environment.items())
        print("\n".join(f"{given}{step}" for step in in_order(steps)))
        return
    made = (folder or form.root) / "commands.json"
    if options.tables and not made.is_file():
        raise UserError(f"{shown(made.parent)} holds no results (no {made.name}); give another folder, or leave out "
                        "--tables to make them")
    if folder:
        report(plan, rows, Results(plan, folder))
        return
    with locked(form.root, "end it, or what is left of it if it was killed") as lock:
        ledger, failed = Ledger(form.root / "commands.json"), None
        if not options.tables:
            import torch  # takes seconds, and --help and refusals do without it

            if form is FULL and not torch.cuda.is_available():
                note("without a GPU this form takes weeks; --cpu and --small are made for a CPU")
            environment = os.environ | form.environment
            environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
            interrupt.saves("the commands that are done")
            try:
                run_steps(steps, jobs, form.root / "output", ledger, environment, lock)
            except StepsFailedError as error:
                failed = error
        try:
            results = Results(plan, form.root / "results", ledger)
            gather(plan, results)
            report(plan, rows, results)
        finally:
            if failed:
                raise failed


def report(plan: Plan, rows: Sequence[Row], results: Results) -> None:
    """Writes tables and plots into the folder, and prints the accuracies of these rows."""
    write_tables(plan, results)
    write_plots(plan, results)
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        for network in results.networks([row]):
            cell = results.cell(row, network)
            said = f"{cell} % ({cell.count})" if cell else "not all of its sets are tested"
            print(f"{row.name:{width}}  {network}: {said}")
        if not any(map(results.of, row.evaluations)):
            print(f"{row.name:{width}}  no result")
    for name in results.others:
        note(f"{name} is left out: it was made by another command")
    print(f"in {shown(results.folder)}: tables.md, accuracy.png, windows.png, spent.png, a JSON file for each row")


if __name__ == "__main__":
    entry(main)
