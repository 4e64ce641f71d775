"""The number of threads of a run: given, measured, or that of the unfinished run it resumes."""

import json
import re
from unittest import mock

import pytest
import torch
import yaml
from helpers import stop_at

from utils.errors import number_of
from utils.networks import build_network
from utils.program import threads

EXPERTS, DATM, BASELINE = "buffer/buffer_FTD.py", "distill/DATM.py", "distill/baseline.py"


@pytest.fixture
def measured(environment, monkeypatch):
    """Makes all work worth measuring, without OMP_NUM_THREADS; `measured(one, both)` sets the measured seconds."""
    monkeypatch.setattr(threads, "WORTH_MEASURING", 0.0)
    with mock.patch.dict(environment, OMP_NUM_THREADS=""):
        yield lambda one, both: monkeypatch.setattr(threads, "seconds_of_a_step", lambda *_: (one, both))


def test_one_thread_is_taken_where_two_are_no_faster(call, toy, environment, measured, monkeypatch, tmp_path):
    monkeypatch.setattr("os.cpu_count", lambda: 2)

    def device_of(*options):
        done = call(BASELINE, *toy.evaluate, "--ipc=2", f"--json={tmp_path / 'x.json'}", *options)
        assert ("note: --threads 3: there are 2 cores here" in done.stderr) == ("--threads=3" in options)
        return json.loads((tmp_path / "x.json").read_text())["environment"]["device"], done.stdout

    for one, both, chosen in ((1.0, 1.0, 1), (1.0, 0.5, 2)):
        measured(one, both)
        device, said = device_of()
        assert device == f"cpu ({number_of(chosen, 'thread')})"
        assert f"threads: {chosen} of 2; all are {one / both:g} times as fast as one" in said
    # A given number is used; work too short to be worth it is not measured.
    measured(1.0, 0.5)
    for options, variable, worth, chosen in ((["--threads=3"], "", 0, 3), (["--threads=1"], "2", 0, 1),
                                             ([], "1", 0, 1), (["--threads=auto"], "1", 0, 1), ([], "", 1e9, 2)):
        monkeypatch.setattr(threads, "WORTH_MEASURING", worth)
        with mock.patch.dict(environment, OMP_NUM_THREADS=variable):
            device, said = device_of(*options)
        assert device == f"cpu ({number_of(chosen, 'thread')})" and "threads: " not in said


def test_measuring_leaves_the_network_alone(monkeypatch):
    """Batch norm's running statistics must not change."""
    monkeypatch.setattr(threads, "BLOCK", 0.001)
    network = build_network("ConvNetD1W4BN", 1, 3, (8, 8))
    before = {name: each.clone() for name, each in network.state_dict().items()}
    assert min(threads.seconds_of_a_step(network, 7, 2)) > 0
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())


def test_an_unfinished_run_goes_on_with_the_threads_that_it_had(call, toy, toy_experts, measured, tmp_path):
    """Even if another number would be chosen now, as it would round sums differently."""
    for function, *command in (
            ("buffer.experts.gsam_gradient", EXPERTS, *toy.train, f"--buffer_path={tmp_path}"),
            ("distill.distillation.match_trajectory", DATM, *toy.distil, f"--buffer_path={toy_experts}",
             f"--log_path={tmp_path}"),
            ("distill.evaluate.networks.train_network", BASELINE, *toy.evaluate, "--num_eval=2", "--ipc=2",
             f"--json={tmp_path / 'x.json'}")):
        measured(1.0, 1.0)
        with stop_at(function, 2):
            assert "threads: 1 of 2" in call(*command, expect=130).stdout
        measured(1.0, 0.5)
        if command[0] == DATM:  # the estimate is for the run that would be resumed
            assert "threads: " not in call(*command, "--dry_run").stdout
        done = call(*command)
        assert "on cpu (1 thread)" in done.stdout and "threads: " not in done.stdout and "resuming" in done.stdout
        assert "may be rounded differently" not in done.stderr


def test_a_result_says_all_that_a_run_was_on(call, toy, toy_experts, tmp_path):
    command = [DATM, *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--run_name=run"]
    for number in (2, 1):
        with stop_at("distill.distillation.match_trajectory", 2):
            call(*command, f"--threads={number}", expect=130)
    call(*command, "--threads=1")
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["environment"]["device"] == (
        "cpu (2 threads), then cpu (1 thread)")


def test_experts_that_resume_with_other_threads_are_said_to_and_name_them(call, toy, tmp_path):
    command = [EXPERTS, *toy.train, "--num_experts=1", f"--buffer_path={tmp_path}"]
    with stop_at("buffer.experts.gsam_gradient", 2):
        call(*command, "--threads=2", expect=130)
    said = call(*command, "--threads=1").stderr
    assert re.search(r"note: it was last on cpu \(2 threads\), torch .*, and is on cpu \(1 thread\), torch .* now; "
                     "what follows may be rounded differently", said)
    (manifest,) = tmp_path.rglob("replay_buffer_0.yaml")
    assert yaml.safe_load(manifest.read_text())["threads"] == 1
    assert "may be rounded" not in call(*command, "--threads=2").stderr  # new experts
