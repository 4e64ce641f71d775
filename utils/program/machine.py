"""Versions and hardware, to stand beside a result."""

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from utils.program.device import describe

BESIDE_TORCH = ("torchvision", "numpy")  # whose versions a result may depend on, where they are installed


def environment(device: torch.device) -> dict[str, str]:
    """The little that stands beside every result."""
    return {"torch": str(torch.__version__), "python": sys.version.split()[0], "device": describe(device),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}


def machine(device: torch.device) -> dict[str, str]:
    """All of it."""
    versions = {name: version for name in BESIDE_TORCH if (version := installed(name))}
    cuda = {"CUDA": str(torch.version.cuda)} if device.type == "cuda" else {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {**environment(device), **versions, **cuda, "processor": f"{_processor()}, {os.cpu_count()} logical cores",
            "memory": f"{memory:.0f} GB", "system": f"{platform.system()} {platform.release()}"}


def installed(package: str) -> str | None:
    """Its version, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
