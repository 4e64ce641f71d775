"""Odd command lines and YAML files for every entry: each must be refused by one line and exit code 2, or be obeyed.

    python scripts/trials/fuzz.py [--inputs 1000] [--seed 0] [--json FILE]

Hypothesis draws the inputs: tiny settings that are known to run, with up to two odd options, values, files or YAMLs.
For some inputs, stdout and stderr are closed or full. Each input runs in a folder of its own, in a forked child of a
process that has imported everything, on a toy dataset of three colours, without root's right to enter every folder.

Checks: the exit code is 0 or 2, and 0 for an input with nothing odd; there is no traceback and no warning; a refusal is
one readable line, leaves no new file and changes none; no half-written file is left in any case. After exit code 0,
`read`, which is independent of the program's own parser, determines the value of each option; the options that the run
saved, and its results, are compared with these.

Left out, because they take minutes or need the network: `--backend compile`, `--wandb online` and `offline`, downloads
(every connection is refused), and large values of options that multiply the work. An input that takes more than 20 s
of processor time counts as `timeout`; it is listed, but is not a failure.
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import string
import sys
import tempfile
import traceback
import typing
from pathlib import Path
from time import perf_counter

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # a fork does not inherit the threads of a pool
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

import hypothesis
import yaml
from hypothesis import strategies as st

import utils.config.values
import utils.program.console
from scripts.common import ScriptParser, positive
from scripts.trials import common
from scripts.trials.common import BUFFER, DATM, EVALUATION
from utils import files  # its parts that need torch are imported when they are used
from utils.config import (
    BaselineConfig,
    BufferConfig,
    DistillConfig,
    EvaluationConfig,
    TeslaConfig,
    as_dict,
    has_effect,
    hints_of,
    make,
)
from utils.errors import is_control, number_of, shortened
from utils.files import REPOSITORY
from utils.program.entry import entry

TIMEOUT = 20  # seconds of processor time
WAIT = 120  # seconds by the clock, as other programs may keep the processor busy
MEMORY = 16 << 30  # bytes of address space
LONGEST_LINE = 1000  # characters of a refusal
TESLA, BASELINE = "distill/DATM_tesla.py", "distill/baseline.py"
ENTRIES = {BUFFER: BufferConfig, DATM: DistillConfig, TESLA: TeslaConfig, EVALUATION: EvaluationConfig,
           BASELINE: BaselineConfig}
SHARES = {BUFFER: 2, DATM: 3, TESLA: 1, EVALUATION: 2, BASELINE: 2}  # of the inputs
WITH_YAML = (DATM, TESLA)
EPOCHS = 3  # of the toy's experts
CLASSES, IMAGES = ("blue", "green", "red"), {"train": 6, "test": 2}  # images of each class

# Refusals that can only come after some results were written, which are kept.
LATE = re.compile(r"diverged in epoch|times in a row")


# --- what is there: a dataset, experts, a distilled set, odd files ---------------------------------------------


class Sandbox:
    """The folders of the inputs: `shared/`, which none may change, and `work/`, where each runs, made anew for it."""

    def __init__(self, root: Path):
        self.root, self.shared, self.work = root, root / "shared", root / "work"
        self.repository = self.work / "repository"  # a stand-in: paths in a YAML are relative to it
        # Outside `root`, where files are watched for changes.
        self.outputs = [root.with_name("stdout"), root.with_name("stderr")]

    def build(self) -> None:
        common.write_pictures(self.shared / "toy", CLASSES, IMAGES)
        common.write_set(self.shared / "set", common.noise(3, 3, 8, 8), common.noise(3, 3))
        usual = {**self.usual(BUFFER), "num_experts": "2", "train_epochs": str(EPOCHS),
                 "buffer_path": str(self.shared / "experts")}
        outcome = self.run(Case(BUFFER, [f"--{name}={value}" for name, value in usual.items()], None, True))
        assert outcome.code == 0, outcome.stderr

    def usual(self, script: str) -> dict[str, str]:
        """Tiny settings that run in a moment."""
        data = {"dataset": "ImageFolder", "data_path": str(self.shared / "toy"), "res": "8", "model": "ConvNetD1W4",
                "zca": "True", "device": "cpu"}
        experts = {"buffer_path": str(self.shared / "experts")}
        evaluation = {"num_eval": "1", "epoch_eval_train": "1"}
        if script == BUFFER:
            return {**data, "num_experts": "1", "train_epochs": "1", "batch_train": "16", "rho_max": "0.01",
                    "rho_min": "0.01", "lr_teacher": "0.1", "buffer_path": "out/buffers"}
        if script in WITH_YAML:
            return {**data, **evaluation, **experts, "ipc": "1", "Iteration": "2", "eval_it": "2", "syn_steps": "2",
                    "expert_epochs": "1", "max_start_epoch": "2", "Sequential_Generation": "False", "lr_img": "10",
                    "lr_y": "1", "threshold": "1000", "log_path": "out/log"}
        if script == EVALUATION:
            return {**data, **evaluation, **common.set_files(self.shared / "set"), "json": "out/result.json"}
        return {**data, **evaluation, **experts, "ipc": "1", "json": "out/result.json"}

    def renew(self) -> None:
        """Makes `work/` anew, empty except for files and folders that odd paths point to."""
        if self.work.exists():
            (self.work / "unreadable").chmod(0o700)
            shutil.rmtree(self.work)
        for folder in ("folder", "unreadable", "home", "repository"):
            (self.work / folder).mkdir(parents=True)
        junk = bytes(range(256)) * 8
        for name in ("bytes.bin", "bytes.pt", "bytes.safetensors", "bytes.yaml", "unreadable.bin"):
            (self.work / name).write_bytes(junk)
        (self.work / "empty.pt").write_bytes(b"")
        (self.work / "unreadable").chmod(0)
        (self.work / "unreadable.bin").chmod(0)
        (self.work / "loop").symlink_to("loop")

    def allows(self, path: str) -> bool:
        """Whether a run may write to a path, from either of the folders that it can be relative to."""
        allowed = tuple(f"{folder}{os.sep}" for folder in (self.work, self.shared))
        return path.startswith(("/proc/", "/dev/null")) or all(
            f"{absolute(start, path)}{os.sep}".startswith(allowed) for start in (self.work, self.repository))

    def hidden(self, text: str) -> str:
        """The text without paths of this machine."""
        return text.replace(str(self.root), "SANDBOX").replace(str(REPOSITORY), ".")

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and modification time of every file, except finished ones in the cache, which is kept between runs."""
        return {path: status for path, status in common.state(self.root).items()
                if os.path.basename(path).startswith(".") or os.path.dirname(path) != os.environ["DATM_CACHE"]}

    # --- running an input ---

    def run(self, case: "Case") -> "Outcome":
        """Runs an entry in a forked child."""
        self.renew()
        if case.yaml is not None:
            (self.work / "given.yaml").write_bytes(case.yaml.content)
        before, began = self.files(), perf_counter()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._child(case)
        code = _wait(child)
        out, err = (path.read_bytes().decode(errors="backslashreplace") for path in self.outputs)
        after = self.files()
        changed = [path for path, status in before.items() if after.get(path) != status]
        return Outcome(code, out, err, sorted(after.keys() - before.keys()), changed, perf_counter() - began)

    def _child(self, case: "Case") -> typing.NoReturn:
        code = 1
        try:
            os.setpgid(0, 0)
            signal.alarm(WAIT)
            for limit, most in ((resource.RLIMIT_AS, (MEMORY, MEMORY)), (resource.RLIMIT_CPU, (TIMEOUT, TIMEOUT + 1)),
                                (resource.RLIMIT_CORE, (0, 0))):
                resource.setrlimit(limit, most)
            for number, path in enumerate(self.outputs, 1):
                os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), number)
            # As Python opens them in a UTF-8 locale.
            sys.stdout.reconfigure(encoding="utf-8", errors="strict", line_buffering=False)
            sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
            for number in (1, 2) if case.unheard else ():
                if case.unheard == "full":
                    os.dup2(os.open("/dev/full", os.O_WRONLY), number)
                else:
                    os.close(number)
            os.chdir(self.work)
            utils.config.values.REPOSITORY = utils.program.console.REPOSITORY = self.repository
            sys.argv = [str(REPOSITORY / case.script), *case.arguments]
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)


