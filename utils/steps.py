"""Commands that make files from each other's files: each run once, several at a time, going on where it was stopped."""

import contextlib
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from utils import interrupt
from utils.errors import UserError
from utils.files import check_writable, sha256, write_json
from utils.program.console import duration

LOOK_SECONDS = 0.2  # between two looks at the commands that run
NOTE_SECONDS = 10.0  # between two notes of how long they have run, for the case of a kill


@dataclass(frozen=True)
class Step:
    """A command, and the file that is there when it is done."""

    name: str
    kind: str
    command: tuple[str, ...]
    result: Path
    products: tuple[Path, ...] = ()  # what steps that need it read, if those are other files
    folder: Path | None = None  # to be deleted for it to be made again, if not the result alone
    needs: tuple["Step", ...] = ()
    config: Mapping[str, Any] | None = field(default=None, compare=False)  # what the command reads from a YAML
    alone: bool = False  # takes all cores for itself

    def __str__(self) -> str:
        return shlex.join(self.command)

    @property
    def asked(self) -> str:
        """The command but for the number of its ranks, which changes nothing."""
        return shlex.join(self.command[next(at for at, word in enumerate(self.command) if word.endswith(".py")):])

    @property
    def done(self) -> bool:
        return all(path.exists() for path in (self.result, *self.products))

    def digest(self) -> str:
        """Of what it made."""
        stats = ((path, os.stat(path)) for path in self.products or (self.result,))
        found = [_digest(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return hashlib.sha256("".join(found).encode()).hexdigest()


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    return sha256(path)


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
        try:
            self.made: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
            whole = all(isinstance(each["asked"], str) and isinstance(each["of"], dict) and each.get("seconds", 0) >= 0
                        for each in self.made.values())
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{path}, which says what each result was made by, is damaged; restore it, or move "
                            f"{path.parent} away to start over")

    def differs(self, step: Step) -> str | None:
        """How what was asked for a step's result differs from what the step asks, in words; None if it does not."""
        made = self.made.get(step.name)
        if made is None:
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
        if not step.done:
            return "and has lost a file since"
        for need in step.needs:
            if not need.done:
                return f"of {need.name}, which is gone"
            if self.otherwise(need):
                return f"of {need.name}, which was made otherwise"
            if self.made[step.name]["of"].get(need.name) != need.digest():
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
            old = " ".join(shlex.quote(str(step.folder or step.result)) for step in found)
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
            ledger.add(self.step, seconds, ended and self.step.done)
            self.noted += seconds

    def ending(self, code: int) -> str:
        """How it ended, and why, as far as it said."""
        if code < 0:
            return (f"was killed by {signal.Signals(-code).name}, perhaps for lack of memory, against which a smaller "
                    "--jobs helps")
        lines = self.output.read_bytes()[self.begins_at:].decode(errors="replace").replace("\r", "\n").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        why = next((line for line in reversed(lines) if "error: " in line), lines[-1] if lines else "it said nothing")
        return f"ended with exit code {code}: {why}"


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
    waiting = [step for step in steps if not step.done]
    done, total = {step for step in steps if step not in waiting}, len(waiting)
    running: dict[subprocess.Popen, _Running] = {}
    if waiting:
        print(f"{total} of {len(steps)} commands are to be run; what each prints goes to {output}/", flush=True)
    with interrupt.blocked():  # but for where they are waited for, so that no command is left alone
        try:
            while waiting or running:
                free = jobs - sum(jobs if each.step.alone else 1 for each in running.values())
                ready = next((step for step in waiting if done.issuperset(step.needs)), None)
                if ready and free >= (jobs if ready.alone else 1):
                    waiting.remove(ready)
                    print(f"[{total - len(waiting)} of {total}] {ready}", flush=True)
                    ledger.begin(ready)
                    process, each = _start(ready, output / f"{ready.name}.txt", environment, lock)
                    running[process] = each
                    _name(lock, running)
                    continue
                assert running, f"{waiting[0].name} needs what no step makes"
                number = _signal_within(LOOK_SECONDS)
                if number is not None:
                    raise interrupt.Stopped(number)
                for process, each in list(running.items()):
                    ended = process.poll() is not None
                    each.note(ledger, ended)
                    if not ended:
                        continue
                    del running[process]
                    _name(lock, running)
                    if process.returncode or not each.step.done:
                        raise UserError(f"{each.step} {each.ending(process.returncode)} (all of it in {each.output}); "
                                        "the same command goes on once that is mended")
                    done.add(each.step)
                    took = duration(ledger.made[each.step.name]["seconds"])
                    print(f"    {each.step.name} done in {took}", flush=True)
                    ledger.check([step for step in steps if each.step in step.needs])
        finally:
            for process in running:
                process.terminate()
            while any(process.poll() is None for process in running):
                if _signal_within(LOOK_SECONDS) is not None:
                    for process in running:
                        process.terminate()
            for each in running.values():
                each.note(ledger, ended=True)


def _start(step: Step, output: Path, environment: Mapping[str, str], lock: TextIO) -> tuple[subprocess.Popen, _Running]:
    with open(output, "ab") as file:
        # A session of its own, so that a terminal's Ctrl-C reaches it once, from here.
        process = subprocess.Popen(step.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                   env=environment, start_new_session=True, pass_fds=(lock.fileno(),),
                                   preexec_fn=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, interrupt.SIGNALS))
        return process, _Running(step, output, file.tell(), perf_counter())


def _name(lock: TextIO, running: Mapping[subprocess.Popen, _Running]) -> None:
    """Who keeps the folder locked, for the message to whoever comes second: this process may be killed before those."""
    started = ", ".join(str(process.pid) for process in running)
    with contextlib.suppress(OSError):
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}{', which started ' * bool(started)}{started}")
        lock.flush()


def _signal_within(seconds: float) -> int | None:
    """The signal that comes meanwhile, of those that are blocked and not ignored."""
    heeded = [each for each in interrupt.SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    found = signal.sigtimedwait(heeded, seconds)
    return found and found.si_signo
