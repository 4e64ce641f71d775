"""ZCA whitening: fitted once, kept on disk, applied and inverted in chunks."""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from utils.data.watching import Watch, unwatched
from utils.errors import UserError, note
from utils.files import cache_folder, load, load_tensors, reading, save, save_tensors
from utils.memory import available

EPS = 0.1  # the published ridge, added to the eigenvalues of the covariance
CHUNK = 4096  # images at a time: bounds the extra memory, large enough for full matmul speed
BLOCK = 1024  # rows of a matrix at a time when rounding to float32 or copying from a GPU
EIGEN = 10  # an eigenproblem of size n takes as long as matrix products with EIGEN · n³ operations
BESIDE = "whitening.safetensors"  # a whitening stored in a distilled set's folder

Result = TypeVar("Result")


@contextlib.contextmanager
def _in_float32() -> Iterator[None]:
    """Keeps matrix products on a GPU in full float32 rather than TF32, whatever the run's precision."""
    products = torch.backends.cuda.matmul
    chosen, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        yield
    finally:
        products.fp32_precision = chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Whitening:
    """x ↦ (x − μ) T and back, on images flattened to rows of D = C·H·W values in [0, 1].

    T = U (S + eps)^(−1/2) Uᵀ with U, S the eigenvectors and eigenvalues of the training images' covariance;
    the inverse is U (S + eps)^(1/2) Uᵀ. All float32.
    """

    mean: Tensor  # [1, D]
    transform: Tensor  # [D, D]
    fitted_inverse: Tensor | None = None  # [D, D]; None: computed from T when needed
    fingerprint: str = ""  # of the training images and eps that it was fitted to; empty if unknown

    @functools.cached_property
    def inverse(self) -> Tensor:
        """[D, D]; T is symmetric and its eigenvalues are far from 0, so inverting in float64 is accurate to 1e-5."""
        if self.fitted_inverse is not None:
            return self.fitted_inverse
        return _interruptible(lambda: torch.linalg.inv(self.transform.double()).float())

    def apply(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] → whitened images, same shape."""
        mean, transform = self.mean.to(images.device), self.transform.to(images.device)
        return _by_chunks(images, lambda rows: (rows - mean) @ transform)

    def invert(self, images: Tensor) -> Tensor:
        """Whitened images [N, C, H, W] → pixel space, not clipped, same shape."""
        mean, inverse = self.mean.to(images.device), self.inverse.to(images.device)
        return _by_chunks(images, lambda rows: (rows @ inverse).add_(mean))

    def energy(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] → the squared norm [N] of each image minus the mean."""
        mean = self.mean.to(images.device)
        return torch.cat([(some.flatten(1) - mean).square().sum(1) for some in images.split(CHUNK)])

    @_in_float32()
    def pulled_back(self, images: Tensor) -> Tensor:
        """Pixels [N, C, H, W] → [N, D] whose dot product with a whitened image a is ⟨`invert`(a) − μ, image − μ⟩."""
        return (images.flatten(1) - self.mean.to(images.device)) @ self.inverse.to(images.device).T

    def to(self, device: torch.device | str) -> "Whitening":
        """The same whitening on `device`, without its fitted inverse; tensors already there are not copied."""
        return Whitening(self.mean.to(device), self.transform.to(device), fingerprint=self.fingerprint)

    def save(self, path: Path) -> None:
        """Writes μ and T to a file that `KeptWhitening` can read."""
        save_tensors(path, {"mean": self.mean, "transform": self.transform}, {"fingerprint": self.fingerprint})