def _wait(child: int) -> int | str:
    """The exit code; `timeout`, or the name of the signal that ended it."""
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):  # the processes that it started
        os.killpg(child, signal.SIGKILL)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM):
        return "timeout"
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def absolute(start: Path, path: str) -> str:
    return os.path.abspath(os.path.join(start, os.path.expanduser(path)))


class Yaml(typing.NamedTuple):
    """A YAML file and its meaning; None: it has none and must be refused."""

    content: bytes
    meaning: dict[str, str] | None


class Case(typing.NamedTuple):
    """One input."""

    script: str
    arguments: list[str]
    yaml: Yaml | None
    plain: bool  # made of nothing odd, so that it must run
    unheard: str = ""  # "full" or "closed": how stdout and stderr refuse the output

    def command(self, sandbox: Sandbox) -> str:
        content = f"   # given.yaml: {shortened(repr(self.yaml.content), 600)}" if self.yaml else ""
        output = {"full": " >/dev/full 2>&1", "closed": " >&- 2>&-"}.get(self.unheard, "")
        return sandbox.hidden(shlex.join(["python", self.script, *map(shortened, self.arguments)]) + output + content)


class Outcome(typing.NamedTuple):
    code: int | str
    stdout: str
    stderr: str
    new: list[str]  # files
    changed: list[str]  # files that existed before and are gone or different
    seconds: float


# --- what an input means, read without the program's parser ----------------------------------------------------


class MeaninglessError(Exception):
    """A text that is no value of the option's type, or arguments that are no command line at all."""


PATHS = {"data_path", "buffer_path", "log_path", "Initialize_Label_Model_Dir", "data_dir", "label_dir", "lr_dir",
         "json", "save"}
SIGNED = {"seed", "Label_Model_Timestamp", "lr_init", "canvas_size", "canvas_samples"}
NOT_SAVED = {"device", "parall_eva", "backend", "micro_batch", "dry_run", "log_path", "run_name", "resume", "json",
             "save", "threads", "wandb", "project", "force_save", "quiet"}
