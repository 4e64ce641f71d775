"""A run's page, `report.html`: one file that opens without a network, without scripts, in any browser.

Two halves. When a run ends, `save_pictures` puts what no other file of the run folder holds (real neighbours, starting
images, how the experts were made, the machine) into `report.safetensors`; `read_run` reads a folder and `page` makes of
it HTML, from plain data alone, so that a page can be made again without the dataset. `comparison` does so for several
runs side by side.
"""

import base64
import html
import importlib.metadata
import io
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.commands import again, changed, command, defaults, evaluation, from_repository
from utils.config import BufferConfig, DistillConfig
from utils.datasets import Dataset
from utils.errors import UserError
from utils.figures import clip_outliers
from utils.files import atomic_write
from utils.run import environment, read_config
from utils.svg import Chart, numbers_every, thinned

FORMAT = "datm-report-1"
PICTURES = "report.safetensors"
PAGE = "report.html"
IMAGE_BYTES = 5_000_000  # of a page, for its pictures; with base64 and the rest it stays below 10 MB
MOST_PER_CLASS = 10
MOST_BARS = 10  # of a soft label; of more classes the likeliest five are drawn
OPEN_UP_TO = 20  # images whose details are open from the beginning
TABLE_ROWS = 20
COMPARED_PER_CLASS = 3

escape = html.escape


# --- what the page is made of --------------------------------------------------------------------------------


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
        return f"{100 * self.mean:.2f} ± {100 * self.std:.2f} %".replace(" ", "\N{NO-BREAK SPACE}")


@dataclass(frozen=True)
class Run:
    """A finished run's folder, read."""

    path: Path
    config: dict[str, Any]
    steps: list[Step]
    scores: list[Accuracy]
    result: dict[str, Any]
    best: Accuracy
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
             "noise": noise, "experts": experts, "machine": _machine(best[0].device)}
    with atomic_write(path) as aside:
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside,
                      metadata={"about": json.dumps(about)})
        except SafetensorError as error:  # a full disk, in a class of its own
            raise OSError(error) from error


def _neighbours(dataset: Dataset, pixels: Tensor, classes: list[int]) -> Tensor:
    """The training image of the same class that is nearest in pixel space, for each image."""
    found, labels = torch.empty_like(pixels), torch.tensor(classes, device=pixels.device)
    for number in sorted(set(classes)):  # a class at a time, as un-whitening all images takes much memory
        rows = labels == number
        real = dataset.to_pixels(dataset.train_images[dataset.train_labels == number])
        if len(real):
            found[rows] = real[torch.cdist(pixels[rows].flatten(1), real.flatten(1)).argmin(1)]
    return found


def scaled_bytes(images: Tensor) -> Tensor:
    """[n, C, H, W] of any range → bytes, each image scaled to its own range."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return ((images - low) / (high - low).clamp(min=1e-8) * 255).round().byte()




def probabilities(labels: Tensor, num_classes: int) -> Tensor:
    if labels.is_floating_point():
        return labels.float().softmax(1)
    return torch.nn.functional.one_hot(labels, num_classes).float()


def _machine(device: torch.device) -> dict[str, str]:
    """Versions and hardware, more of them than stand beside a result."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = {name: importlib.metadata.version(name) for name in ("torchvision", "numpy", "kornia")}
    cuda = {"CUDA": str(torch.version.cuda)} if device.type == "cuda" else {}
    return {**environment(device), **versions, **cuda, "processor": f"{processor}, {os.cpu_count()} logical cores",
            "memory": f"{memory:.0f} GB", "system": f"{platform.system()} {platform.release()}"}


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
    best = result["best"]
    return Run(path, config, steps, scores, result, _accuracy(best["iteration"], "Normal", best["scores"][0]), pictures,
               missing)


def _parsed(path: Path, read: Any) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError,
            SafetensorError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); put it back, or run again under another "
                        "--run_name") from error


