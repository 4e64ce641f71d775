"""Projects what the published configs should cost on GPUs from CPU measurements. Estimates only; nothing is run.

    python scripts/measure/projection.py [--benchmark FILE …]

Time: each inner step takes 12 F / (ρ R) + c A / W seconds per image. F: floating-point operations of the forward pass
(3 F for the gradient, 9 F for the adjoint, which repeats the forward pass); A: bytes of activations; R and W: the
machine's rates of matrix products and of copies. ρ and c say how well the program uses these rates; they are fitted to
the benchmark's `exact` for the shapes cpu_w32 and cpu. A GPU's R and W are the vendor's figures (TF32, dense). Kernel
launches are not in the model, so small batches will take longer.

Memory: `data` is the test images and, with whitening, one matrix, needed while pictures are made; the training images
stay on the host. `matching` is θ₀ … θ_T, six times the synthetic set (with gradients, momenta, augmentation) and one
micro-batch of the adjoint. Where memory is too small for a micro-batch of 100, the micro-batch shrinks; in this model
that does not cost time.
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

import yaml

from scripts.common import script_parser
from scripts.measure.shapes import IMAGES
from utils import networks
from utils.config import DistillConfig, make
from utils.files import REPOSITORY, reading
from utils.program.console import duration, table
from utils.program.entry import entry

BENCHMARKS = [REPOSITORY / "results" / "benchmark" / name for name in ("cpu_w32.json", "cpu.json")]
MICRO_BATCH = 100  # assumed in the column `matching`
SMALLEST = 10  # smallest micro-batch that keeps a GPU busy
GPUS = {  # name → GB, TF32 TFLOP/s, GB/s
    "8 GB (RTX 3070)": (8, 20.3, 448), "24 GB (RTX 3090)": (24, 35.6, 936), "80 GB (A100)": (80, 156, 2039)}


class Costs(NamedTuple):
    """Forward operations and bytes of activations per image; bytes of θ."""

    flops: int
    activations: int
    theta: int


def costs(network: str, image: tuple[int, int, int], classes: int) -> Costs:
    import torch  # takes seconds, and --help and refusals do without it
    from torch.utils.flop_counter import FlopCounterMode

    from utils.derivatives.choose_engine import activation_bytes

    with torch.device("meta"):
        built = networks.build_network(network, image[0], classes, image[1:])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            built(torch.empty(1, *image))
    parameters = sum(each.numel() for each in built.parameters())
    return Costs(counter.get_total_flops(), activation_bytes(built), 4 * parameters)


def fit(paths: list[Path]) -> tuple[float, float]:
    """ρ and c, fitted to the two shapes, which may be in one report or two."""
    rows = {}
    advice = "make one with scripts/measure/benchmark.py --part matching --shape cpu_w32 cpu --json FILE"
    with reading(f"--benchmark {' '.join(map(str, paths))}", advice, "is no benchmark of cpu_w32 and cpu"):
        reports = [json.loads(path.read_text()) for path in paths]
        # Other load may have slowed some of these down: the best is the machine's rate.
        product, copy = (1e9 * max(report["rates"][name] for report in reports)
                         for name in ("product_gflops", "copy_gb_per_s"))
        for measured in (measured for report in reports for measured in report["matching"]):
            shape = measured["shape"]
            exact = next((row for row in measured["methods"] if row["method"] == "exact"), None)
            if shape["name"] in ("cpu_w32", "cpu") and exact:
                cost = costs(shape["network"], tuple(shape["image"]), shape["classes"])
                rows[shape["name"]] = (12 * cost.flops / product, cost.activations / copy,
                                       exact["median"] / shape["steps"] / shape["batch"])
        (a, b, t), (d, e, u) = rows["cpu_w32"], rows["cpu"]
    determinant = a * e - b * d
    return determinant / (t * e - b * u), (a * u - d * t) / determinant


class Setting(NamedTuple):
    """A config, with the quantities of the model above."""

    name: str
    config: DistillConfig
    image: tuple[int, int, int]
    classes: int
    images: int  # synthetic ones, as networks see them
    batch: int  # B, of an inner step
    costs: Costs

    def seconds(self, gpu: str, rho: float, crossings: float) -> float:
        """Seconds of an iteration on one of `GPUS`."""
        _, tflops, bandwidth = GPUS[gpu]
        return self.config.syn_steps * self.batch * (
            12 * self.costs.flops / (rho * 1e12 * tflops) + crossings * self.costs.activations / (1e9 * bandwidth))


def setting(name: str, config: DistillConfig) -> Setting:
    image, classes, _ = IMAGES[config.dataset]
    samples = config.ipc * classes * config.factor**2
    batch = min(config.batch_syn or samples, samples)
    return Setting(f"{name} ipc {config.ipc}", config, image, classes, samples, batch,
                   costs(config.model, image, classes))


def published() -> list[Setting]:
    """DATM's published settings."""
    settings = []
    for folder in ("CIFAR-10", "CIFAR-100", "TinyImageNet"):
        paths = (REPOSITORY / "configs" / folder / "ConvIN").glob("*.yaml")
        for path in sorted(paths, key=lambda each: len(each.name)):
            settings.append(setting(folder, make(DistillConfig, **yaml.safe_load(path.read_text()))))
    return settings


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--benchmark", type=Path, nargs="+", metavar="FILE", default=BENCHMARKS,
                        help="what benchmark.py measured with --json (those of results/benchmark)")
    rho, crossings = fit(parser.parse_args().benchmark)

    from utils.derivatives.choose_engine import ADJOINT_FACTOR

    print(f"fitted: ρ {rho:.2f} of the matrix product rate, c {crossings:.0f} times through the activations\n")
    # Not published: Tiny's network, steps and batch at 64×64, for 1,000 classes.
    more = [setting("ImageNet-1K 64×64", make(DistillConfig, dataset="ImageNet1K", model="ConvNetD4", ipc=ipc,
                                              syn_steps=20, batch_syn=1000, Iteration=10000)) for ipc in (10, 50)]
    rows = [("config", "T × B", "data", "matching", *GPUS)]
    for each in [*published(), *more]:
        config = each.config
        pixels = 4 * math.prod(each.image)
        data = IMAGES[config.dataset][2] * pixels + config.zca * pixels**2 // 4
        matching = each.costs.theta * (config.syn_steps + 6) + 6 * each.images * (pixels + 4 * each.classes)
        one = ADJOINT_FACTOR * each.costs.activations
        cells = []
        for gpu, (gigabytes, _, _) in GPUS.items():
            second = each.seconds(gpu, rho, crossings)
            fits = data + matching + one * SMALLEST < 1e9 * gigabytes
            cells.append(f"{duration(second)}, {duration(second * config.Iteration)}" if fits else "does not fit")
        matching += one * min(each.batch, MICRO_BATCH)
        sizes = [f"{size / 1e9:.1f} GB" for size in (data, matching)]
        rows.append((each.name, f"{config.syn_steps} × {each.batch}", *sizes, *cells))
    print(table(rows))


if __name__ == "__main__":
    entry(main)
