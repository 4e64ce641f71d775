"""scripts/reproduce_steps.py: runs commands that depend on each other's files."""

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
from helpers import wait_for

from scripts.reproduce_steps import Ledger, Step, run_steps
from utils.errors import UserError
from utils.program.locks import locked

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
from tests.test_reproduce_steps import worker
from utils.program.locks import locked
from utils.program.entry import entry
from scripts.reproduce_steps import Ledger, run_steps
folder = pathlib.Path(sys.argv[1])
def main():
    with locked(folder, "end it") as lock:
        steps = [worker(folder, "slow", sys.argv[2])]
        run_steps(steps, 1, folder / "output", Ledger(folder / "made.json"), os.environ, lock)
entry(main)
"""


def worker(folder, name, how, needs=()):
    """A step that writes `how(…)` around the contents of its needs; or it `fails`, or `waitsN` for N signals."""
    result = folder / f"{name}.txt"
    return Step(name, "worker", (sys.executable, str(folder / "worker.py"), how, str(result),
                                 *(str(need.result) for need in needs)), result, needs=tuple(needs))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def run_all(folder, *steps, jobs=2):
    with locked(folder, "end it") as lock:
        run_steps(steps, jobs, folder / "output", Ledger(folder / "made.json"), os.environ, lock)


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


def test_no_more_commands_run_at_once_than_asked_for_and_some_alone(folder):
    (folder / "worker.py").write_text(
        "import os, sys, time; log = open(os.path.dirname(sys.argv[2]) + '/log', 'a', buffering=1); "
        "log.write('begin\\n'); time.sleep(0.5); log.write('end\\n'); open(sys.argv[2], 'w').write(sys.argv[1])")

    def most_at_once(*steps, jobs):
        (folder / "log").unlink(missing_ok=True)
        run_all(folder, *steps, jobs=jobs)
        lines, running, most = (folder / "log").read_text().split(), 0, 0
        for line in lines:
            running += 1 if line == "begin" else -1
            most = max(most, running)
        return most

    steps = [worker(folder, name, name) for name in "abcd"]
    assert most_at_once(*steps, jobs=2) == 2
    for at, jobs in ((0, 2), (1, 2)):
        steps = [replace(worker(folder, f"{name}{at}", name), alone=number == at) for number, name in enumerate("ab")]
        assert most_at_once(*steps, jobs=jobs) == 1


def test_what_another_command_made_is_made_again_and_what_was_made_of_it(folder):
    first = worker(folder, "first", "a")
    last = worker(folder, "last", "c", (first,))
    run_all(folder, first, last)
    changed = worker(folder, "first", "b")
    run_all(folder, changed, worker(folder, "last", "c", (changed,)))
    assert last.result.read_text() == "c(b())"
    first.result.write_text("old")
    run_all(folder, replace(changed, config={"ipc": 1}))  # other options in its YAML
    assert first.result.read_text() == "b()"


def test_what_was_made_of_results_that_were_made_again_later_is_made_again(folder):
    first = worker(folder, "first", "a")
    others = [worker(folder, name, name, (first,)) for name in ("asked", "other")]
    run_all(folder, first, *others)
    changed = worker(folder, "first", "b")
    others = [replace(step, needs=(changed,)) for step in others]
    run_all(folder, changed, others[0])  # as with --only
    run_all(folder, changed, *others)
    assert [step.result.read_text() for step in others] == ["asked(b())", "other(b())"]


def test_a_failure_says_why_and_only_what_needs_it_is_not_run(folder, capsys):
    failing, other = worker(folder, "failing", "fails"), worker(folder, "other", "b")
    needs = worker(folder, "needs", "c", (failing,))
    steps = failing, needs, worker(folder, "last", "d", (needs,)), other
    with pytest.raises(UserError, match=r"fails .*exit code 1: worker.py: error: cannot \(all of it in .*failing.txt"
                                        r"\); commands not run, as they need what failed: 2; the same command"):
        run_all(folder, *steps, jobs=1)
    assert other.result.read_text() == "b()" and "worker.py: error: cannot" in capsys.readouterr().err
    # What a failed command has left does not count as its result.
    failing.result.write_text("a part")
    with pytest.raises(UserError, match="exit code 1"):
        run_all(folder, *steps)
    with pytest.raises(UserError, match="exit code 1"):  # nor does what it would add to
        run_all(folder, replace(failing, resumes=folder / "unfinished"))
    assert not failing.result.exists()
    with pytest.raises(UserError, match="2 commands failed, the first: .*exit code 1"):
        run_all(folder, failing, worker(folder, "too", "fails"))
    # The output of an earlier attempt is not given as the reason for this failure.
    (folder / "worker.py").write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="exit code 3: it said nothing"):
        run_all(folder, failing)
    (folder / "worker.py").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="was killed by SIGKILL, perhaps for lack of memory"):
        run_all(folder, failing)


def test_files_of_which_some_are_gone_are_not_added_to(folder):
    step = replace(worker(folder, "first", "a"), products=(folder / "first.txt.begun",), resumes=folder / "unfinished")
    step.products[0].touch()
    made = Ledger(folder / "made.json")
    made.made[step.name] = {"asked": step.asked, "command": str(step), "config": None, "seconds": 0, "needs": {}}
    made.write()
    with pytest.raises(UserError, match="some files are gone from .*first.txt; restore them, or move it away"):
        run_all(folder, step)
    step.resumes.touch()
    run_all(folder, step)
    assert step.result.read_text() == "a()"


def test_options_that_decide_nothing_may_change(folder):
    step = replace(worker(folder, "first", "a"), config={"ipc": 1, "wandb": "auto", "forgotten": 1})
    run_all(folder, step)
    step.result.write_text("kept")
    run_all(folder, replace(step, config={"ipc": 1, "quiet": True}))
    assert step.result.read_text() == "kept"


def test_results_of_unknown_origin_and_a_damaged_ledger_are_refused(folder):
    step = worker(folder, "first", "a")
    step.result.write_text("mine")
    with pytest.raises(UserError, match="nobody knows which command"):
        run_all(folder, step)
    for text in ("{", "[]", '{"first": 1}', '{"first": {"asked": 1, "seconds": 0}}'):
        (folder / "made.json").write_text(text)
        with pytest.raises(UserError, match="made.json, .*, is damaged .*; restore it, or move .* away"):
            run_all(folder, step)
    assert step.result.read_text() == "mine"


def started(folder, how):
    """Starts a driver and returns its process once its worker is running."""
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder), how], cwd=root, text=True,
                               env=os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    begun = folder / "slow.txt.begun"
    wait_for(begun.exists, process)
    begun.unlink()
    return process


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("together", [False, True])
def test_each_signal_is_handed_on_and_the_end_awaited(folder, times, together):
    asked = 1 if together else times  # two at once may reach the command as one
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