OF_PROTOCOLS = {"epoch_eval_train", "batch_train", "dsa", "dsa_strategy", "lr_teacher"}
NOTHING = ("none", "null", "~", "")
YES, NO = {"1", "true", "on", "yes", "t", "y"}, {"0", "false", "off", "no", "f", "n"}


def read(name: str, text: str, hint: typing.Any) -> typing.Any:
    """The value that a text means, by the option's type alone.

    Raises:
        MeaninglessError: it means none.
    """
    types = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ()
    if type(None) in types:
        if text.lower() in NOTHING:
            return None
        if name == "res" and (sides := re.fullmatch(r"\s*0*([1-9]\d*)\s*[x×]\s*0*([1-9]\d*)\s*", text, re.IGNORECASE)):
            return int(sides[1]) if sides[1] == sides[2] else f"{sides[1]}x{sides[2]}"
        hint = next(each for each in types if each is not type(None))
    if name == "lr_teacher" and types:  # a number, or auto
        if text == "auto":
            return text
        hint = float
    value, means = text, True  # a name, or the device, which no run saves
    if typing.get_origin(hint) is typing.Literal:
        means = text in typing.get_args(hint)
    elif hint is bool:
        value, means = text.lower() in YES, text.lower() in YES | NO
    elif hint in (int, float):
        whole = re.fullmatch(r"\s*([+-]?[\d_]+)\.0*\s*", text)  # 2.0 is the whole number 2
        try:
            value = hint(whole[1] if whole and hint is int else text)
        except ValueError:
            value = math.nan
        means = (value >= 0 or (value < 0 and name in SIGNED)) and (abs(value) < math.inf or name == "threshold")
    if not means:
        raise MeaninglessError(f"{name} {text!r}")
    return value


class HelpError(Exception):
    """The arguments ask for help."""


class Reader(argparse.ArgumentParser):
    """Python's own parser of command lines, with exceptions for errors and for help."""

    def error(self, message: str) -> typing.NoReturn:
        raise MeaninglessError(message)

    def print_help(self, file: object = None) -> typing.NoReturn:
        raise HelpError


