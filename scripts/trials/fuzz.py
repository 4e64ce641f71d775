"""Odd command lines and YAML files for every entry: each must be answered by one line and exit code 2, or be obeyed.

    python scripts/trials/fuzz.py [--inputs 1000] [--seed 0] [--json FILE]

Hypothesis draws the inputs: tiny settings that are known to run, with none, one or two odd options, values, files or
YAMLs among them. Each is run in a forked child that has imported everything already, in a folder of its own, on three
colours as dataset. Checked are: the exit code is 0 or 2, and 0 for an input made of nothing odd; no traceback, no
warning; a refusal is one readable line, leaves no new file and changes none; whatever happens, no half-written file is
left. After exit code 0, `read`, which knows nothing of the program's own parser, says what each option must mean, and
what the run saved of its options, and what it made, are compared with that.

Left out, since they take minutes or need the network: `--backend compile`, `--wandb online` and `offline`, downloads
(every connection is refused), and large values of what multiplies the work. An input that takes more than 20 s
of processor time counts as `timeout` and is listed, but fails nothing.
"""

import argparse
import collections
import dataclasses
import gc
import io
import json
import math
import os
import re
import resource
import runpy
import select
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
    os.environ[variable] = "1"  # a fork inherits no thread of a pool
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import hypothesis
import kornia.enhance  # noqa: F401  imported here, so that no child has to
import matplotlib
import numpy as np
import torch
import torch._dynamo  # optimisers import it at their first step
import yaml
from hypothesis import strategies as st
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot

import utils.config
import utils.program.console
from utils.config import BaselineConfig, BufferConfig, DistillConfig, EvaluationConfig, TeslaConfig
from utils.files import write_json
from utils.program.entry import entry
from utils.program.machine import environment

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 20  # seconds of the processor
WAIT = 120.0  # seconds, where other programs keep the processor busy
MEMORY = 16 << 30  # bytes of address space
LONGEST_LINE = 1000  # characters of a refusal
BUFFER, DATM, TESLA = "buffer/buffer_FTD.py", "distill/DATM.py", "distill/DATM_tesla.py"
EVALUATION, BASELINE = "distill/evaluation.py", "distill/baseline.py"
ENTRIES = {BUFFER: BufferConfig, DATM: DistillConfig, TESLA: TeslaConfig, EVALUATION: EvaluationConfig,
           BASELINE: BaselineConfig}
SHARES = {BUFFER: 2, DATM: 3, TESLA: 1, EVALUATION: 2, BASELINE: 2}  # of the inputs
WITH_YAML = (DATM, TESLA)
EPOCHS = 3  # of the toy's experts
CLASSES, IMAGES = ("blue", "green", "red"), {"train": 6, "test": 2}  # images of each class

# A refusal that can only come after something was finished, which is kept.
LATE = re.compile(r"diverged in epoch|times in a row")


