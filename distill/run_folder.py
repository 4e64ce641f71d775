"""A run's folder: its options, its log, and its state while it runs."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from distill.report.names import PICTURES, SHOWN
from distill.result_files import EVALUATION, METRICS, RESULT, VERSIONS
from distill.set_files import WHOLE
from utils import files
from utils.config import DistillConfig, changed, defaults, differences, identity, influential
from utils.errors import UserError, note
from utils.files import check_writable, cut_lines, read_config, remove, save_config
from utils.program import interrupt, ranks
from utils.program.console import shown

STATE = "checkpoint.pt"  # in a run's folder
# What else is in it besides its log and result: sets and unfinished evaluations; pictures, page and final sets.
MADE = [*VERSIONS, *(f"{name}.unfinished*" for name in VERSIONS)]
SHOWS = [*SHOWN, PICTURES, *(f"{name}/{WHOLE}" for name in VERSIONS)]
STATE_FORMAT, LOG_BYTES = "datm-checkpoint-2", "metrics_bytes"  # value of "format" and a key in saved states
SAVE_SECONDS = 1.0  # minimum between two saves of a run's state
SAVE_SHARE = 0.005  # maximum share of a run's time that saving takes


def run_folder(config: DistillConfig, checksums: dict[str, str]) -> Path:
    """`logged_files/<dataset>/<ipc>/<model>/<run name>`, as published; the default name is derived from the config and
    the checksums of the data."""
    name = config.run_name or f"{config.matching}_seed{config.seed}_{run_id(config, checksums)}"
    return Path(config.log_path) / config.dataset / str(config.ipc) / config.model / name


def run_id(config: DistillConfig, checksums: dict[str, str]) -> str:
    """A short name of a run, derived from the checksums of its data and the options that differ from the defaults, so
    that an option added later does not rename existing runs. (If a default changes, a run of the same name is
    refused.)"""
    text = json.dumps([changed(identity(config), DistillConfig), checksums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def data_id(checksums: dict[str, str]) -> str:
    """A hash of the checksums of a run's data, kept in its result."""
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()[:16]


