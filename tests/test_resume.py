"""Nothing is lost: stopped runs resume bit-identically, two runs cannot share a folder, signals are handled."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import yaml
from helpers import TOY_EXPERTS, TOY_RUN, handlers_as_before, stop_at, tensors_in
from safetensors.torch import load_file
from torch.utils import _pytree as pytree

from buffer.expert_run import train_one
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.set_files import set_files
from utils import files
from utils.errors import UserError
from utils.files import REPOSITORY
from utils.loss_and_accuracy import accuracy
from utils.networks import build_network
from utils.parameters import FlatModel, flatten
from utils.program import interrupt, locks
from utils.program.interrupt import Stopped

# --- experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--mom=0.9", "--l2=0.01"], ["--model=ConvNetD1W4BN", "--mom=0.5"]])
def test_experts_resume_to_the_bit(call, toy, tmp_path, options):
    """18 steps: three experts, three epochs each, two batches an epoch; two experts per file."""
    arguments = [*toy.train, "--batch_train=40", "--rho_max=0", "--rho_min=0", *options]
    call("buffer/buffer_FTD.py", *arguments, f"--buffer_path={tmp_path / 'whole'}")
    for step in (1, 3, 9, 17):
        parts = tmp_path / f"stopped_at_{step}"
        with stop_at("buffer.experts.gsam_gradient", step):
            done = call("buffer/buffer_FTD.py", *arguments, f"--buffer_path={parts}", expect=130)
        assert "stopped by SIGINT" in done.stderr and "python buffer/buffer_FTD.py" in done.stderr
        done = call("buffer/buffer_FTD.py", *arguments, f"--buffer_path={parts}")
        assert "resuming an unfinished run" in done.stdout
        assert tensors_in(tmp_path / "whole") == tensors_in(parts)
    assert not list(tmp_path.rglob("unfinished")) and not list(tmp_path.rglob(".*"))


def test_a_resumed_expert_compiles_the_sizes_that_an_uninterrupted_one_does(call, toy, tmp_path, monkeypatch):
    """PAD's epochs have other last batches each, and only the first sizes that are met are compiled."""
    def rounded_otherwise(network_pass):
        def gradient(*given):
            loss, logits, of_weights = network_pass.gradient(*given)
            return loss, logits, pytree.tree_map(lambda each: each * (1 + 1e-3), of_weights)
        return gradient, network_pass.adjoint

    monkeypatch.setattr("utils.derivatives.choose_engine.check_backend", lambda backend, device: None)
    monkeypatch.setattr("utils.derivatives.engine.MOST_SIZES", 2)
    monkeypatch.setattr("utils.derivatives.engine._compiled", rounded_otherwise)
    arguments = [*toy.train, "--backend=compile", "--pad", "--init_ratio=0.5", "--add_end_epoch=2", "--batch_train=40",
                 "--rm_epoch_first=2", "--rm_epoch_second=3", "--num_experts=1", "--rho_max=0", "--rho_min=0"]
    call("buffer/buffer_FTD.py", *arguments, f"--buffer_path={tmp_path / 'whole'}")
    with stop_at("buffer.experts.gsam_gradient", 4):  # in the third epoch
        call("buffer/buffer_FTD.py", *arguments, f"--buffer_path={tmp_path / 'parts'}", expect=130)
    call("buffer/buffer_FTD.py", *arguments, f"--buffer_path={tmp_path / 'parts'}")
    assert tensors_in(tmp_path / "whole") == tensors_in(tmp_path / "parts")


def test_a_stop_while_files_are_written_loses_nothing(call, toy, toy_experts, tmp_path):
    arguments = [*toy.train, f"--buffer_path={tmp_path}"]
    with stop_at("buffer.trajectories.save_config", 1, at_once=True):  # writing the manifest, before the expert file
        call("buffer/buffer_FTD.py", *arguments, expect=130)
    assert not list(tmp_path.rglob("replay_buffer_*.pt"))
    with stop_at("shutil.rmtree", 1, at_once=True):  # removing the epochs, after the expert file
        call("buffer/buffer_FTD.py", *arguments, expect=130)
    assert len(list(tmp_path.rglob("replay_buffer_*.pt"))) == 1
    call("buffer/buffer_FTD.py", *arguments)
    assert tensors_in(tmp_path) == tensors_in(toy_experts)


def test_a_signal_after_the_last_epoch_ends_nothing(call, toy, toy_experts, tmp_path):
    """By then the run is complete, and the command to resume would train further experts."""
    with stop_at("buffer.expert_run.ExpertRun.clear", 1):
        done = call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}")
    assert "stopped" not in done.stderr and tensors_in(tmp_path) == tensors_in(toy_experts)


@pytest.fixture
def unfinished(call, toy, tmp_path):
    """The arguments of an expert run that was stopped in its first epoch."""
    arguments = [*toy.train, f"--buffer_path={tmp_path}"]
    with stop_at("buffer.experts.gsam_gradient", 2):
        call("buffer/buffer_FTD.py", *arguments, expect=130)
    return arguments