# --- what is there: a dataset, experts, a distilled set, odd files ---------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """`shared/`, which no input may change, and `work/`, made anew for each input, where it stands."""

    root: Path

    @property
    def shared(self) -> Path:
        return self.root / "shared"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def repository(self) -> Path:
        """Stands in the place of the repository, which paths in a YAML are relative to."""
        return self.work / "repository"

    def build(self) -> None:
        random = np.random.default_rng(0)
        for split, count in IMAGES.items():
            for channel, name in enumerate(CLASSES):
                (self.shared / "toy" / split / name).mkdir(parents=True)
                for number in range(count):
                    pixels = random.integers(0, 160, (8, 8, 3), dtype=np.uint8)
                    pixels[:, :, channel] += 60
                    Image.fromarray(pixels).save(self.shared / "toy" / split / name / f"{number}.png")
        (self.shared / "set").mkdir()
        torch.save(torch.randn(3, 3, 8, 8), self.shared / "set" / "images_best.pt")
        torch.save(torch.randn(3, 3), self.shared / "set" / "labels_best.pt")
        torch.save(torch.tensor(0.01), self.shared / "set" / "lr_best.pt")
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
            files = {f"{option}_dir": str(self.shared / "set" / f"{name}_best.pt")
                     for option, name in (("data", "images"), ("label", "labels"), ("lr", "lr"))}
            return {**data, **evaluation, **files, "json": "out/result.json"}
        return {**data, **evaluation, **experts, "ipc": "1", "json": "out/result.json"}

    def renew(self) -> None:
        """An empty `work/` but for files and folders that odd paths point to."""
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
        """Whether a path, from either of the places it can be relative to, is one that a run may write to."""
        if path.startswith(("/proc/", "/dev/null")):
            return True
        return all(self._inside(os.path.abspath(os.path.join(start, os.path.expanduser(path))))
                   for start in (self.work, self.repository))

    def _inside(self, path: str) -> bool:
        return path == str(self.work) or path.startswith((f"{self.work}{os.sep}", f"{self.shared}{os.sep}"))

    def hidden(self, text: str) -> str:
        """The text without paths of this machine."""
        return text.replace(str(self.root), "SANDBOX").replace(str(REPOSITORY), ".")

    def files(self) -> dict[str, tuple[int, int]]:
        """Every file but what is kept for the next run, with its size and time of change."""
        found = {}
        for folder, _, names in os.walk(self.root):
            names = [name for name in names if name.startswith(".") or folder != str(self.root / "cache")]
            for name in names:
                status = os.lstat(path := os.path.join(folder, name))
                found[path] = (status.st_size, status.st_mtime_ns)
        return found

    # --- running an input ---

    def run(self, case: "Case") -> "Outcome":
        """Runs an entry in a forked child."""
        self.renew()
        if case.yaml is not None:
            (self.work / "given.yaml").write_bytes(case.yaml.content)
        before = self.files()
        outputs = [self.root / name for name in ("stdout", "stderr")]
        began = perf_counter()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._child(case, outputs)
        code = _wait(child)
        out, err = (path.read_bytes().decode(errors="backslashreplace") for path in outputs)
        after = {path: status for path, status in self.files().items() if Path(path) not in outputs}
        changed = [path for path, status in before.items() if path in before.keys() - set(map(str, outputs))
                   and after.get(path) != status]
        return Outcome(code, out, err, sorted(after.keys() - before.keys()), changed, perf_counter() - began)

    def _child(self, case: "Case", outputs: list[Path]) -> typing.NoReturn:
        code = 1
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT, TIMEOUT + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for number, path in enumerate(outputs, 1):
                os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), number)
            # As Python makes them where the locale is a UTF-8 one.
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", errors="strict")
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8",
                                          errors="backslashreplace", line_buffering=True)
            os.chdir(self.work)
            utils.config.REPOSITORY = utils.program.console.REPOSITORY = self.repository
            sys.argv = [str(REPOSITORY / case.script), *case.arguments]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            sys.stdout.flush()
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            with open(os.devnull, "w") as nowhere:
                sys.stdout = sys.stderr = nowhere
            os._exit(code)


def _wait(child: int) -> int | str:
    """The exit code; `timeout`, or the name of the signal that ended it."""
    handle = os.pidfd_open(child)
    late = not select.select([handle], [], [], WAIT)[0]
    os.close(handle)
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "timeout"
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class Yaml(typing.NamedTuple):
    """A YAML file and what it means; None: nothing, so that it must be refused."""

    content: bytes
    meaning: list[tuple[str, str]] | None


class Case(typing.NamedTuple):
    """One input."""

    script: str
    arguments: list[str]
    yaml: Yaml | None
    plain: bool  # made of nothing odd, so that it must run

    def command(self, sandbox: Sandbox) -> str:
        line = shlex.join(["python", self.script, *(each if len(each) < 400 else f"{each[:60]}…({len(each)} characters)"
                                                    for each in self.arguments)])
        if self.yaml is not None:
            content = self.yaml.content
            line += f"   # given.yaml: {content[:600]!r}{'' if len(content) <= 600 else f'… ({len(content)} bytes)'}"
        return sandbox.hidden(line)


class Outcome(typing.NamedTuple):
    code: int | str
    stdout: str
    stderr: str
    new: list[str]  # files
    changed: list[str]  # files that were there and are gone or not the same
    seconds: float


# --- what an input means, read without the program's parser ----------------------------------------------------


class MeaninglessError(Exception):
    """No value of the option's type, or no command line at all."""


PATHS = {"data_path", "buffer_path", "log_path", "Initialize_Label_Model_Dir", "data_dir", "label_dir", "lr_dir",
         "json", "save"}
SIGNED = {"seed", "Label_Model_Timestamp", "lr_init", "canvas_size", "canvas_samples"}
NOT_SAVED = {"device", "parall_eva", "backend", "micro_batch", "dry_run", "log_path", "run_name", "resume", "json",
             "save", "wandb", "project", "force_save", "quiet"}