def command_line(case: Case) -> dict[str, str]:
    """Option → its last text on the command line.

    Raises:
        MeaninglessError: something other than options and their values.
        HelpError
    """
    reader = Reader(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, hint in {**hints_of(ENTRIES[case.script]), **({"cfg": str} if case.script in WITH_YAML else {})}.items():
        reader.add_argument(f"--{name}", **({"nargs": "?", "const": "True"} if hint is bool else {}))
    return vars(reader.parse_args(case.arguments))


def meaning(case: Case, sandbox: Sandbox) -> dict[str, typing.Any]:
    """Option → value, for every option of the entry.

    Raises:
        MeaninglessError
        HelpError
    """
    given, hints = command_line(case), hints_of(ENTRIES[case.script])
    values = {field.name: field.default.get_default(call_default_factory=True)
              for field in dataclasses.fields(ENTRIES[case.script])}
    values |= {name: _from_repository(values[name], sandbox) for name in PATHS & values.keys()}
    if case.script in WITH_YAML:
        if given.pop("cfg", None) != "given.yaml" or case.yaml.meaning is None:
            raise MeaninglessError("no such YAML")
        for name, text in case.yaml.meaning.items():
            if name not in hints:
                raise MeaninglessError(name)
            if name not in given:  # an overridden value may be wrong
                values[name] = _from_repository(text, sandbox) if name in PATHS else read(name, text, hints[name])
    for name, text in given.items():
        if not text and (type(None) in typing.get_args(hints[name]) or name in ("json", "save")):
            raise MeaninglessError(f"{name} ''")
        values[name] = absolute(sandbox.work, text) if name in PATHS and text else read(name, text, hints[name])
    return values


def _from_repository(text: str, sandbox: Sandbox) -> str:
    while text.startswith(("../", "./")):
        text = text.split("/", 1)[1]
    return absolute(sandbox.repository, text) if text else text


# --- what must hold ---------------------------------------------------------------------------------------------


def problems(case: Case, outcome: Outcome, sandbox: Sandbox) -> list[str]:
    """Everything that is wrong with the outcome of an input."""
    found = []
    output = outcome.stdout + outcome.stderr
    if "Traceback (most" in output or re.search(r"\b\w*Warning: ", output):
        found.append("a traceback or a warning")
    found += [f"a half-written file is left: {os.path.basename(path)}" for path in outcome.new
              if os.path.basename(path).startswith(".")]
    if outcome.code == "timeout":
        return found
    if outcome.code == 2:
        return found + _problems_of_refusal(case, outcome)
    if outcome.code != 0:
        return [*found, f"exit code {outcome.code}"]
    try:
        return found + _problems_of_run(case, meaning(case, sandbox), outcome, sandbox)
    except HelpError:
        is_help = outcome.stdout.startswith("usage: ") or case.unheard
        return found + ([] if is_help and not outcome.new else ["help that is none"])
    except MeaninglessError as error:
        return [*found, f"exit code 0 for what means nothing: {str(error)[:200]}"]


def _problems_of_refusal(case: Case, outcome: Outcome) -> list[str]:
    found = [f"{Path(path).name} was changed by a refused input" for path in outcome.changed]
    if case.plain:
        found.append("a good input was refused")
    if case.unheard:  # without its output, a late refusal, which may leave files, cannot be recognised
        return found
    # Lines as on a terminal, where Unicode's other line ends are characters like any other.
    lines = [line for line in outcome.stderr.split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith(f"{Path(case.script).name}: error: ")]
    if len(errors) != 1 or lines[-1] not in errors:
        found.append(f"{len(errors)} error lines")
    late = bool(errors) and LATE.search(errors[0])
    if not late and any(not line.startswith("note: ") for line in lines[:-1]):
        found.append("more than notes before the error")
    found += [f"an error line of {len(line)} characters" for line in errors if len(line) > LONGEST_LINE]
    found += ["an error line with control characters" for line in errors if any(map(is_control, line))]
    if outcome.new and not late:
        found.append(f"a refused input left {', '.join(os.path.basename(path) for path in outcome.new[:3])}")
    return found


def _problems_of_run(case: Case, values: dict[str, typing.Any], outcome: Outcome, sandbox: Sandbox) -> list[str]:
    own = {values.get("json"), values.get("save")}  # a file there is meant to be replaced
    found = [f"{Path(path).name} was changed" for path in outcome.changed if path not in own]
    if values.get("dry_run"):
        return found + (["a dry run wrote files"] if outcome.new else [])
    try:
        check = {BUFFER: _check_experts, DATM: _check_distillation, TESLA: _check_distillation}
        saved = check.get(case.script, _check_evaluation)(values)
    except (OSError, AssertionError, LookupError, ValueError) as error:
        return [*found, f"exit code 0 without its result: {type(error).__name__} {str(error)[:300]}"]
    for name, value in saved.items():
        expected = values[name]
        if name in PATHS and value:
            value = os.path.normpath(sandbox.repository / value)
        if value != expected or type(value) is not type(expected):
            found.append(f"--{name} is {value!r}, and should be {expected!r}")
    names = {field.name for field in dataclasses.fields(ENTRIES[case.script])}
    config = make(ENTRIES[case.script], **{name: values[name] for name in names & values.keys()})
    # What differs among several protocols is saved with each.
    apart = OF_PROTOCOLS if "," in values.get("protocol", "") else set()
    lost = [name for name in as_dict(config) if name not in NOT_SAVED | apart | saved.keys()
            and has_effect(config, name)]
    return found + ([f"not saved: {', '.join(lost)}"] if saved and lost else [])


def _check_experts(values: dict[str, typing.Any]) -> dict[str, typing.Any]:
    folder = Path(values["buffer_path"]) / values["dataset"] / values["model"]
    paths = sorted(folder.glob("replay_buffer_*.pt"))
    experts = [expert for path in paths for expert in files.load(path)]
    assert len(experts) == values["num_experts"], f"{len(experts)} experts"
    assert len(paths) == math.ceil(len(experts) / values["save_interval"]), f"{len(paths)} files"
    assert all(len(expert) == values["train_epochs"] + 1 for expert in experts), "epochs"
    saved = yaml.safe_load((folder / "replay_buffer_0.yaml").read_text())
    assert [expert["number"] for expert in saved["experts"]] == list(range(len(files.load(paths[0]))))
    for fact in ("fingerprint", "threads", "on", "experts", "sha256"):
        del saved[fact]
    return saved


def _check_distillation(values: dict[str, typing.Any]) -> dict[str, typing.Any]:
    (folder,) = (Path(values["log_path"]) / values["dataset"] / str(values["ipc"]) / values["model"]).iterdir()
    assert values["run_name"] in (None, folder.name), folder.name
    result = json.loads((folder / "result.json").read_text())
    steps = [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(steps) == values["Iteration"] and len(result["best"]["scores"][0]["accuracies"]) == values["num_eval"]
    assert (result["best_ema"] is not None) == values["ema"]
    images = files.load(folder / "Normal" / "images_best.pt")
    assert len(images) == len(CLASSES) * values["ipc"], f"{len(images)} images"
    assert all((folder / name).stat().st_size for name in ("images.png", "curves.png", "report.html"))
    return yaml.safe_load((folder / "config.yaml").read_text())


def _check_evaluation(values: dict[str, typing.Any]) -> dict[str, typing.Any]:
    assert not values.get("save") or os.path.getsize(values["save"])
    if not values["json"]:
        return {}
    result = json.loads(Path(values["json"]).read_text())
    accuracies = result["scores"][0]["accuracies"]
    assert len(accuracies) == values["num_eval"] and all(0 <= each <= 1 for each in accuracies)
    if "ipc" in values:
        held_out = values["val_fraction"] and max(1, math.floor(values["val_fraction"] * IMAGES["train"] + 0.5))
        assert result["images"] == len(CLASSES) * (values["ipc"] or IMAGES["train"] - held_out)
    return result["config"]


# --- inputs -----------------------------------------------------------------------------------------------------

BOOLEANS = ["True", "true", "TRUE", "1", "yes", "on", "t", "Y", "False", "false", "0", "no", "off", "f", "N"]
FALSE = ["False", "false", "0", "no", "off", "f", "N"]
UNSET = ["None", "none", "null", "~", ""]

# Values that are good in any combination with each other.
_EVERY = {
    "seed": ["0", "7", "-3", "+5", "007", "1_000", "4.0", "99999999999999999999"], "dsa": BOOLEANS,
    "dsa_strategy": ["color", "flip_scale", "none", "", "color_crop_cutout_flip_scale_rotate"],
    "backend": ["auto", "plain", "eager"], "precision": ["auto", "fp32", "bf16"], "batch_real": ["1", "256"],
    "device": ["cpu", "auto", "0", "[0]", "[0, 1]"], "res": ["8", "8.0", "8x8"], "subset": ["imagewoof"]}
_TRAINED = {
    "batch_train": ["1", "16", "1000000000000"], "lr_teacher": ["0.01", "1e-2", ".01", "1E-2", "0.0100"],
    "no_aug": BOOLEANS, "parall_eva": BOOLEANS, "num_eval": ["1", "2"], "epoch_eval_train": ["1", "2", "1.0"],
    "eval_mode": ["S"]}
_ANY_NETWORK = {"model": ["MLP", "ConvNetD1W2", "ConvNetD1W4NP", "ConvNetW8D2AL"], "zca": BOOLEANS,
                "val_fraction": ["0", "0.25", "2.5e-1"]}
_DISTILLED = {
    "ipc": ["1", "2"], "Iteration": ["0", "1", "3"], "labels": ["learned", "soft", "hard", "target"],
    "lr_param": ["plain", "log"], "ema": BOOLEANS, "ema_decay": ["0", "0.5", "1"], "depth_ratio": ["0", "0.3"],
    "lr_img": ["0", "1", "1e1", "5."], "lr_lr": ["0", "1e-5", "1E-7", "0.00001"], "lr_y": ["0", "2", ".5"],
    "Momentum_y": ["0", "0.9"], "batch_syn": [*UNSET, "1", "2", "1000000"], "load_all": BOOLEANS,
    "pix_init": ["samples_predicted_correctly", "real", "noise"], "max_start_epoch": ["1", "2", "3"],
    "Sequential_Generation": BOOLEANS, "expansion_end_epoch": ["1", "2", "3000"],
    "current_max_start_epoch": ["1", "2", "20"], "threshold": ["1000", "inf", "1e400", "0", "1e-300"],
    "max_files": [*UNSET, "1", "9"], "max_experts": [*UNSET, "1"], "Label_Model_Timestamp": ["-1", "0", "1", "3"],
    "factor": ["1", "2"], "eval_it": ["1", "2", "100"], "skip_first_eva": BOOLEANS, "force_save": BOOLEANS,
    "record_loss": BOOLEANS,
    "run_name": ["x", "None", "12", "2024-01-05", "007", "ünï 日本", "a b", "True"], "wandb": ["auto", "disabled"],
    "project": ["TEST", "", "☂"], "micro_batch": [*UNSET, "1", "100"], "dry_run": FALSE, "matching": ["tesla"],
    "lr_init": ["1", "-1"], "texture": BOOLEANS, "canvas_size": ["3"], "canvas_samples": ["-4"],
    "Initialize_Label_Model": ["", "MLP"]}
GOOD = {
    BUFFER: _EVERY | _ANY_NETWORK | {
        "num_experts": ["1", "2", "3"], "train_epochs": ["1", "2"], "lr_teacher": ["0.1", "1e-1"],
        "batch_train": ["1", "16", "1000000000000"], "mom": ["0", "0.5"], "l2": ["0", "1e-4"], "alpha": ["0", "0.4"],
        "adaptive": BOOLEANS, "decay": BOOLEANS, "pad": FALSE, "init_ratio": ["0.5", "1"],
        "micro_batch": [*UNSET, "1", "5"], "save_interval": ["1", "2", "10"]},
    DATM: _EVERY | _TRAINED | _DISTILLED | {"matching": ["exact", "tesla"]},
    TESLA: _EVERY | _TRAINED | _DISTILLED,
    EVALUATION: _EVERY | _TRAINED | _ANY_NETWORK | {"save": ["out/set.safetensors", ""], "lr_dir": [""],
                                                    "protocol": ["datm", "dc,datm"]},
    BASELINE: _EVERY | _TRAINED | _ANY_NETWORK | {"ipc": ["1", "2", *UNSET], "label_source": ["auto", "hard"],
                                                  "pick": ["random"]}}

NUMBERS = ["-1", "0", "1", "2", "3", "1.5", "-0.5", "1e-5", "1E3", "1e400", "-1e400", "1e-400", "nan", "NaN", "inf",
           "-inf", "Infinity", "1_0", "_1", "0x10", "0b1", "1e", "+2", "--2", "- 1", " 3 ", "\t2", "1,5", "1/2", "50%",
           "٣", "１", "²", "½", "∞", "1j", "9" * 25, "9" * 5000, "1" + "0" * 400, "0." + "0" * 400 + "1", "1e308",
           "2147483648", "9223372036854775808", "18446744073709551616"]
TEXTS = [*UNSET, *BOOLEANS, " ", "maybe", "Nope", "[]", "[0]", "[0, 1]", "[-1]", "[a]", "[[0]]", "[0",
         "[9999999999999999]", "{}", "{a: 1}", "&a 1", "*a", "- 1", "a: b",
         "!!python/object/apply:os.system ['touch pwned']", "!!int 3", "$(touch pwned)", "`touch pwned`",
         "; touch pwned", "%s%n%d", "{0}", "{self}", "$HOME", ".", "..", "\\", "é", "e\u0301", "日本語", "🙂",
         "\u202eabc", "\u200b", "a\nb", "a\r\nb", "\n", "\x1b[31mred\x1b[0m", "\x07", "\x7f", "\u2028", "a\x85b",
         "\udcff", "a\udc80b", "\ufeff", "\U0010ffff", "x" * 300, "y" * 100000, "é" * 2000, "None None", "cuda",
         "cuda:", "cuda:99", "cpu:1", "cpu:99", "mps", "meta", "00"]
ODD_PATHS = ["nowhere", "nowhere/below", "folder", "folder/", "bytes.bin", "bytes.pt", "bytes.safetensors", "empty.pt",
             "unreadable", "unreadable/x.pt", "unreadable.bin", "bytes.bin/below", "new\nline", "loop", "loop/x", ".",
             "./", "out", "~", "~/x", "~nobody_of_this_name/x", "/dev/null", "/dev/null/x", "/proc/nowhere/x",
             "/proc/self/mem", "/proc/version", "x" * 300, "y/" * 3000, "a b/c d", "\x1b[31m", "\udcff", "日本",
             "out/\udcff", "out/ünï", "*", "[a]", "-", "None", "given.yaml"]
ODD_NAMES = {
    "dataset": ["CIFAR10", "cifar10", "CIFAR100", "MNIST", "SVHN", "Tiny", "ImageNet", "ImageNet1K", "MiniFashion",
                "FashionMNIST", "imagefolder", "ImageFolder ", "../ImageFolder", "ImageFolder/../ImageFolder"],
    "subset": ["imagenet", "Imagenette", "../x"],
    "model": ["ConvNet", "convnet", "ConvNetD9", "ConvNetD0", "ConvNetD1W0", "ConvNetD1W4BN", "ConvNetD1W6GN",
              "ResNet18", "MLP_Tiny", "LeNet", "ConvNetD1D1", "ConvNetW4D1", "ConvNetD01", "ConvNetD１", "../ConvNet",
              "ConvNet\n", "ConvNetD4W4", "ConvNetD8W4NP", "ConvNetD1W99999", "MLP", "BN"],
    "eval_mode": ["s", "Z", "C", "M", "SS", "W,D"],
    "dsa_strategy": ["_", "color_", "color__crop", "COLOR", "colour", "flip,crop"],
    "matching": ["unroll", "Exact", "tesla "], "backend": ["graph", "Plain"], "precision": ["tf32", "fp16", "BF16"],
    "run_name": [".", "..", "...", "a/b", "../x", "\\", " ", "x" * 300, ".hidden", "a\nb", "\x1b[31m", "\udcff", "~"],
    "label_source": ["experts", "soft"], "pick": ["herding", "correct", "k-center"],
    "rho_max": ["0", "2", "1e30"], "lr_teacher": ["1e30", "0", "1e-300", "1e308"],
    "lr_img": ["1e38", "1e300"], "lr_lr": ["1e30", "1"], "lr_y": ["1e38"],
    "res": ["4", "16", "7", "1", "1000000", "8x8", "8×12", "x8", "8x", "0x8"],
    "val_fraction": ["0.5", "0.9", "0.99", "1", "1e-9"], "Initialize_Label_With_Another_Model": ["True"],
    "min_start_epoch": ["1", "2"], "expert_epochs": ["2", "4"], "pad": ["True"], "wandb": ["Auto", "yes"],
    "loss_ratio": ["0.5", "0.999"], "depth_ratio": ["0.999"], "dry_run": ["True"], "train_epochs": ["9" * 20]}
NETWORKED = {"wandb": {"online", "offline"}, "backend": {"compile"}}  # left out, see the top
WORK = {"num_experts", "train_epochs", "Iteration", "syn_steps", "num_eval", "epoch_eval_train"}  # multiply the work
MOST_WORK = 6
WILD_TOKENS = ["--", "-", "---", "-x", "-1", "configs/x.yaml", "x", "--=1", "--=", "=", "-seed=1", "---seed=1",
               "--seed 1", "--seed\n=1", "--cfg=given.yaml", "--cfg", "--cfg=", "--cfg=nowhere", "--cfg=folder",
               "--cfg=bytes.yaml", "--cfg=unreadable.bin", "--cfg=loop", "--cfg=/proc/self/mem", "--cfg=" + "x" * 5000,
               "--help", "-h", "--help=1", "-help", "-hx", "--h", "--hel", "@given.yaml", "--zca=", "--zca", "--seed",
               "--seed=", "", " ", "--" + "x" * 10000, "--é", "--\udcff=1", "--\x1b[31m", "--a\nb", "--lr-img=1",
               "--IPC=1", "--ipc ", "--data-path=x", "--no-zca", "--nozca", "-zca", "--zca=True=False", "--momentun=1",
               "+seed=1"]


def odd_values(name: str, sandbox: Sandbox) -> st.SearchStrategy[str]:
    """Texts for an option, mostly wrong ones, but none that would take minutes or lead outside the sandbox."""
    kinds = [st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(-2**70, 2**70).map(str),
             st.floats().map(repr), st.text(max_size=30), st.text(alphabet=string.punctuation + " 01eE", max_size=8)]
    if name in ODD_NAMES:
        kinds += [st.sampled_from(ODD_NAMES[name])] * 3
    if name in PATHS:
        kinds += [st.sampled_from(ODD_PATHS)] * 4

    def takes_moments(text: str) -> bool:
        try:
            number = float(text)
        except ValueError:
            return True
        if name == "res":
            return not 16 < number < 1e5
        return name not in WORK or not number > MOST_WORK or (name == "train_epochs" and number > 1e13)

    return st.one_of(kinds).filter(lambda text: (
        takes_moments(text) and text not in NETWORKED.get(name, ()) and "\0" not in text
        and (name not in PATHS or sandbox.allows(text))))


@st.composite
def cases(draw: typing.Callable[..., typing.Any], script: str, sandbox: Sandbox) -> Case:
    """Inputs of an entry; about one in four has nothing odd in it."""
    plain = draw(st.integers(0, 4)) == 0
    good, hints = GOOD[script], hints_of(ENTRIES[script])
    options = list(sandbox.usual(script).items())
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=4, unique=True)):
        options.append((name, draw(st.sampled_from(good[name]))))
    wild: list[list[str]] = []
    odd_yaml = False
    if not plain:
        kinds = ["value", "value", "value", "token", "name"] + ["yaml", "yaml"] * (script in WITH_YAML)
        for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=2)):
            name = draw(st.sampled_from(list(hints)))
            if kind == "value":
                if draw(st.booleans()):
                    options = [each for each in options if each[0] != name]
                options.append((name, draw(odd_values(name, sandbox))))
            elif kind == "token":
                wild.append([draw(st.sampled_from(WILD_TOKENS))])
            elif kind == "name":
                wild.append([f"--{draw(misspelt(name))}={draw(st.sampled_from(['1', 'x', '']))}"])
            else:
                odd_yaml = True
        options = draw(st.permutations(options)) if draw(st.booleans()) else options
    content = None
    if script in WITH_YAML:
        inside = draw(st.lists(st.booleans(), min_size=len(options), max_size=len(options)))
        pairs = dict(itertools.compress(options, inside))
        options = [pair for pair, given in zip(options, inside) if not given]
        content = draw((odd_yamls if odd_yaml else plain_yamls)(pairs, sandbox))
        if content.meaning is None:  # what is wrong in it must not be overridden
            words = set(re.findall(r"\w+", content.content[:10000].decode(errors="replace")))
            options = [pair for pair in options if pair[0] not in words]
        wild.insert(0, draw(st.sampled_from([["--cfg=given.yaml"], ["--cfg", "given.yaml"]])))
    # An empty value is good in a YAML; on a command line some options refuse it.
    pieces = [draw(spelt(name, text, hints[name])) for name, text in options if text or not plain]
    for tokens in wild:
        pieces.insert(0 if plain else draw(st.integers(0, len(pieces))), tokens)
    unheard = draw(st.sampled_from([*[""] * 8, "full", "closed"]))
    return Case(script, [token for tokens in pieces for token in tokens], content, plain, unheard)


