"""What benchmark.py measures: parts, their methods, and shapes; importable without torch."""

from dataclasses import dataclass

from utils.config import DistillConfig, make
from utils.files import REPOSITORY
from utils.program.command_line import read_yaml

PARTS = {  # part → its methods, the baseline first
    "matching": ("unroll", "plain", "tesla", "exact", "compiled", "graph"),
    "experts": ("bare", "synced", "eager", "compiled", "graph"),
    "evaluation": ("bare", "eager", "compiled", "graph")}
METHODS = tuple(dict.fromkeys(method for methods in PARTS.values() for method in methods))
IMAGES = {  # dataset → (C, H, W), classes
    "CIFAR10": ((3, 32, 32), 10), "CIFAR100": ((3, 32, 32), 100), "Tiny": ((3, 64, 64), 200),
    "FashionMNIST": ((1, 28, 28), 10), "MiniFashion": ((1, 28, 28), 10)}
GPU_MINUTES = 9.0  # default of --max_minutes on a GPU


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

    def __str__(self) -> str:
        return (f"{self.name}: {self.network}, {'×'.join(map(str, self.image))}, {self.classes} classes, "
                f"{self.images} images")


def all_shapes() -> dict[str, Shape]:
    shapes = [Shape("tiny_cpu", "ConvNetW8", (1, 28, 28), 10, 10, 3, 6, 16),
              Shape("cpu_w32", "ConvNetW32", (1, 28, 28), 10, 50, 20, 50),
              Shape("cpu", "ConvNet", (1, 28, 28), 10, 50, 20, 50),
              Shape("cpu_t80", "ConvNet", (1, 28, 28), 10, 50, 80, 50),
              Shape("cpu_b200", "ConvNet", (1, 28, 28), 10, 200, 20, 200)]
    for path in sorted(REPOSITORY.glob("configs/*/ConvIN/IPC*.yaml"), key=lambda path: (path.parent, len(path.name))):
        config = make(DistillConfig, **read_yaml(str(path), DistillConfig))
        if config.dataset not in IMAGES:  # a config of one's own
            continue
        image, classes = IMAGES[config.dataset]
        images = config.ipc * classes * config.factor**2
        shapes.append(Shape(f"{config.dataset.lower()}_ipc{config.ipc}", config.model, image, classes, images,
                            config.syn_steps, min(config.batch_syn or images, images), config.batch_train))
    return {shape.name: shape for shape in shapes}


SENSIBLE = {  # what `--shape all` means; of shapes that differ only in their number of images, only one
    "cpu": ("cpu_w32", "cpu", "cpu_t80", "cpu_b200"),
    "cuda": ("cifar10_ipc1", "cifar10_ipc10", "cifar10_ipc50", "cifar100_ipc10", "cifar100_ipc50", "tiny_ipc10",
             "tiny_ipc50")}
