"""utils/steps.py: commands that make files from each other's files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.files import locked
from utils.steps import Ledger, Step, run

WORKER = """
import pathlib, signal, sys, time
how, result, *needs = sys.argv[1:]
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
text = "".join(pathlib.Path(need).read_text() for need in needs)
if how == "fails":
    sys.exit("worker.py: error: cannot\\n===")
if how.startswith("waits"):
    pathlib.Path(result + ".begun").touch()
    while len(stops) < int(how[-1]):
        time.sleep(0.02)
    sys.exit(f"stopped by {len(stops)}")
pathlib.Path(result).write_text(f"{how}({text})")
"""
DRIVER = """
import os, pathlib, sys
from tests.test_steps import worker
from utils.files import locked
from utils.program.entry import entry
from utils.steps import Ledger, run
folder = pathlib.Path(sys.argv[1])
def main():
    with locked(folder, "end it") as lock:
        steps = [worker(folder, "slow", sys.argv[2])]
        run(steps, 1, folder / "output", Ledger(folder / "made.json"), os.environ, lock)
entry(main)
"""


def worker(folder, name, how, needs=()):
    """A step that writes `how` around what it needs; or `fails`, or `waitsN` for so many signals."""
    result = folder / f"{name}.txt"
    return Step(name, "worker", (sys.executable, str(folder / "worker.py"), how, str(result),
                                 *(str(need.result) for need in needs)), result, needs=tuple(needs))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def run_all(folder, *steps, jobs=2):
    with locked(folder, "end it") as lock:
        run(steps, jobs, folder / "output", Ledger(folder / "made.json"), os.environ, lock)


def test_each_step_is_run_once_after_those_it_needs(folder, capsys):
    first, other = worker(folder, "first", "a"), worker(folder, "other", "b")
    last = worker(folder, "last", "c", (first, other))
    run_all(folder, last, other, first)
    assert last.result.read_text() == "c(a()b())"
    assert "3 of 3 commands" in capsys.readouterr().out
    made = [step.result.stat().st_mtime_ns for step in (first, other, last)]
    run_all(folder, last, other, first)
    assert [step.result.stat().st_mtime_ns for step in (first, other, last)] == made
    assert "commands" not in capsys.readouterr().out


def test_what_was_made_of_something_else_is_refused(folder):
    """Also where the first is made again as its own refusal advises: what was made of it is old."""
    first = worker(folder, "first", "a")
    last = worker(folder, "last", "c", (first,))
    run_all(folder, first, last)
    changed = worker(folder, "first", "b")
    later = worker(folder, "last", "c", (changed,))
    with pytest.raises(UserError, match="by another command, and 1 more were made otherwise; delete .*first.txt "
                                        ".*last.txt to make that again"):
        run_all(folder, changed, later)
    first.result.unlink()
    with pytest.raises(UserError, match="last.txt was made of first, which is gone; delete"):
        run_all(folder, changed, later)
    last.result.unlink()
    run_all(folder, changed, later)
    assert last.result.read_text() == "c(b())"
    first.result.write_text("edited")
    with pytest.raises(UserError, match="of another first"):
        run_all(folder, changed, later)


def test_a_failure_says_why_and_stops_the_others(folder):
    waiting, failing = worker(folder, "waiting", "waits1"), worker(folder, "failing", "fails")
    with pytest.raises(UserError, match=r"fails .*exit code 1: worker.py: error: cannot \(all of it in .*failing.txt"):
        run_all(folder, waiting, failing)
    assert "stopped by 1" in (folder / "output" / "waiting.txt").read_text()
    # What an earlier attempt said is not taken for the reason of this one.
    (folder / "worker.py").write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="exit code 3: it said nothing"):
        run_all(folder, failing)
    (folder / "worker.py").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="was killed by SIGKILL, perhaps for lack of memory"):
        run_all(folder, failing)


def test_what_has_lost_a_file_is_refused(folder):
    first = worker(folder, "first", "a")
    whole = replace(first, products=(folder / "worker.py",), folder=folder / "all of it")
    last = worker(folder, "last", "c", (whole,))
    run_all(folder, whole, last)
    lost = replace(whole, products=(folder / "worker.py", folder / "lost"))
    with pytest.raises(UserError, match="first.txt was made and has lost a file since; delete '.*/all of it' to"):
        run_all(folder, lost)
    with pytest.raises(UserError, match="of first, which is gone"):
        run_all(folder, replace(last, needs=(lost,)))


def test_seconds_are_those_of_the_result_that_is_there(folder):
    step, ledger = worker(folder, "first", "a"), Ledger(folder / "made.json")
    ledger.begin(step)
    ledger.add(step, 5.0)  # and then it was stopped
    ledger = Ledger(folder / "made.json")
    ledger.begin(step)
    ledger.add(step, 2.0, done=True)
    assert Ledger(folder / "made.json").made["first"]["seconds"] == 7.0
    ledger.begin(step)  # its result was deleted
    assert ledger.made["first"]["seconds"] == 0.0
    ledger.add(step, 1.0)
    ledger.begin(worker(folder, "first", "b"))
    assert ledger.made["first"]["seconds"] == 0.0


def test_results_of_unknown_origin_and_a_damaged_ledger_are_refused(folder):
    step = worker(folder, "first", "a")
    step.result.write_text("mine")
    with pytest.raises(UserError, match="nobody knows"):
        run_all(folder, step)
    for text in ("{", "[]", '{"first": 1}', '{"first": {"asked": "", "of": [], "seconds": 0}}'):
        (folder / "made.json").write_text(text)
        with pytest.raises(UserError, match="made.json, .*, is damaged; restore it, or move .* away"):
            run_all(folder, step)
    assert step.result.read_text() == "mine"


def started(folder, how):
    """A driver, once its worker is at work."""
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder), how], cwd=root, text=True,
                               env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    begun = folder / "slow.txt.begun"
    while not begun.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    begun.unlink()
    return process


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("together", [False, True])
def test_each_signal_is_handed_on_and_the_end_awaited(folder, times, together):
    asked = 1 if together else times  # two that come together may be one to the command
    process = started(folder, f"waits{asked}")
    if together:
        process.send_signal(signal.SIGSTOP)
    for number in (signal.SIGTERM, signal.SIGHUP)[:times]:
        process.send_signal(number)
        time.sleep(0 if together else 0.5)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (143, 129) and "Traceback" not in out + err
    assert (folder / "output" / "slow.txt").read_text() in (f"stopped by {asked}\n", f"stopped by {times}\n")
    assert json.loads((folder / "made.json").read_text())["slow"]["seconds"] > 0


def test_what_outlives_a_killed_script_keeps_the_next_one_out(folder):
    process = started(folder, "waits1")
    process.kill()
    process.communicate()
    with pytest.raises(UserError, match="end it") as refused:
        run_all(folder, worker(folder, "slow", "waits1"))
    left = re.search(rf"process {process.pid} on .*, which started (\d+)\)", str(refused.value))
    os.kill(int(left[1]), signal.SIGTERM)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with locked(folder, "end it"):
                return
        except UserError:
            time.sleep(0.1)
    raise AssertionError("the lock was not let go")
