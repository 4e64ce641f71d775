"""What a step of each program costs here: the methods side by side, in time and memory.

    python scripts/measure/benchmark.py [--part matching experts evaluation] [--shape NAME …|all] [--methods NAME …]
                                [--device auto|cpu|cuda] [--rounds N] [--json FILE]

Shapes are those of the published configs (`cifar10_ipc10` is configs/CIFAR-10/ConvIN/IPC10.yaml), and a few for CPUs;
the data is random. After a warm-up, which includes compiling and capturing, the methods take turns for `--rounds`
rounds, so that whatever else the machine does falls on all of them; ratios are medians of the ratios within a round.

* matching: one call of `match_trajectory`, with the whole augmentation. `unroll`: autograd through all steps. `plain`:
  the exact adjoint, reverse over reverse. `tesla`; `exact`; `compiled`; on a GPU `graph`: by faster engines.
* experts: one GSAM step with its augmentation, against two `bare` forward and backward passes of the same batch;
  `synced` is plain autograd with two numbers fetched from the device at each batch, as published code does.
* evaluation: one epoch of `train_network` on a distilled set, against its `bare` forward and backward passes.

Peak memory is that of a process of its own for each method, in its second call: on the host what the call adds, on a
GPU everything that was allocated, captured and compiled code included.

`of rate` is the share of this machine's matrix product rate that a method's arithmetic reaches. That arithmetic is
taken as 9 F a step for every method, F being the network's forward pass over the batch: 3 F for the gradient, 6 F for
the adjoint. Norms, pooling, augmentation and memory traffic cost time and count for nothing, so 1 is out of reach; of
two methods the one with the larger share is the faster in proportion. On a GPU the product is one in TF32, as torch's
convolutions are.

    python scripts/measure/benchmark.py --beside FOLDER --shape cifar10_ipc10 --data_path DATA [--buffer_path EXPERTS]

FOLDER is a checkout of the published code that runs on this machine. Its commands and ours train an expert and, with
experts to match, distil a set of the config of that shape by turns, each as a process on one thread of the CPU
(scripts/measure/beside.py); the table has CPU seconds and their ratio.
"""

import argparse
import contextlib
import gc
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

import torch
import yaml
from torch import Tensor, nn

from buffer.experts import kept_of, train_step
from distill.evaluate.train import train_network
from distill.matching import match_trajectory
from scripts.common import script_parser
from scripts.measure import beside
from scripts.measure.projection import IMAGES, costs
from utils.config import BufferConfig, DistillConfig, make
from utils.data import augment
from utils.derivatives.choose_engine import set_precision
from utils.errors import UserError
from utils.files import REPOSITORY, given, write_json
from utils.loss_and_accuracy import cross_entropy
from utils.memory import peak, reset_peak
from utils.networks import build_network
from utils.parameters import FlatModel
from utils.program.console import table
from utils.program.device import describe, select_device
from utils.program.entry import entry
from utils.program.machine import environment, machine
from utils.program.prepare import dsa_groups
from utils.program.progress import Progress
from utils.program.seeds import generator, seeded

EXPERT = make(BufferConfig)
EXPERT_STEPS = 3  # a call, in the experts' part
EPOCHS = 2  # a call, in the evaluation's part
GPU_MINUTES = 9.0
CPU = torch.device("cpu")

BACKENDS = {"plain": "plain", "exact": "eager", "eager": "eager", "compiled": "compile", "graph": "graph"}
PARTS = {  # part → its methods, the one that the others are compared with first
    "matching": ("unroll", "plain", "tesla", "exact", "compiled", "graph"),
    "experts": ("bare", "synced", "eager", "compiled", "graph"),
    "evaluation": ("bare", "eager", "compiled", "graph")}
METHODS = tuple(dict.fromkeys(method for methods in PARTS.values() for method in methods))

Call = Callable[[], object]