class RunFolder:
    """One run's `config.yaml`, its log, and its result; a run with a result is finished.

    STATE holds the state to resume from, after the run was stopped or killed, or to extend it. Only the first rank
    writes.

    Constructing one writes nothing; `start` does.

    Attributes:
        finished: whether the run has its result.
        extends: whether it is a finished run that is being extended, and not finished again yet.
        is_done: whether nothing is left to do: the run is finished, and no more is asked of it than it did.
        did: the iterations of the run in the folder, else of this one.

    Raises:
        UserError: the folder holds a run of other options.
    """

    def __init__(self, path: Path, config: DistillConfig):
        self.path, self.log, self.result = path, path / METRICS, path / RESULT
        self._config = influential(config)
        self._state = path / STATE
        self._saved_at, self._save_seconds = -math.inf, 0.0
        self.finished, self.is_done, self.extends, self.did = ranks.from_first_rank(lambda: self._look(config))

    def _look(self, config: DistillConfig) -> tuple[bool, bool, bool, int]:
        """`finished`, `is_done`, `extends` and `did`."""
        finished, discards = self.result.exists(), config.resume == "never"
        # The names under which `start` keeps the results of a run that is extended.
        kept = re.compile(f"{self.result.stem}_[0-9]+{self.result.suffix}")
        extends = not finished and any(kept.fullmatch(path.name) for path in self.path.glob(f"{self.result.stem}_*"))
        before = self._before(config)
        different = differences(before, identity(config))
        if discards and extends:
            raise UserError(f"{self.path} holds a finished run that is being extended, which --resume never would "
                            "discard; leave that out, or give another --run_name")
        if different and (finished or not discards):
            advice = "another --run_name" if finished else "those to resume it, or another --run_name" if extends \
                else "those to resume it, another --run_name, or --resume never to discard it"
            raise UserError(f"{self.path} holds a {'finished ' * finished}run of other options: {different}; give "
                            f"{advice}")
        did = before["Iteration"]
        return finished, finished and (discards or config.Iteration <= did), extends, did

    def _before(self, config: DistillConfig) -> dict[str, Any]:
        """The options of the run in the folder, else those of this one."""
        saved = self.path / "config.yaml"
        if not saved.exists() and self.result.exists() and self.log.exists():
            raise UserError(f"{self.path} holds a finished run without its config.yaml, so that its options are not "
                            "known; put it back, or give another --run_name")
        if not saved.exists():
            return self._config
        options = read_config(saved)
        if not {"dataset", "model"} <= options.keys():
            raise UserError(f"{saved} is there and holds something other than a run's options; move it away, or give "
                            "another --run_name")
        # An option that was added after the run had its default value in it.
        before = defaults(type(config)) | options
        if not isinstance(before["Iteration"], int):
            raise UserError(f"{saved} is damaged (Iteration is {before['Iteration']!r}); put it back, or give another "
                            "--run_name")
        return before

    @property
    def saved_state(self) -> dict[str, Any] | None:
        """The state that the run last saved (`save_state`), or None.

        Raises:
            UserError: it is damaged, or of another version.
        """
        if not self._state.exists():
            return None
        state = files.load(self._state, "checkpoint", advice=self.to_start_over)
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise UserError(f"{self._state} is not a checkpoint of this version ({STATE_FORMAT}); {self.to_start_over}")
        return state

    @property
    def to_start_over(self) -> str:
        """Advice where a run cannot resume; a finished run is never discarded."""
        return f"give another --run_name{'' if self.finished or self.extends else ', or --resume never to start over'}"

    def check(self, saved: dict[str, Any] | None) -> None:
        """Refuses a folder that a run cannot start in; writes nothing.

        Args:
            saved: the state to resume from, if any.

        Raises:
            UserError: the folder cannot be made or written, its log is shorter than when the state was saved, or it
                holds files of a run but no run's config.
        """
        if not ranks.first():
            return
        if saved and not (self.log.exists() and self.log.stat().st_size >= saved[LOG_BYTES]):
            raise UserError(f"{self.log} is gone, or shorter than when the run was last saved; put it back, or "
                            f"{self.to_start_over}")
        if not (self.path / "config.yaml").exists():
            there = self._there(*MADE, *SHOWS, self.log.name, self.result.name)
            others = [str(path.relative_to(self.path)) for path in there]
            if others:
                raise UserError(f"{self.path} holds {', '.join(others)} and is no run's folder; give another "
                                "--run_name, or move what is there away")
        check_writable(self.path / "config.yaml")

    def start(self, saved: dict[str, Any] | None) -> None:
        """Saves the config and starts the log; a resumed run's log is cut to its length at the saved state.

        What presents a run is removed unless an unfinished one is resumed. If a finished run is extended, its result
        and its test are kept under other names; on a fresh start, what an unfinished run left is removed.

        Args:
            saved: the state to resume from, if any.

        Raises:
            UserError: see `check`.
        """
        interrupt.saves("what it last saved")
        self.check(saved)
        if not ranks.first():
            return
        for name in SHOWS if self.finished or not saved else ():
            (self.path / name).unlink(missing_ok=True)
        if self.finished:  # it counts as finished until its result is renamed, so that comes last
            for path in (self.path / EVALUATION, self.result):
                if path.exists():
                    path.rename(path.with_stem(f"{path.stem}_{self.did}"))
        if not saved:
            if self.log.exists():
                lost = "" if self._state.exists() else f" without its {STATE}"
                note(f"{shown(self.path)} holds an unfinished run{lost}; starting over")
            self._state.unlink(missing_ok=True)  # first, as it relies on the others
            for path in self._there(*MADE, EVALUATION):
                remove(path)
        save_config(self.path / "config.yaml", self._config)
        cut_lines(self.log, saved[LOG_BYTES] if saved else 0)

    def _there(self, *patterns: str) -> list[Path]:
        """The files and folders that match, without links, which are a user's to another disk."""
        return [path for pattern in patterns for path in self.path.glob(pattern) if not path.is_symlink()]

    def save_due(self) -> bool:
        """Whether to save the run's state again: so rarely that saving takes at most `SAVE_SHARE` of the time."""
        since = perf_counter() - self._saved_at
        return ranks.first() and since >= max(SAVE_SECONDS, self._save_seconds / SAVE_SHARE)

    def save_state(self, state: Callable[[], dict[str, Any]]) -> None:
        """Saves the state to resume from here; `state` returns it, as tensors and plain containers."""
        if not ranks.first():
            return
        began = perf_counter()
        with self.log.open("rb") as log:  # flushed to disk before the state that relies on it
            os.fsync(log.fileno())
            size = os.fstat(log.fileno()).st_size
        files.save(state() | {"format": STATE_FORMAT, LOG_BYTES: size}, self._state)
        self._saved_at = perf_counter()
        self._save_seconds = self._saved_at - began