def test_an_unfinished_run_of_other_options_is_named(call, unfinished, tmp_path):
    before = tensors_in(tmp_path)
    done = call("buffer/buffer_FTD.py", *unfinished, "--lr_teacher=0.5", expect=2)
    assert "lr_teacher (0.1 there, 0.5 here)" in done.stderr and "--resume never" in done.stderr
    assert tensors_in(tmp_path) == before
    done = call("buffer/buffer_FTD.py", *unfinished, "--lr_teacher=0.5", "--resume=never")
    assert "resuming" not in done.stdout and not list(tmp_path.rglob("unfinished"))


def test_an_unfinished_run_in_a_linked_folder_is_discarded_too(call, unfinished, tmp_path):
    (folder,) = tmp_path.rglob("unfinished")
    disk = folder.rename(tmp_path / "disk")
    folder.symlink_to(disk)
    (disk / "0").mkdir(exist_ok=True)
    (disk / "0" / "epoch_3.pt").touch()
    call("buffer/buffer_FTD.py", *unfinished, "--lr_teacher=0.5", "--resume=never")
    assert not list(disk.iterdir())


def test_trained_experts_are_not_discarded_by_asking_for_fewer(call, toy, tmp_path):
    arguments = [*toy.train, "--save_interval=3", f"--buffer_path={tmp_path}"]
    with stop_at("buffer.experts.gsam_gradient", 32):
        call("buffer/buffer_FTD.py", *arguments, expect=130)
    done = call("buffer/buffer_FTD.py", *arguments, "--num_experts=1", expect=2)
    assert "holds more, begun and not written yet; give at least 3" in done.stderr


def test_experts_that_came_beside_an_unfinished_run_are_not_taken_for_its_own(call, unfinished, toy_experts, tmp_path):
    (folder,) = (path.parent for path in tmp_path.rglob("unfinished"))
    for path in (toy_experts / TOY_EXPERTS).glob("replay_buffer_0.*"):
        shutil.copy(path, folder)
    manifest = folder / "replay_buffer_0.yaml"
    manifest.write_text(re.sub("(?m)^seed: .*", "seed: 7", manifest.read_text()))
    before = tensors_in(tmp_path)
    done = call("buffer/buffer_FTD.py", *unfinished, expect=2)
    assert "of another run, or without manifest, since its unfinished run was begun; move them away" in done.stderr
    assert tensors_in(tmp_path) == before


def test_experts_that_are_gone_since_an_unfinished_run_was_begun_are_asked_for(call, toy, tmp_path):
    arguments = [*toy.train, "--num_experts=1", f"--buffer_path={tmp_path}"]
    call("buffer/buffer_FTD.py", *arguments)
    with stop_at("buffer.experts.gsam_gradient", 9):  # in a further expert
        call("buffer/buffer_FTD.py", *arguments, expect=130)
    (tmp_path / TOY_EXPERTS / "replay_buffer_0.pt").rename(tmp_path / "away.pt")
    done = call("buffer/buffer_FTD.py", *arguments, expect=2)
    assert "held 1 expert when its unfinished run was begun, and holds 0 now; put the others back" in done.stderr
    (tmp_path / "away.pt").rename(tmp_path / TOY_EXPERTS / "replay_buffer_0.pt")
    call("buffer/buffer_FTD.py", *arguments)


def test_fewer_experts_end_an_unfinished_run(call, unfinished, tmp_path):
    call("buffer/buffer_FTD.py", *unfinished, "--num_experts=1")
    (path,) = tmp_path.rglob("replay_buffer_*.pt")
    assert len(torch.load(path)) == 1


def test_another_kind_of_experts_is_refused_by_name(call, toy, toy_experts, tmp_path):
    shutil.copytree(toy_experts, tmp_path / "experts")
    arguments = [*toy.train, f"--buffer_path={tmp_path / 'experts'}"]
    done = call("buffer/buffer_FTD.py", *arguments, "--rho_max=0.5", "--rho_min=0.5", expect=2)
    assert "experts of another kind" in done.stderr and "rho_max (0.01 there, 0.5 here)" in done.stderr
    # They are not matched either, where someone copied both kinds into one folder.
    call("buffer/buffer_FTD.py", *toy.train, "--rho_max=0.5", "--rho_min=0.5", f"--buffer_path={tmp_path / 'other'}")
    for path in (tmp_path / "other").rglob("replay_buffer_0.*"):
        shutil.copy(path, tmp_path / "experts" / TOY_EXPERTS / f"replay_buffer_2{path.suffix}")
    done = call("distill/DATM.py", *toy.distil, f"--buffer_path={tmp_path / 'experts'}", f"--log_path={tmp_path}",
                expect=2)
    assert "experts of another kind (replay_buffer_2.yaml)" in done.stderr and "rho_max" in done.stderr


def test_an_expert_that_did_not_learn_is_said_and_five_stop_the_run(call, toy, tmp_path):
    arguments = [*toy.train, "--lr_teacher=1e-9", "--num_experts=7", "--train_epochs=1", "--save_interval=1",
                 f"--buffer_path={tmp_path}"]
    with mock.patch("buffer.expert_run.AT_CHANCE", 3.0):  # of three classes: never above it
        for _ in range(2):  # those in files count, too, when the run is resumed
            done = call("buffer/buffer_FTD.py", *arguments, expect=2)
            assert "note: expert 4 did not learn" in done.stderr and "5 experts in a row did not learn" in done.stderr


