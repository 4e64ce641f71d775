"""Runs commands that depend on each other's files: each once, several at a time, resuming those that were stopped."""

import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, TextIO

from utils.config import DistillConfig, about, defaults
from utils.errors import UserError
from utils.files import check_writable, no_links, read_json, reading, remove, write_json
from utils.program import interrupt
from utils.program.console import duration
from utils.program.locks import sign

LOOK_SECONDS = 0.2  # between two polls of the running commands


@dataclass(frozen=True)
class Step:
    """A command, and the file that exists when it is done."""

    name: str
    kind: str
    command: tuple[str, ...]
    result: Path
    products: tuple[Path, ...] = ()  # other files that it makes, for the steps that need it
    folder: Path | None = None  # deleted before the step is run anew; None: only the result is
    resumes: Path | None = None  # without it, the step's files cannot be completed; None: the command sees to that
    needs: tuple["Step", ...] = ()
    config: Mapping[str, Any] | None = field(default=None, compare=False)  # contents of the YAML that the command reads
    alone: bool = False  # needs all cores

    def __str__(self) -> str:
        return shlex.join(self.command)

    @property
    def asked(self) -> str:
        """The command without its number of ranks, which does not change the result."""
        return shlex.join(self.command[next(at for at, word in enumerate(self.command) if word.endswith(".py")):])

    @property
    def made(self) -> Path:
        """The file or folder with everything that the command makes."""
        return self.folder or self.result

    @property
    def done(self) -> bool:
        return all(path.exists() for path in (self.result, *self.products))

    @property
    def torn(self) -> bool:
        """Whether only a part of its files is left, which the command would add to instead of completing them."""
        return (not self.done and self.resumes is not None and not self.resumes.exists()
                and any(path.exists() for path in (self.result, *self.products)))


class StepsFailedError(UserError):
    """Some steps failed; the others were run, but for those that need them."""


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Sorts the steps so that each comes after those it needs."""
    ordered: dict[Step, None] = {}
    while len(ordered) < len(steps):
        ordered |= dict.fromkeys(step for step in steps if all(need in ordered for need in step.needs))
    return list(ordered)


class Ledger:
    """Records which command made each result, from which versions of its inputs, and how long it took; written before
    a command begins.

    Args:
        path: a JSON file.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        with reading(f"{path}, which says what each result was made by,",
                     f"restore it, or move {path.parent} away to start over"):
            self.made: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
            if not all(isinstance(made["asked"], str) and made.get("seconds", 0) >= 0 for made in self.made.values()):
                raise ValueError("a command or its seconds are missing")

    def knows(self, step: Step) -> bool:
        """Whether the step's files, if there are any, were made by its command and config, and from the results of the
        steps that it needs as they are now. (Earlier versions stamped nothing.)"""
        made = self.made.get(step.name)
        return (made is not None and made["asked"] == step.asked
                and _that_decide(made.get("config")) == _that_decide(step.config)
                and made.get("needs", dict.fromkeys(need.name for need in step.needs)) == self._stamps(step))

    def done(self, step: Step) -> bool:
        """Whether the step's files are there, complete and by its command."""
        return step.done and self.knows(step) and not self._failed(step)

    def _failed(self, step: Step) -> bool:
        return self.made.get(step.name, {}).get("failed", False)

    def command(self, step: Step) -> str:
        """The command that made the step's result, with its number of ranks."""
        return self.made.get(step.name, {}).get("command", str(step))

    def _stamps(self, step: Step) -> dict[str, str | None]:
        """Which version of each input there is now."""
        return {need.name: self.made.get(need.name, {}).get("stamp") for need in step.needs}

    def check(self, step: Step) -> None:
        """Refuses to replace files in a step's place if it is not known what made them, or to complete what is left of
        them."""
        if step.name not in self.made and step.made.exists():
            raise UserError(f"nobody knows which command made {step.made}; move it away")
        if self.knows(step) and step.torn and not self._failed(step):
            raise UserError(f"some files are gone from {step.made}; restore them, or move it away to make all again")

    def begin(self, step: Step) -> None:
        """Prepares to begin or resume a step; removes what another command made, or made from other inputs, and what
        the command would add to instead of completing it."""
        completes = self._failed(step) and step.resumes is None  # perhaps only its pictures are missing
        if not self.knows(step) or step.torn or (step.done and not completes):
            remove(step.made)
        if not step.made.exists():
            self.made[step.name] = {"asked": step.asked, "command": str(step), "config": step.config, "seconds": 0.0,
                                    "stamp": uuid.uuid4().hex[:8], "needs": self._stamps(step)}
            self.write()
        elif self.made[step.name].pop("failed", None):
            self.write()

    def fail(self, step: Step) -> None:
        """Records that its command failed, whatever files it has left."""
        self.made[step.name]["failed"] = True
        self.write()

    def add(self, step: Step, seconds: float) -> None:
        """Adds to the seconds spent on a step."""
        self.made[step.name]["seconds"] += round(seconds, 1)
        self.write()

    def write(self) -> None:
        write_json(self._path, self.made)


