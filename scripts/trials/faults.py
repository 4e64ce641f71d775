"""Runs the programs on full and read-only disks, and shows what they print. What needs no disk of its own (damaged
files, closed folders, outputs that cannot be written, second runs) is in the tests.

    python scripts/trials/faults.py [--only WORD …] [--json FILE]

Every fault must be answered by exit code 2 and one line. No existing file may change, and no temporary file may stay.
Once a full disk has space again, the same command must run to its end. The disks are small tmpfs mounts, which need
root on Linux; elsewhere the faults are listed as skipped.

All runs use MiniFashion and a narrow network; about a minute.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from scripts.common import ScriptParser
from scripts.trials import common
from scripts.trials.common import BUFFER, DATM, EVALUATION, temporary
from utils.errors import UserError
from utils.program.console import table
from utils.program.entry import entry
from utils.program.progress import Progress

EPOCH = "buffers/*/*/unfinished/expert_{}/epoch_1.pt"  # of an expert that is being trained
METRICS, RESULT = (f"{common.RUN}/{name}" for name in ("metrics.jsonl", "result.json"))


class SkippedError(Exception):
    """This fault cannot be injected here."""


# --- the scene of a fault ------------------------------------------------------------------------------------


class Scene:
    """A fault's own folder, with what the programs need, and its row of the table."""

    def __init__(self, folder: Path, experts: Path, cache: Path):
        self.folder, self._experts, self._cache = folder, experts, cache
        self.disk = folder / "disk"  # where a small disk is mounted, if the fault needs one
        self.disk.mkdir(parents=True)
        self.row: dict[str, Any] = {}

    def prepare(self, script: str) -> None:
        """Puts a program's input into the folder: a distilled set, or three experts in two files."""
        if script == EVALUATION:
            common.write_set(self.folder / "set", common.noise(10, 1, 28, 28), common.noise(10, 10))
        else:
            shutil.copytree(self._experts, self.disk / "buffers", dirs_exist_ok=True)

    def usual(self, script: str) -> list[str]:
        """A program, with options that work."""
        buffers = f"--buffer_path={self.disk}/buffers"
        files = [f"--{name}={path}" for name, path in common.set_files(self.folder / "set").items()]
        return [script, *{
            BUFFER: [*common.TRAIN, buffers],
            DATM: [*common.DISTIL, "--Iteration=20", "--eval_it=10", "--syn_steps=3", "--epoch_eval_train=5", buffers,
                   f"--log_path={self.disk}/logs"],
            EVALUATION: [*common.COMMON, "--epoch_eval_train=40", "--num_eval=6", f"--json={self.disk}/result.json",
                         *files]}[script]]

    def run(self, *command: str, expect: int = 0) -> str:
        """Runs a program, checks its exit code and returns its stderr."""
        with common.start(command, self._cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=common.MOST_SECONDS)
        assert process.returncode == expect, f"exit code {process.returncode} instead of {expect}\n{out}\n{err}"
        assert "Traceback" not in err, err
        return err

    def refused(self, *command: str) -> None:
        """Runs a program that must be refused in one line, with nothing lost; fills the row."""
        before = files_of(self.folder)
        printed = [line for line in self.run(*command, expect=2).splitlines() if line.strip()]
        errors = [line for line in printed if "error:" in line]
        assert len(errors) == 1 and printed[-1] == errors[0], printed
        assert errors[0].startswith(f"{Path(command[0]).name}: error: "), errors[0]
        after = files_of(self.folder)
        lost = [path.name for path, content in before.items() if after.get(path) != content]
        assert not lost, f"changed or lost: {lost}"
        left = temporary(self.folder)
        assert not left, f"temporary files left: {left}"
        self.row |= {"program": Path(command[0]).name, "exit_code": 2, "printed": shortened(errors[0], self.folder)}


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def shortened(line: str, folder: Path) -> str:
    """An error line without the name of its program, with only the last part of paths."""
    line = line.split(": error: ", 1)[1]
    return re.sub(rf"{re.escape(str(folder))}(/[^\s,;:')]*)?", lambda path: Path(path[0]).name, line)


# --- the disk ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(scene: Scene, kilobytes: int) -> Iterator[None]:
    """Mounts a tmpfs as the scene's disk."""
    if sys.platform != "linux" or os.geteuid():
        raise SkippedError("mounting a small disk wants root on Linux")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(scene.disk)],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedError(f"mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(scene.disk)], check=True)


def remount(scene: Scene, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(scene.disk)], check=True)


@contextlib.contextmanager
def read_only(scene: Scene) -> Iterator[None]:
    """Makes the scene's disk read-only, with whatever is on it; by a mount, as permissions do not stop root."""
    aside = shutil.copytree(scene.disk, scene.folder / "aside")
    with small_disk(scene, 16_000):
        shutil.copytree(aside, scene.disk, dirs_exist_ok=True)
        remount(scene, "ro")
        yield