def test_a_manifest_says_what_the_experts_are(toy_experts, toy_data):
    folder = toy_experts / TOY_EXPERTS
    manifest = yaml.safe_load((folder / "replay_buffer_0.yaml").read_text())
    assert manifest["sha256"] == files.sha256(folder / "replay_buffer_0.pt")
    assert [expert["number"] for expert in manifest["experts"]] == [0, 1]
    model = FlatModel(build_network("ConvNetD1W4", 3, 3, (8, 8)))

    def tested(snapshot):
        return accuracy(partial(model, flatten(snapshot)), toy_data.test_images, toy_data.test_labels)
    first, second = torch.load(folder / "replay_buffer_0.pt")
    assert [expert["test_accuracy"] for expert in manifest["experts"]] == [tested(first[-1]), tested(second[-1])]
    lines = [json.loads(line) for line in (folder / "replay_buffer_1.jsonl").read_text().splitlines()]
    assert [(line["expert"], line["epoch"]) for line in lines] == [(2, 1), (2, 2), (2, 3)]
    (third,) = torch.load(folder / "replay_buffer_1.pt")
    assert [line["test_accuracy"] for line in lines] == [tested(snapshot) for snapshot in third[1:]]


def test_experts_that_cannot_fit_are_refused_at_once(call, toy, tmp_path):
    arguments = [*toy.train, f"--buffer_path={tmp_path}"]
    done = call("buffer/buffer_FTD.py", *arguments, "--num_experts=1000000000", expect=2)
    assert "GB on the disk" in done.stderr and not list(tmp_path.rglob("*.pt"))
    with mock.patch("buffer.expert_run.available", lambda *_: 1e3):
        done = call("buffer/buffer_FTD.py", *arguments, expect=2)
    assert "--save_interval" in done.stderr


# --- distillation --------------------------------------------------------------------------------------------


STATEFUL = ["--Iteration=6", "--eval_it=2", "--ema", "--lr_param=log", "--lr_lr=1e-3", "--factor=2", "--run_name=run"]


@pytest.fixture(scope="module")
def distil_into(call, toy, toy_experts):
    def distil_into(log_path, *options, expect=0):
        arguments = [*toy.distil, f"--buffer_path={toy_experts}", *STATEFUL, f"--log_path={log_path}", *options]
        done = call("distill/DATM.py", *arguments, expect=expect)
        return done, log_path / TOY_RUN
    return distil_into


@pytest.fixture
def distil_to(distil_into, tmp_path):
    return lambda where, *options, expect=0: distil_into(tmp_path / where, *options, expect=expect)


@pytest.fixture(scope="module")
def whole(distil_into, tmp_path_factory):
    """The folder of a run that was never stopped; to be read only."""
    return distil_into(tmp_path_factory.mktemp("whole"))[1]


def without_times(result):
    return {name: value for name, value in json.loads(result.read_text()).items() if name != "seconds"}


@pytest.mark.parametrize("function, number", [
    *(("distill.distillation.match_trajectory", number) for number in (1, 4)),
    *(("distill.run_state.evaluate", number) for number in (1, 4, 6))])
def test_a_distillation_resumes_to_the_bit(distil_to, whole, function, number):
    with stop_at(function, number):
        done, parts = distil_to("parts", expect=130)
    assert (parts / "checkpoint.pt").exists() and "python distill/DATM.py" in done.stderr
    done, _ = distil_to("parts")
    assert "resuming at iteration" in done.stdout
    assert tensors_in(whole) == tensors_in(parts)
    assert without_times(whole / "result.json") == without_times(parts / "result.json")
    assert not (parts / ".lock").exists()


def test_a_stop_at_the_very_end_loses_nothing(distil_to, whole):
    for function in ("distill.conclusion.save_pictures", "distill.report.show.save_curves"):
        with stop_at(function, 1):
            distil_to(function, expect=130)
        done, parts = distil_to(function)
        assert "is finished" in done.stdout and tensors_in(whole) == tensors_in(parts)
        assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_run_on_its_way_is_shown_and_what_showed_it_is_renewed_at_the_end(distil_to, whole, monkeypatch):
    monkeypatch.setattr("distill.run_state.DRAW_SHARE", 1e9)
    with stop_at("distill.distillation.match_trajectory", 4):
        done, parts = distil_to("parts", expect=130)
    page, pictures = (parts / "report.html").read_text(), ("images.png", "curves.png", "evolution.webp")
    assert "not finished: this is how it was at iteration 2 of 6" in page and "could not be made" not in done.stderr
    assert all((parts / name).exists() for name in pictures)
    done, _ = distil_to("parts", "--Iteration=1", expect=2)
    assert "--Iteration 1: " in done.stderr and "is at iteration 4 already; give at least that" in done.stderr

    # A picture that fails gives a note and stops nothing; existing pages are still renewed.
    monkeypatch.setattr("distill.conclusion.save_pictures", mock.Mock(side_effect=RuntimeError("no pencil")))
    done, _ = distil_to("parts")
    assert "report.safetensors could not be made (RuntimeError: no pencil)" in done.stderr
    monkeypatch.undo()
    assert "is finished" in distil_to("parts")[0].stdout
    assert tensors_in(whole) == tensors_in(parts) and "not finished" not in (parts / "report.html").read_text()
    for name in pictures:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    # The pictures are made from other files; the checkpoint is not read in vain.
    (parts / "evolution.webp").unlink()
    with mock.patch("distill.run_folder.RunFolder.saved_state", mock.PropertyMock()) as reads:
        assert "is finished" in distil_to("parts")[0].stdout and not reads.called