NOTHING = ("none", "null", "~", "")
YES, NO = {"1", "true", "on", "yes", "t", "y"}, {"0", "false", "off", "no", "f", "n"}


def read(name: str, text: str, hint: typing.Any) -> typing.Any:
    """The value that a text must have, by the option's type alone.

    Raises:
        MeaninglessError
    """
    types = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ()
    if type(None) in types:
        if text.lower() in NOTHING:
            return None
        (hint,) = (each for each in types if each is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        if text not in typing.get_args(hint):
            raise MeaninglessError(f"{name} {text!r}")
        return text
    if hint is bool:
        if text.lower() not in YES | NO:
            raise MeaninglessError(f"{name} {text!r}")
        return text.lower() in YES
    if hint in (int, float):
        try:
            whole = re.fullmatch(r"\s*([+-]?[\d_]+)\.0*\s*", text)  # 2.0 is the whole number 2
            value = hint(whole[1] if whole and hint is int else text)
        except ValueError as error:
            raise MeaninglessError(f"{name} {text!r}") from error
        if math.isnan(value) or (value < 0 and name not in SIGNED) or (abs(value) == math.inf and name != "threshold"):
            raise MeaninglessError(f"{name} {text!r}")
        return value
    return text  # names; and the device, which no run saves


def command_line(case: Case) -> dict[str, str] | None:
    """Option → its last text on the command line; None if it asks for help.

    Raises:
        MeaninglessError: not options and their values alone.
    """
    hints = typing.get_type_hints(ENTRIES[case.script]) | ({"cfg": str} if case.script in WITH_YAML else {})
    given: dict[str, str] = {}
    tokens = collections.deque(case.arguments)

    def is_value(token: str) -> bool:
        """Not an option: a negative number, a dash alone, or anything that has a space in it, may begin with a dash."""
        return (not token.startswith("-") or token == "-" or re.fullmatch(r"-\d+|-\d*\.\d+", token) is not None
                or (" " in token and token.split("=")[0].removeprefix("--") not in hints))

    while tokens:
        token = tokens.popleft()
        if token in ("--help", "-h"):
            return None
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or name not in hints:
            raise MeaninglessError(token)
        if not equals:
            if tokens and is_value(tokens[0]):
                text = tokens.popleft()
            elif hints[name] is bool:
                text = "True"
            else:
                raise MeaninglessError(f"{token} without a value")
        given[name] = text
    return given


def meaning(case: Case, sandbox: Sandbox) -> dict[str, typing.Any] | None:
    """Option → value of everything the entry has; None if it asks for help.

    Raises:
        MeaninglessError
    """
    given = command_line(case)
    if given is None:
        return None
    hints = typing.get_type_hints(ENTRIES[case.script])
    values = {field.name: field.default.get_default(call_default_factory=True)
              for field in dataclasses.fields(ENTRIES[case.script])}
    values |= {name: _from_repository(values[name], sandbox) for name in PATHS & values.keys()}
    if case.script in WITH_YAML:
        if "cfg" not in given:
            raise MeaninglessError("no --cfg")
        content = case.yaml
        if given.pop("cfg") != "given.yaml":
            published = (REPOSITORY / case.arguments[-1].removeprefix("--cfg=")).resolve()
            if published.suffix != ".yaml" or not published.is_relative_to(REPOSITORY / "configs"):
                raise MeaninglessError("no such --cfg")
            # One key a line, so that it needs no YAML to read it.
            lines = [line.split("#")[0].split(":", 1) for line in published.read_text().splitlines()]
            content = Yaml(b"", [(line[0].strip(), line[1].strip()) for line in lines if len(line) == 2])
        if content is None or content.meaning is None:
            raise MeaninglessError("no such YAML")
        for name, text in content.meaning:
            if name not in hints:
                raise MeaninglessError(name)
            values[name] = _from_repository(text, sandbox) if name in PATHS else _lenient(name, text, hints, given)
    for name, text in given.items():
        values[name] = (os.path.abspath(os.path.join(sandbox.work, os.path.expanduser(text))) if name in PATHS and text
                        else read(name, text, hints[name]))
    return values


def _lenient(name: str, text: str, hints: dict[str, typing.Any], given: dict[str, str]) -> typing.Any:
    """A value of a YAML, which may be wrong where the command line gives another."""
    return None if name in given else read(name, text, hints[name])


def _from_repository(text: str, sandbox: Sandbox) -> str:
    while text.startswith(("../", "./")):
        text = text.split("/", 1)[1]
    return os.path.normpath(os.path.join(sandbox.repository, os.path.expanduser(text))) if text else text


# --- what must hold ---------------------------------------------------------------------------------------------


def problems(case: Case, outcome: Outcome, sandbox: Sandbox) -> list[str]:
    """Everything that is wrong with what an input led to."""
    found = []
    output = outcome.stdout + outcome.stderr
    if "Traceback (most" in output or re.search(r"\b\w*Warning: ", output):
        found.append("a traceback or a warning")
    found += [f"a half-written file is left: {os.path.basename(path)}" for path in outcome.new
              if os.path.basename(path).startswith(".")]
    if (sandbox.work / "pwned").exists():
        found.append("code in a YAML was run")
    if outcome.code == "timeout":
        return found
    if outcome.code == 2:
        found += _problems_of_refusal(case, outcome)
    elif outcome.code == 0:
        try:
            values = meaning(case, sandbox)
            found += _problems_of_run(case, values, outcome, sandbox)
        except MeaninglessError as error:
            found.append(f"exit code 0 for what means nothing: {str(error)[:200]}")
    else:
        found.append(f"exit code {outcome.code}")
    return found


def _problems_of_refusal(case: Case, outcome: Outcome) -> list[str]:
    found = [f"{Path(path).name} was changed by a refused input" for path in outcome.changed]
    if case.plain:
        found.append("a good input was refused")
    # As a terminal counts lines: Unicode's other line ends are characters like any other.
    lines = [line for line in outcome.stderr.split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith(f"{Path(case.script).name}: error: ")]
    if len(errors) != 1 or lines[-1] not in errors:
        found.append(f"{len(errors)} error lines")
    late = bool(errors) and LATE.search(errors[0])
    if not late and any(not line.startswith("note: ") for line in lines[:-1]):
        found.append("more than notes before the error")
    found += [f"an error line of {len(line)} characters" for line in errors if len(line) > LONGEST_LINE]
    found += ["an error line with control characters" for line in errors if not line.isprintable()]
    if outcome.new and not late:
        found.append(f"a refused input left {', '.join(os.path.basename(path) for path in outcome.new[:3])}")
    return found


def _problems_of_run(case: Case, values: dict[str, typing.Any] | None, outcome: Outcome, sandbox: Sandbox) -> list[str]:
    if values is None:
        return [] if outcome.stdout.startswith("usage: ") and not outcome.new else ["help that is none"]
    own = {values.get("json"), values.get("save")}  # whatever lies there is meant to be replaced
    found = [f"{Path(path).name} was changed" for path in outcome.changed if path not in own]
    if values.get("dry_run"):
        return found + (["a dry run wrote files"] if outcome.new else [])
    try:
        if case.script == BUFFER:
            saved = _check_experts(values)
        elif case.script in WITH_YAML:
            saved = _check_distillation(values)
        else:
            saved = _check_evaluation(values)
    except (OSError, AssertionError, LookupError, ValueError) as error:
        return [*found, f"exit code 0 without its result: {type(error).__name__} {str(error)[:300]}"]
    for name, value in saved.items():
        expected = values[name]
        if name in PATHS and value:
            value = os.path.normpath(sandbox.repository / value)
        if value != expected or type(value) is not type(expected):
            found.append(f"--{name} is {value!r}, and should be {expected!r}")
    fields = {field.name: field.default.json_schema_extra["effect"] for field in
              dataclasses.fields(ENTRIES[case.script])}
    lost = [name for name, effect in fields.items() if name not in NOT_SAVED and name not in saved
            and (values[effect] if isinstance(effect, str) else effect)]
    return found + ([f"not saved: {', '.join(lost)}"] if saved and lost else [])


def _check_experts(values: dict[str, typing.Any]) -> dict[str, typing.Any]:
    folder = Path(values["buffer_path"]) / values["dataset"] / values["model"]
    paths = sorted(folder.glob("replay_buffer_*.pt"))
    experts = [expert for path in paths for expert in torch.load(path, weights_only=True)]
    assert len(experts) == values["num_experts"], f"{len(experts)} experts"
    assert len(paths) == math.ceil(len(experts) / values["save_interval"]), f"{len(paths)} files"
    assert all(len(expert) == values["train_epochs"] + 1 for expert in experts), "epochs"
    saved = yaml.safe_load((folder / "replay_buffer_0.yaml").read_text())
    assert [expert["number"] for expert in saved["experts"]] == list(range(len(torch.load(paths[0]))))
    for fact in ("fingerprint", "experts", "sha256"):
        del saved[fact]
    return saved


def _check_distillation(values: dict[str, typing.Any]) -> dict[str, typing.Any]:
    (folder,) = (Path(values["log_path"]) / values["dataset"] / str(values["ipc"]) / values["model"]).iterdir()
    assert values["run_name"] in (None, folder.name), folder.name
    result = json.loads((folder / "result.json").read_text())
    steps = [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(steps) == values["Iteration"] and len(result["best"]["scores"][0]["accuracies"]) == values["num_eval"]
    assert (result["best_ema"] is not None) == values["ema"]
    images = torch.load(folder / "Normal" / "images_best.pt", weights_only=True)
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
        assert result["images"] == len(CLASSES) * (values["ipc"] or IMAGES["train"])
    return result["config"]


# --- inputs -----------------------------------------------------------------------------------------------------

BOOLEANS = ["True", "true", "TRUE", "1", "yes", "on", "t", "Y", "False", "false", "0", "no", "off", "f", "N"]
FALSE = ["False", "false", "0", "no", "off", "f", "N"]
UNSET = ["None", "none", "null", "~", ""]

# Values that are good whatever the others, as long as they come from here too.
_EVERY = {
    "seed": ["0", "7", "-3", "+5", "007", "1_000", "4.0", "99999999999999999999"], "dsa": BOOLEANS,
    "dsa_strategy": ["color", "flip_scale", "none", "", "color_crop_cutout_flip_scale_rotate"],
    "backend": ["auto", "plain", "eager"], "precision": ["auto", "fp32", "bf16"], "batch_real": ["1", "256"],
    "device": ["cpu", "auto", "0", "[0]", "[0, 1]"], "res": ["8", "8.0"], "subset": ["imagewoof"]}
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
    "eval_it": ["1", "2", "100"], "skip_first_eva": BOOLEANS, "force_save": BOOLEANS, "record_loss": BOOLEANS,
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
    EVALUATION: _EVERY | _TRAINED | _ANY_NETWORK | {"save": ["out/set.safetensors", ""], "lr_dir": [""]},
    BASELINE: _EVERY | _TRAINED | _ANY_NETWORK | {"ipc": ["1", "2", *UNSET], "label_source": ["hard"]}}

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
    "label_source": ["experts", "soft"], "rho_max": ["0", "2", "1e30"], "lr_teacher": ["1e30", "0", "1e-300", "1e308"],
    "lr_img": ["1e38", "1e300"], "lr_lr": ["1e30", "1"], "lr_y": ["1e38"], "res": ["4", "16", "7", "1", "1000000"],
    "val_fraction": ["0.5", "0.9", "0.99", "1", "1e-9"], "Initialize_Label_With_Another_Model": ["True"],
    "min_start_epoch": ["1", "2"], "expert_epochs": ["2", "4"], "pad": ["True"], "wandb": ["Auto", "yes"],
    "loss_ratio": ["0.5", "0.999"], "depth_ratio": ["0.999"], "dry_run": ["True"], "train_epochs": ["9" * 20]}
