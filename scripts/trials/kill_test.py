"""Kills the programs at random moments, lets them go on, and compares what they made with uninterrupted runs.

    python scripts/trials/kill_test.py [--kills 50] [--signals 6] [--seed 0] [--json FILE]

Every case below is run once undisturbed. Then it is started again in a folder of its own and killed (`kill -9`, which
no program can answer), started again, killed again, and in the end left alone. Of every three kills one comes at a
moment drawn from the whole time that a run takes, importing included; one at a moment of its work, from the first line
that it prints; and one at the first change of a file after such a moment. After each kill every file in the folder is
read; at the end every file must hold what that of the undisturbed run holds, each tensor to the bit, and nothing else
may lie there. Left out of the comparison is what tells of the run and not of its result: dates, durations and the paths
of folders.

After that the signals that a program does answer (SIGINT, SIGTERM, SIGUSR1) are sent, its exit code is checked, and the
command that it prints is run as printed.

All on MiniFashion with narrow networks and one thread, for a few seconds a run; about a quarter of an hour in all.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from utils.files import REPOSITORY, check_writable, write_json
from utils.program.entry import entry
from utils.program.machine import environment
from utils.program.progress import Progress

LOOK_SECONDS = 0.0005  # between two looks at a folder
MOST_SECONDS = 300  # that a run may take
QUICKER = 0.7  # the pace of a case after a run that ended before it was killed
MOST_IN_A_ROW = 4  # kills of one run, so that there is time for it to end
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TEMPORARY = re.compile(r"\..+\.\w{8}(\.\w+)?")
OF_THE_RUN = {"seconds", "date", "buffer_path", "log_path", "data_dir", "label_dir", "lr_dir", "save", "json"}


# --- what is run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A command. `{out}` is the folder of the run, `{experts}` and `{set}` what the undisturbed ones made."""

    name: str
    script: str
    options: str

    def command(self, out: Path, made: Path) -> list[str]:
        first = made / EXPERTS.name, made / DISTILLATION.name
        paths = {"out": out, "experts": first[0] / "buffers",
                 "set": first[1] / "logs/MiniFashion/1/ConvNetD1W4/run/Normal"}
        return [self.script, *COMMON.split(), *(option.format(**paths) for option in self.options.split())]


COMMON = "--dataset=MiniFashion --val_fraction=0.8 --model=ConvNetD1W4 --zca --device=cpu --backend=eager"
_EXPERTS = ("--num_experts=5 --train_epochs=2 --save_interval=2 --rho_max=0.01 --rho_min=0.01 --batch_train=256 "
            "--buffer_path={out}/buffers ")
_DISTILLATION = ("--cfg configs/MiniFashion/ConvIN/IPC1.yaml --Iteration=40 --eval_it=8 --syn_steps=5 "
                 "--expert_epochs=1 --max_start_epoch=2 --epoch_eval_train=10 --num_eval=2 --skip_first_eva=False "
                 "--buffer_path={experts} --log_path={out}/logs --run_name=run --wandb=disabled ")
# Momentum, a last file with fewer experts than the others; PAD's order of images, all in one file.
EXPERTS = Case("experts", "buffer/buffer_FTD.py", _EXPERTS + "--mom=0.9")
PAD = Case("experts, pad", "buffer/buffer_FTD.py", _EXPERTS + "--num_experts=3 --save_interval=10 --pad --seed=1 "
           "--init_ratio=0.5 --add_end_epoch=1 --rm_epoch_first=1 --rm_epoch_second=2")
# An average of images, log α; short batches, TESLA.
DISTILLATION = Case("distillation", "distill/DATM.py", _DISTILLATION + "--ema=True --lr_param=log")
TESLA = Case("distillation, tesla", "distill/DATM.py", _DISTILLATION + "--matching=tesla --batch_syn=4 --load_all")
# From the whole set; from the published files, without augmentation.
EVALUATION = Case("evaluation", "distill/evaluation.py", "--data_dir={set}/distilled.safetensors --num_eval=8 "
                  "--epoch_eval_train=50 --json={out}/result.json")
FILES = Case("evaluation, files", "distill/evaluation.py", "--data_dir={set}/images_best.pt "
             "--label_dir={set}/labels_best.pt --lr_dir={set}/lr_best.pt --num_eval=6 --epoch_eval_train=100 --no_aug "
             "--json={out}/result.json --save={out}/set.safetensors")
