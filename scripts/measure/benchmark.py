"""Measures what a step of each program costs on this machine: the methods side by side, in time and memory.

    python scripts/measure/benchmark.py [--part matching experts evaluation] [--shape NAME …|all] [--methods NAME …]
                                [--device auto|cpu|cuda] [--rounds N] [--json FILE]

Shapes are those of the published configs (`cifar10_ipc10` is configs/CIFAR-10/ConvIN/IPC10.yaml), and a few for CPUs;
the data is random. After a warm-up, which includes compiling and capturing, the methods take turns for `--rounds`
rounds, so that other load on the machine affects all of them alike. Ratios are medians of the ratios within a round.

* matching: one call of `match_trajectory`, with the full augmentation. `unroll`: autograd through all steps. `plain`:
  the exact adjoint, reverse over reverse. `tesla`: TESLA's gradient. `exact`, `compiled` and, on a GPU, `graph`: the
  exact adjoint by faster engines.
* experts: one GSAM step with its augmentation, against two `bare` forward and backward passes of the same batch.
  `synced` is plain autograd that fetches two numbers from the device at each batch, as the published code does.
* evaluation: one epoch of `train_network` on a distilled set, against its `bare` forward and backward passes.

For matching, peak memory is measured in a separate process for each method, during its second call. On the host it is
the memory that the call adds; on a GPU, everything allocated, including captured and compiled code.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from scripts.common import ScriptParser, positive, positive_float
from scripts.measure.shapes import GPU_MINUTES, METHODS, PARTS, Shape, all_shapes
from utils.program.entry import entry


def parse(shapes: dict[str, Shape]) -> argparse.Namespace:
    parser = ScriptParser(__doc__, json="the results")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--shape", nargs="+", choices=[*shapes, "all"], metavar="SHAPE",
                        help="all: those sensible for the device; or any of " + ", ".join(shapes)
                        + " (default: cpu, on a GPU cifar10_ipc10)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD",
                        help=", ".join(METHODS) + "; what a part does not have or this machine cannot run is left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N",
                        help="timed calls of each method (%(default)s)")
    parser.add_argument("--max_minutes", type=positive_float, metavar="M",
                        help=f"fit everything into this time (default: on a GPU {GPU_MINUTES:g}, else no limit)")
    parser.add_argument("--worker", choices=PARTS["matching"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    shapes = all_shapes()
    args = parse(shapes)

    from scripts.measure import benchmark_run  # imports torch, which takes seconds

    benchmark_run.side_by_side(args, shapes)


if __name__ == "__main__":
    entry(main)
