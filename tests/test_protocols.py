"""Evaluation by the papers' protocols, and at learning rates chosen on held-out images."""

import json
import re
import shutil

import pytest
import torch
from helpers import check_refusal, stop_at

from distill.evaluate.parts import RATES
from distill.evaluate.protocols import known
from utils.data import augment
from utils.parameters import sgd_step

EVALUATION = "distill/evaluation.py"
TRAINING = "distill.evaluate.networks.train_network"


@pytest.fixture
def folder(toy_data, tmp_path):
    """A folder with one set of toy images in the file layouts of DATM, DC and DSA."""
    torch.manual_seed(0)
    images, classes = toy_data.train_images[::12], toy_data.train_labels[::12]
    datm = tmp_path / "datm"
    datm.mkdir()
    for name, tensor in (("images", images), ("labels", 5 * torch.eye(3)[classes]), ("lr", torch.tensor(0.03))):
        torch.save(tensor, datm / f"{name}_best.pt")
    for name in ("res_DC_X_ConvNet_2ipc.pt", "res_DSA_X_ConvNet_2ipc.pt"):
        torch.save({"data": [[images, classes]]}, tmp_path / name)
    return tmp_path


@pytest.fixture
def evaluate(call, toy, folder):
    """Options → the JSON and the finished process; `--epoch_eval_train` is left to the protocol."""
    usual = [each for each in toy.evaluate if "epoch_eval_train" not in each]

    def evaluate(*options, data="datm", expect=0):
        done = call(EVALUATION, *usual, f"--data_dir={folder / data}", f"--json={folder / 'result.json'}", *options,
                    expect=expect)
        return json.loads((folder / "result.json").read_text()) if not expect else None, done

    return evaluate


# --- the protocols' numbers, from the papers and their code --------------------------------------------------

DSA = set(augment.GROUPS.values())


@pytest.mark.parametrize("data, options, trained", [  # epochs, batch, learning rate, augmentation
    ("datm", [], (1000, 128, 0.03, DSA)),
    ("datm", ["--lr_teacher=0.01"], (1000, 128, 0.01, DSA)),
    ("datm", ["--protocol=mtt"], (1000, 256, 0.03, DSA)),
    ("datm", ["--protocol=dc"], (300, 256, 0.01, set())),
    ("res_DC_X_ConvNet_2ipc.pt", ["--protocol=dc"], (300, 256, 0.01, set())),
    ("res_DSA_X_ConvNet_2ipc.pt", ["--protocol=dc"], (1000, 256, 0.01, DSA)),
    ("res_DSA_X_ConvNet_2ipc.pt", ["--protocol=dc", "--no_aug"], (300, 256, 0.01, set())),
    ("res_DSA_X_ConvNet_2ipc.pt", [], (1000, 128, 0.01, DSA)),
    ("res_DSA_X_ConvNet_2ipc.pt", ["--protocol=dc", "--dsa_strategy=none"], (300, 256, 0.01, set())),
    ("datm", ["--protocol=dc", "--dsa", "--lr_teacher=0.02"], (1000, 256, 0.02, DSA)),
    ("datm", ["--protocol=mtt", "--epoch_eval_train=7", "--batch_train=5", "--dsa=False"], (7, 5, 0.03, set())),
    ("datm", ["--protocol=dc", "--epoch_eval_train=1000", "--batch_train=128"], (1000, 128, 0.01, set()))])
def test_each_protocol_trains_as_published_but_for_what_is_given(evaluate, monkeypatch, data, options, trained):
    seen = []

    def train(model, theta, images, labels, lr, *, epochs, batch_size, draw, random, on_epoch):
        groups = {draw(2, random).operations for _ in range(100)} - {()}
        seen.append((epochs, batch_size, pytest.approx(lr), groups))
        return theta

    monkeypatch.setattr(TRAINING, train)
    result, done = evaluate(*options, data=data)
    assert [trained] == seen and result["lr"] == pytest.approx(trained[2])
    given = "--lr_teacher=0.01" in options
    assert ("--lr_teacher 0.01 is used in place of the set's own learning rate, 0.03" in done.stderr) == given


