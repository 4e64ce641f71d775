"""Measures the communication between ranks in a distillation step: bytes, and their share of the time.

    torchrun --standalone --nproc_per_node=2 scripts/measure/communication.py [--model ConvNetW32 --batch 50
        --json FILE]

Over gloo on CPUs. Each inner step sums one vector of P + 2 numbers over the ranks in the forward pass (the gradient,
the loss, the number of samples) and one in the backward pass (the co-state). Computing a rank's share of the batch and
summing the vectors are timed separately, in turn, `--rounds` times; the results are medians, of the slowest rank. The
gradient of the set, which is summed once for all steps of an iteration, is left out.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.errors import UserError, number_of
from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from scripts.common import ScriptParser, positive, save_report
from utils import networks
from utils.program import ranks
from utils.program.entry import entry


def measure(model_name: str, batch: int, rounds: int) -> dict[str, float]:
    """Seconds of a step's arithmetic on a rank's share of the batch, and of its two sums; those of the slowest rank."""
    import torch  # takes seconds, and --help and refusals do without it

    from utils.parameters import FlatModel

    ranks.start(torch.device("cpu"))
    torch.manual_seed(ranks.rank())
    model = FlatModel(networks.build_network(model_name, 1, 10, (28, 28)))
    theta = model.flatten()
    share = len(range(ranks.rank(), batch, ranks.size()))
    x, y = torch.randn(share, 1, 28, 28), torch.randn(share, 10)
    vector = torch.zeros(model.num_parameters + 2)

    def compute() -> None:
        model.gradient(theta, x, y)
        model.adjoint(theta, theta, x, y)

    def communicate() -> None:
        ranks.sum_(vector)
        ranks.sum_(vector)

    computing, communicating = [], []
    for _ in range(rounds + 1):  # the first one warms up
        computing.append(_timed(compute))
        communicating.append(_timed(communicate))
    here = median(computing[1:]), median(communicating[1:])
    slowest = [max(each) for each in zip(*ranks.gather({ranks.rank(): here}).values())]
    return {"ranks": ranks.size(), "parameters": model.num_parameters, "bytes_per_step": 2 * 4 * len(vector),
            "compute_seconds": slowest[0], "communicate_seconds": slowest[1],
            "share": slowest[1] / sum(slowest)}


def _timed(work: Callable[[], None]) -> float:
    ranks.barrier()
    began = perf_counter()
    work()
    return perf_counter() - began


def main() -> None:
    parser = ScriptParser(__doc__, json="what was measured")
    parser.add_argument("--model", default="ConvNetW32", help="network whose gradients are summed (%(default)s)")
    parser.add_argument("--batch", type=positive, default=50, help="batch size of a step, over all ranks (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=20, help="timed steps (%(default)s)")
    arguments = parser.parse_args()
    if arguments.batch < ranks.size():
        raise UserError(f"--batch {arguments.batch}: fewer samples than the {ranks.size()} ranks; give more")
    found = measure(arguments.model, arguments.batch, arguments.rounds)
    print(f"{number_of(found['ranks'], 'rank')}, {arguments.model} ({found['parameters']} parameters), batch "
          f"{arguments.batch}: {found['bytes_per_step'] / 1e6:.2f} MB a step; computing "
          f"{1000 * found['compute_seconds']:.1f} ms, summing "
          f"{1000 * found['communicate_seconds']:.1f} ms, {100 * found['share']:.0f} % of the time")
    if ranks.first():
        ran = (f"torchrun --standalone --nproc_per_node={found['ranks']} scripts/measure/communication.py "
               f"--model {arguments.model} --batch {arguments.batch} --rounds {arguments.rounds}")
        save_report(arguments.json, {"command": ran, **found}, "cpu")


if __name__ == "__main__":
    entry(main)