# --- shapes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A distillation: `images` synthetic images, T = `steps` inner steps on B = `batch` of them."""

    name: str
    network: str
    image: tuple[int, int, int]
    classes: int
    images: int
    steps: int
    batch: int
    batch_train: int = 256
    config: str = ""  # whose distillation it is, in the repository

    def __str__(self) -> str:
        return (f"{self.name}: {self.network}, {'×'.join(map(str, self.image))}, {self.classes} classes, "
                f"{self.images} images")

    def build(self, device: torch.device) -> nn.Module:
        with seeded("benchmark", self.name):
            return build_network(self.network, self.image[0], self.classes, self.image[1:]).to(device)

    def draw(self, batch: int, random: torch.Generator) -> augment.Draw | None:
        return augment.draw(dsa_groups(EXPERT), batch, self.image[1:], random)


def all_shapes() -> dict[str, Shape]:
    shapes = [Shape("tiny_cpu", "ConvNetW8", (1, 28, 28), 10, 10, 3, 6, 16),
              Shape("cpu_w32", "ConvNetW32", (1, 28, 28), 10, 50, 20, 50),
              Shape("cpu", "ConvNet", (1, 28, 28), 10, 50, 20, 50),
              Shape("cpu_t80", "ConvNet", (1, 28, 28), 10, 50, 80, 50),
              Shape("cpu_b200", "ConvNet", (1, 28, 28), 10, 200, 20, 200)]
    for path in sorted(REPOSITORY.glob("configs/*/ConvIN/IPC*.yaml"), key=lambda path: (path.parent, len(path.name))):
        config = make(DistillConfig, **yaml.safe_load(path.read_text()))
        image, classes, _ = IMAGES[config.dataset]
        images = config.ipc * classes * config.factor**2
        shapes.append(Shape(f"{config.dataset.lower()}_ipc{config.ipc}", config.model, image, classes, images,
                            config.syn_steps, min(config.batch_syn or images, images), config.batch_train,
                            str(path.relative_to(REPOSITORY))))
    return {shape.name: shape for shape in shapes}


SENSIBLE = {  # what `--shape` all means; of shapes that differ in the number of images alone, one
    "cpu": ("cpu_w32", "cpu", "cpu_t80", "cpu_b200"),
    "cuda": ("cifar10_ipc1", "cifar10_ipc10", "cifar10_ipc50", "cifar100_ipc10", "cifar100_ipc50", "tiny_ipc10",
             "tiny_ipc50")}


# --- the calls of each part ----------------------------------------------------------------------------------
# Each yields (method, name of the engine, call); a method's call does the same work every time.

Calls = Iterator[tuple[str, str, Call]]


def matching_calls(shape: Shape, device: torch.device, methods: Sequence[str]) -> Calls:
    network = shape.build(device)
    random = generator("benchmark", "matching", shape.name)
    images = torch.randn(shape.images, *shape.image, generator=random).to(device)
    labels = torch.randn(shape.images, shape.classes, generator=random).to(device)
    batches = [torch.randperm(shape.images, generator=random)[:shape.batch] for _ in range(shape.steps)]
    draws, batches = augment.together([shape.draw(shape.batch, random) for _ in batches], batches, device)
    lr = torch.tensor(0.01, device=device)
    start = FlatModel(network).flatten()
    target = start + 0.01 * torch.randn(start.shape, generator=random).to(device)

    models: dict[str, FlatModel] = {}  # TESLA shares an engine, and on a GPU its graphs
    for method in methods:
        backend = {"unroll": "plain", "tesla": "graph" if device.type == "cuda" else "eager"}.get(method)
        backend = backend or BACKENDS[method]
        model = models.setdefault(backend, FlatModel(network, backend=backend))
        gradient = method if method in ("unroll", "tesla") else "exact"

        yield method, model.engine.name, partial(match_trajectory, model, start, target, images, labels, lr, batches,
                                                 draws, gradient)


