"""Every dataset is read from a small copy of its published layout; every wrong layout is refused in one clear line."""

import bz2
import gzip
import hashlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils import memory
from utils.data import datasets, disk_layouts, image_folders
from utils.data import images as image_files
from utils.data.datasets import load_dataset
from utils.data.disk_layouts import Split
from utils.errors import UserError
from utils.files import REPOSITORY, cache_folder

ORIGINALS = disk_layouts.DEBIAN_FASHION_MNIST
needs_originals = pytest.mark.skipif(not (ORIGINALS / "train-images-idx3-ubyte.gz").is_file(),
                                     reason=f"no original Fashion-MNIST in {ORIGINALS} (Debian: dataset-fashion-mnist)")


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    """No network, a separate cache folder, and no Fashion-MNIST of the system's."""
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("DATM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(disk_layouts, "DEBIAN_FASHION_MNIST", tmp_path_factory.mktemp("debian") / "nothing")


def refused(match, name, path, **kwargs):
    """Asserts that loading is refused with one line that matches; returns the line."""
    with pytest.raises(UserError, match=match) as caught:
        load_dataset(name, path, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_image(path, pixels):
    """Writes [H, W, 3] uint8 (or [H, W]: grey) as an image file; always PNG, which is lossless, whatever its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")


# --- MiniFashion ---


def test_minifashion_content():
    content = bz2.decompress(disk_layouts.MINIFASHION.read_bytes())
    assert hashlib.sha256(content).hexdigest() == disk_layouts.MINIFASHION_SHA256
    assert disk_layouts.MINIFASHION.stat().st_size < 4_000_000
    assert "Zalando SE" in (disk_layouts.MINIFASHION.parent / "LICENSE").read_text()
    train, test = disk_layouts.unpack_minifashion(content)
    assert torch.equal(train.labels, torch.arange(10).repeat_interleave(600))
    assert torch.equal(test.labels, torch.arange(10).repeat_interleave(100))


def test_minifashion_dataset():
    data = load_dataset("MiniFashion", "/nowhere")
    assert data.train_images.shape == (6000, 1, 28, 28) and data.test_images.shape == (1000, 1, 28, 28)
    assert data.train_images.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    assert (data.channels, data.image_size, data.num_classes) == (1, (28, 28), 10)
    assert data.space.whitening is None and len(data.fingerprint) == 64
    assert abs(data.train_images.mean()) < 0.05 and abs(data.train_images.std() - 1) < 0.05
    pixels = data.space.to_pixels(data.train_images)
    assert -1e-6 < pixels.min() and pixels.max() < 1 + 1e-6
    for c in range(10):
        assert torch.equal(data.class_indices(c), torch.arange(600 * c, 600 * (c + 1)))
    assert data.class_indices(3) is data.class_indices(3)
    assert data.fingerprint == load_dataset("MiniFashion", "/nowhere").fingerprint


def test_minifashion_whitened():
    plain, white = load_dataset("MiniFashion", ""), load_dataset("MiniFashion", "", zca=True)
    assert white.space.whitening.mean.shape == (1, 784)
    assert white.fingerprint == plain.fingerprint
    for images, pixels in ((white.train_images, plain.space.to_pixels(plain.train_images)),
                           (white.test_images, plain.space.to_pixels(plain.test_images))):
        torch.testing.assert_close(white.space.to_pixels(images), pixels, rtol=0, atol=2e-5)
    assert white.train_images.mean().abs() < 1e-5


def test_minifashion_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_layouts, "MINIFASHION", tmp_path / "minifashion.bz2")
    refused("missing or damaged.*make_minifashion", "MiniFashion", "")
    (tmp_path / "minifashion.bz2").write_bytes(b"BZh9 nonsense")
    refused("missing or damaged", "MiniFashion", "")
    (tmp_path / "minifashion.bz2").write_bytes(bz2.compress(b"another content"))
    refused("missing or damaged", "MiniFashion", "")


MAKE_MINIFASHION = REPOSITORY / "scripts/make_minifashion.py"


@needs_originals
def test_make_minifashion_rebuilds_bit_for_bit(call, tmp_path):
    call(MAKE_MINIFASHION, f"--source={ORIGINALS}", f"--out={tmp_path / 'again.bz2'}")
    assert (tmp_path / "again.bz2").read_bytes() == disk_layouts.MINIFASHION.read_bytes()


def test_make_minifashion_refuses_what_is_not_the_original(call, tmp_path):
    write_idx_folder(tmp_path / "other")
    for name, why in (("missing", "does not exist"), ("other", "not the original")):
        done = call(MAKE_MINIFASHION, f"--source={tmp_path / name}", f"--out={tmp_path / 'out.bz2'}", expect=2)
        assert why in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.bz2").exists()


# --- idx files: FashionMNIST, MNIST ---


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx_folder(folder, packed=False, train=30, test=20):
    """Writes idx files with labels 0 … 9 in turn; returns the four arrays."""
    folder.mkdir(parents=True)
    arrays = [random_bytes(train, 28, 28), np.arange(train, dtype=np.uint8) % 10,
              random_bytes(test, 28, 28, seed=1), np.arange(test, dtype=np.uint8) % 10]
    for name, array in zip(disk_layouts.IDX_FILES, arrays):
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


@pytest.mark.parametrize("name", ["FashionMNIST", "MNIST"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_folder(tmp_path, name, packed):
    images, labels, test_images, test_labels = write_idx_folder(tmp_path / name / "raw", packed)
    data = load_dataset(name, tmp_path)
    mean, std = {"FashionMNIST": (0.2861, 0.3530), "MNIST": (0.1307, 0.3081)}[name]
    expected = (torch.from_numpy(images).unsqueeze(1) / 255 - mean) / std
    torch.testing.assert_close(data.train_images, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(data.space.to_pixels(data.test_images), torch.from_numpy(test_images).unsqueeze(1) / 255)
    assert data.train_labels.tolist() == labels.tolist() and data.test_labels.tolist() == test_labels.tolist()
    assert data.class_indices(3).tolist() == [3, 13, 23]
    assert data.space[:2] == ((mean,), (std,))


@needs_originals
def test_debians_fashion_mnist_is_read_where_data_path_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_layouts, "DEBIAN_FASHION_MNIST", ORIGINALS)
    data = load_dataset("FashionMNIST", tmp_path / "none")
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert abs(data.train_images.mean()) < 1e-3 and abs(data.train_images.std() - 1) < 1e-3
    mini = load_dataset("MiniFashion", "")
    assert torch.equal(mini.train_images[600:1200], data.train_images[data.class_indices(1)[:600]])
    write_idx_folder(tmp_path / "FashionMNIST" / "raw")  # data_path comes first
    assert len(load_dataset("FashionMNIST", tmp_path).train_labels) == 30


def test_torchvision_reads_what_we_read(tmp_path):
    """The same folder through torchvision's own reader."""
    import torchvision

    write_idx_folder(tmp_path / "MNIST" / "raw")
    theirs, ours = torchvision.datasets.MNIST(tmp_path), load_dataset("MNIST", tmp_path)
    torch.testing.assert_close(ours.space.to_pixels(ours.train_images)[:, 0], theirs.data / 255)
    assert torch.equal(ours.train_labels, theirs.targets)


def test_damaged_idx_files(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    write_idx_folder(folder, packed=True)
    images = folder / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for content in (whole[:-100], b"not gzip at all", b"", whole[:200] + b"xxxx" + whole[204:]):
        images.write_bytes(content)
        refused("train-images-idx3-ubyte.gz is", "MNIST", tmp_path)
    images.unlink()
    plain = folder / "train-images-idx3-ubyte"
    for content in (gzip.decompress(whole)[:-1], gzip.decompress(whole) + b"0", b"<html>404</html>", b"", b"\0\0\x08"):
        plain.write_bytes(content)
        refused("not a whole idx file", "MNIST", tmp_path)
    for shape in ((29, 28, 28), (30, 0, 28)):
        plain.write_bytes(idx(random_bytes(*shape)))
        refused("do not belong together", "MNIST", tmp_path)
    plain.write_bytes(idx(random_bytes(30, 20, 28)))
    refused("training and test images of 20×28 and 28×28 pixels do not belong together", "MNIST", tmp_path)
    plain.write_bytes(idx(random_bytes(30, 28, 28)))
    labels = folder / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(30, 11, dtype=np.uint8))))
    refused("training labels reach from 11 to 11, expected 0 to 9", "MNIST", tmp_path)
    labels.write_bytes(gzip.compress(idx(np.full(30, 7, dtype=np.uint8))))
    refused(r"no training image of 0, 1, 2 and 6 more \(9 of 10 classes\)", "MNIST", tmp_path)


