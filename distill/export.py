"""A distilled set for others: pictures in folders of classes, and a card that says what the set is."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image

from distill.distilled_set import DistilledSet, class_indices
from utils import files
from utils.commands import command
from utils.config import EvaluationConfig, changed, defaults, from_repository
from utils.errors import UserError
from utils.files import write_json
from utils.metrics import percent


class Source(NamedTuple):
    """A dataset that images were distilled from, and under which terms it is given."""

    name: str
    hub_licence: str  # an identifier that hubs know, for a card's first lines
    terms: str
    link: str = ""  # where its authors say so, or could have said it
    hub_name: str = ""  # what a licence that is "other" is called there


_FASHION = "https://github.com/zalandoresearch/fashion-mnist"
_CIFAR = ("No licence is stated; its author asks that Krizhevsky, Learning Multiple Layers of Features from Tiny "
          "Images (2009) be cited", "https://www.cs.toronto.edu/~kriz/cifar.html")
_IMAGENET = ("ImageNet's terms of access: for non-commercial research and educational purposes only. Read them before "
             "you publish what is derived from its images", "https://www.image-net.org/download.php",
             "imagenet-terms-of-access")
SOURCES = {
    "MiniFashion": Source("Fashion-MNIST (600 training images a class)", "mit", "MIT, © 2017 Zalando SE", _FASHION),
    "FashionMNIST": Source("Fashion-MNIST", "mit", "MIT, © 2017 Zalando SE", _FASHION),
    "MNIST": Source("MNIST", "cc-by-sa-3.0", "CC BY-SA 3.0, as is commonly said of it (copyright Yann LeCun and "
                    "Corinna Cortes)", "http://yann.lecun.com/exdb/mnist/"),
    "CIFAR10": Source("CIFAR-10", "unknown", *_CIFAR),
    "CIFAR100": Source("CIFAR-100", "unknown", *_CIFAR),
    "SVHN": Source("SVHN", "other", "For non-commercial use only", "http://ufldl.stanford.edu/housenumbers/",
                   "svhn-non-commercial"),
    "Tiny": Source("Tiny ImageNet, a part of ImageNet", "other", *_IMAGENET),
    "ImageNet": Source("ImageNet (ten classes)", "other", *_IMAGENET),
    "ImageNet1K": Source("ImageNet-1K", "other", *_IMAGENET)}
UNKNOWN = Source("unknown", "unknown", "Unknown; find it out before you publish")
# The sizes that hubs sort sets by: each below this number of images.
_SIZES = (("n<1K", 1_000), ("1K<n<10K", 10_000), ("10K<n<100K", 100_000), ("100K<n<1M", 1_000_000),
          ("1M<n<10M", 10_000_000))


def folder_names(classes: tuple[str, ...]) -> list[str]:
    """A folder for each class: its name, less what not every file system takes."""
    names = [re.sub(r"[^\w .()+-]", "-", name).strip(" .") or "class" for name in classes]
    seen = [name.lower() for name in names]  # some file systems take upper and lower case for the same
    return [name if seen.count(name.lower()) == 1 else f"{name} {index}" for index, name in enumerate(names)]


def save_pngs(distilled: DistilledSet, folder: Path) -> None:
    """Writes `<class>/00.png` …, un-whitened and clipped to [0, 1], and `labels.json`.

    Eight bits and the clipping lose a little, so these are for looking at and for other programs; the whole set is the
    safetensors file.

    Raises:
        UserError: the folder holds something already, or the images are no pictures.
    """
    _check(distilled)
    check_new(folder)
    pixels = (255 * distilled.pixels().float().clamp(0, 1)).round().to(torch.uint8)
    if pixels.shape[1] not in (1, 3):
        raise UserError(f"images of {pixels.shape[1]} channels are no pictures; PNG takes 1 or 3")
    indices, known_by = class_indices(distilled, len(distilled.classes))
    folders, count, images = folder_names(distilled.classes), [0] * len(distilled.classes), []
    soft = distilled.labels.is_floating_point()
    for picture, label, index in zip(pixels, distilled.labels, indices.tolist()):
        name = f"{folders[index]}/{count[index]:02d}.png"
        count[index] += 1
        array = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
        with files.atomic_write(folder / name) as aside:
            Image.fromarray(array.contiguous().numpy()).save(aside, format="png")
        images.append({"file": name, "class": index} | (
            {"softmax": label.float().softmax(dim=0).tolist(), "logits": label.tolist()} if soft else {}))
    write_json(folder / "labels.json", {
        "classes": list(distilled.classes), "dataset": distilled.config.get("dataset"), "lr": float(distilled.lr),
        "class_known_by": known_by, "images": images})


def check_new(folder: Path) -> None:
    """Refuses a folder in which pictures of two sets would mix.

    Raises:
        UserError
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"--png {folder} is a file, or holds some already; give a folder that is new or empty")


def _check(distilled: DistilledSet) -> None:
    """Refuses tensors that a damaged or foreign file may hold and no export can show.

    Raises:
        UserError
    """
    images, labels, number = distilled.images, distilled.labels, len(distilled.classes)
    soft = labels.is_floating_point() and tuple(labels.shape) == (len(images), number)
    hard = labels.dtype == torch.int64 and tuple(labels.shape) == (len(images),) and bool(
        ((labels >= 0) & (labels < number)).all())
    if images.dim() != 4 or not len(images) or not (soft or hard):
        raise UserError(f"the set's images {list(images.shape)} and labels {list(labels.shape)} of {number} classes do "
                        "not fit each other; write it again with distill/evaluation.py --save")
    if not images.isfinite().all() or not labels.isfinite().all():
        raise UserError("the set holds values that are not finite; it cannot be exported")