def expert_calls(shape: Shape, device: torch.device, methods: Sequence[str]) -> Calls:
    network = shape.build(device)
    random = generator("benchmark", "experts", shape.name)
    number = EXPERT_STEPS * EXPERT.batch_train
    images = torch.randn(number, *shape.image, generator=random).to(device)
    labels = torch.randint(shape.classes, (number,), generator=random).to(device)

    def epoch(model: FlatModel, method: str) -> None:
        """The epoch of `buffer.experts.train_expert`; `synced` waits for the device at each batch."""
        random = generator("benchmark", "experts", "epoch")
        kept = kept_of(model, model.flatten(), None)
        batches = torch.randperm(number, generator=random).split(EXPERT.batch_train)
        for batch, drawn in augment.drawn_ahead(batches, shape.draw, random, device):
            train_step(EXPERT, model, kept, images[batch], labels[batch], drawn)
            if method == "synced":
                kept["total_loss"].item()
                kept["correct"].item()

    bare = partial(bare_passes, network, images, labels, EXPERT.batch_train, 2)
    return beside_bare(bare, network, methods, epoch)


def evaluation_calls(shape: Shape, device: torch.device, methods: Sequence[str]) -> Calls:
    network = shape.build(device)
    random = generator("benchmark", "evaluation", shape.name)
    images = torch.randn(shape.images, *shape.image, generator=random).to(device)
    labels = torch.randn(shape.images, shape.classes, generator=random).to(device)

    def train(model: FlatModel, method: str) -> Tensor:
        return train_network(model, model.flatten(), images, labels, 0.01, epochs=EPOCHS - 1,  # they start at 0
                             batch_size=shape.batch_train, draw=shape.draw, random=generator("benchmark", "order"))

    bare = partial(bare_passes, network, images, labels, shape.batch_train, EPOCHS)
    return beside_bare(bare, network, methods, train)


def beside_bare(bare: Call, network: nn.Module, methods: Sequence[str],
                work: Callable[[FlatModel, str], object]) -> Calls:
    for method in methods:
        if method == "bare":
            yield method, "torch", bare
        else:
            model = FlatModel(network, backend=BACKENDS.get(method, "plain"))
            yield method, model.engine.name, partial(work, model, method)


def bare_passes(network: nn.Module, images: Tensor, labels: Tensor, batch: int, times: int) -> None:
    """Forward and backward over all images, so many times."""
    for _ in range(times):
        for x, y in zip(images.split(batch), labels.split(batch)):
            network.zero_grad()
            cross_entropy(network(x), y).backward()


# What of a shape decides the cost of the part, how often a call does the unit that is reported, and that unit.
CALLS = {
    "matching": (matching_calls, lambda shape: shape, 1, "call"),
    "experts": (expert_calls, lambda shape: (shape.network, shape.image), EXPERT_STEPS, "step"),
    "evaluation": (evaluation_calls, lambda shape: (shape.network, shape.image, shape.images, shape.batch_train),
                   EPOCHS, "epoch")}


# --- measuring -----------------------------------------------------------------------------------------------


class Clock:
    """Spreads the time that is left evenly over the measurements that are left."""

    def __init__(self, minutes: float) -> None:
        self.end = self.end_of_share = perf_counter() + 60 * minutes

    def share(self, left: int) -> None:
        now = perf_counter()
        self.end_of_share = now + (self.end - now) / left

    @property
    def over(self) -> bool:
        return perf_counter() > self.end_of_share


def timed(call: Call, device: torch.device) -> float:
    synchronise(device)
    began = perf_counter()
    call()
    synchronise(device)
    return perf_counter() - began


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what an error, or one that it followed from, says."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            return True
        error = error.__context__
    return False


def tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(call: Call, device: torch.device, max_seconds: float) -> float | str:
    """The seconds of a call, or why it is not to be measured."""
    tidy(device)  # the engines look at how much is free
    try:
        took = timed(call, device)
        return took if took <= max_seconds else "too slow"
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return "out of memory"


