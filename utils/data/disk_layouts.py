"""Dataset files on disk: MiniFashion, the idx files of MNIST and Fashion-MNIST, and those that torchvision reads."""

import bz2
import gzip
import hashlib
import http.client
import math
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.data.watching import Watch
from utils.errors import UserError, reason, some_of
from utils.files import REPOSITORY, reading

DOWNLOAD_TIMEOUT = 30.0  # seconds without receiving a byte
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MINIFASHION = REPOSITORY / "utils" / "data" / "minifashion" / "minifashion.bz2"
MINIFASHION_PER_CLASS = (600, 100)  # training and test images
MINIFASHION_SHA256 = "54b7c6cc842602d1cf12b3e045ad12c7691987f269322616b98ad23ff28c9165"  # of the decoded content
FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                   "Ankle boot")
DIGITS = tuple("0123456789")
# (mean, std) per channel, of pixels in [0, 1].
NORMAL_FASHION = (0.2861,), (0.3530,)
NORMAL_MNIST = (0.1307,), (0.3081,)
NORMAL_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR10 and CIFAR100, as published
NORMAL_SVHN = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)


class Split(NamedTuple):
    """Images as read, in file order, with their labels."""

    images: Tensor  # [N, C, H, W], uint8 in 0 … 255 or float32 in [0, 1]
    labels: Tensor  # [N] int64


class Raw(NamedTuple):
    """What a loader returns."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    normal: tuple[tuple[float, ...], tuple[float, ...]] | None  # (mean, std); None: measured on the training images


Size = tuple[int, int] | None  # the requested (H, W)
Loader = Callable[[Path, str, Size, Watch], Raw]  # (data_path, subset, size, watch)


def listing(folder: Path) -> str:
    """What is in a folder, for a message."""
    if not folder.is_dir():
        return f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist"
    return f"it holds {some_of(sorted(path.name for path in folder.iterdir())) or 'nothing'}"


def minifashion(data_path: Path, subset: str, size: Size, watch: Watch) -> Raw:
    """The first 600 training and 100 test images of each class of Fashion-MNIST; stored in the repository."""
    try:
        content = bz2.decompress(MINIFASHION.read_bytes())
    except (OSError, ValueError, EOFError):
        content = b""
    if hashlib.sha256(content).hexdigest() != MINIFASHION_SHA256:
        raise UserError(f"{MINIFASHION} is missing or damaged; get it back with git checkout, or rebuild it with "
                        "scripts/make_minifashion.py")
    return Raw(*unpack_minifashion(content), FASHION_CLASSES, NORMAL_FASHION)


def pack_minifashion(train: Split, test: Split) -> bytes:
    """The whole Fashion-MNIST → the content of MiniFashion, for `unpack_minifashion`; each class keeps the order of the
    original file."""
    content = b""
    for (images, labels), per_class in zip((train, test), MINIFASHION_PER_CLASS):
        chosen = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(len(FASHION_CLASSES))])
        content += images[chosen].numpy().tobytes() + labels[chosen].to(torch.uint8).numpy().tobytes()
    return content


def unpack_minifashion(content: bytes) -> tuple[Split, Split]:
    """Training images, training labels, test images, test labels, each as plain bytes, sorted by class → images
    [10 · per class, 1, 28, 28] uint8, labels int64."""
    counts = [len(FASHION_CLASSES) * per_class for per_class in MINIFASHION_PER_CLASS]
    lengths = [length for count in counts for length in (count * 28 * 28, count)]
    train_images, train_labels, test_images, test_labels = torch.frombuffer(bytearray(content),
                                                                            dtype=torch.uint8).split(lengths)
    return (Split(train_images.view(-1, 1, 28, 28), train_labels.long()),
            Split(test_images.view(-1, 1, 28, 28), test_labels.long()))


def fashion_mnist_folders(data_path: Path) -> list[Path]:
    """The folders in which Fashion-MNIST's four idx files are looked for, in this order."""
    return [data_path / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST]


def fashion_mnist(data_path: Path, subset: str, size: Size, watch: Watch) -> Raw:
    train, test = _idx_or_download("FashionMNIST", data_path, fashion_mnist_folders(data_path))
    return Raw(train, test, FASHION_CLASSES, NORMAL_FASHION)


