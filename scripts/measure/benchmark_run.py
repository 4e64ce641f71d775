"""The measurements that benchmark.py describes; a module of its own, as they need torch."""

import argparse
import contextlib
import gc
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from buffer.experts import kept_of, train_step
from distill.evaluate.train import train_network
from distill.matching import match_trajectory
from scripts.common import save_report
from scripts.measure.shapes import GPU_MINUTES, PARTS, SENSIBLE, Shape
from utils.config import BufferConfig, make
from utils.data import augment
from utils.derivatives.choose_engine import set_precision
from utils.errors import UserError, out_of_memory
from utils.files import REPOSITORY
from utils.loss_and_accuracy import cross_entropy
from utils.memory import peak, reset_peak
from utils.networks import build_network
from utils.parameters import FlatModel
from utils.program.console import table
from utils.program.device import describe, select_device
from utils.program.machine import machine
from utils.program.prepare import dsa_groups
from utils.program.progress import Progress
from utils.program.seeds import generator, seeded

BENCHMARK = "scripts/measure/benchmark.py"
EXPERT = make(BufferConfig)
EXPERT_STEPS = 3  # per call, in the experts' part
EPOCHS = 2  # per call, in the evaluation's part
A_WEEK = 7 * 24 * 60.0  # minutes
CPU = torch.device("cpu")
BACKENDS = {"plain": "plain", "unroll": "plain", "exact": "eager", "eager": "eager", "compiled": "compile",
            "graph": "graph"}

Call = Callable[[], object]


# --- the calls of each part ----------------------------------------------------------------------------------
# Each yields (method, name of the engine, call); a method's call does the same work every time.

Calls = Iterator[tuple[str, str, Call]]


def network_of(shape: Shape, device: torch.device) -> nn.Module:
    with seeded("benchmark", shape.name):
        return build_network(shape.network, shape.image[0], shape.classes, shape.image[1:]).to(device)


def draw(shape: Shape, batch: int, random: torch.Generator) -> augment.Draw:
    return augment.draw(dsa_groups(EXPERT), batch, shape.image[1:], random)


def matching_calls(shape: Shape, device: torch.device, methods: Sequence[str]) -> Calls:
    network = network_of(shape, device)
    random = generator("benchmark", "matching", shape.name)
    images = torch.randn(shape.images, *shape.image, generator=random).to(device)
    labels = torch.randn(shape.images, shape.classes, generator=random).to(device)
    batches = [torch.randperm(shape.images, generator=random)[:shape.batch] for _ in range(shape.steps)]
    draws, batches = augment.to_device([draw(shape, shape.batch, random) for _ in batches], batches, device)
    lr = torch.tensor(0.01, device=device)
    start = FlatModel(network).flatten()
    target = start + 0.01 * torch.randn(start.shape, generator=random).to(device)

    models: dict[str, FlatModel] = {}  # by backend; TESLA shares another method's engine, and on a GPU its graphs
    backends = BACKENDS | {"tesla": "graph" if device.type == "cuda" else "eager"}
    for method in methods:
        backend = backends[method]
        model = models.setdefault(backend, FlatModel(network, backend=backend))
        gradient = method if method in ("unroll", "tesla") else "exact"

        yield method, model.engine.name, partial(match_trajectory, model, start, target, images, labels, lr, batches,
                                                 draws, gradient)


def expert_calls(shape: Shape, device: torch.device, methods: Sequence[str]) -> Calls:
    network = network_of(shape, device)
    random = generator("benchmark", "experts", shape.name)
    number = EXPERT_STEPS * EXPERT.batch_train
    images = torch.randn(number, *shape.image, generator=random).to(device)
    labels = torch.randint(shape.classes, (number,), generator=random).to(device)

    def epoch(model: FlatModel, method: str) -> None:
        """An epoch as in `buffer.experts.train_expert`; `synced` waits for the device at each batch."""
        random = generator("benchmark", "experts", "epoch")
        kept = kept_of(model, model.flatten(), None)
        batches = torch.randperm(number, generator=random).split(EXPERT.batch_train)
        for batch, drawn in augment.drawn_ahead(batches, partial(draw, shape), random, device):
            train_step(EXPERT, model, kept, images[batch], labels[batch], drawn)
            if method == "synced":
                kept["total_loss"].item()
                kept["correct"].item()

    bare = partial(bare_passes, network, images, labels, EXPERT.batch_train, 2)
    return beside_bare(bare, network, methods, epoch)


