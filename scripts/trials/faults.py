"""Injects faults, runs the program that meets them, and shows what it printed.

    python scripts/trials/faults.py [--only WORD …] [--json FILE]

Every fault must be answered by exit code 2 and one line; nothing that lay there before may change, and no temporary
file may stay. Where the fault can be mended (space on the disk), it is, and the same command must then go on to its
end. Full and read-only disks are small tmpfs, which want root on Linux; what cannot be injected is said to be skipped.

All on MiniFashion with a narrow network; about five minutes.
"""

import argparse
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

import numpy as np
import torch

from utils.errors import UserError
from utils.files import REPOSITORY, check_writable, write_json
from utils.program.entry import entry
from utils.program.machine import environment

BUFFER, DATM, EVALUATION = "buffer/buffer_FTD.py", "distill/DATM.py", "distill/evaluation.py"
COMMON = ["--dataset=MiniFashion", "--model=ConvNetD1W4", "--zca", "--device=cpu", "--backend=eager"]
TRAIN = ["--num_experts=3", "--train_epochs=2", "--save_interval=2", "--rho_max=0.01", "--rho_min=0.01",
         "--batch_train=256"]
DISTIL = ["--cfg", "configs/MiniFashion/ConvIN/IPC1.yaml", "--Iteration=20", "--eval_it=10", "--syn_steps=3",
          "--expert_epochs=1", "--max_start_epoch=2", "--epoch_eval_train=5", "--run_name=run", "--wandb=disabled"]
EVALUATE = ["--epoch_eval_train=40", "--num_eval=6"]
TEMPORARY = re.compile(r"\..+\.\w{8}(\.\w+)?")
MOST_SECONDS = 300  # that a run may take


class SkippedError(Exception):
    """This fault cannot be injected here."""


