"""A program to which the system refuses something ends with one line and exit code 2."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import handlers_as_before

from distill.evaluate.saved_set import evaluate_files
from scripts import export, inspect_buffer, report, summary
from scripts.common import ScriptParser
from utils import files
from utils.config import EvaluationConfig
from utils.files import REPOSITORY
from utils.program import interrupt
from utils.program.command_line import parse
from utils.program.entry import entry


@pytest.fixture(autouse=True)
def signals_as_before():
    """Restores signal handlers: a program ignores signals at its end, and later child processes would inherit that."""
    with handlers_as_before():
        yield


def test_what_the_parent_ignores_stays_ignored():
    """As under nohup; a rank restores its handlers while it joins the others."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt.restore()
    interrupt.install()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)


def evaluation():
    evaluate_files(parse(EvaluationConfig, evaluation.__doc__), ["dataset"])


PROGRAMS = {"evaluation of tensors": (evaluation, "--data_dir={}/x.pt"), "report": (report.main, "{}/x"),
            "evaluation of a set": (evaluation, "--data_dir={}/x.safetensors"), "summary": (summary.main, "{}/x"),
            "measurement": (lambda: ScriptParser("", json="it").parse_args(), "--json={}/x"),
            "look": (inspect_buffer.main, "{}/x"), "cards": (export.main, "{}/x --card"),
            "whitening": (files.cache_folder, "")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_folder_that_may_not_be_entered_is_one_line(ordinary_user, tmp_path, monkeypatch, capsys, program):
    main, arguments = PROGRAMS[program]
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    monkeypatch.setenv("DATM_CACHE", str(closed / "cache"))
    monkeypatch.setattr(sys, "argv", [program, *arguments.format(closed).split()])
    with ordinary_user(), pytest.raises(SystemExit) as ended:
        entry(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and str(closed) in said and "Permission denied; " in said


@pytest.mark.parametrize("part", [False, True])
def test_of_a_program_and_its_part_one_says_how_to_resume(monkeypatch, capfd, part):
    """As when scripts/sweep.py and the run it started are stopped together."""
    monkeypatch.setattr(sys, "argv", ["it.py", "--resume=never", "--ipc=1"])
    if part:
        monkeypatch.setenv(interrupt.PART_OF, "sweep.py")

    def main():
        interrupt.saves("its epochs")
        with interrupt.deferred():
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        entry(main)
    said = capfd.readouterr().err
    assert "it.py: stopped by SIGINT; every file is whole" in said and part != ("saving; send it again" in said)
    assert part != said.endswith(". The same command resumes from its epochs: python it.py --ipc=1\n")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, capsys):
    for name in ("DATM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user unknown to the system
    with pytest.raises(SystemExit):
        entry(files.cache_folder)
    assert "this user has no home; let DATM_CACHE name a folder" in capsys.readouterr().err


def test_what_is_no_matter_of_a_path_stays_a_traceback():
    with pytest.raises(ConnectionResetError):
        entry(lambda: exec("raise ConnectionResetError(104, 'a mistake of ours')"))


def test_a_current_folder_that_was_removed_is_refused(tmp_path, environment):
    program = ["python", str(REPOSITORY / "distill/DATM.py"), "--help"]
    code = f"import os; os.rmdir(os.getcwd()); os.execv({sys.executable!r}, {program})"
    (tmp_path / "gone").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "gone", env=os.environ | environment, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("DATM.py: error: the current folder: No such file")


ENTRIES = sorted(path for top in ("buffer", "distill", "scripts") for path in (REPOSITORY / top).rglob("*.py")
                 if "entry(main)" in path.read_text())
SCRIPTS = [path for path in ENTRIES if path.is_relative_to(REPOSITORY / "scripts")]


def test_ctrl_c_while_a_program_imports_is_no_traceback(tmp_path):
    (tmp_path / "yaml.py").write_text("raise KeyboardInterrupt")
    for program in ENTRIES:
        stopped = subprocess.run([sys.executable, program], env=os.environ | {"PYTHONPATH": str(tmp_path)},
                                 capture_output=True, text=True)
        assert (stopped.returncode, stopped.stderr) == (130, ""), (program, stopped.stderr)


def test_a_wrong_option_of_any_script_is_one_line(call):
    assert len(SCRIPTS) >= 13
    for script in SCRIPTS:
        for given in (["--no_such"], ["x", "--json"], ["x", "y", "--json="]):
            refusal = call(script, *given, expect=2).stderr
            assert refusal.startswith(f"{script.name}: error: ") and refusal.count("\n") == 1, refusal
