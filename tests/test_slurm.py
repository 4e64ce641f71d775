"""scripts/datm.slurm, with a stand-in for Slurm's commands."""

import os
import subprocess

import pytest
from helpers import wait_for

from utils.files import REPOSITORY, save_config

SRUN = """#!/bin/bash
trap 'sleep 0.3; exit {code}' TERM
touch begun
while true; do sleep 0.05; done
"""


@pytest.fixture
def slurm(tmp_path):
    """Arguments → the process of the script, started in its own folder."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    (tmp_path / "bin" / "scontrol").write_text('#!/bin/sh\necho "scontrol $*"\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VENV": str(tmp_path),
                                "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77"}
    return lambda *arguments: subprocess.Popen(
        ["bash", REPOSITORY / "scripts" / "datm.slurm", *arguments], env=environment, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code, queued", [(0, ""), (143, "scontrol requeue 77")])
def test_a_job_that_was_warned_is_queued_again_unless_it_finished(slurm, tmp_path, code, queued):
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN.format(code=code))
    srun.chmod(0o755)
    job = slurm("distil")
    wait_for((tmp_path / "begun").exists, job)
    job.terminate()
    out, _ = job.communicate(timeout=30)
    assert job.returncode == code and out.strip() == queued


def test_experts_are_gathered_once(slurm, tmp_path):
    part = tmp_path / "buffer_storage" / "parts" / "3" / "CIFAR10" / "ConvNet"
    for again in (False, True):
        part.mkdir(parents=True, exist_ok=True)
        (part / "replay_buffer_0.pt").write_text("experts")
        save_config(part / "replay_buffer_0.yaml", {"seed": 3, "sha256": "1234"})
        job = slurm("gather")
        _, err = job.communicate(timeout=30)
        assert (job.returncode, "is equal to" in err) == ((2, True) if again else (0, False)), err
    gathered = tmp_path / "buffer_storage" / "CIFAR10" / "ConvNet"
    assert sorted(path.name for path in gathered.iterdir()) == ["replay_buffer_0.pt", "replay_buffer_0.yaml"]
    job = slurm("experts", "--seed=4")
    assert "the array number is the seed" in job.communicate(timeout=30)[1] and job.returncode == 2
