"""Commands that make files from each other's files: each run once, several at a time, going on where it was stopped."""

import hashlib
import json
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, TextIO

from utils import interrupt
from utils.errors import UserError
from utils.files import check_writable
from utils.progress import duration
from utils.run import write_json

LOOK_SECONDS = 0.2  # between two looks at the commands that run
NOTE_SECONDS = 10.0  # between two notes of how long they have run, for the case of a kill


@dataclass(frozen=True)
class Step:
    """A command, and the file that is there when it is done."""

    name: str
    kind: str
    command: tuple[str, ...]
    result: Path
    product: Path | None = None  # what steps that need it read, if that is another file
    needs: tuple["Step", ...] = ()
    config: Mapping[str, Any] | None = field(default=None, compare=False)  # what the command reads from a YAML
    alone: bool = False  # takes all cores for itself

    def __str__(self) -> str:
        return shlex.join(self.command)

    @property
    def asked(self) -> str:
        """The command but for the number of its ranks, which changes nothing."""
        return shlex.join(self.command[next(at for at, word in enumerate(self.command) if word.endswith(".py")):])

    def digest(self) -> str:
        """Of what it made."""
        with open(self.product or self.result, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Ledger:
    """What each result was made by and of, and how long that took; written before a command begins, so that one that
    finished unseen is known too.

    Args:
        path: a JSON file.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        self.made: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
        if not isinstance(self.made, dict) or not all(isinstance(each, dict) for each in self.made.values()):
            raise UserError(f"{path} is damaged; delete it and what it is about, {path.parent}")

    def differs(self, step: Step) -> str | None:
        """How what was asked for a step's result differs from what the step asks, in words; None if it does not."""
        made = self.made.get(step.name)
        if made is None or "asked" not in made:
            return "by nobody knows what"
        if made["asked"] != step.asked:
            return "by another command"
        if made.get("config") != step.config:
            return "with other options in its YAML"
        return None

    def otherwise(self, step: Step) -> str | None:
        """How the result that is there was made otherwise than by this step, in words; None if it was not, or is not
        there."""
        if not step.result.exists():
            return None
        how = self.differs(step)
        if how:
            return how
        for need in step.needs:
            if not need.result.exists() or not (need.product or need.result).exists():
                return f"of {need.name}, which is gone"
            if self.otherwise(need):
                return f"of {need.name}, which was made otherwise"
            if self.made[step.name].get("of", {}).get(need.name) != need.digest():
                return f"of another {need.name}"
        return None

    def check(self, steps: Sequence[Step]) -> None:
        """Refuses results that are not those of the steps.

        Raises:
            UserError: names them all, and what to delete.
        """
        found = {step: how for step in steps if (how := self.otherwise(step))}
        if found:
            first, how = next(iter(found.items()))
            old = " ".join(shlex.quote(str(step.result.parent if step.config else step.result)) for step in found)
            more = f", and {len(found) - 1} more were made otherwise" if len(found) > 1 else ""
            raise UserError(f"{first.result} was made {how}{more}; delete {old} to make that again")

    def begin(self, step: Step) -> None:
        """A step that is not done is begun, or goes on."""
        before = self.made.get(step.name, {})
        entry = {"asked": step.asked, "config": step.config, "of": {need.name: need.digest() for need in step.needs}}
        goes_on = not before.get("done") and all(before.get(name) == value for name, value in entry.items())
        self.made[step.name] = entry | {"seconds": before["seconds"] if goes_on else 0.0, "done": False}
        self.write()

    def add(self, step: Step, seconds: float, done: bool = False) -> None:
        """So many more seconds were spent on it."""
        entry = self.made[step.name]
        entry.update(seconds=round(entry["seconds"] + seconds, 1), done=done)
        self.write()

    def write(self) -> None:
        write_json(self._path, self.made)


def read_json(path: Path) -> Any:
    """
    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to make it again") from error


@dataclass
class _Running:
    """A command at work."""

    step: Step
    output: Path
    begins_at: int  # in its output, where earlier attempts may stand
    noted: float  # until when its time is in the ledger

    def note(self, ledger: Ledger, ended: bool = False) -> None:
        seconds = perf_counter() - self.noted
        if ended or seconds > NOTE_SECONDS:
            ledger.add(self.step, seconds, ended and self.step.result.exists())
            self.noted += seconds

    def said(self) -> str:
        """Why it ended, as far as it said."""
        lines = self.output.read_bytes()[self.begins_at:].decode(errors="replace").replace("\r", "\n").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        return next((line for line in reversed(lines) if "error: " in line), lines[-1] if lines else "it said nothing")


def run(steps: Sequence[Step], jobs: int, output: Path, ledger: Ledger, environment: Mapping[str, str],
        lock: TextIO) -> None:
    """Runs the steps that are not done, so many at once, each after those it needs.

    A signal stops the commands as it would stop each of them alone: they save, and go on the next time. A second one is
    handed on too, and stops them at once.

    Args:
        output: a folder for what each command prints.
        lock: stays locked as long as a command runs, even if this process is killed.

    Raises:
        UserError: a command failed, and the others were stopped; or results that are there are not those of the steps.
    """
    ledger.check(steps)
    check_writable(output / "commands")
    waiting = [step for step in steps if not step.result.exists()]
    done, total = {step for step in steps if step not in waiting}, len(waiting)
    running: dict[subprocess.Popen, _Running] = {}
    if waiting:
        print(f"{total} of {len(steps)} commands are to be run; what each prints goes to {output}/", flush=True)
    try:
        while waiting or running:
            free = jobs - sum(jobs if each.step.alone else 1 for each in running.values())
            ready = next((step for step in waiting if done.issuperset(step.needs)), None)
            if ready and free >= (jobs if ready.alone else 1):
                waiting.remove(ready)
                print(f"[{total - len(waiting)} of {total}] {ready}", flush=True)
                ledger.begin(ready)
                _start(ready, output / f"{ready.name}.txt", environment, lock, running)
                continue
            sleep(LOOK_SECONDS)
            for process, each in list(running.items()):
                ended = process.poll() is not None
                each.note(ledger, ended)
                if not ended:
                    continue
                del running[process]
                if process.returncode or not each.step.result.exists():
                    raise UserError(f"{each.step} ended with exit code {process.returncode}: {each.said()} (all of it "
                                    f"in {each.output}); the same command goes on once that is mended")
                done.add(each.step)
                print(f"    {each.step.name} done in {duration(ledger.made[each.step.name]['seconds'])}", flush=True)
                ledger.check([step for step in steps if each.step in step.needs])
    finally:
        _stop(running)
        for each in running.values():
            each.note(ledger, ended=True)


def _start(step: Step, output: Path, environment: Mapping[str, str], lock: TextIO,
           running: dict[subprocess.Popen, _Running]) -> None:
    with interrupt.blocked(), open(output, "ab") as file:  # so that none is started that is not stopped
        # A session of its own, so that a terminal's Ctrl-C reaches it once, from here.
        process = subprocess.Popen(step.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                   env=environment, start_new_session=True, pass_fds=(lock.fileno(),),
                                   preexec_fn=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, interrupt.SIGNALS))
        running[process] = _Running(step, output, file.tell(), perf_counter())


def _stop(running: Mapping[subprocess.Popen, _Running]) -> None:
    """Ends the commands that still run, and waits for them."""
    for process in running:
        process.terminate()
    while any(process.poll() is None for process in running):
        try:
            sleep(LOOK_SECONDS)
        except interrupt.Stopped:
            for process in running:
                process.terminate()