CASES = (EXPERTS, DISTILLATION, EVALUATION, PAD, TESLA, FILES)


def is_complete(case: Case, out: Path) -> bool:
    """Whether all experts are there, for to start that program again is to ask for more of them."""
    if case.script != EXPERTS.script:
        return False
    folder = out / "buffers/MiniFashion/ConvNetD1W4"
    count = sum(len(torch.load(path, weights_only=True)) for path in folder.glob("replay_buffer_*.pt"))
    wanted = 5 if case is EXPERTS else 3
    assert count <= wanted, f"{count} experts instead of {wanted}"
    return count == wanted and not (folder / "unfinished" / "run.yaml").exists()


@contextlib.contextmanager
def started(case: Case, out: Path, made: Path, printed: Path) -> Iterator[subprocess.Popen]:
    """The process of a case; what it prints is added to a file."""
    with printed.open("a") as file:
        process = subprocess.Popen([sys.executable, *case.command(out, made)], cwd=REPOSITORY, stdout=file,
                                   stderr=subprocess.STDOUT, env=surroundings(out))
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def surroundings(out: Path) -> dict[str, str]:
    """The environment: as many threads for every run, and the whitening in the run's own folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"OMP_NUM_THREADS": "1", "DATM_CACHE": str(out / "cache"), "PYTHONUNBUFFERED": "1",
                         "PATH": path, "COLUMNS": "100"}


def finish(case: Case, out: Path, made: Path, printed: Path) -> "Pace":
    """Lets a case run to its end."""
    began = first_line = perf_counter()
    if not is_complete(case, out):
        with started(case, out, made, printed) as process:
            size = printed.stat().st_size
            while process.poll() is None and printed.stat().st_size == size:
                sleep(0.01)
            first_line = perf_counter()
            check_end(case, process.wait(MOST_SECONDS), printed)
    assert case.script != EXPERTS.script or is_complete(case, out), f"{case.name} ended, but is not complete"
    return Pace(perf_counter() - began, perf_counter() - first_line)


def check_end(case: Case, code: int, printed: Path, expected: int = 0) -> None:
    assert code == expected, f"{case.name} ended with {code} instead of {expected}:\n{printed.read_text()[-2000:]}"


# --- files ---------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder, read, by its path there; without temporary files and locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock" and not TEMPORARY.fullmatch(path.name):
            try:
                found[str(path.relative_to(folder))] = read(path)
            except Exception as error:  # readers fail in every way there is when a file is not whole
                raise AssertionError(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error
    return found


def read(path: Path) -> Any:
    """A file's values, so that == compares tensors and pictures to the bit."""
    match path.suffix:
        case ".pt":
            return plain(torch.load(path, weights_only=True))
        case ".safetensors":
            with safe_open(path, framework="pt") as file:
                about = {name: plain(json.loads(text)) if text[:1] in "[{" else text
                         for name, text in file.metadata().items()}
                return about, {name: plain(file.get_tensor(name)) for name in file.keys()}
        case ".json" | ".unfinished":
            return plain(json.loads(path.read_text()))
        case ".jsonl":
            return [plain(json.loads(line)) for line in path.read_text().splitlines()]
        case ".yaml":
            options = yaml.safe_load(path.read_text())
            assert isinstance(options, dict), f"{path.name} holds no options"
            return plain(options)
        case ".png":
            with Image.open(path) as picture:
                return plain(torch.from_numpy(np.array(picture)))
        case ".npz" | ".npy":
            with np.load(path) as arrays:
                return {name: plain(torch.from_numpy(arrays[name])) for name in arrays}
        case ".html":  # it says where it lies and how long the run took; what it is made of is compared above
            assert path.read_text().endswith("</html>\n"), f"{path.name} is not whole"
            return None
        case _:
            raise AssertionError(f"{path.name}: no reader for such a file")


class Bits(bytes):
    """The bytes of a tensor."""


def plain(value: Any) -> Any:
    """Without what belongs to the run and not to its result; tensors as type, shape and bytes."""
    match value:
        case Tensor():
            return str(value.dtype), tuple(value.shape), Bits(value.contiguous().numpy().tobytes())
        case dict():
            return {name: plain(each) for name, each in value.items() if name not in OF_THE_RUN}
        case list() | tuple():
            return [plain(each) for each in value]
    return value