NETWORKED = {"wandb": {"online", "offline"}, "backend": {"compile"}}  # left out: see above
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
    """Texts for an option, mostly wrong ones; none that would take minutes, or lead outside the sandbox."""
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
    """Inputs of an entry: one in five of nothing odd."""
    plain = draw(st.integers(0, 4)) == 0
    good = GOOD[script]
    options = list(sandbox.usual(script).items())
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=4, unique=True)):
        options.append((name, draw(st.sampled_from(good[name]))))
    wild: list[list[str]] = []
    odd_yaml = False
    if not plain:
        names = [field.name for field in dataclasses.fields(ENTRIES[script])]
        kinds = ["value", "value", "value", "token", "name"] + ["yaml", "yaml"] * (script in WITH_YAML)
        for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=2)):
            name = draw(st.sampled_from(names))
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
    content, extra = None, []
    if script in WITH_YAML:
        published = sorted((REPOSITORY / "configs").glob("*/*/*.yaml"))
        if not odd_yaml and draw(st.integers(0, 3)) == 0:
            # The usual options come on the command line, and so override the published ones.
            values = {name: draw(st.sampled_from(GOOD[DATM][name])) for name in ("batch_syn", "lr_lr",
                                                      "skip_first_eva")}
            tamed = {**values, "eval_mode": "S", "min_start_epoch": "0", "batch_train": "16", "loss_ratio": "0",
                     "matching": "tesla", "micro_batch": "None", "Initialize_Label_With_Another_Model": "False",
                     "depth_ratio": "0", "labels": "learned", "precision": "auto", "backend": "auto"}
            options = [*tamed.items(), *options]
            extra = [[f"--cfg={draw(st.sampled_from(published))}"]]
        else:
            inside = {index for index in range(len(options)) if draw(st.booleans())}
            pairs = [pair for index, pair in enumerate(options) if index in inside]
            options = [pair for index, pair in enumerate(options) if index not in inside]
            content = draw(odd_yamls(pairs, sandbox) if odd_yaml else plain_yamls(list(dict(pairs).items()), sandbox))
            if content.meaning is None:  # what is wrong in it must not be overridden
                words = set(re.findall(r"\w+", content.content[:10000].decode(errors="replace")))
                options = [pair for pair in options if pair[0] not in words]
            wild.insert(0, draw(st.sampled_from([["--cfg=given.yaml"], ["--cfg", "given.yaml"]])))
    pieces = [draw(spelt(name, text, typing.get_type_hints(ENTRIES[script])[name])) for name, text in options]
    if plain:
        pieces = [*wild, *pieces]
    else:
        for tokens in wild:
            pieces.insert(draw(st.integers(0, len(pieces))), tokens)
    # A published config is the last argument, where `meaning` looks for it.
    return Case(script, [token for piece in [*pieces, *extra] for token in piece], content, plain)


