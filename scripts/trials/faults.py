"""Injects faults, runs the affected program, and shows what it printed.

    python scripts/trials/faults.py [--only WORD …] [--json FILE]

Every fault must either be answered by exit code 2 and one line, or do no harm. No existing file may change, and no
temporary file may stay. A fault that can be repaired (such as a full disk) is repaired, and the same command must then
run to its end. Full and read-only disks are small tmpfs mounts, which need root on Linux; root's right to enter closed
folders is dropped. Faults that cannot be injected here are listed as skipped.

All runs use MiniFashion and a narrow network; about five minutes.
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
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

import numpy as np

from scripts.common import ScriptParser
from scripts.trials import common
from scripts.trials.common import BUFFER, DATM, EVALUATION, temporary
from utils.errors import UserError
from utils.program.console import table
from utils.program.entry import entry
from utils.program.progress import Progress

MARKER, FOREIGN = "it ran", "somebody else's"
# Nested lists, each of nine aliases of the one before ("billion laughs").
LAUGHS = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (number, number, b", ".join([b"*a%d" % (number - 1)] * 9)) for number in range(1, 30))
EPOCH = "buffers/*/*/unfinished/expert_{}/epoch_1.pt"  # of an expert that is being trained
METRICS, CHECKPOINT, RESULT = (f"{common.RUN}/{name}" for name in ("metrics.jsonl", "checkpoint.pt", "result.json"))
RHO = ("--rho_max=0.05", "--rho_min=0.05")  # not that of the experts that are there


class SkippedError(Exception):
    """This fault cannot be injected here."""


class Bomb:
    """Code in a file: unpickling it makes the folder `marker`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# --- the scene of a fault ------------------------------------------------------------------------------------


