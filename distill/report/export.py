"""A distilled set for others: pictures in folders of classes, and a card that says what the set is."""

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from distill.distilled_set import DistilledSet, class_indices, labels_fit
from distill.report.template import TEMPLATES
from distill.result_files import EvaluationResult, RunResult, read_result
from utils import files
from utils.config import EvaluationConfig, from_repository, worth_giving
from utils.errors import UserError
from utils.loss_and_accuracy import percent
from utils.program.commands import command

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
    files.write_json(folder / "labels.json", {
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
    if images.dim() != 4 or not len(images) or not labels_fit(labels, len(images), number):
        raise UserError(f"the set's images {list(images.shape)} and labels {list(labels.shape)} of {number} classes do "
                        "not fit each other; write it again with distill/evaluation.py --save")
    if not images.isfinite().all() or not labels.isfinite().all():
        raise UserError("the set holds values that are not finite; it cannot be exported")


# --- the card ------------------------------------------------------------------------------------------------


def save_card(distilled: DistilledSet, path: Path, results: list[Path], licence: str, source: str) -> Path:
    """Writes `README.md` beside the set: what it was made from and how, what it reaches, how it is used.

    Args:
        path: the set's own file.
        results: files of `evaluation.py --json`, or the `result.json` of the set's run; without one the card states no
            accuracy.
        licence, source: of the real images, in words; an empty one is unknown.

    Raises:
        UserError: there is a README.md, or a result is damaged or that of another set.
    """
    _check(distilled)
    target = path.parent / "README.md"
    if target.exists():
        raise UserError(f"{target} exists, and may have been edited; move it away to have it written")
    results = [(file.name, _read_result(file, distilled)) for file in results]
    files.write_text(target, card(distilled, path.name, results, licence, source))
    return target


def card(distilled: DistilledSet, name: str, results: list[tuple[str, RunResult | EvaluationResult]],
         licence: str = "", source: str = "") -> str:
    """The card's text, by the template card_template.md. No path of the machine that made the set is in it.

    Args:
        name: of the set's file.
        results: names and contents of result files.
        licence, source: see `save_card`.
    """
    made, count = distilled.config, len(distilled)
    dataset = str(made.get("dataset", "unknown"))
    title = f"{dataset}, distilled to {count} images"
    head = {"license": licence or "unknown", "task_categories": ["image-classification"],
            "tags": ["dataset-distillation"], "pretty_name": title,
            "size_categories": [next(size for size, above in _SIZES if count < above)]}
    how = {option: value for option, value in made.items() if not option.endswith(("_path", "_dir", "_Dir"))}
    return TEMPLATES.get_template("card_template.md").render(
        head=_yaml(head), title=title, distilled=distilled, name=name, source=source or dataset, licence=licence,
        results=[(file, result, _command(result.config, name) if isinstance(result, EvaluationResult) else "")
                 for file, result in results],
        how=_yaml(how) if how else "# not recorded\n")


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _markdown(text: str) -> str:
    """Text as Markdown shows it: what would be its marks, as characters."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", text)


TEMPLATES.filters |= {"percent": percent, "markdown": _markdown}


def _command(options: dict[str, Any], name: str) -> str:
    """The evaluation that gave a result: its options that are not the defaults, less paths."""
    given = {key: value for key, value in worth_giving(options, EvaluationConfig).items()
             if not key.endswith(("_path", "_dir"))}
    return command("distill/evaluation.py", given | {"data_dir": name}, from_repository)


def _read_result(path: Path, distilled: DistilledSet) -> RunResult | EvaluationResult:
    """A result file, if it can be one of this set.

    Raises:
        UserError
    """
    advice = "give a file of evaluation.py --json, or the result.json of the set's run"
    result = read_result(path, f"--result {path}", advice)
    if isinstance(result, EvaluationResult):
        if not {"dataset", "model"} <= result.config.keys():
            raise UserError(f"--result {path} is not a result (its config has no dataset or no model); {advice}")
        dataset = result.config["dataset"]
        made_of = distilled.config.get("dataset", dataset)
        if result.what != "distilled images" or (result.images, dataset) != (len(distilled), made_of):
            raise UserError(f"--result {path} is of {result.images} images of {dataset} ({result.what}), not of these "
                            f"{len(distilled)} distilled from {made_of}; give the result of this set")
    return result
