"""How far each backend's matching gradient is from plain autograd's in float64.

    python scripts/measure/precision.py [--draws 10] [--json FILE]

ConvNet 128, 3×32×32, T = 5, B = 10, random data, with augmentation. For each draw: the median over the images of the
relative error of their gradient, and the cosine between the gradients of all images. `compile` is the pass that is
compiled, with its form of the convolutions, run without the compiler.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor

from distill.matching import match_trajectory
from utils.config import DistillConfig, make
from utils.data import augment
from utils.derivatives.convnet_pass import ConvNetPass
from utils.derivatives.engine import HandWritten
from utils.files import write_json
from utils.networks import build_network
from utils.parameters import FlatModel
from utils.program.entry import entry
from utils.program.machine import environment
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write every draw's errors to this file")
    args = parser.parse_args()
    draws = [errors(draw) for draw in range(args.draws)]
    print("| kind | median draw | best | worst | cosine, median |\n|---|---|---|---|---|")
    for kind in KINDS:
        values = [draw[kind]["median_image"] for draw in draws]
        cosine = statistics.median(draw[kind]["cosine"] for draw in draws)
        print(f"| {kind} | {statistics.median(values):.1e} | {min(values):.1e} | {max(values):.1e} | {cosine:.4f} |")
    if args.json:
        write_json(args.json, {"steps": STEPS, "batch": BATCH, "draws": draws,
                               "environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    entry(main)
