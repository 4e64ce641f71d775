"""Exports of a distilled set: PNG files in a folder per class, and a dataset card."""

import contextlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from distill.distilled_set import DistilledSet, classes_of
from distill.report.commands import unlike_set
from distill.report.template import TEMPLATES, line
from distill.result_files import (
    EMA,
    NORMAL,
    OF_REAL_IMAGES,
    OF_SET,
    RESULT,
    VERSIONS,
    EvaluationResult,
    RunResult,
    read_result,
    same_images,
    same_rate,
)
from utils import files
from utils.config import STARTS, BaselineConfig, DistillConfig, from_repository, path_options, worth_giving
from utils.data.zca import BESIDE, Whitening
from utils.errors import UserError, note, number_of, some_of
from utils.program.commands import command

# Size categories of dataset hubs, each below this number of images.
_SIZES = (("n<1K", 1_000), ("1K<n<10K", 10_000), ("10K<n<100K", 100_000), ("100K<n<1M", 1_000_000),
          ("1M<n<10M", 10_000_000))


LABELS = "labels.json"
SEEN = "seen.png"  # for a factor above 1: for each image a row of its tiles, as networks see them
LONGEST_NAME = 200  # bytes; most file systems take 255


def folder_names(classes: tuple[str, ...]) -> list[str]:
    """A unique folder name for each class: its name without characters that some file systems refuse."""
    names = [re.sub(r"[^\w .()+-]", "-", name).encode()[:LONGEST_NAME].decode(errors="ignore").strip(" .") or "class"
             for name in classes]
    while True:
        # Some file systems ignore case.
        taken = Counter([name.casefold() for name in names] + [LABELS, SEEN])
        if max(taken.values()) == 1:
            return names
        names = [name if taken[name.casefold()] == 1 else f"{name} {index}" for index, name in enumerate(names)]


def save_pngs(distilled: DistilledSet, folder: Path) -> None:
    """Writes `<class>/00.png` …, un-whitened and clipped to [0, 1], and `labels.json`; for a factor above 1 also SEEN.

    Eight bits and clipping lose a little, so these are for viewing and for other programs; only the safetensors file
    is exact. To be called after `check_pngs`.
    """
    pixels, tiles = distilled.pixels(), distilled.factor**2
    if clipped := float(((pixels < 0) | (pixels > 1)).float().mean()):
        note(f"{clipped:.0%} of the values lie outside [0, 1] and are clipped; the safetensors file has them, and "
             "a run's images.png shows them scaled")
    pixels = _bytes(pixels)
    if tiles > 1:
        try:
            seen = _bytes(distilled.seen().pixels()).unflatten(0, (-1, tiles))  # a row for each image
            _save(folder / SEEN, seen.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3))
        except UserError as error:  # its whitening is not available
            note(f"no {SEEN}: {error}")
    indices, known_by = classes_of(distilled, len(distilled.classes))
    folders, count, images = folder_names(distilled.classes), [0] * len(distilled.classes), []
    soft = distilled.labels.is_floating_point()
    if renamed := [f"{name} for {c}" for name, c in zip(folders, distilled.classes) if name != c]:
        note(f"{number_of(len(renamed), 'folder')} named differently from the class, as file systems need: "
             f"{some_of(renamed)}")
    digits = max(2, len(str(int(indices[::tiles].bincount().max()) - 1)))  # so that names sort by number
    for number, (picture, index) in enumerate(zip(pixels, indices[::tiles].tolist())):
        name = f"{folders[index]}/{count[index]:0{digits}d}.png"
        count[index] += 1
        _save(folder / name, picture)
        rows = slice(number * tiles, (number + 1) * tiles)
        labels = distilled.labels[number] if tiles == 1 else distilled.labels[rows]
        images.append({"file": name, "class": index if tiles == 1 else indices[rows].tolist()} | (
            {"softmax": labels.softmax(dim=-1).tolist(), "logits": labels.tolist()} if soft else {}))
    files.write_json(folder / LABELS, {
        "classes": list(distilled.classes), "dataset": distilled.config.get("dataset"), "lr": float(distilled.lr),
        "class_known_by": known_by, "images": images})