def misspelt(name: str) -> st.SearchStrategy[str]:
    """An option's name with a letter missing, doubled, swapped or in the other case, cut off, longer, or hyphenated."""
    def at(place: int) -> list[str]:
        before, letter, behind = name[:place], name[place], name[place + 1:]
        return [before + behind, before + 2 * letter + behind, before + letter.swapcase() + behind,
                before + behind[:1] + letter + behind[1:], before]

    return st.one_of(st.integers(0, len(name) - 1).map(at).flatmap(st.sampled_from),
                     st.text(min_size=1, max_size=4).map(lambda more: name + more), st.just(name.replace("_", "-")))


def spelt(name: str, text: str, hint: typing.Any) -> st.SearchStrategy[list[str]]:
    """The tokens of an option: one word, two, or for a switch its name alone."""
    forms = [[f"--{name}={text}"]]
    if not text.startswith("-") or re.fullmatch(r"-\d+", text):
        forms.append([f"--{name}", text])
    if hint is bool and text == "True":
        forms.append([f"--{name}"])
    return st.sampled_from(forms)


# --- YAML files ---


def plain_yamls(pairs: dict[str, str], sandbox: Sandbox) -> st.SearchStrategy[Yaml]:
    """Files with one key a line, each value in one of YAML's styles of quoting."""
    pairs = {name: text for name, text in pairs.items() if name not in PATHS or sandbox.allows(text)}

    def write(quotes: list[int]) -> Yaml:
        lines = [f"{name}: {_quoted(text, quote)}" for (name, text), quote in zip(pairs.items(), quotes)]
        # A file without keys is refused.
        return Yaml("\n".join(["canvas_size: 2" if not lines else "# a comment", *lines, ""]).encode(), pairs)

    return st.lists(st.integers(0, 2), min_size=len(pairs), max_size=len(pairs)).map(write)