def tensors(value: Any) -> int:
    """How many tensors are in what `read` returned."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Bits) + (sum(map(tensors, value)) if isinstance(value, (list, tuple)) else 0)


def compare(out: Path, expected: dict[str, Any]) -> None:
    """Refuses a folder that does not hold exactly what is expected."""
    found = contents(out)
    assert found.keys() == expected.keys(), f"other files: {sorted(found.keys() ^ expected.keys())}"
    different = [name for name in found if found[name] != expected[name]]
    assert not different, f"other contents: {different}"
    left = temporary(out)
    assert not left, f"temporary files left: {left}"


def temporary(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*") if TEMPORARY.fullmatch(path.name))


def state(folder: Path) -> list[tuple[str, int, int]]:
    """What changes when a file does."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it was renamed meanwhile
            stat = path.stat()
            found.append((path.name, stat.st_mtime_ns, stat.st_size))
    return found


# --- kills and signals ---------------------------------------------------------------------------------------


def kill(process: subprocess.Popen, out: Path, how: str, seconds: float, printed: Path, size: int) -> bool:
    """Kills a run after that time; False if it ended before.

    Args:
        how: from the start on (whole), from its first line on (work), or at the next change of a file then (change).
        size: of what was printed before it was started.
    """
    while how != "whole" and process.poll() is None and printed.stat().st_size == size:
        sleep(LOOK_SECONDS)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    before = state(out)
    while how == "change" and process.poll() is None and state(out) == before:
        sleep(LOOK_SECONDS)
    process.kill()
    return process.wait() == -signal.SIGKILL


@dataclass
class Pace:
    """The seconds that a run takes, from its start and from its first line, less when it is quicker than it was."""

    whole: float
    work: float

    def draw(self, how: str, chance: random.Random) -> float:
        return chance.uniform(0, self.whole if how == "whole" else self.work)

    def quicker(self, how: str) -> None:
        if how == "whole":
            self.whole *= QUICKER
        else:
            self.work *= QUICKER


def killed(case: Case, work: Path, made: Path, number: int, kills: int, pace: Pace, chance: random.Random) -> Counter:
    """One run, killed up to so many times and then left alone; counts what happened."""
    out, printed = work / f"{case.name} {number}", work / f"{case.name} {number}.txt"
    out.mkdir()
    counts = Counter(runs=1)
    while counts["kills"] < kills and not is_complete(case, out):
        size = printed.stat().st_size if printed.exists() else 0
        how = chance.choice(("whole", "work", "change"))
        with started(case, out, made, printed) as process:
            if not kill(process, out, how, pace.draw(how, chance), printed, size):
                check_end(case, process.returncode, printed)
                pace.quicker(how)
                break
        counts["kills"] += 1
        counts["at a change of a file"] += how == "change"
        counts["in the middle of a write"] += bool(temporary(out))
        counts["while starting"] += printed.stat().st_size == size
        counts["files read"] += len(contents(out))
    finish(case, out, made, printed)
    expected = contents(made / case.name)
    compare(out, expected)
    counts["files compared"] = len(expected)
    counts["tensors compared"] = tensors(expected)
    return counts


def signalled(case: Case, work: Path, made: Path, number: signal.Signals, times: int, pace: Pace,
              chance: random.Random) -> dict[str, Any]:
    """Sends a signal to a run at work, checks how it ends, and runs the command that it prints."""
    for attempt in range(4):
        name = f"{case.name} {number.name} {times} {attempt}"
        out, printed = work / name, work / f"{name}.txt"
        out.mkdir()
        with started(case, out, made, printed) as process:
            while process.poll() is None and "options: " not in printed.read_text():
                sleep(0.01)
            sleep(0.5**attempt * pace.draw("work", chance))
            began = perf_counter()
            for _ in range(times):
                process.send_signal(number)
                sleep(0.002)
            code, took = process.wait(MOST_SECONDS), perf_counter() - began
        if code:
            break
        pace.quicker("work")  # it was at its end already
    check_end(case, code, printed, 128 + number)
    assert "Traceback" not in printed.read_text(), f"{name} printed a traceback:\n{printed.read_text()}"
    contents(out)
    last = printed.read_text().splitlines()[-1]
    command = re.search(rf"python {case.script} .*", last)
    assert command, f"{name}: no command in its last line, {last}"
    if not is_complete(case, out):
        done = subprocess.run(command[0], shell=True, cwd=REPOSITORY, env=surroundings(out), capture_output=True,
                              text=True, timeout=MOST_SECONDS)
        assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stderr}"
    compare(out, contents(made / case.name))
    return {"case": case.name, "signal": number.name, "times": times, "exit_code": code, "seconds_to_stop": took,
            "went_on_as_printed": True}


