"""Memory: its peak use and what is available, of the GPU or of the process; large host tensors; copies to a GPU."""

import contextlib
import ctypes
import math
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import cache_folder

ALIGNED = 16  # bytes to which tensors that are sent together are aligned


def reset_peak(device: torch.device) -> float:
    """Releases memory that is cached but free, resets the peak, and returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        with contextlib.suppress(OSError):  # /proc is read-only in some containers
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark
    return _bytes_in("self/status", "VmRSS") or peak(device)


def peak(device: torch.device) -> float:
    """The peak bytes in use since `reset_peak`; since the process began where the system cannot reset the peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)  # captured graphs' memory is reserved, not allocated
    unit = 1 if sys.platform == "darwin" else 1024
    return _bytes_in("self/status", "VmHWM") or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available(device: torch.device | None = None) -> float:
    """Bytes of a GPU's or the host's memory that this process can still get; infinite if the system does not say."""
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()  # also the pools of graphs that are gone
        # What is unused in torch's blocks is free too, except in the pools of captured graphs. Another allocator has no
        # blocks.
        blocks = torch.cuda.memory_snapshot() if torch.cuda.get_allocator_backend() == "native" else []
        unused = sum(block["total_size"] - block["allocated_size"] for block in blocks
                     if block["device"] == device.index and tuple(block["segment_pool_id"]) == (0, 0))
        return torch.cuda.mem_get_info(device)[0] + unused
    free = _bytes_in("meminfo", "MemAvailable")
    return min([math.inf if free is None else free, *_left_in_groups()])


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Bytes that this process's control groups, and those above them, leave: a container's or a Slurm job's limit."""
    of_process = [line.split(":", 2)[1:] for line in groups.read_text().splitlines()] if groups.is_file() else []
    for controllers, path in of_process:
        if controllers not in ("", "memory"):
            continue
        limit, taken, cache = (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
                               if controllers else ("memory.max", "memory.current", "inactive_file "))
        mounted = root / controllers
        group = mounted / path.lstrip("/")
        for folder in (group, *(each for each in group.parents if each.is_relative_to(mounted))):
            with contextlib.suppress(OSError, ValueError):  # without a limit, memory.max is the word "max"
                left = float((folder / limit).read_text()) - float((folder / taken).read_text())
                yield left + sum(float(line.split()[1]) for line in (folder / "memory.stat").read_text().splitlines()
                                 if line.startswith(cache))  # page cache that the system would reclaim


def check_host_memory(size: int, what: str) -> None:
    """Refuses a size for which `empty_on_host` finds neither memory nor disk space.

    Args:
        size: in bytes.
        what: what needs it, in words (plural).
    """
    free, disk = available(), _free_on_disk()
    if size > max(free, disk):
        raise UserError(f"{what}, need {size / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB is available, and "
                        f"{disk / 2**30:.1f} GiB on the disk of {cache_folder()}; use a machine with more, fewer "
                        "images, or another disk (DATM_CACHE)")


def empty_on_host(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised host tensor: in memory or, if that is too small, memory-mapped to a file in the cache folder.

    The file has no name and disappears with the process.

    Raises:
        UserError: the disk has no room either.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= available():
        return torch.empty(shape, dtype=dtype)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # else the process would be killed when the disk fills up
            return torch.from_numpy(np.memmap(file, np.uint8, "r+")).view(dtype).view(*shape)
    except OSError as error:
        raise UserError(f"{size / 2**30:.1f} GiB do not fit in memory, and {cache_folder()} cannot hold them: "
                        f"{error}; DATM_CACHE names another folder") from error


def _free_on_disk() -> float:
    """Free bytes on the disk where `empty_on_host` creates its files."""
    folder = cache_folder().absolute()
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.is_dir())).free


def to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Host tensors copied to `device`; to a GPU in one asynchronous copy from pinned memory."""
    if torch.device(device).type != "cuda" or not tensors:
        return [each.to(device) for each in tensors]
    sizes = [-(-each.nbytes // ALIGNED) * ALIGNED for each in tensors]
    together = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for each, place in zip(tensors, together.split(sizes)):
        place[:each.nbytes].view(each.dtype).copy_(each.reshape(-1))
    there = together.to(device, non_blocking=True)
    return [place[:each.nbytes].view(each.dtype).view(each.shape) for each, place in zip(tensors, there.split(sizes))]


def _bytes_in(file: str, key: str) -> float | None:
    """The value of a line of a file in /proc, in bytes; None: the system has no such file or line."""
    path = Path("/proc") / file
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
