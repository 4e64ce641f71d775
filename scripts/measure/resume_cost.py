"""What saving a run's state and verifying its experts cost, at the published settings.

    python scripts/measure/resume_cost.py [--seconds 20] [--json FILE]

A `RunFolder` is asked to save the state of a distillation of each config's size (images, labels and momenta, the best
set, the start) at every iteration, as `distill/loop.py` does. The iterations only wait, as long as the projection
(`scripts/measure/projection.py`) says for the fastest GPU of README; what the saving adds to them is measured for
`--seconds`. Beside it: how fast expert files are verified, and what that is of a run with 100 experts of 100 epochs.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from distill.results import METRICS, RESULT
from scripts.measure.projection import BENCHMARKS, GPUS, IMAGES, costs, fit, published, seconds_per_iteration
from utils.config import DistillConfig
from utils.files import sha256, write_json
from utils.program import interrupt
from utils.program.entry import entry
from utils.program.machine import environment
from utils.program.run_folder import RunFolder

GPU = list(GPUS)[-1]
EXPERTS, EPOCHS, FILES = 100, 100, 8


def state_of(config: DistillConfig) -> dict[str, Any]:
    """Tensors as large as a run's: the set, its momenta, the best set and the start."""
    channels, height, width, classes, _ = IMAGES[config.dataset]
    images = config.ipc * classes
    return {name: {"images": torch.randn(images, channels, height, width), "labels": torch.randn(images, classes)}
            for name in ("set", "momenta", "best", "start")}


def measure(config: DistillConfig, iteration: float, seconds: float, folder: Path) -> dict[str, float]:
    """How long saving takes, and its share of the time, with iterations of so many seconds."""
    run, state = RunFolder(folder, config, METRICS, RESULT), state_of(config)
    run.start()
    run.save_state(lambda: state)  # the first one, before any iteration
    once = run.save_seconds
    asking = iterations = 0
    began = perf_counter()
    while perf_counter() - began < seconds:
        sleep(iteration)
        before = perf_counter()
        interrupt.check()
        if run.save_due():
            run.save_state(lambda: state)
        asking += perf_counter() - before
        iterations += 1
    size = (folder / "checkpoint.pt").stat().st_size
    return {"state_mb": size / 1e6, "save_seconds": once, "iteration_seconds": iteration, "iterations": iterations,
            "share": asking / (perf_counter() - began)}


def verification(folder: Path, size: int = 1 << 30) -> float:
    """Bytes a second, of files that were just written (so not read from a disk), as `Buffer.verify` reads them."""
    paths = [folder / f"replay_buffer_{number}.pt" for number in range(FILES)]
    for path in paths:
        path.write_bytes(os.urandom(1 << 24) * (size // FILES >> 24))
    began = perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(sha256, paths))
    return size / (perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each config [20]")
    parser.add_argument("--json", help="write what was measured to this file")
    arguments = parser.parse_args()
    rho, crossings = fit(BENCHMARKS)
    rows = {}
    print(f"iterations as long as projected for {GPU}\n")
    print("| config | state | saved in | an iteration | share of the time | verifying 100 experts, share of the run |")
    print("|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        rate = verification(Path(folder))
        for name, config in published():
            iteration = seconds_per_iteration(config, GPU, rho, crossings)
            row = measure(config, iteration, arguments.seconds, Path(folder) / name)
            cost = costs(config.model, *IMAGES[config.dataset][:4])
            row["verify_seconds"] = EXPERTS * (EPOCHS + 1) * cost.theta / rate
            row["verify_share"] = row["verify_seconds"] / (config.Iteration * iteration)
            rows[name] = row
            print(f"| {name} | {row['state_mb']:.1f} MB | {row['save_seconds']:.2g} s | {iteration:.2g} s | "
                  f"{100 * row['share']:.2f} % | {row['verify_seconds']:.0f} s, {100 * row['verify_share']:.2f} % |")
    print(f"\nexpert files are verified at {rate / 1e9:.2f} GB/s")
    if arguments.json:
        write_json(arguments.json, {"command": f"python scripts/measure/resume_cost.py --seconds {arguments.seconds:g}",
                                    "gpu_of_the_projection": GPU, "verified_bytes_per_second": rate, "configs": rows,
                                    "environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    entry(main)