class Bomb:
    """Code in a file: unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# --- the scene of a fault ------------------------------------------------------------------------------------


class Scene:
    """A folder of the fault's own, with what the programs need in it, and the table's row."""

    def __init__(self, folder: Path, experts: Path, cache: Path):
        self.folder, self._experts, self._cache = folder, experts, cache
        self.disk = folder / "disk"  # where a small disk is mounted, if one is
        self.disk.mkdir(parents=True)
        self.row: dict[str, Any] = {}

    @property
    def buffers(self) -> Path:
        """The folder of the expert files, once `copy_experts` has put them there."""
        return self.disk / "buffers/MiniFashion/ConvNetD1W4"

    @property
    def run_folder(self) -> Path:
        """Of a distillation."""
        return self.disk / "logs/MiniFashion/1/ConvNetD1W4/run"

    def copy_experts(self, manifests: bool = True) -> Path:
        """Three experts in two files; without their manifests they are as published ones are. The first file."""
        shutil.copytree(self._experts, self.disk / "buffers", dirs_exist_ok=True,
                        ignore=None if manifests else shutil.ignore_patterns("*.yaml", "*.jsonl"))
        return self.buffers / "replay_buffer_0.pt"

    def write_set(self, **other: Any) -> list[str]:
        """Options of a distilled set, random but for the tensors that are given."""
        random = torch.Generator().manual_seed(0)
        usual = {"images": torch.randn(10, 1, 28, 28, generator=random),
                 "labels": torch.randn(10, 10, generator=random), "lr": torch.tensor(0.01)}
        (self.folder / "set").mkdir()
        for name, value in (usual | other).items():
            torch.save(value, self.folder / "set" / f"{name}_best.pt")
        return [f"--{option}={self.folder / 'set' / f'{name}_best.pt'}"
                for option, name in (("data_dir", "images"), ("label_dir", "labels"), ("lr_dir", "lr"))]

    def usual(self, script: str) -> list[str]:
        """The options of a program with which all is well; of an evaluation without its set."""
        return [script, *{
            BUFFER: [*COMMON, *TRAIN, f"--buffer_path={self.disk / 'buffers'}"],
            DATM: [*DISTIL, *COMMON, f"--buffer_path={self.disk / 'buffers'}", f"--log_path={self.disk / 'logs'}"],
            EVALUATION: [*COMMON, *EVALUATE, f"--json={self.disk / 'result.json'}"]}[script]]

    def start(self, *command: str) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DATM_CACHE": str(self._cache), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *command: str, expect: int = 0) -> str:
        """What a program printed on stderr."""
        with self.start(*command) as process:
            out, err = process.communicate(timeout=MOST_SECONDS)
        assert process.returncode == expect, f"exit code {process.returncode} instead of {expect}\n{out}\n{err}"
        return err

    def refused(self, *command: str) -> None:
        """Runs a program that must be answered by one line, with nothing lost; fills the row."""
        before = files_of(self.folder)
        printed = [line for line in self.run(*command, expect=2).splitlines() if line.strip()]
        errors = [line for line in printed if "error:" in line]
        assert "Traceback" not in "\n".join(printed) and len(errors) == 1 and printed[-1] == errors[0], printed
        assert errors[0].startswith(f"{Path(command[0]).name}: error: "), errors[0]
        after = files_of(self.folder)
        lost = [path.name for path, content in before.items() if after.get(path) != content]
        assert not lost, f"changed or lost: {lost}"
        left = [path.name for path in after.keys() - before.keys() if TEMPORARY.fullmatch(path.name)]
        assert not left, f"temporary files left: {left}"
        self.row |= {"program": Path(command[0]).name, "exit_code": 2, "printed": shortened(errors[0], self.folder)}

    def killed_when(self, there: Callable[[], bool], *command: str) -> None:
        """Runs a program and kills it as soon as that is so."""
        with self.start(*command) as process:
            wait_for(there, process)
            process.kill()


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def shortened(line: str, folder: Path) -> str:
    """An error line without the name of its program, and of paths the last part only."""
    line = line.split(": error: ", 1)[1]
    line = re.sub(r"process \d+ on [\w.-]+", "process … on …", line)
    return re.sub(rf"{re.escape(str(folder))}(/[^\s,;:')]*)?", lambda path: Path(path[0]).name, line)


def wait_for(there: Callable[[], bool], process: subprocess.Popen) -> None:
    while not there():
        assert process.poll() is None, f"it ended before: {process.communicate()}"
        sleep(0.002)


@contextlib.contextmanager
def small_disk(scene: Scene, kilobytes: int) -> Iterator[None]:
    """A tmpfs in the place of the scene's disk."""
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
    """Whatever lies on the scene's disk then, which can be read only. Permissions do not stop root, a mount does."""
    if os.geteuid():
        scene.disk.chmod(0o555)
        for folder in [path for path in scene.disk.rglob("*") if path.is_dir()]:
            folder.chmod(0o555)
        try:
            yield
        finally:
            for folder in [scene.disk, *(path for path in scene.disk.rglob("*") if path.is_dir())]:
                folder.chmod(0o755)
    else:
        aside = shutil.copytree(scene.disk, scene.folder / "aside")
        with small_disk(scene, 16_000):
            shutil.copytree(aside, scene.disk, dirs_exist_ok=True)
            remount(scene, "ro")
            yield


