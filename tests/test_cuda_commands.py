"""The programs on a GPU or on the stand-in of `fakecuda/`: results as on the CPU, and bit-identical after a resume."""

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import TOY_RUN, stop_at, tensors_in

from distill import distillation
from utils.files import REPOSITORY

pytestmark = pytest.mark.cuda

GPU = "--device=cuda"
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


def close(found, expected, tolerance=1e-3):
    """Asserts that tensors by name are equal up to a relative error in norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.fixture
def distil(call, toy, toy_experts, tmp_path):
    """Run name, options → the run's folder and the finished process."""
    def distil(name, *options, run=call, expect=0):
        done = run("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}",
                   "--Iteration=2", f"--run_name={name}", *options, expect=expect)
        return tmp_path / TOY_RUN.with_name(name), done
    return distil


def final(folder, kind="Normal", iteration=2):
    return {name: torch.load(folder / kind / f"{name}_{iteration}.pt").float() for name in ("images", "labels", "lr")}


# --- experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--mom=0.5", "--micro_batch=5"], ["--model=ConvNetD1W4BN", "--dsa=False"]])
def test_experts_are_those_of_the_cpu_and_resume_to_the_bit(call, toy, tmp_path, options):
    def train(where, *more, expect=0):
        call("buffer/buffer_FTD.py", *toy.train, "--num_experts=1", "--train_epochs=2", *options, *more,
             f"--buffer_path={tmp_path / where}", expect=expect)
        return tmp_path / where
    here, there = train("cpu"), train("gpu", GPU)
    with stop_at("buffer.experts.gsam_gradient", 7):
        train("parts", GPU, expect=130)
    assert tensors_in(train("parts", GPU)) == tensors_in(there)
    (ours,), (theirs,) = (torch.load(next(folder.rglob("*.pt"))) for folder in (there, here))
    for one, other in zip(ours, theirs, strict=True):
        close(dict(enumerate(one)), dict(enumerate(other)))


# --- distillation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    [], ["--matching=tesla", "--micro_batch=2"], ["--matching=unroll"], ["--labels=hard", "--ema", "--lr_param=log"],
    ["--labels=target", "--batch_syn=4", "--factor=2"], ["--labels=soft", "--backend=plain", "--depth_ratio=0.3"]],
    ids=lambda options: " ".join(options) or "as it is")
def test_a_distillation_is_that_of_the_cpu(distil, options):
    there, done = distil("gpu", GPU, *options)
    here, _ = distil("cpu", *options)
    assert "on cuda:0 (" in done.stdout and not [line for line in done.stderr.splitlines() if "not replayed" in line]
    for kind in ("Normal", "EMA") if "--ema" in options else ("Normal",):
        close(final(there, kind), final(here, kind))
    assert (there / "report.html").exists()


def test_training_images_stay_on_the_host(distil, toy_data, monkeypatch):
    shapes = []

    def looking(*given):
        gc.collect()
        shapes.append({tuple(each.shape) for each in gc.get_objects() if type(each) is torch.Tensor and each.is_cuda})
        return match_trajectory(*given)
    match_trajectory = distillation.match_trajectory
    monkeypatch.setattr(distillation, "match_trajectory", looking)
    distil("gpu", GPU)
    dimension = toy_data.test_images[0].numel()
    assert len(shapes) == 2 and all(tuple(toy_data.test_images.shape) in each for each in shapes)
    assert not {tuple(toy_data.train_images.shape), (dimension, dimension)} & set().union(*shapes)


@pytest.mark.parametrize("function", ["distill.distillation.match_trajectory", "distill.run_state.evaluate"])
def test_a_distillation_resumes_to_the_bit(distil, function):
    stateful = [GPU, "--ema", "--lr_param=log", "--lr_lr=1e-3", "--factor=2"]
    whole, _ = distil("whole", *stateful)
    with stop_at(function, 2):
        distil("parts", *stateful, expect=130)
    parts, done = distil("parts", *stateful)
    assert "resuming at iteration" in done.stdout
    assert tensors_in(whole) == tensors_in(parts)


def test_a_distillation_that_is_killed_goes_on(distil, environment):
    """Killed with SIGKILL it cannot save, so it resumes from its last save, here the beginning."""
    whole, _ = distil("whole", GPU)
    kill = ("import os, runpy, signal, sys; from unittest import mock; import distill.distillation as d; m = d.match_t"
            "rajectory; c = []; d.match_trajectory = lambda *a: (c.append(1), len(c) == 2 and os.kill(os.getpid(), "
            "signal.SIGKILL), m(*a))[-1]; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")

    def killed(script, *arguments, expect):
        done = subprocess.run([sys.executable, "-c", kill, script, *map(str, arguments)], cwd=REPOSITORY, text=True,
                              env=os.environ | environment, capture_output=True)
        assert done.returncode == expect, done.stderr
        return done
    distil("parts", GPU, run=killed, expect=-9)
    parts, _ = distil("parts", GPU)
    assert tensors_in(whole) == tensors_in(parts)