def _read_result(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    _accuracy(result["best"]["iteration"], "Normal", result["best"]["scores"][0])
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


# --- the page ------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def page(run: Run) -> str:
    """The page of one run."""
    config = run.config
    title = f"{config.get('dataset', 'Run')} · {run.name}"
    sections = [("summary", "Summary", _summary(run)), ("images", "Distilled images", _images(run)),
                ("curves", "Curves", _curves(run)), ("options", "Options", _options(run)),
                ("reproduce", "Reproduce", _reproduce(run)), ("machine", "Versions and hardware", _machine_table(run))]
    lead = " · ".join(escape(str(each)) for each in (
        config.get("dataset"), config.get("model"), config and _images_a_class(config.get("ipc")),
        config and f"{config.get('matching')} gradient", run.result["environment"].get("date")) if each)
    return _document(title, f"Distillation run <b>{escape(run.name)}</b>", lead, sections)


def comparison(runs: Sequence[Run]) -> str:
    """The page of several runs side by side."""
    names = _distinct_names(runs)
    lead = " · ".join(map(escape, names))
    sections = [("summary", "Summary", _compared_numbers(runs, names)),
                ("options", "Options that differ", _compared_options(runs, names)),
                ("curves", "Curves", _compared_curves(runs, names)),
                ("images", "Distilled images", _compared_images(runs, names)),
                ("machine", "Versions and hardware", _compared_machines(runs, names))]
    return _document(f"{len(runs)} distillation runs", f"{len(runs)} distillation runs side by side", lead, sections)


def _document(title: str, heading: str, lead: str, sections: list[tuple[str, str, str]]) -> str:
    """A page of named sections. Its policy forbids the browser to fetch anything from anywhere."""
    links = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text, _ in sections)
    body = "".join(f'<section aria-labelledby="{name}"><h2 id="{name}" tabindex="-1">{escape(text)}</h2>\n{content}'
                   "</section>\n" for name, text, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<a class="skip" href="#{sections[0][0]}">Skip to the content</a>
<header><h1>{heading}</h1>
<p>{lead}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>
{body}</main>
</body>
</html>
"""


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table whose cells are HTML; the first of a row is its header. It scrolls sideways where it is too wide."""
    top = "".join(f'<th scope="col">{each}</th>' for each in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{each}</td>" for each in row[1:]) + "</tr>\n"
                   for row in rows)
    return (f'<div class="scroll {kind}" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
            f"<caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
            "\n")


def _image(pixels: Tensor, alt: str) -> str:
    """[C, H, W] uint8 as an `img`; enlarged by the browser, without smoothing."""
    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(array.numpy()).save(file, "png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    height, width = pixels.shape[1:]
    return f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{int(minutes // 60)} h {int(minutes % 60)} min"


def _number(value: Any, form: str = ".4g") -> str:
    return "not recorded" if value is None else f"{float(value):{form}}"


def _facts(run: Run) -> list[tuple[str, str]]:
    """The numbers that a run is judged by, with their units."""
    result, fixed = run.result, run.result["fixed_loss"]
    on = "validation" if result.get("chosen_on") == "validation" else "test"
    steps = len(run.steps)
    networks = "network" if run.best.count == 1 else "networks"
    facts = [(f"Best accuracy on the {on} images", f"{run.best}"),
             ("Measured on", f"{run.best.count} {networks} ({run.best.network})"),
             ("Reached at iteration", f"{run.best.iteration:,}")]
    if isinstance(result.get("best_ema"), dict):
        facts.append(("Best accuracy of the averaged images (EMA)",
                      str(_accuracy(result["best_ema"]["iteration"], "EMA", result["best_ema"]["scores"][0]))))
    loss = "not recorded" if not fixed else f"{_number(fixed.get('before'))} → {_number(fixed.get('after'))}"
    facts += [(f"Matching loss before → after, over {fixed.get('segments', '')} fixed segments", loss),
              ("Learning rate α of the best set", _number(result["best"].get("lr"))),
              ("Skipped updates (loss above the threshold, or not finite)", _share(result.get("skipped"), steps)),
              ("α held back", "not recorded" if "held" not in result else _times(int(result["held"]))),
              ("Time", "not recorded" if "seconds" not in result else _duration(float(result["seconds"])))]
    return facts


def _times(count: int) -> str:
    return "never" if count == 0 else "once" if count == 1 else f"{count:,} times"


def _images_a_class(ipc: Any) -> str:
    return f"{ipc} image{'' if ipc == 1 else 's'} a class"


def _share(count: Any, total: int) -> str:
    if count is None:
        return "not recorded"
    return f"{int(count):,}" + (f" of {total:,}" if total else "") + (
        f" ({100 * int(count) / total:.1f} %)" if total and count else "")


def _summary(run: Run) -> str:
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in _facts(run))
    missing = "".join(f"<li>{escape(each)}</li>" for each in run.missing)
    note = f'<div class="note"><p>This folder does not hold:</p><ul>{missing}</ul></div>\n' if missing else ""
    return f'<dl class="facts">\n{facts}</dl>\n{note}'


# --- images --------------------------------------------------------------------------------------------------


def _images(run: Run) -> str:
    pictures = run.pictures
    if pictures is None:
        return "<p>There are no pictures in this folder.</p>\n"
    rows = pictures.rows()
    total, shown = pictures.ipc * len(pictures.classes), len(pictures.which)
    parts = ["Images are un-whitened, clipped at ±2.5 standard deviations of the set, and scaled each to its own "
             "range."]
    if pictures.neighbour is not None:
        parts.append("Beside each is its nearest neighbour: of the training images of its class the one that is "
                     "nearest to it in pixels.")
    if pictures.start is not None:
        parts.append(f"Under each: the {'noise' if pictures.noise else 'real image'} that it started from, where it "
                     "became brighter (white) or darker (black; mid grey is no change; one scale for all images) "
                     "with the change's root mean square (1 is the whole range of pixels), and its soft label, "
                     "in which a mark on a bar is the value at the start.")
    if shown < total:
        parts.append(f"Shown are {shown:,} of the set's {total:,} images: {len(next(iter(rows.values())))} of "
                     f"{pictures.ipc} a class, {len(rows)} of {len(pictures.classes)} classes.")
    if pictures.version != "Normal":
        parts.append(f"This is the set {pictures.version}, which scored best.")
    found = [f"<p>{escape(' '.join(parts))}</p>\n"]
    if pictures.ipc == 1 or max(map(len, rows.values())) == 1:
        cards = "".join(_card(pictures, row, shown <= OPEN_UP_TO, 3) for each in rows.values() for row in each)
        return found[0] + f'<div class="cards">\n{cards}</div>\n'
    for number, each in rows.items():
        cards = "".join(_card(pictures, row, shown <= OPEN_UP_TO, 4) for row in each)
        found.append(f'<h3>{escape(pictures.classes[number])}</h3>\n<div class="cards many">\n{cards}</div>\n')
    return "".join(found)


def _card(pictures: Pictures, row: int, is_open: bool, level: int) -> str:
    """One image, beside its neighbour; folded under it, its start, its change and its label."""
    number, each = divmod(pictures.which[row], pictures.ipc)
    name = pictures.classes[number] + (f", image {each + 1}" if pictures.ipc > 1 else "")
    pair = [(pictures.distilled[row], f"distilled image of class {name}", "distilled")]
    if pictures.neighbour is not None:
        pair.append((pictures.neighbour[row], f"nearest real training image to the distilled image of class {name}",
                     "nearest real"))
    below = []
    if pictures.start is not None and pictures.change is not None:
        kind = "noise" if pictures.noise else "real image"
        rms = float(pictures.rms[row]) if pictures.rms is not None else math.nan
        below = [(pictures.start[row], f"{kind} that the distilled image of class {name} started from",
                  "start, noise" if pictures.noise else "real start"),
                 (pictures.change[row], f"change of class {name} from its start, root mean square {rms:.2f} of the "
                  "pixel range", f"change {rms:.2f}")]
    top = f"<h{level}>{f'Image {each + 1}' if level == 4 else escape(name)}</h{level}>\n"
    opened = " open" if is_open else ""
    words = "Start and label" if below else "Label"
    return (f'<article class="card">{top}{_pair(pair)}<details{opened}><summary>{words}'
            f'<span class="hidden"> of {escape(name)}</span></summary>\n{_pair(below) if below else ""}'
            f"{_bars(pictures, row, name)}</details></article>\n")


def _pair(images: list[tuple[Tensor, str, str]]) -> str:
    inside = "".join(f"<figure>{_image(pixels, alt)}<figcaption>{escape(caption)}</figcaption></figure>"
                     for pixels, alt, caption in images)
    return f'<div class="pair">{inside}</div>\n'


def _bars(pictures: Pictures, row: int, name: str) -> str:
    """A soft label as a list of bars: all classes, or of many the likeliest five."""
    label = pictures.labels[row]
    start = None if pictures.start_labels is None else pictures.start_labels[row]
    many = len(label) > MOST_BARS
    order = label.argsort(descending=True, stable=True)[:5].tolist() if many else range(len(label))
    items = []
    for number in order:
        now = 100 * float(label[number])
        mark, before = "", ""
        if start is not None:
            then = 100 * float(start[number])
            mark, before = f'<i style="left:{then:.1f}%"></i>', f'<span class="hidden"> now, {then:.0f} % at the start'
            before += "</span>"
        own = ' class="own"' if number == pictures.which[row] // pictures.ipc else ""
        items.append(f'<li{own}><span>{escape(pictures.classes[number])}</span><span class="bar"><b '
                     f'style="width:{now:.1f}%"></b>{mark}</span><span>{now:.0f} %{before}</span></li>\n')
    rest = f"<p>The other {len(label) - 5} classes: {100 * float(1 - label[order].sum()):.0f} %</p>\n" if many else ""
    return f'<ul class="bars" aria-label="Soft label of {escape(name)}">\n{"".join(items)}</ul>\n{rest}'


def _compared_images(runs: Sequence[Run], names: list[str]) -> str:
    classes = list(dict.fromkeys(name for run in runs if run.pictures for name in run.pictures.classes))
    if not classes:
        return "<p>None of these folders holds pictures.</p>\n"
    seen = [run.pictures for run in runs if run.pictures]
    room = IMAGE_BYTES // (len(classes) * len(runs) * max(each.distilled[0].numel() for each in seen))
    most = max(1, min(COMPARED_PER_CLASS, room, max(each.ipc for each in seen)))

    def figures(run: Run, name: str, run_name: str) -> list[str]:
        """The first images of a class, each with what its label says of it."""
        pictures = run.pictures
        if pictures is None or name not in pictures.classes:
            return []
        found = []
        for each, row in enumerate(pictures.rows().get(pictures.classes.index(name), [])[:most]):
            says = int(pictures.labels[row].argmax())
            image = _image(pictures.distilled[row], f"distilled {name}, image {each + 1} of {run_name}")
            found.append(f"<figure>{image}<figcaption>{escape(pictures.classes[says])} "
                         f"{100 * float(pictures.labels[row, says]):.0f}\N{NO-BREAK SPACE}%</figcaption></figure>")
        return found

    cards = []
    for name in classes:
        body = "".join(f'<div class="of"><p>{escape(each)}</p><div class="pair">'
                       f'{"".join(figures(run, name, each)) or "not shown"}</div></div>'
                       for run, each in zip(runs, names))
        cards.append(f'<article class="card"><h3>{escape(name)}</h3>\n<div class="side">{body}</div></article>\n')
    first = "The first image" if most == 1 else f"The first {most} images"
    note = (f"{first} of each class, un-whitened, clipped at ±2.5 standard deviations; below each the class that its "
            "soft label holds likeliest. Each run's own report shows more.")
    return f'<p>{note}</p>\n<div class="cards{"" if most == 1 else " wide"}">\n{"".join(cards)}</div>\n'


# --- curves --------------------------------------------------------------------------------------------------


def _curves(run: Run) -> str:
    if not run.steps and not run.scores:
        return "<p>This run recorded no iterations.</p>\n"
    drawn = len(thinned(run.steps))
    note = f"<p>{len(run.steps):,} iterations"
    if drawn < len(run.steps):
        note += f", of which {drawn:,}, evenly spaced, are drawn; averages are over all of them"
    charts = [_loss_chart([run], [run.name]), _accuracy_chart([run], [run.name]), _rate_chart([run], [run.name]),
              _window_chart(run), _skipped_chart([run], [run.name])]
    body = "".join(chart for chart in charts if chart)
    return f'{note}.</p>\n<div class="charts">\n{body}</div>\n{_numbers(run)}'


def _compared_curves(runs: Sequence[Run], names: list[str]) -> str:
    charts = [_loss_chart(runs, names), _accuracy_chart(runs, names), _rate_chart(runs, names),
              _skipped_chart(runs, names)]
    windows = [_window_chart(run, name) for run, name in zip(runs, names)]
    body = "".join(chart for chart in (*charts, *windows) if chart)
    return f'<div class="charts">\n{body}</div>\n' if body else "<p>None of these runs recorded iterations.</p>\n"


def running_mean(steps: Sequence[Step]) -> tuple[int, list[tuple[float, float]]]:
    """Over how many iterations, and the mean loss around each, without the skipped ones; nothing of a short run."""
    if len(steps) < 20:
        return 0, []
    span = max(len(steps) // 50, 5)
    losses = [step.loss if step.updated else 0.0 for step in steps]
    updated = [float(step.updated) for step in steps]
    sums = [torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0) for values in (losses, updated)]
    total, number = (each[span:] - each[:-span] for each in sums)
    means = (total / number).tolist()  # NaN where all were skipped, which is a gap in the line
    return span, [(steps[first + span // 2].iteration, mean) for first, mean in enumerate(means)]


def _loss(step: Step, form: str = ".3g") -> str:
    return "not finite" if math.isnan(step.loss) else f"{step.loss:{form}}"


def _loss_chart(runs: Sequence[Run], names: list[str]) -> str:
    """Every loss and its running mean; of several runs the means alone."""
    alone = len(runs) == 1
    chart = Chart("Matching loss", "iteration", "matching loss")
    spans = []
    for number, (run, name) in enumerate(zip(runs, names)):
        points = [(step.iteration, step.loss if step.updated else math.nan) for step in run.steps]
        span, mean = running_mean(run.steps)
        spans.append(f"{span} iterations")
        if alone:
            chart.line(thinned(points), "raw", "each iteration")
        chart.line(thinned(mean if mean else points), f"s{number % 6}",
                   ("" if not mean else f"mean over {span}") if alone else name)
        if alone and run.skipped:
            chart.crosses(thinned([(step.iteration, step.loss) for step in run.skipped]), "bad", "update skipped")
    if chart.empty:
        return ""
    first = runs[0]
    words = ""
    if alone and "threshold" in first.config and isinstance(first.config["threshold"], int | float):
        words = f" Updates whose loss exceeds {first.config['threshold']:g} are skipped"
        words += ", and not in the mean; losses above the scale stand at its upper edge." if first.skipped else "."
    elif not alone:
        words = f" Running means over {', '.join(dict.fromkeys(spans))}."
    ends = [f"{name}: " if not alone else "" for name in names]
    described = "; ".join(f"{end}from {_loss(run.steps[0])} to {_loss(run.steps[-1])}"
                          for end, run in zip(ends, runs) if run.steps)
    return chart.figure(f"From the first iteration to the last: {described}.{words}")


def _accuracy_chart(runs: Sequence[Run], names: list[str]) -> str:
    chart = Chart("Accuracy", "iteration", "accuracy, %")
    number, spoken = 0, []
    for run, run_name in zip(runs, names):
        for kind, network in dict.fromkeys((score.set, score.network) for score in run.scores):
            mine = [score for score in run.scores if (score.set, score.network) == (kind, network)]
            name = (network if len(runs) == 1 else f"{run_name}, {network}") + ("" if kind == "Normal" else f", {kind}")
            style = f"s{number % 6}"
            chart.band([(score.iteration, 100 * (score.mean - score.std), 100 * (score.mean + score.std))
                        for score in mine], style)
            points = [(score.iteration, 100 * score.mean) for score in mine]
            chart.line(points, style, name)
            chart.dots(points, style, 2.5)
            spoken.append(f"{name}: last {mine[-1]}")
            number += 1
    if chart.empty:
        return ""
    counts = sorted({score.count for run in runs for score in run.scores})
    over = f"{' or '.join(map(str, counts))} network{'' if counts == [1] else 's'}"
    return chart.figure(f"Mean, and a band of ± one standard deviation, over {over}. {'; '.join(spoken)}.")


def _rate_chart(runs: Sequence[Run], names: list[str]) -> str:
    chart = Chart("Synthetic learning rate α", "iteration", "α")
    spoken = []
    for number, (run, name) in enumerate(zip(runs, names)):
        chart.line(thinned([(step.iteration, step.lr) for step in run.steps]), f"s{number % 6}",
                   name if len(runs) > 1 else "")
        held = [(step.iteration, step.lr) for step in run.steps if step.held]
        if held:
            chart.crosses(thinned(held), "bad", "held back")
        if run.steps:
            prefix = f"{name}: " if len(runs) > 1 else ""
            spoken.append(f"{prefix}from {run.steps[0].lr:.4g} to {run.steps[-1].lr:.4g}")
    return "" if chart.empty else chart.figure(f"After each update: {'; '.join(spoken)}.")


def _window_chart(run: Run, name: str = "") -> str:
    """The allowed start epochs as a band, the drawn ones as dots in it."""
    if not run.steps:
        return ""
    lowest = run.config.get("min_start_epoch", min(step.start_epoch for step in run.steps))
    lowest = lowest if isinstance(lowest, int) else 0
    chart = Chart(f"Difficulty window{f', {name}' if name else ''}", "iteration", "start epoch", whole=True)
    # Half an epoch wider on either side, so that dots lie inside; the bound itself is exclusive.
    chart.band(thinned([(step.iteration, lowest - 0.5, step.bound - 0.5) for step in run.steps]), "window",
               "allowed start epochs", steps=True)
    chart.dots(thinned([(step.iteration, step.start_epoch) for step in run.steps if step.updated]), "s0",
               1.2 if len(run.steps) > 500 else 2.0, "drawn, updated")
    chart.crosses(thinned([(step.iteration, step.start_epoch) for step in run.skipped]), "bad", "drawn, update skipped")
    first, last = run.steps[0].bound - 1, run.steps[-1].bound - 1
    grew = f"{lowest} to {first} at first, {lowest} to {last} at the end" if first != last else f"{lowest} to {last}"
    counts: dict[int, int] = {}
    for step in run.steps:
        counts[step.start_epoch] = counts.get(step.start_epoch, 0) + 1
    drawn = ", ".join(f"{epoch}: {count:,}" for epoch, count in sorted(counts.items())) if len(counts) <= 12 else ""
    return chart.figure(f"Allowed start epochs: {grew}." + (f" How often each was drawn: {drawn}." if drawn else ""))


def _skipped_chart(runs: Sequence[Run], names: list[str]) -> str:
    if not any(run.steps for run in runs):
        return ""
    total = "; ".join((f"{name}: " if len(runs) > 1 else "") + f"{len(run.skipped):,} of {len(run.steps):,}"
                      for run, name in zip(runs, names))
    if not any(run.skipped for run in runs):
        return ('<figure class="chart"><figcaption><h3>Skipped updates</h3>\n'
                f"<p>None was skipped ({escape(total)}).</p></figcaption></figure>\n")
    chart = Chart("Skipped updates", "iteration", "skipped so far", whole=True)
    for number, (run, name) in enumerate(zip(runs, names)):
        count, points = 0, []
        for step in run.steps:
            count += not step.updated
            points.append((step.iteration, count))
        chart.line(thinned(points), f"s{number % 6}", name if len(runs) > 1 else "")
    return chart.figure(f"Skipped: {total}.")


def _numbers(run: Run) -> str:
    """The curves as tables, for those who read numbers or hear them."""
    scores = [[f"{score.iteration:,}", escape(f"{score.set}, {score.network}"), escape(str(score)), str(score.count)]
              for score in run.scores]
    some = numbers_every(run.steps, TABLE_ROWS)
    steps = [[f"{step.iteration:,}", _loss(step, ".4g"), f"{step.lr:.4g}",
              str(step.start_epoch), f"below {step.bound}", "yes" if step.updated else "skipped"] for step in some]
    found = ""
    if scores:
        head = ["iteration", "set and network", "accuracy", "networks"]
        found += ("<details><summary>Accuracies as a table</summary>\n"
                  + _table("Accuracy at each evaluation", head, scores) + "</details>\n")
    if steps:
        found += ("<details><summary>Iterations as a table</summary>\n"
                  + _table(f"{len(some)} of {len(run.steps):,} iterations",
                           ["iteration", "matching loss", "α after it", "start epoch", "window", "updated"], steps)
                  + "</details>\n")
    return found


# --- options, commands, machine ------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """An option's value, as HTML."""
    text = "unset" if value is None or value == "" else str(value)
    return f"<code>{_breakable(text)}</code>"


def _breakable(path: str) -> str:
    """A long path as HTML that a browser may break after each folder."""
    return escape(path).replace("/", "/<wbr>")


def _options(run: Run) -> str:
    if not run.config:
        return "<p>This folder does not hold its options.</p>\n"
    default, help = defaults(DistillConfig), helps(DistillConfig)
    differing = changed(run.config, DistillConfig)

    def row(name: str) -> list[str]:
        return [f"<code>{escape(name)}</code>", _shown(run.config[name]),
                _shown(default[name]) if name in default else "unknown here", escape(help.get(name, ""))]

    rest = [name for name in run.config if name not in differing]
    head = ["option", "this run", "default", "meaning"]
    found = _table(f"{len(differing)} options that differ from the defaults", head, map(row, differing), "options")
    if rest:
        found += (f"<details><summary>The other {len(rest)} options, at their defaults</summary>\n"
                  + _table("Options at their defaults", head, map(row, rest), "options") + "</details>\n")
    return found


def _reproduce(run: Run) -> str:
    found = commands(run)
    if not found:
        return "<p>Without config.yaml the commands are not known.</p>\n"
    steps = "".join(f'<li><p>{escape(what)}:</p><pre tabindex="0" aria-label="{escape(what)}"><code>{escape(text)}'
                    "</code></pre></li>\n" for what, text in found)
    notes = ["In the root of the repository."]
    if not found[0][1].startswith("python buffer/"):
        notes.append("How the experts were trained is not known: " + (
            "their folder holds no manifest." if run.pictures and run.pictures.about else
            "the run did not save it."))
    device = str(run.result["environment"].get("device", ""))
    if device.startswith("cpu"):
        notes.append(f"The same numbers to the bit need the versions below and the same device and threads: {device}.")
    return f"<p>{escape(' '.join(notes))}</p>\n<ol class=\"commands\">\n{steps}</ol>\n"


def _machine_of(run: Run) -> dict[str, str]:
    machine = (run.pictures.about or {}).get("machine", {}) if run.pictures else {}
    return {str(name): str(value) for name, value in (run.result["environment"] | machine).items()}


def _machine_table(run: Run) -> str:
    rows = [[escape(name), escape(value)] for name, value in _machine_of(run).items()]
    return _table("What the run was made with", ["what", "value"], rows) if rows else "<p>Not recorded.</p>\n"


def _compared_machines(runs: Sequence[Run], names: list[str]) -> str:
    machines = [_machine_of(run) for run in runs]
    known = dict.fromkeys(name for machine in machines for name in machine)
    rows = [[escape(name), *(escape(machine.get(name, "not recorded")) for machine in machines)] for name in known]
    return _table("What the runs were made with", ["what", *map(escape, names)], rows)


def _compared_numbers(runs: Sequence[Run], names: list[str]) -> str:
    facts = [dict(_facts(run)) for run in runs]
    known = dict.fromkeys(name for each in facts for name in each)
    rows = [[escape(name), *(escape(each.get(name, "none")) for each in facts)] for name in known]
    rows.append(["Folder", *(f"<code>{_breakable(from_repository(str(run.path)))}</code>" for run in runs)])
    missing = "".join(f"<li>{escape(f'{name}: {each}')}</li>" for run, name in zip(runs, names) for each in run.missing)
    note = f'<div class="note"><p>Not in these folders:</p><ul>{missing}</ul></div>\n' if missing else ""
    return _table("What each run reached", ["what", *map(escape, names)], rows) + note


def _compared_options(runs: Sequence[Run], names: list[str]) -> str:
    known = dict.fromkeys(name for run in runs for name in run.config)
    absent = object()
    different = [name for name in known
                 if any(run.config.get(name, absent) != runs[0].config.get(name, absent) for run in runs)]
    if not different:
        return "<p>All options are the same.</p>\n"
    rows = [[f"<code>{escape(name)}</code>", *(_shown(run.config[name]) if name in run.config else "without effect"
                                               for run in runs)] for name in different]
    return _table("Options that differ between the runs", ["option", *map(escape, names)], rows)


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as much of what is above them as tells them apart."""
    for depth in range(1, max(len(run.path.parts) for run in runs) + 1):
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return names if len(set(names)) == len(names) else [f"{number + 1}: {each}" for number, each in enumerate(names)]


# Colours of Okabe and Ito, which colour-blind people tell apart; lines differ in their dashes and marks too.
_STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --card: #f6f8fa; --edge: #d0d7de; --link: #0a5ea8;
  --c0: #0072b2; --c1: #c24e00; --c2: #00795a; --c3: #a8467f; --c4: #8a6400; --c5: #3f6fc4; --bad: #c24e00;
  --window: #dbe7f2; --raw: #aeb6bf; --code: #eef1f4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaef; --soft: #a3adb8; --paper: #14181d; --card: #1d2329;
  --edge: #3a434d; --link: #7cc0f5; --c0: #56b4e9; --c1: #f0913a; --c2: #2fc49a; --c3: #e59cc7; --c4: #f0e442;
  --c5: #9db8f2; --bad: #f0913a; --window: #26384a; --raw: #5c6670; --code: #232a31; } }
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem clamp(.8rem, 3vw, 2rem) 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; font-weight: 400; line-height: 1.25; margin: .5rem 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--edge); }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 48rem; } header p { color: var(--soft); margin-bottom: .5rem; }
a { color: var(--link); } :focus-visible { outline: 3px solid var(--c1); outline-offset: 2px; }
h2:focus { outline: none; }
.skip { position: absolute; left: -999rem; } .skip:focus { position: static; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0; padding: 0; }
nav a { display: inline-block; padding: .25rem 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(16rem, 44%), 1fr)); gap: .6rem; margin: 0; }
.facts div { background: var(--card); border: 1px solid var(--edge); border-radius: .4rem; padding: .5rem .75rem;
  display: flex; flex-direction: column; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.facts div:first-child dd { font-weight: 700; font-size: 1.1rem; white-space: nowrap; }
.note { border-left: 4px solid var(--bad); padding: .3rem 0 .3rem .9rem; margin: 1rem 0; }
.note ul { margin: 0; padding-left: 1.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13.4rem, 100%), 1fr)); gap: .8rem;
  align-items: start; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: .4rem; padding: .6rem .75rem;
  min-width: 0; }
.card h3, .card h4 { margin: 0 0 .4rem; font-size: 1rem; }
.pair { display: flex; gap: .6rem; } .pair figure { flex: 1 1 0; min-width: 0; max-width: 9rem; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: .2rem; }
details { margin: .5rem 0; } summary { cursor: pointer; padding: .3rem 0; color: var(--link); }
.card details { margin: .2rem 0 0; } .card summary { font-size: .9rem; }
.bars { list-style: none; margin: .6rem 0 0; padding: 0; font-size: .85rem; }
.bars li { display: grid; grid-template-columns: minmax(0, 5.4rem) 1fr 2.4rem; gap: .4rem; align-items: center; }
.bars li > :first-child { overflow-wrap: anywhere; line-height: 1.2; padding: .1rem 0; }
.bars li > :last-child { text-align: right; font-variant-numeric: tabular-nums; position: relative; }
.bars .own { font-weight: 700; }
.bar { position: relative; height: .7rem; background: var(--paper); border: 1px solid var(--edge); }
.bar b { position: absolute; inset: 0 auto 0 0; background: var(--c0); }
.bar i { position: absolute; top: -3px; bottom: -3px; width: 3px; margin-left: -1px; background: var(--bad);
  box-shadow: 0 0 0 1px var(--paper); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 1.2rem 1.6rem; }
.chart { min-width: 0; max-width: 40rem; } .chart h3 { margin: 0; color: var(--ink); font-size: 1rem; }
.chart p { margin: .2rem 0; } .chart svg { display: block; width: 100%; height: auto; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0; margin: .2rem 0; }
.legend svg { display: inline-block; width: 28px; height: 12px; vertical-align: -1px; margin-right: .35rem; }
.axis { stroke: var(--edge); stroke-width: 1; } svg text { fill: var(--soft); font-size: 12px; }
.line { fill: none; stroke: var(--c, var(--ink)); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--c); fill-opacity: .2; stroke: none; } .dots { fill: var(--c); stroke: none; }
.crosses { fill: none; stroke: var(--c); stroke-width: 1.6; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); } .s4 { --c: var(--c4); }
.s5 { --c: var(--c5); } .line.s1 { stroke-dasharray: 7 3; } .line.s2 { stroke-dasharray: 2 3; }
.line.s3 { stroke-dasharray: 9 3 2 3; } .line.s4 { stroke-dasharray: 4 4; } .line.s5 { stroke-dasharray: 12 4; }
.bad { --c: var(--bad); } .raw { --c: var(--raw); } .line.raw { stroke-width: 1; }
.window { --c: var(--window); } .band.window { fill-opacity: 1; }
.scroll { overflow-x: auto; margin: .4rem 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; color: var(--soft); font-size: .85rem; padding: .2rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--edge);
  overflow-wrap: normal; } tbody th { font-weight: 400; } thead th { color: var(--soft); font-weight: 600; }
.options td { min-width: 6.5rem; } .options td:last-child { min-width: 14rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; } tbody th { min-width: 7rem; }
pre { background: var(--code); border: 1px solid var(--edge); border-radius: .4rem; padding: .7rem .9rem;
  overflow-x: auto; margin: .2rem 0 1rem; }
.commands { padding-left: 1.4rem; } .commands p { margin: .2rem 0; }
.side { display: flex; flex-wrap: wrap; gap: .6rem; } .side .of { flex: 0 1 auto; min-width: 0; }
.side .pair { flex-wrap: wrap; } .side .pair figure { flex: 0 0 5rem; }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(34rem, 100%), 1fr)); }
.side .of p { margin: 0 0 .2rem; font-size: .85rem; font-weight: 600; }
@media (max-width: 40rem) { .many { grid-template-columns: 1fr 1fr; gap: .5rem; } .many .card { padding: .5rem; }
  .many .pair { gap: .35rem; } .many figcaption { font-size: .75rem; }
  .many .card:has(details[open]) { grid-column: 1 / -1; }
  .chart svg text { font-size: 14px; } th, td { padding-right: .6rem; } }
@media print { .skip, nav { display: none; } }
"""