def test_a_picture_that_fails_is_a_note_and_is_made_up_by_the_same_command(distil_to, monkeypatch):
    monkeypatch.setattr("distill.report.show.save_curves", mock.Mock(side_effect=RuntimeError("no pencil")))
    done, folder = distil_to("log")
    assert "curves.png could not be made (RuntimeError: no pencil)" in done.stderr
    assert (folder / "report.html").exists() and (folder / "result.json").exists()
    monkeypatch.undo()
    (folder / "report.html").unlink()
    (folder / "report.safetensors").unlink()
    done, _ = distil_to("log")
    assert "is finished" in done.stdout
    assert all((folder / name).exists() for name in ("report.html", "report.safetensors", "curves.png"))


@pytest.mark.parametrize("name, content", [("report.html", "mine"), ("config.yaml", "mine: yaml\n")])
def test_a_folder_of_somebody_elses_files_is_no_runs(distil_to, tmp_path, name, content):
    folder = tmp_path / "log" / TOY_RUN
    folder.mkdir(parents=True)
    (folder / name).write_text(content)
    for options in ([], ["--resume=never"]):
        done, _ = distil_to("log", *options, expect=2)
        assert name in done.stderr and (folder / name).read_text() == content


def test_whatever_a_user_has_set_for_pictures_and_named_classes_a_run_finishes(run, toy, toy_experts, tmp_path):
    """A missing notebook backend, a user's matplotlibrc, and class names that no font can show."""
    data = shutil.copytree(toy.data, tmp_path / "data")
    for split in ("train", "test"):
        for name, odd in (("blue", b"a\xff"), ("green", b"b $\\frac{$"), ("red", b"c\n")):
            os.rename(data / split / name, os.fsencode(data / split) + b"/" + odd)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: nowhere\n")
    with mock.patch.dict(os.environ, MPLBACKEND="module://nowhere.backend", MATPLOTLIBRC=str(tmp_path)):
        done = run("distill/DATM.py", *toy.distil, f"--data_path={data}", f"--buffer_path={toy_experts}",
                   "--Iteration=0", f"--log_path={tmp_path}")
    (folder,) = tmp_path.glob("ImageFolder/2/ConvNetD1W4/*")
    assert "could not" not in done.stderr and all((folder / name).exists() for name in ("images.png", "report.html"))


def test_a_result_put_beside_an_unfinished_run_is_not_one_that_it_had(distil_to):
    with stop_at("distill.distillation.match_trajectory", 2):
        _, folder = distil_to("beside", expect=130)
    (folder / "result_random.json").write_text("{}")
    done, _ = distil_to("beside", "--resume=never")
    assert "starting over" in done.stderr


def test_a_finished_run_goes_on_for_more_iterations(distil_to, whole):
    _, parts = distil_to("parts", "--Iteration=4")
    (parts / "evaluation.json").write_text("the test of its set")
    with stop_at("distill.distillation.match_trajectory", 2):
        done, _ = distil_to("parts", expect=130)
    assert "resuming at iteration 4" in done.stdout
    done, _ = distil_to("parts", "--resume=never", expect=2)
    assert "holds a finished run that is being extended, which --resume never would discard" in done.stderr
    assert (parts / "evaluation_4.json").exists() and not (parts / "evaluation.json").exists()
    assert set_files(str(parts))[0].endswith("images_best.pt")  # not the shorter run's distilled.safetensors
    distil_to("parts")
    assert tensors_in(whole) == tensors_in(parts)
    assert without_times(whole / "result.json") == without_times(parts / "result.json")
    assert without_times(parts / "result_4.json")["best"]["iteration"] <= 4
    assert "is finished" in distil_to("parts", "--Iteration=4")[0].stdout
    done, _ = distil_to("parts", "--resume=never", "--lr_y=3", "--Iteration=8", expect=2)
    assert "holds a finished run of other options: lr_y" in done.stderr and "--resume never" not in done.stderr
    assert "larger" not in distil_to("parts", "--resume=never", "--Iteration=8")[0].stdout

    # A refused continuation leaves the finished run as it is.
    log = (parts / "metrics.jsonl").rename(parts / "aside")
    done, _ = distil_to("parts", "--Iteration=8", expect=2)
    assert "metrics.jsonl is gone" in done.stderr and "--resume never" not in done.stderr
    log.rename(parts / "metrics.jsonl")
    assert "is finished" in distil_to("parts")[0].stdout

    # A continued run that was stopped before its pictures does not keep the old ones.
    before = (parts / "report.html").read_text()
    with stop_at("distill.conclusion.save_pictures", 1):
        distil_to("parts", "--Iteration=7", expect=130)
    assert "is finished" in distil_to("parts", "--Iteration=7")[0].stdout
    assert (parts / "report.html").read_text() != before and (parts / "images.png").exists()
    config = (parts / "config.yaml").rename(parts / "aside")
    done, _ = distil_to("parts", "--lr_img=7", expect=2)
    assert "holds a finished run without its config.yaml" in done.stderr
    config.rename(parts / "config.yaml")
    assert {path.name for path in parts.glob("result*.json")} == {"result.json", "result_4.json", "result_6.json"}
    (parts / "checkpoint.pt").write_bytes((parts / "checkpoint.pt").read_bytes()[:-100])
    (parts / "report.safetensors").unlink()
    done, _ = distil_to("parts", "--Iteration=7")
    assert "has no report.safetensors, which cannot be made again: " in done.stderr and "is finished" in done.stdout
    (parts / "Normal" / "distilled.safetensors").unlink()
    (parts / "checkpoint.pt").unlink()
    done, _ = distil_to("parts", "--Iteration=7")
    assert "cannot be made again: there is no checkpoint.pt" in done.stderr and "larger --Iteration" not in done.stdout
    done, _ = distil_to("parts", "--Iteration=8", expect=2)
    assert "without its checkpoint.pt; give another --run_name and --pix_init what evaluation.py --data_dir" in (
        done.stderr)  # its set was deleted above
    (parts / "result.json").rename(parts / "result_7.json")  # as in a continued run that was stopped
    done, _ = distil_to("parts", "--Iteration=8", expect=2)
    assert "without its checkpoint.pt; give another --run_name" in done.stderr and (parts / "metrics.jsonl").exists()


