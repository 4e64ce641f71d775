"""ZCA whitening: fitted once by kornia, kept on disk, applied and inverted in chunks."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import cache_folder, load, load_tensors, reading, save, save_tensors
from utils.memory import available

EPS = 0.1  # the published ridge, added to the eigenvalues of the covariance
CHUNK = 4096  # images whitened at a time: bounds the extra memory of `apply`, large enough for full matmul speed
ONE_THREAD = 1024  # dimensions up to which a fit runs on one thread: see `_threads`
LARGE = 4096  # dimensions from which a fit is announced, since it takes minutes
BESIDE = "whitening.safetensors"  # a whitening that travels with a set, in its folder


@dataclasses.dataclass(frozen=True, eq=False)
class Whitening:
    """x ↦ (x − μ) T and back, on images flattened to rows of D = C·H·W values in [0, 1].

    T = U (S + eps)^(−1/2) Uᵀ with U, S the eigenvectors and eigenvalues of the training images' covariance;
    the inverse is U (S + eps)^(1/2) Uᵀ. All float32.
    """

    mean: Tensor  # [1, D]
    transform: Tensor  # [D, D]
    fitted_inverse: Tensor | None = None  # [D, D]; None: computed from T where it is needed
    fingerprint: str = ""  # of the training images and eps, to which it was fitted; empty where that is not known

    @functools.cached_property
    def inverse(self) -> Tensor:
        """[D, D]; T is symmetric and its eigenvalues are far from 0, so float64 gives it back to 1e-5."""
        if self.fitted_inverse is not None:
            return self.fitted_inverse
        return torch.linalg.inv(self.transform.double()).float()

    def apply(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] → whitened images, same shape."""
        mean, transform = self.mean.to(images.device), self.transform.to(images.device)
        return _by_chunks(images, lambda rows: (rows - mean) @ transform)

    def invert(self, images: Tensor) -> Tensor:
        """Whitened images [N, C, H, W] → pixel space, not clipped, same shape."""
        mean, inverse = self.mean.to(images.device), self.inverse.to(images.device)
        return _by_chunks(images, lambda rows: (rows @ inverse).add_(mean))

    def energy(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] → the squared norm [N] of each less the mean."""
        mean = self.mean.to(images.device)
        return torch.cat([(some.flatten(1) - mean).square().sum(1) for some in images.split(CHUNK)])

    def pulled_back(self, images: Tensor) -> Tensor:
        """Pixels [N, C, H, W] → [N, D] whose product with a whitened image a is ⟨`invert`(a) − μ, image − μ⟩."""
        return (images.flatten(1) - self.mean.to(images.device)) @ self.inverse.to(images.device).T

    def to(self, device: torch.device | str) -> "Whitening":
        """The same whitening on `device`; tensors already there are not copied."""
        inverse = None if self.fitted_inverse is None else self.fitted_inverse.to(device)
        return Whitening(self.mean.to(device), self.transform.to(device), inverse, self.fingerprint)

    def save(self, path: Path) -> None:
        """Writes what `KeptWhitening` reads: μ and T."""
        save_tensors(path, {"mean": self.mean, "transform": self.transform}, {"fingerprint": self.fingerprint})


class KeptWhitening(NamedTuple):
    """A whitening that is looked for when it is needed, by its fingerprint: it is far larger than a set."""

    fingerprint: str
    folder: Path  # of the set, which may hold it

    def read(self, dimension: int) -> Whitening:
        """From `whitening.safetensors` in the folder, or the disk cache.

        Args:
            dimension: D, of the set's images.

        Raises:
            UserError: it is in neither, or damaged.
        """
        beside = self.folder / BESIDE
        if beside.is_file():
            with reading(beside, "delete it, or copy it again"):
                tensors, about = load_tensors(beside)
                whitening = Whitening(tensors["mean"], tensors["transform"], fingerprint=about["fingerprint"])
                if whitening.fingerprint == self.fingerprint:
                    if not _fits([whitening.mean, whitening.transform], dimension):
                        raise ValueError("it does not fit the images")
                    return whitening
        kept = _read(_path(self.fingerprint), self.fingerprint, dimension, None)
        if kept is None:
            raise UserError(f"the whitening of this set, {self.fingerprint}, is neither in {cache_folder()} nor in "
                            f"{beside}; run distill/evaluation.py once on the set with its dataset, or write it where "
                            "the set was made with scripts/export.py SET --whitening")
        return kept


def to_unit(images: Tensor, device: torch.device | str) -> Tensor:
    """uint8 in 0 … 255 or float32 in [0, 1] → float32 in [0, 1] on `device`."""
    if images.dtype == torch.uint8:
        return images.to(device).to(torch.float32).div_(255)
    return images.to(device, torch.float32)


@torch.no_grad()
def _by_chunks(images: Tensor, change) -> Tensor:
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for start in range(0, len(images), CHUNK):
        rows = images[start:start + CHUNK].flatten(1)  # [n ≤ CHUNK, D]
        out[start:start + CHUNK] = change(rows).view(-1, *images.shape[1:])
    return out


def fit(images: Tensor, cache_key: str) -> Whitening:
    """The whitening of a training set, from the disk cache or fitted by `kornia.enhance.ZCAWhitening`.

    The result lies on the CPU and comes from the CPU, so that every machine whitens alike. It is kept as
    `<cache folder>/zca_<key>.pt`; a fit of another kornia version than the one installed is renewed, and
    without kornia a kept fit of any version is used.

    Args:
        images: the whole training set [N, C, H, W], uint8 in 0 … 255 or float32 in [0, 1].
        cache_key: what identifies these images' content (a hash of the raw images).

    Raises:
        UserError: neither kornia nor a kept fit; fewer than two images; a fit that would not fit in memory.
    """
    dimension = images[0].numel()
    fingerprint = hashlib.sha256(f"{cache_key} eps={EPS}".encode()).hexdigest()[:32]
    path = _path(fingerprint)
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("kornia")
    kept = _read(path, fingerprint, dimension, version)
    if kept is not None:
        return kept
    if version is None:
        raise UserError(f"zca needs kornia to fit the whitening, kornia is not installed and no earlier fit is kept at "
                        f"{path}; install it with: pip install kornia (or run without zca)")
    if len(images) < 2:
        raise UserError(f"zca needs at least two training images, got {len(images)}; add images or run without zca")
    _refuse_or_announce(len(images), dimension)

    try:
        from kornia.enhance import ZCAWhitening  # here, not above: a second to import, not needed with a kept fit
    except ImportError as error:
        raise UserError(f"kornia {version} cannot be imported ({error}); install one that matches torch "
                        f"{torch.__version__}") from error
    with _threads(1 if dimension <= ONE_THREAD else torch.get_num_threads()):
        fitted = ZCAWhitening(eps=EPS, compute_inv=True).fit(to_unit(images, "cpu"))
    whitening = Whitening(fitted.mean_vector, fitted.transform_matrix, fitted.transform_inv, fingerprint)
    try:
        save({"mean": whitening.mean, "transform": whitening.transform, "inverse": whitening.inverse, "eps": EPS,
              "kornia": version}, path)
    except UserError as error:
        print(f"warning: the ZCA fit is not kept for the next run: {error} (DATM_CACHE names another folder)",
              file=sys.stderr)
    return whitening


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """The SVD's many short parallel sections wait for each other: in 784 dimensions it takes 0.3 s on one thread, and
    16 s on two where another process keeps the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _path(fingerprint: str) -> Path:
    """Where a fit is kept."""
    return cache_folder() / f"zca_{fingerprint}.pt"


