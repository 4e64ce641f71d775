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
from utils.errors import UserError
from utils.files import cache_folder, load, load_tensors, reading, save, save_tensors
from utils.memory import available

EPS = 0.1  # the published ridge, added to the eigenvalues of the covariance
CHUNK = 4096  # images at a time: bounds the extra memory, large enough for full matmul speed
BLOCK = 1024  # rows of a matrix at a time, where it is rounded to float32 or comes from a GPU
LONG = 60.0  # seconds from which a fit is announced
EIGEN = 10  # an eigenproblem of size n takes as long as a product of so many n³ operations
BESIDE = "whitening.safetensors"  # a whitening that travels with a set, in its folder

Result = TypeVar("Result")


@contextlib.contextmanager
def _in_float32() -> Iterator[None]:
    """Products on a GPU are not rounded to TF32, whatever a run computes in."""
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
    fitted_inverse: Tensor | None = None  # [D, D]; None: computed from T where it is needed
    fingerprint: str = ""  # of the training images and eps, to which it was fitted; empty where that is not known

    @functools.cached_property
    def inverse(self) -> Tensor:
        """[D, D]; T is symmetric and its eigenvalues are far from 0, so float64 gives it back to 1e-5."""
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
        """[N, C, H, W] in [0, 1] → the squared norm [N] of each less the mean."""
        mean = self.mean.to(images.device)
        return torch.cat([(some.flatten(1) - mean).square().sum(1) for some in images.split(CHUNK)])

    @_in_float32()
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

    def read(self, dimension: int, advice: str) -> Whitening:
        """From `whitening.safetensors` in the folder, or the disk cache.

        Args:
            dimension: D, of the set's images.
            advice: what to do where it is in neither.

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


def chunk(images: Tensor) -> int:
    """How many are whitened at a time."""
    # A signal waits for a product: with many dimensions, fewer images at a time (a second or two on one core).
    return min(CHUNK, max(1, 2**36 // images[:1].numel()**2)) if len(images) else 1


@torch.no_grad()
@_in_float32()
def _by_chunks(images: Tensor, change) -> Tensor:
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    size = chunk(images)
    for start in range(0, len(images), size):
        rows = images[start:start + size].flatten(1)  # [n ≤ size, D]
        out[start:start + size] = change(rows).view(-1, *images.shape[1:])
    return out


class _Work:
    """How far a fit is, in operations: told by the thread that computes, asked by the one that waits."""

    def __init__(self, total: float) -> None:
        self.total = total
        self._began = perf_counter()
        self._now = 0.0, 0.0, self._began  # what is done, what is begun, and when that was

    @contextlib.contextmanager
    def part(self, size: float) -> Iterator[None]:
        """So many operations."""
        done = self._now[0]
        self._now = done, size, perf_counter()
        yield
        self._now = done + size, 0.0, perf_counter()

    @property
    def done(self) -> float:
        """Of a part that is not finished, as LAPACK says nothing on its way, what the pace so far lets expect."""
        done, begun, since = self._now
        pace = done / max(since - self._began, 1e-9)
        return done + min(0.99 * begun, pace * (perf_counter() - since))


def fit(images: Tensor, cache_key: str, device: torch.device | str = "cpu", watch: Watch = unwatched) -> Whitening:
    """The whitening of a training set, from the disk cache or fitted.

    It is `kornia.enhance.ZCAWhitening`'s but for kornia's rounding of a float32 covariance (1e-5), and kept as
    `<cache folder>/zca_<key>.pt`; what an earlier version kept there is used as it is. The result lies on the CPU,
    computed in float64 and rounded to float32, so that machines agree but for the last bit of some values.

    Args:
        images: the whole training set [N, C, H, W], uint8 in 0 … 255 or float32 in [0, 1].
        cache_key: what identifies these images' content (a hash of the raw images).
        device: where to compute, if its memory is large enough; else on the CPU.
        watch: shows how far it is.

    Raises:
        UserError: fewer than two images; a fit that would not fit in memory.
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
        print(f"note: the ZCA fit is not kept for the next run: {error} (DATM_CACHE names another folder)",
              file=sys.stderr)
    return whitening


