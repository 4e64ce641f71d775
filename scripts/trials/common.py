"""What the trials share: small settings for the programs, starting them as processes, and ending a trial."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.common import save_report
from utils.files import ASIDE, REPOSITORY

BUFFER, DATM, EVALUATION = "buffer/buffer_FTD.py", "distill/DATM.py", "distill/evaluation.py"
COMMON = ("--dataset=MiniFashion", "--model=ConvNetD1W4", "--zca", "--device=cpu", "--backend=eager")
TRAIN = (*COMMON, "--num_experts=3", "--train_epochs=2", "--save_interval=2", "--rho_max=0.01", "--rho_min=0.01",
         "--batch_train=256")
DISTIL = ("--cfg=configs/MiniFashion/ConvIN/IPC1.yaml", *COMMON, "--expert_epochs=1", "--max_start_epoch=2",
          "--run_name=run", "--wandb=disabled")
EXPERTS = "buffers/MiniFashion/ConvNetD1W4"  # where the programs put their files, with --buffer_path=buffers
RUN = "logs/MiniFashion/1/ConvNetD1W4/run"  # and with --log_path=logs
MOST_SECONDS = 300  # time limit of a run
TEMPORARY = re.compile(rf"\..+{re.escape(ASIDE)}\w{{8}}(\.\w+)?")


def obey_permissions() -> None:
    """Restarts this trial without root's right to read and write everything, so that closed folders are closed, as for
    any user. Other rights, such as mounting a disk, are kept. Does nothing for other users."""
    status = Path("/proc/self/status")
    rights = re.search(r"CapEff:\s*(\w+)", status.read_text()) if status.exists() else None
    if rights and int(rights[1], 16) & 0b110 and shutil.which("setpriv"):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        os.execvp("setpriv", ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, *sys.argv])


def set_files(folder: Path | str) -> dict[str, str]:
    """The options that give the three files of a distilled set."""
    return {option: f"{folder}/{name}_best.pt"
            for option, name in (("data_dir", "images"), ("label_dir", "labels"), ("lr_dir", "lr"))}


def write_set(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    import torch  # takes seconds, and --help and refusals do without it

    folder.mkdir()
    for path, value in zip(set_files(folder).values(), (images, labels, np.array(0.01, np.float32))):
        torch.save(torch.from_numpy(value), path)


def write_pictures(folder: Path, classes: Sequence[str], counts: Mapping[str, int]) -> None:
    """Writes pictures of 8×8 pixels in the layout of an image folder: noise with more of one colour in each class.

    Args:
        classes: names for the classes of more red, more green and more blue.
        counts: split → images of each class.
    """
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in counts.items():
        for channel, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 160, (8, 8, 3), dtype=np.uint8)
                pixels[:, :, channel] += 60
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def noise(*shape: int) -> np.ndarray:
    """Standard normal noise, the same at every call."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def surroundings(cache: Path) -> dict[str, str]:
    """The environment of a run: one thread, and a cache folder of the trial's own for the whitening."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"OMP_NUM_THREADS": "1", "DATM_CACHE": str(cache), "PYTHONUNBUFFERED": "1", "PATH": path,
                         "COLUMNS": "100"}


def start(command: Sequence[str], cache: Path, **streams: Any) -> subprocess.Popen:
    """Starts a program with its options as a process."""
    return subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env=surroundings(cache), text=True, **streams)


def temporary(folder: Path) -> list[str]:
    """The temporary files below a folder, which only a killed program may leave."""
    return sorted(path.name for path in folder.rglob(".*") if TEMPORARY.fullmatch(path.name))


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file below a folder, by path."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it was renamed meanwhile
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                found[str(path)] = status.st_size, status.st_mtime_ns
    return found


def conclude(path: Path | None, report: dict[str, Any], failed: bool) -> None:
    """Writes the report, if there is a path for it; exits with code 1 if something failed."""
    save_report(path, report, "cpu")
    if failed:
        sys.exit(1)
