"""Name → whole dataset as tensors: `load_dataset(name, data_path) -> Dataset`.

Files that are there are used as they are; torchvision downloads only what is absent. `DATASETS`, at the end, is the
table of names; each loader says what it reads. Published mean and std: SPEC, section 3.
"""

import bz2
import dataclasses
import functools
import gzip
import hashlib
import http.client
import math
import os
import socket
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UserError, unknown_name
from utils.files import REPOSITORY, load
from utils.memory import available
from utils.zca import Whitening, fit, to_unit

HOLD_OUT_SEED = 0  # of the generator that chooses held-out images: the same choice in every run
PUBLISHED_RES = 32  # stands in published configs whatever the dataset, and means nothing there
DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")

MINIFASHION = REPOSITORY / "utils" / "minifashion" / "minifashion.bz2"
MINIFASHION_PER_CLASS = (600, 100)  # training and test images
MINIFASHION_SHA256 = "54b7c6cc842602d1cf12b3e045ad12c7691987f269322616b98ad23ff28c9165"  # of the decoded content

FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                   "Ankle boot")
DIGITS = tuple("0123456789")

# (mean, std) per channel, of pixels in [0, 1].
NORMAL_FASHION = (0.2861,), (0.3530,)
NORMAL_MNIST = (0.1307,), (0.3081,)
NORMAL_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of both, as published
NORMAL_SVHN = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
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


class Space(NamedTuple):
    """Where networks see images: normalised by mean and std, or, if there is a whitening, whitened instead."""

    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    whitening: Whitening | None

    def from_pixels(self, images: Tensor) -> Tensor:
        """[n, C, H, W] in [0, 1] → what networks see."""
        if self.whitening is not None:
            return self.whitening.apply(images)
        return (images - _per_channel(self.mean, images)) / _per_channel(self.std, images)

    def to_pixels(self, images: Tensor) -> Tensor:
        """The inverse of `from_pixels`; not clipped."""
        if self.whitening is not None:
            return self.whitening.invert(images)
        return images * _per_channel(self.std, images) + _per_channel(self.mean, images)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set in the space that networks see: normalised by mean and std, or ZCA-whitened."""

    name: str
    train_images: Tensor  # [N, C, H, W] float32
    train_labels: Tensor  # [N] int64, 0 … num_classes − 1
    test_images: Tensor  # [M, C, H, W] float32
    test_labels: Tensor  # [M] int64
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]; not applied where the images are whitened
    std: tuple[float, ...]
    whitening: Whitening | None
    fingerprint: str  # SHA-256, in hex, of the name and the raw images and labels
    # [N] of whitened training images, `Whitening.energy` of the pixels, which are costly to have back.
    train_energy: Tensor | None = None

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)"""
        return tuple(self.train_images.shape[2:])

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def space(self) -> "Space":
        return Space(self.mean, self.std, self.whitening)

    def to_pixels(self, images: Tensor) -> Tensor:
        """[n, C, H, W] in this dataset's space → pixel space, where real images lie in [0, 1]; not clipped."""
        return self.space.to_pixels(images)

    def class_indices(self, c: int) -> Tensor:
        """Indices [n] of the training images of class `c`, ascending, on the images' device."""
        return self._indices_by_class[c]

    @functools.cached_property
    def _indices_by_class(self) -> tuple[Tensor, ...]:
        counts = self.train_labels.bincount(minlength=self.num_classes).tolist()  # the one host sync, once
        return self.train_labels.argsort(stable=True).split(counts)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same dataset with every tensor on `device`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor | Whitening)}
        return dataclasses.replace(self, **moved)


class Split(NamedTuple):
    """Images as read, one by one in the order of the files."""

    images: Tensor  # [N, C, H, W], uint8 in 0 … 255 or float32 in [0, 1]
    labels: Tensor  # [N] int64