class KeptWhitening(NamedTuple):
    """A whitening that is read only when needed, found by its fingerprint; it is far larger than a set."""

    fingerprint: str
    folder: Path  # of the set; it may hold the whitening

    def read(self, dimension: int, advice: str) -> Whitening:
        """The whitening, from `whitening.safetensors` in the folder or from the disk cache.

        Args:
            dimension: D, of the set's images.
            advice: what to do if it is in neither; for the message.

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
        kept = _read(_path(self.fingerprint), self.fingerprint, dimension)
        if kept is None:
            raise UserError(f"the whitening of this set, {self.fingerprint}, is neither in {cache_folder()} nor in "
                            f"{beside}; {advice}")
        return kept


def to_unit(images: Tensor, device: torch.device | str) -> Tensor:
    """uint8 in 0 … 255 or float32 in [0, 1] → float32 in [0, 1] on `device`."""
    if images.dtype == torch.uint8:
        return images.to(device).to(torch.float32).div_(255)
    return images.to(device, torch.float32)


def chunk_size(images: Tensor) -> int:
    """How many images are whitened at a time."""
    # Signals wait until a product ends: with many dimensions, take fewer images (a second or two on one core).
    return min(CHUNK, max(1, 2**36 // images[:1].numel()**2)) if len(images) else 1


@torch.no_grad()
@_in_float32()
def _by_chunks(images: Tensor, change) -> Tensor:
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    size = chunk_size(images)
    for part, place in zip(images.split(size), out.split(size)):
        place.copy_(change(part.flatten(1)).view_as(place))
    return out


class _Work:
    """The progress of a fit, in operations: written by the computing thread, read by the waiting one."""

    def __init__(self, total: float) -> None:
        self.total = total
        self._began = perf_counter()
        self._now = 0.0, 0.0, self._began  # operations done, those of the current part, and when it began

    @contextlib.contextmanager
    def part(self, size: float) -> Iterator[None]:
        """Counts `size` operations as done when the block ends."""
        done = self._now[0]
        self._now = done, size, perf_counter()
        yield
        self._now = done + size, 0.0, perf_counter()

    @property
    def done(self) -> float:
        """Operations done; within a part, where LAPACK reports nothing, extrapolated from the pace so far."""
        done, begun, since = self._now
        pace = done / max(since - self._began, 1e-9)
        return done + min(0.99 * begun, pace * (perf_counter() - since))


def fit(images: Tensor, cache_key: str, device: torch.device | str = "cpu", watch: Watch = unwatched) -> Whitening:
    """The whitening of a training set, from the disk cache or newly fitted.

    It equals `kornia.enhance.ZCAWhitening`'s except for kornia's float32 rounding of the covariance (1e-5), and is
    cached as `<cache folder>/zca_<key>.pt`; files of earlier versions are used as they are. The result is on the CPU,
    computed in float64 and rounded to float32, so that machines agree except in the last bit of some values.

    Args:
        images: the whole training set [N, C, H, W], uint8 in 0 … 255 or float32 in [0, 1].
        cache_key: identifies the content of these images (a hash of the raw images).
        device: where to compute if its memory suffices; else the CPU is used.
        watch: shows the progress.

    Raises:
        UserError: fewer than two images, or not enough memory for the fit.
    """
    dimension = images[0].numel()
    fingerprint = hashlib.sha256(f"{cache_key} eps={EPS}".encode()).hexdigest()[:32]
    path = _path(fingerprint)
    kept = _read(path, fingerprint, dimension)
    if kept is not None:
        return kept
    if len(images) < 2:
        raise UserError(f"zca needs at least two training images, got {len(images)}; add images or run without zca")
    device = _place(len(images), dimension, torch.device(device))
    work = _Work(_operations(len(images), dimension))
    with watch("fitting the whitening", work.total) as advance:
        shown = 0.0

        def show() -> None:
            nonlocal shown
            done = work.done
            advance(done - shown)
            shown = done

        whitening = Whitening(*_interruptible(lambda: _computed(images, device, work), show), fingerprint)
    try:
        save({"mean": whitening.mean, "transform": whitening.transform, "inverse": whitening.inverse, "eps": EPS}, path)
    except UserError as error:
        note(f"the ZCA fit is not kept for the next run: {error} (DATM_CACHE names another folder)")
    return whitening


def _interruptible(compute: Callable[[], Result], meanwhile: Callable[[], None] = lambda: None) -> Result:
    """Runs `compute` in another thread and returns or raises its outcome; calls `meanwhile` while it waits.

    LAPACK blocks its thread for minutes, in which Python would handle no signal. An exception that a signal raises in
    this thread ends the wait; the worker ends with the process.
    """
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(compute())
        except BaseException as error:
            outcome.set_exception(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while not wait([outcome], timeout=0.2).done:  # polls: the system may deliver a signal to another thread
            meanwhile()
    except BaseException as error:
        atexit.register(_leave, worker, 128 + getattr(error, "signal", signal.SIGINT))
        raise
    return outcome.result()


def _leave(worker: threading.Thread, code: int) -> None:
    """Exit hook while the worker is still in LAPACK: Python's normal shutdown would wait for it or crash."""
    if worker.is_alive():
        with contextlib.suppress(OSError, ValueError):  # the streams may be closed
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@torch.no_grad()
def _computed(images: Tensor, device: torch.device, work: _Work) -> tuple[Tensor, Tensor, Tensor]:
    """μ, T and T's inverse, float32 on the CPU, computed in float64 on `device`.

    With C the covariance (over N − 1), any B with C = BᵀB and BBᵀ = diag(S) gives any function of C as
    f(C) = f(0) I + Bᵀ diag((f(S) − f(0)) / S) B. With fewer images than dimensions, B has only N rows, and f(0) I
    covers the directions outside the images' span.
    """
    def rows(part: Tensor) -> Tensor:
        return to_unit(part, device).flatten(1).double()

    count, dimension = len(images), images[0].numel()
    parts = images.split(CHUNK)
    mean = torch.stack([rows(part).sum(0) for part in parts]).sum(0) / count
    if count < dimension:
        with work.part(2 * dimension * count**2):
            centred = torch.cat([rows(part) - mean for part in parts]).div_((count - 1)**0.5)
            covariance = centred @ centred.T
    else:
        covariance = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        for part in parts:
            with work.part(2 * dimension**2 * len(part)):
                centred = rows(part).sub_(mean)
                covariance.addmm_(centred.T, centred, alpha=1 / (count - 1))
    with work.part(EIGEN * len(covariance)**3):
        values, vectors = torch.linalg.eigh(covariance)
    del covariance
    # B [N, D] or [D, D]
    basis = vectors.T @ centred if count < dimension else vectors.mul_(values.clamp(min=0).sqrt()).T
    root, root_0 = (values.clamp(min=0) + EPS).sqrt(), EPS**0.5

    def function(of_0: float, slope: Tensor) -> Tensor:
        weighted, result = slope[:, None] * basis, torch.empty(dimension, dimension)
        for columns, part in zip(basis.split(BLOCK, dim=1), result.split(BLOCK)):
            with work.part(2 * len(part) * dimension * len(basis)):
                part.copy_(columns.T @ weighted)
        result.diagonal().add_(of_0)
        return result

    transform = function(1 / root_0, -1 / (root_0 * root * (root + root_0)))  # (1/√(s + eps) − 1/√eps) / s
    inverse = function(root_0, 1 / (root + root_0))  # (√(s + eps) − √eps) / s
    return mean.float().cpu()[None], transform, inverse


