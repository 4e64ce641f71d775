"""Whitening equals kornia's, inverts, and survives the cache folder's troubles."""

import builtins
import importlib.metadata
import math

import pytest
import torch

from utils.data import zca
from utils.errors import UserError
from utils.memory import available


@pytest.fixture
def images():
    """Smooth random images [300, 3, 6, 5] in [0, 1]: correlated, as pictures are."""
    noise = torch.rand(300, 3, 8, 7, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DATM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_kornia(monkeypatch):
    """As on a machine where kornia is not installed."""
    real_import, real_version = builtins.__import__, importlib.metadata.version

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == "kornia":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    def version(name):
        if name == "kornia":
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(importlib.metadata, "version", version)


def test_equals_kornia_forward_and_inverse(images, monkeypatch):
    kornia = pytest.importorskip("kornia")
    reference = kornia.enhance.ZCAWhitening(eps=0.1, compute_inv=True).fit(images)
    monkeypatch.setattr(zca, "CHUNK", 128)  # 300 images: two whole pieces and a part
    ours = zca.fit(images, "a")
    white = ours.apply(images)
    assert white.shape == images.shape and white.dtype == torch.float32
    torch.testing.assert_close(white, reference(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.invert(white), reference.inverse_transform(white), rtol=0, atol=1e-5)


def test_equals_the_definition(images):
    """T = U (S + eps)^(−1/2) Uᵀ of the covariance with N − 1, in float64."""
    rows = images.double().flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    transform = vectors @ torch.diag((values + 0.1).rsqrt()) @ vectors.T
    expected = (rows - rows.mean(0)) @ transform
    torch.testing.assert_close(zca.fit(images, "a").apply(images).flatten(1).double(), expected, rtol=0, atol=1e-5)


def test_invert_undoes_apply(images):
    whitening = zca.fit(images, "a")
    torch.testing.assert_close(whitening.invert(whitening.apply(images)), images, rtol=0, atol=1e-5)
    unseen = torch.rand(7, 3, 6, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(whitening.invert(whitening.apply(unseen)), unseen, rtol=0, atol=1e-5)
    assert whitening.apply(images[:0]).shape == (0, 3, 6, 5)


def test_input_and_threads_are_left_alone(images):
    before, threads = images.clone(), torch.get_num_threads()
    whitening = zca.fit(images, "a")
    whitening.invert(whitening.apply(images))
    assert torch.equal(images, before) and torch.get_num_threads() == threads


def test_a_kept_fit_is_read_back_exactly_without_kornia(images, cache, request):
    fitted = zca.fit(images, "a")
    assert len(list(cache.iterdir())) == 1
    request.getfixturevalue("without_kornia")
    again = zca.fit(images, "a")
    for one, other in ((fitted.mean, again.mean), (fitted.transform, again.transform), (fitted.inverse, again.inverse)):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match=r"kornia is not installed.*pip install kornia"):
        zca.fit(images, "other images")


def test_another_kornia_version_is_fitted_anew(images, cache, monkeypatch):
    zca.fit(images, "a")
    path, = cache.iterdir()
    kept = torch.load(path)
    torch.save({**kept, "kornia": "0.0.1", "transform": torch.zeros_like(kept["transform"])}, path)
    assert zca.fit(images, "a").transform.abs().max() > 0
    assert torch.load(path)["kornia"] == importlib.metadata.version("kornia")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "shape", "not a number", "list", "key"])
def test_a_damaged_file_is_fitted_anew(images, cache, damage):
    right = zca.fit(images, "a").transform
    path, = cache.iterdir()
    kept, content = torch.load(path), path.read_bytes()
    wrong = {
        "cut": lambda: path.write_bytes(content[: len(content) // 2]),
        "text": lambda: path.write_text("hello"),
        "empty": lambda: path.write_bytes(b""),
        "shape": lambda: torch.save({**kept, "mean": kept["mean"][:, 1:]}, path),
        "not a number": lambda: torch.save({**kept, "inverse": kept["inverse"] * float("nan")}, path),
        "list": lambda: torch.save([1, 2], path),
        "key": lambda: torch.save({"mean": kept["mean"]}, path),
    }
    wrong[damage]()
    assert torch.equal(zca.fit(images, "a").transform, right)
    assert torch.load(path)["mean"].shape == (1, 90)


def test_a_folder_that_cannot_be_written_warns_once(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DATM_CACHE", str(tmp_path / "file" / "cache"))  # below a file: not even root can write there
    assert zca.fit(images, "a").mean.shape == (1, 90)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning:") and "DATM_CACHE" in lines[0]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DATM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert zca.cache_folder() == tmp_path / "xdg" / "datm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zca.cache_folder() == tmp_path / ".cache" / "datm"


def test_too_large_is_refused_and_large_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(zca, "available", lambda: 2**30)
    with pytest.raises(UserError, match=r"12288 values needs about .* GiB"):
        zca._refuse_or_announce(100, 12288)
    monkeypatch.setattr(zca, "available", lambda: 2**40)
    zca._refuse_or_announce(100, 12288)
    assert "12288 dimensions" in capsys.readouterr().err
    monkeypatch.setattr(zca, "available", lambda: math.inf)
    zca._refuse_or_announce(10, 784)
    assert capsys.readouterr().err == ""


def test_one_image_is_refused(images):
    with pytest.raises(UserError, match="at least two"):
        zca.fit(images[:1], "a")


def test_available_memory_is_plausible():
    assert 2**20 < available() < 2**50 or available() == math.inf


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_the_gpu(images):
    whitening = zca.fit(images.cuda(), "a")
    assert whitening.mean.device.type == "cpu"
    white = whitening.to("cuda").apply(images.cuda())
    torch.testing.assert_close(white.cpu(), whitening.apply(images), rtol=0, atol=1e-5)
