"""DD-Ranking's scores, hard labels, and the table of sets and networks."""

import json
import math
import re

import pytest
import torch
from helpers import TOY_RUN, check_refusal, stop_at

from distill.evaluate.parts import HELD_OUT, RATES, held_out
from distill.evaluate.robust import robust_scores, scaled
from distill.evaluate.train import train_network

EVALUATION, BASELINE = "distill/evaluation.py", "distill/baseline.py"
TRAINING = "distill.evaluate.networks.train_network"


def test_the_formulas():
    assert scaled(-1) == 0 and scaled(1) == 1
    assert scaled(0) == pytest.approx(1 / (1 + math.e))  # = (1 − 1/e) / (e − 1/e)
    assert scaled(-0.05) == pytest.approx((math.exp(-0.05) - math.exp(-1)) / 2.3504023873)
    # 0.5 · (0.7 − 0.5) − 0.5 · (0.9 − 0.6) = −0.05, and 0.5 · 0.2 + 0.5 · (0.6 − 0.3) = 0.25
    at = {"syn": 0.7, "syn_hard": 0.6, "random": 0.5, "real": 0.9, "syn_no_aug": 0.6, "random_no_aug": 0.3}
    assert robust_scores(at) == pytest.approx(
        {"HLR": 0.3, "IOR": 0.2, "LRS": scaled(-0.05), "IOR_no_aug": 0.3, "ARS": scaled(0.25)})
    best = {"syn": 1, "syn_hard": 1, "random": 0, "real": 0, "syn_no_aug": 1, "random_no_aug": 0}
    assert robust_scores(best)["LRS"] == robust_scores(best)["ARS"] == 1


@pytest.fixture(scope="module")
def results(call, toy, toy_experts, tmp_path_factory):
    """A folder with three results for a set of two images per class, each made by its own command."""
    folder = tmp_path_factory.mktemp("results")
    call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={folder}", "--run_name=run",
         "--skip_first_eva")
    distilled = folder / TOY_RUN / "Normal" / "distilled.safetensors"
    evaluate = [*toy.evaluate, "--eval_mode=C", "--batch_train=128"]
    syn = [EVALUATION, *evaluate, f"--data_dir={distilled}"]
    for name, command in {"syn": syn, "syn_hard": [*syn, "--hard_labels"],
                          "real": [BASELINE, *evaluate, "--ipc=None", "--epoch_eval_train=1"]}.items():
        call(*command, f"--json={folder / name}.json")
    return folder


def test_hard_labels_are_those_that_were_said(call, toy, results, tmp_path):
    """The same accuracies as with a file of these classes."""
    folder = results / TOY_RUN / "Normal"
    torch.save(torch.arange(3).repeat_interleave(2), tmp_path / "classes.pt")
    call(EVALUATION, *toy.evaluate, "--eval_mode=C", f"--data_dir={folder / 'images_best.pt'}",
         f"--label_dir={tmp_path / 'classes.pt'}", f"--lr_dir={folder / 'lr_best.pt'}", f"--json={tmp_path / 'x.json'}")
    hard = json.loads((results / "syn_hard.json").read_text())
    assert json.loads((tmp_path / "x.json").read_text())["scores"] == hard["scores"]
    assert hard["what"] == "distilled images with hard labels" and hard["images"] == 6
    assert hard["config"]["hard_labels"] is True
    three = [f"--{option}_dir={folder / f'{name}_best.pt'}" for option, name in (
        ("data", "images"), ("label", "labels"), ("lr", "lr"))]
    said = call(EVALUATION, *toy.evaluate, *three, "--hard_labels").stdout
    assert "classes are taken from the order of the images" in said


def test_networks_are_columns(call, results):
    text = call("scripts/summary.py", results / "syn.json", results / "real.json", "--by_network").stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text]
    assert cells[0] == ["set", "images", "ConvNetD1W4", "ConvNet"]
    assert [row[:2] for row in cells[2:]] == [["distilled images", "6"], ["the whole training set", "72"]]
    assert all(re.fullmatch(r"\d+\.\d\d", cell) for row in cells[2:] for cell in row[2:])  # no ± over one network


# --- all of it by one command --------------------------------------------------------------------------------

WHICH = ("syn", "syn_hard", "random", "syn_no_aug", "random_no_aug", "real")