def _bytes(pixels: Tensor) -> Tensor:
    return (255 * pixels.clamp(0, 1)).round().to(torch.uint8)


def _save(path: Path, picture: Tensor) -> None:
    """[C, H, W] uint8 as a PNG."""
    array = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
    with files.atomic_write(path) as aside:
        Image.fromarray(array.contiguous().numpy()).save(aside, format="png")


def check_pngs(distilled: DistilledSet, folder: Path) -> None:
    """Refuses a folder that is not empty, as the pictures of two sets would mix, and images that are no pictures."""
    if (channels := distilled.images.shape[1]) not in (1, 3):
        raise UserError(f"images of {channels} channels are no pictures; PNG takes 1 or 3")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"--png {folder} is a file or a folder with files; give a folder that is new or empty")


def whitening_of(distilled: DistilledSet, folder: Path) -> Whitening:
    """The set's whitening, to be written beside the set.

    Raises:
        UserError: the set is not whitened, its whitening is not available, or another set's whitening is in the folder.
    """
    whitening = distilled.space.whitening
    if whitening is None:
        raise UserError("--whitening: the set is not whitened; leave it out")
    beside = folder / BESIDE
    if beside.exists() and files.load_tensors(beside)[1].get("fingerprint") != whitening.fingerprint:
        raise UserError(f"--whitening: {beside} is that of another set; put the set into a folder of its own")
    return whitening


# --- the card ------------------------------------------------------------------------------------------------


CARD = "README.md"  # beside the set


def card_beside(path: Path, distilled: DistilledSet, results: list[Path], licence: str, source: str,
                whitening_beside: bool) -> str:
    """The text of CARD: what the set was made from, how, its accuracy, and how to use it.

    Args:
        path: the set's file.
        results: files of `evaluation.py --json`, or of `baseline.py --json` for as many real images, or the
            `result.json` of the set's run; without one the card states no accuracy.
        licence: of the real images; empty: unknown.
        source: of the real images, in words; empty: the dataset's name.
        whitening_beside: the set's whitening is beside it, too.

    Raises:
        UserError: CARD exists, or a result is damaged or of another set.
    """
    if (existing := path.parent / CARD).exists():
        raise UserError(f"{existing} exists, and may have been edited; move it away to have it written")
    version, iteration = path.resolve().parent.name, None
    with contextlib.suppress(UserError):  # it is not in its run's folder
        best = RunResult.read(path.resolve().parent.parent / RESULT).versions.get(version)
        iteration = best.iteration if best and best.is_of(float(distilled.lr), distilled.images_sha256) else None
    results = [(file.name, _read_result(file, distilled, version)) for file in results]
    text = card(distilled, path.name, results, licence, source, whitening_beside, version, iteration)
    return text.encode(errors="replace").decode()  # a file name may hold bytes that are not text