def mnist(data_path: Path, subset: str, size: Size, watch: Watch) -> Raw:
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
    """The file, unpacked or as .gz; None if neither exists."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def read_idx_folder(folder: Path) -> tuple[Split, Split]:
    """The four files of MNIST's layout, unpacked or gzipped → (training, test), images [N, 1, H, W] uint8.

    Raises:
        UserError: a file is missing or damaged, or the four do not belong together.
    """
    missing = [file for file in IDX_FILES if _idx_path(folder, file) is None]
    if missing:
        raise UserError(f"{folder} lacks {some_of(missing)} ({listing(folder)}); put the four idx files there, "
                        f"unpacked or as .gz: {', '.join(IDX_FILES)}")
    tensors = [_read_idx(_idx_path(folder, file)) for file in IDX_FILES]
    splits = []
    for images, labels in (tensors[:2], tensors[2:]):
        if images.dim() != 3 or 0 in images.shape[1:] or labels.shape != images.shape[:1]:
            raise UserError(f"in {folder}, images of shape {list(images.shape)} and labels of shape "
                            f"{list(labels.shape)} do not belong together; fetch the four files again")
        splits.append(Split(images.unsqueeze(1), labels.long()))
    if tensors[0].shape[1:] != tensors[2].shape[1:]:
        sizes = " and ".join("×".join(map(str, images.shape[1:])) for images in (tensors[0], tensors[2]))
        raise UserError(f"in {folder}, training and test images of {sizes} pixels do not belong together; fetch the "
                        "four files again")
    return tuple(splits)


def _read_idx(path: Path) -> Tensor:
    """An idx file of bytes: two zero bytes, 8 for uint8, the number of dimensions, each dimension in four
    big-endian bytes, the data."""
    with reading(path, "delete it and fetch it again"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = [int.from_bytes(content[4 + 4 * i:8 + 4 * i], "big") for i in range(dimensions)]
    expected = 4 + 4 * dimensions + math.prod(shape)
    if not dimensions or len(content) != expected:
        raise UserError(f"{path} is not a whole idx file of bytes ({len(content)} bytes"
                        + (f", its header says {expected}" if dimensions else "") + "); delete it and fetch it again")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[4 + 4 * dimensions:].view(shape)


def _torchvision_datasets():
    """torchvision.datasets, imported only when needed: it takes over a second, and some datasets do not use it."""
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UserError(f"torchvision cannot be imported ({error}); install the one that matches torch "
                        f"{torch.__version__}") from error
    return torchvision.datasets


def _download(name: str, data_path: Path, fetch: Callable[[str], object], files: dict[str, str]) -> None:
    """`_fetch`, with a limit on the time without a byte.

    Args:
        files: path below `data_path` → md5 of a file that the user could put there by hand; for the error message.
    """
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets no timeout and could wait for ever
    try:
        _fetch(data_path, fetch)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        by_hand = ", ".join(f"{file} (md5 {md5})" for file, md5 in files.items())
        raise UserError(f"{name} is not in {data_path} and could not be downloaded ({reason(error)}); go online, or "
                        f"put there by hand: {by_hand}") from error
    finally:
        socket.setdefaulttimeout(patience)


def _fetch(data_path: Path, fetch: Callable[[str], object]) -> None:
    """Runs `fetch(root)` in a temporary folder, then moves the files to `data_path`, so that no other run ever finds a
    partial file."""
    data_path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_path, prefix=".download-") as aside:
        fetch(aside)
        for file in [file for file in Path(aside).rglob("*") if file.is_file()]:
            target = data_path / file.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


def cifar(name: str, data_path: Path, subset: str, size: Size, watch: Watch) -> Raw:
    """CIFAR10 or CIFAR100: the extracted folder, else the archive, else a download. Files are checked by md5."""
    source = getattr(_torchvision_datasets(), name)
    from torchvision.datasets.utils import check_integrity, extract_archive

    folder, archive = data_path / source.base_folder, data_path / source.filename
    files = dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])
    bad = [file for file, md5 in files.items() if not check_integrity(folder / file, md5)]
    if bad and check_integrity(archive, source.tgz_md5):
        try:
            _fetch(data_path, lambda root: extract_archive(str(archive), root))
        except OSError as error:
            raise UserError(f"{archive} cannot be extracted in {data_path}: {error.strerror or error}; make room, or "
                            "extract it there by hand") from error
    elif bad and (folder.exists() or archive.exists()):
        parts = [f"{folder} lacks or has damaged {some_of(bad)}"] if folder.exists() else []
        parts += [f"{archive} is damaged or incomplete"] if archive.exists() else []
        raise UserError(f"{name}: {' and '.join(parts)}; delete it to download it again, or put there "
                        f"{source.filename} (md5 {source.tgz_md5})")
    elif bad:
        _download(name, data_path, lambda root: source(root, download=True), {source.filename: source.tgz_md5})
    splits = [source(data_path, train=train) for train in (True, False)]
    train, test = (Split(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
                   for split in splits)
    return Raw(train, test, tuple(splits[0].classes), NORMAL_CIFAR)


def svhn(data_path: Path, subset: str, size: Size, watch: Watch) -> Raw:
    """train_32x32.mat and test_32x32.mat, checked by md5; the digit 0 has the label 0."""
    source = _torchvision_datasets().SVHN
    from torchvision.datasets.utils import check_integrity

    files = {split: source.split_list[split][1:] for split in ("train", "test")}
    damaged = [file for file, md5 in files.values() if (data_path / file).exists()
               and not check_integrity(data_path / file, md5)]
    if damaged:
        raise UserError(f"SVHN: {some_of(damaged)} in {data_path} is damaged or incomplete (its md5 differs); delete "
                        "it to download it again")
    missing = {split: (file, md5) for split, (file, md5) in files.items() if not (data_path / file).exists()}
    if missing:
        _download("SVHN", data_path, lambda root: [source(root, split=split, download=True) for split in missing],
                  dict(missing.values()))
    splits = (source(data_path, split=split) for split in ("train", "test"))
    return Raw(*(Split(torch.from_numpy(np.ascontiguousarray(split.data)), torch.from_numpy(split.labels))
                 for split in splits), DIGITS, NORMAL_SVHN)