def test_dc_augments_as_its_table_says_and_trains_longer_then(evaluate, monkeypatch):
    """300 epochs without augmentation, 1000 with; DC augments only for ConvNetBN and on MNIST."""
    seen = []
    monkeypatch.setattr(TRAINING, lambda model, theta, *_, epochs, draw, random, **more: (
        seen.append((epochs, getattr(draw(2, random), "parameters", ()))), theta)[1])
    result, _ = evaluate("--protocol=dc", "--eval_mode=N")
    assert [score["network"] for score in result["scores"]] == [f"ConvNet{norm}N" if norm != "G" else "ConvNetGN"
                                                                for norm in ("N", "B", "L", "I", "G")]
    assert [(epochs, [*operations]) for epochs, operations in seen] == [
        (300, []), (1000, ["crop", "noise"]), (300, []), (300, []), (300, [])]
    assert known({"dataset": "MNIST", "protocol": "dc"})["epoch_eval_train"] == 1000


@pytest.mark.parametrize("protocol, before, after", [("dc", 152, 149), ("mtt", 502, 499)])
def test_the_optimiser_and_its_schedule(evaluate, monkeypatch, protocol, before, after):
    """Epochs 0 … E; after epoch E // 2 + 1 the rate is a tenth and the momentum is reset."""
    made = []

    def counted(theta, gradient, velocity, lr, momentum, weight_decay):
        if not made or made[-1][0] != lr:
            assert not velocity.any()
            made.append([lr, momentum, weight_decay, 0])
        made[-1][3] += 1
        sgd_step(theta, gradient, velocity, lr, momentum, weight_decay)

    monkeypatch.setattr("distill.evaluate.train.sgd_step", counted)
    evaluate(f"--protocol={protocol}")
    rate = 0.01 if protocol == "dc" else 0.03
    assert made == [[pytest.approx(rate), 0.9, 5e-4, before], [pytest.approx(rate / 10), 0.9, 5e-4, after]]


# --- several protocols, and rates by held-out images ---------------------------------------------------------


def test_several_protocols_by_one_command_are_what_each_is(evaluate, call, folder):
    options = ["--epoch_eval_train=4", "--num_eval=2", "--eval_mode=C"]
    both, done = evaluate("--protocol=dc,datm", *options)
    (folder / "result.json").rename(folder / "both.json")
    (line,) = re.findall("options: (.*)", done.stdout)
    assert "protocol dc,datm" in line and "epoch_eval_train 4" in line and "batch_train" not in line
    assert list(both["protocols"]) == ["dc", "datm"] and both["scores"] == both["protocols"]["dc"]["scores"]
    for protocol in both["protocols"]:
        alone, _ = evaluate(f"--protocol={protocol}", *options)
        assert alone["scores"] == both["protocols"][protocol]["scores"]
        for score in alone["scores"]:
            assert f"{protocol} · {score['network']}: {100 * score['mean']:.2f} ± " in done.stdout
    assert both["protocols"]["dc"]["trained"]["ConvNet"] == {
        "epochs": 4, "batch_train": 256, "dsa": False, "lr": pytest.approx(0.01)}
    assert both["what"] == "distilled images under dc"
    assert both["config"]["epoch_eval_train"] == 4 and "batch_train" not in both["config"]  # in `trained`

    # The table has a row for each protocol and network, and the rate where it alone tells rows apart.
    assert "result.json exists and will be replaced" in evaluate("--lr_teacher=0.02", *options)[1].stdout
    text = call("scripts/summary.py", folder / "both.json", folder / "result.json").stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert [row[0] for row in rows] == 2 * ["distilled images under dc"] + [
        f"distilled images, learning rate {rate}" for rate in (0.03, 0.03, 0.02, 0.02)]
    by_protocol = [each for protocol in ("dc", "datm") for each in both["protocols"][protocol]["scores"]]
    assert [row[3].split()[0] for row in rows[:4]] == [f"{100 * score['mean']:.2f}" for score in by_protocol]
    text = call("scripts/summary.py", folder / "both.json", "--by_network").stdout
    assert len(text.splitlines()) == 4
    for name, epochs in (("short", 4), ("long", 5)):
        shutil.copy(folder / "result.json", folder / f"{name}.json")
        assert f" {epochs} epochs" not in call("scripts/summary.py", folder / f"{name}.json").stdout
        evaluate("--eval_mode=C", "--epoch_eval_train=5")
    text = call("scripts/summary.py", folder / "short.json", folder / "long.json").stdout
    assert text.count(", 4 epochs ") == text.count(", 5 epochs ") == 2
    evaluate("--eval_mode=C", "--epoch_eval_train=4", "--batch_train=2")
    text = call("scripts/summary.py", folder / "short.json", folder / "result.json").stdout
    assert text.count(", batches of 2 ") == text.count(", batches of 6 ") == 2