def misspelt(name: str) -> st.SearchStrategy[str]:
    """An option's name with one letter less, twice or in the other case, two swapped, cut, or with something behind."""
    places = st.integers(0, len(name) - 1)
    return st.one_of(
        places.map(lambda at: name[:at] + name[at + 1:]), places.map(lambda at: name[:at] + name[at] + name[at:]),
        places.map(lambda at: name[:at] + name[at].swapcase() + name[at + 1:]),
        places.map(lambda at: name[:at] + name[at:at + 2][::-1] + name[at + 2:]), places.map(lambda at: name[:at]),
        st.text(min_size=1, max_size=4).map(lambda more: name + more), st.just(name.replace("_", "-")))


def spelt(name: str, text: str, hint: typing.Any) -> st.SearchStrategy[list[str]]:
    """The tokens of an option: in one word, in two, or, of a switch, its name alone."""
    forms = [[f"--{name}={text}"]]
    if not text.startswith("-") or re.fullmatch(r"-\d+", text):
        forms.append([f"--{name}", text])
    if hint is bool and text == "True":
        forms.append([f"--{name}"])
    return st.sampled_from(forms)


# --- YAML files ---


def plain_yamls(pairs: list[tuple[str, str]], sandbox: Sandbox) -> st.SearchStrategy[Yaml]:
    """One key a line, quoted in one of the ways that YAML has."""
    pairs = [(name, text) for name, text in pairs if name not in PATHS or sandbox.allows(text)]

    def write(quotes: list[int]) -> Yaml:
        lines = [f"{name}: {_quoted(text, quote)}" for (name, text), quote in zip(pairs, quotes)]
        # A file of no keys is refused.
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


