"""Full disks, damaged files, signals: no result is lost. scripts/trials/faults.py injects more faults for real."""

import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from helpers import TOY_EXPERTS, full_disk

from distill.distilled_set import DistilledSet
from utils.errors import UserError
from utils.files import REPOSITORY, append_json


def test_a_full_disk_is_refused_for_a_whole_set_too(toy_data, tmp_path):
    """safetensors has its own exception for it."""
    whole = DistilledSet(torch.randn(3, 3, 8, 8), torch.randn(3, 3), torch.tensor(0.01))
    path = tmp_path / "distilled.safetensors"
    whole.save_whole(path, toy_data, {"seed": 0})
    before = path.read_bytes()
    with full_disk(3_000), pytest.raises(UserError, match=r"cannot write .*distilled\.safetensors: .*; free space"):
        whole.save_whole(path, toy_data, {"seed": 1})
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == [path.name]


def test_once_it_stops_a_further_signal_does_not_disturb_the_exit():
    """Otherwise a traceback would follow the line that says how to resume."""
    code = ("import atexit, os, signal, sys, time\nfrom utils.program.entry import entry\n"
            "atexit.register(lambda: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.01)])\n"
            "def main():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\n"
            "entry(main)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_experts_can_be_moved_and_put_together(call, toy, toy_experts, tmp_path):
    """Experts trained elsewhere can be added to a folder; the data may have moved, too, as long as it is the same."""
    data, here, there = tmp_path / "data", tmp_path / "here", tmp_path / "there"
    shutil.copytree(toy.data, data)
    shutil.copytree(toy_experts, here)
    one = [*toy.train, "--num_experts=1", f"--data_path={data}"]
    call("buffer/buffer_FTD.py", *one, f"--buffer_path={there}", "--seed=1")
    folder, other = (each / TOY_EXPERTS for each in (here, there))
    for suffix in (".pt", ".yaml", ".jsonl"):
        (other / f"replay_buffer_0{suffix}").rename(folder / f"replay_buffer_2{suffix}")
    call("distill/DATM.py", *toy.distil, f"--buffer_path={here}", f"--log_path={tmp_path}", "--Iteration=0")
    with mock.patch("buffer.experts.gsam_gradient", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        call("buffer/buffer_FTD.py", *one, f"--buffer_path={here}")
    here.rename(tmp_path / "moved")
    call("buffer/buffer_FTD.py", *toy.train, "--num_experts=1", f"--buffer_path={tmp_path / 'moved'}")
    assert not list(tmp_path.rglob("unfinished"))


def test_a_line_that_cannot_be_written_whole_is_not_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_json(path, {"iteration": 0})
    before = path.read_bytes()
    with full_disk(len(before) + 10):
        for _ in range(2):  # part of it fits, both times
            with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: .*; free space"):
                append_json(path, {"note": "a line that is longer"})
    assert path.read_bytes() == before


def test_a_damaged_epoch_of_an_unfinished_expert_names_the_way_out(call, toy, toy_experts, tmp_path):
    arguments = [*toy.train, f"--buffer_path={tmp_path}"]
    folder = tmp_path / TOY_EXPERTS
    stopped = mock.patch("buffer.trajectories.write_experts", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt):
        call("buffer/buffer_FTD.py", *arguments)
    epoch = folder / "unfinished" / "expert_1" / "epoch_2.pt"
    epoch.write_bytes(epoch.read_bytes()[:2000])
    said = call("buffer/buffer_FTD.py", *arguments, expect=2).stderr
    assert "epoch_2.pt cannot be read" in said and "delete it, and training resumes from the epoch before" in said
    epoch.unlink()
    call("buffer/buffer_FTD.py", *arguments)
    name = "replay_buffer_0.pt"
    assert (folder / name).read_bytes() == (toy_experts / TOY_EXPERTS / name).read_bytes()
