"""scripts/reproduce.sh: its commands are valid, and a tiny form of it runs, stops, goes on and fills its tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.reproduce import FULL, SMALL, Plan, Step
from utils.config import BaselineConfig, BufferConfig, DistillConfig, EvaluationConfig, parse
from utils.files import REPOSITORY

CONFIGS = {"buffer_FTD": BufferConfig, "DATM": DistillConfig, "evaluation": EvaluationConfig,
           "baseline": BaselineConfig}
TINY = """
import sys
from pathlib import Path
from scripts import reproduce
root = Path(sys.argv.pop(1))
reproduce.SMALL = reproduce.Form(
    root / "out", "MiniFashion", "ConvNetD1W4", str(root), experts=2, epochs=3,
    windows={"early": (0, 1), "late": (1, 2)}, windows_at=(1, 2), at=2, seeds=(1,), cross=1,
    cross_lr={"MLP": 0.02}, networks=1, epoch_eval={1: 2, 2: 2}, whole_epochs=1, tried=(),
    random_lr={1: 0.01, 2: 0.02}, whole_lr=0.01, backend="auto", threads=1)
reproduce.entry(reproduce.main)
"""


@pytest.mark.parametrize("form", [SMALL, FULL], ids=["small", "full"])
def test_every_command_is_one_of_the_programs(form, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    plan = Plan(form, 1)
    runs, epochs = set(), {}
    for step in (step for step in plan.steps if step not in plan.looks.values()):
        program, options = Path(step.command[1]).stem, list(step.command[2:])
        config = parse(CONFIGS[program], "", options, yaml_file=program == "DATM")
        assert config.zca and config.dataset == form.dataset and config.model in (form.model, "MLP", *form.cross_lr)
        # Settings are chosen without the test images, which only the last evaluation sees.
        assert config.val_fraction == (0.1 if program in ("buffer_FTD", "DATM") else 0)
        if program == "buffer_FTD":
            epochs[config.buffer_path] = config.train_epochs
        if program == "DATM":
            assert config.max_start_epoch - 1 + config.expert_epochs <= epochs[config.buffer_path]
            path = Path(config.log_path) / config.dataset / str(config.ipc) / config.model / config.run_name
            assert Path(step.result) == path.relative_to(REPOSITORY) / "result.json"
            assert path not in runs
            runs.add(path)
    assert len({step.result for step in plan.steps}) == len({step.name for step in plan.steps}) == len(plan.steps)
    assert len({row.name for row in plan.rows}) == len({row.evaluation for row in plan.rows})


def test_a_step_waits_for_what_it_needs():
    plan = Plan(SMALL, 2)
    assert all(plan.steps.index(need) < plan.steps.index(step) for step in plan.steps for need in step.needs)
    assert "--nproc_per_node=2" in plan.steps[0].command and "torchrun" not in Plan(SMALL, 1).steps[0].command
    assert plan.steps[0].asked == Plan(SMALL, 1).steps[0].asked  # the number of ranks changes nothing


@pytest.fixture
def tiny(environment, tmp_path):
    """`tiny(*options)`: the tiny form's command and surroundings, for subprocess."""
    for ipc in (1, 2):
        (tmp_path / f"IPC{ipc}.yaml").write_text(
            f"dataset: MiniFashion\nmodel: ConvNetD1W4\nipc: {ipc}\nval_fraction: 0.1\nIteration: 3\neval_it: 2\n"
            "syn_steps: 2\nexpert_epochs: 1\nmax_start_epoch: 2\ncurrent_max_start_epoch: 1\nexpansion_end_epoch: 2\n"
            "num_eval: 1\nepoch_eval_train: 1\nskip_first_eva: True\nthreshold: 1000\ndevice: cpu\n"
            f"buffer_path: {tmp_path}/out/experts/FTD\nlog_path: {tmp_path}/out/logged_files\n")

    def command(*options):
        return {"args": [sys.executable, "-c", TINY, str(tmp_path), "--small", *options], "cwd": REPOSITORY,
                "env": os.environ | environment | {"PYTHONPATH": str(REPOSITORY)}, "text": True}
    return command