def _quoted(text: str, quote: int) -> str:
    if quote == 0 and re.fullmatch(r"[\w./+~-]+( [\w./]+)*", text, re.ASCII) and not text.startswith("- "):
        return text
    if quote == 0 and re.fullmatch(r"\[\d+(, \d+)*\]", text):
        return text
    if quote == 1 and text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    return json.dumps(text)


def odd_yamls(pairs: dict[str, str], sandbox: Sandbox) -> st.SearchStrategy[Yaml]:
    """Files of any bytes or text, and options with one more key. (tests/test_refusals.py has those that are chosen.)"""
    written = plain_yamls(pairs, sandbox)
    meaningless = st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode))
    return st.one_of(
        meaningless.map(lambda content: Yaml(content, None)),
        st.tuples(written, st.text(min_size=1, max_size=10)).map(
            lambda each: Yaml(each[0].content + f"{json.dumps(each[1])}: 1\n".encode(), None)),
        written)


# --- all together -----------------------------------------------------------------------------------------------


def import_everything() -> None:
    """Imports, once for all forked children, what takes seconds; --help and refusals do without it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import torch
    import torch._dynamo  # optimisers import it at their first step

    torch.set_num_threads(1)


def refuse_connections() -> None:
    """Cuts inputs off the network, so that downloads fail."""
    def refuse(*_: typing.Any, **__: typing.Any) -> typing.NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "the fuzz test has no network")
    socket.getaddrinfo = refuse


def fuzz(inputs: int, seed: int, sandbox: Sandbox) -> dict[str, typing.Any]:
    """Runs the inputs; returns counts by entry and exit code, and every failure."""
    codes: dict[str, collections.Counter] = {script: collections.Counter() for script in ENTRIES}
    plain, seconds, failures, timeouts = [], [], [], []

    def one(case: Case) -> None:
        outcome = sandbox.run(case)
        codes[case.script][str(outcome.code)] += 1
        plain.append(case.plain)
        seconds.append(outcome.seconds)
        command = case.command(sandbox)
        if len(plain) % 100 == 0:
            print(f"{len(plain)} inputs, {len(failures)} failures", file=sys.stderr, flush=True)
        if outcome.code == "timeout":
            timeouts.append(command)
        if found := problems(case, outcome, sandbox):
            lines = (outcome.stderr.strip() or outcome.stdout.strip()).splitlines()
            lines = [sandbox.hidden(line[:300]) for line in lines[-12:]]
            failures.append({"command": command, "problems": found, "output": lines})
            print(f"FAILED: {'; '.join(found)}\n  {command}\n    " + "\n    ".join(lines), flush=True)

    for script, share in SHARES.items():
        settings = hypothesis.settings(max_examples=math.ceil(inputs * share / sum(SHARES.values())), deadline=None,
                                       database=None, phases=[hypothesis.Phase.generate],
                                       suppress_health_check=list(hypothesis.HealthCheck))
        hypothesis.seed(seed)(settings(hypothesis.given(cases(script, sandbox))(one)))()
    return {"inputs": len(plain), "seed": seed, "of_nothing_odd": sum(plain),
            "exit_codes": {script: dict(sorted(count.items())) for script, count in codes.items()},
            "timeouts": timeouts, "failures": failures, "slowest_seconds": round(max(seconds), 1)}


def main() -> None:
    parser = ScriptParser(__doc__, json="the counts and every failure")
    parser.add_argument("--inputs", type=positive, default=1000, metavar="N", help="how many are tried (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the inputs (%(default)s)")
    args = parser.parse_args()
    common.obey_permissions()
    sys.stdout.reconfigure(errors="backslashreplace")  # for odd text in a failing command line
    import_everything()
    refuse_connections()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        sandbox = Sandbox(Path(folder).resolve() / "sandbox")
        os.environ |= {"DATM_CACHE": str(sandbox.root / "cache"), "HOME": str(sandbox.work / "home"), "COLUMNS": "100",
                       "WANDB_API_KEY": "", "WANDB_MODE": "", "NETRC": os.devnull, "CUDA_VISIBLE_DEVICES": ""}
        sandbox.build()
        gc.collect()
        gc.freeze()  # so that garbage collection in the children does not copy the parent's pages
        began = perf_counter()
        report = fuzz(args.inputs, args.seed, sandbox)
        report["seconds"] = round(perf_counter() - began)
        sandbox.renew()  # so that everything can be deleted
        (sandbox.work / "unreadable").chmod(0o700)
    gc.unfreeze()
    print(f"{number_of(report['inputs'], 'input')}, seed {args.seed}, {report['of_nothing_odd']} with nothing odd, in "
          f"{report['seconds']} s (the slowest {report['slowest_seconds']} s)")
    for script, codes in report["exit_codes"].items():
        print(f"  {script}: {', '.join(f'{count} × {code}' for code, count in codes.items())}")
    for command in report["timeouts"]:
        print(f"timeout: {command}")
    print(number_of(len(report["failures"]), "failure"))
    common.conclude(args.json, report, failed=bool(report["failures"]))


if __name__ == "__main__":
    entry(main)