def test_a_run_starts_from_a_saved_set(distil_to, toy_data, tmp_path):
    _, folder = distil_to("log")
    start = f"--pix_init={folder}/Normal/distilled.safetensors"
    done, again = distil_to("again", start, "--Iteration=0", "--lr_teacher=0.2")
    assert re.search(r"rate starts at 0\.\d+, that of the set of --pix_init, and not at --lr_teacher 0\.2", done.stderr)
    for name, tensor in load_file(folder / "Normal/distilled.safetensors").items():
        assert torch.equal(load_file(again / "Normal/distilled.safetensors")[name], tensor)
    assert "image of a saved set that it started from" in (again / "report.html").read_text()
    done, _ = distil_to("other", start, "--ipc=1", expect=2)
    assert "holds 6 images; --ipc 1 of 3 classes are 3" in done.stderr
    # Of a set in another order, a run would take the places for the classes.
    whole = DistilledSet.load(folder / "Normal/distilled.safetensors")
    options = {name: value for name, value in whole.config.items() if name != "ipc"}
    other = replace(whole, labels=5 * torch.eye(3)[[2, 1, 0, 2, 1, 0]].repeat_interleave(4, 0))
    other.save_whole(tmp_path / "x.safetensors", toy_data, options)
    done, _ = distil_to("other", f"--pix_init={tmp_path / 'x.safetensors'}", expect=2)
    assert "its images are not sorted by class, 2 of each; sort them" in done.stderr
    # Classes are no labels to learn.
    hard = replace(whole, labels=torch.arange(3).repeat_interleave(8))
    hard.save_whole(tmp_path / "y.safetensors", toy_data, options)
    done, _ = distil_to("other", f"--pix_init={tmp_path / 'y.safetensors'}", expect=2)
    assert "holds classes and no soft labels; give a set with soft labels, or --labels hard" in done.stderr


def test_a_run_goes_on_where_its_data_and_experts_lie_elsewhere_now(call, toy, toy_experts, tmp_path):
    arguments = [*toy.distil, f"--log_path={tmp_path / 'log'}"]
    with stop_at("distill.distillation.match_trajectory", 3):
        call("distill/DATM.py", *arguments, f"--buffer_path={toy_experts}", expect=130)
    data, experts = (shutil.copytree(each, tmp_path / name) for each, name in ((toy.data, "d"), (toy_experts, "e")))
    done = call("distill/DATM.py", *arguments, f"--buffer_path={experts}", f"--data_path={data}")
    assert "resuming at iteration" in done.stdout
    # With other experts it is another run.
    for path in experts.rglob("replay_buffer_1.*"):
        path.unlink()
    done = call("distill/DATM.py", *arguments, f"--buffer_path={experts}", f"--data_path={data}")
    assert "resuming" not in done.stdout and "is finished" not in done.stdout