class Scene:
    """A fault's own folder, with what the programs need, and its row of the table."""

    def __init__(self, folder: Path, experts: Path, cache: Path):
        self.folder, self._experts, self._cache = folder, experts, cache
        self.disk = folder / "disk"  # where a small disk is mounted, if the fault needs one
        self.disk.mkdir(parents=True)
        self.row: dict[str, Any] = {}
        self.environment: dict[str, str] = {}  # added to that of the programs

    def copy_experts(self, manifests: bool = True) -> Path:
        """Copies three experts in two files, and returns the first; without manifests they are like published ones."""
        shutil.copytree(self._experts, self.disk / "buffers", dirs_exist_ok=True,
                        ignore=None if manifests else shutil.ignore_patterns("*.yaml", "*.jsonl"))
        return self.disk / common.EXPERTS / "replay_buffer_0.pt"

    def write_set(self, **other: Any) -> None:
        """Writes a distilled set, random except for the given tensors."""
        tensors = {"images": common.noise(10, 1, 28, 28), "labels": common.noise(10, 10)} | other
        common.write_set(self.folder / "set", **tensors)

    def prepare(self, script: str) -> None:
        """Puts a program's input into the folder."""
        if script == EVALUATION:
            self.write_set()
        else:
            self.copy_experts()

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

    def start(self, *command: str, wrapper: tuple[str, ...] = ()) -> subprocess.Popen:
        return common.start(command, self._cache, wrapper, self.environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)

    def run(self, *command: str, expect: int = 0, wrapper: tuple[str, ...] = ()) -> str:
        """Runs a program, checks its exit code and returns its stderr."""
        with self.start(*command, wrapper=wrapper) as process:
            out, err = process.communicate(timeout=common.MOST_SECONDS)
        assert process.returncode == expect, f"exit code {process.returncode} instead of {expect}\n{out}\n{err}"
        assert "Traceback" not in err, err
        return err

    def refused(self, *command: str, alone: bool = True) -> None:
        """Runs a program that must be refused in one line, with nothing lost; fills the row.

        Args:
            alone: no other program writes files meanwhile.
        """
        watched = self.folder if alone else self.folder / "nothing"
        before, left_before = files_of(watched), temporary(watched)
        printed = [line for line in self.run(*command, expect=2).splitlines() if line.strip()]
        errors = [line for line in printed if "error:" in line]
        assert len(errors) == 1 and printed[-1] == errors[0], printed
        assert errors[0].startswith(f"{Path(command[0]).name}: error: "), errors[0]
        after = files_of(watched)
        lost = [path.name for path, content in before.items() if after.get(path) != content]
        assert not lost, f"changed or lost: {lost}"
        left = set(temporary(watched)).difference(left_before)
        assert not left, f"temporary files left: {left}"
        assert not list(self.folder.rglob(MARKER)), "code in a file was run"
        self.row |= {"program": Path(command[0]).name, "exit_code": 2, "printed": shortened(errors[0], self.folder)}

    def answered(self, unnoticed: str, *command: str, wrapper: tuple[str, ...] = ()) -> None:
        """Runs a program that must be refused, or must succeed if there is a reason (`unnoticed`); fills the row."""
        if not unnoticed:
            return self.refused(*command)
        self.run(*command, wrapper=wrapper)
        self.row |= {"program": Path(command[0]).name, "exit_code": 0, "printed": f"nothing: {unnoticed}"}

    def wait_for(self, pattern: str, process: subprocess.Popen) -> Path:
        """Waits for a file of that pattern on the disk, and returns it."""
        while not (there := sorted(self.disk.glob(pattern))):
            assert process.poll() is None, f"it ended before: {process.communicate()}"
            sleep(0.002)
        return there[0]


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def shortened(line: str, folder: Path) -> str:
    """An error line without the name of its program, with only the last part of paths."""
    line = line.split(": error: ", 1)[1]
    line = re.sub(r"process \d+ on [\w.-]+", "process … on …", line)
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
    """A program is refused on a small disk; once there is space, the same command goes on to its end.

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
            scene.row["went_on_once_mended"] = True
            assert len(list(scene.disk.glob(results))) == count


def in_read_only_folder(scene: Scene, script: str) -> None:
    scene.prepare(script)
    with read_only(scene):
        scene.refused(*scene.usual(script))


def damaged_experts(scene: Scene, damage: Callable[[Path], None], script: str = DATM, manifests: bool = True,
                    unnoticed: str = "") -> None:
    """
    Args:
        unnoticed: why the program succeeds nevertheless; empty: it is refused.
    """
    damage(scene.copy_experts(manifests))
    scene.answered(unnoticed, *scene.usual(script))


def damaged_set(scene: Scene, **tensors: Any) -> None:
    scene.write_set(**tensors)
    scene.refused(*scene.usual(EVALUATION))


def set_with_code(scene: Scene) -> None:
    damaged_set(scene, labels=[Bomb(scene.folder / MARKER)])


def set_with_nan(scene: Scene) -> None:
    images = common.noise(10, 1, 28, 28)
    images[3, 0, 14, 14] = np.nan
    damaged_set(scene, images=images)


def second_is_refused(scene: Scene, script: str, at_work: str, *options: str) -> None:
    """Of two runs at the same time, the second one is refused.

    Args:
        at_work: the pattern of a file; the second run is started once the first one has written it.
    """
    scene.prepare(script)
    command = [*scene.usual(script), *options]
    with scene.start(*command) as first:
        try:
            scene.wait_for(at_work, first)
            scene.refused(*command, alone=False)
            assert first.poll() is None, "the first one ended before"
            out, err = first.communicate(timeout=common.MOST_SECONDS)
        finally:
            first.kill()
    assert first.returncode == 0, f"the first one ended with {first.returncode}\n{out}\n{err}"


def interrupted(scene: Scene, damage: Callable[[Path], None], script: str, pattern: str, *options: str,
                unnoticed: str = "") -> None:
    """A program is killed as soon as there is a file of that pattern, which is damaged before the program is resumed.

    Args:
        unnoticed: why the program succeeds nevertheless; empty: it is refused, and starts over with --resume=never.
    """
    scene.prepare(script)
    command = [*scene.usual(script), *options]
    with scene.start(*command) as process:
        left = scene.wait_for(pattern, process)
        process.kill()
    damage(left)
    scene.answered(unnoticed, *command)
    if not unnoticed:
        scene.run(*command, "--resume=never")


def experts_of_another_rho(scene: Scene) -> None:
    """Among the expert files is one that was trained elsewhere, with another rho."""
    path = scene.copy_experts()
    others = scene.folder / "others"
    scene.run(*scene.usual(BUFFER), *RHO, "--num_experts=1", f"--buffer_path={others}")
    for suffix in (".pt", ".yaml", ".jsonl"):
        shutil.copy(next(others.rglob(f"replay_buffer_0{suffix}")), path.with_name(f"replay_buffer_2{suffix}"))
    scene.refused(*scene.usual(DATM))


def experts_of_another_rho_are_added(scene: Scene) -> None:
    scene.copy_experts()
    scene.refused(*scene.usual(BUFFER), *RHO)


def closed_folder(scene: Scene, script: str, option: str = "", *more: str, variable: str = "",
                  unnoticed: str = "") -> None:
    """A path below a folder that may not be entered, in an option or an environment variable."""
    scene.prepare(script)
    closed = scene.folder / "closed"
    closed.mkdir(mode=0)
    try:
        if os.access(closed, os.X_OK):
            raise SkippedError("this user may enter every folder")
        scene.environment |= {variable: str(closed / "x")} if variable else {}
        scene.answered(unnoticed, *scene.usual(script), *([f"--{option}={closed}/x"] if option else []), *more)
    finally:
        closed.chmod(0o700)


def nobody_listens(scene: Scene, script: str, how: str, results: str) -> None:
    """A program whose output cannot be written does its work all the same.

    Args:
        how: where bash sends the output.
        results: the pattern of what the program makes.
    """
    scene.prepare(script)
    scene.answered("nobody listens, and it goes on", *scene.usual(script),
                   wrapper=("bash", "-c", f'set -o pipefail; "$@" {how}', "bash"))
    assert list(scene.disk.glob(results)), "it made nothing"


def hostile(scene: Scene, prepare: Callable[[Scene], list[str]], script: str = DATM, unnoticed: str = "") -> None:
    """
    Args:
        prepare: puts a file of somebody else's where the program meets it, and returns options for the program.
        unnoticed: why the program succeeds nevertheless; empty: it is refused.
    """
    scene.prepare(script)
    scene.answered(unnoticed, *scene.usual(script), *prepare(scene))
    foreign = scene.folder / "foreign"
    assert not foreign.exists() or foreign.read_text() == FOREIGN, "a file of somebody else was written"


def aliases_in_a_manifest(scene: Scene) -> list[str]:
    (scene.disk / common.EXPERTS / "replay_buffer_0.yaml").write_bytes(LAUGHS)
    return []


def aliases_in_a_config(scene: Scene) -> list[str]:
    scene.disk.joinpath(common.RUN).mkdir(parents=True)
    scene.disk.joinpath(common.RUN, "config.yaml").write_bytes(LAUGHS)
    return []


def linked_lock(scene: Scene) -> list[str]:
    scene.disk.joinpath(common.RUN).mkdir(parents=True)
    scene.disk.joinpath(common.RUN, ".lock").symlink_to(scene.folder / "foreign")
    (scene.folder / "foreign").write_text(FOREIGN)
    return []


def foreign_files_beside(scene: Scene) -> list[str]:
    names = [".result.json.original", ".result.json.12345678.json", "result.json.unfinished_notes.txt"]
    for name in names:
        (scene.disk / name).write_text(FOREIGN)
    scene.run(*scene.usual(EVALUATION))
    assert all((scene.disk / name).read_text() == FOREIGN for name in names)
    return []


def result_over_experts(scene: Scene) -> list[str]:
    return [f"--json={scene.copy_experts()}"]


def postscript_as_png(scene: Scene) -> list[str]:
    for split in ("train", "test"):
        for name in ("a", "b"):
            path = scene.folder / "own" / split / name / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
                             + f"({scene.folder / MARKER}) (w) file closefile showpage\n".encode())
    return ["--dataset=ImageFolder", f"--data_path={scene.folder}/own"]


def own_backend_of_pictures(scene: Scene) -> list[str]:
    scene.environment["MPLBACKEND"] = "module://not_here.backend"
    return []


# --- what is done to a file ----------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path: Path, bit: int, becomes: float) -> None:
    """Flips a bit of one parameter, the norm's first weight at the initialisation, which is 1."""
    experts = common.load(path)
    first, scale = (tensor.numpy() for tensor in experts[0][0][1:3])
    content = bytearray(path.read_bytes())
    assert (scale == 1).all(), "the third tensor is not the norm's weight"
    # The tensors of a snapshot are stored in order, so the bias before it tells where in the file it is.
    offset = content.index(first.tobytes() + scale.tobytes()) + first.nbytes
    content[offset + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    assert np.frombuffer(content, np.float32, 1, offset)[0] == becomes


flip_fraction = partial(flip, bit=20, becomes=1.125)
flip_exponent = partial(flip, bit=30, becomes=float("inf"))


def put_nan(path: Path) -> None:
    experts = common.load(path)
    experts[1][2][0][0] = np.nan
    common.save(experts, path)


def put_code(path: Path) -> None:
    common.save([[[Bomb(path.parent / MARKER)]]], path)


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

fault("expert file cut", damaged_experts, cut)
fault("expert file cut, more experts are trained", damaged_experts, cut, BUFFER)
fault("published expert file (no manifest) cut", damaged_experts, cut, manifests=False)
fault("a bit flipped in an expert file, the value stays finite", damaged_experts, flip_fraction)
fault("a bit flipped in a published expert file, the value becomes infinite", damaged_experts, flip_exponent,
      manifests=False)
fault("a bit flipped in a published expert file, the value stays finite", damaged_experts, flip_fraction,
      manifests=False, unnoticed="without a checksum it cannot be noticed")
fault("NaN in a published expert file", damaged_experts, put_nan, manifests=False)
fault("expert file with code in it", damaged_experts, put_code, manifests=False)
fault("experts of another rho are added to a folder", experts_of_another_rho_are_added)
fault("experts of another rho were put into a folder", experts_of_another_rho)

fault("two runs train experts in one folder at the same time", second_is_refused, BUFFER, EPOCH.format("*"),
      "--num_experts=8")
fault("two runs distil in one folder at the same time", second_is_refused, DATM, METRICS, "--Iteration=200",
      "--eval_it=200")

fault("checkpoint of a distillation cut", interrupted, cut, DATM, CHECKPOINT, "--Iteration=200")
fault("checkpoint of a distillation with code in it", interrupted, put_code, DATM, CHECKPOINT, "--Iteration=200")
fault("saved epoch of an unfinished expert cut", interrupted, cut, BUFFER, EPOCH.format(3))
fault("unfinished result of an evaluation cut", interrupted, cut, EVALUATION, "result.json.unfinished",
      unnoticed="it tests those networks again")

fault("distilled set with code in it", set_with_code)
fault("distilled images with NaN", set_with_nan)
fault("distilled set of another number of classes", damaged_set, labels=common.noise(10, 100))
fault("distilled images of 1e300, infinite in float32", damaged_set,
      images=np.full((10, 1, 28, 28), 1e300))
fault("distilled set of another image size", damaged_set, images=common.noise(10, 1, 32, 32))

for _option, _script, *_more in (
        ("buffer_path", BUFFER), ("data_path", BUFFER, "--dataset=ImageFolder"), ("log_path", DATM),
        ("buffer_path", DATM), ("data_dir", EVALUATION), ("json", EVALUATION), ("save", EVALUATION)):
    fault(f"a folder that may not be entered, --{_option} of {Path(_script).name}", closed_folder, _script, _option,
          *_more)
fault("a cache folder that may not be entered", closed_folder, BUFFER, variable="DATM_CACHE")
for _how, _where in (("is full", ">/dev/full 2>&1"), ("is closed", ">&- 2>&-"),
                     ("has lost its reader", "2>&1 | head -n 1 >/dev/null")):
    fault(f"the output {_how}", nobody_listens, DATM, _where, RESULT)

fault("a manifest of aliases of aliases", hostile, aliases_in_a_manifest)
fault("a config.yaml of aliases of aliases", hostile, aliases_in_a_config)
fault("a .lock that links to somebody else's file", hostile, linked_lock)
fault("hidden files of somebody else's beside the result", hostile, foreign_files_beside, EVALUATION,
      unnoticed="it leaves them")
fault("the result in the place of an expert file", hostile, result_over_experts, EVALUATION)
fault("PostScript in an image named .png", hostile, postscript_as_png, BUFFER)
fault("a picture backend of the user's that is not there", hostile, own_backend_of_pictures,
      unnoticed="its pictures are its own")


# --- the program ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = ScriptParser(__doc__, json="the table")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="faults whose names have one of these")
    args = parser.parse_args()
    common.obey_permissions()
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
            went_on = "; went on once mended" if "went_on_once_mended" in row else ""
            shown.append((name, row["program"], str(row["exit_code"]), row["printed"] + went_on))
            bar.update()
    print(table(shown))
    if failures:
        print(f"\n{len(failures)} of {len(rows)} failed: {'; '.join(failures)}")
    common.conclude(args.json, {"faults": rows, "failures": failures, "seconds": perf_counter() - began},
                    failed=bool(failures))


if __name__ == "__main__":
    entry(main)
