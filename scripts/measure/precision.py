"""Measures how far each backend's matching gradient is from plain autograd's in float64.

    python scripts/measure/precision.py [--device cpu|cuda] [--draws 10] [--json FILE]

ConvNet 128, 3×32×32, T = 5, B = 10, random data, with augmentation; the exact gradient, and TESLA's against TESLA's in
float64. For each draw: the median over the images of the relative error of their gradient, and the cosine between the
gradients of all images. On a CPU `compile` runs the code that would be compiled, with its form of the convolutions, but
without the compiler; on a GPU it is compiled and captured. A backend that cannot run there is left out, with a note.
"""

import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from scripts.common import ScriptParser, positive, save_report
from utils import networks
from utils.config import DistillConfig, make
from utils.errors import UserError, note
from utils.program.console import table
from utils.program.entry import entry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STEPS, BATCH = 5, 10
METHODS = {"": "exact", ", TESLA": "tesla"}
KINDS = {  # device → kind → backend, precision
    "cpu": {"plain": ("plain", "fp32"), "eager": ("eager", "fp32"), "compile": ("eager", "fp32"),
            "bf16": ("eager", "bf16")},
    "cuda": {f"{backend} {precision}": (backend, precision) for precision in ("fp32", "tf32", "bf16")
             for backend in ("plain", "graph", "compile")}}


def kinds_on(device: "torch.device") -> dict[str, tuple[str, str]]:
    """The kinds that the device can run; notes each backend that it cannot."""
    from utils.derivatives.choose_engine import check_backend

    kinds = KINDS[device.type]
    for name in dict.fromkeys(backend for backend, _ in kinds.values()):
        try:
            check_backend(name, device)
        except UserError as why:
            note(f"left out: {why}")
            kinds = {kind: settings for kind, settings in kinds.items() if settings[0] != name}
    return kinds


def errors(kinds: dict[str, tuple[str, str]], draw: int, device: "torch.device") -> dict[str, dict[str, float]]:
    """The errors of these kinds, for one draw of network, data and augmentation."""
    import torch  # takes seconds, and --help and refusals do without it

    from distill.matching import match_trajectory
    from utils.data import augment
    from utils.derivatives.choose_engine import set_precision
    from utils.derivatives.convnet_pass import ConvNetPass
    from utils.derivatives.engine import HandWritten
    from utils.parameters import FlatModel
    from utils.program.prepare import dsa_groups
    from utils.program.seeds import generator, seeded

    random = generator("precision", draw)
    with seeded("precision", draw):
        network = networks.build_network("ConvNet", 3, 10, (32, 32))
    theta = FlatModel(network).flatten()
    tensors = [theta, theta + 0.01 * torch.randn(theta.shape, generator=random),
               torch.randn(BATCH, 3, 32, 32, generator=random), torch.randn(BATCH, 10, generator=random),
               torch.tensor(0.01)]
    batches = [torch.randperm(BATCH, generator=random) for _ in range(STEPS)]
    groups = dsa_groups(make(DistillConfig))
    draws = [augment.draw(groups, BATCH, (32, 32), random) for _ in batches]

    def gradient(model: FlatModel, method: str, dtype: torch.dtype, on: torch.device) -> "Tensor":
        drawn, there = augment.to_device(draws, batches, on)
        match = match_trajectory(model, *(each.to(on, dtype) for each in tensors), there, drawn, method)
        return match.grad_images.double().flatten(1).cpu()

    cpu = torch.device("cpu")
    reference = FlatModel(networks.build_network("ConvNet", 3, 10, (32, 32)).double(), "plain")
    exact = {name: gradient(reference, method, torch.float64, cpu) for name, method in METHODS.items()}
    network = network.to(device)
    found = {}
    for kind, (backend, precision) in kinds.items():
        set_precision("fp32" if device.type == "cpu" or precision == "bf16" else precision, device)
        model = FlatModel(network, backend, precision)
        if kind == "compile":
            form = ConvNetPass(network.plan, network.image_shape, theta.device)
            model.engine = HandWritten(form, model.unflatten, BATCH)
        for name, method in METHODS.items():
            ours, true = gradient(model, method, torch.float32, device), exact[name]
            found[kind + name] = {"median_image": float(((ours - true).norm(dim=1) / true.norm(dim=1)).median()),
                                  "cosine": float(torch.cosine_similarity(ours.flatten(), true.flatten(), dim=0))}
    return found


def main() -> None:
    parser = ScriptParser(__doc__, json="every draw's errors")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--draws", type=positive, default=10, metavar="N",
                        help="random draws of network, data and augmentation (%(default)s)")
    args = parser.parse_args()

    from utils.program.device import describe, select_device

    device = select_device(args.device)
    kinds = kinds_on(device)
    draws = [errors(kinds, draw, device) for draw in range(args.draws)]
    rows = [("kind", "median draw", "best", "worst", "cosine, median")]
    for kind in draws[0]:
        values = [draw[kind]["median_image"] for draw in draws]
        cosine = statistics.median(draw[kind]["cosine"] for draw in draws)
        errors_of = [f"{pick(values):.1e}" for pick in (statistics.median, min, max)]
        rows.append((kind, *errors_of, f"{cosine:.4f}"))
    print(table(rows))
    save_report(args.json, {"steps": STEPS, "batch": BATCH, "device": describe(device), "draws": draws}, device)


if __name__ == "__main__":
    entry(main)
