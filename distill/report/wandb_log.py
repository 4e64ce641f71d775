"""Optional logging to Weights & Biases, with the published keys, pictures and histograms; it never stops a run.

Pictures, histograms and `Synthetic_LR` are logged at every evaluation. The published code logs pictures and histograms
with each set that is saved, and `Synthetic_LR` at every iteration.

Metrics always go to `metrics.jsonl` as well, so nothing is lost without wandb.
"""

import netrc
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill.report.pixels import clip_outliers
from distill.result_files import Iteration, Score
from utils.data.datasets import Dataset
from utils.errors import note, reason
from utils.files import finite

Mode = Literal["auto", "online", "offline", "disabled"]

PICTURES_UP_TO_IPC = 50  # from this ipc on pictures are huge and logged only with --force_save
CONNECT_SECONDS = 20.0


class Tracker:
    """Logs to a wandb run, or to nothing.

    Args:
        mode: `auto` follows wandb's own settings, and is disabled where they say online but there is no account;
            `online` overrides them; `offline` writes files into `folder` for `wandb sync`; `disabled` never imports
            wandb. Nothing asks for a login. A failure is noted in one line, and the run goes on without wandb.
        resumed: the `state` of the tracker of a run that is resumed.
        quiet: do not mention a missing account.
    """

    def __init__(self, mode: Mode, project: str, name: str, config: dict[str, Any], folder: Path,
                 resumed: dict[str, Any] | None = None, quiet: bool = False):
        self._run = None
        self._id = resumed["id"] if resumed else uuid.uuid4().hex[:8]
        # network → mean and standard deviation of its best score; the deviation over one network is None
        self._best: dict[str, list[float | None]] = resumed["best"] if resumed else {}
        try:
            if mode == "auto":
                mode = _own_mode()
                if mode == "online" and not _has_account():
                    mode = "disabled"
                    if not quiet:
                        note("no wandb account here; metrics go to metrics.jsonl (`wandb login`, or --wandb offline)")
            if mode == "disabled":
                return
            import wandb  # slow to import, so only if it is used

            wandb.setup(settings=wandb.Settings(silent=True))  # otherwise `init` would ask for a login on a terminal
            settings = wandb.Settings(init_timeout=CONNECT_SECONDS, console="off", silent=True)
            self._run = wandb.init(project=project, name=name, config=config, dir=str(folder), settings=settings,
                                   id=self._id, resume="allow", mode=mode)
        except Exception as error:  # wandb fails in many ways, and none of them may stop a distillation
            self._off(error)

    def log_step(self, record: Iteration) -> None:
        """An iteration's metrics, under their published names; `falts` is the start epoch of a skipped update."""
        values = {"Progress": record.iteration, "Grand_Loss": finite(record.loss), "Start_Epoch": record.start_epoch}
        values |= {} if record.updated else {"falts": record.start_epoch}
        self._log(record.iteration, lambda: values)

    def log_scores(self, step: int, scores: list[Score]) -> None:
        """An evaluation's scores, and each network's best so far."""
        values = {}
        for score in scores:
            now = [score.mean, score.std]
            best = max(self._best.get(score.network, now), now, key=lambda each: each[0])
            mean, std = self._best[score.network] = best
            values |= {f"Accuracy/{score.network}": score.mean, f"Std/{score.network}": score.std,
                       f"Max_Accuracy/{score.network}": mean, f"Max_Std/{score.network}": std}
        self._log(step, lambda: {name: value for name, value in values.items() if value is not None})

    def log_set(self, step: int, images: Tensor, lr: float, dataset: Dataset, ipc: int, force: bool) -> None:
        """The published pictures and histograms of a set's images [N, C, H, W]."""
        self._log(step, lambda: _pictures(images.detach().cpu(), lr, dataset, ipc < PICTURES_UP_TO_IPC or force))

    def state(self) -> dict[str, Any]:
        """What another `Tracker` needs to resume the same run."""
        return {"id": self._id, "best": self._best}

    def finish(self) -> None:
        self._guarded(lambda: self._run.finish())

    def _log(self, step: int, values: Callable[[], dict[str, Any]]) -> None:
        self._guarded(lambda: self._run.log(values(), step=step))

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Runs anything that involves wandb, building its pictures included; after an error, wandb is off."""
        if self._run is not None:
            try:
                action()
            except Exception as error:
                self._off(error)

    def _off(self, error: Exception) -> None:
        self._run = None
        note(f"wandb is off ({reason(error)}); metrics go to metrics.jsonl")


def _pictures(images: Tensor, lr: float, dataset: Dataset, show: bool) -> dict[str, Any]:
    import wandb

    values: dict[str, Any] = {"Pixels": wandb.Histogram(_finite(images)), "Synthetic_LR": lr}
    reconstructed = {} if dataset.space.whitening is None else {"Reconstructed": dataset.space.to_pixels(images)}
    views = {"Synthetic": images, **reconstructed}
    if show:
        for kind, pixels in views.items():
            values[f"{kind}_Images"] = wandb.Image(_grid(pixels))
            values[f"{kind}_Pixels"] = wandb.Histogram(_finite(pixels))
            values[f"Clipped_{kind}_Images/std_2.5"] = wandb.Image(_grid(clip_outliers(pixels)))
    return values


def _finite(pixels: Tensor) -> Tensor:
    return pixels.nan_to_num(posinf=0.0, neginf=0.0)


def _own_mode() -> Mode:
    """The mode by wandb's own settings: its variables, and the files that `wandb offline` or `wandb disabled` write."""
    if os.environ.get("WANDB_DISABLED", "").lower() not in ("", "0", "false", "no"):  # newer versions ignore it
        return "disabled"
    own, here = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb", os.environ.get("WANDB_DIR") or "."
    files = [os.path.expanduser(f"{folder}/settings") for folder in (own, f"{here}/wandb", f"{here}/.wandb")]
    if not os.environ.get("WANDB_MODE") and not any(map(os.path.exists, files)):
        return "online"  # wandb's answer, without the seconds that its import takes
    import wandb

    mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
    return {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.get(mode, "online")


def _has_account() -> bool:
    """Whether there is a key in the environment or where `wandb login` puts it. Asks neither the user nor the network,
    and does not import wandb."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def _grid(images: Tensor):
    """One picture of all images, ten a row and enlarged four times, each scaled to its own range."""
    from torchvision.utils import make_grid

    images = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    grid = make_grid(images, nrow=10, normalize=True, scale_each=True)
    return grid.mul(255).to(torch.uint8).permute(1, 2, 0).numpy()