def fill(scene: Scene) -> None:
    """Takes all the space that is left on a small disk."""
    with contextlib.suppress(OSError), (scene.disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def filled_when(scene: Scene, pattern: str, command: list[str]) -> None:
    """A command is refused because the disk fills up as soon as a file of that pattern appears."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if any(scene.disk.glob(pattern)):
                return fill(scene)
            sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        scene.refused(*command)
    finally:
        stop.set()
        thread.join()
    assert (scene.disk / "filler").exists(), "the disk was not filled"


# --- the kinds of faults -------------------------------------------------------------------------------------


def no_space(scene: Scene, script: str, kilobytes: int, *options: str, full: bool = False, full_when: str = "",
             results: str = "", count: int = 1) -> None:
    """A program is refused on a small disk; once there is space, the same command runs to its end.

    Args:
        full, full_when: the disk is full from the beginning, or once there is a file of that pattern.
        results, count: the pattern of what the program makes, and how many there are in the end; empty: it is not run
            again, as that would take too long.
    """
    with small_disk(scene, kilobytes):
        scene.prepare(script)
        command = [*scene.usual(script), *options]
        if full:
            fill(scene)
        if full_when:
            filled_when(scene, full_when, command)
        else:
            scene.refused(*command)
        if results:
            (scene.disk / "filler").unlink(missing_ok=True)
            remount(scene, "size=64m")
            scene.run(*command)
            scene.row["resumed_once_fixed"] = True
            assert len(list(scene.disk.glob(results))) == count


def in_read_only_folder(scene: Scene, script: str) -> None:
    scene.prepare(script)
    with read_only(scene):
        scene.refused(*scene.usual(script))


# --- the faults ----------------------------------------------------------------------------------------------


FAULTS: dict[str, Callable[[Scene], None]] = {}


def fault(name: str, kind: Callable[..., None], *arguments: Any, **more: Any) -> None:
    FAULTS[name] = lambda scene: kind(scene, *arguments, **more)


fault("no space for that many experts", no_space, BUFFER, 1000, "--num_experts=100")
fault("the disk fills up while experts are trained", no_space, BUFFER, 4000, full_when=EPOCH.format(4),
      results="buffers/*/*/replay_buffer_*.pt", count=4)
fault("the disk fills up during a distillation", no_space, DATM, 12_000, full_when=METRICS, results=RESULT)
fault("no space for the whole distilled set", no_space, DATM, 12_000, full_when=f"{common.RUN}/Normal/lr_20.pt",
      results=RESULT)
fault("no space for the result of an evaluation", no_space, EVALUATION, 100, full=True, results="result.json")
fault("read-only folder, experts", in_read_only_folder, BUFFER)
fault("read-only folder, distillation", in_read_only_folder, DATM)
fault("read-only folder, evaluation", in_read_only_folder, EVALUATION)


# --- the program ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = ScriptParser(__doc__, json="the table")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="faults whose names have one of these")
    args = parser.parse_args()
    chosen = {name: function for name, function in FAULTS.items() if any(word in name for word in args.only)}
    if not chosen:
        raise UserError(f"--only {' '.join(args.only)}: no such fault; there are {'; '.join(FAULTS)}")

    rows, failures, began = [], [], perf_counter()
    shown = [("fault", "program", "exit code", "what it printed")]
    with tempfile.TemporaryDirectory(prefix="faults_") as folder, Progress(len(chosen), "faults") as bar:
        experts, cache = Path(folder, "experts"), Path(folder, "cache")
        Scene(Path(folder, "first"), experts, cache).run(BUFFER, *common.TRAIN, f"--buffer_path={experts}")
        for number, (name, function) in enumerate(chosen.items()):
            scene = Scene(Path(folder, str(number)), experts, cache)
            try:
                function(scene)
            except SkippedError as reason:
                scene.row = {"printed": f"skipped: {reason}"}
            except Exception as error:  # the other faults are still worth trying
                failures.append(name)
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                scene.row |= {"printed": f"FAILED: {' '.join(str(error).split())[:60]}"}
            rows.append(row := {"fault": name, "program": "", "exit_code": ""} | scene.row)
            went_on = "; resumed once fixed" if "resumed_once_fixed" in row else ""
            shown.append((name, row["program"], str(row["exit_code"]), row["printed"] + went_on))
            bar.update()
    print(table(shown))
    if failures:
        print(f"\n{len(failures)} of {len(rows)} failed: {'; '.join(failures)}")
    common.conclude(args.json, {"faults": rows, "failures": failures, "seconds": perf_counter() - began},
                    failed=bool(failures))


if __name__ == "__main__":
    entry(main)