class Raw(NamedTuple):
    """What a loader returns."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    normal: tuple[tuple[float, ...], tuple[float, ...]] | None  # (mean, std); None: measured on the training images


Loader = Callable[[Path, str, int | None], Raw]  # (data_path, subset, res)


def load_dataset(name: str, data_path: str | os.PathLike, *, subset: str = "imagenette", zca: bool = False,
                 res: int | None = None, val_fraction: float = 0.0, device: torch.device | str = "cpu") -> Dataset:
    """Reads a dataset whole.

    Args:
        name: a key of `DATASETS`.
        data_path: the folder that holds the dataset, or into which it is downloaded. MiniFashion needs none.
        subset: which ten classes, for ImageNet.
        zca: whiten (`utils.zca`, fitted on the training images) instead of normalising by mean and std.
        res: side in pixels, for ImageNet (128 unless given) and ImageFolder (32); the others have their own.
        val_fraction: hold out this fraction of each class's training images, in place of the test images. Which
            ones is drawn from a generator seeded with HOLD_OUT_SEED. The whitening is that of all training images.
        device: where the tensors go; normalising and whitening happen there.

    Raises:
        UserError: unknown names; files that are missing, damaged or not in the expected layout; a failed download.
    """
    check_dataset_name(name)
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; allowed: 0 (no hold-out) and fractions below 1, as 0.1")
    if res is not None and res < 1:
        raise UserError(f"res is {res}; give the images' side in pixels, 1 or more")
    data_path = Path(data_path).expanduser()
    try:
        train, test, classes, normal = DATASETS[name](data_path, subset, res)
    except OSError as error:
        raise UserError(f"{name} in {data_path} cannot be read: {error}; check its files and permissions") from error
    side = train.images.shape[-1]
    if res not in (None, side, PUBLISHED_RES):
        raise UserError(f"res is {res}, but {name} has images of {side}×{side} pixels; leave res out, or use dataset "
                        "ImageFolder, which resizes")
    _check_labels(name, "training", train.labels, classes)
    _check_labels(name, "test", test.labels, classes)
    train_key = _sha256(*train)
    mean, std = normal or _measure(train.images)
    # Fitted before any image is held out, so that what is made with a hold-out lives in the same space as the rest.
    whitening = fit(train.images, train_key).to(device) if zca else None
    if val_fraction:
        train, test = _hold_out(train, val_fraction, classes)
    fingerprint = _sha256(name, *train, *test)

    (train_images, train_labels), (test_images, test_labels) = train, test
    del train, test  # so that each raw copy is freed as soon as it is converted
    train_images, test_images = to_unit(train_images, device), to_unit(test_images, device)
    space = Space(mean, std, whitening)
    energy = whitening.energy(train_images) if whitening else None
    train_images, test_images = space.from_pixels(train_images), space.from_pixels(test_images)
    return Dataset(name, train_images, train_labels.to(device), test_images, test_labels.to(device), classes, mean,
                   std, whitening, fingerprint, energy)


def check_dataset_name(name: str) -> None:
    """Refuses a dataset that does not exist.

    Raises:
        UserError
    """
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return images.new_tensor(values).view(-1, 1, 1)


def _sha256(*parts: str | Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy())
        else:
            digest.update(part.encode())
    return digest.hexdigest()


def _measure(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels in [0, 1]; a constant channel gets the std 1."""
    total = square = torch.zeros(images.shape[1], dtype=torch.float64)
    for some in images.split(1024):  # in pieces, so that the float64 copy stays small
        some = some.double() / (255 if images.dtype == torch.uint8 else 1)
        total, square = total + some.sum((0, 2, 3)), square + some.square().sum((0, 2, 3))
    count = images.numel() // images.shape[1]
    mean = total / count
    std = (square / count - mean**2).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(value if value > 1e-6 else 1.0 for value in std.tolist())


