"""wandb: logs the published keys where it is available, and stays out of the way where it is not."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import TOY_RUN

from distill.report.wandb_log import Tracker
from distill.result_files import Iteration, Score
from utils.files import REPOSITORY

STEP = Iteration(3, 0.5, False, 0.1, 7, 9, False, 0)


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """A fake wandb that records what is logged."""
    run = FakeRun()
    module = SimpleNamespace(init=lambda **options: setattr(run, "options", options) or run,
                             setup=lambda settings: SimpleNamespace(settings=SimpleNamespace(
                                 mode=os.environ.get("WANDB_MODE") or "online")),
                             Settings=lambda **settings: settings, Histogram=lambda values: ("histogram", values),
                             Image=lambda picture: ("image", picture))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run


def test_no_account_is_one_line_and_wandb_is_not_even_imported(no_account, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    tracker = Tracker("auto", "P", "run", {}, tmp_path)
    tracker.log_step(STEP)
    tracker.finish()
    assert capsys.readouterr().err == ("note: no wandb account here; metrics go to metrics.jsonl (`wandb login`, or "
                                       "--wandb offline)\n")


def test_a_wandb_that_fails_is_one_line(capsys, tmp_path, fake):
    def refuse(**options):
        raise RuntimeError("no\nnetwork")
    sys.modules["wandb"].init = refuse
    Tracker("online", "P", "run", {}, tmp_path).log_step(STEP)
    assert capsys.readouterr().err == "note: wandb is off (no network); metrics go to metrics.jsonl\n"


def test_a_wandb_that_fails_later_is_one_line_and_then_silent(capsys, tmp_path, fake):
    tracker = Tracker("offline", "P", "run", {}, tmp_path)
    fake.log = lambda values, step: 1 / 0
    tracker.log_step(STEP)
    tracker.log_step(STEP)
    assert capsys.readouterr().err.count("wandb is off") == 1


@pytest.mark.parametrize("ipc, force, pictures", [(10, False, True), (50, False, False), (50, True, True)])
def test_the_published_keys(fake, toy_data, tmp_path, ipc, force, pictures):
    tracker = Tracker("offline", "P", "run", {"ipc": ipc}, tmp_path)
    assert fake.options["mode"] == "offline" and fake.options["project"] == "P"
    tracker.log_scores(2, [Score("ConvNet", [0.6, 1.0])])
    fake.logged.clear()
    tracker.log_scores(3, [Score("ConvNet", [0.5, 0.7]), Score("MLP", [0.4])])
    tracker.log_step(STEP)
    images = toy_data.train_images[:20].clone()
    images[:, 0, 0, 0] = 50.0  # an outlier that clipping removes
    tracker.log_set(3, images, 0.02, toy_data, ipc, force)
    tracker.finish()
    values = {}
    for step, logged in fake.logged:
        assert step == 3
        values |= logged
    assert values["Progress"] == 3 and values["Grand_Loss"] == 0.5 and values["Start_Epoch"] == values["falts"] == 7
    assert values["Accuracy/ConvNet"] == pytest.approx(0.6) and values["Max_Accuracy/ConvNet"] == 0.8
    assert values["Std/ConvNet"] == pytest.approx(0.1) and values["Max_Std/ConvNet"] == pytest.approx(0.2)
    assert values["Accuracy/MLP"] == 0.4 and not {"Std/MLP", "Max_Std/MLP"} & values.keys()  # of a single network
    assert values["Synthetic_LR"] == 0.02 and values["Pixels"][0] == "histogram"
    kinds = {f"{kind}_{what}" for kind in ("Synthetic", "Reconstructed") for what in ("Images", "Pixels")}
    kinds |= {"Clipped_Synthetic_Images/std_2.5", "Clipped_Reconstructed_Images/std_2.5"}
    assert (kinds <= values.keys()) == pictures and (kinds & values.keys() == set()) != pictures
    if pictures:
        assert values["Synthetic_Images"][1].shape == (2 * 34 + 2, 10 * 34 + 2, 3) and fake.finished
        assert not (values["Clipped_Synthetic_Images/std_2.5"][1] == values["Synthetic_Images"][1]).all()
        assert values["Synthetic_Images"][1].dtype == torch.zeros(1, dtype=torch.uint8).numpy().dtype


def test_an_updated_step_has_no_falts(fake, tmp_path):
    tracker = Tracker("offline", "P", "run", {}, tmp_path)
    tracker.log_step(replace(STEP, updated=True))
    assert "falts" not in fake.logged[0][1]


def test_pictures_that_cannot_be_made_do_not_stop_a_run(fake, toy_data, tmp_path, capsys):
    def full(picture):
        raise OSError("no space")
    sys.modules["wandb"].Image = full
    tracker = Tracker("offline", "P", "run", {}, tmp_path)
    tracker.log_set(3, toy_data.train_images[:20], 0.02, toy_data, 1, False)
    tracker.finish()
    assert capsys.readouterr().err == "note: wandb is off (no space); metrics go to metrics.jsonl\n"
    assert not fake.finished


def test_wandbs_own_settings_decide_unless_it_is_told_to_go_online(tmp_path):
    """With the real package and an account; `wandb offline` and `wandb disabled` write the mode to a file."""
    code = ("import os, sys, wandb\nfrom pathlib import Path\nfrom distill.report.wandb_log import Tracker\n"
            "wandb.init = lambda **options: print(options['mode'])\n"
            "for name, value, asked in (('MODE', 'dryrun', 'auto'), ('DISABLED', 'true', 'auto'),\n"
            "                           ('DISABLED', 'false', 'auto'), ('file', 'offline', 'auto'),\n"
            "                           ('file', 'disabled', 'auto'), ('file', 'disabled', 'online')):\n"
            "    os.environ.pop('WANDB_MODE', None)\n    os.environ.pop('WANDB_DISABLED', None)\n"
            "    if name == 'file':\n        os.makedirs('wandb', exist_ok=True)\n"
            "        Path('wandb/settings').write_text(f'[default]\\nmode = {value}\\n')\n"
            "    else:\n        os.environ[f'WANDB_{name}'] = value\n"
            "    print(name, value, asked, end=': ')\n"
            "    Tracker(asked, 'P', 'run', {}, Path('.'))\n    print()\n    wandb.teardown()\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env=environment | {"PYTHONPATH": str(REPOSITORY), "WANDB_API_KEY": "0" * 40,
                                             "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:1"})
    assert [line for line in done.stdout.splitlines() if line] == [
        "MODE dryrun auto: offline", "DISABLED true auto: ", "DISABLED false auto: online",
        "file offline auto: offline", "file disabled auto: ", "file disabled online: online"], done.stderr


def test_no_account_is_never_asked_for(tmp_path):
    """Not even on a terminal, where wandb would ask."""
    code = ("import sys\nfrom pathlib import Path\nfrom distill.report.wandb_log import Tracker\n"
            "Tracker('online', 'P', 'run', {}, Path('.'))\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    child, terminal = pty.fork()
    if not child:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, "-c", code], environment | {
            "PYTHONPATH": str(REPOSITORY), "NETRC": os.devnull, "HOME": str(tmp_path), "TERM": "xterm",
            "WANDB_BASE_URL": "http://127.0.0.1:1"})
    said = b""
    with contextlib.suppress(OSError):  # the terminal was closed
        while b"choice" not in said and (part := os.read(terminal, 4096)):
            said += part
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert b"wandb is off (No API key configured" in said, said


def test_a_distillation_logs_every_step_and_evaluation(fake, call, toy, toy_experts, tmp_path):
    call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--wandb=offline",
         "--project=mine")
    keys = [(step, key) for step, values in fake.logged for key in values]
    assert [step for step, key in keys if key == "Grand_Loss"] == [0, 1, 2, 3]
    for key in ("Accuracy/ConvNetD1W4", "Synthetic_Images", "Reconstructed_Images", "Synthetic_LR"):
        assert [step for step, each in keys if each == key] == [0, 2, 4]
    assert fake.options["project"] == "mine" and fake.finished


def test_real_wandb_offline_beside_the_jsonl(run, toy, toy_experts, tmp_path):
    """The real package, without an account: files for `wandb sync`, no question, no crash."""
    run("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", "--run_name=run", f"--log_path={tmp_path}",
        "--wandb=offline")
    folder = tmp_path / TOY_RUN
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "loss" in line] == [0, 1, 2, 3]
