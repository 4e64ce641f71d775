"""scripts/datm.slurm, with a stand-in for Slurm's commands."""

import os
import signal
import subprocess

import pytest
from helpers import wait_for

from utils.files import REPOSITORY, save_config

SRUN = """#!/bin/bash
trap 'sleep 0.3; exit {code}' TERM
echo "$* within $TORCH_ELASTIC_SHUTDOWN_TIMEOUT s" >asked
echo $$ >pid
mv pid begun
while true; do sleep 0.05; done
"""


@pytest.fixture
def slurm(tmp_path):
    """Arguments → the process of the script, started in its own folder."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    for name, also in (("scontrol", ""), ("scancel", "kill -TERM $(cat begun)")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $*"\n{also}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("buffer/buffer_FTD.py", "distill/DATM.py"):  # not read
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VENV": str(tmp_path),
                                "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77", "RANKS_PER_NODE": "3"}
    return lambda *arguments, **more: subprocess.Popen(
        ["bash", REPOSITORY / "scripts" / "datm.slurm", *arguments], env=environment | more, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def started(slurm, tmp_path, stage, code):
    """A job whose program ends with this code on SIGTERM, once it runs."""
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN.format(code=code))
    srun.chmod(0o755)
    job = slurm(stage, **({"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "0"} if stage == "experts" else {}))
    wait_for((tmp_path / "begun").exists, job)
    return job


@pytest.mark.parametrize("stage, holds, code, queued", [
    ("distil", None, 0, False), ("distil", None, 143, True), ("experts", None, 143, True),
    ("experts", "unfinished/run.yaml", 143, True), ("experts", "replay_buffer_0.pt", 143, False)])
def test_a_job_that_was_warned_is_queued_again_unless_it_finished(slurm, tmp_path, stage, holds, code, queued):
    if holds:
        (tmp_path / "buffer_storage/parts/0" / holds).parent.mkdir(parents=True)
        (tmp_path / "buffer_storage/parts/0" / holds).touch()
    job = started(slurm, tmp_path, stage, code)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == code
    asked = (tmp_path / "asked").read_text()
    assert "--nproc_per_node=3 " in asked and asked.endswith(" within 150 s\n")  # of the 180 that Slurm gives
    if stage == "experts":
        assert " buffer/buffer_FTD.py --seed=0 --buffer_path=buffer_storage/parts/0 within" in asked
    name = "70_0" if stage == "experts" else "77"
    assert out.splitlines() == [f"scancel --signal=TERM {name}", *[f"scontrol requeue {name}"] * queued]


def test_a_job_that_is_cancelled_is_not_queued_again(slurm, tmp_path):
    job = started(slurm, tmp_path, "distil", 143)
    job.terminate()  # Slurm sends it to all processes of the job
    os.kill(int((tmp_path / "begun").read_text()), signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 143 and not out


def test_experts_are_gathered_once(slurm, tmp_path):
    part = tmp_path / "buffer_storage" / "parts" / "3" / "CIFAR10" / "ConvNet"
    gathered = tmp_path / "buffer_storage" / "CIFAR10" / "ConvNet"
    for folder, said in ((part, "a part is not finished yet"), (gathered, "an unfinished run writes experts into")):
        part.mkdir(parents=True, exist_ok=True)
        (part / "replay_buffer_0.pt").write_text("experts")
        (folder / "unfinished").mkdir(parents=True)
        job = slurm("gather")
        assert said in job.communicate(timeout=30)[1] and job.returncode == 2 and (part / "replay_buffer_0.pt").exists()
        (folder / "unfinished").rmdir()
    for again in (False, True):
        (part / "replay_buffer_0.pt").write_text("experts")
        (part / "replay_buffer_0.jsonl").write_text("accuracies")
        save_config(part / "replay_buffer_0.yaml", {"seed": 3, "sha256": "1234"})
        job = slurm("gather")
        _, err = job.communicate(timeout=30)
        assert (job.returncode, "is equal to" in err) == ((2, True) if again else (0, False)), err
    assert sorted(path.name for path in gathered.iterdir()) == [
        f"replay_buffer_0.{suffix}" for suffix in ("jsonl", "pt", "yaml")]
    for stage, option, said in (("experts", "--seed=4", "the array number is the seed"),
                                ("distil", "--resume=never", "would obey it again")):
        job = slurm(stage, option)
        assert said in job.communicate(timeout=30)[1] and job.returncode == 2
    (tmp_path / "distill/DATM.py").unlink()
    job = slurm("distil")
    assert "submit the job from the repository's root" in job.communicate(timeout=30)[1] and job.returncode == 2
    job = slurm("--help")
    out, _ = job.communicate(timeout=30)
    assert out.startswith("DATM on a Slurm cluster") and "SBATCH" not in out and job.returncode == 0


def test_a_gathering_that_was_stopped_goes_on_with_the_same_numbers(slurm, tmp_path):
    target = tmp_path / "buffer_storage" / "CIFAR10" / "ConvNet"
    target.mkdir(parents=True)
    save_config(target / "replay_buffer_0.yaml", {"seed": 3, "sha256": "3333"})  # its file was not moved yet
    for number in (2, 3):
        part = tmp_path / "buffer_storage" / "parts" / str(number) / "CIFAR10" / "ConvNet"
        part.mkdir(parents=True)
        (part / "replay_buffer_0.pt").write_text(f"experts {number}")
    save_config(part.parents[2] / "2" / "CIFAR10" / "ConvNet" / "replay_buffer_0.yaml", {"seed": 2, "sha256": "2222"})
    job = slurm("gather")
    assert job.communicate(timeout=30) and job.returncode == 0
    for number, name in ((3, "replay_buffer_0"), (2, "replay_buffer_1")):
        assert (target / f"{name}.pt").read_text() == f"experts {number}"
        assert f"sha256: '{number}{number}{number}{number}'" in (target / f"{name}.yaml").read_text()
