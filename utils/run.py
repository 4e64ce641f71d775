"""What surrounds a computation: the entry's error line, device, seeds, run folder, metrics, progress."""

import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

from utils import augment
from utils.config import DataConfig, as_dict, has_effect, make
from utils.datasets import Dataset
from utils.engine import check_backend, set_precision
from utils.errors import UserError, one_line
from utils.files import REPOSITORY, atomic_write
from utils.parameters import FlatModel


def entry(main: Callable[[], None]) -> None:
    """Runs an entry script; a user's mistake becomes one line on stderr and exit code 2."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; what was finished is saved, and every file is whole", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


# --- seeds: every draw has an address, so that any part of a run can be repeated alone -----------------------


def derive_seed(*address: int | str) -> int:
    """A 63-bit seed from an address such as (seed, "expert", 3, "epoch", 7); the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, address)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*address: int | str) -> torch.Generator:
    """A CPU generator of its own for an address."""
    return torch.Generator().manual_seed(derive_seed(*address))


@contextlib.contextmanager
def seeded(*address: int | str) -> Iterator[None]:
    """torch's global CPU generator set for an address, and put back: layers initialise themselves from it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*address))
        yield


# --- device --------------------------------------------------------------------------------------------------


def select_device(device: str | list[int]) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N`, or GPU indices of which the first that exists is taken.

    A list of indices on a machine without them falls back, with one line that says to what.

    Raises:
        UserError: not a device, or a GPU asked for by name that is not there.
    """
    gpus = torch.cuda.device_count()
    if isinstance(device, list):
        present = [index for index in device if 0 <= index < gpus]
        chosen = torch.device("cuda", present[0]) if present else torch.device("cuda:0" if gpus else "cpu")
        if device != [0] and not present:
            print(f"note: no GPU {device} here; using {chosen}", file=sys.stderr)
        return chosen
    if device == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: allowed are auto, cpu, cuda, cuda:N or a list of GPU indices such as [0]")
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        raise UserError(f"--device {device}: this machine has {gpus} GPU(s); give --device auto or cpu")
    return chosen


def start_device(config: DataConfig) -> torch.device:
    """The device a config asks for, set to its precision and fit for its backend.

    Raises:
        UserError: see `select_device`, `check_backend` and `set_precision`.
    """
    device = select_device(config.device)
    check_backend(config.backend, device)
    set_precision(config.precision, device)
    return device


def flat_model(config: DataConfig, network: nn.Module, work: float, micro_batch: int | None = None) -> FlatModel:
    """A network on its device, with the engine that a config asks for.

    Args:
        work: how many samples times steps, of gradient and adjoint together, are to come.
    """
    return FlatModel(network, config.backend, config.precision, micro_batch, work)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


# --- a run's folder ------------------------------------------------------------------------------------------

# What changes where a run happens and what it writes, but not its result.
_WITHOUT_INFLUENCE = {"device", "parall_eva", "backend", "micro_batch", "dry_run", "log_path", "run_name", "json",
                      "save", "wandb", "project", "force_save"}


def influential(config: DataConfig) -> dict[str, Any]:
    """The options that decide the result, paths inside the repository relative to it."""
    return {name: value.removeprefix(f"{REPOSITORY}{os.sep}") if isinstance(value, str) else value
            for name, value in as_dict(config).items()
            if name not in _WITHOUT_INFLUENCE and has_effect(config, name)}


def announce(config: DataConfig) -> None:
    """Prints the options that differ from the defaults."""
    default = as_dict(make(type(config)))
    changed = {name: value for name, value in influential(config).items() if getattr(config, name) != default[name]}
    print(f"options: {', '.join(f'{name} {value}' for name, value in changed.items())}")


def dsa_groups(config: DataConfig, inner_loop: bool = False) -> tuple[str, ...]:
    """The groups of DSA that a config asks for, none where it asks for no DSA; `no_aug` is of the inner loop.

    Raises:
        UserError: an unknown group.
    """
    groups = augment.parse_strategy(config.dsa_strategy)
    return groups if config.dsa and not (inner_loop and config.no_aug) else ()