def evaluation_calls(shape: Shape, device: torch.device, methods: Sequence[str]) -> Calls:
    network = network_of(shape, device)
    random = generator("benchmark", "evaluation", shape.name)
    images = torch.randn(shape.images, *shape.image, generator=random).to(device)
    labels = torch.randn(shape.images, shape.classes, generator=random).to(device)

    def train(model: FlatModel, method: str) -> Tensor:
        return train_network(model, model.flatten(), images, labels, 0.01, epochs=EPOCHS - 1,  # it runs one more
                             batch_size=shape.batch_train, draw=partial(draw, shape),
                             random=generator("benchmark", "order"))

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
    """Forward and backward passes over all images, `times` times."""
    for _ in range(times):
        for x, y in zip(images.split(batch), labels.split(batch)):
            network.zero_grad()
            cross_entropy(network(x), y).backward()


# Part → its calls, the key by which shapes cost the same, reported units per call, and the name of the unit.
CALLS = {
    "matching": (matching_calls, lambda shape: shape, 1, "call"),
    "experts": (expert_calls, lambda shape: (shape.network, shape.image), EXPERT_STEPS, "step"),
    "evaluation": (evaluation_calls, lambda shape: (shape.network, shape.image, shape.images, shape.batch_train),
                   EPOCHS, "epoch")}


# --- measuring -----------------------------------------------------------------------------------------------


class Clock:
    """Spreads the remaining time evenly over the remaining measurements."""

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


def tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(call: Call, device: torch.device) -> float | str:
    """The seconds of a call, or why there are none."""
    tidy(device)  # the engines look at how much memory is free
    try:
        return timed(call, device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return "out of memory"


def name_in(bar: Progress, method: str) -> None:
    """Shows the method that is about to be called for the first time in a process."""
    bar.show("compiling" if method == "compiled" else method)
    bar.refresh()


def measure(calls: Calls, rows: dict[str, dict[str, Any]], rounds: int, units: int, device: torch.device,
            clock: Clock, bar: Progress) -> None:
    """Times the methods' calls in turn, and puts the seconds per unit into their rows; a call does `units` of them."""
    kept: dict[str, Call] = {}
    for method, engine, call in calls:
        name_in(bar, method)
        rows[method]["engine"] = engine
        if rows[method]["status"] == "measured":
            took = "no time left" if clock.over else attempt(call, device)
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
            bar.show(method)
            rows[method]["seconds"].append(timed(call, device) / units)
            bar.update()


def summarise(rows: list[dict[str, Any]], baseline: str) -> None:
    """Adds medians, minima and maxima, and median ratios to the baseline within a round."""
    base = next((row.get("seconds") for row in rows if row["method"] == baseline), None)
    for row in rows:
        seconds = row.get("seconds")
        if seconds:
            row |= {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds),
                    "ratio": statistics.median(a / b for a, b in zip(seconds, base)) if base else None}


def machine_rates(device: torch.device) -> dict[str, float | str]:
    """The rates of a matrix product and of a copy (bytes read and written)."""
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


def worker(shape: Shape, device: torch.device, method: str) -> dict[str, Any]:
    """What `--worker` prints: the peak memory of one method, or why there is none."""
    ((_, _, call),) = matching_calls(shape, device, [method])
    with contextlib.suppress(OSError):  # there may be no /proc
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this process is killed first
    took = attempt(call, device)
    if isinstance(took, str):
        return {"status": took}
    tidy(device)
    before = reset_peak(CPU)
    call()
    synchronise(device)
    found = {"status": "measured", "peak_host_bytes": max(0, peak(CPU) - before)}
    return found | ({"peak_device_bytes": peak(device)} if device.type == "cuda" else {})


def memory_of(shape: Shape, device: torch.device, method: str, clock: Clock) -> dict[str, Any]:
    """Runs `worker` in a process of its own."""
    if clock.over:
        return {"status": "no time left"}
    command = [sys.executable, str(REPOSITORY / BENCHMARK), "--worker", method, "--shape", shape.name, "--device",
               str(device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=clock.end - perf_counter())
    except subprocess.TimeoutExpired:
        return {"status": "no time left"}
    if done.returncode == -9:  # killed by the system, as no memory was left
        return {"status": "out of memory"}
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(shape: Shape, rows: dict[str, dict[str, Any]], device: torch.device, clock: Clock,
                   bar: Progress) -> None:
    """Puts the memory that methods take into their rows, or why it cannot be measured."""
    for method, row in rows.items():
        name_in(bar, method)
        if row["status"] == "measured":
            found = memory_of(shape, device, method, clock)
            if row.get("seconds"):  # its time was measured
                found.pop("status")
            row |= found
        bar.update()


# --- the report ----------------------------------------------------------------------------------------------


def show(baseline: str, unit: str, methods: list[dict[str, Any]], title: str) -> None:
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("median", f"s per {unit}", short), ("min", "min, s", short), ("max", "max, s", short),
        ("seconds", "rounds", lambda values: str(len(values))), ("ratio", f"time / {baseline}", short),
        ("peak_host_bytes", "host memory, MB", megabytes), ("peak_device_bytes", "GPU memory, MB", megabytes)]
    # The first column stays even if nothing was measured: it says why.
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