# --- downloads, which fail here ---


@pytest.mark.parametrize(("name", "file", "published_md5"), [
    ("FashionMNIST", "FashionMNIST/raw/train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    ("MNIST", "MNIST/raw/t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ("CIFAR10", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    ("CIFAR100", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    ("SVHN", "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
])
@pytest.mark.parametrize("failure", [urllib.error.URLError("no route"), ConnectionResetError("reset"),
                                     TimeoutError("timed out"), RuntimeError("File not found or corrupted.")])
def test_failed_download(tmp_path, monkeypatch, name, file, published_md5, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    message = refused("could not be downloaded", name, tmp_path / "data")
    assert f"{file} (md5 {published_md5})" in message and str(tmp_path / "data") in message
    assert str(failure.args[0]).rstrip(".") in message
    assert list((tmp_path / "data").iterdir()) == []  # no partial download is left


def test_download_arrives_whole(tmp_path, monkeypatch):
    """torchvision's own download code, with local files in place of the network."""
    import torchvision
    from torchvision.datasets import utils as downloads

    write_idx_folder(tmp_path / "server", packed=True)
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources",
                        [(path.name, md5(path)) for path in sorted((tmp_path / "server").iterdir())])
    monkeypatch.setattr(downloads, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(downloads, "_urlretrieve",
                        lambda url, path, *rest: shutil.copy(tmp_path / "server" / url.rsplit("/")[-1], path))
    assert len(load_dataset("MNIST", tmp_path / "data").train_labels) == 30
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    monkeypatch.setattr(downloads, "_urlretrieve", None)  # the second load downloads nothing
    assert len(load_dataset("MNIST", tmp_path / "data").train_labels) == 30


def test_torchvision_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    refused("torchvision cannot be imported.*matches torch", "CIFAR10", tmp_path)


# --- CIFAR and SVHN: torchvision checks every file's md5, so the tests patch its md5 lists ---


def write_cifar(root, monkeypatch, name):
    """Writes a tiny dataset in the archive's published layout; returns (images, labels) of training and test."""
    import torchvision

    source = getattr(torchvision.datasets, name)
    key, count = {"CIFAR10": ("labels", 10), "CIFAR100": ("fine_labels", 100)}[name]
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    splits = []
    for which, lists in (("train_list", source.train_list), ("test_list", source.test_list)):
        parts = []
        for seed, (file, _) in enumerate(lists):
            part = {"data": random_bytes(count, 3072, seed=seed), key: list(range(count))}
            (folder / file).write_bytes(pickle.dumps(part))
            parts.append(part)
        monkeypatch.setattr(source, which, [[file, md5(folder / file)] for file, _ in lists])
        splits.append((np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32),
                       [label for part in parts for label in part[key]]))
    meta = folder / source.meta["filename"]
    meta.write_bytes(pickle.dumps({source.meta["key"]: [f"kind {c}" for c in range(count)]}))
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(meta)})
    return splits


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, monkeypatch, name):
    (images, labels), (test_images, _) = write_cifar(tmp_path, monkeypatch, name)
    data = load_dataset(name, tmp_path)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((.4914, .4822, .4465), (.2023, .1994, .2010)))
    torch.testing.assert_close(data.train_images, (torch.from_numpy(images) / 255 - mean) / std, rtol=0, atol=1e-6)
    torch.testing.assert_close(data.space.to_pixels(data.test_images), torch.from_numpy(test_images) / 255)
    assert data.train_labels.tolist() == labels and data.classes[3] == "kind 3"
    assert data.num_classes == {"CIFAR10": 10, "CIFAR100": 100}[name] and data.image_size == (32, 32)