@pytest.mark.filterwarnings("error")  # pytest warns of exceptions that are only printed
def test_a_log_that_an_editor_touched_is_refused_in_a_line(distil_to):
    with stop_at("distill.run_state.evaluate", 3):
        _, folder = distil_to("log", expect=130)
    (folder / "metrics.jsonl").write_bytes(b"\n" + (folder / "metrics.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    done, _ = distil_to("log", expect=2)
    assert "metrics.jsonl" in done.stderr and "Traceback" not in done.stderr


def test_no_expert_is_lost_whose_epochs_were_removed(call, toy, tmp_path):
    arguments = [*toy.train, "--save_interval=3", f"--buffer_path={tmp_path}"]
    def train_and_lose_one(run, number, *rest):
        train_one(run, number, *rest)
        if number == 1:
            (run.saved(0).folder / "epoch_0.pt").unlink()
    with mock.patch("buffer.expert_run.train_one", train_and_lose_one):
        done = call("buffer/buffer_FTD.py", *arguments, expect=2)
    assert "epochs of expert 0 are gone" in done.stderr and not list(tmp_path.rglob("replay_buffer_*"))
    call("buffer/buffer_FTD.py", *arguments)
    (path,) = tmp_path.rglob("replay_buffer_*.pt")
    assert len(torch.load(path)) == 3


def test_no_output_is_an_input_or_another_file(call, toy, toy_experts, distil_to, tmp_path):
    _, folder = distil_to("log")
    whole, expert_file = folder / "Normal/distilled.safetensors", toy_experts / TOY_EXPERTS / "replay_buffer_0.pt"
    evaluation = ["distill/evaluation.py", *toy.evaluate, f"--data_dir={whole}"]
    before = {path: path.read_bytes() for path in (*folder.rglob("*"), expert_file) if path.is_file()}
    for command, said in (
            ([*evaluation, f"--json={whole}"], "--json"), ([*evaluation, f"--save={whole}"], "--save"),
            ([*evaluation, f"--json={tmp_path}/x", f"--save={tmp_path}/x"], "is the file of --"),
            ([*evaluation, f"--json={folder}/result.json"], "holds something else"),
            ([*evaluation, f"--json={folder}/metrics.jsonl"], "holds something else"),
            ([*evaluation, f"--save={folder}/report.safetensors"], "holds something else"),
            (["scripts/measure/precision.py", f"--json={folder}/result.json"], "holds something else"),
            (["scripts/inspect_buffer.py", expert_file.parent, f"--json={tmp_path}/x", f"--png={tmp_path}/x"],
             "is the file of --"),
            (["distill/baseline.py", *toy.evaluate, f"--json={expert_file}"], "holds something else"),
            (["scripts/inspect_buffer.py", expert_file.parent, f"--png={expert_file}"], "holds something else"),
            (["scripts/inspect_buffer.py", expert_file.parent, f"--json={folder}/result.json"], "holds something else"),
            (["scripts/report.py", folder, f"--out={folder}/result.json"], "holds something else")):
        assert said in call(*command, expect=2).stderr
    assert before == {path: path.read_bytes() for path in before} and not (tmp_path / "x").exists()


def test_a_second_signal_in_the_middle_of_a_step_goes_back_to_what_was_saved(distil_to, whole):
    update = Distillation.update

    def half(self, match):
        update(self, match)
        raise Stopped(signal.SIGTERM)
    with mock.patch.object(Distillation, "update", half):
        distil_to("parts", expect=143)
    _, parts = distil_to("parts")
    assert tensors_in(whole) == tensors_in(parts)


def test_a_run_without_a_name_names_one_that_was_begun_with_other_experts(call, toy, toy_experts, tmp_path):
    options = ["distill/DATM.py", *toy.distil, f"--log_path={tmp_path / 'log'}"]
    with stop_at("distill.distillation.match_trajectory", 2):
        call(*options, f"--buffer_path={toy_experts}", expect=130)
    fewer = shutil.copytree(toy_experts, tmp_path / "fewer")
    for path in fewer.rglob("replay_buffer_1.*"):
        path.unlink()
    assert "an unfinished run of these options with other experts" in call(*options, f"--buffer_path={fewer}").stderr
    done = call(*options, f"--buffer_path={toy_experts}")
    assert "resuming at iteration" in done.stdout and "unfinished" not in done.stderr


def test_resume_never_starts_over(distil_to, whole):
    with stop_at("distill.distillation.match_trajectory", 4):
        distil_to("parts", expect=130)
    done, parts = distil_to("parts", "--resume=never")
    assert "resuming" not in done.stdout and tensors_in(whole) == tensors_in(parts)


def test_networks_of_a_discarded_run_do_not_count(distil_to, whole):
    """Not even if another rank's file is left and the set is the same."""
    with stop_at("distill.evaluate.networks.train_network", 2):
        _, parts = distil_to("parts", "--epoch_eval_train=3", expect=130)
    (parts / "Normal.unfinished").rename(parts / "Normal.unfinished.1")
    distil_to("parts", "--resume=never")
    assert tensors_in(whole) == tensors_in(parts) and not list(parts.glob("*.unfinished*"))


def test_a_finished_run_is_no_answer_for_other_data(distil_to, toy_experts):
    distil_to("parts")
    folder = toy_experts / TOY_EXPERTS
    added = [folder / f"replay_buffer_2.{kind}" for kind in ("pt", "yaml")]
    try:
        for path in added:  # first without its manifest, then with it
            shutil.copy(path.with_stem("replay_buffer_0"), path)
            done, _ = distil_to("parts", expect=2)
            assert "is finished, and was made of other images, experts" in done.stderr
        done, _ = distil_to("parts", "--Iteration=8", expect=2)
        assert "was begun with other data: replay_buffer_2.pt (new)" in done.stderr
        assert "--resume never" not in done.stderr  # which would discard a finished run
    finally:
        for path in added:
            path.unlink(missing_ok=True)
    assert "is finished" in distil_to("parts")[0].stdout


def test_a_run_goes_on_only_with_what_it_had(distil_to, toy_experts, tmp_path, bomb):
    with stop_at("distill.distillation.match_trajectory", 4):
        _, folder = distil_to("parts", expect=130)
    done, _ = distil_to("parts", "--lr_y=3", expect=2)
    assert "lr_y (1.0 there, 3.0 here)" in done.stderr
    added = toy_experts / TOY_EXPERTS / "replay_buffer_2.pt"
    try:
        shutil.copy(added.with_name("replay_buffer_0.pt"), added)
        done, _ = distil_to("parts", expect=2)
    finally:
        added.unlink()
    assert "was begun with other data: replay_buffer_2.pt (new); restore what it had, move away" in done.stderr

    checkpoint = folder / "checkpoint.pt"
    undamaged = checkpoint.read_bytes()
    torch.save(bomb, tmp_path / "bomb.pt")
    code = (tmp_path / "bomb.pt").read_bytes()
    for damaged, said in ((undamaged[:-100], "cannot be read"), (code, "would run code")):
        checkpoint.write_bytes(damaged)
        done, _ = distil_to("parts", expect=2)
        assert said in done.stderr and "--resume never" in done.stderr and not bomb.went_off
    torch.save([1], checkpoint)
    done, _ = distil_to("parts", expect=2)
    assert "not a checkpoint" in done.stderr
    checkpoint.write_bytes(undamaged)
    (folder / "metrics.jsonl").write_text("")
    done, _ = distil_to("parts", expect=2)
    assert "is gone, or shorter" in done.stderr


def test_an_unroll_that_cannot_fit_is_refused_at_once(distil_to):
    with mock.patch("distill.checks.available", lambda *_: 1e4):
        done, _ = distil_to("small", "--matching=unroll", expect=2)
    assert "GB are free on cpu" in done.stderr and "--matching exact" in done.stderr


# --- expert files that are not what they were ---------------------------------------------------------------------


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def put_nan(path):
    experts = torch.load(path)
    experts[1][2][0].view(-1)[3] = torch.nan
    torch.save(experts, path)


@pytest.mark.parametrize("damage, manifest, said", [
    (flip_a_bit, True, "is damaged"), (put_nan, True, "is damaged"),
    (put_nan, False, "expert 1 of .* is not finite after epoch 2")])
def test_changed_expert_files_are_refused(call, toy, toy_experts, tmp_path, damage, manifest, said):
    kept = None if manifest else shutil.ignore_patterns("*.yaml")
    shutil.copytree(toy_experts, tmp_path / "experts", ignore=kept)
    damage(tmp_path / "experts" / TOY_EXPERTS / "replay_buffer_0.pt")
    done = call("distill/DATM.py", *toy.distil, f"--buffer_path={tmp_path / 'experts'}", f"--log_path={tmp_path}",
                expect=2)
    assert re.search(said, done.stderr)


def test_experts_of_another_type_are_refused(call, toy, toy_experts, tmp_path):
    shutil.copytree(toy_experts, tmp_path / "experts", ignore=shutil.ignore_patterns("*.yaml"))
    path = tmp_path / "experts" / TOY_EXPERTS / "replay_buffer_0.pt"
    torch.save([[[tensor.double() for tensor in snapshot] for snapshot in expert] for expert in torch.load(path)], path)
    done = call("distill/DATM.py", *toy.distil, f"--buffer_path={tmp_path / 'experts'}", expect=2)
    assert "torch.float64; float32 is needed" in done.stderr


# --- evaluation ----------------------------------------------------------------------------------------------


def test_an_evaluation_goes_on_at_the_next_network(call, toy, tmp_path):
    arguments = [*toy.evaluate, "--num_eval=3", "--ipc=2"]
    call("distill/baseline.py", *arguments, f"--json={tmp_path / 'whole.json'}")
    with stop_at("distill.evaluate.networks.train_network", 3):
        done = call("distill/baseline.py", *arguments, f"--json={tmp_path / 'parts.json'}", expect=130)
    assert "resumes from the networks that were tested: python distill/baseline.py --dataset" in done.stderr
    assert (tmp_path / "parts.json.unfinished").exists() and not (tmp_path / "parts.json").exists()
    with stop_at("distill.evaluate.networks.train_network", 2):  # only one network is left
        done = call("distill/baseline.py", *arguments, f"--json={tmp_path / 'parts.json'}")
    assert "2 of 3 networks were tested" in done.stdout and not (tmp_path / "parts.json.unfinished").exists()
    whole, parts = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "parts.json"))
    assert whole["scores"] == parts["scores"]