def _check_labels(name: str, split: str, labels: Tensor, classes: Sequence[str]) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{name}: {split} labels reach from {labels.min()} to {labels.max()}, expected 0 to "
                        f"{len(classes) - 1}; the label file is not this dataset's, fetch it again")
    empty = (labels.bincount(minlength=len(classes)) == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(f"{name}: no {split} image of {_some([classes[c] for c in empty])} ({len(empty)} of "
                        f"{len(classes)} classes); add images or leave the class out")


def _hold_out(train: Split, fraction: float, classes: Sequence[str]) -> tuple[Split, Split]:
    """Of each class the fraction, rounded, at least one → (remaining, held out), both in the order of the files."""
    generator = torch.Generator().manual_seed(HOLD_OUT_SEED)
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    for c, name in enumerate(classes):
        members = (train.labels == c).nonzero().flatten()
        count = max(1, math.floor(fraction * len(members) + 0.5))
        if count >= len(members):
            raise UserError(f"val_fraction {fraction} would hold out all {len(members)} training images of class "
                            f"{name}; give a smaller one, or 0 for none")
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return Split(train.images[~held], train.labels[~held]), Split(train.images[held], train.labels[held])


# --- MiniFashion, and the idx files of MNIST and Fashion-MNIST ---


def _minifashion(data_path: Path, subset: str, res: int | None) -> Raw:
    """The first 600 training and 100 test images of each class of Fashion-MNIST; in the repository."""
    try:
        content = bz2.decompress(MINIFASHION.read_bytes())
    except (OSError, ValueError, EOFError):
        content = b""
    if hashlib.sha256(content).hexdigest() != MINIFASHION_SHA256:
        raise UserError(f"{MINIFASHION} is missing or damaged; get it back with git checkout, or rebuild it with "
                        "scripts/make_minifashion.py")
    return Raw(*unpack_minifashion(content), FASHION_CLASSES, NORMAL_FASHION)


def pack_minifashion(train: Split, test: Split) -> bytes:
    """Whole Fashion-MNIST → the content of MiniFashion, before compression.

    Training images, training labels, test images, test labels: each as plain bytes, sorted by class and within a
    class in the order of the original file.
    """
    content = b""
    for (images, labels), per_class in zip((train, test), MINIFASHION_PER_CLASS):
        chosen = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(len(FASHION_CLASSES))])
        content += images[chosen].numpy().tobytes() + labels[chosen].to(torch.uint8).numpy().tobytes()
    return content


def unpack_minifashion(content: bytes) -> tuple[Split, Split]:
    """The inverse of `pack_minifashion`: images [10 · per class, 1, 28, 28] uint8, labels int64."""
    counts = [len(FASHION_CLASSES) * per_class for per_class in MINIFASHION_PER_CLASS]
    lengths = [length for count in counts for length in (count * 28 * 28, count)]
    train_images, train_labels, test_images, test_labels = torch.frombuffer(bytearray(content),
                                                                            dtype=torch.uint8).split(lengths)
    return (Split(train_images.view(-1, 1, 28, 28), train_labels.long()),
            Split(test_images.view(-1, 1, 28, 28), test_labels.long()))


def fashion_mnist_folders(data_path: Path) -> list[Path]:
    """Where Fashion-MNIST's four idx files are looked for, in this order."""
    return [data_path / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST]


def _fashion_mnist(data_path: Path, subset: str, res: int | None) -> Raw:
    train, test = _idx_or_download("FashionMNIST", data_path, fashion_mnist_folders(data_path))
    return Raw(train, test, FASHION_CLASSES, NORMAL_FASHION)


def _mnist(data_path: Path, subset: str, res: int | None) -> Raw:
    train, test = _idx_or_download("MNIST", data_path, [data_path / "MNIST" / "raw"])
    return Raw(train, test, DIGITS, NORMAL_MNIST)


def _idx_or_download(name: str, data_path: Path, folders: Sequence[Path]) -> tuple[Split, Split]:
    for folder in folders:
        if all(_idx_path(folder, file) for file in IDX_FILES):
            return read_idx_folder(folder)
    source = getattr(_torchvision_datasets(), name)
    _download(name, data_path, lambda root: source(root, download=True),
              {f"{name}/raw/{file}": md5 for file, md5 in source.resources})
    return read_idx_folder(data_path / name / "raw")


