"""Whitening equals kornia's, can be inverted, and survives problems with the cache folder."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from utils.data import zca
from utils.data.datasets import DATASETS
from utils.data.watching import unwatched
from utils.errors import UserError
from utils.files import REPOSITORY


@pytest.fixture
def images():
    """Smooth random images [300, 3, 6, 5] in [0, 1]: correlated, as pictures are."""
    noise = torch.rand(300, 3, 8, 7, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DATM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("count", [6000, 500])
def test_equals_kornia_on_real_images_forward_and_inverse(count, monkeypatch):
    """With more and with fewer images than the 784 dimensions; also on images that it was not fitted to.

    kornia gets float64: it computes in its input's type, and a float32 covariance alone would cost 1.3e-5.
    """
    kornia = pytest.importorskip("kornia")
    train, test, *_ = DATASETS["MiniFashion"](None, "", None, unwatched)
    reference = kornia.enhance.ZCAWhitening(eps=0.1, compute_inv=True).fit(train.images[:count].double() / 255)
    monkeypatch.setattr(zca, "CHUNK", 512)  # whole chunks and a partial one
    monkeypatch.setattr(zca, "BLOCK", 300)
    ours = zca.fit(train.images[:count], "a")
    for images in (train.images[:count].float() / 255, test.images[:500].float() / 255):
        white = ours.apply(images)
        assert white.shape == images.shape and white.dtype == torch.float32
        torch.testing.assert_close(white.double(), reference(images.double()), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.invert(white).double(), reference.inverse_transform(white.double()), rtol=0,
                                   atol=1e-5)


@pytest.mark.parametrize("count", [300, 91, 90, 89, 2])
def test_equals_the_definition(images, count):
    """T = U (S + eps)^(−1/2) Uᵀ of the covariance with N − 1, in float64; with more and fewer images than the 90
    dimensions, one image twice."""
    images = torch.cat([images[:count - 1], images[:1]])
    rows = images.double().flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    transform, inverse = (vectors @ torch.diag((values + 0.1)**power) @ vectors.T for power in (-0.5, 0.5))
    fitted = zca.fit(images, "a")
    torch.testing.assert_close(fitted.transform.double(), transform, rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.inverse.double(), inverse, rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.mean.double(), rows.mean(0, keepdim=True), rtol=0, atol=1e-6)


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


def test_a_kept_fit_is_used_as_it_is_whoever_made_it(images, cache):
    """A run that began with kornia's whitening can thus resume in the same space."""
    fitted = zca.fit(images, "a")
    path, = cache.iterdir()
    again = zca.fit(images, "a")
    for one, other in ((fitted.mean, again.mean), (fitted.transform, again.transform), (fitted.inverse, again.inverse)):
        assert torch.equal(one, other)
    kept = torch.load(path) | {"kornia": "0.0.1", "transform": torch.ones(90, 90)}
    torch.save(kept, path)
    before = path.read_bytes()
    assert torch.equal(zca.fit(images, "a").transform, kept["transform"]) and path.read_bytes() == before


def test_ctrl_c_ends_a_fit_at_once():
    """While its eigenproblem blocks in C, as LAPACK does: here on a lock that is never released."""
    code = ("import ctypes, torch; from utils.data import zca; from utils.program.entry import entry\n"
            "lib, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
            "lib.pthread_mutex_lock(lock)\n"
            "torch.linalg.eigh = lambda _: (print('in', flush=True), lib.pthread_mutex_lock(lock))\n"
            "entry(lambda: zca.fit(torch.rand(9, 1, 2, 2), 'a'))")
    fit = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert fit.stdout.readline() == "in\n"
        time.sleep(0.3)
        fit.send_signal(signal.SIGINT)
        out, error = fit.communicate(timeout=20)
    finally:
        fit.kill()
    assert fit.returncode == 130 and out == "" and "stopped by SIGINT" in error
    assert len(error.strip().splitlines()) == 1  # nothing about a remaining thread


def test_what_a_fit_raises_is_raised(images, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        zca.fit(images, "a")


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
    assert len(lines) == 1 and lines[0].startswith("note:") and "DATM_CACHE" in lines[0]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DATM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert zca.cache_folder() == tmp_path / "xdg" / "datm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zca.cache_folder() == tmp_path / ".cache" / "datm"


def test_too_large_is_refused(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(zca, "available", lambda device=None: 2**30)
    with pytest.raises(UserError, match=r"12288 values needs about .* GiB"):
        zca._place(100, 12288, cpu)
    monkeypatch.setattr(zca, "available", lambda device=None: 2**40)
    assert zca._place(15_000, 12288, cpu) == cpu


def test_the_gpu_fits_where_its_memory_is_large_enough(monkeypatch):
    gpu, free = torch.device("cuda:1"), {}
    monkeypatch.setattr(zca, "available", lambda device=None: free.get(device, 2**40))
    free[gpu] = 2**36
    assert zca._place(50_000, 3072, gpu) == gpu
    free[gpu] = 2**28
    assert zca._place(50_000, 3072, gpu) == torch.device("cpu")


def test_one_image_is_refused(images):
    with pytest.raises(UserError, match="at least two"):
        zca.fit(images[:1], "a")


@pytest.mark.cuda
def test_on_the_gpu(images):
    """Equal up to the rounding of float64 to float32."""
    here, whitening = zca.fit(images, "a"), zca.fit(images, "b", "cuda")
    assert whitening.mean.device.type == whitening.transform.device.type == "cpu"
    torch.testing.assert_close(whitening.transform, here.transform, rtol=1e-6, atol=1e-7)
    white = whitening.to("cuda").apply(images.cuda())
    torch.testing.assert_close(white.cpu(), whitening.apply(images), rtol=0, atol=1e-5)