def test_cifar_archive_is_extracted(tmp_path, monkeypatch):
    import torchvision

    write_cifar(tmp_path / "elsewhere", monkeypatch, "CIFAR10")
    archive = tmp_path / "data" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "elsewhere" / "cifar-10-batches-py", "cifar-10-batches-py")
    refused("cifar-10-python.tar.gz is damaged or incomplete", "CIFAR10", tmp_path / "data")  # another md5
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(archive))
    assert len(load_dataset("CIFAR10", tmp_path / "data").train_labels) == 50
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3").unlink()  # an interrupted extraction
    assert len(load_dataset("CIFAR10", tmp_path / "data").train_labels) == 50


def test_damaged_cifar(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_2").write_bytes(b"cut")
    (folder / "test_batch").unlink()
    refused(r"lacks or has damaged data_batch_2, test_batch; delete it .*cifar-10-python.tar.gz \(md5", "CIFAR10",
            tmp_path)


def write_svhn(root, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    import torchvision

    source, lists, arrays = torchvision.datasets.SVHN, {}, {}
    for seed, (split, (url, file, _)) in enumerate(list(source.split_list.items())[:2]):
        images, labels = random_bytes(20, 3, 32, 32, seed=seed), np.tile(np.arange(1, 11, dtype=np.uint8), 2)
        scipy_io.savemat(root / file, {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]})
        lists[split] = [url, file, md5(root / file)]
        arrays[split] = images, labels
    monkeypatch.setattr(source, "split_list", lists)
    return arrays


def test_svhn(tmp_path, monkeypatch):
    arrays = write_svhn(tmp_path, monkeypatch)
    data = load_dataset("SVHN", tmp_path)
    for images, (expected, _) in ((data.train_images, arrays["train"]), (data.test_images, arrays["test"])):
        torch.testing.assert_close(data.space.to_pixels(images), torch.from_numpy(expected) / 255)
    assert data.train_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    (tmp_path / "test_32x32.mat").unlink()
    message = refused("could not be downloaded", "SVHN", tmp_path)
    assert "test_32x32.mat" in message and "train_32x32.mat" not in message
    (tmp_path / "test_32x32.mat").write_bytes(b"cut")
    refused("test_32x32.mat in .* is damaged", "SVHN", tmp_path)


# --- folders ---

TINY = ("n02", "n01")  # written in this order, read sorted


def write_tiny(root, train="{wnid}/images/{wnid}_{i}.JPEG", val="archive"):
    """Writes two classes; returns {split: {wnid: [pixels]}} with pixels [64, 64, 3]."""
    made = {"train": {}, "val": {}}
    annotations = []
    for seed, wnid in enumerate(TINY):
        for i in range(3):
            pixels = random_bytes(64, 64, 3, seed=10 * seed + i)
            made["train"].setdefault(wnid, []).append(pixels)
            write_image(root / "train" / train.format(wnid=wnid, i=i), pixels)
        pixels = random_bytes(64, 64, 3, seed=10 * seed + 5)
        made["val"][wnid] = [pixels]
        place = {"archive": f"images/val_{seed}.JPEG", "published": f"images/{wnid}/val_{seed}.JPEG",
                 "plain": f"{wnid}/val_{seed}.JPEG", "nested": f"{wnid}/images/val_{seed}.JPEG"}[val]
        annotations.append(f"val_{seed}.JPEG\t{wnid}\t0\t32\t44\t62\n")
        write_image(root / "val" / place, pixels)
    if val in ("archive", "published"):
        (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    return made


def stacked(split):
    """All images of a split, classes sorted: [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack([pixels for wnid in sorted(split) for pixels in split[wnid]])
                            ).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("train", ["{wnid}/images/{wnid}_{i}.JPEG", "{wnid}/{i}.JPEG"])
@pytest.mark.parametrize("val", ["archive", "published", "plain", "nested"])
@pytest.mark.parametrize("inside", ["", "tiny-imagenet-200"])
def test_tiny_layouts(tmp_path, train, val, inside):
    made = write_tiny(tmp_path / inside, train, val)
    (tmp_path / inside / "train" / "n01" / "n01_boxes.txt").write_text("0 0 0 0")
    data = load_dataset("Tiny", tmp_path)
    torch.testing.assert_close(data.space.to_pixels(data.train_images), stacked(made["train"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(data.space.to_pixels(data.test_images), stacked(made["val"]), rtol=0, atol=1e-6)
    assert data.classes == ("n01", "n02") and data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 1] and data.space.mean == (0.485, 0.456, 0.406)


def test_what_tinys_annotations_do_not_name_is_left_out(tmp_path, capsys):
    made = write_tiny(tmp_path)
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text(2 * annotations.read_text() + "\n")
    write_image(tmp_path / "val" / "images" / "val_2.JPEG", made["val"]["n01"][0])
    assert load_dataset("Tiny", tmp_path).test_labels.tolist() == [0, 1]
    assert "not in val_annotations.txt" in capsys.readouterr().err


def test_wrong_tiny_layouts(tmp_path):
    refused(r"no train/ in .*tiny \(.*does not exist\)", "Tiny", tmp_path / "tiny")
    write_tiny(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "val")
    refused("val has no folder for any class", "Tiny", tmp_path / "a")
    write_tiny(tmp_path / "b")
    (tmp_path / "b" / "val" / "val_annotations.txt").unlink()
    refused("val_annotations.txt, which says their classes, is missing", "Tiny", tmp_path / "b")
    write_tiny(tmp_path / "c")
    (tmp_path / "c" / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\nval_1.JPEG\tn77\n")
    refused("train has no images of n77", "Tiny", tmp_path / "c")
    (tmp_path / "c" / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\nval_9.JPEG\tn01\n")
    refused("val_9.JPEG is not a readable image", "Tiny", tmp_path / "c")
    (tmp_path / "c" / "val" / "val_annotations.txt").write_bytes(b"val_0.JPEG\tn\xff\n")
    refused(r"val_annotations.txt is damaged .*take it from the archive", "Tiny", tmp_path / "c")
    write_tiny(tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / "train" / "n01")
    refused("train has no images of n01", "Tiny", tmp_path / "d")
    (tmp_path / "d" / "train" / "n01").mkdir()
    refused(r"no image file in .*n01 \(1 of 2 class folders", "Tiny", tmp_path / "d")
    write_tiny(tmp_path / "e")
    image = tmp_path / "e" / "train" / "n01" / "images" / "n01_1.JPEG"
    whole = image.read_bytes()
    for content in (b"", b"hello", whole[:500]):
        image.write_bytes(content)
        refused("n01_1.JPEG is not a readable image", "Tiny", tmp_path / "e")
    write_image(image, random_bytes(32, 64, 3))
    refused("n01_1.JPEG has 64×32 pixels, expected 64×64", "Tiny", tmp_path / "e")


def test_image_folder_resizes_like_torchvision_and_measures(tmp_path):
    from torchvision.transforms import v2

    pictures = {}
    for split in ("train", "test"):
        for c, shape in (("cat", (40, 60, 3)), ("dog", (50, 35)), ("emu", (8, 8, 3))):  # dog is grey, emu is small
            pictures[split, c] = random_bytes(*shape, seed=len(pictures))
            write_image(tmp_path / split / c / "1.PNG", pictures[split, c])
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("")
    data = load_dataset("ImageFolder", tmp_path, res=16)
    theirs = v2.Compose([v2.Resize(16), v2.CenterCrop(16), v2.PILToTensor()])
    expected = torch.stack([theirs(Image.fromarray(pictures["train", c]).convert("RGB"))
                            for c in ("cat", "dog", "emu")]) / 255
    torch.testing.assert_close(data.space.to_pixels(data.train_images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(data.train_images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(data.train_images.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)
    assert data.classes == ("cat", "dog", "emu")
    assert load_dataset("ImageFolder", tmp_path).image_size == (32, 32)
    (tmp_path / "test").rename(tmp_path / "val")
    assert load_dataset("ImageFolder", tmp_path, res=16).fingerprint == data.fingerprint


def own_images(root, **files):
    """Writes files `name=(pixels or image, suffix, options for saving)` as one class, into train/ and test/."""
    for split in ("train", "test"):
        (root / split / "a").mkdir(parents=True, exist_ok=True)
        for name, (image, suffix, options) in files.items():
            image = image if isinstance(image, Image.Image) else Image.fromarray(image)
            image.save(root / split / "a" / f"{name}{suffix}", **options)
    return root


def read_bytes(root, **kwargs):
    """The training images, [N, C, H, W] in 0 … 255."""
    data = load_dataset("ImageFolder", root, **kwargs)
    return (data.space.to_pixels(data.train_images) * 255).round().int()


def test_squares_are_torchvisions_to_the_bit(tmp_path):
    from torchvision.transforms import v2

    shapes = [tuple(np.random.default_rng(seed).integers(1, 90, 2)) for seed in range(60)] + [(2000, 1), (3, 700)]
    pictures = [Image.fromarray(random_bytes(*shape, 3, seed=seed)) for seed, shape in enumerate(shapes)]
    own_images(tmp_path, **{f"{number:02}": (picture, ".png", {}) for number, picture in enumerate(pictures)})
    theirs = v2.Compose([v2.Resize(24), v2.CenterCrop(24), v2.PILToTensor()])
    assert torch.equal(read_bytes(tmp_path, res=24), torch.stack([theirs(picture) for picture in pictures]).int())


def test_sixteen_bits_and_floats_become_eight(tmp_path, capsys):
    """Grey images give one channel; with a colour image in the dataset, three."""
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    eight = np.rint(values / 257)
    own_images(tmp_path, a=(values, ".png", {}), b=(values, ".tif", {}), c=(values.astype(np.int32), ".tiff", {}),
               d=(values, ".pgm", {}), e=((values / 65535).astype(np.float32), ".tif", {}),
               f=(values.astype(">u2"), ".tif", {}),
               g=(65535 - values, ".tif", {"tiffinfo": {262: 0}}))  # TIFF with zero as white
    expected = torch.from_numpy(eight).int().expand(7, 1, 8, 8)
    assert torch.equal(read_bytes(tmp_path, res=8), expected)
    assert "note: ImageFolder: 14 images are 16-bit or float, reduced to 8 bits (" in capsys.readouterr().err
    own_images(tmp_path, h=(random_bytes(8, 8, 3), ".png", {}), i=(values // 16, ".png", {}))
    assert torch.equal(read_bytes(tmp_path, res=8)[:7], expected.expand(7, 3, 8, 8))
    assert "2 images are 16-bit with fewer than 12 bits in use" in capsys.readouterr().err
    for wrong in (values.astype(np.int32) * 2, -values.astype(np.int32), values.astype(np.float32),
                  np.full((8, 8), np.nan, dtype=np.float32)):
        own_images(tmp_path, j=(wrong, ".tif", {}))
        refused(r"j.tif has values from .*Pillow's mode [IF]\)", "ImageFolder", tmp_path)


def png_of_16_bits(path, values):
    """Writes grey with alpha [H, W, 2] or colours [H, W, 3], which Pillow reads but does not write."""
    kind = {2: 4, 3: 2}[values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def test_sixteen_bits_of_a_colour_and_of_grey_with_alpha(tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 3), dtype=np.uint16)
    for split in ("train", "test"):
        for channels in (2, 3):
            (tmp_path / f"{channels}" / split / "a").mkdir(parents=True)
            values[..., 1] = 65535 if channels == 2 else values[..., 0]
            png_of_16_bits(tmp_path / f"{channels}" / split / "a" / "x.png", values[..., :channels])
    assert read_bytes(tmp_path / "2", res=8).shape[1] == 1 and read_bytes(tmp_path / "3", res=8).shape[1] == 3
    said = capsys.readouterr().err
    assert said.count("2 images are 16-bit or float, reduced to 8 bits") == 2
    assert said.count("2 images are 16-bit with fewer than 12 bits in use") == 2


def test_transparency_lies_over_white_and_exif_turns(tmp_path, capsys):
    pixels = random_bytes(8, 8, 4)
    pixels[0, :, 3], pixels[1:, :, 3] = 0, 255
    seen = pixels[..., :3].copy()
    seen[0] = 255
    lying, exif = Image.fromarray(random_bytes(8, 8, 3, seed=1)), Image.Exif()
    exif[0x0112] = 6
    palette = Image.fromarray(pixels[..., :3]).quantize(16)
    grey = Image.fromarray(pixels[..., 0])
    with_alpha = Image.merge("LA", (grey, Image.fromarray(pixels[..., 3])))
    own_images(tmp_path, a=(pixels, ".png", {}), b=(with_alpha, ".png", {}),
               c=(palette, ".png", {"transparency": 3}), d=(palette, ".gif", {"transparency": 3}),
               e=(grey, ".png", {"transparency": int(pixels[1, 1, 0])}), f=(lying, ".png", {"exif": exif}),
               g=(np.dstack([pixels[..., :3], np.full((8, 8), 255, np.uint8)]), ".png", {}))
    keyed = np.array(palette.convert("RGB"))
    keyed[np.array(palette) == 3] = 255
    clear = np.where(pixels[..., :1] == pixels[1, 1, 0], 255, pixels[..., :1]).repeat(3, 2)
    expected = [seen, seen[..., :1].repeat(3, 2), keyed, keyed, clear, np.rot90(lying, -1), pixels[..., :3]]
    assert np.array_equal(read_bytes(tmp_path, res=8).permute(0, 2, 3, 1), np.stack(expected))
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "10 images are transparent, laid over white (" in said
    assert "2 images are rotated as EXIF says (" in said


def test_what_lies_deeper_is_read_and_what_is_left_out_is_said(tmp_path, capsys):
    own_images(tmp_path, a=(random_bytes(8, 8, 3), ".gif", {}), b=(random_bytes(8, 8, 3), ".jfif", {"format": "JPEG"}))
    train = tmp_path / "train"
    (train / "a" / "deeper" / "still").mkdir(parents=True)
    for place in ("deeper/still/c.JPG", "deeper/d.png", ".hidden.png"):
        write_image(train / "a" / place, random_bytes(8, 8, 3))
    write_image(train / "loose.png", random_bytes(8, 8, 3))
    (train / "a" / "linked.png").symlink_to(train / "a" / "deeper" / "d.png")
    (train / "a" / "broken.png").symlink_to("nothing")
    (train / "a" / "self.png").symlink_to("self.png")
    (train / "a" / "deeper" / "up").symlink_to("..")
    (train / "a" / "x.txt").write_text("")
    (train / "a" / "y.txt").write_text("")
    os.mkfifo(train / "a" / "pipe.png")
    (tmp_path / "val").mkdir()
    assert len(read_bytes(tmp_path)) == 5
    said = capsys.readouterr().err
    assert "note: ImageFolder: 7 files are left out: 2 × broken link, 2 × .txt," in said
    assert f"note: ImageFolder: {tmp_path / 'val'} is not used, since test/ exists" in said
    for name in ("a/deeper/d.png", "a/linked.png"):
        (train / name).unlink()
        (train / name).write_bytes(b"")
    refused("a/deeper/d.png is not a readable image.*and 1 other file: .*a/linked.png", "ImageFolder", tmp_path)


def test_grey_pictures_that_are_wider_than_high_from_experts_to_export(tmp_path, call):
    for split, count in (("train", 6), ("test", 2)):
        for c in range(2):
            for number in range(count):
                pixels = random_bytes(16, 30, seed=number) // 2 + np.uint8(100) * (np.arange(30) // 15 == c)
                write_image(tmp_path / split / str(c) / f"{number}.png", pixels.astype(np.uint8))
    common = ["--dataset=ImageFolder", f"--data_path={tmp_path}", "--res=8x12", "--model=ConvNetD1W4", "--device=cpu",
              "--zca"]
    call(REPOSITORY / "buffer" / "buffer_FTD.py", *common, "--train_epochs=2", "--num_experts=1", "--rho_max=0.01",
         "--rho_min=0.01", f"--buffer_path={tmp_path}/buffer")
    call(REPOSITORY / "distill" / "DATM.py", "--cfg", REPOSITORY / "configs" / "MiniFashion" / "ConvIN" / "IPC1.yaml",
         *common, "--Iteration=2", "--eval_it=2", "--expert_epochs=1", "--max_start_epoch=1", "--syn_steps=2",
         "--current_max_start_epoch=1", "--num_eval=1", "--epoch_eval_train=1", f"--buffer_path={tmp_path}/buffer",
         f"--log_path={tmp_path}/log")
    made, = (tmp_path / "log").glob("**/Normal/distilled.safetensors")
    call(REPOSITORY / "distill" / "evaluation.py", *common, f"--data_dir={made}", "--num_eval=1",
         "--epoch_eval_train=1")
    call(REPOSITORY / "scripts" / "export.py", made, f"--png={tmp_path}/png")
    with Image.open(tmp_path / "png" / "0" / "00.png") as picture:
        assert (picture.size, picture.mode) == ((12, 8), "L")
    done = call(REPOSITORY / "distill" / "baseline.py", *common, "--res=8x", expect=2)
    assert "--res 8x: it must be a number of pixels, or height and width, such as 32x48" in done.stderr


def test_a_format_that_starts_a_program_is_no_image(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    own_images(tmp_path, a=(random_bytes(8, 8, 3), ".png", {"format": "EPS"}))
    refused("a.png is not a readable image", "ImageFolder", tmp_path)
    assert not (tmp_path / "started").exists()


def test_large_and_long_pictures(tmp_path, monkeypatch, recwarn):
    strip = random_bytes(1, 40_000, 3)
    own_images(tmp_path, a=(strip, ".png", {}))
    monkeypatch.setattr(image_files, "ORDINARY", 2**17)
    long = read_bytes(tmp_path)
    monkeypatch.undo()
    short = read_bytes(tmp_path)
    assert (short - long).abs().max() <= 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    assert torch.equal(read_bytes(tmp_path), short) and not len(recwarn)
    monkeypatch.setattr(image_files, "LARGE", 40_000)
    monkeypatch.setattr(image_files, "available", lambda: 10_000)
    refused("a.png has 40000×1 pixels and needs .*GiB of memory to be read", "ImageFolder", tmp_path)
    assert Image.MAX_IMAGE_PIXELS == 5


def test_image_folder_of_one_colour(tmp_path):
    for split in ("train", "test"):
        write_image(tmp_path / split / "black" / "1.png", np.zeros((8, 8, 3), dtype=np.uint8))
    assert load_dataset("ImageFolder", tmp_path).train_images.abs().max() == 0


def test_wrong_image_folders(tmp_path):
    refused(r"needs train/<class>.*does not exist", "ImageFolder", tmp_path / "missing")
    write_image(tmp_path / "train" / "cat" / "1.png", random_bytes(8, 8, 3))
    refused(r"needs train/<class>.*it holds train\)", "ImageFolder", tmp_path)
    (tmp_path / "val").mkdir()
    refused(r"val has no folder for any class \(it holds nothing\)", "ImageFolder", tmp_path)
    write_image(tmp_path / "val" / "dog" / "1.png", random_bytes(8, 8, 3))
    refused("train has no images of dog", "ImageFolder", tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    refused("no image file in .*dog", "ImageFolder", tmp_path)
    write_image(tmp_path / "train" / "dog" / "1.png", random_bytes(8, 8, 3))
    refused("the test or val folder has no images of cat", "ImageFolder", tmp_path)


def test_too_many_images_for_the_memory(tmp_path, monkeypatch):
    """They go into a temporary file that needs no cleaning up; refused if the disk has no room either."""
    write_tiny(tmp_path)
    expected = load_dataset("Tiny", tmp_path)
    monkeypatch.setattr(memory, "available", lambda device=None: 10_000)
    mapped = load_dataset("Tiny", tmp_path)
    assert torch.equal(mapped.train_images, expected.train_images) and mapped.fingerprint == expected.fingerprint
    assert f"{cache_folder()}/" in Path("/proc/self/maps").read_text() and not [*cache_folder().iterdir()]
    monkeypatch.setattr(memory, "_free_on_disk", lambda: 100_000)
    refused(r"6 images of 3×64×64.*GiB is available.*on the disk of", "Tiny", tmp_path)
    with pytest.raises(UserError, match="cannot hold them.*DATM_CACHE"):
        memory.empty_on_host((2**50,))


def test_a_jobs_limit_counts(tmp_path):
    """Memory limits as set by Slurm and systemd: cgroups of versions 1 and 2, including those of parent groups."""
    files = {"slurm/memory.max": "max", "slurm/memory.current": "9",
             "slurm/job/memory.max": "1000", "slurm/job/memory.current": "600", "slurm/job/memory.stat":
             "anon 1\ninactive_file 100", "memory/job/memory.limit_in_bytes": "2000",
             "memory/job/memory.usage_in_bytes": "500", "memory/job/memory.stat":
             "inactive_file 1\ntotal_inactive_file 50", "groups": "4:memory:/job/step\n2:cpu:/slurm/job\n0::/slurm/job"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert list(memory._left_in_groups(tmp_path, tmp_path / "groups")) == [1550, 500]


def test_a_system_that_tells_no_peak_gives_the_one_since_the_start(monkeypatch):
    """As some containers' /proc/self/status."""
    monkeypatch.setattr(memory, "_bytes_in", lambda file, key: None)
    assert 2**20 < memory.reset_peak(torch.device("cpu")) <= memory.peak(torch.device("cpu"))


@pytest.mark.parametrize("allocator, free", [("native", 106), ("cudaMallocAsync", 100)])
def test_the_free_memory_of_a_gpu_is_known_with_any_allocator(monkeypatch, allocator, free):
    """With cudaMallocAsync torch refuses to say what its blocks hold."""
    def snapshot():
        if allocator == "cudaMallocAsync":
            raise RuntimeError("Calling snapshot with backend:cudaMallocAsync is not meaningful")
        return [{"device": 0, "segment_pool_id": (0, pool), "total_size": 8, "allocated_size": 2} for pool in (0, 1)]

    for name, replaced in (("empty_cache", lambda: None), ("memory_snapshot", snapshot),
                           ("mem_get_info", lambda device: (100, 200)), ("get_allocator_backend", lambda: allocator)):
        monkeypatch.setattr(torch.cuda, name, replaced)
    assert memory.available(torch.device("cuda:0")) == free


@pytest.fixture
def imagenet(tmp_path):
    """Imagewoof's ten folders and another class's; two training images and one validation image per class."""
    for c, wnid in enumerate(image_folders.IMAGENET_SUBSETS["imagewoof"].split()):
        for split, file, value in (("train", "a.JPEG", c), ("train", "b.JPEG", 0), ("val", "c.JPEG", 9)):
            write_image(tmp_path / split / wnid / file, np.full((20, 30, 3), value, dtype=np.uint8))
    (tmp_path / "train" / "n01440764").mkdir()
    return tmp_path


def test_imagenet_subset(imagenet):
    data = load_dataset("ImageNet", imagenet, subset="imagewoof", res=16)
    assert data.classes == tuple(image_folders.IMAGENET_SUBSETS["imagewoof"].split())
    assert data.train_images.shape == (20, 3, 16, 16) and data.test_images.shape == (10, 3, 16, 16)
    first = data.space.to_pixels(data.train_images)[::2, 0, 0, 0] * 255
    assert first.round().int().tolist() == list(range(10))
    assert data.train_labels.tolist() == [c for c in range(10) for _ in range(2)]
    assert load_dataset("ImageNet", imagenet, subset="imagewoof").image_size == (128, 128)


def test_wrong_imagenet(imagenet):
    refused("unknown ImageNet subset 'imagewof'; did you mean 'imagewoof'", "ImageNet", imagenet, subset="imagewof")
    refused("train has no folder for n02102040, .* and 6 more .*expected the ten WordNet ids of imagenette", "ImageNet",
            imagenet)
    (imagenet / "train" / "n02111889" / "a.JPEG").unlink()
    (imagenet / "train" / "n02111889" / "b.JPEG").rename(imagenet / "train" / "n02111889" / "b.heic")
    refused("no image file in .*n02111889 .*left out: 1 × .heic", "ImageNet", imagenet, subset="imagewoof")
    shutil.rmtree(imagenet / "train" / "n02111889")
    refused("train has no folder for n02111889 ", "ImageNet", imagenet, subset="imagewoof")
    refused("no folder for .*does not exist", "ImageNet", imagenet / "nothing")


def test_imagenet_subsets_are_in_the_published_order():
    """The published code gives each class as its position among the thousand sorted WordNet ids."""
    published = {
        "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
        "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
        "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
        "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
        "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
        "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11)}
    assert list(image_folders.IMAGENET_SUBSETS) == list(published)
    for subset, positions in published.items():
        ids = image_folders.IMAGENET_SUBSETS[subset].split()
        assert len(set(ids)) == 10 and np.array_equal(np.argsort(ids), np.argsort(positions))
    every = hashlib.sha256(" ".join(image_folders.IMAGENET_SUBSETS.values()).encode())  # as compared with the lists
    assert every.hexdigest() == "168b55119fefaea105fc26ccc8db50ee32a4a03fac38afb0b4ac01904b4614be"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_imagenet_1k(tmp_path, dtype):
    kept = {}
    for split in ("train", "val"):
        for wnid in ("n02", "n01"):
            tensor = torch.from_numpy(random_bytes(3, 64, 64, seed=len(kept)))
            kept[split, wnid] = tensor if dtype == torch.uint8 else (tensor / 255).to(dtype)
            (tmp_path / split / wnid).mkdir(parents=True)
            torch.save(kept[split, wnid], tmp_path / split / wnid / "0.pt")
    data = load_dataset("ImageNet1K", tmp_path)
    scale = 255 if dtype == torch.uint8 else 1
    expected = torch.stack([kept["train", "n01"].float(), kept["train", "n02"].float()]) / scale
    torch.testing.assert_close(data.space.to_pixels(data.train_images), expected, rtol=0, atol=1e-6)
    assert data.train_images.dtype == torch.float32 and data.classes == ("n01", "n02")

    wrong = tmp_path / "train" / "n02" / "0.pt"
    mixed = (kept["train", "n02"].float() / 255) if dtype == torch.uint8 else torch.zeros(3, 64, 64, dtype=torch.uint8)
    for value, match in ((torch.zeros(3, 32, 32), r"a tensor of shape \[3, 32, 32\], expected"), ([1], "holds list"),
                         (torch.full((3, 64, 64), 2.0), "from 2 to 2, expected"), (mixed, "other files do not")):
        torch.save(value, wrong)
        refused(match, "ImageNet1K", tmp_path)
    wrong.write_bytes(b"cut")
    refused("0.pt", "ImageNet1K", tmp_path)
    refused("has no folder for any class", "ImageNet1K", tmp_path / "missing")


# --- for all ---


def test_unknown_names_and_values():
    refused("unknown dataset 'FashonMNIST'; did you mean 'FashionMNIST'.*MiniFashion", "FashonMNIST", "")


def test_hold_out():
    whole, held = load_dataset("MiniFashion", ""), load_dataset("MiniFashion", "", val_fraction=0.1)
    assert held.train_labels.bincount().tolist() == [540] * 10 and held.test_labels.bincount().tolist() == [60] * 10
    assert held.fingerprint != whole.fingerprint
    rows = {image.numpy().tobytes() for image in whole.train_images}
    parts = [{image.numpy().tobytes() for image in images} for images in (held.train_images, held.test_images)]
    assert parts[0] | parts[1] == rows and not parts[0] & parts[1]  # a partition of the training images
    again = load_dataset("MiniFashion", "", val_fraction=0.1)
    assert torch.equal(again.test_images, held.test_images) and again.fingerprint == held.fingerprint
    torch.manual_seed(1)
    assert load_dataset("MiniFashion", "", val_fraction=0.1).fingerprint == held.fingerprint


def test_held_out_images_are_not_copied_into_a_memory_that_is_too_small(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "empty_on_host",
                        lambda *given: asked.append(given) or torch.empty(given[0], dtype=given[1]))
    train = Split(torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1), torch.zeros(40, dtype=torch.long))
    remaining, held = datasets._hold_out(train, 0.25, ("a",))
    assert asked == [((30, 1, 1, 1), torch.uint8), ((10, 1, 1, 1), torch.uint8)]
    assert sorted([*remaining.images.flatten().tolist(), *held.images.flatten().tolist()]) == list(range(40))


def test_hold_out_lives_in_the_space_of_the_whole_training_set(toy):
    """Experts and sets made with a hold-out can thus be used with and without it."""
    held, whole = (load_dataset("MiniFashion", "", zca=True, val_fraction=fraction) for fraction in (0.5, 0))
    assert torch.equal(held.space.whitening.transform, whole.space.whitening.transform)
    assert torch.isin(held.train_images.sum((1, 2, 3)), whole.train_images.sum((1, 2, 3))).float().mean() > 0.99
    held, whole = (load_dataset("ImageFolder", toy.data, res=8, val_fraction=fraction) for fraction in (0.5, 0))
    assert held.space == whole.space  # mean and deviation are measured


def test_hold_out_is_a_random_choice():
    train = Split(torch.arange(40).view(40, 1, 1, 1), torch.zeros(40, dtype=torch.long))
    _, held = datasets._hold_out(train, 0.5, ("a",))
    assert len(held.labels) == 20 and not torch.equal(held.images.flatten(), torch.arange(20))


def test_hold_out_of_small_classes():
    train = Split(torch.arange(4).view(4, 1, 1, 1), torch.tensor([0, 0, 1, 1]))
    remaining, held = datasets._hold_out(train, 0.1, ("a", "b"))
    assert remaining.labels.tolist() == held.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="all 2 training images of class a"):
        datasets._hold_out(train, 0.9, ("a", "b"))


def test_to_device():
    data = load_dataset("MiniFashion", "", zca=True)
    moved = data.to("meta")
    assert moved.train_images.is_meta and moved.test_labels.is_meta and moved.device.type == "meta"
    assert moved.space.whitening is data.space.whitening  # large and seldom needed, so not moved
    assert not data.train_images.is_meta and moved.fingerprint == data.fingerprint and moved.classes == data.classes


@pytest.mark.cuda
@pytest.mark.parametrize("zca", [False, True])
def test_on_the_gpu(zca, monkeypatch):
    """Training images stay on the host and are converted on the GPU a few at a time, when they are asked for."""
    monkeypatch.setattr("utils.data.zca.CHUNK", 256)
    here = load_dataset("MiniFashion", "", zca=zca)
    torch.eye(2, device="cuda").mm(torch.eye(2, device="cuda"))  # the library allocates its workspace once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    there = load_dataset("MiniFashion", "", zca=zca, device="cuda")
    held, most = (each() - before for each in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated))
    assert held < 2 * there.test_images.nbytes
    assert zca or most < held + here.train_images.nbytes / 2  # with zca, products take memory too
    assert there.class_indices(0).is_cuda and there.fingerprint == here.fingerprint
    moved, some = there.to("cuda"), torch.tensor([5, 3000]).cuda()
    assert there.train_images[some].is_cuda and torch.equal(there.train_images[some], moved.train_images[some])
    torch.testing.assert_close(there.train_images.to("cpu"), here.train_images, rtol=0, atol=1e-4)
    there_pixels, here_pixels = (each.space.to_pixels(each.test_images).cpu() for each in (there, here))
    torch.testing.assert_close(there_pixels, here_pixels, rtol=0, atol=1e-4)


def test_unreadable_folder_is_one_line(ordinary_user, tmp_path):
    (tmp_path / "train").mkdir(mode=0)
    with ordinary_user():
        refused("cannot be read", "ImageNet", tmp_path)


def test_importing_is_light(tmp_path):
    """MiniFashion can be loaded and whitened on a machine without these packages."""
    code = ("import sys; from utils.data.datasets import load_dataset; load_dataset('MiniFashion', '', zca=True);"
            "sys.exit(any(name in sys.modules for name in ('torchvision', 'kornia', 'scipy')))")
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False,
                          env=os.environ | {"DATM_CACHE": str(tmp_path)}).returncode == 0
