"""Kills the programs at random moments, resumes them, and compares the results with uninterrupted runs.

    python scripts/trials/kill_test.py [--kills 50] [--signals 6] [--seed 0] [--json FILE]

Each case (`CASES` in this file) is run once undisturbed. Then it is started in another folder, killed (`kill -9`, which
no program can catch), started and killed again, and finally left to finish. A kill comes, with equal probability, at a
random moment of the whole run (including imports), at a random moment after the first line of output, or at the first
change of a file after such a moment. After each kill every file in the folder is read. At the end the folder must hold
the same files as the undisturbed run's, with the same contents, each tensor bit-identical. Only dates, durations and
paths of folders may differ, as they do not belong to the result.

After that, SIGINT, SIGTERM and SIGUSR1, which the programs handle, are sent, the exit code is checked, and the command
that the program prints is run as printed.

All cases use MiniFashion, narrow networks and one thread, a few seconds a run; about a quarter of an hour in all.
"""

import contextlib
import json
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

from utils.errors import number_of
from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from scripts.common import ScriptParser, positive
from scripts.trials import common
from scripts.trials.common import BUFFER, DATM, MOST_SECONDS, temporary
from utils import files
from utils.files import REPOSITORY, read_config
from utils.program.console import table
from utils.program.entry import entry
from utils.program.progress import Progress

LOOK_SECONDS = 0.0005  # between two looks at a folder
QUICKER = 0.7  # factor on the time until a kill, after a run that ended before it was killed
MOST_IN_A_ROW = 4  # kills of one run, which then has time to end
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
OF_THE_RUN = {"seconds", "date", "id", "buffer_path", "log_path", "data_dir", "label_dir", "lr_dir", "save", "json"}


# --- what is run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A command. `{out}` is the folder of the run, `{experts}` and `{set}` are what the undisturbed runs made."""

    name: str
    script: str
    options: tuple[str, ...]


_EXPERTS = (*common.TRAIN, "--val_fraction=0.8", "--num_experts=5", "--buffer_path={out}/buffers")
_DISTILLATION = (*common.DISTIL, "--val_fraction=0.8", "--Iteration=40", "--eval_it=8", "--syn_steps=5",
                 "--epoch_eval_train=10", "--num_eval=2", "--skip_first_eva=False", "--buffer_path={experts}",
                 "--log_path={out}/logs")
_EVALUATION = (*common.COMMON, "--val_fraction=0.8", "--json={out}/result.json")
# EXPERTS: momentum, and a last file with fewer experts than the others. PAD: its curriculum, all experts in one file.
EXPERTS = Case("experts", BUFFER, (*_EXPERTS, "--mom=0.9"))
PAD = Case("experts, pad", BUFFER, (*_EXPERTS, "--num_experts=3", "--save_interval=10", "--pad", "--seed=1",
                                    "--init_ratio=0.5", "--add_end_epoch=1", "--rm_epoch_first=1",
                                    "--rm_epoch_second=2"))
# DISTILLATION: averaged images, log α. TESLA: its gradient, small batches.
DISTILLATION = Case("distillation", DATM, (*_DISTILLATION, "--ema=True", "--lr_param=log"))
TESLA = Case("distillation, tesla", DATM, (*_DISTILLATION, "--matching=tesla", "--batch_syn=4", "--load_all"))
# EVALUATION: of the self-describing file. FILES: of the published files, without augmentation.
EVALUATION = Case("evaluation", common.EVALUATION, (*_EVALUATION, "--data_dir={set}/distilled.safetensors",
                                                    "--num_eval=8", "--epoch_eval_train=50"))
FILES = Case("evaluation, files", common.EVALUATION, (
    *_EVALUATION, *(f"--{option}={path}" for option, path in common.set_files("{set}").items()), "--num_eval=6",
    "--epoch_eval_train=100", "--no_aug", "--save={out}/set.safetensors"))