def can_run(method: str, device: torch.device) -> bool:
    """Whether the machine has what the method needs: a C++ compiler, or a GPU."""
    network = build_network("ConvNetD1W1", 1, 2, (4, 4)).to(device)
    try:
        return bool(FlatModel(network, backend=BACKENDS.get(method, "plain")).engine)
    except UserError:
        return False


def side_by_side(args: argparse.Namespace, shapes: dict[str, Shape]) -> None:
    """Measures the methods of each part, and prints and writes the results; with `--worker`, the memory of one method.

    Raises:
        UserError: nothing that is asked for can be measured here.
    """
    device = select_device(args.device)
    set_precision("auto", device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    chosen = args.shape or ["cifar10_ipc10" if device.type == "cuda" else "cpu"]
    chosen = SENSIBLE[device.type] if "all" in chosen else dict.fromkeys(chosen)
    if args.worker:
        print(json.dumps(worker(shapes[next(iter(chosen))], device, args.worker)))
        return
    if "compiled" in args.methods:
        print("compiled: where there is a compiler it compiles first, for a minute or two a shape on a CPU", flush=True)

    jobs: dict[Any, tuple[str, Shape, list[str]]] = {}  # shapes of the same cost for a part are measured once
    for part in dict.fromkeys(args.part):
        methods = [method for method in PARTS[part] if method in args.methods and can_run(method, device)]
        for name in chosen:
            if methods:
                jobs.setdefault((part, CALLS[part][1](shapes[name])), (part, shapes[name], methods))
    if not jobs:
        raise UserError(f"--part {' '.join(args.part)} --methods {' '.join(args.methods)}: none of these parts has "
                        f"such a method here; {'; '.join(f'{part}: ' + ', '.join(PARTS[part]) for part in args.part)}")

    clock = Clock(args.max_minutes or (GPU_MINUTES if device.type == "cuda" else A_WEEK))
    rates = machine_rates(device)
    report: dict[str, Any] = {
        "command": f"python {BENCHMARK} {shlex.join(sys.argv[1:])}".strip(),
        "machine": {**machine(device), "threads": torch.get_num_threads()}, "rounds": args.rounds, "rates": rates}
    print(f"{report['machine']['processor']} · {describe(device)} · torch {torch.__version__} · matrix product "
          f"{rates['product_gflops']:.0f} GFLOP/s ({rates['product_precision']}) · copy "
          f"{rates['copy_gb_per_s']:.0f} GB/s", flush=True)
    for number, (part, shape, methods) in enumerate(jobs.values()):
        clock.share(len(jobs) - number)
        calls, _, units, unit = CALLS[part]
        rows: dict[str, dict[str, Any]] = {
            method: {"method": method, "engine": "", "status": "measured"} for method in methods}
        with Progress(len(methods) * (args.rounds + (2 if part == "matching" else 1)), f"{part} {shape.name}") as bar:
            steps = [partial(measure, calls(shape, device, methods), rows, args.rounds, units, device, clock, bar)]
            if part == "matching":
                # First on a CPU, as a method that runs out of memory would end this process too; last on a GPU, where
                # time is short.
                steps.insert(len(steps) if device.type == "cuda" else 0,
                             partial(measure_memory, shape, rows, device, clock, bar))
            for step in steps:
                step()
        if "compiled" in methods:
            torch.compiler.reset()  # compiled code of all shapes counts against a limit
        tidy(device)
        summarise(list(rows.values()), PARTS[part][0])
        report.setdefault(part, []).append({"shape": asdict(shape), "methods": list(rows.values())})
        detail = {"matching": f"T {shape.steps}, B {shape.batch}", "experts": f"batch {EXPERT.batch_train}",
                  "evaluation": f"batch {min(shape.batch_train, shape.images)}"}[part]
        show(PARTS[part][0], unit, list(rows.values()), f"{part} · {shape}, {detail}")
        save_report(args.json, report, device)  # at once, so that an interrupt loses only the rest
