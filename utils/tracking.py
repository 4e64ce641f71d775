"""Weights & Biases, when it is there: the published keys, pictures and histograms; never in the way.

Metrics always go to `metrics.jsonl` as well (`utils.run.RunFolder`), so nothing is lost without it.
"""

import netrc
import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from utils.datasets import Dataset
from utils.figures import clip_outliers

Mode = Literal["auto", "online", "offline", "disabled"]

PICTURES_UP_TO_IPC = 50  # beyond it pictures are huge; --force_save logs them all the same
CONNECT_SECONDS = 20.0


class Tracker:
    """Logs to a wandb run, or to nothing.

    Args:
        mode: `auto` goes online where an account is known and is silent elsewhere; `offline` writes files into
            `folder` for `wandb sync`; `disabled` never imports wandb. Whatever fails is said in one line, and the run
            goes on without.
    """

    def __init__(self, mode: Mode, project: str, name: str, config: dict[str, Any], folder: Path):
        self._run = None
        if mode == "disabled":
            return
        if mode == "auto" and not _has_account():
            print("note: no wandb account here; metrics go to metrics.jsonl (`wandb login`, or --wandb offline)",
                  file=sys.stderr)
            return
        try:
            import wandb  # slow to import, so only where it is used

            settings = wandb.Settings(init_timeout=CONNECT_SECONDS, console="off", silent=True)
            self._run = wandb.init(project=project, name=name, config=config, dir=str(folder), settings=settings,
                                   mode="offline" if mode == "offline" else "online")
        except Exception as error:  # wandb fails in many ways, and none of them may stop a distillation
            self._off(error)

    def log_step(self, record: dict[str, Any]) -> None:
        """An iteration's metrics, under their published names; `falts` is the start epoch of a skipped update."""
        values = {"Progress": record["iteration"], "Grand_Loss": record["loss"], "Start_Epoch": record["start_epoch"]}
        if not record["updated"]:
            values["falts"] = record["start_epoch"]
        self._log(values, record["iteration"])

    def log_scores(self, step: int, scores: list[Any], best: list[Any]) -> None:
        """An evaluation's scores (`distill.evaluate.Score`), and those of the best set so far."""
        values = {}
        for now, most in zip(scores, best):
            values |= {f"Accuracy/{now.network}": now.mean, f"Std/{now.network}": now.std,
                       f"Max_Accuracy/{now.network}": most.mean, f"Max_Std/{now.network}": most.std}
        self._log(values, step)

    def log_set(self, step: int, images: Tensor, lr: float, dataset: Dataset, ipc: int, force: bool) -> None:
        """The published pictures and histograms of a set's images [N, C, H, W]."""
        if self._run is None:
            return
        import wandb

        images = images.detach().cpu()
        values: dict[str, Any] = {"Pixels": wandb.Histogram(images.nan_to_num()), "Synthetic_LR": lr}
        views = {"Synthetic": images}
        if dataset.whitening is not None:
            views["Reconstructed"] = dataset.to_pixels(images)
        if ipc < PICTURES_UP_TO_IPC or force:
            for kind, pixels in views.items():
                values[f"{kind}_Images"] = wandb.Image(_grid(pixels))
                values[f"{kind}_Pixels"] = wandb.Histogram(pixels.nan_to_num())
                values[f"Clipped_{kind}_Images/std_2.5"] = wandb.Image(_grid(clip_outliers(pixels)))
        self._log(values, step)

    def finish(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._off(error)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if self._run is not None:
            try:
                self._run.log(values, step=step)
            except Exception as error:
                self._off(error)

    def _off(self, error: Exception) -> None:
        self._run = None
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        print(f"note: wandb is off ({reason}); metrics go to metrics.jsonl", file=sys.stderr)


def _has_account() -> bool:
    """Whether a key is where `wandb login` puts it; asks neither the user nor the network, nor imports wandb."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def _grid(images: Tensor, columns: int = 10, enlarged: int = 4):
    """One picture of all images, each scaled to its own range."""
    from torchvision.utils import make_grid

    images = images.repeat_interleave(enlarged, dim=2).repeat_interleave(enlarged, dim=3)
    grid = make_grid(images, nrow=columns, normalize=True, scale_each=True)
    return grid.mul(255).to(torch.uint8).permute(1, 2, 0).numpy()
