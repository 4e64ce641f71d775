"""What surrounds a computation: the entry's error line, device, seeds, run folder, metrics."""

import contextlib
import datetime
import errno
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml
from torch import nn

from utils import augment, interrupt, parallel
from utils.config import DataConfig, as_dict, has_effect, make
from utils.datasets import Dataset
from utils.engine import check_backend, set_precision
from utils.errors import UserError, one_line
from utils.files import REPOSITORY, load, locked, save, write_text
from utils.parameters import FlatModel
from utils.progress import wrapped

RANK_WAITS = 3.0  # seconds for the first rank to speak


def entry(main: Callable[[], None]) -> None:
    """Runs an entry script; a user's mistake becomes one line on stderr and exit code 2, a signal 128 + its number."""
    name = Path(sys.argv[0]).name
    interrupt.install()
    if isinstance(sys.stdout, io.TextIOWrapper):  # in one file with stderr, lines come in the order they were said in
        sys.stdout.reconfigure(line_buffering=True)
    if not parallel.first():  # the first rank speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    try:
        main()
        interrupt.ignore()  # nothing is left to be stopped
        parallel.barrier()
        parallel.leave(0)
    except UserError as error:
        _last_line(f"{name}: error: {one_line(error)}", 2)
    except torch.OutOfMemoryError as error:
        _last_line(f"{name}: error: the GPU's memory is full ({' '.join(str(error).split())[:120]}…); give "
                   "--micro_batch, a smaller batch, or --device cpu", 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and parallel.lost_contact(error):
            if interrupt.requested():  # all ranks were told to stop, and another one was quicker
                _last_line(f"{name}: stopped; every file is whole. The same command goes on from what is saved", 143)
            _last_line(f"{name}: error: contact with another rank was lost ({' '.join(str(error).split())[:120]}…); "
                       "start again, which goes on from what is saved", 1, wait=0.0)
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        _last_line(f"{name}: error: not enough memory ({' '.join(str(error).split())[:120]}); give a smaller batch or "
                   "--micro_batch, or use a machine with more", 2)
    except interrupt.Stopped as stopped:
        code = 128 + stopped.signal
        if not parallel.first():
            parallel.leave(code)
        _last_line(f"\n{name}: stopped by {stopped.signal.name}; every file is whole. The same command goes on from "
                   f"what is saved, if anything{_to_go_on()}", code)
    except BrokenPipeError:  # whoever read the output (head, say) has seen enough
        _close_pipes()
        sys.exit(141)


def _to_go_on() -> str:
    """The command that was given, without a `--resume`, which may discard what is saved; torchrun's nobody knows."""
    if parallel.size() > 1:
        return ""
    kept: list[str] = []
    for argument in sys.argv:
        if kept and kept[-1] == "--resume":
            kept.pop()
        elif not argument.startswith("--resume="):
            kept.append(argument)
    return f": {shlex.join(['python', *kept])}"


def _last_line(text: str, code: int, wait: float = RANK_WAITS) -> typing.NoReturn:
    """
    Args:
        wait: seconds in which the first rank may say it for all.
    """
    interrupt.ignore()  # a further signal finds nothing to stop, and would only disturb the exit
    if not parallel.first():
        # What concerns all ranks the first one says, and torchrun then ends the others; this is what it did not say.
        interrupt.restore()
        time.sleep(wait)
        text = f"rank {parallel.rank()}: {text.strip()}"
        sys.stderr = sys.__stderr__
    try:
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads them may have been interrupted too
        _close_pipes()
    parallel.leave(code)
    sys.exit(code)


def _close_pipes() -> None:
    """So that the interpreter does not complain of them at its exit."""
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


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


def listed_gpus(device: str | list[int]) -> list[int]:
    """The GPUs of this machine that a list names; all of them if it names none."""
    present = range(torch.cuda.device_count())
    listed = [index for index in device if index in present] if isinstance(device, list) else []
    return listed or list(present)


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


def spread(config: DataConfig) -> None:
    """Starts this command again as a rank for each of the GPUs that `device` lists, if they are several, and ends with
    them; published configs list up to four."""
    if "LOCAL_RANK" not in os.environ and isinstance(config.device, list):
        present = set(config.device) & set(range(torch.cuda.device_count()))
        if len(present) > 1:
            parallel.launch(len(present))


def start_device(config: DataConfig) -> torch.device:
    """The device a config asks for, set to its precision and fit for its backend; of several ranks, this one's.

    Raises:
        UserError: see `select_device`, `check_backend`, `set_precision` and `parallel.start`.
    """
    device = select_device(config.device)
    if device.type == "cuda" and parallel.size() > 1:
        device = parallel.own_gpu(listed_gpus(config.device))
        torch.cuda.set_device(device)
    parallel.start(device)
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
    here = (f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else
            f"cpu ({torch.get_num_threads()} threads)")
    return here if parallel.size() == 1 else f"{parallel.size()} ranks, the first on {here}"


def describe_precision(precision: str, device: torch.device) -> str:
    """The arithmetic of convolutions and matrix products in words."""
    if precision == "auto":
        return "float32, convolutions in TF32" if device.type == "cuda" else "float32"
    return {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16"}[precision]


# --- a run's folder ------------------------------------------------------------------------------------------


def kept_to_this_run(folder: Path, advice: str) -> contextlib.AbstractContextManager[None]:
    """As `utils.files.locked`; of several ranks the first one keeps other runs out, for all."""
    return locked(folder, advice) if parallel.first() else contextlib.nullcontext()


# What changes where a run happens and what it writes, but not its result.
_WITHOUT_INFLUENCE = {"device", "parall_eva", "backend", "micro_batch", "dry_run", "log_path", "run_name", "resume",
                      "json", "save", "wandb", "project", "force_save", "quiet"}


def influential(config: DataConfig) -> dict[str, Any]:
    """The options that decide the result, paths inside the repository relative to it."""
    return {name: value.removeprefix(f"{REPOSITORY}{os.sep}") if isinstance(value, str) else value
            for name, value in as_dict(config).items()
            if name not in _WITHOUT_INFLUENCE and has_effect(config, name)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The options that have another value than before, in words; empty if there are none."""
    return ", ".join(f"{name} ({before[name]} there, {value} here)"
                     for name, value in now.items() if name in before and before[name] != value)


def say(config: DataConfig, text: str) -> None:
    """Prints a line of routine, which `--quiet` leaves out."""
    if not config.quiet:
        print(wrapped(text))


def announce(config: DataConfig, device: torch.device, engine: str, *lines: str) -> None:
    """Says on what a run runs, what it is, and which of its options differ from the defaults.

    Args:
        engine: see `describe_engine`.
    """
    default = as_dict(make(type(config)))
    changed = {name: value for name, value in influential(config).items() if getattr(config, name) != default[name]}
    options = ", ".join(f"{name} {value}" for name, value in changed.items())
    for line in (f"on {describe(device)}, {describe_precision(config.precision, device)}, {engine}", *lines,
                 f"options: {options}"):
        say(config, line)


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


STATE_FORMAT = "datm-checkpoint-1"
SAVE_SECONDS = 1.0  # at least, between two saves of a run's state
SAVE_SHARE = 0.005  # of a run's time, at most, that goes into them


class RunFolder:
    """One run's `config.yaml`, `metrics.jsonl` and `result.json`, and whatever the run puts beside them.

    While it runs, `checkpoint.pt` holds what it needs to go on after it was stopped or killed; `save_seconds` is how
    long it last took to save it. Of several ranks only the first one writes.

    Making one writes nothing; `start` does.

    Raises:
        UserError: the folder holds a run of other options.
    """

    def __init__(self, path: Path, config: DataConfig):
        self.path = path
        self._config = influential(config)
        self._metrics = path / "metrics.jsonl"
        self._state = path / "checkpoint.pt"
        self._saved_at, self.save_seconds = -math.inf, 0.0
        saved = path / "config.yaml"
        # An option that is younger than the run had no other value than its default.
        default = as_dict(make(type(config)))
        before = default | read_config(saved) if saved.exists() else self._config
        different = differences(before, self._config)
        discarded = getattr(config, "resume", None) == "never" and not (path / "result.json").exists()
        if different and not discarded:
            raise UserError(f"{path} holds a run of other options: {different}; give those to go on with it, another "
                            "--run_name, or --resume never to discard it unless it is finished")

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a finished run, else None."""
        path = self.path / "result.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); delete it to run again, or give another "
                            "--run_name") from error

    @property
    def unfinished(self) -> dict[str, Any] | None:
        """What a run that was stopped or killed last saved of itself (`save_state`), else None.

        Raises:
            UserError: it is damaged.
        """
        if not self._state.exists():
            return None
        state = load(self._state, "checkpoint", advice="give --resume never to start over")
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise UserError(f"{self._state} is not a checkpoint of this version ({STATE_FORMAT}); give --resume never "
                            "to start over, or another --run_name")
        return state

    def start(self, metrics_bytes: int | None = None, made: Sequence[str] = ()) -> None:
        """Saves the config and begins `metrics.jsonl`, or goes on with its first so many bytes.

        Args:
            made: what an unfinished run may have put beside them, removed at a new beginning.

        Raises:
            UserError: the folder cannot be made or written, or its metrics are shorter than they were.
        """
        if not parallel.first():
            return
        if metrics_bytes is None:
            if self._metrics.exists():
                print(f"note: {shown(self.path)} holds an unfinished run; starting over", file=sys.stderr)
            self._state.unlink(missing_ok=True)  # first, for it counts on the others
            for each in made:
                if (self.path / each).is_dir():
                    shutil.rmtree(self.path / each)
                else:
                    (self.path / each).unlink(missing_ok=True)
        save_config(self.path / "config.yaml", self._config)
        if metrics_bytes and not (self._metrics.exists() and self._metrics.stat().st_size >= metrics_bytes):
            raise UserError(f"{self._metrics} is gone, or shorter than when the run was last saved; put it back, or "
                            "give --resume never to start over, or another --run_name")
        self._metrics.touch()
        os.truncate(self._metrics, metrics_bytes or 0)

    def log(self, **metrics: Any) -> None:
        """One line of `metrics.jsonl`."""
        if parallel.first():
            append_json(self._metrics, metrics)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def save_due(self) -> bool:
        """Whether it is time to save the run's state again: so seldom that it takes `SAVE_SHARE` of the time."""
        since = perf_counter() - self._saved_at
        return parallel.first() and since >= max(SAVE_SECONDS, self.save_seconds / SAVE_SHARE)

    def save_state(self, state: Callable[[], dict[str, Any]]) -> None:
        """Saves what the run needs to go on from here, which `state` makes of tensors and plain containers."""
        if not parallel.first():
            return
        began = perf_counter()
        with self._metrics.open("rb") as metrics:  # on the disk before the state that counts on them
            os.fsync(metrics.fileno())
            size = os.fstat(metrics.fileno()).st_size
        save(state() | {"format": STATE_FORMAT, "metrics_bytes": size}, self._state)
        self._saved_at = perf_counter()
        self.save_seconds = self._saved_at - began

    def finish(self, **result: Any) -> None:
        """Writes the result, with which the run counts as finished."""
        write_json(self.path / "result.json", result)
        self.forget_state()

    def forget_state(self) -> None:
        """Removes what `save_state` saved, which is of no use any more."""
        self._state.unlink(missing_ok=True)


def append_json(path: Path, value: Any) -> None:
    """Adds one line to a JSONL file.

    Raises:
        UserError: it cannot be written; the file is as it was.
    """
    before = None
    try:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            line = (json.dumps(value) + "\n").encode()
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if before is not None:
            os.truncate(path, before)  # half a line may have found room
        raise UserError(f"cannot write {path}: {error.strerror}; free space or give another folder") from error


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
        raise UserError(f"{path} is damaged; it held the options of what lies beside it: put it back, or move what "
                        "lies beside it away")
    return options


def save_config(path: Path, options: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(options, sort_keys=False))


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """
    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read or is damaged ({error}); restore it, or delete it, to make it again"
                        ) from error


def finite(value: float) -> float | None:
    """The number, or None (JSON's null) for NaN and infinities, which JSON has no words for."""
    return value if math.isfinite(value) else None


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, to stand beside a result."""
    return {"torch": str(torch.__version__), "python": sys.version.split()[0], "device": describe(device),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}


def shown(path: Path | str) -> str:
    """A path as the user would type it: relative to the current folder where both are in the repository, or it lies
    below that folder."""
    path, here = Path(path), Path.cwd()
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    together = path.is_relative_to(REPOSITORY) and here.is_relative_to(REPOSITORY)
    return os.path.relpath(path) if together else str(path)