def test_a_rate_is_chosen_for_each_kind_of_network_never_on_the_test_images(evaluate, call, toy, tmp_path):
    options = ["--lr_teacher=auto", "--eval_mode=C", "--epoch_eval_train=12", "--no_aug"]
    found, done = evaluate(*options)
    trained = found["protocols"]["datm"]["trained"]
    for score in found["scores"]:
        of_network = trained[score["network"]]
        reached = of_network["held_out"]
        assert sorted(map(float, reached)) == sorted((*RATES, 0.03))
        assert reached[f"{of_network['lr']:.4g}"] == max(reached.values()) > min(reached.values())
        assert f"learning rate {of_network['lr']:.4g}, the best on a tenth of the training images" in done.stdout
    text = call("scripts/summary.py", tmp_path / "result.json").stdout
    assert all(f"distilled images, without augmentation, learning rate {each['lr']:.4g} (auto)" in text
               for each in trained.values())
    rate = trained["ConvNet"]["lr"]
    datm = tmp_path / "datm"
    alone, _ = evaluate(*options[2:], "--model=ConvNet", f"--lr_teacher={rate}",
                        f"--label_dir={datm / 'labels_best.pt'}", data="datm/images_best.pt")
    assert alone["scores"] == found["scores"][1:]

    shutil.copytree(toy.data, tmp_path / "data")
    for one, other in (("red", "aside"), ("green", "red"), ("aside", "green")):
        (tmp_path / "data" / "test" / one).rename(tmp_path / "data" / "test" / other)
    other, _ = evaluate(*options, f"--data_path={tmp_path / 'data'}")
    assert other["scores"] != found["scores"] and other["protocols"]["datm"]["trained"] == trained


def test_it_goes_on_at_the_next_network_and_not_with_that_of_other_options(evaluate, folder):
    options = ["--protocol=dc,datm", "--lr_teacher=auto", "--epoch_eval_train=1"]
    whole, _ = evaluate(*options)
    (folder / "result.json").unlink()
    with stop_at(TRAINING, 10):
        evaluate(*options, expect=130)
    assert "starting over" in evaluate("--protocol=dc,datm", "--lr_teacher=auto", "--epoch_eval_train=1",
                                       "--batch_train=2")[1].stderr
    with stop_at(TRAINING, 10):
        evaluate(*options, expect=130)
    with stop_at(TRAINING, 14 - 9 + 1):  # one more than are left, so it is not reached
        again, done = evaluate(*options)
    assert "9 of 14 networks were tested" in done.stdout and again["protocols"] == whole["protocols"]


@pytest.mark.parametrize("options, phrases", [
    (["--protocol=ncfm"], ["--protocol ncfm: it must be one of datm, mtt, dc"]),
    (["--protocol=dc,dc"], ["--protocol dc,dc"]), (["--protocol="], ["--protocol '': it must be"]),
    (["--lr_teacher=best"], ["--lr_teacher best: it must be a number, or auto"]),
    (["--robust_score", "--lr_teacher=auto"], ["--robust_score with --lr_teacher auto"]),
    (["--robust_score", "--protocol=dc,datm"], ["one protocol"])])
def test_what_is_no_protocol_or_rate_is_refused(evaluate, options, phrases):
    check_refusal(evaluate(*options, expect=2)[1], *phrases)


def test_robust_scores_of_networks_with_unlike_epochs_are_refused(evaluate):
    options = ["--robust_score", "--protocol=dc", "--eval_mode=N"]
    done = evaluate(*options, data="res_DC_X_ConvNet_2ipc.pt", expect=2)[1]
    check_refusal(done, "different numbers of epochs; give --epoch_eval_train")


def test_a_summary_says_what_was_tested_on_where_that_differs(call, tmp_path):
    for name, tested_on in (("test", "test"), ("held_out", "validation")):
        (tmp_path / f"{name}.json").write_text(json.dumps(
            {"what": "a set", "images": 10, "scores": [{"network": "MLP", "accuracies": [0.5]}], "tested_on": tested_on,
             "config": {"dataset": "MiniFashion"}}))
    both = call("scripts/summary.py", tmp_path).stdout
    assert "a set on held-out images " in both and "a set on test images " in both and "MiniFashion" not in both
    assert " on " not in call("scripts/summary.py", tmp_path / "test.json").stdout