def test_a_dry_run_says_what_a_gpu_holds(distil):
    _, done = distil("dry", GPU, "--dry_run")
    assert "on cuda:0 (" in done.stdout and "GB" in done.stdout + done.stderr


# --- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, options", [
    ("distill/baseline.py", ["--ipc=2", "--eval_mode=C", "--num_eval=2"]),
    ("distill/baseline.py", ["--ipc=2", "--pick=herding"]),
    ("distill/evaluation.py", ["--model=ConvNetD1W4BN"]),
    ("distill/evaluation.py", ["--robust_score", "--epoch_eval_real=1"])],
    ids=["pool", "coreset", "batch norm", "robust score"])
def test_an_evaluation_is_that_of_the_cpu_and_goes_on(call, toy, toy_experts, distil, tmp_path, script, options):
    """A stopped evaluation resumes at the next network."""
    if "evaluation" in script:
        folder, _ = distil("set", "--Iteration=0")
        options = [*options, f"--data_dir={folder / 'Normal' / 'distilled.safetensors'}"]
    if "--pick=herding" in options or "--robust_score" in options:
        options = [*options, f"--buffer_path={toy_experts}"]

    def evaluate(name, *more, expect=0):
        call(script, *toy.evaluate, *options, *more, f"--json={tmp_path / name}.json", expect=expect)
        return json.loads((tmp_path / f"{name}.json").read_text()) if expect == 0 else None

    here, there = evaluate("cpu"), evaluate("gpu", GPU)
    if len(there["scores"]) > 1 or "--robust_score" in options:
        with stop_at("distill.evaluate.networks.train_network", 3):
            evaluate("parts", GPU, expect=130)
        assert evaluate("parts", GPU)["scores"] == there["scores"]
    for one, other in zip(there["scores"], here["scores"], strict=True):
        assert one["mean"] == pytest.approx(other["mean"], abs=0.05)  # one of 24 test images


# --- several GPUs --------------------------------------------------------------------------------------------------


@several
@pytest.mark.parametrize("device", ["[1]", "cuda:1", "[0,1]", "[1,0]"])
def test_two_gpus_distil_what_one_does(distil, run, device):
    found, done = distil("two", f"--device={device}", run=run)
    expected, _ = distil("cpu")
    assert ("2 ranks, the first on " if "," in device else "on cuda:1 (") in done.stdout
    close(final(found), final(expected))


@pytest.fixture
def torchrun(environment):
    """Runs a command as two ranks, without checking its exit code."""
    return lambda *command: subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, command)],
        cwd=REPOSITORY, text=True, capture_output=True, env=os.environ | environment)


@several
def test_ranks_are_counted_against_the_gpus_that_are_listed(torchrun, toy, toy_experts, tmp_path):
    done = torchrun("distill/DATM.py", *toy.distil, "--device=[0]", f"--buffer_path={toy_experts}",
                    f"--log_path={tmp_path}")
    assert done.returncode and "2 ranks on this machine, of whose GPUs --device [0] takes 1" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


def test_ranks_that_share_a_gpu_train_experts(torchrun, toy, tmp_path):
    done = torchrun("buffer/buffer_FTD.py", *toy.train, "--device=[0]", "--num_experts=2", "--train_epochs=1",
                    f"--buffer_path={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("replay_buffer_0.pt"))


# --- little memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["experts", "distillation", "evaluation"])
def test_in_a_small_memory_a_program_ends_well_or_in_a_line(stand_in, call, toy, toy_experts, tmp_path, program):
    """For several memory sizes: it finishes, or ends with one line and resumes with more memory."""
    command = {"experts": ["buffer/buffer_FTD.py", *toy.train, "--num_experts=1", f"--buffer_path={tmp_path}"],
               "distillation": ["distill/DATM.py", *toy.distil, "--Iteration=1", "--run_name=run",
                                f"--buffer_path={toy_experts}", f"--log_path={tmp_path}"],
               "evaluation": ["distill/baseline.py", *toy.evaluate, "--ipc=2"]}[program]
    ends = []
    for size in (1, 3, 38, 72, 160):  # MB
        gc.collect()
        torch.cuda.empty_cache()
        stand_in.set_memory(torch.cuda.memory_reserved() + (size << 20))
        done = call(*command, GPU, expect=None)
        ends.append(done.returncode)
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert done.returncode == 2 and "memory" in done.stderr.splitlines()[-1], done.stderr
    assert ends == sorted(ends, reverse=True) and {*ends} == {0, 2}, ends