def fill(scene: Scene) -> None:
    """Takes all that is left of a small disk."""
    with contextlib.suppress(OSError), (scene.disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def filled_when(scene: Scene, pattern: str, command: list[str]) -> None:
    """Refused, as the disk fills up when a file of that pattern appears."""
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


def mended(scene: Scene, command: list[str]) -> None:
    """With space, the same command goes on to its end."""
    (scene.disk / "filler").unlink(missing_ok=True)
    remount(scene, "size=64m")
    scene.run(*command)
    scene.row["went_on_once_mended"] = True


FAULTS: dict[str, Callable[[Scene], None]] = {}


def fault(name: str) -> Callable:
    def add(function: Callable[[Scene], None]) -> Callable[[Scene], None]:
        FAULTS[name] = function
        return function
    return add


# --- the disk ------------------------------------------------------------------------------------------------


@fault("no space for that many experts")
def _(scene: Scene) -> None:
    with small_disk(scene, 1000):
        scene.copy_experts()
        scene.refused(*scene.usual(BUFFER), "--num_experts=100")


@fault("the disk fills up while experts are trained")
def _(scene: Scene) -> None:
    with small_disk(scene, 4000):
        scene.copy_experts()
        command = scene.usual(BUFFER)
        filled_when(scene, "buffers/*/*/unfinished/expert_4/epoch_1.pt", command)
        mended(scene, command)
        assert len(list(scene.buffers.glob("replay_buffer_*.pt"))) == 4


@fault("the disk fills up during a distillation")
def _(scene: Scene) -> None:
    with small_disk(scene, 12_000):
        scene.copy_experts()
        command = scene.usual(DATM)
        filled_when(scene, "logs/*/*/*/run/metrics.jsonl", command)
        mended(scene, command)
        assert (scene.run_folder / "result.json").exists()


@fault("no space for the whole distilled set")
def _(scene: Scene) -> None:
    with small_disk(scene, 3000):
        scene.copy_experts()
        command = scene.usual(DATM)
        scene.refused(*command)
        mended(scene, command)
        assert (scene.run_folder / "result.json").exists()


@fault("no space for the result of an evaluation")
def _(scene: Scene) -> None:
    command = [*scene.usual(EVALUATION), *scene.write_set()]
    with small_disk(scene, 100):
        fill(scene)
        scene.refused(*command)
        mended(scene, command)
        assert (scene.disk / "result.json").exists()


@fault("read-only folder, experts")
def _(scene: Scene) -> None:
    scene.copy_experts()
    with read_only(scene):
        scene.refused(*scene.usual(BUFFER))


@fault("read-only folder, distillation")
def _(scene: Scene) -> None:
    scene.copy_experts()
    with read_only(scene):
        scene.refused(*scene.usual(DATM))


@fault("read-only folder, evaluation")
def _(scene: Scene) -> None:
    options = scene.write_set()
    with read_only(scene):
        scene.refused(*scene.usual(EVALUATION), *options)


# --- expert files --------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path: Path, bit: int) -> float:
    """Flips a bit of one parameter, the norm's first weight at the initialisation, which is 1; its new value."""
    experts = torch.load(path, weights_only=True)
    first, scale = (tensor.numpy() for tensor in experts[0][0][1:3])
    content = bytearray(path.read_bytes())
    assert (scale == 1).all(), "the third tensor is not the norm's weight"
    # The tensors of a snapshot follow each other, so that the bias before it tells where in the file it is.
    offset = content.index(first.tobytes() + scale.tobytes()) + first.nbytes
    content[offset + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return float(np.frombuffer(content, np.float32, 1, offset)[0])


EXPONENT, FRACTION = 30, 20  # bits: of 1 they make infinity and 1.125


@fault("expert file cut")
def _(scene: Scene) -> None:
    cut(scene.copy_experts())
    scene.refused(*scene.usual(DATM))


@fault("expert file cut, more experts are trained")
def _(scene: Scene) -> None:
    cut(scene.copy_experts())
    scene.refused(*scene.usual(BUFFER))


@fault("published expert file (no manifest) cut")
def _(scene: Scene) -> None:
    cut(scene.copy_experts(manifests=False))
    scene.refused(*scene.usual(DATM))


@fault("a bit flipped in an expert file, the value stays finite")
def _(scene: Scene) -> None:
    assert flip(scene.copy_experts(), FRACTION) == 1.125
    scene.refused(*scene.usual(DATM))


@fault("a bit flipped in a published expert file, the value becomes infinite")
def _(scene: Scene) -> None:
    assert flip(scene.copy_experts(manifests=False), EXPONENT) == float("inf")
    scene.refused(*scene.usual(DATM))


@fault("a bit flipped in a published expert file, the value stays finite")
def _(scene: Scene) -> None:
    assert flip(scene.copy_experts(manifests=False), FRACTION) == 1.125
    scene.run(*scene.usual(DATM))
    scene.row |= {"program": "DATM.py", "exit_code": 0, "printed": "nothing: without a checksum it cannot be noticed"}


@fault("NaN in a published expert file")
def _(scene: Scene) -> None:
    path = scene.copy_experts(manifests=False)
    experts = torch.load(path, weights_only=True)
    experts[1][2][0][0] = torch.nan
    torch.save(experts, path)
    scene.refused(*scene.usual(DATM))


@fault("expert file with code in it")
def _(scene: Scene) -> None:
    path = scene.copy_experts(manifests=False)
    torch.save([[[Bomb(scene.folder / "it ran")]]], path)
    scene.refused(*scene.usual(DATM))
    assert not (scene.folder / "it ran").exists()


@fault("experts of another rho are added to a folder")
def _(scene: Scene) -> None:
    scene.copy_experts()
    scene.refused(*scene.usual(BUFFER), "--rho_max=0.05", "--rho_min=0.05")


@fault("experts of another rho were put into a folder")
def _(scene: Scene) -> None:
    path = scene.copy_experts()
    scene.run(*scene.usual(BUFFER), "--rho_max=0.05", "--rho_min=0.05", "--num_experts=1",
              f"--buffer_path={scene.folder / 'others'}")
    others = scene.folder / "others" / path.parent.relative_to(scene.disk / "buffers")
    for suffix in (".pt", ".yaml", ".jsonl"):
        shutil.copy(others / f"replay_buffer_0{suffix}", path.parent / f"replay_buffer_2{suffix}")
    scene.refused(*scene.usual(DATM))


# --- two at once ---------------------------------------------------------------------------------------------


def second_is_refused(scene: Scene, command: list[str], at_work: Callable[[], bool]) -> None:
    with scene.start(*command) as first:
        try:
            wait_for(at_work, first)
            folder, scene.folder = scene.folder, scene.folder / "nothing"  # what is there changes: the first one writes
            scene.refused(*command)
            scene.folder = folder
            assert first.poll() is None, "the first one ended before"
            out, err = first.communicate(timeout=MOST_SECONDS)
        finally:
            first.kill()
    assert first.returncode == 0, f"the first one ended with {first.returncode}\n{out}\n{err}"
    scene.row["printed"] = shortened(f": error: {scene.row['printed']}", folder)


@fault("two runs train experts in one folder at the same time")
def _(scene: Scene) -> None:
    scene.copy_experts()
    second_is_refused(scene, [*scene.usual(BUFFER), "--num_experts=8"],
                      lambda: any(scene.buffers.glob("unfinished/expert_*/epoch_1.pt")))


@fault("two runs distil in one folder at the same time")
def _(scene: Scene) -> None:
    scene.copy_experts()
    second_is_refused(scene, [*scene.usual(DATM), "--Iteration=200", "--eval_it=200"],
                      (scene.run_folder / "metrics.jsonl").exists)


# --- what an interrupted run left ----------------------------------------------------------------------------


def interrupted_distillation(scene: Scene) -> tuple[Path, list[str]]:
    """Its checkpoint, and the command that would go on."""
    scene.copy_experts()
    command = [*scene.usual(DATM), "--Iteration=200"]
    checkpoint = scene.run_folder / "checkpoint.pt"
    scene.killed_when(checkpoint.exists, *command)
    return checkpoint, command


@fault("checkpoint of a distillation cut")
def _(scene: Scene) -> None:
    checkpoint, command = interrupted_distillation(scene)
    cut(checkpoint)
    scene.refused(*command)
    scene.run(*command, "--resume=never")


@fault("checkpoint of a distillation with code in it")
def _(scene: Scene) -> None:
    checkpoint, command = interrupted_distillation(scene)
    torch.save({"images": Bomb(scene.folder / "it ran")}, checkpoint)
    scene.refused(*command)
    assert not (scene.folder / "it ran").exists()


@fault("saved epoch of an unfinished expert cut")
def _(scene: Scene) -> None:
    scene.copy_experts()
    epoch = scene.buffers / "unfinished" / "expert_3" / "epoch_1.pt"
    scene.killed_when(epoch.exists, *scene.usual(BUFFER))
    cut(epoch)
    scene.refused(*scene.usual(BUFFER))
    scene.run(*scene.usual(BUFFER), "--resume=never")


@fault("unfinished result of an evaluation cut")
def _(scene: Scene) -> None:
    command = [*scene.usual(EVALUATION), *scene.write_set()]
    unfinished = scene.disk / "result.json.unfinished"
    scene.killed_when(unfinished.exists, *command)
    cut(unfinished)
    assert "Traceback" not in scene.run(*command)
    scene.row |= {"program": "evaluation.py", "exit_code": 0, "printed": "nothing: it tests those networks again"}


# --- distilled sets ------------------------------------------------------------------------------------------


@fault("distilled set with code in it")
def _(scene: Scene) -> None:
    scene.refused(*scene.usual(EVALUATION), *scene.write_set(labels=[Bomb(scene.folder / "it ran")]))
    assert not (scene.folder / "it ran").exists()


@fault("distilled images with NaN")
def _(scene: Scene) -> None:
    images = torch.randn(10, 1, 28, 28)
    images[3, 0, 14, 14] = torch.nan
    scene.refused(*scene.usual(EVALUATION), *scene.write_set(images=images))


@fault("distilled set of another number of classes")
def _(scene: Scene) -> None:
    scene.refused(*scene.usual(EVALUATION), *scene.write_set(labels=torch.randn(10, 100)))


@fault("distilled set of another image size")
def _(scene: Scene) -> None:
    scene.refused(*scene.usual(EVALUATION), *scene.write_set(images=torch.randn(10, 1, 32, 32)))


@fault("a GPU runs out of memory")
def _(scene: Scene) -> None:
    raise SkippedError("not injected")


# --- the program ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="faults whose names have one of these")
    parser.add_argument("--json", metavar="FILE", help="write the table to this file")
    args = parser.parse_args()
    chosen = {name: function for name, function in FAULTS.items() if any(word in name for word in args.only)}
    if not chosen:
        raise UserError(f"--only {' '.join(args.only)}: no such fault; there are {'; '.join(FAULTS)}")
    if args.json:
        check_writable(args.json)

    rows, failures, began = [], [], perf_counter()
    print("| fault | program | exit code | what it printed |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        experts, cache = Path(folder, "experts"), Path(folder, "cache")
        Scene(Path(folder, "first"), experts, cache).run(BUFFER, *COMMON, *TRAIN, f"--buffer_path={experts}")
        for number, (name, function) in enumerate(chosen.items()):
            scene = Scene(Path(folder, str(number)), experts, cache)
            try:
                function(scene)
            except SkippedError as reason:
                scene.row = {"printed": f"skipped: {reason}"}
            except Exception as error:  # the other faults are worth knowing all the same
                failures.append(name)
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                scene.row |= {"printed": f"FAILED: {' '.join(str(error).split())[:60]}"}
            rows.append({"fault": name, "program": "", "exit_code": ""} | scene.row)
            went_on = "; went on once mended" if scene.row.get("went_on_once_mended") else ""
            print(f"| {name} | {rows[-1]['program']} | {rows[-1]['exit_code']} | {rows[-1]['printed']}{went_on} |",
                  flush=True)
    if args.json:
        write_json(args.json, {"faults": rows, "failures": failures, "seconds": perf_counter() - began,
                               "environment": environment(torch.device("cpu"))})
    if failures:
        print(f"\n{len(failures)} of {len(rows)} failed: {'; '.join(failures)}")
        sys.exit(1)


if __name__ == "__main__":
    entry(main)
