"""Versions and hardware, recorded with a result."""

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from utils.files import REPOSITORY
from utils.program.device import describe

BESIDE_TORCH = ("torchvision", "numpy")  # packages whose versions a result may depend on, if installed


def environment(device: torch.device) -> dict[str, str]:
    """The short record that goes with every result."""
    code = commit()
    return {"torch": str(torch.__version__), "python": sys.version.split()[0], "device": describe(device),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), **({"commit": code} if code else {})}


@functools.cache  # the running code stays the same, even if another commit is checked out meanwhile
def commit() -> str | None:
    """The commit of this code, with "+" if tracked files differ; None outside a git clone, or without git."""
    if not (REPOSITORY / ".git").exists():  # git would find the repository of a parent folder
        return None
    others = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set inside a git hook
    try:
        said = subprocess.run(["git", "-C", REPOSITORY, "describe", "--always", "--exclude=*", "--abbrev=12",
                               "--dirty=+"], env=others, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None if said.returncode == 0 else None


def machine(device: torch.device) -> dict[str, str]:
    """The full record: `environment`, further versions, and hardware."""
    versions = {name: version for name in BESIDE_TORCH if (version := installed(name))}
    cuda = {"CUDA": str(torch.version.cuda)} if device.type == "cuda" else {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {**environment(device), **versions, **cuda, "processor": f"{_processor()}, {os.cpu_count()} logical cores",
            "memory": f"{memory:.0f} GB", "system": f"{platform.system()} {platform.release()}"}


def installed(package: str) -> str | None:
    """The package's version, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
