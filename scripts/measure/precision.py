"""How far each backend's matching gradient is from plain autograd's in float64.

    python scripts/measure/precision.py [--draws 10] [--json FILE]

ConvNet 128, 3×32×32, T = 5, B = 10, random data, with augmentation. For each draw: the median over the images of the
relative error of their gradient, and the cosine between the gradients of all images. `compile` is the pass that is
compiled, with its form of the convolutions, run without the compiler.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor

from distill.matching import match_trajectory
from scripts.common import save_report, script_parser
from utils.config import DistillConfig, make
from utils.data import augment
from utils.derivatives.convnet_pass import ConvNetPass
from utils.derivatives.engine import HandWritten
from utils.networks import build_network
from utils.parameters import FlatModel
from utils.program.console import table
from utils.program.entry import entry
from utils.program.prepare import dsa_groups
from utils.program.seeds import generator, seeded

STEPS, BATCH = 5, 10
KINDS = {  # kind → backend, precision
    "plain": ("plain", "fp32"), "eager": ("eager", "fp32"), "compile": ("eager", "fp32"), "bf16": ("eager", "bf16")}


def errors(draw: int) -> dict[str, dict[str, float]]:
    """Of every kind, for one draw of network, data and augmentation."""
    random = generator("precision", draw)
    with seeded("precision", draw):
        network = build_network("ConvNet", 3, 10, (32, 32))
    theta = FlatModel(network).flatten()
    tensors = [theta, theta + 0.01 * torch.randn(theta.shape, generator=random),
               torch.randn(BATCH, 3, 32, 32, generator=random), torch.randn(BATCH, 10, generator=random),
               torch.tensor(0.01)]
    batches = [torch.randperm(BATCH, generator=random) for _ in range(STEPS)]
    groups = dsa_groups(make(DistillConfig))
    draws = [augment.draw(groups, BATCH, (32, 32), random) for _ in batches]

    def gradient(model: FlatModel, dtype: torch.dtype) -> Tensor:
        match = match_trajectory(model, *(each.to(dtype) for each in tensors), batches, draws)
        return match.grad_images.double().flatten(1)

    with seeded("precision", draw):
        exact = gradient(FlatModel(build_network("ConvNet", 3, 10, (32, 32)).double(), "plain"), torch.float64)
    found = {}
    for kind, (backend, precision) in KINDS.items():
        model = FlatModel(network, backend, precision)
        if kind == "compile":
            form = ConvNetPass(network.plan, network.image_shape, theta.device, compiled=True)
            model.engine = HandWritten(form, model.unflatten, BATCH)
        ours = gradient(model, torch.float32)
        found[kind] = {"median_image": float(((ours - exact).norm(dim=1) / exact.norm(dim=1)).median()),
                       "cosine": float(torch.cosine_similarity(ours.flatten(), exact.flatten(), dim=0))}
    return found


def main() -> None:
    parser = script_parser(__doc__, json="every draw's errors")
    parser.add_argument("--draws", type=int, default=10, metavar="N")
    args = parser.parse_args()
    draws = [errors(draw) for draw in range(args.draws)]
    rows = [("kind", "median draw", "best", "worst", "cosine, median")]
    for kind in KINDS:
        values = [draw[kind]["median_image"] for draw in draws]
        cosine = statistics.median(draw[kind]["cosine"] for draw in draws)
        errors_of = [f"{pick(values):.1e}" for pick in (statistics.median, min, max)]
        rows.append((kind, *errors_of, f"{cosine:.4f}"))
    print(table(rows))
    save_report(args.json, {"steps": STEPS, "batch": BATCH, "draws": draws})


if __name__ == "__main__":
    entry(main)