def odd_yamls(pairs: list[tuple[str, str]], sandbox: Sandbox) -> st.SearchStrategy[Yaml]:
    """Files that are not YAML, no options, or options written in ways that YAML allows."""
    layers = b"[" + b", ".join([b"x"] * 9) + b"]"
    for level in range(9):
        layers = b"[&b%d %s, %s]" % (level, layers, b", ".join([b"*b%d" % level] * 9))
    refused = [
        b"", b"\n\n", b"# nothing\n", b"---\n", b"--- \n...\n", b"null\n", b"3\n", b"ipc\n", b"- ipc\n- 1\n", b"[]\n",
        b"ipc: 1\n---\nipc: 2\n", b"ipc: 1\nipc: 2\n", b"ipc: 1\n'ipc': 1\n", b"ipc: {a: 1}\n", b"ipc: [1]\n",
        b"zca: [True]\n", b"ipc: &a [*a]\n", b"&a ipc: *a\n", b"ipc: *missing\n", b"<<: {ipc: 1}\n", b"? [a]\n: 1\n",
        b"? {a: 1}\n: 1\n", b"ipc: \t1\n\t- x\n", b"a: b: c\n", b"ipc: [1\n", b"ipc: 'x\n", b'ipc: "\\q"\n',
        b"%YAML 9.9\n---\nipc: 1\n", b"!!python/object/apply:os.system ['touch pwned']\n",
        b"ipc: !!python/object/apply:os.system ['touch pwned']\n", b"ipc: !!python/name:os.system\nzca: maybe\n",
        b"ipc: !!binary aGFsbG8=\n", b"!!set {ipc, zca}\n", b"? ipc\n? zca\n", b"\x89PNG\r\n\x1a\n\x00\xff",
        bytes(range(256)), b"\xff\xfei\x00p\x00c\x00", b"ipc: \xff\n", b"ipc: 1\x00\n", b"ipc: \x1b[31m\n",
        b'ipc: "\\0"\n', b'data_path: "a\\0b"\n', b'log_path: "a\\0b"\n', b'buffer_path: "\\0"\n', b'model: "\\0"\n',
        b'dataset: "\\0"\n', b'run_name: "a\\0b"\n', b'dsa_strategy: "\\0"\n', b'device: "\\0"\n', b"momentun: 1\n",
        b"lr-img: 1\n", b"IPC: 1\n", b"ipc : 1\n ipc: 2\n", b"help: 1\n", b"cfg: given.yaml\n", b"3: 4\n", b"true: 1\n",
        b"null: 1\n", b"~: 1\n", b"'': 1\n", b'"a\\nb": 1\n', b'"\\e[31m": 1\n', b"? " + b"k" * 2000 + b"\n: 1\n",
        b"ipc: " + b"9" * 100000 + b"\n", b"ipc: " + b"[" * 3000 + b"\n", b"ipc: " + b"[" * 400 + b"]" * 400 + b"\n",
        b"model: " + b"x" * 1000000 + b"\n", b"ipc: " + layers + b"\n",
        b"".join(b"unknown%d: 1\n" % number for number in range(5000)), b"device: [[0]]\n", b"device: [a]\n",
        b"device: {}\n", b"device: [" + b"0, " * 500 + b"x]\n", b"data_path: [a]\n", b"data_path: {}\n",
        b"project: [a]\n", b"run_name: {a: 1}\n", b"zca:\n", b"ipc:\n", b"threshold: .nan\n", b"lr_img: .inf\n",
        b"lr_img: 1e400\n", b"ipc: 0o2\n", b"ipc: 0x2\n", b"Iteration: 1:30\n", b"ipc: 2024-01-05\n"]
    kept = [
        (b"{}\n", []), (b"ipc: &a 2\nnum_eval: *a\n", [("ipc", "2"), ("num_eval", "2")]),
        (b"ipc: !!int 2\n", [("ipc", "2")]), (b"ipc: !!str 2\n", [("ipc", "2")]),
        (b"{ipc: 2, ema: yes}\n", [("ipc", "2"), ("ema", "yes")]), (b"--- # config\nipc: 2\n...\n", [("ipc", "2")]),
        (b"\xef\xbb\xbfipc: 2\n", [("ipc", "2")]), (b"ipc: 2\r\nlr_y: 3\r\n", [("ipc", "2"), ("lr_y", "3")]),
        (b"%YAML 1.1\n---\nipc: 2\n", [("ipc", "2")]), (b"? ipc\n: 2\n", [("ipc", "2")]),
        (b"'ipc': \"2\"\n", [("ipc", "2")]),
        (b"lr_lr: 1e-5\nema: on\nseed: 010\n", [("lr_lr", "1e-5"), ("ema", "on"), ("seed", "010")]),
        (b"batch_syn:\nmax_files: ~\nmax_experts: null\n",
         [("batch_syn", ""), ("max_files", "~"), ("max_experts", "null")]),
        (b"project: |\n  two\n  lines\nipc: 2\n", [("project", "two\nlines\n"), ("ipc", "2")]),
        (b"seed: 1_000\nipc: 2.0\n", [("seed", "1_000"), ("ipc", "2.0")]),
        (b"threshold: .inf\n", [("threshold", ".inf")]), (b"seed: 1:30\n", [("seed", "1:30")]),
        (b"ema: y\nload_all: n\n", [("ema", "y"), ("load_all", "n")]),
        (b"run_name: 2024-01-05\nproject: 'null'\n", [("run_name", "2024-01-05"), ("project", "null")]),
        (b"#" * 1000000 + b"\nipc: 2\n", [("ipc", "2")]), (b"device: [0, 1]\n", [("device", "[0, 1]")]),
        (b"{\"ipc\": 2, \"ema\": true, \"batch_syn\": null}", [("ipc", "2"), ("ema", "true"), ("batch_syn", "null")])]
    pieces = dict(pairs)
    written = plain_yamls(list(pieces.items()), sandbox)
    return st.one_of(
        st.sampled_from(refused).map(lambda content: Yaml(content, None)),
        st.sampled_from(kept).map(lambda each: Yaml(*each)),
        st.binary(max_size=60).map(lambda content: Yaml(content, None)),
        st.text(max_size=60).map(lambda text: Yaml(text.encode(), None)),
        st.tuples(written, st.text(min_size=1, max_size=10)).map(
            lambda each: Yaml(each[0].content + f"{json.dumps(each[1])}: 1\n".encode(), None)),
        written)


