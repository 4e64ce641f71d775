"""Several ranks (torchrun, gloo) give the results of one process; a rank that dies loses nothing."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import ranks_worker
import torch
from helpers import TOY_RUN, tensors_in, wait_for

from buffer import expert_run
from distill import plan
from distill.checks import check_networks
from distill.distilled_set import DistilledSet
from distill.evaluate import saved_accuracies
from distill.evaluate.networks import evaluate
from distill.evaluate.saved_accuracies import Accuracies, Job
from distill.load import student_of
from utils.config import BufferConfig, DistillConfig, EvaluationConfig, make
from utils.errors import UserError
from utils.files import REPOSITORY
from utils.program import ranks
from utils.program.prepare import start_as_ranks

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TWO_RANKS = "import sys; sys.argv = sys.argv[1:]\nfrom utils.program.ranks import launch\nlaunch(2)"


@pytest.fixture(scope="module")
def start(environment):
    """Starts a command as that many ranks of torchrun (0: without torchrun); returns the process."""
    def start(number, *command):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}",
                    "--monitor_interval=0.1"]
        return subprocess.Popen([*(launcher if number else [sys.executable]), *map(str, command)], cwd=REPOSITORY,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=os.environ | environment | ONE_THREAD)
    return start


@pytest.fixture(scope="module")
def torchrun(start):
    """Like `start`, but waits for the end; returns stdout and stderr."""
    def torchrun(number, *command, expect=0):
        process = start(number, *command)
        out, err = process.communicate(timeout=300)
        assert (process.returncode == 0) == (expect == 0), f"{command} → {process.returncode}\n{out}\n{err}"
        return out, err
    return torchrun


@pytest.fixture
def patched(tmp_path):
    """Code → a program that runs this, and then the entry that its first argument names."""
    def write(code):
        path = tmp_path / "worker.py"
        path.write_text(f"import os, runpy, sys\nsys.path.insert(0, '.')\nsys.argv = sys.argv[1:]\n{code}\n"
                        "runpy.run_path(sys.argv[0], run_name='__main__')")
        return path
    return write


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def kill_a_rank(process, folder, once_there, holding=""):
    """Kills torchrun's last rank once a file exists and holds this; the job must end soon and say why."""
    wait_for(lambda: any(not holding or holding in path.read_text() for path in folder.rglob(once_there)), process)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode and time.monotonic() - began < 30
    assert "Signal 9 (SIGKILL) received" in err  # torchrun's words


@pytest.mark.parametrize("number", [2, 4])
def test_experts_are_those_of_one_process(torchrun, toy, toy_experts, tmp_path, number):
    out, _ = torchrun(number, "buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}")
    assert tensors_in(tmp_path) == tensors_in(toy_experts) and not list(tmp_path.rglob("unfinished"))
    assert out.count("3 experts of 3 epochs: ") == 1  # only the first rank prints, for all
    assert re.findall(r"expert (\d): loss .*, train .*, test ", out) == ["0", "1", "2"]


def test_experts_resume_after_a_killed_rank(call, torchrun, start, toy, tmp_path):
    arguments = ["buffer/buffer_FTD.py", *toy.train, "--train_epochs=60"]
    call(*arguments, f"--buffer_path={tmp_path / 'one'}")
    kill_a_rank(start(2, *arguments, f"--buffer_path={tmp_path / 'two'}"), tmp_path / "two", "epoch_2.pt")
    out, _ = torchrun(2, *arguments, f"--buffer_path={tmp_path / 'two'}")
    assert "resuming an unfinished run" in out and tensors_in(tmp_path / "two") == tensors_in(tmp_path / "one")


@pytest.mark.parametrize("number, trained, ranks_there, reached", [
    (0, [], 1, 2.5), (0, [], 2, 5.0), (2, [0, 1], 2, 8 + 2.5), (1, [0], 4, 4 + 2 * 2.5), (0, [], 9, 7.5)])