# --- the card ------------------------------------------------------------------------------------------------


def save_card(distilled: DistilledSet, path: Path, results: list[Path]) -> Path:
    """Writes `README.md` beside the set: what it was made from and how, what it reaches, how it is used.

    Args:
        path: the set's own file.
        results: files of `evaluation.py --json`, or the `result.json` of the set's run; without one the card states no
            accuracy.

    Raises:
        UserError: there is a README.md, or a result is damaged or that of another set.
    """
    _check(distilled)
    target = path.parent / "README.md"
    if target.exists():
        raise UserError(f"{target} exists, and may have been edited; move it away to have it written")
    text = card(distilled, path.name, [(each.name, _read_result(each, distilled)) for each in results])
    files.write_text(target, text)
    return target


def card(distilled: DistilledSet, name: str, results: list[tuple[str, dict[str, Any]]]) -> str:
    """The card's text. No path of the machine that made the set is in it.

    Args:
        name: of the set's file.
        results: names and contents of result files.
    """
    made = distilled.config
    dataset = str(made.get("dataset", "unknown"))
    source = SOURCES.get(dataset, UNKNOWN)
    count, classes = len(distilled), len(distilled.classes)
    per_class = f"{count // classes} a class" if count % classes == 0 else f"of {classes} classes"
    channels, height, width = distilled.images.shape[1:]
    labels = "soft labels (logits)" if distilled.labels.is_floating_point() else "classes as labels"
    whitened = "ZCA-whitened" if distilled.space.whitening is not None else "normalised by mean and deviation"
    head: dict[str, Any] = {"license": source.hub_licence}
    if source.hub_name:
        head |= {"license_name": source.hub_name, "license_link": source.link}
    head |= {"task_categories": ["image-classification"], "tags": ["dataset-distillation"],
             "size_categories": [next(name for name, above in _SIZES if count < above)],
             "pretty_name": f"{dataset}, distilled to {count} images"}
    how = {key: value for key, value in made.items() if not key.endswith(("_path", "_dir", "_Dir"))}
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {head["pretty_name"]}

{count} synthetic images, {per_class}, {channels}×{height}×{width}, with {labels} and a learning rate of \
{float(distilled.lr):.4g}.

| | |
|---|---|
| source data | {source.name if source is not UNKNOWN else dataset} |
| its licence | {source.terms}{f"; see <{source.link}>" if source.link else ""} |
| images in `{name}` | {whitened}, as networks see them; the file holds what turns them into pictures and back |

## Accuracy

{_accuracy(results, name)}

## Use

```python
from distill.distilled_set import DistilledSet, class_indices

distilled = DistilledSet.load("{name}")  # a torch dataset of (image, label)
pictures = distilled.pixels()  # un-whitened, around [0, 1]
```

Classes in order: {", ".join(map(_markdown, distilled.classes))}.

## How it was made

```yaml
{yaml.safe_dump(how, sort_keys=False, allow_unicode=True) if how else "# not recorded"}```
"""


def _markdown(text: str) -> str:
    """Text as Markdown shows it: what would be its marks, as characters."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", text)


def _accuracy(results: list[tuple[str, dict[str, Any]]], name: str) -> str:
    if not results:
        return "Not stated: no result was given when this card was written."
    parts = []
    for file, result in results:
        rows = ["| network | accuracy, % | networks |", "|---|---|---|"]
        rows += [f"| {score['network']} | {percent(score['mean'], score['std'])} | "
                 f"{len(score['accuracies'])} |" for score in _scores(result)]
        if "best" in result:
            said = (f"By the run that made the set (`{file}`), which chose it on these {result['chosen_on']} images as "
                    f"the best on the way (iteration {result['best']['iteration']}):")
        else:
            said = (f"Networks trained on the set, tested on the {result['tested_on']} images of "
                    f"{result['config']['dataset']} (`{file}`):\n\n```\n{_command(result['config'], name)}\n```")
        parts.append(said + "\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _scores(result: dict[str, Any]) -> list[dict[str, Any]]:
    return result["best"]["scores"] if "best" in result else result["scores"]


def _command(options: dict[str, Any], name: str) -> str:
    """The evaluation that gave a result: its options that are not the defaults, less paths."""
    allowed = defaults(EvaluationConfig)
    given = {key: value for key, value in changed(options, EvaluationConfig).items()
             if key in allowed and not key.endswith(("_path", "_dir"))}
    given = {"dataset": options["dataset"], "model": options["model"]} | given | {"data_dir": name}
    return command("distill/evaluation.py", given, from_repository)


_RESULTS = "a file of evaluation.py --json, or the result.json of the set's run"


def _read_result(path: Path, distilled: DistilledSet) -> dict[str, Any]:
    """A result file, if it can be one of this set.

    Raises:
        UserError
    """
    try:
        result = json.loads(path.read_text())
        _accuracy([(path.name, result)], "")  # what the card needs is all there
        of_run = "best" in result
        count, dataset = (None, None) if of_run else (result["images"], result["config"]["dataset"])
        what = "distilled images" if of_run else result["what"]
    except OSError as error:
        raise UserError(f"--result {path}: {error.strerror}; give {_RESULTS}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"--result {path} is not a result ({type(error).__name__}: {error}); give {_RESULTS}"
                        ) from error
    made_of = distilled.config.get("dataset", dataset)
    if what != "distilled images" or (not of_run and (count != len(distilled) or dataset != made_of)):
        raise UserError(f"--result {path} is of {count} images of {dataset} ({what}), not of these {len(distilled)} "
                        f"distilled from {made_of}; give the result of this set")
    return result