def _read(path: Path, fingerprint: str, dimension: int, version: str | None) -> Whitening | None:
    """The kept fit, or None where there is none, it is damaged, or kornia has since changed."""
    if not path.is_file() or not path.stat().st_size:
        return None
    with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):
        kept = load(path, "ZCA cache file")
        tensors = [kept[name] for name in ("mean", "transform", "inverse")]
        if _fits(tensors, dimension) and version in (None, kept["kornia"]):
            return Whitening(*tensors, fingerprint)
    return None


def _fits(tensors: list[Tensor], dimension: int) -> bool:
    """Whether these can be μ, T and T's inverse, as far as they are given."""
    shapes = [(1, dimension), (dimension, dimension), (dimension, dimension)]
    return [tuple(tensor.shape) for tensor in tensors] == shapes[:len(tensors)] and all(
        tensor.isfinite().all() for tensor in tensors)


def _refuse_or_announce(count: int, dimension: int) -> None:
    """Peak memory of kornia's fit: a centred copy of the images, and a float64 SVD of the [D, D] covariance."""
    need = 4 * count * dimension + 64 * dimension**2  # 64 bytes: measured at D = 3072, mostly the SVD's work space
    free = available()
    if need > free:
        raise UserError(f"zca of {count} images of {dimension} values needs about {need / 2**30:.1f} GiB of memory, "
                        f"{free / 2**30:.1f} GiB is available; use a machine with more, smaller images (res), "
                        "or run without zca")
    if dimension > LARGE:
        minutes = 0.25 * (dimension / 3072) ** 3  # 3072 dimensions take 10 to 60 s
        print(f"fitting ZCA in {dimension} dimensions: about {minutes:.0f} minutes and {need / 2**30:.1f} GiB, once "
              "(the result is kept)", file=sys.stderr)