def test_the_bar_of_experts_counts_on_the_other_ranks(monkeypatch, tmp_path, number, trained, ranks_there, reached):
    """Three experts of four epochs; the one in training is in the middle of its third epoch."""
    run = object.__new__(expert_run.ExpertRun)
    run.config, run.first_number, run.written = make(BufferConfig, num_experts=3, train_epochs=4), 0, 0
    run.dataset, run.unfinished = mock.MagicMock(), tmp_path
    for each in trained:
        (tmp_path / f"expert_{each}").mkdir()
        for epoch in range(5):
            (tmp_path / f"expert_{each}" / f"epoch_{epoch}.pt").touch()
    monkeypatch.setattr(ranks, "size", lambda: ranks_there)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    monkeypatch.setattr(expert_run, "train_expert", lambda *arguments, progress, **options: progress(2.5))
    with mock.patch.object(expert_run.ExpertView, "reach") as reach, expert_run.ExpertView(run) as view:
        expert_run.train_one(run, number, None, view)
    reach.assert_called_once_with(reached)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(images, matching, factor) → the tensors that one process computes."""
    found = {}

    def alone(*setting):
        if setting not in found:
            path = tmp_path_factory.mktemp("alone") / "x.pt"
            ranks_worker.main(path, *map(str, setting))
            found[setting] = torch.load(path)
        return found[setting]
    return alone


@pytest.mark.parametrize("number, images, matching, factor, backend", [
    (2, 9, "exact", 2, "eager"), (4, 9, "exact", 1, "eager"), (4, 3, "exact", 1, "eager"), (2, 9, "tesla", 1, "eager"),
    (2, 9, "exact", 1, "compile")])
def test_twenty_iterations_equal_one_process_in_float64(torchrun, alone, tmp_path, number, images, matching, factor,
                                                        backend):
    """Nine images and batches of four are divided unevenly; with three images, a fourth rank has none."""
    torchrun(number, "tests/ranks_worker.py", tmp_path / "x.pt", images, matching, factor, backend)
    together = torch.load(tmp_path / "x.pt")
    for name, expected in alone(images, matching, factor).items():
        torch.testing.assert_close(together[name], expected, rtol=1e-10, atol=1e-10, msg=name)
    assert len(set(together["losses"].tolist())) == 20


@pytest.fixture
def distil(toy, toy_experts, tmp_path):
    def arguments(where, *options):
        return ["distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", "--run_name=run", "--Iteration=20",
                "--eval_it=5", "--ema", f"--log_path={tmp_path / where}", *options]
    return arguments


def tensors_of(tmp_path, where):
    folder = tmp_path / where / TOY_RUN
    names = [f"Normal/{kind}_20.pt" for kind in ("images", "labels", "lr")] + ["EMA/images_20.pt"]
    return {name: torch.load(folder / name) for name in names}


def test_a_distillation_equals_one_process_and_resumes_after_a_killed_rank(call, torchrun, start, distil, tmp_path):
    call(*distil("one"))
    torchrun(2, *distil("two"))
    one, two = tensors_of(tmp_path, "one"), tensors_of(tmp_path, "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4, msg=name)

    kill_a_rank(start(2, *distil("killed")), tmp_path / "killed", "metrics.jsonl", holding='"iteration": 5,')
    out, _ = torchrun(2, *distil("killed"))
    assert "resuming at iteration" in out and "iteration 0," not in out
    for name, tensor in tensors_of(tmp_path, "killed").items():
        assert torch.equal(tensor, two[name]), name


def test_ranks_measure_equally_often_in_a_dry_run(torchrun, patched, distil):
    """A rank that is slower than the others ends a measurement early; they share each match."""
    worker = patched("import distill.estimate as estimate\nestimate.LONG = 1e-9 if os.environ['RANK'] == '1' else 99")
    out, _ = torchrun(2, worker, *distil("dry"), "--dry_run")
    assert out.count("an iteration takes about") == 1 and "nothing was distilled" in out


def test_networks_of_an_evaluation_are_dealt_out(call, torchrun, toy, toy_experts, tmp_path):
    arguments = ["distill/baseline.py", *toy.evaluate, "--num_eval=3", "--ipc=2", "--pick=herding",
                 f"--buffer_path={toy_experts}"]
    call(*arguments, f"--json={tmp_path / 'one.json'}")
    torchrun(2, *arguments, f"--json={tmp_path / 'two.json'}")
    scores = [json.loads((tmp_path / name).read_text())["scores"] for name in ("one.json", "two.json")]
    assert scores[0] == scores[1] and len(scores[0][0]["accuracies"]) == 3


def test_an_evaluation_resumes_after_a_killed_rank(call, torchrun, start, toy, tmp_path):
    arguments = ["distill/baseline.py", *toy.common, "--ipc=2", "--num_eval=5", "--epoch_eval_train=600"]
    call(*arguments, f"--json={tmp_path / 'one.json'}")
    kill_a_rank(start(2, *arguments, f"--json={tmp_path / 'two.json'}"), tmp_path, "two.json.unfinished*")
    out, _ = torchrun(2, *arguments, f"--json={tmp_path / 'two.json'}")
    one, two = (json.loads((tmp_path / name).read_text())["scores"] for name in ("one.json", "two.json"))
    assert "of 5 networks were tested" in out and one == two and not list(tmp_path.glob("*.unfinished*"))


def test_the_seconds_of_an_evaluation_are_of_one_clock(monkeypatch):
    """The first rank sends the saved accuracies to ranks whose clocks have another origin."""
    now = [1e6]
    monkeypatch.setattr("distill.evaluate.saved_accuracies.perf_counter", lambda: now[0])
    sent = Accuracies()
    now[0] += 5
    part, sent = sent.part("a/"), pickle.dumps(sent)
    assert part.seconds == 5
    now[0] = 7.0
    received = pickle.loads(sent)
    now[0] += 2
    assert received.seconds == 7


def test_no_rank_writes_once_the_first_may_remove_the_files(monkeypatch, toy_data, tmp_path):
    """The next evaluation with the same --json would take a late file for that of a stopped one."""
    config = make(EvaluationConfig, dataset="ImageFolder", model="ConvNetD1W4", num_eval=3, epoch_eval_train=1)
    images, labels = toy_data.train_images[:6], toy_data.train_labels[:6]
    known = Accuracies(tmp_path / "x.json.unfinished", "key")

    def gather(found):
        assert json.loads((tmp_path / "x.json.unfinished.1").read_text())["accuracies"].keys() == {"ConvNetD1W4/1"}
        for path in tmp_path.iterdir():  # as the first rank does
            path.unlink()
        return found | {Job("ConvNetD1W4", number): saved_accuracies.Tested(0.5) for number in (0, 2)}

    for name, replaced in (("size", lambda: 2), ("rank", lambda: 1), ("gather", gather)):
        monkeypatch.setattr(ranks, name, replaced)
    (score,) = evaluate(config, toy_data, DistilledSet(images, labels, torch.tensor(0.01)), accuracies=known)
    assert score.accuracies[::2] == [0.5, 0.5] and len(score.accuracies) == 3
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_said_once(torchrun, distil):
    _, err = torchrun(2, *distil("x", "--model=ConvNetD1W4BN"), expect=2)
    assert err.count("DATM.py: error:") == 1


@pytest.mark.parametrize("options, said", [({"matching": "unroll"}, "--matching exact"),
                                           ({"model": "ConvNetD1W4BN"}, "batch norm ties")])
def test_what_ranks_cannot_share_is_refused(toy_data, monkeypatch, options, said):
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(UserError, match=said):
        check_networks(make(DistillConfig, **{"model": "ConvNetD1W4"} | options), toy_data)


def test_a_command_starts_its_own_ranks(torchrun, toy, toy_experts, tmp_path):
    """As with `device: [0, 1]` on a machine with two GPUs, but on a CPU."""
    torchrun(0, "-c", TWO_RANKS, "buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}")
    assert tensors_in(tmp_path) == tensors_in(toy_experts)
    _, err = torchrun(0, "-c", TWO_RANKS, "buffer/buffer_FTD.py", *toy.train, "--rho_max=1",
                      f"--buffer_path={tmp_path}", expect=2)
    assert err.count("buffer_FTD.py: error: --rho_max 1 --rho_min 0.01") == 1 and "Traceback" not in err


def test_ranks_of_other_options_are_refused(torchrun, patched, toy, tmp_path):
    worker = patched("sys.argv.append('--seed=' + os.environ['RANK'])")
    _, err = torchrun(2, worker, "buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", expect=2)
    assert "started with different options: seed (0 there, 1 here)" in err and not list(tmp_path.rglob("unfinished"))


def test_ranks_that_read_other_images_are_refused(torchrun, patched, toy, tmp_path):
    """As machines with copies of their own read them, of which one is not up to date."""
    for rank in (0, 1):
        shutil.copytree(toy.data, tmp_path / str(rank))
    next((tmp_path / "1").rglob("*.png")).unlink()
    worker = patched("sys.argv[-1] += os.environ['RANK']")
    _, err = torchrun(2, worker, "buffer/buffer_FTD.py", *toy.train,
                      f"--buffer_path={tmp_path / 'experts'}", f"--data_path={tmp_path}/", expect=2)
    assert "ranks 0 and 1 read different images of ImageFolder; give" in err and not (tmp_path / "experts").exists()


def test_what_only_the_first_rank_finds_is_said_once(torchrun, patched, toy, toy_experts, tmp_path):
    """The others get the refusal too, and do not say that contact was lost."""
    options = *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--run_name=a"
    worker = patched("from utils.errors import UserError\n"
                     "def refuse(*arguments): raise UserError('these experts are damaged')\n"
                     "import distill.load as load\n"
                     "load.data_checksums = refuse")
    _, err = torchrun(2, worker, "distill/DATM.py", *options, expect=2)
    assert err.count("DATM.py: error:") == err.count("these experts are damaged") == 1 and "contact" not in err


def test_a_diverged_expert_keeps_those_before_it(torchrun, patched, toy, tmp_path):
    worker = patched("import buffer.expert_run as experts\n"
                     "train = experts.train_expert\n"
                     "def bad(config, dataset, number, **rest):\n"
                     "    if number == 2: raise experts.DivergedError('expert 2 diverged in epoch 1')\n"
                     "    return train(config, dataset, number, **rest)\n"
                     "experts.train_expert = bad")
    for number in (0, 2):
        folder = tmp_path / str(number)
        _, err = torchrun(number, worker, "buffer/buffer_FTD.py", *toy.train, "--save_interval=5",
                          f"--buffer_path={folder}", expect=2)
        assert "expert 2 diverged" in err and not list(folder.rglob("unfinished"))
        assert "(kept: 2 experts before it; in this folder give --num_experts 1 for the rest)" in err
        (path,) = folder.rglob("replay_buffer_*.pt")
        assert len(torch.load(path)) == 2


def test_a_rank_that_is_killed_under_the_programs_own_launcher_is_named(start, toy, tmp_path):
    process = start(0, "-c", TWO_RANKS, "buffer/buffer_FTD.py", *toy.train, "--train_epochs=500",
                    f"--buffer_path={tmp_path}")
    wait_for(lambda: list(tmp_path.rglob("epoch_1.pt")), process)
    os.kill(children_of(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 137 and "was ended by SIGKILL; start again" in err


def test_what_is_ignored_stays_ignored_under_the_programs_own_launcher(start, toy, tmp_path):
    """As under nohup."""
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{TWO_RANKS}"
    process = start(0, "-c", ignoring, "buffer/buffer_FTD.py", *toy.train, "--train_epochs=500",
                    f"--buffer_path={tmp_path}")
    wait_for(lambda: list(tmp_path.rglob("epoch_1.pt")), process)
    process.send_signal(signal.SIGHUP)
    before = len(list(tmp_path.rglob("epoch_*.pt")))
    wait_for(lambda: len(list(tmp_path.rglob("epoch_*.pt"))) > before + 4, process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err


def test_a_rank_has_its_share_of_the_work_and_any_backend(toy_data, monkeypatch):
    config = make(DistillConfig, model="ConvNetD1W4", backend="compile")
    alone = plan.work_of(config, toy_data).total
    monkeypatch.setattr(ranks, "size", lambda: 2)
    check_networks(config, toy_data)
    assert plan.work_of(config, toy_data).total == alone / 2
    assert "compiled" in student_of(config, toy_data).engine.name


def test_the_gpus_that_a_config_lists_get_a_rank_each(monkeypatch):
    started = []
    monkeypatch.setattr(ranks, "launch", started.append)
    for present, listed in ((4, [0, 1, 2, 3]), (2, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (0, [0, 1, 2, 3]), (4, [2]),
                            (4, "auto")):
        monkeypatch.setattr("torch.cuda.device_count", lambda present=present: present)
        monkeypatch.setattr("torch.cuda.is_available", lambda present=present: present > 0)
        start_as_ranks(make(DistillConfig, device=listed))
    start_as_ranks(make(DistillConfig, device="auto", parall_eva=True))  # a distillation starts ranks only for a list
    for device in ("auto", "cpu", "cuda:1"):  # the last two name one device
        start_as_ranks(make(EvaluationConfig, device=device, parall_eva=True))
    assert started == [4, 2, 4]


@pytest.mark.parametrize("variables, wrong", [
    ("", None), ("WORLD_SIZE=1", None), ("WORLD_SIZE=", None), ("RANK=0", None), ("RANK=x MASTER_ADDR=h", None),
    ("WORLD_SIZE=2", "RANK is not"), ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=h", "MASTER_PORT is not"),
    ("WORLD_SIZE=2 RANK=1 MASTER_PORT=9", "MASTER_ADDR is not"), ("WORLD_SIZE=two RANK=1", "WORLD_SIZE is 'two'"),
    ("WORLD_SIZE=2 RANK=2 MASTER_ADDR=h MASTER_PORT=9", "RANK is '2'"),
    ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=h MASTER_PORT=99999", "MASTER_PORT is '99999'"),
    ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=h MASTER_PORT=9 LOCAL_WORLD_SIZE=-1", "LOCAL_WORLD_SIZE is '-1'")])
def test_without_torchrun_there_is_one_process_or_a_refusal(call, monkeypatch, variables, wrong):
    """Lightning, Slurm and old shells leave some of torchrun's variables behind."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (each.split("=") for each in f"LOCAL_RANK=0 {variables}".split()):
        monkeypatch.setenv(name, value)
    refusal = call("scripts/summary.py", expect=2).stderr
    assert refusal.count("\n") == 1 and (f", but {wrong}" in refusal if wrong else "RESULT.json" in refusal)
    assert ranks.size() == 1 and ranks.first()


def test_communication_is_measured(call):
    measured = call("scripts/measure/communication.py", "--model=ConvNetD1W4", "--batch=4", "--rounds=1").stdout
    assert re.fullmatch(r"1 rank, ConvNetD1W4 \(\d+ parameters\), batch 4: 0\.\d+ MB a step; computing [\d.]+ ms, "
                        r"summing [\d.]+ ms, \d+ % of the time\n", measured)
