"""How each dataset lies on the disk: folders of image files, a folder for each class."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.disk_layouts import Raw, Split, listing, some_of
from utils.errors import UserError, unknown_name
from utils.files import load
from utils.memory import available

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
NORMAL_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Indices into ImageNet's 1000 sorted WordNet ids; the position here is the label.
IMAGENET_SUBSETS = {
    "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
}


def tiny(data_path: Path, subset: str, res: int | None) -> Raw:
    """Tiny ImageNet, 3×64×64: `data_path` is tiny-imagenet-200 or the folder that holds it.

    train/<wnid>/images/* (the archive) or train/<wnid>/*; val/images/* with val/val_annotations.txt (the archive),
    val/images/<wnid>/* or val/<wnid>/*. Classes are sorted by WordNet id.
    """
    expected = "expected tiny-imagenet-200 with train/ and val/, as in http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    root = next((root for root in (data_path, data_path / "tiny-imagenet-200") if (root / "train").is_dir()), None)
    if root is None:
        raise UserError(f"Tiny: no train/ in {data_path} ({listing(data_path)}); {expected}, unpacked there")
    train = _class_files("Tiny", root / "train", IMAGE_SUFFIXES)
    flat, annotations = root / "val" / "images", root / "val" / "val_annotations.txt"
    if _subfolders(flat):
        test = _class_files("Tiny", flat, IMAGE_SUFFIXES)
    elif _files(flat, IMAGE_SUFFIXES):
        if not annotations.is_file():
            raise UserError(f"Tiny: {flat} holds images but {annotations}, which says their classes, is missing; take "
                            "it from the archive, or sort the images into val/images/<wnid>/")
        test = {}
        for line in annotations.read_text().splitlines():
            file, wnid = line.split("\t")[:2] if "\t" in line else (line, "?")
            test.setdefault(wnid, []).append(flat / file)
    else:
        test = _class_files("Tiny", root / "val", IMAGE_SUFFIXES)
    return _raw("Tiny", root, train, test, sorted(train), 64, NORMAL_IMAGENET, partial(_decode, side=64, resize=False))


def imagenet(data_path: Path, subset: str, res: int | None) -> Raw:
    """Ten classes of ImageNet: train/<wnid>/* and val/<wnid>/*, shorter side to `res` (128), centre crop."""
    if subset not in IMAGENET_SUBSETS:
        raise unknown_name("ImageNet subset", subset, IMAGENET_SUBSETS)
    folder = data_path / "train"
    wnids = sorted(_subfolders(folder))
    if len(wnids) != 1000:
        raise UserError(f"ImageNet: {len(wnids)} class folders in {folder} ({listing(folder)}), expected all 1000 "
                        "WordNet ids, whose order numbers the classes; torchvision.datasets.ImageNet(root, split) "
                        "unpacks the archives this way")
    chosen = [wnids[index] for index in IMAGENET_SUBSETS[subset]]
    train, test = (_class_files("ImageNet", data_path / split, IMAGE_SUFFIXES, chosen) for split in ("train", "val"))
    side = res or 128
    return _raw("ImageNet", data_path, train, test, chosen, side, NORMAL_IMAGENET, partial(_decode, side=side))


def image_folder(data_path: Path, subset: str, res: int | None) -> Raw:
    """A user's own images: train/<class>/* and test/<class>/* (else val/<class>/*), read as RGB.

    Shorter side to `res` (32), centre crop. Mean and std are measured on the training images.
    """
    second = next((split for split in ("test", "val") if (data_path / split).is_dir()), None)
    if second is None or not (data_path / "train").is_dir():
        raise UserError(f"ImageFolder: {data_path} needs train/<class>/* and test/<class>/* or val/<class>/* "
                        f"({listing(data_path)}); make these folders, one per class, with images in them")
    train, test = (_class_files("ImageFolder", data_path / split, IMAGE_SUFFIXES) for split in ("train", second))
    side = res or 32
    return _raw("ImageFolder", data_path, train, test, sorted(train), side, None, partial(_decode, side=side))


def imagenet_1k(data_path: Path, subset: str, res: int | None) -> Raw:
    """train/<class>/*.pt and val/<class>/*.pt: one tensor [3, 64, 64] each, uint8 or floats in [0, 1]."""
    train, test = (_class_files("ImageNet1K", data_path / split, (".pt",)) for split in ("train", "val"))
    classes = sorted(train)
    dtype = _load_tensor(train[classes[0]][0]).dtype  # the first file decides: all bytes or all floats
    dtype = torch.uint8 if dtype == torch.uint8 else torch.float32
    read = partial(_load_tensor, dtype=dtype)
    return _raw("ImageNet1K", data_path, train, test, classes, 64, NORMAL_IMAGENET, read, dtype)


def _raw(name: str, root: Path, train: dict[str, list[Path]], test: dict[str, list[Path]], classes: Sequence[str],
         side: int, normal, read: Callable[[Path], Tensor], dtype: torch.dtype = torch.uint8) -> Raw:
    for has, lacks, where in ((test, train, "train"), (train, test, "the test or val folder")):
        lost = sorted(set(has) - set(lacks))
        if lost:
            raise UserError(f"{name}: in {root}, {where} has no images of {some_of(lost)}; both need the same classes: "
                            "add the images or remove the class")
    train, test = (_read_files(files, classes, side, dtype, read) for files in (train, test))
    return Raw(train, test, tuple(classes), normal)


def _subfolders(folder: Path) -> dict[str, Path]:
    """Name → path of the visible folders in it; none where there is no such folder."""
    if not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The visible files of these kinds, sorted by name; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(suffixes) and entry.is_file()]
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _class_files(name: str, folder: Path, suffixes: tuple[str, ...], classes: Sequence[str] | None = None):
    """Class → files in <class>/ or <class>/images/, for these classes or all folders there are."""
    kinds = "/".join(suffixes[:3])
    folders = _subfolders(folder)
    classes = list(folders) if classes is None else classes
    missing = [c for c in classes if c not in folders]
    if missing or not classes:
        raise UserError(f"{name}: {folder} has no folder for {some_of(missing) if missing else 'any class'} "
                        f"({listing(folder)}); expected one folder per class with {kinds} files in it")
    files = {c: _files(folders[c], suffixes) or _files(folders[c] / "images", suffixes) for c in classes}
    empty = [c for c in classes if not files[c]]
    if empty:
        raise UserError(f"{name}: no {kinds} file in {folders[empty[0]]} ({len(empty)} of {len(classes)} class folders "
                        "are empty); add images or remove the folder")
    return files


def _read_files(files: dict[str, list[Path]], classes: Sequence[str], side: int, dtype: torch.dtype,
                read: Callable[[Path], Tensor]) -> Split:
    """All files, class by class, with a few threads: decoding releases Python's lock."""
    paths = [path for c in classes for path in files[c]]
    need = len(paths) * 3 * side * side * (4 + dtype.itemsize)  # as read, and as float32 beside it
    free = available()
    if need > free:
        raise UserError(f"{len(paths)} images of 3×{side}×{side}, {paths[0]} the first, need {need / 2**30:.1f} GiB of "
                        f"memory, {free / 2**30:.1f} GiB is available; use a machine with more, or fewer images")
    images = torch.empty(len(paths), 3, side, side, dtype=dtype)

    def read_some(start: int) -> None:
        for row, path in enumerate(paths[start:start + 64], start):
            images[row] = read(path)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(read_some, range(0, len(paths), 64)))
    counts = torch.tensor([len(files[c]) for c in classes])
    return Split(images, torch.arange(len(classes)).repeat_interleave(counts))


def _decode(path: Path, side: int, resize: bool = True) -> Tensor:
    """An image file → [3, side, side] uint8, as torchvision's Resize(side) and CenterCrop(side) do.

    Raises:
        UserError: not an image, or of another size where `resize` is off.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except Exception as error:  # decoders meet damage with exceptions of every kind
        raise UserError(f"{path} is not a readable image ({error}); fetch it again or delete it") from error
    width, height = image.size
    if (width, height) != (side, side):
        if not resize:
            raise UserError(f"{path} has {width}×{height} pixels, expected {side}×{side}; fetch the original images, "
                            "or use dataset ImageFolder, which resizes")
        short = min(width, height)
        width, height = int(side * width / short), int(side * height / short)
        left, top = round((width - side) / 2), round((height - side) / 2)
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _load_tensor(path: Path, dtype: torch.dtype | None = None) -> Tensor:
    """A .pt file → [3, 64, 64] of `dtype` (None: as it is)."""
    tensor = load(path, "image tensor")
    if not isinstance(tensor, Tensor) or tensor.shape != (3, 64, 64):
        what = f"a tensor of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{path} holds {what}, expected a tensor [3, 64, 64]; write it again")
    whole = tensor.dtype == torch.uint8
    if not whole and (not tensor.is_floating_point() or not (0 <= tensor.min() and tensor.max() <= 1)):
        raise UserError(f"{path} holds {tensor.dtype} values from {tensor.min():g} to {tensor.max():g}, expected uint8 "
                        "or floats in [0, 1], not normalised; write it again")
    if dtype is not None and whole != (dtype == torch.uint8):
        raise UserError(f"{path} holds {tensor.dtype}, other files do not; write all as uint8 or all as floats")
    return tensor if dtype is None else tensor.to(dtype)
