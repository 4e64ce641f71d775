"""Output that cannot be written never ends a run, and text from files never controls the terminal."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from utils.files import REPOSITORY
from utils.program.streams import Stream

MOST_SECONDS = 60  # for a program to start, or to end


def started(environment, command, **streams):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=REPOSITORY,
                            env=os.environ | environment | {"PYTHONIOENCODING": "ascii"}, **streams)


def test_what_a_terminal_obeys_is_shown_and_a_bar_is_drawn_over_itself():
    held = io.StringIO()
    stream = Stream(held)
    stream.write("\rfit \x1b[2J\x07\r\t·\u202e\udcff\n")
    assert held.getvalue() == "\rfit \\x1b[2J\\x07\\r\t·\\u202e\\udcff\n"
    held.close()
    stream.write("nobody listens")
    stream.flush()


def test_a_result_of_others_does_not_command_the_terminal(call, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(
        {"what": "\x1b]0;title\x07\x1b[31m", "images": 1, "scores": [{"network": "N\x1b[8m", "accuracies": [0.5]}]}))
    out = call("scripts/summary.py", tmp_path / "r.json").stdout
    (tmp_path / "result.json").write_text("{}")
    assert call("scripts/summary.py", tmp_path).stdout == out  # a folder stands for the results in it
    assert "\\x1b]0;title\\x07\\x1b[31m" in out and not set(out) & {"\x1b", "\x07"}


@pytest.mark.parametrize("closed", [True, False])
def test_a_run_ends_as_ever_when_nobody_listens(environment, toy, tmp_path, closed):
    """Output to closed streams, or to a pipe without a reader and a full disk, in an encoding without α and ·."""
    command = ["distill/baseline.py", *toy.evaluate, f"--json={tmp_path / 'r.json'}"]
    if closed:
        process = started(environment, ["-c", f"import os; os.close(1); os.close(2); "
                                        f"os.execv({sys.executable!r}, {[sys.executable, *command]!r})"])
    else:
        reader, pipe = os.pipe()
        os.close(reader)
        with open("/dev/full", "w") as full:
            process = started(environment, command, stdout=pipe, stderr=full)
        os.close(pipe)
    assert process.wait(MOST_SECONDS) == 0 and json.loads((tmp_path / "r.json").read_text())["scores"]


def test_help_needs_no_encoding(environment):
    process = started(environment, ["distill/baseline.py", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"") and b"[--key value ?]" in out


def test_a_terminal_that_goes_away_stops_a_run_with_everything_saved(environment, toy, toy_experts, tmp_path):
    ours, theirs = pty.openpty()  # it reports 0 columns, like terminals in containers
    process = started(environment, [
        "distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--wandb=disabled",
        "--Iteration=100000", "--eval_it=100000"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    hung = threading.Timer(MOST_SECONDS, process.kill)
    hung.start()
    said = b""
    while b" loss " not in said:
        said += os.read(ours, 1 << 16)
    hung.cancel()
    os.close(ours)
    process.send_signal(signal.SIGHUP)  # sent by the system if the session has this terminal
    assert process.wait(MOST_SECONDS) == 128 + signal.SIGHUP and list(tmp_path.rglob("checkpoint.pt")), said