# --- all together -----------------------------------------------------------------------------------------------


def refuse_connections() -> None:
    """No input may reach the network: what would be downloaded is not there."""
    def refuse(*_: typing.Any, **__: typing.Any) -> typing.NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "the fuzz test has no network")
    socket.getaddrinfo = refuse


def fuzz(inputs: int, seed: int, sandbox: Sandbox) -> dict[str, typing.Any]:
    """Runs so many inputs; returns counts by entry and exit code, and every failure."""
    counts: dict[str, collections.Counter] = {script: collections.Counter() for script in ENTRIES}
    failures, timeouts, plain, slowest = [], [], 0, 0.0

    def one(case: Case) -> None:
        nonlocal plain, slowest
        outcome = sandbox.run(case)
        counts[case.script][str(outcome.code)] += 1
        plain, slowest = plain + case.plain, max(slowest, outcome.seconds)
        command = case.command(sandbox)
        if (done := sum(map(sum, (each.values() for each in counts.values())))) % 100 == 0:
            print(f"{done} inputs, {len(failures)} failures", file=sys.stderr, flush=True)
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
    return {"inputs": sum(map(sum, (each.values() for each in counts.values()))), "seed": seed,
            "of_nothing_odd": plain,
            "exit_codes": {script: dict(sorted(count.items())) for script, count in counts.items()},
            "timeouts": timeouts, "failures": failures, "slowest_seconds": round(slowest, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--json", metavar="FILE", help="write the counts and every failure to this file")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # of whatever odd text a failing command line holds
    torch.set_num_threads(1)
    refuse_connections()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        sandbox = Sandbox(Path(folder).resolve())
        os.environ |= {"DATM_CACHE": str(sandbox.root / "cache"), "HOME": str(sandbox.work / "home"), "COLUMNS": "100",
                       "WANDB_API_KEY": "", "WANDB_MODE": "", "NETRC": os.devnull, "CUDA_VISIBLE_DEVICES": ""}
        sandbox.build()
        gc.collect()
        gc.freeze()  # so that the children's collections do not copy the parent's pages
        began = perf_counter()
        report = fuzz(args.inputs, args.seed, sandbox)
        sandbox.renew()  # nothing unreadable is left to delete
        (sandbox.work / "unreadable").chmod(0o700)
    report |= {"seconds": round(perf_counter() - began), "environment": environment(torch.device("cpu"))}
    gc.unfreeze()
    print(f"{report['inputs']} inputs, seed {args.seed}, {report['of_nothing_odd']} of nothing odd, in "
          f"{report['seconds']} s (the slowest {report['slowest_seconds']} s)")
    for script, codes in report["exit_codes"].items():
        print(f"  {script}: {', '.join(f'{count} × {code}' for code, count in codes.items())}")
    for command in report["timeouts"]:
        print(f"timeout: {command}")
    print(f"{len(report['failures'])} failures")
    if args.json:
        write_json(args.json, report)
    if report["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    entry(main)