def test_rows_stop_go_on_and_fill_the_tables(tiny, tmp_path):
    only = ("--jobs=2", "--only=ipc1_window_*")
    began = subprocess.Popen(**tiny(*only), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(tmp_path.glob("out/logged_files/**/metrics.jsonl")):  # a distillation has begun
        assert began.poll() is None, began.communicate()
        time.sleep(0.05)
    began.send_signal(signal.SIGTERM)
    out, err = began.communicate(timeout=120)
    assert began.returncode == 143 and "Traceback" not in out + err
    experts = tmp_path / "out/experts/FTD/MiniFashion/ConvNetD1W4/replay_buffer_0.pt"
    trained = experts.stat().st_mtime_ns

    done = subprocess.run(**tiny(*only), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "buffer_FTD.py" not in done.stdout.split("# MiniFashion")[0]  # the experts are there
    assert experts.stat().st_mtime_ns == trained
    results = tmp_path / "out" / "results"
    score = json.loads((results / "ipc1_window_late.json").read_text())["scores"][0]
    row = next(line for line in (results / "tables.md").read_text().splitlines() if line.startswith("| late"))
    assert f"| {100 * score['mean']:.2f} ± {100 * score['std']:.2f} |" in row and "--run_name=window_late" in row
    assert sum("start_epoch" in line for line in
               (results / "ipc1_window_early.metrics.jsonl").read_text().splitlines()) == 3
    assert all((results / f"{name}.png").stat().st_size > 5000 for name in ("accuracy", "windows", "gradients"))

    again = subprocess.run(**tiny(*only), capture_output=True, timeout=120)
    assert again.returncode == 0 and "[1 of" not in again.stdout
    assert again.stdout.split("\n| ")[1:] == done.stdout.split("\n| ")[1:]

    # Whoever was killed just before the end was noted finds what is there.
    ledger = json.loads((tmp_path / "out/commands.json").read_text())
    assert ledger["experts_FTD"]["seconds"] > 0
    ledger["experts_FTD"]["seconds"] = 0.0
    (tmp_path / "out/commands.json").write_text(json.dumps(ledger))
    found = subprocess.run(**tiny(*only), capture_output=True, timeout=120)
    assert found.returncode == 0 and "[1 of" not in found.stdout
    assert experts.stat().st_mtime_ns == trained

    config = tmp_path / "IPC1.yaml"
    text = config.read_text()
    config.write_text(text.replace("Iteration: 3", "Iteration: 4"))
    other = subprocess.run(**tiny(*only), capture_output=True, timeout=120)
    assert other.returncode == 2 and "other options in its YAML" in other.stderr and "Traceback" not in other.stderr
    config.write_text(f"# a remark\n{text}")

    (results / "ipc1_window_late.json").unlink()
    shutil.rmtree(tmp_path / "out/logged_files/MiniFashion/1/ConvNetD1W4/window_late")
    experts.write_bytes(b"damaged")
    failed = subprocess.run(**tiny(*only), capture_output=True, timeout=120)
    assert failed.returncode == 2 and "replay_buffer_0.pt" in failed.stderr
    assert "output/ipc1_window_late.txt" in failed.stderr and "Traceback" not in failed.stderr


def test_experts_are_compared_and_a_rate_is_given_to_another_network(tiny, tmp_path):
    for only in ("experts_SGD", "ipc1_exact_mlp_lr"):
        done = subprocess.run(**tiny("--jobs=2", f"--only={only}"), capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
    results = tmp_path / "out" / "results"
    seen = json.loads((results / "experts_SGD.json").read_text())["by_epoch"]
    assert [each["mean"] for each in seen["apart"]] == [0, 0, 0]  # from themselves
    assert f"| ρ = 0 | {100 * seen['test_accuracy'][-1]['mean']:.2f} ± " in done.stdout
    tested = json.loads((results / "ipc1_exact_mlp_lr.json").read_text())
    assert tested["config"]["lr_teacher"] == 0.02 and tested["config"]["model"] == "MLP"
    printed = (tmp_path / "out/output/ipc1_exact_mlp_lr_tested.txt").read_text()
    assert "learning rate 0.02" in printed  # and not the learned one


def test_odd_options(tiny, tmp_path):
    for options, words in ((("--only=ipc7*",), "no row fits; the rows are ipc"), (("--jobs=0",), "--jobs 0"),
                           (("--results", "x"), "--tables"), (("--tables", "--results", "nowhere"), "no folder")):
        done = subprocess.run(**tiny(*options), capture_output=True, timeout=60)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_result_of_another_command_is_not_taken(tmp_path):
    from scripts.reproduce import Ledger
    from utils.errors import UserError

    step = Step("name", tmp_path / "result", ("python", "program.py", "--a=1"))
    ledger = Ledger(tmp_path / "commands.json")
    assert not ledger.has(step)
    ledger.add(step, 0.0)
    assert not ledger.has(step)
    step.result.write_text("")
    ledger.add(step, 1.0)
    ledger.add(step, 2.0)
    ledger = Ledger(tmp_path / "commands.json")
    assert ledger.has(step) and ledger.made["name"]["seconds"] == 3.0
    with pytest.raises(UserError, match="--a=1"):
        ledger.has(Step("name", tmp_path / "result", ("python", "program.py", "--a=2")))
    with pytest.raises(UserError, match="delete"):
        Ledger(tmp_path / "none.json").has(step)