def measure(calls: Calls, rows: dict[str, dict[str, Any]], rounds: int, units: int, device: torch.device,
            clock: Clock, max_seconds: float, bar: Progress) -> None:
    """Puts into the rows of the methods what their calls took: `units` of whatever is counted, in turns."""
    kept: dict[str, Call] = {}
    for method, engine, call in calls:
        rows[method]["engine"] = engine
        if rows[method]["status"] == "measured":
            took = "no time left" if clock.over else attempt(call, device, max_seconds)
            if isinstance(took, str):
                rows[method]["status"] = took
            else:
                kept[method] = call
                rows[method] |= {"warm_up": took, "seconds": []}
        bar.update()
    for number in range(rounds):
        if number and clock.over:
            break
        for method, call in kept.items():
            rows[method]["seconds"].append(timed(call, device) / units)
            bar.update()


def summarise(rows: list[dict[str, Any]], baseline: str, flops: float | None, rate: float) -> None:
    """Adds medians, spreads, ratios to the baseline within each round, and the share of the rate."""
    base = next((row.get("seconds") for row in rows if row["method"] == baseline), None)
    for row in rows:
        seconds = row.get("seconds")
        if seconds:
            row |= {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds),
                    "ratio": statistics.median(a / b for a, b in zip(seconds, base)) if base else None}
            if flops:
                row["fraction_of_rate"] = flops / row["median"] / rate