def _interruptible(compute: Callable[[], Result], meanwhile: Callable[[], None] = lambda: None) -> Result:
    """What `compute` returns or raises, from another thread: LAPACK holds the one that calls it for minutes, in which
    Python hears no signal. What a signal raises in this thread ends the wait; the other one ends with the process.
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
        while not wait([outcome], timeout=0.2).done:  # by turns: the system may wake another thread for a signal
            meanwhile()
    except BaseException as error:
        atexit.register(_leave, worker, 128 + getattr(error, "signal", signal.SIGINT))
        raise
    return outcome.result()


def _leave(worker: threading.Thread, code: int) -> None:
    """The way out of a process whose worker still computes; Python's own waits for it, or is aborted by it."""
    if worker.is_alive():
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@torch.no_grad()
def _computed(images: Tensor, device: torch.device, work: _Work) -> tuple[Tensor, Tensor, Tensor]:
    """μ, T and T's inverse, float32 on the CPU, computed in float64 on `device`.

    With C the covariance (over N − 1), any B with C = BᵀB and BBᵀ = diag(S) gives a function of it,
    f(C) = f(0) I + Bᵀ diag((f(S) − f(0)) / S) B; with fewer images than dimensions it has N rows only, and the
    directions that no image has are in f(0) I.
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
        with work.part(EIGEN * count**3):
            values, vectors = torch.linalg.eigh(covariance)
        del covariance
        basis = vectors.T @ centred  # B [N, D]
    else:
        covariance = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        for part in parts:
            with work.part(2 * dimension**2 * len(part)):
                centred = rows(part).sub_(mean)
                covariance.addmm_(centred.T, centred, alpha=1 / (count - 1))
        with work.part(EIGEN * dimension**3):
            values, vectors = torch.linalg.eigh(covariance)
        del covariance
        basis = vectors.mul_(values.clamp(min=0).sqrt()).T  # B [D, D]
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
    """Where a fit is kept."""
    return cache_folder() / f"zca_{fingerprint}.pt"


def _read(path: Path, fingerprint: str, dimension: int) -> Whitening | None:
    """The kept fit, or None where there is none or it is damaged."""
    if not path.is_file() or not path.stat().st_size:
        return None
    with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):
        kept = load(path, "ZCA cache file")
        tensors = [kept[name] for name in ("mean", "transform", "inverse")]
        if _fits(tensors, dimension):
            return Whitening(*tensors, fingerprint)
    return None


def _fits(tensors: list[Tensor], dimension: int) -> bool:
    """Whether these can be μ, T and T's inverse, as far as they are given."""
    shapes = [(1, dimension), (dimension, dimension), (dimension, dimension)]
    return [tuple(tensor.shape) for tensor in tensors] == shapes[:len(tensors)] and all(
        tensor.isfinite().all() for tensor in tensors)


def _operations(count: int, dimension: int) -> float:
    """Of a fit: the covariance, its eigenvectors, and two functions of it."""
    size = min(count, dimension)
    return 2 * count * dimension * size + EIGEN * size**3 + 4 * size * dimension**2


def _place(count: int, dimension: int, device: torch.device) -> torch.device:
    """Where a fit runs; one that takes long there is announced.

    Raises:
        UserError: it fits nowhere.
    """
    # Measured: the two results, and four matrices beside the images that the eigenproblem is made of, or a chunk.
    need = 8 * dimension**2 + 40 * dimension * min(count, max(dimension, CHUNK))
    if device.type == "cuda" and need < available(device):
        return device
    free = available()
    if need > free:
        raise UserError(f"zca of {count} images of {dimension} values needs about {need / 2**30:.1f} GiB of memory, "
                        f"{free / 2**30:.1f} GiB is available; use a machine with more, smaller images (res), "
                        "or run without zca")
    seconds = _operations(count, dimension) / 5e10
    if seconds > LONG:
        print(f"fitting ZCA in {dimension} dimensions: about {seconds / 60:.0f} min on one core, less on more, and "
              f"{need / 2**30:.1f} GiB, once (the result is kept)", file=sys.stderr)
    return torch.device("cpu")