def test_what_saves_nothing_promises_nothing(call, toy, toy_experts, tmp_path):
    experts = [f"--buffer_path={toy_experts}", f"--log_path={tmp_path}"]
    look = ["scripts/inspect_buffer.py", toy_experts / TOY_EXPERTS]
    for function, command in (
            ("distill.evaluate.networks.train_network", ["distill/baseline.py", *toy.common, "--ipc=2"]),
            ("distill.distillation.match_trajectory", ["distill/DATM.py", *toy.distil, *experts, "--dry_run"]),
            ("buffer.manifests.expert_files", look),
            ("distill.suggest.initial_set", [*look, "--suggest", "--ipc=2"]),
            ("distill.report.read_run.read_config", ["scripts/report.py", tmp_path])):
        (tmp_path / "config.yaml").touch(), (tmp_path / "metrics.jsonl").touch()
        with stop_at(function, 1):
            done = call(*command, expect=130)
        lost = ". The networks that were tested are lost; with --json FILE they are kept, and it resumes from them"
        assert done.stderr.splitlines()[-1].endswith(
            f": stopped by SIGINT; every file is whole{lost if 'baseline' in command[0] else ''}")


@pytest.mark.parametrize("damaged", [False, True])
def test_what_another_evaluation_found_does_not_count_nor_what_is_damaged(call, toy, tmp_path, damaged):
    arguments = [*toy.evaluate, "--num_eval=3", f"--json={tmp_path / 'x.json'}"]
    with stop_at("distill.evaluate.networks.train_network", 3):
        call("distill/baseline.py", *arguments, "--ipc=2", expect=130)
    unfinished = tmp_path / "x.json.unfinished"
    if damaged:
        unfinished.write_text(unfinished.read_text()[:-9])
    done = call("distill/baseline.py", *arguments, f"--ipc={2 if damaged else 3}")
    assert "networks were tested" not in done.stdout and not unfinished.exists()