def _path(fingerprint: str) -> Path:
    """The cache file of a fit."""
    return cache_folder() / f"zca_{fingerprint}.pt"


def _read(path: Path, fingerprint: str, dimension: int) -> Whitening | None:
    """The cached fit; None if it is missing or damaged."""
    with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):
        kept = load(path, "ZCA cache file", mmap=True)
        tensors = [kept[name] for name in ("mean", "transform", "inverse")]
        if _fits(tensors, dimension):
            return Whitening(*tensors, fingerprint)
    return None


def _fits(tensors: list[Tensor], dimension: int) -> bool:
    """Whether the tensors can be μ, T and, if given, T's inverse: the right shapes, all finite."""
    shapes = [(1, dimension), (dimension, dimension), (dimension, dimension)]
    return [tuple(tensor.shape) for tensor in tensors] == shapes[:len(tensors)] and all(
        tensor.isfinite().all() for tensor in tensors)


def _operations(count: int, dimension: int) -> float:
    """The operations of a fit: the covariance, its eigenvectors, and two functions of it."""
    size = min(count, dimension)
    return 2 * count * dimension * size + EIGEN * size**3 + 4 * size * dimension**2


def _place(count: int, dimension: int, device: torch.device) -> torch.device:
    """The device that a fit runs on.

    Raises:
        UserError: no device has enough memory.
    """
    # Measured: the two float32 results, and in float64 the eigenproblem's images (or a chunk) and four matrices.
    need = 8 * dimension**2 + 40 * dimension * min(count, max(dimension, CHUNK))
    if device.type == "cuda" and need < available(device):
        return device
    free = available()
    if need > free:
        raise UserError(f"zca of {count} images of {dimension} values needs about {need / 2**30:.1f} GiB of memory, "
                        f"{free / 2**30:.1f} GiB is available; use a machine with more, smaller images (res), "
                        "or run without zca")
    return torch.device("cpu")
