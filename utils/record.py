"""What a run leaves, read back: for its page, and for whoever wants the run again.

When a run ends, `save_pictures` puts what no other file of the run folder holds (real neighbours, starting images, how
the experts were made, the machine) into `report.safetensors`. `read_run` makes of a folder a `Run` of plain data, and
`commands` says what to type to have the run again.
"""

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.commands import again, command, evaluation
from utils.config import BufferConfig, changed, defaults, from_repository
from utils.datasets import Dataset
from utils.errors import UserError
from utils.figures import clip_outliers
from utils.files import atomic_write, read_config
from utils.metrics import percent
from utils.program.machine import machine

FORMAT = "datm-report-1"
PICTURES = "report.safetensors"
IMAGE_BYTES = 5_000_000  # of a page, for its pictures; with base64 and the rest it stays below 10 MB
MOST_PER_CLASS = 10
NEAR = 4  # real images among which the nearest is looked for exactly


# --- what a run leaves ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Some images of a set, in bytes, and what belongs beside them; None is not known."""

    classes: tuple[str, ...]
    ipc: int
    version: str  # which set: Normal or EMA
    which: list[int]  # their positions in the set
    distilled: Tensor  # [n, C, H, W] uint8
    labels: Tensor  # [n, K] probabilities
    start: Tensor | None = None  # [n, C, H, W] uint8
    neighbour: Tensor | None = None  # [n, C, H, W] uint8
    change: Tensor | None = None  # [n, 1, H, W] uint8, 128 is none
    rms: Tensor | None = None  # [n], of pixels in [0, 1]
    start_labels: Tensor | None = None  # [n, K] probabilities
    noise: bool = False  # whether the start was noise, not real images
    about: dict[str, Any] | None = None  # the experts' options, the machine

    @property
    def hard(self) -> bool:
        """Whether every label is a class."""
        return bool(((self.labels == 0) | (self.labels == 1)).all())

    def rows(self) -> dict[int, list[int]]:
        """Rows of these tensors, by class."""
        found: dict[int, list[int]] = {}
        for row, position in enumerate(self.which):
            found.setdefault(position // self.ipc, []).append(row)
        return found


@dataclass(frozen=True)
class Step:
    """One iteration, as `metrics.jsonl` has it."""

    iteration: int
    loss: float  # NaN: it was not finite
    updated: bool
    held: bool
    lr: float
    start_epoch: int
    bound: int


@dataclass(frozen=True)
class Accuracy:
    """One network's test accuracies at one iteration, in [0, 1]."""

    iteration: int
    set: str
    network: str
    mean: float
    std: float
    count: int

    def __str__(self) -> str:
        return f"{percent(self.mean, self.std)} %".replace(" ", "\N{NO-BREAK SPACE}")


@dataclass(frozen=True)
class Run:
    """A finished run's folder, read."""

    path: Path
    config: dict[str, Any]
    steps: list[Step]
    scores: list[Accuracy]
    result: dict[str, Any]
    best: Accuracy
    best_ema: Accuracy | None  # of the averaged images
    pictures: Pictures | None
    missing: list[str]  # what the folder does not hold, in words

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def skipped(self) -> list[Step]:
        return [step for step in self.steps if not step.updated]


def chosen(num_classes: int, ipc: int, image_bytes: int) -> list[int]:
    """Which positions of a set a page shows: as many images a class as fit, and classes as long as there is room."""
    room = max(IMAGE_BYTES // (3 * image_bytes + 3000), 1)  # three pictures of each, and the bars of its label
    per_class = max(min(room // num_classes, ipc, MOST_PER_CLASS), 1)
    return [number * ipc + each for number in range(min(num_classes, max(room // per_class, 1)))
            for each in range(per_class)]


@torch.no_grad()
def save_pictures(path: Path, dataset: Dataset, start: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor], version: str,
                  noise: bool, experts: list[dict[str, Any]]) -> None:
    """Writes `report.safetensors`: what a page shows of a set and the run folder does not hold otherwise.

    Args:
        start, best: images [N, C, H, W] as networks see them, and label logits [N, K] or classes [N].
        version: the name of the best set.
        noise: whether the start is noise.
        experts: the options that made the experts.
    """
    ipc = len(best[0]) // dataset.num_classes
    which = chosen(dataset.num_classes, ipc, best[0][0].numel())
    # Clipped at the deviations of the whole set, as the published pictures are, then scaled each to its own range.
    pixels = clip_outliers(dataset.to_pixels(best[0]))[which]
    began = dataset.to_pixels(start[0][which])
    change = (pixels - began).mean(1, keepdim=True)
    most = change.abs().max().clamp(min=1e-8)
    tensors = {"distilled": scaled_bytes(pixels), "start": scaled_bytes(began),
               "change": (128 + 127 * change / most).byte(),
               "neighbour": scaled_bytes(_neighbours(dataset, pixels, [each // ipc for each in which])),
               "rms": (pixels - began).square().mean((1, 2, 3)).sqrt(),
               "labels": probabilities(best[1][which], dataset.num_classes),
               "start_labels": probabilities(start[1][which], dataset.num_classes)}
    about = {"format": FORMAT, "classes": dataset.classes, "ipc": ipc, "which": which, "version": version,
             "noise": noise, "experts": experts, "machine": machine(best[0].device)}
    with atomic_write(path) as aside:
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside,
                      metadata={"about": json.dumps(about)})
        except SafetensorError as error:  # a full disk, in a class of its own
            raise OSError(error) from error


def _neighbours(dataset: Dataset, pixels: Tensor, classes: list[int]) -> Tensor:
    """The training image of the same class that is nearest in pixel space, for each image [n, C, H, W]."""
    space, labels = dataset.space, torch.tensor(classes, device=pixels.device)
    if space.whitening is not None and dataset.train_energy is not None:
        # With a the whitened image and M the un-whitening, ‖x − p‖² = ‖x − μ‖² − 2 a·M(p − μ) + ‖p − μ‖². So not every
        # image has to be un-whitened, which would take as long as whitening the dataset: minutes in many dimensions.
        towards = space.whitening.pulled_back(pixels)

        def distances(rows: Tensor, members: Tensor) -> Tensor:
            return dataset.train_energy[members] - 2 * towards[rows] @ dataset.train_images[members].flatten(1).T
    else:
        def distances(rows: Tensor, members: Tensor) -> Tensor:
            return torch.cdist(pixels[rows].flatten(1), dataset.to_pixels(dataset.train_images[members]).flatten(1))

    near = torch.empty(len(pixels), NEAR, dtype=torch.long, device=pixels.device)
    for number in sorted(set(classes)):
        rows, members = (labels == number).nonzero().flatten(), dataset.class_indices(number)
        few = members[distances(rows, members).topk(min(NEAR, len(members)), largest=False).indices]  # [rows, ≤ NEAR]
        near[rows] = few[:, torch.arange(NEAR, device=few.device).clamp(max=few.shape[1] - 1)]
    # Rounding cannot tell the nearest few apart, so they are compared as pictures.
    real = dataset.to_pixels(dataset.train_images[near.flatten()]).view(len(pixels), NEAR, *pixels.shape[1:])
    best = (real - pixels[:, None]).square().sum((2, 3, 4)).argmin(1)
    return real[torch.arange(len(pixels), device=pixels.device), best]


def scaled_bytes(images: Tensor) -> Tensor:
    """[n, C, H, W] of any range → bytes, each image scaled to its own range."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return ((images - low) / (high - low).clamp(min=1e-8) * 255).round().byte()


def probabilities(labels: Tensor, num_classes: int) -> Tensor:
    if labels.is_floating_point():
        return labels.float().softmax(1)
    return torch.nn.functional.one_hot(labels, num_classes).float()


# --- reading a run's folder ----------------------------------------------------------------------------------


def read_run(path: Path) -> Run:
    """A finished run's folder. What an older one does not hold is named in `missing`.

    Raises:
        UserError: not a run's folder, an unfinished run, or a damaged file.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a run's folder, with config.yaml and result.json")
    if not (path / "result.json").is_file():
        begun = any((path / name).exists() for name in ("config.yaml", "checkpoint.pt", "metrics.jsonl"))
        raise UserError(f"{path} holds an unfinished run; finish it by the command that began it" if begun else
                        f"{path} is not a run's folder, as it has no result.json; give the folder of a finished run")
    missing = []
    config: dict[str, Any] = {}
    if (path / "config.yaml").is_file():
        config = {str(name): value for name, value in read_config(path / "config.yaml").items()}
    else:
        missing.append("config.yaml: the options and the commands")
    result = _parsed(path / "result.json", _read_result)
    steps, scores = [], []
    if (path / "metrics.jsonl").is_file():
        steps, scores = _parsed(path / "metrics.jsonl", _read_metrics)
    else:
        missing.append("metrics.jsonl: the curves")
    pictures = None
    if (path / PICTURES).is_file():
        pictures = _parsed(path / PICTURES, _read_pictures)
    else:
        missing.append(f"{PICTURES}, which runs of an older version did not write: starting images, real neighbours, "
                       "the experts' command, the machine")
    return Run(path, config, steps, scores, result, _best(result, "best"), _best(result, "best_ema"), pictures, missing)


def _best(result: dict[str, Any], name: str) -> Accuracy | None:
    best = result.get(name)
    which = "Normal" if name == "best" else "EMA"
    return None if best is None else _accuracy(best["iteration"], which, best["scores"][0])


def _parsed(path: Path, read: Any) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError,
            SafetensorError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); put it back, or run again under another "
                        "--run_name") from error


def _read_result(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    for name in ("best", "best_ema"):
        _best(result, name)
    for name in ("environment", "fixed_loss"):
        if not isinstance(result.setdefault(name, {}), dict):
            raise ValueError(f"{name} is not a table")
    for name in ("skipped", "held", "seconds"):
        if name in result:
            float(result[name])
    for each in ("before", "after"):
        if result["fixed_loss"].get(each) is not None:
            float(result["fixed_loss"][each])
    float(result["best"]["lr"])
    str(result["summary"])
    return result


def _read_metrics(path: Path) -> tuple[list[Step], list[Accuracy]]:
    steps, scores = [], []
    for line in map(json.loads, path.read_text().splitlines()):
        if "start_epoch" in line:
            steps.append(Step(int(line["iteration"]), math.nan if line["loss"] is None else float(line["loss"]),
                              bool(line["updated"]), bool(line.get("held")), float(line["lr"]),
                              int(line["start_epoch"]), int(line["bound"])))
        elif "scores" in line:
            scores += [_accuracy(line["iteration"], line.get("set", "Normal"), score) for score in line["scores"]]
    return steps, scores


def _accuracy(iteration: Any, which: Any, score: dict[str, Any]) -> Accuracy:
    return Accuracy(int(iteration), str(which), str(score["network"]), float(score["mean"]), float(score["std"]),
                    len(score["accuracies"]))


def _read_pictures(path: Path) -> Pictures:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}, expected {FORMAT}")
    classes, which = tuple(map(str, about["classes"])), [int(each) for each in about["which"]]
    n, shape = len(which), tuple(tensors["distilled"].shape)
    shapes = {"distilled": shape, "start": shape, "neighbour": shape, "change": (n, 1, *shape[2:]), "rms": (n,),
              "labels": (n, len(classes)), "start_labels": (n, len(classes))}
    for name, expected in shapes.items():
        kind = torch.uint8 if name in ("distilled", "start", "neighbour", "change") else torch.float32
        if tuple(tensors[name].shape) != expected or tensors[name].dtype != kind or len(shape) != 4 or shape[0] != n:
            raise ValueError(f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}")
    if int(about["ipc"]) < 1 or not all(0 <= each // int(about["ipc"]) < len(classes) for each in which):
        raise ValueError("positions outside the classes")
    machine, experts = about["machine"], about["experts"]
    if not isinstance(machine, dict) or not all(isinstance(each, dict) for each in experts):
        raise ValueError("the machine or the experts are not tables")
    return Pictures(classes, int(about["ipc"]), str(about["version"]), which, noise=bool(about["noise"]),
                    about={"machine": machine, "experts": experts}, **{name: tensors[name] for name in shapes})


# --- the commands --------------------------------------------------------------------------------------------


def helps(config_type: type) -> dict[str, str]:
    return {field.name: field.default.description for field in fields(config_type)}


def commands(run: Run) -> list[tuple[str, str]]:
    """What to type, in the repository's root, to have the run again: (what it does, shell text)."""
    if not run.config:
        return []
    found = []
    experts = (run.pictures.about or {}).get("experts") if run.pictures else None
    for number, options in enumerate(experts or []):
        known = {name: value for name, value in options.items() if name in defaults(BufferConfig)}
        given = {name: known[name] for name in ("dataset", "model") if name in known} | changed(known, BufferConfig)
        what = "Train the experts" if number == 0 else "Add more experts to them"
        found.append((what, command("buffer/buffer_FTD.py", given, from_repository)))
    on_cpu = str(run.result["environment"].get("device", "")).startswith("cpu")
    found.append(("Distil, with the options that differ from the defaults",
                  again(run.config, f"{run.name}_again", on_cpu)))
    options = evaluation(run.config, run.path / "Normal" / "distilled.safetensors")
    found.append(("Evaluate the best set of this run on fresh networks",
                  command("distill/evaluation.py", options, from_repository)))
    page_again = command("scripts/report.py", {}, from_repository, run.path)
    found.append(("Make this page again", page_again))
    return found