def _idx_path(folder: Path, file: str) -> Path | None:
    """The file, unpacked or as .gz."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def read_idx_folder(folder: Path) -> tuple[Split, Split]:
    """The four files of MNIST's layout, unpacked or gzipped → (training, test), images [N, 1, H, W] uint8.

    Raises:
        UserError: a file is missing or damaged, or images and labels do not belong together.
    """
    missing = [file for file in IDX_FILES if _idx_path(folder, file) is None]
    if missing:
        raise UserError(f"{folder} lacks {_some(missing)} ({_listing(folder)}); put the four idx files there, "
                        f"unpacked or as .gz: {', '.join(IDX_FILES)}")
    tensors = [_read_idx(_idx_path(folder, file)) for file in IDX_FILES]
    splits = []
    for images, labels in (tensors[:2], tensors[2:]):
        if images.dim() != 3 or labels.shape != images.shape[:1]:
            raise UserError(f"in {folder}, images of shape {list(images.shape)} and labels of shape "
                            f"{list(labels.shape)} do not belong together; fetch the four files again")
        splits.append(Split(images.unsqueeze(1), labels.long()))
    return tuple(splits)


def _read_idx(path: Path) -> Tensor:
    """An idx file of bytes: two zero bytes, 8 for uint8, the number of dimensions, each dimension in four
    big-endian bytes, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and fetch it again") from error
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = [int.from_bytes(content[4 + 4 * i:8 + 4 * i], "big") for i in range(dimensions)]
    expected = 4 + 4 * dimensions + math.prod(shape)
    if not dimensions or len(content) != expected:
        raise UserError(f"{path} is not a whole idx file of bytes ({len(content)} bytes"
                        + (f", its header says {expected}" if dimensions else "") + "); delete it and fetch it again")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[4 + 4 * dimensions:].view(shape)


# --- what torchvision reads and downloads ---


def _torchvision_datasets():
    """torchvision.datasets, imported where it is needed: a second and more, and some datasets do without."""
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UserError(f"torchvision cannot be imported ({error}); install the one that matches torch "
                        f"{torch.__version__}") from error
    return torchvision.datasets


def _download(name: str, data_path: Path, fetch: Callable[[str], object], files: dict[str, str]) -> None:
    """Runs torchvision's `fetch(root)` in a folder aside, then moves what it got to `data_path`.

    Nothing half-downloaded is left where a later run would find it.

    Args:
        files: path below `data_path` → md5 of what could be put there by hand.
    """
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none and could wait for ever
    try:
        data_path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_path, prefix=".download-") as aside:
            fetch(aside)
            for file in [file for file in Path(aside).rglob("*") if file.is_file()]:
                target = data_path / file.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        by_hand = ", ".join(f"{file} (md5 {md5})" for file, md5 in files.items())
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise UserError(f"{name} is not in {data_path} and could not be downloaded ({reason}); go online, or put there "
                        f"by hand: {by_hand}") from error
    finally:
        socket.setdefaulttimeout(patience)