CASES = (EXPERTS, DISTILLATION, EVALUATION, PAD, TESLA, FILES)


class Run:
    """A case in a folder of its own.

    Args:
        out: the folder; what the case prints goes into a file beside it.
        made: the folder of the undisturbed runs.
    """

    def __init__(self, case: Case, out: Path, made: Path):
        self.case, self.out, self.made = case, out, made
        self.printed = out.parent / f"{out.name}.txt"
        self.out.mkdir(parents=True)
        self.printed.touch()

    @property
    def is_complete(self) -> bool:
        """Whether all experts are there: starting their program again would ask for more of them."""
        if self.case.script != BUFFER:
            return False
        folder = self.out / common.EXPERTS
        count = sum(len(files.load(path)) for path in folder.glob("replay_buffer_*.pt"))
        wanted = 5 if self.case is EXPERTS else 3
        assert count <= wanted, f"{count} experts instead of {wanted}"
        return count == wanted and not (folder / "unfinished" / "run.yaml").exists()

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen]:
        """The process; it is killed at the end of the block."""
        paths = {"out": self.out, "experts": self.made / EXPERTS.name / "buffers",
                 "set": self.made / DISTILLATION.name / common.RUN / "Normal"}
        command = [self.case.script, *(option.format(**paths) for option in self.case.options)]
        with self.printed.open("a") as file, common.start(command, self.out / "cache", stdout=file,
                                                          stderr=subprocess.STDOUT) as process:
            try:
                yield process
            finally:
                process.kill()

    @property
    def size(self) -> int:
        """Bytes printed so far."""
        return self.printed.stat().st_size

    def finish(self) -> dict[str, float]:
        """Lets it run to its end; returns the seconds that there are for each way to kill it."""
        began = first_line = perf_counter()
        if not self.is_complete:
            size = self.size
            with self.started() as process:
                while process.poll() is None and self.size == size:
                    sleep(0.01)
                first_line = perf_counter()
                self.check_end(process.wait(MOST_SECONDS))
        assert self.case.script != BUFFER or self.is_complete, f"{self.case.name} ended, but is not complete"
        whole, work = perf_counter() - began, perf_counter() - first_line
        return {"whole": whole, "work": work, "change": work}

    def check_end(self, code: int, expected: int = 0) -> None:
        said = self.printed.read_text()
        assert code == expected, f"{self.case.name} ended with {code} instead of {expected}:\n{said[-2000:]}"

    def kill(self, process: subprocess.Popen, how: str, seconds: float, size: int) -> bool:
        """Kills it after that time; False if it ended before.

        Args:
            how: from when the time counts: its start (whole) or its first line (work, change); with `change`, the kill
                then waits for the next change of a file.
            size: bytes printed before it was started.
        """
        while how != "whole" and process.poll() is None and self.size == size:
            sleep(LOOK_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        before = common.state(self.out)
        while how == "change" and process.poll() is None and common.state(self.out) == before:
            sleep(LOOK_SECONDS)
        process.kill()
        return process.wait() == -signal.SIGKILL

    def compare(self) -> dict[str, Any]:
        """Asserts that the folder holds exactly what the undisturbed run made, and returns that."""
        expected, found = contents(self.made / self.case.name), contents(self.out)
        assert found.keys() == expected.keys(), f"other files: {sorted(found.keys() ^ expected.keys())}"
        different = [name for name in found if found[name] != expected[name]]
        assert not different, f"other contents: {different}"
        assert not temporary(self.out), f"temporary files left: {temporary(self.out)}"
        return expected


# --- files ---------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """The contents of every file of a folder, by relative path; without temporary files and locks."""
    found, left_out = {}, {".lock", *temporary(folder)}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in left_out:
            try:
                found[str(path.relative_to(folder))] = read(path)
            except Exception as error:  # readers raise errors of all kinds if a file is not whole
                raise AssertionError(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error
    return found


def read(path: Path) -> Any:
    """A file's values, in a form whose == compares tensors and pictures bit for bit."""
    match path.suffix:
        case ".pt":
            return plain(files.load(path))
        case ".safetensors":
            tensors, about = files.load_tensors(path)
            return plain(tensors), {name: plain(json.loads(text)) if text[:1] in "[{" else text
                                    for name, text in about.items()}
        case ".json" | ".unfinished":
            return plain(json.loads(path.read_text()))
        case ".jsonl":
            return [plain(json.loads(line)) for line in path.read_text().splitlines()]
        case ".yaml":
            return plain(read_config(path))
        case ".png" | ".webp":
            from PIL import Image

            with Image.open(path) as picture:
                return picture.mode, picture.size, Bits(picture.tobytes())
        case ".html":  # it holds paths and the run's duration; what it is made from is compared above
            assert path.read_text().endswith("</html>\n"), f"{path.name} is not whole"
            return None
        case _:
            raise AssertionError(f"{path.name}: no reader for such a file")


class Bits(bytes):
    """The bytes of a tensor or a picture."""


def plain(value: Any) -> Any:
    """A value without the entries OF_THE_RUN, which do not belong to its result; tensors as type, shape and bytes."""
    match value:
        case object(dtype=dtype, shape=shape):  # a tensor, recognised without importing torch
            return str(dtype), tuple(shape), Bits(value.contiguous().numpy().tobytes())
        case dict():
            return {name: plain(each) for name, each in value.items() if name not in OF_THE_RUN}
        case list() | tuple():
            return [plain(each) for each in value]
    return value


def tensors(value: Any) -> int:
    """How many tensors, or pictures, are in what `read` returned."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Bits) + (sum(map(tensors, value)) if isinstance(value, (list, tuple)) else 0)


# --- kills and signals ---------------------------------------------------------------------------------------


def killed(run: Run, kills: int, pace: dict[str, float], chance: random.Random) -> Counter:
    """Kills one run at most `kills` times, then lets it finish; counts what happened."""
    counts = Counter(runs=1)
    while counts["kills"] < kills and not run.is_complete:
        size, how = run.size, chance.choice(tuple(pace))
        with run.started() as process:
            if not run.kill(process, how, chance.uniform(0, pace[how]), size):
                run.check_end(process.returncode)
                pace[how] *= QUICKER
                break
        counts["kills"] += 1
        counts["at a change of a file"] += how == "change"
        counts["in the middle of a write"] += bool(temporary(run.out))
        counts["while starting"] += run.size == size
        counts["files read"] += len(contents(run.out))
    run.finish()
    expected = run.compare()
    counts["files compared"] = len(expected)
    counts["tensors compared"] = tensors(expected)
    return counts


def signalled(case: Case, work: Path, made: Path, number: signal.Signals, times: int, pace: dict[str, float],
              chance: random.Random) -> dict[str, Any]:
    """Sends a signal to a run at work, checks how it ends, and runs the command that it prints."""
    for attempt in range(4):
        run = Run(case, work / f"{case.name} {number.name} {times} {attempt}", made)
        with run.started() as process:
            while process.poll() is None and "options: " not in run.printed.read_text():
                sleep(0.01)
            sleep(0.5**attempt * chance.uniform(0, pace["work"]))
            began = perf_counter()
            for _ in range(times):
                process.send_signal(number)
                sleep(0.002)
            code, took = process.wait(MOST_SECONDS), perf_counter() - began
        if code:
            break
        pace["work"] *= QUICKER  # it had finished already
    run.check_end(code, 128 + number)
    said = run.printed.read_text()
    assert "Traceback" not in said, f"{run.out.name} printed a traceback:\n{said}"
    contents(run.out)
    last = said.splitlines()[-1]
    command = re.search(rf"python {case.script} .*", last)
    assert command, f"{run.out.name}: no command in its last line, {last}"
    if not run.is_complete:
        done = subprocess.run(command[0], shell=True, cwd=REPOSITORY, env=common.surroundings(run.out / "cache"),
                              capture_output=True, text=True, timeout=MOST_SECONDS)
        assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stderr}"
    run.compare()
    return {"case": case.name, "signal": number.name, "times": times, "exit_code": code, "seconds_to_stop": took,
            "went_on_as_printed": True}


# --- the program ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noted(failures: list[str], what: str) -> Iterator[None]:
    """Puts an error into a list, so that the other cases are still run."""
    try:
        yield
    except Exception as error:
        failures.append(f"{what}: {type(error).__name__}: {error}")
        print(f"FAILED {failures[-1]}", flush=True)


COLUMNS = ("kills", "while starting", "at a change of a file", "in the middle of a write", "runs", "files read",
           "files compared", "tensors compared")


def main() -> None:
    parser = ScriptParser(__doc__, json="the counts")
    parser.add_argument("--kills", type=positive, default=50, metavar="N", help="kills in all (%(default)s)")
    parser.add_argument("--signals", type=int, default=6, metavar="N", help="signals in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of their moments (%(default)s)")
    args = parser.parse_args()
    for number in SIGNALS:  # some are ignored in a shell's background jobs, and programs would inherit that
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
            run = Run(case, made / case.name, made)
            paces[case] = run.finish()
            seconds[case] = paces[case]["whole"]
            assert not temporary(run.out), f"temporary files left: {temporary(run.out)}"
            print(f"{case.name}: {seconds[case]:.1f} s undisturbed", flush=True)
        with Progress(args.kills + args.signals, "kill") as bar:
            for index, case in enumerate(cases):
                wanted = len(range(index, args.kills, len(cases)))
                number = 0
                while counts[case.name]["kills"] < wanted and number < 5 * wanted:
                    most = min(chance.randint(1, MOST_IN_A_ROW), wanted - counts[case.name]["kills"])
                    before = counts[case.name]["kills"]
                    with noted(failures, f"{case.name}, run {number}"):
                        run = Run(case, work / f"{case.name} {number}", made)
                        counts[case.name] += killed(run, most, paces[case], chance)
                    bar.update(counts[case.name]["kills"] - before)
                    number += 1
            for number in range(args.signals):
                # The last one is sent twice, so that the program cannot finish its step.
                times = 2 if number and number == args.signals - 1 else 1
                case = cases[number % len(cases)]
                with noted(failures, f"signal {number}"):
                    answers.append(signalled(case, work, made, SIGNALS[number % len(SIGNALS)], times, paces[case],
                                             chance))
                bar.update()
    total = sum(counts.values(), Counter())
    rows = [("case", *COLUMNS)]
    rows += [(name, *(str(count[column]) for column in COLUMNS)) for name, count in (*counts.items(), ("all", total))]
    print(f"\n{table(rows)}")
    rows = [("case", "signal", "exit code", "seconds to stop")]
    rows += [(answer["case"], f"{answer['signal']}{' twice' if answer['times'] == 2 else ''}",
              str(answer["exit_code"]), f"{answer['seconds_to_stop']:.2f}") for answer in answers]
    print(f"\n{table(rows)}")
    failed = bool(failures) or total["kills"] < args.kills
    print(f"\n{number_of(len(failures), 'failure')}, {total['kills']} of {args.kills} kills" if failed else
          f"\n{number_of(total['kills'], 'kill')}, {number_of(len(answers), 'signal')}: every file whole after each, "
          "and in the end every tensor the same to the bit")
    common.conclude(args.json, {
        "kills": total["kills"], "failures": failures, "seed": args.seed, "signals": answers, "cases": {
            case.name: {"command": f"python {case.script} {' '.join(case.options)}",
                        "undisturbed_seconds": seconds[case], **{name: counts[case.name][name] for name in COLUMNS}}
            for case in cases}}, failed)


if __name__ == "__main__":
    entry(main)