@pytest.fixture
def robust(toy, toy_experts, results, tmp_path):
    """The command for the set of `results`; options appended to it take precedence."""
    distilled = results / TOY_RUN / "Normal" / "distilled.safetensors"
    return [EVALUATION, *toy.evaluate, f"--data_dir={distilled}", "--robust_score", f"--buffer_path={toy_experts}",
            "--epoch_eval_real=1", f"--json={tmp_path / 'robust.json'}"]


def test_one_command_says_what_six_say(call, toy, toy_experts, results, robust, tmp_path):
    done = call(*robust, "--eval_mode=C", "--num_eval=2")
    found = json.loads((tmp_path / "robust.json").read_text())
    assert tuple(found["results"]) == WHICH and list(found["robust_scores"]) == ["ConvNetD1W4", "ConvNet"]
    assert found["scores"] == found["results"]["syn"]["scores"] and found["what"] == found["results"]["syn"]["what"]
    evaluate = [*toy.evaluate, "--batch_train=128", "--num_eval=2"]
    folder = results / TOY_RUN / "Normal"
    best = {name: part["lr"]["ConvNetD1W4"] for name, part in found["results"].items()}
    # A set without its own learning rate is trained with --lr_teacher.
    syn = [EVALUATION, *evaluate, f"--data_dir={folder / 'distilled.safetensors'}"]
    hard = [EVALUATION, *evaluate, f"--data_dir={folder / 'images_best.pt'}", "--hard_labels",
            f"--label_dir={tmp_path / 'classes.pt'}", f"--lr_teacher={best['syn_hard']}"]
    torch.save(torch.arange(3).repeat_interleave(2), tmp_path / "classes.pt")
    random = [BASELINE, *evaluate, "--ipc=2", "--label_source=experts", f"--buffer_path={toy_experts}"]
    for name, command in {
            "syn": syn, "syn_no_aug": [*syn, "--no_aug"], "syn_hard": hard,
            "random": [*random, f"--lr_teacher={best['random']}"],
            "random_no_aug": [*random, "--no_aug", f"--lr_teacher={best['random_no_aug']}"],
            "real": [BASELINE, *evaluate, "--ipc=None", "--epoch_eval_train=1"]}.items():
        call(*command, f"--json={tmp_path / name}.json")
        (alone,) = json.loads((tmp_path / f"{name}.json").read_text())["scores"]
        assert found["results"][name]["scores"][0] == alone, name
        assert found["results"][name]["images"] == json.loads((tmp_path / f"{name}.json").read_text())["images"]
    assert "distilled images" in call("scripts/summary.py", tmp_path / "robust.json").stdout
    scores = found["robust_scores"]["ConvNetD1W4"]
    means = {name: part["scores"][0]["mean"] for name, part in found["results"].items()}
    assert scores == robust_scores(means) and set(scores) == {"HLR", "IOR", "LRS", "IOR_no_aug", "ARS"}
    assert f"ConvNetD1W4: HLR {100 * scores['HLR']:.2f} %" in done.stdout


def test_a_rate_is_the_best_on_images_held_out(call, robust, tmp_path, toy_data, monkeypatch):
    """By the mean of all networks, as a single one says little."""
    trained = []
    monkeypatch.setattr(TRAINING, lambda *given, **more: trained.append(1) or train_network(*given, **more))
    call(*robust, "--num_eval=2")
    assert len(trained) == 2 * (6 + 3 * len(RATES))
    results = json.loads((tmp_path / "robust.json").read_text())["results"]
    searched = {name for name, part in results.items() if "held_out" in part}
    assert searched == {"syn_hard", "random", "random_no_aug"}
    for name in searched:
        reached = results[name]["held_out"]["ConvNetD1W4"]
        assert tuple(map(float, reached)) == RATES
        assert float(max(reached, key=reached.get)) == results[name]["lr"]["ConvNetD1W4"]
    assert results["real"]["lr"]["ConvNetD1W4"] == pytest.approx(0.01) and results["real"]["images"] == 72

    used = torch.tensor([0, 5, 30, 70])
    chosen = held_out(toy_data, used, torch.Generator().manual_seed(0))
    assert chosen.test_labels.bincount().tolist() == 3 * [round(HELD_OUT * 24)]
    same = (toy_data.train_images[:, None] == chosen.test_images[None]).flatten(2).all(2)
    assert same.any(0).all() and not same[used].any()