def _cifar(name: str, data_path: Path, subset: str, res: int | None) -> Raw:
    """CIFAR10 or CIFAR100: the extracted folder, else the archive, else a download. Files are checked by md5."""
    source = getattr(_torchvision_datasets(), name)
    from torchvision.datasets.utils import check_integrity

    folder, archive = data_path / source.base_folder, data_path / source.filename
    files = dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])
    bad = [file for file, md5 in files.items() if not check_integrity(folder / file, md5)]
    if bad and check_integrity(archive, source.tgz_md5):
        source(data_path, download=True)  # finds the archive and extracts it
    elif bad and (folder.exists() or archive.exists()):
        parts = [f"{folder} lacks or has damaged {_some(bad)}"] if folder.exists() else []
        parts += [f"{archive} is damaged or incomplete"] if archive.exists() else []
        raise UserError(f"{name}: {' and '.join(parts)}; delete it to download it again, or put there "
                        f"{source.filename} (md5 {source.tgz_md5})")
    elif bad:
        _download(name, data_path, lambda root: source(root, download=True), {source.filename: source.tgz_md5})
    splits = [source(data_path, train=train) for train in (True, False)]
    train, test = (Split(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
                   for split in splits)
    return Raw(train, test, tuple(splits[0].classes), NORMAL_CIFAR)


def _svhn(data_path: Path, subset: str, res: int | None) -> Raw:
    """train_32x32.mat and test_32x32.mat, checked by md5; the digit 0 has the label 0."""
    source = _torchvision_datasets().SVHN
    from torchvision.datasets.utils import check_integrity

    try:
        import scipy.io  # noqa: F401  torchvision reads the .mat files with it
    except ImportError as error:
        raise UserError("SVHN needs scipy to read its .mat files; install it with: pip install scipy") from error
    files = {split: source.split_list[split][1:] for split in ("train", "test")}
    damaged = [file for file, md5 in files.values() if (data_path / file).exists()
               and not check_integrity(data_path / file, md5)]
    if damaged:
        raise UserError(f"SVHN: {_some(damaged)} in {data_path} is damaged or incomplete (its md5 differs); delete it "
                        "to download it again")
    missing = {split: (file, md5) for split, (file, md5) in files.items() if not (data_path / file).exists()}
    if missing:
        _download("SVHN", data_path, lambda root: [source(root, split=split, download=True) for split in missing],
                  dict(missing.values()))
    splits = [source(data_path, split=split) for split in ("train", "test")]
    train, test = (Split(torch.from_numpy(np.ascontiguousarray(split.data)), torch.from_numpy(split.labels))
                   for split in splits)
    return Raw(train, test, DIGITS, NORMAL_SVHN)


# --- folders of files ---


def _tiny(data_path: Path, subset: str, res: int | None) -> Raw:
    """Tiny ImageNet, 3×64×64: `data_path` is tiny-imagenet-200 or the folder that holds it.

    train/<wnid>/images/* (the archive) or train/<wnid>/*; val/images/* with val/val_annotations.txt (the archive),
    val/images/<wnid>/* or val/<wnid>/*. Classes are sorted by WordNet id.
    """
    expected = "expected tiny-imagenet-200 with train/ and val/, as in http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    root = next((root for root in (data_path, data_path / "tiny-imagenet-200") if (root / "train").is_dir()), None)
    if root is None:
        raise UserError(f"Tiny: no train/ in {data_path} ({_listing(data_path)}); {expected}, unpacked there")
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
    return _image_folders("Tiny", root, train, test, sorted(train), 64, NORMAL_IMAGENET, resize=False)


def _imagenet(data_path: Path, subset: str, res: int | None) -> Raw:
    """Ten classes of ImageNet: train/<wnid>/* and val/<wnid>/*, shorter side to `res` (128), centre crop."""
    if subset not in IMAGENET_SUBSETS:
        raise unknown_name("ImageNet subset", subset, IMAGENET_SUBSETS)
    folder = data_path / "train"
    wnids = sorted(_subfolders(folder))
    if len(wnids) != 1000:
        raise UserError(f"ImageNet: {len(wnids)} class folders in {folder} ({_listing(folder)}), expected all 1000 "
                        "WordNet ids, whose order numbers the classes; torchvision.datasets.ImageNet(root, split) "
                        "unpacks the archives this way")
    chosen = [wnids[index] for index in IMAGENET_SUBSETS[subset]]
    train, test = (_class_files("ImageNet", data_path / split, IMAGE_SUFFIXES, chosen) for split in ("train", "val"))
    return _image_folders("ImageNet", data_path, train, test, chosen, res or 128, NORMAL_IMAGENET)


def _image_folder(data_path: Path, subset: str, res: int | None) -> Raw:
    """A user's own images: train/<class>/* and test/<class>/* (else val/<class>/*), read as RGB.

    Shorter side to `res` (32), centre crop. Mean and std are measured on the training images.
    """
    second = next((split for split in ("test", "val") if (data_path / split).is_dir()), None)
    if second is None or not (data_path / "train").is_dir():
        raise UserError(f"ImageFolder: {data_path} needs train/<class>/* and test/<class>/* or val/<class>/* "
                        f"({_listing(data_path)}); make these folders, one per class, with images in them")
    train, test = (_class_files("ImageFolder", data_path / split, IMAGE_SUFFIXES) for split in ("train", second))
    return _image_folders("ImageFolder", data_path, train, test, sorted(train), res or 32, None)


def _imagenet_1k(data_path: Path, subset: str, res: int | None) -> Raw:
    """train/<class>/*.pt and val/<class>/*.pt: one tensor [3, 64, 64] each, uint8 or floats in [0, 1]."""
    train, test = (_class_files("ImageNet1K", data_path / split, (".pt",)) for split in ("train", "val"))
    classes = sorted(train)
    _same_classes("ImageNet1K", data_path, train, test)
    dtype = _load_tensor(train[classes[0]][0]).dtype  # the first file decides: all bytes or all floats
    dtype = torch.uint8 if dtype == torch.uint8 else torch.float32
    train, test = (_read_files(files, classes, 64, dtype, functools.partial(_load_tensor, dtype=dtype))
                   for files in (train, test))
    return Raw(train, test, tuple(classes), NORMAL_IMAGENET)


def _image_folders(name: str, root: Path, train: dict[str, list[Path]], test: dict[str, list[Path]],
                   classes: Sequence[str], side: int, normal, resize: bool = True) -> Raw:
    _same_classes(name, root, train, test)
    decode = functools.partial(_decode, side=side, resize=resize)
    train, test = (_read_files(files, classes, side, torch.uint8, decode) for files in (train, test))
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
        raise UserError(f"{name}: {folder} has no folder for {_some(missing) if missing else 'any class'} "
                        f"({_listing(folder)}); expected one folder per class with {kinds} files in it")
    found = {c: _files(folders[c], suffixes) or _files(folders[c] / "images", suffixes) for c in classes}
    empty = [c for c in classes if not found[c]]
    if empty:
        raise UserError(f"{name}: no {kinds} file in {folders[empty[0]]} ({len(empty)} of {len(classes)} class folders "
                        "are empty); add images or remove the folder")
    return found


def _same_classes(name: str, root: Path, train: dict, test: dict) -> None:
    for has, lacks, where in ((test, train, "train"), (train, test, "the test or val folder")):
        lost = sorted(set(has) - set(lacks))
        if lost:
            raise UserError(f"{name}: in {root}, {where} has no images of {_some(lost)}; both need the same classes: "
                            "add the images or remove the class")


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


def _decode(path: Path, side: int, resize: bool) -> Tensor:
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


def _some(names: Sequence[str], most: int = 3) -> str:
    """a, b, c and 7 more"""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _listing(folder: Path) -> str:
    """What is in a folder, for a message."""
    if not folder.is_dir():
        return f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist"
    return f"it holds {_some(sorted(path.name for path in folder.iterdir())) or 'nothing'}"


DATASETS: dict[str, Loader] = {
    "MiniFashion": _minifashion,
    "FashionMNIST": _fashion_mnist,
    "MNIST": _mnist,
    "CIFAR10": functools.partial(_cifar, "CIFAR10"),
    "CIFAR100": functools.partial(_cifar, "CIFAR100"),
    "SVHN": _svhn,
    "Tiny": _tiny,
    "ImageNet": _imagenet,
    "ImageNet1K": _imagenet_1k,
    "ImageFolder": _image_folder,
}