# --- two runs, and signals -----------------------------------------------------------------------------------


def test_two_runs_keep_out_of_one_folder(call, toy, distil_to, tmp_path):
    with locks.locked(tmp_path / "experts" / TOY_EXPERTS, "-"):
        done = call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path / 'experts'}", expect=2)
    assert f"another run (process {os.getpid()}" in done.stderr and "another --buffer_path" in done.stderr
    folder = tmp_path / "log" / TOY_RUN
    with locks.locked(folder, "-"):
        done, _ = distil_to("log", expect=2)
    assert "another run" in done.stderr and "another --run_name" in done.stderr
    distil_to("log")  # the lock is gone


def test_a_lock_is_let_go_of_by_a_process_that_is_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from utils.program.locks import locked\n" \
           "with locked(Path(sys.argv[1]), '-'): print('in', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"), locks.locked(tmp_path, "-"):
        pass
    holder.kill()
    holder.wait()
    with locks.locked(tmp_path, "-"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_the_first_signal_waits_and_the_second_does_not(number, capfd):
    with handlers_as_before():
        interrupt.install()
        with pytest.raises(Stopped) as stopped, interrupt.deferred():
            os.kill(os.getpid(), number)
            reached = True
            interrupt.check()
        assert reached and stopped.value.waited and stopped.value.signal == number
        assert "send it again to stop at once" in capfd.readouterr().err
        interrupt.install()
        with pytest.raises(Stopped) as stopped, interrupt.deferred():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            pytest.fail("the second signal did not stop it")
        assert not stopped.value.waited
        interrupt.install()
        with pytest.raises(Stopped) as stopped, interrupt.deferred():
            os.kill(os.getpid(), number)
            raise RuntimeError("the compiler was stopped too")  # it got the terminal's Ctrl-C as well
        assert not stopped.value.waited
        interrupt.install()
        with pytest.raises(Stopped):  # outside `deferred`, the first signal stops at once
            os.kill(os.getpid(), number)


# --- memory --------------------------------------------------------------------------------------------------


def test_a_full_gpu_halves_the_micro_batch_and_the_step_is_done_again(capsys):
    torch.manual_seed(0)
    model = FlatModel(build_network("ConvNetD1W4", 1, 3, (8, 8)).double(), "plain")
    theta, x, y = model.flatten(), torch.randn(8, 1, 8, 8).double(), torch.randn(8, 3).double()
    expected = model.gradient(theta, x, y)
    forward, sizes = model.engine.forward, []

    def small(theta, x):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("full")
        return forward(theta, x)
    model.engine.forward = small
    for one, other in zip(model.gradient(theta, x, y), expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert sizes == [8, 4, 2, 2, 2, 2] and capsys.readouterr().err.count("the GPU's memory is full") == 2
    resumed = FlatModel(model.network, "plain")  # rounds as the run before
    resumed.restore(model.state())
    assert resumed.engine.micro_batch == 2

    def never(theta, x):
        raise torch.OutOfMemoryError("full")
    model.engine.forward = never
    with pytest.raises(torch.OutOfMemoryError):
        model.gradient(theta, x, y)


def test_what_cannot_be_halved_is_one_line(call, toy, tmp_path):
    with mock.patch("buffer.experts.gsam_gradient", side_effect=torch.OutOfMemoryError("CUDA out of memory")):
        done = call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", expect=2)
    assert "the GPU's memory is full" in done.stderr and "--micro_batch" in done.stderr
    assert "Traceback" not in done.stderr
