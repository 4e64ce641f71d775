"""Shared fixtures."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import fakecuda
import pytest
import torch
from helpers import handlers_as_before

from scripts.trials.common import write_pictures
from utils.data.datasets import load_dataset
from utils.program import interrupt

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"


# A shell's background jobs ignore SIGINT, and so would the programs, to which these tests send it.
for _number in interrupt.SIGNALS:
    signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


def pytest_configure(config):
    """Restarts `pytest -m cuda` on the stand-in GPU (fakecuda/README.md) if there is no real one."""
    if config.option.markexpr == "cuda" and not torch.cuda.is_available() and fakecuda.why_not() is None:
        config.pluginmanager.getplugin("capturemanager").stop_global_capturing()
        fakecuda.preload(devices=2)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        reason = fakecuda.why_not()
        reason = "no NVIDIA GPU, and " + (f"no stand-in for one: {reason}" if reason else
                                          "not on the stand-in, on which `python -m pytest -m cuda` runs it")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def golden_ops():
    """Outputs of the published code for single operations; see golden/README.md."""
    return torch.load(GOLDEN / "ops.pt", weights_only=True)


@pytest.fixture(scope="session")
def golden_iteration():
    """One whole distillation iteration of the published code; see golden/README.md."""
    return torch.load(GOLDEN / "datm_iteration.pt", weights_only=True)


@pytest.fixture
def stand_in():
    """The stand-in GPU, which counts launches and whose memory can be limited; skips the test on a real GPU."""
    if not hasattr(fakecuda, "watch"):
        pytest.skip("on the stand-in only")
    yield fakecuda
    fakecuda.set_memory(0)


class Bomb:
    """Code in a file: unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)

    @property
    def went_off(self):
        return self.marker.exists()


@pytest.fixture
def bomb(tmp_path):
    return Bomb(tmp_path / "it ran")


# --- the program's entries, run as a user runs them ----------------------------------------------------------


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Environment variables: one thread, 100 columns, a separate cache folder, no Weights & Biases account."""
    return {"OMP_NUM_THREADS": "1", "DATM_CACHE": str(tmp_path_factory.mktemp("cache")), "COLUMNS": "100",
            "WANDB_API_KEY": "", "NETRC": os.devnull}


@pytest.fixture(scope="session", autouse=True)
def own_cache(environment):
    """The tests' own cache folder, in this process too."""
    with mock.patch.dict(os.environ, DATM_CACHE=environment["DATM_CACHE"]):
        yield


@pytest.fixture(scope="session")
def run(environment):
    """`run("distill/DATM.py", "--cfg", …)` runs a program as a separate process in the folder `cwd`."""

    def run(script, *arguments, cwd=ROOT, expect=0):
        done = subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=cwd, text=True, timeout=900,
                              capture_output=True, env=os.environ | environment)
        return expected(done, expect)

    return run


@pytest.fixture(scope="session")
def call(environment):
    """Like `run`, but in this process, which saves the two seconds for importing torch."""

    def call(script, *arguments, cwd=ROOT, expect=0):
        command = [str(script), *map(str, arguments)]
        out, err, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"] or 2))  # empty: not set, on a machine of two cores
        try:
            with (mock.patch.dict(os.environ, environment), mock.patch.object(sys, "argv", command),
                  mock.patch.object(sys, "path", list(sys.path)), contextlib.chdir(cwd),
                  contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), handlers_as_before()):
                runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            torch.set_num_threads(threads)
        return expected(subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue()), expect)

    return call


def expected(done, code):
    """Asserts the exit code (None: any) and returns the process."""
    assert code in (None, done.returncode), f"{done.args} → {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def experts(run, tmp_path_factory):
    """A `buffer_path` with three experts of three epochs, ConvNetD1W4 on MiniFashion, in two files."""
    folder = tmp_path_factory.mktemp("buffers")
    run("buffer/buffer_FTD.py", "--dataset=MiniFashion", "--model=ConvNetD1W4", "--zca", "--train_epochs=3",
        "--num_experts=3", "--save_interval=2", "--batch_train=256", "--rho_max=0.01", "--rho_min=0.01",
        "--device=cpu", f"--buffer_path={folder}")
    return folder


class Toy(NamedTuple):
    """A dataset of three colours, with options for tiny runs on it."""

    data: Path  # train/<class>/*.png, test/<class>/*.png
    per_class: int
    common: list[str]  # for every program
    train: list[str]  # for buffer_FTD.py, without --buffer_path
    distil: list[str]  # for DATM.py, without --buffer_path and --log_path
    evaluate: list[str]  # for evaluation.py and baseline.py


@pytest.fixture
def ordinary_user():
    @contextlib.contextmanager
    def ordinary_user():
        """Inside, root becomes an ordinary user, who may not enter every folder."""
        if os.geteuid():
            yield
            return
        try:
            os.setegid(65534)
            os.seteuid(65534)
        except OSError:
            pytest.skip("root cannot become an ordinary user here")
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
    return ordinary_user


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_pictures(folder, ("red", "green", "blue"), {"train": 24, "test": 8})
    config = folder / "toy.yaml"
    config.write_text("ipc: 2\nIteration: 4\neval_it: 2\nsyn_steps: 3\nexpert_epochs: 1\nmax_start_epoch: 2\n"
                      "Sequential_Generation: False\nlr_img: 10\nlr_y: 1\nthreshold: 1000\nnum_eval: 1\n"
                      "epoch_eval_train: 1\n")
    common = ["--dataset=ImageFolder", f"--data_path={folder}", "--res=8", "--model=ConvNetD1W4", "--zca",
              "--device=cpu"]
    return Toy(folder, 24, common,
               [*common, "--train_epochs=3", "--num_experts=3", "--save_interval=2", "--batch_train=16",
                "--rho_max=0.01", "--rho_min=0.01", "--lr_teacher=0.1"],
               ["--cfg", str(config), *common], [*common, "--epoch_eval_train=2", "--num_eval=1"])


@pytest.fixture(scope="session")
def toy_experts(call, toy, tmp_path_factory):
    """A `buffer_path` with three experts of three epochs, trained on the toy dataset, in two files."""
    folder = tmp_path_factory.mktemp("toy_buffers")
    call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={folder}")
    return folder


@pytest.fixture(scope="session")
def toy_data(toy):
    """The toy dataset, loaded and whitened."""
    return load_dataset("ImageFolder", toy.data, res=8, zca=True)