def _that_decide(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a distillation's YAML that affect its result."""
    return {name: value for name, value in (config or {}).items()
            if name in defaults(DistillConfig) and about(name, DistillConfig)["decides"]}


@dataclass(frozen=True)
class _Running:
    """A running command."""

    step: Step
    output: Path
    begins_at: int  # offset in its output, which may hold earlier attempts
    began: float

    def ending(self, code: int) -> str:
        """How it ended, and why, if it said so."""
        if code < 0:
            memory = ", perhaps for lack of memory, against which a smaller --jobs helps"
            return f"was killed by {signal.Signals(-code).name}{memory * (-code == signal.SIGKILL)}"
        lines = self.output.read_bytes()[self.begins_at:].decode(errors="replace").replace("\r", "\n").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        why = next((line for line in reversed(lines) if "error: " in line), lines[-1] if lines else "it said nothing")
        return f"ended with exit code {code}: {why}"


def run_steps(steps: Sequence[Step], jobs: int, output: Path, ledger: Ledger, environment: Mapping[str, str],
              lock: TextIO) -> None:
    """Runs the steps that are not done yet, or not by their current command, each after those it needs. If one fails,
    those that do not need it are run nevertheless.

    A signal stops the commands as it would stop each of them alone: they save, and are resumed the next time. A second
    one is passed on too, and stops them at once.

    Args:
        jobs: how many run at once.
        output: a folder for what each command prints.
        lock: stays locked as long as a command runs, even if this process is killed.

    Raises:
        StepsFailedError: some commands failed.
        UserError: it is not known what made the files in a step's place, or some of them are gone.
    """
    check_writable(output / "commands")
    output.mkdir(parents=True, exist_ok=True)
    waiting: list[Step] = []
    for step in in_order(steps):  # a step is made again if one that it needs is
        if not ledger.done(step) or set(step.needs) & set(waiting):
            ledger.check(step)
            waiting.append(step)
    waiting = [step for step in steps if step in waiting]
    done, total = set(steps) - set(waiting), len(waiting)
    running: dict[subprocess.Popen, _Running] = {}
    failed: list[str] = []  # what was said of each
    if waiting:
        print(f"{total} of {len(steps)} commands are to be run; what each prints goes to {output}/", flush=True)
    with interrupt.queued() as signals:  # so that no command is left running
        try:
            while waiting or running:
                free = jobs - sum(jobs if command.step.alone else 1 for command in running.values())
                ready = next((step for step in waiting if done.issuperset(step.needs)), None)
                if ready and free >= (jobs if ready.alone else 1):
                    waiting.remove(ready)
                    print(f"[{total - len(waiting)} of {total}] {ready}", flush=True)
                    ledger.begin(ready)
                    process, command = _start(ready, output / f"{ready.name}.txt", environment, lock)
                    running[process] = command
                    _name(lock, running)
                    continue
                if not running:
                    assert failed, f"{waiting[0].name} needs what no step makes"
                    break  # the rest needs what failed
                sleep(LOOK_SECONDS)
                if signals:
                    raise interrupt.Stopped(signals.pop(0))
                for process in [process for process in running if process.poll() is not None]:
                    command = running.pop(process)
                    ledger.add(command.step, perf_counter() - command.began)
                    _name(lock, running)
                    if process.returncode or not command.step.done:
                        failed.append(f"{command.step} {command.ending(process.returncode)} (all of it in "
                                      f"{command.output})")
                        print(f"    failed: {failed[-1]}", file=sys.stderr, flush=True)
                        ledger.fail(command.step)
                        continue
                    done.add(command.step)
                    print(f"    {command.step.name} done in {duration(ledger.made[command.step.name]['seconds'])}",
                          flush=True)
        finally:
            for process in running:
                process.terminate()
            while any(process.poll() is None for process in running):
                sleep(LOOK_SECONDS)
                if signals:
                    signals.clear()
                    for process in running:
                        process.terminate()
            for command in running.values():
                ledger.add(command.step, perf_counter() - command.began)
    if failed:
        raise StepsFailedError(
            (failed[0] if len(failed) == 1 else f"{len(failed)} commands failed, the first: {failed[0]}")
            + f"; commands not run, as they need what failed: {len(waiting)}" * bool(waiting)
            + "; the same command resumes once that is fixed")


def _start(step: Step, output: Path, environment: Mapping[str, str], lock: TextIO) -> tuple[subprocess.Popen, _Running]:
    with open(output, "ab", opener=no_links) as file:
        # A session of its own, so that Ctrl-C in a terminal reaches it only through this process.
        process = subprocess.Popen(step.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                   env=environment, start_new_session=True, pass_fds=(lock.fileno(),))
        return process, _Running(step, output, file.tell(), perf_counter())


def _name(lock: TextIO, running: Mapping[subprocess.Popen, _Running]) -> None:
    """Adds the running commands to the lock's message, as this process may be killed before they end."""
    started = ", ".join(str(process.pid) for process in running)
    sign(lock, f", which started {started}" if started else "")
