"""What saving a run's state and verifying its experts cost, at the published settings.

    python scripts/measure/resume_cost.py [--seconds 20] [--json FILE]

A `RunFolder` is asked to save the state of a distillation of each config's size (images, labels and momenta, the best
set, the start) at every iteration, as `distill/loop.py` does. The iterations only wait, as long as the projection
(`scripts/measure/projection.py`) says for the fastest GPU of README; what the saving adds to them is measured for
`--seconds`. Beside it: how fast expert files are verified, and what that is of a run with 100 experts of 100 epochs.
"""

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from distill.result_files import METRICS, RESULT
from scripts.common import save_report, script_parser
from scripts.measure.projection import BENCHMARKS, GPUS, Setting, fit, published
from utils.files import sha256
from utils.program import interrupt
from utils.program.console import table
from utils.program.entry import entry
from utils.program.run_folder import RunFolder

GPU = list(GPUS)[-1]
EXPERTS, EPOCHS, FILES = 100, 100, 8


def state_of(setting: Setting) -> dict[str, Any]:
    """Tensors as large as a run's: the set, its momenta, the best set and the start."""
    return {name: {"images": torch.randn(setting.images, *setting.image),
                   "labels": torch.randn(setting.images, setting.classes)}
            for name in ("set", "momenta", "best", "start")}


def measure(setting: Setting, iteration: float, seconds: float, folder: Path) -> dict[str, float]:
    """How long saving takes, and its share of the time, with iterations of so many seconds."""
    run, state = RunFolder(folder, setting.config, METRICS, RESULT), state_of(setting)
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
    parser = script_parser(__doc__, json="what was measured")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each config [20]")
    arguments = parser.parse_args()
    rho, crossings = fit(BENCHMARKS)
    configs = {}
    print(f"iterations as long as projected for {GPU}\n")
    rows = [("config", "state", "saved in", "an iteration", "share of the time",
             "verifying 100 experts, share of the run")]
    with tempfile.TemporaryDirectory() as folder:
        rate = verification(Path(folder))
        for setting in published():
            iteration = setting.seconds(GPU, rho, crossings)
            verify = EXPERTS * (EPOCHS + 1) * setting.costs.theta / rate
            found = measure(setting, iteration, arguments.seconds, Path(folder) / setting.name) | {
                "verify_seconds": verify, "verify_share": verify / (setting.config.Iteration * iteration)}
            configs[setting.name] = found
            rows.append((setting.name, f"{found['state_mb']:.1f} MB", f"{found['save_seconds']:.2g} s",
                         f"{iteration:.2g} s", f"{100 * found['share']:.2f} %",
                         f"{verify:.0f} s, {100 * found['verify_share']:.2f} %"))
    print(table(rows))
    print(f"\nexpert files are verified at {rate / 1e9:.2f} GB/s")
    save_report(arguments.json, {"command": f"python scripts/measure/resume_cost.py --seconds {arguments.seconds:g}",
                                 "gpu_of_the_projection": GPU, "verified_bytes_per_second": rate, "configs": configs})


if __name__ == "__main__":
    entry(main)