def test_it_goes_on_at_the_next_network(call, robust, tmp_path):
    call(*robust)
    whole = json.loads((tmp_path / "robust.json").read_text())
    (tmp_path / "robust.json").unlink()
    with stop_at(TRAINING, 5):
        call(*robust, expect=130)
    assert (tmp_path / "robust.json.unfinished").exists() and not (tmp_path / "robust.json").exists()
    number = 6 + 3 * len(RATES)
    with stop_at(TRAINING, number - 4 + 1):  # one more than are left, so it is not reached
        done = call(*robust)
    assert f"4 of {number} networks were tested" in done.stdout
    assert not (tmp_path / "robust.json.unfinished").exists()
    parts = json.loads((tmp_path / "robust.json").read_text())
    assert parts["robust_scores"] == whole["robust_scores"] and parts["results"] == whole["results"]


def test_experts_with_a_hold_out_choose_and_label_among_what_they_saw(call, toy, robust, tmp_path):
    """In both programs; they still test on the test images."""
    call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", "--val_fraction=0.25", "--num_experts=1")
    said = "the experts held out 0.25 of the training images; real images are taken from the others"
    assert said in call(*robust, f"--buffer_path={tmp_path}").stdout
    found = json.loads((tmp_path / "robust.json").read_text())
    assert found["results"]["real"]["images"] == 72  # all
    best = found["results"]["random"]["lr"]["ConvNetD1W4"]
    done = call(BASELINE, *toy.evaluate, "--batch_train=128", "--ipc=2", "--label_source=experts",
                f"--buffer_path={tmp_path}", f"--lr_teacher={best}", f"--json={tmp_path / 'random.json'}")
    assert said in done.stdout and found["tested_on"] == "test"
    assert json.loads((tmp_path / "random.json").read_text())["scores"] == found["results"]["random"]["scores"]


def test_a_set_of_hard_labels_is_compared_with_such(call, toy, results, tmp_path):
    """Random images then have their own hard labels, and no experts are needed."""
    folder = results / TOY_RUN / "Normal"
    torch.save(torch.arange(3).repeat_interleave(2), tmp_path / "classes.pt")
    call(EVALUATION, *toy.evaluate, f"--data_dir={folder / 'images_best.pt'}", f"--label_dir={tmp_path / 'classes.pt'}",
         "--robust_score", "--epoch_eval_real=1", f"--buffer_path={tmp_path}",
         f"--json={tmp_path / 'robust.json'}")
    assert json.loads((tmp_path / "robust.json").read_text())["results"]["random"]["what"] == (
        "2 random real images per class")


@pytest.mark.parametrize("options, phrases", [
    (["--hard_labels"], ["--robust_score with --hard_labels", "leave it out"]),
    (["--no_aug"], ["--robust_score with --no_aug"]),
    (["--buffer_path=nowhere"], ["no replay_buffer_*.pt in", "give another --buffer_path"]),
    (["--model=ConvNetD1W8"], ["no replay_buffer_*.pt in", "ConvNetD1W8"]),
    (["another.safetensors"], ["unexpected argument 'another.safetensors'"]),
    (["--epoch_eval_real=0"], ["--epoch_eval_real 0"])])
def test_what_has_no_score_is_refused(call, robust, options, phrases):
    check_refusal(call(*robust, *options, expect=2), *phrases)


def test_a_set_of_unequal_classes_or_of_all_images_has_no_score(call, toy, toy_experts, tmp_path):
    for count, phrase in ((4, "4 images of 3 classes cannot be compared"), (72, "leave 0 of class blue, and")):
        torch.save(torch.zeros(count, 3, 8, 8), tmp_path / "images.pt")
        torch.save(torch.zeros(count, 3), tmp_path / "labels.pt")
        done = call(EVALUATION, *toy.evaluate, f"--data_dir={tmp_path / 'images.pt'}", "--robust_score",
                    f"--label_dir={tmp_path / 'labels.pt'}", f"--buffer_path={toy_experts}", expect=2)
        check_refusal(done, phrase)


def test_only_a_set_has_a_score(call, toy):
    check_refusal(call(BASELINE, *toy.evaluate, "--robust_score", expect=2), "unknown option '--robust_score'")