# --- the program ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noted(failures: list[str], what: str) -> Iterator[None]:
    """Puts what goes wrong into a list, so that the other cases are still run."""
    try:
        yield
    except Exception as error:
        failures.append(f"{what}: {type(error).__name__}: {error}")
        print(f"FAILED {failures[-1]}", flush=True)


COLUMNS = ("kills", "while starting", "at a change of a file", "in the middle of a write", "runs", "files read",
           "files compared", "tensors compared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--signals", type=int, default=6, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the counts to this file")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    for number in SIGNALS:  # a shell in the background ignores some, which programs would inherit and heed
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    chance = random.Random(args.seed)
    cases = CASES[:3] if max(args.kills, args.signals) < len(CASES) else CASES
    failures: list[str] = []
    counts: dict[str, Counter] = {case.name: Counter() for case in cases}
    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kill_test_") as folder:
        work, made = Path(folder), Path(folder, "undisturbed")
        paces, seconds = {}, {}
        for case in cases:
            (made / case.name).mkdir(parents=True)
            paces[case] = finish(case, made / case.name, made, work / f"{case.name}.txt")
            seconds[case] = paces[case].whole
            assert not temporary(made / case.name), f"temporary files left: {temporary(made / case.name)}"
            print(f"{case.name}: {seconds[case]:.1f} s undisturbed", flush=True)
        with Progress(args.kills + args.signals, "kill") as bar:
            for index, case in enumerate(cases):
                wanted = len(range(index, args.kills, len(cases)))
                number = 0
                while counts[case.name]["kills"] < wanted and number < 5 * wanted:
                    most = min(chance.randint(1, MOST_IN_A_ROW), wanted - counts[case.name]["kills"])
                    before = counts[case.name]["kills"]
                    with noted(failures, f"{case.name}, run {number}"):
                        counts[case.name] += killed(case, work, made, number, most, paces[case], chance)
                    bar.update(counts[case.name]["kills"] - before)
                    number += 1
            for number in range(args.signals):
                # The last of them twice, which does not let the program finish its step.
                times = 2 if number and number == args.signals - 1 else 1
                case = cases[number % len(cases)]
                with noted(failures, f"signal {number}"):
                    answers.append(signalled(case, work, made, SIGNALS[number % len(SIGNALS)], times, paces[case],
                                             chance))
                bar.update()
    print("\n| case | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    total = sum(counts.values(), Counter())
    for name, count in (*counts.items(), ("all", total)):
        print(f"| {name} | " + " | ".join(str(count[column]) for column in COLUMNS) + " |")
    print("\n| case | signal | exit code | seconds to stop |\n|---|---|---|---|")
    for answer in answers:
        print(f"| {answer['case']} | {answer['signal']}{' twice' if answer['times'] == 2 else ''} | "
              f"{answer['exit_code']} | {answer['seconds_to_stop']:.2f} |")
    if args.json:
        write_json(args.json, {
            "kills": total["kills"], "failures": failures, "seed": args.seed, "cases": {
                case.name: {"command": f"python {case.script} {COMMON} {case.options}",
                            "undisturbed_seconds": seconds[case]} | {column: counts[case.name][column]
                                                                     for column in COLUMNS} for case in cases},
            "signals": answers, "environment": environment(torch.device("cpu"))})
    if failures or total["kills"] < args.kills:
        print(f"\n{len(failures)} failures, {total['kills']} of {args.kills} kills")
        sys.exit(1)
    print(f"\n{total['kills']} kills, {len(answers)} signals: every file whole after each, and in the end every tensor "
          "the same to the bit")


if __name__ == "__main__":
    entry(main)