Drawer = Callable[[int, torch.Generator], augment.Draw | None]
"""(batch size, generator) → the augmentation of that batch."""


def drawer(config: DataConfig, dataset: Dataset, older_operations: tuple[str, ...]) -> Drawer:
    """What augments a training: DSA, or with `--dsa False` the older augmentation by these operations."""
    if config.dsa:
        groups = dsa_groups(config)
        return lambda batch, random: augment.draw(groups, batch, dataset.image_size, random)
    return lambda batch, random: augment.draw_per_image(older_operations, batch, dataset.image_size, dataset.channels,
                                                        random)


def config_name(config: DataConfig) -> str:
    """A short name that is the same for the same options."""
    text = json.dumps(influential(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class RunFolder:
    """One run's `config.yaml`, `metrics.jsonl` and `result.json`, and whatever the run puts beside them.

    Making one writes nothing; `start` does.

    Raises:
        UserError: the folder holds a run of other options.
    """

    def __init__(self, path: Path, config: DataConfig):
        self.path = path
        self._config = influential(config)
        self._metrics = path / "metrics.jsonl"
        saved = path / "config.yaml"
        # An option that is younger than the run had no other value than its default.
        default = as_dict(make(type(config)))
        before = default | read_config(saved) if saved.exists() else self._config
        different = [f"{name} ({before[name]} there, {value} here)"
                     for name, value in self._config.items() if before[name] != value]
        if different:
            raise UserError(f"{path} holds a run of other options: {', '.join(different)}; give another --run_name")

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a finished run, else None."""
        path = self.path / "result.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); delete it to run again, or give another "
                            "--run_name") from error

    def start(self) -> None:
        """Saves the config and begins an empty `metrics.jsonl`; what an unfinished run left is removed.

        Raises:
            UserError: the folder cannot be made or written.
        """
        if self._metrics.exists():
            print(f"note: {shown(self.path)} holds an unfinished run; starting over")
            self._metrics.unlink()
            for made in ("Normal", "EMA"):
                shutil.rmtree(self.path / made, ignore_errors=True)
        save_config(self.path / "config.yaml", self._config)

    def log(self, **metrics: Any) -> None:
        """One line of `metrics.jsonl`."""
        append_json(self._metrics, metrics)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def finish(self, **result: Any) -> None:
        write_json(self.path / "result.json", result)


def append_json(path: Path, value: Any) -> None:
    """Adds one line to a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """What `save_config` wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        options = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        options = None
    if not isinstance(options, dict):
        raise UserError(f"{path} is damaged; it held the options of what lies beside it. Delete it if you know them")
    return options


def save_config(path: Path, options: dict[str, Any]) -> None:
    with atomic_write(path) as aside:
        aside.write_text(yaml.safe_dump(options, sort_keys=False))


def write_json(path: Path | str, value: Any) -> None:
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def finite(value: float) -> float | None:
    """The number, or None (JSON's null) for NaN and infinities, which JSON has no words for."""
    return value if math.isfinite(value) else None


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, to stand beside a result."""
    return {"torch": torch.__version__, "python": sys.version.split()[0], "device": describe(device),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}


def shown(path: Path | str) -> str:
    """A path as the user would type it: relative where it lies below the current folder."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class Progress(tqdm):
    """A bar on a terminal; elsewhere one plain line every half minute."""

    def __init__(self, total: int, description: str, **kwargs: Any):
        self._terminal = sys.stderr.isatty()
        self._last_shown = 0
        super().__init__(total=total, desc=description, file=sys.stderr, dynamic_ncols=self._terminal,
                         mininterval=0.2 if self._terminal else 30, ncols=None if self._terminal else 100,
                         leave=True, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self._terminal:
            return super().display(msg, pos)
        if self.n != self._last_shown:
            print(msg or str(self), file=self.fp, flush=True)
            self._last_shown = self.n
        return True

    def close(self) -> None:
        """On a terminal as ever; elsewhere the last line, unless it was just printed."""
        if self._terminal or self.disable:
            return super().close()
        self.display()
        self.disable = True
        self._decr_instances(self)