def card(distilled: DistilledSet, name: str, results: list[tuple[str, RunResult | EvaluationResult]],
         licence: str = "", source: str = "", whitening_beside: bool = False, version: str = "",
         iteration: int | None = None) -> str:
    """The card's text, from card_template.md. It holds no path of the machine that made the set.

    Args:
        name: the name of the set's file.
        results: names and contents of result files.
        licence, source, whitening_beside: see `card_beside`.
        version: the name of the set's folder: of VERSIONS, if it is in its run's.
        iteration: at which its run reached it, if that is known.
    """
    made, count = distilled.config, len(distilled.images)
    dataset, licence = line(made.get("dataset", "unknown")), line(licence)
    title = f"{dataset}, distilled to {number_of(count, 'image')}"
    head = {"license": licence or "unknown", "task_categories": ["image-classification"],
            "tags": ["dataset-distillation"], "pretty_name": title,
            "size_categories": [next(size for size, above in _SIZES if count < above)]}
    left_out = {name for name in path_options(DistillConfig) if made.get(name) not in STARTS}
    continues = "pix_init" in made and "pix_init" in left_out
    left_out |= {"lr_teacher"} if continues else set()  # the other set had its own
    left_out |= {"subset"} if made.get("dataset") != "ImageNet" else set()
    left_out |= {"ema", "ema_decay"} if version == NORMAL else set()  # of the averaged images, which are another set
    how = {name: value for name, value in made.items() if name not in left_out}
    how |= {"pix_init": "another distilled set"} if continues else {}
    return TEMPLATES.get_template("card_template.md").render(
        head=_yaml(head), title=title, averaged=version == EMA, distilled=distilled, name=name,
        whitening_beside=whitening_beside, source=source or dataset, licence=licence,
        iteration=iteration, began_real=made.get("pix_init", STARTS[0]) in STARTS and made.get("pix_init") != "noise",
        results=[(file, result, _command(result, distilled, name) if isinstance(result, EvaluationResult) else "")
                 for file, result in results],
        how=_yaml(how) if how else "# not recorded")


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _command(result: EvaluationResult, distilled: DistilledSet, name: str) -> str:
    """The command that gave a result, without paths, defaults and options that the set records itself."""
    options = {key: value for key, value in result.config.items() if not key.endswith(("_path", "_dir"))}
    if not result.what.startswith(OF_SET):
        return command("distill/baseline.py", worth_giving(options, BaselineConfig), from_repository)
    rate = {}
    if result.lr is not None:  # the rate that was used; a set's own rate replaces the option's default
        options.pop("lr_teacher", None)
        own = result.config.get("protocol") != "dc" and same_rate(result.lr, float(distilled.lr))
        rate = {} if own else {"lr_teacher": float(f"{result.lr:.7g}")}  # as typed, before rounding to float32
    return command("distill/evaluation.py", {"data_dir": name} | unlike_set(options, distilled.config) | rate,
                   from_repository)


def _read_result(path: Path, distilled: DistilledSet, folder: str) -> RunResult | EvaluationResult:
    """Reads a result file; of a run's two best sets, the result has this one only, as `best`.

    Args:
        folder: the name of the set's folder, which in a run's folder tells its two sets apart.

    Raises:
        UserError: it is damaged, or is neither of this set nor of as many real images.
    """
    advice = "give a file of evaluation.py --json, or the result.json of the set's run"
    result = read_result(path, f"--result {path}", advice)
    if isinstance(result, EvaluationResult):
        if not {"dataset", "model"} <= result.config.keys():
            raise UserError(f"--result {path} is not a result (its config has no dataset or no model); {advice}")
        dataset = result.config["dataset"]
        made_of = distilled.config.get("dataset", dataset)
        if not (result.what.startswith(OF_SET) or OF_REAL_IMAGES.fullmatch(result.what)):
            raise UserError(f"--result {path} is of {result.what}; give the result of this set, or of as many real "
                            "images")
        if (result.images, dataset) != (len(distilled.images), made_of):
            raise UserError(f"--result {path} is of {number_of(result.images, 'image')} of {dataset} ({result.what}), "
                            f"not of these {len(distilled.images)} distilled from {made_of}; give the result of "
                            "this set, or of as many real images")
        if result.what.startswith(OF_SET):
            given = result.config.get("lr_teacher")
            rates = [float(distilled.lr), *([given] if isinstance(given, int | float) else [])]
            own_rate = result.lr is None or result.config.get("protocol") == "dc" or any(
                same_rate(result.lr, rate) for rate in rates)
            if not own_rate or not same_images(result.images_sha256, distilled.images_sha256):
                raise UserError(f"--result {path} is of another set: its {'images are' if own_rate else 'rate is'} not "
                                "this set's; give the result of this set")
        return result
    of_folder = [result.versions.get(folder)] if folder in VERSIONS else [result.better[1], *result.versions.values()]
    best = next((each for each in of_folder if each and each.is_of(float(distilled.lr), distilled.images_sha256)),
                None)
    if best is None:
        raise UserError(f"--result {path} is of a run with another set: its learning rate or its images are not this "
                        "set's; give the result.json of the set's run")
    return replace(result, best=best, best_ema=None)