def machine_rates(device: torch.device) -> dict[str, float | str]:
    """The rates of a matrix product and of a copy, read and written bytes together."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 2048
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    precision = torch.backends.cuda.matmul.fp32_precision
    if gpu:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    product = median_time(lambda: a @ b, device)
    torch.backends.cuda.matmul.fp32_precision = precision
    source = torch.randn((1 << 28) if gpu else (1 << 25), device=device)
    target = torch.empty_like(source)
    copy = median_time(lambda: target.copy_(source), device)
    return {"product_size": size, "product_precision": "tf32" if gpu else "fp32",
            "product_gflops": 2 * size**3 / product / 1e9, "copy_gb_per_s": 2 * source.nbytes / copy / 1e9}


def median_time(call: Call, device: torch.device) -> float:
    timed(call, device)
    return statistics.median(timed(call, device) for _ in range(5))


# --- memory, in a process of its own -------------------------------------------------------------------------


def worker(shape: Shape, device: torch.device, method: str, max_seconds: float) -> dict[str, Any]:
    """What `--worker` prints: the peak memory of one method, or why there is none."""
    ((_, _, call),) = matching_calls(shape, device, [method])
    with contextlib.suppress(OSError):  # only where there is /proc
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends it is killed before other programs
    took = attempt(call, device, max_seconds)
    if isinstance(took, str):
        return {"status": took}
    tidy(device)
    before = reset_peak(CPU)
    call()
    synchronise(device)
    found = {"status": "measured", "peak_host_bytes": max(0, peak(CPU) - before)}
    return found | ({"peak_device_bytes": peak(device)} if device.type == "cuda" else {})


def memory_of(shape: Shape, device: torch.device, method: str, clock: Clock, max_seconds: float) -> dict[str, Any]:
    """Runs `worker` in a process of its own."""
    if clock.over:
        return {"status": "no time left"}
    command = [sys.executable, __file__, "--worker", method, "--shape", shape.name, "--device", str(device),
               "--max_seconds", str(max_seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True,
                              timeout=min(3 * max_seconds + 60, clock.end - perf_counter()))
    except subprocess.TimeoutExpired:
        return {"status": "no time left" if clock.over else "too slow"}
    if done.returncode == -9:  # by the system, when no memory is left
        return {"status": "out of memory"}
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(shape: Shape, rows: dict[str, dict[str, Any]], device: torch.device, clock: Clock,
                   max_seconds: float, bar: Progress) -> None:
    """Puts into the rows of the methods that can be measured what memory they take, or why they cannot."""
    for method, row in rows.items():
        if row["status"] == "measured":
            found = memory_of(shape, device, method, clock, max_seconds)
            if row.get("seconds"):  # which it was
                found.pop("status")
            row |= found
        bar.update()


# --- the report ----------------------------------------------------------------------------------------------


def show(baseline: str, unit: str, methods: list[dict[str, Any]], title: str) -> None:
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("median", f"s per {unit}", short), ("min", "min", short), ("max", "max", short),
        ("seconds", "rounds", lambda values: str(len(values))), ("ratio", f"time / {baseline}", short),
        ("peak_host_bytes", "host peak, MB", megabytes), ("peak_device_bytes", "GPU peak, MB", megabytes),
        ("fraction_of_rate", "of rate", short)]
    # Where nothing was measured the first column still says why.
    columns = [column for column in columns if column[0] == "median" or any(column[0] in row for row in methods)]
    rows = [("method", "engine", *(head for _, head, _ in columns))]
    for row in methods:
        cells = [text(row[key]) if row.get(key) is not None else "" for key, _, text in columns]
        if not row.get("seconds"):
            cells[0] = row["status"]
        rows.append((row["method"], row["engine"], *cells))
    print(f"\n{title}\n\n{table(rows)}", flush=True)


def short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def megabytes(value: int) -> str:
    return f"{value / 1e6:.0f}" if value >= 1e7 else f"{value / 1e6:.1f}"


# --- the program ---------------------------------------------------------------------------------------------


def parse(shapes: dict[str, Shape]) -> argparse.Namespace:
    parser = script_parser(__doc__, json="the results", key="rates")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--shape", nargs="+", choices=[*shapes, "all"], metavar="SHAPE",
                        help="all: those sensible for the device; or any of " + ", ".join(shapes)
                        + " (default: cpu, on a GPU cifar10_ipc10)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD",
                        help=", ".join(METHODS) + "; what a part does not have or this machine cannot run is left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed calls of each method (%(default)s)")
    parser.add_argument("--max_seconds", type=float, default=180, metavar="S",
                        help="leave out a method whose first call takes longer, compiling included (%(default)g)")
    parser.add_argument("--max_minutes", type=float, metavar="M",
                        help=f"fit everything into this time (default: on a GPU {GPU_MINUTES:g}, else no limit)")
    parser.add_argument("--beside", type=given, metavar="FOLDER", help="measure a checkout of the published code and "
                        "ours by turns, on a CPU")
    parser.add_argument("--data_path", type=given, metavar="FOLDER", help="the real data, with --beside")
    parser.add_argument("--buffer_path", type=given, metavar="FOLDER", help="experts to match, with --beside")
    parser.add_argument("--worker", choices=PARTS["matching"], help=argparse.SUPPRESS)
    return parser.parse_args()


def can_run(method: str, device: torch.device) -> bool:
    """Whether there is what the method needs: a C++ compiler, or a GPU."""
    network = build_network("ConvNetD1W1", 1, 2, (4, 4)).to(device)
    try:
        return bool(FlatModel(network, backend=BACKENDS.get(method, "plain")).engine)
    except UserError:
        return False


def beside_published(args: argparse.Namespace, shapes: list[Shape]) -> None:
    """`--beside`: prints and writes what the published code and ours take.

    Raises:
        UserError: it cannot be measured, or a command failed.
    """
    parts = beside.check(args.beside, args.data_path, args.buffer_path, args.part)
    paths = {name: path for name in ("data_path", "buffer_path") if (path := getattr(args, name))}
    without = next((shape.name for shape in shapes if not shape.config), None)
    if without:
        raise UserError(f"--beside --shape {without}: it is no config's; give one that is, such as cifar10_ipc10")
    report: dict[str, Any] = {"command": f"python scripts/measure/benchmark.py {shlex.join(sys.argv[1:])}",
                              "machine": machine(CPU) | {"threads": 1}, "rounds": args.rounds, "rates": None}
    for shape in shapes:
        for part in parts:
            methods = [method for method in beside.BACKENDS[part] if method in args.methods and can_run(method, CPU)]
            processes = (1 + len(methods)) * (1 + 2 * args.rounds)
            with Progress(processes, f"{part} {shape.name}") as bar:
                rows = beside.measure(part, args.beside, REPOSITORY / shape.config, paths, methods, args.rounds,
                                      bar.update)
            summarise(rows, beside.THEIRS, None, 0)
            report.setdefault(part, []).append({"shape": asdict(shape), "lengths": beside.LENGTHS[part],
                                                "methods": rows})
            show(beside.THEIRS, beside.UNITS[part], rows, f"{part} · {shape}, CPU seconds, one thread")
            if args.json:
                write_json(args.json, report)


def main() -> None:
    shapes = all_shapes()
    args = parse(shapes)
    for name in ("rounds", "max_seconds", "max_minutes"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name):g}: give a number above 0")
    if args.beside:
        beside_published(args, [shapes[name] for name in args.shape or ["cifar10_ipc10"] if name != "all"])
        return
    device = select_device(args.device)
    set_precision("auto", device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    chosen = args.shape or ["cifar10_ipc10" if device.type == "cuda" else "cpu"]
    chosen = SENSIBLE[device.type] if "all" in chosen else dict.fromkeys(chosen)
    if args.worker:
        print(json.dumps(worker(shapes[args.shape[0]], device, args.worker, args.max_seconds)))
        return

    jobs: dict[Any, tuple[str, Shape, list[str]]] = {}  # shapes that cost a part the same are measured once
    for part in dict.fromkeys(args.part):
        methods = [method for method in PARTS[part] if method in args.methods and can_run(method, device)]
        for name in chosen:
            if methods:
                jobs.setdefault((part, CALLS[part][1](shapes[name])), (part, shapes[name], methods))
    if not jobs:
        raise UserError(f"--part {' '.join(args.part)} --methods {' '.join(args.methods)}: no such part has such a "
                        f"method here; {'; '.join(f'{part}: ' + ', '.join(PARTS[part]) for part in args.part)}")

    clock = Clock(args.max_minutes or (GPU_MINUTES if device.type == "cuda" else math.inf))
    rates = machine_rates(device)
    report: dict[str, Any] = {
        "command": f"python scripts/measure/benchmark.py {shlex.join(sys.argv[1:])}".strip(),
        "machine": {**machine(device), "threads": torch.get_num_threads()},
        "environment": environment(device), "rounds": args.rounds, "rates": rates}
    print(f"{report['machine']['processor']} · {describe(device)} · torch {torch.__version__} · matrix product "
          f"{rates['product_gflops']:.0f} GFLOP/s ({rates['product_precision']}) · copy "
          f"{rates['copy_gb_per_s']:.0f} GB/s", flush=True)
    for number, (part, shape, methods) in enumerate(jobs.values()):
        clock.share(len(jobs) - number)
        calls, _, units, unit = CALLS[part]
        rows: dict[str, dict[str, Any]] = {
            method: {"method": method, "engine": "", "status": "measured"} for method in methods}
        with Progress(len(methods) * (args.rounds + (2 if part == "matching" else 1)), f"{part} {shape.name}") as bar:
            steps = [partial(measure, calls(shape, device, methods), rows, args.rounds, units, device, clock,
                             args.max_seconds, bar)]
            if part == "matching":
                # On a CPU first, as what the memory has no room for would end this process too; on a GPU it is the
                # time that is short.
                steps.insert(len(steps) if device.type == "cuda" else 0,
                             partial(measure_memory, shape, rows, device, clock, args.max_seconds, bar))
            for step in steps:
                step()
        if "compiled" in methods:
            torch.compiler.reset()  # code for every further shape counts against a limit
        tidy(device)
        flops = None
        if part == "matching":  # 9 F a step, of the module's docstring
            flops = 9 * costs(shape.network, shape.image, shape.classes).flops * shape.batch * shape.steps
        summarise(list(rows.values()), PARTS[part][0], flops, 1e9 * rates["product_gflops"])
        report.setdefault(part, []).append({"shape": asdict(shape), "flops": flops, "methods": list(rows.values())})
        detail = {"matching": f"T {shape.steps}, B {shape.batch}", "experts": f"batch {EXPERT.batch_train}",
                  "evaluation": f"batch {min(shape.batch_train, shape.images)}"}[part]
        show(PARTS[part][0], unit, list(rows.values()), f"{part} · {shape}, {detail}")
        if args.json:
            write_json(args.json, report)  # at once, so that an interrupt costs the rest only


if __name__ == "__main__":
    entry(main)
