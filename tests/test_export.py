"""Using a distilled set: the README's example, PNG files, the card."""

import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import TOY_RUN
from PIL import Image

from distill.distilled_set import DistilledSet, classes_of
from distill.report.export import card, folder_names
from distill.result_files import EvaluationResult, Score, UnderProtocol
from utils.data.datasets import load_dataset
from utils.files import REPOSITORY

EXPORT, EVALUATION = "scripts/export.py", "distill/evaluation.py"


@pytest.fixture(scope="module")
def made(call, toy, toy_experts, tmp_path_factory):
    """The folder of a finished run on the toy."""
    folder = tmp_path_factory.mktemp("made")
    call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={folder}", "--run_name=run")
    return folder / TOY_RUN


@pytest.fixture
def whole(made, tmp_path):
    """A copy of the run's set."""
    path = tmp_path / "hub" / "distilled.safetensors"
    path.parent.mkdir()
    path.write_bytes((made / "Normal" / "distilled.safetensors").read_bytes())
    return path


def test_the_example_of_the_readme_trains_a_network(tmp_path, monkeypatch, capsys):
    """Run in a folder beside the clone; one real image per class stands for the distilled set."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "DistilledSet.load" in block]
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    data = load_dataset("MiniFashion", "", zca=True)
    chosen = torch.stack([data.class_indices(each)[0] for each in range(10)])
    real = DistilledSet(data.train_images[chosen], 5 * torch.eye(10), torch.tensor(0.01))
    real.save_whole(Path(re.search('run = "(.*)"', example)[1]) / "Normal/distilled.safetensors", data, {})
    exec(example.replace("range(300)", "range(50)"), {})
    assert float(re.fullmatch(r"(.*)% of 1000 test images\n", capsys.readouterr().out)[1]) > 30


def test_pictures_are_those_of_the_set(call, whole, tmp_path):
    done = call(EXPORT, whole, f"--png={tmp_path / 'png'}")
    assert "6 images" in done.stdout
    distilled = DistilledSet.load(whole)
    outside = float((distilled.pixels() != distilled.pixels().clamp(0, 1)).float().mean())
    assert outside > 0 and f"{outside:.0%} of the values lie outside [0, 1]" in done.stderr
    labels = json.loads((tmp_path / "png" / "labels.json").read_text())
    assert labels["classes"] == ["blue", "green", "red"] and labels["lr"] == pytest.approx(float(distilled.lr))
    assert [each["file"] for each in labels["images"]] == [f"{name}/0{number}.png" for name in labels["classes"]
                                                           for number in (0, 1)]
    assert sorted(str(path.relative_to(tmp_path / "png")) for path in (tmp_path / "png").rglob("*.png")) == [
        each["file"] for each in labels["images"]]
    for each, pixels, label in zip(labels["images"], distilled.pixels().clamp(0, 1), distilled.labels):
        picture = np.asarray(Image.open(tmp_path / "png" / each["file"])) / 255
        assert picture.shape == (8, 8, 3) and np.abs(picture - pixels.permute(1, 2, 0).numpy()).max() < 0.5 / 255 + 1e-6
        assert each["logits"] == label.tolist()
        assert each["softmax"] == pytest.approx(label.softmax(dim=0).tolist())


def test_published_tensors_become_one_file_and_pictures(call, toy, made, tmp_path):
    """Sets that evaluation.py reads and saves can be exported; here with classes as labels."""
    classes = torch.tensor([2, 0, 1, 1, 0, 2])
    torch.save(classes, tmp_path / "labels.pt")
    call(EVALUATION, *toy.evaluate, f"--data_dir={made / 'Normal' / 'images_best.pt'}",
         f"--label_dir={tmp_path / 'labels.pt'}", f"--save={tmp_path / 'one.safetensors'}")
    saved = DistilledSet.load(tmp_path / "one.safetensors")
    torch.testing.assert_close(saved.images, torch.load(made / "Normal" / "images_best.pt", weights_only=True))
    call(EXPORT, tmp_path / "one.safetensors", f"--png={tmp_path / 'png'}", "--card")
    labels = json.loads((tmp_path / "png" / "labels.json").read_text())
    assert [each["class"] for each in labels["images"]] == classes.tolist()
    assert [each["file"] for each in labels["images"]][:2] == ["red/00.png", "blue/00.png"]
    assert "softmax" not in labels["images"][0] and "classes as labels" in (tmp_path / "README.md").read_text()


def test_where_nothing_says_the_order_the_largest_label_is_the_class(whole):
    distilled = DistilledSet.load(whole)
    mixed = dataclasses.replace(distilled, labels=distilled.labels.flip(1))
    assert classes_of(mixed, 3)[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert classes_of(dataclasses.replace(mixed, config={}), 3)[0].equal(mixed.labels.argmax(dim=1))


def test_grey_pictures_have_one_channel(call, tmp_path):
    from safetensors.torch import save_file

    about = {"format": "datm-distilled-set-2", "classes": '["T-shirt/top", "Coat"]', "mean": "[0.5]", "std": "[0.5]",
             "config": '{"pix_init": "/home/me/start.safetensors", "buffer_path": "/x", "ipc": 1}'}
    save_file({"images": torch.zeros(2, 1, 5, 4), "labels": torch.eye(2), "lr": torch.tensor(0.1)},
              tmp_path / "set.safetensors", about)
    done = call(EXPORT, tmp_path / "set.safetensors", f"--png={tmp_path / 'png'}", "--card")
    assert "1 folder named differently from the class, as file systems need: T-shirt-top for T-shirt/top" in done.stderr
    picture = Image.open(tmp_path / "png" / "T-shirt-top" / "00.png")
    assert picture.mode == "L" and picture.size == (4, 5) and picture.getpixel((0, 0)) == 128
    text = (tmp_path / "README.md").read_text()
    assert "Unknown; find it out before you publish" in text and "ipc: 1" in text
    assert "pix_init: another distilled set" in text
    assert "/home/me" not in text and "buffer_path" not in text  # paths of the machine that made it


def test_a_card_says_which_iteration_its_set_is_of(call, made, toy, toy_experts, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    iteration = json.loads((run / "result.json").read_text())["best"]["iteration"]
    call(EXPORT, run, "--card")
    assert f"The set is that of iteration {iteration}, the best one on the way." in (
        run / "Normal" / "README.md").read_text()
    call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--run_name=first",
         "--Iteration=0")
    (untouched,) = tmp_path.glob("*/*/*/first")
    call(EXPORT, untouched, "--card")
    text = (untouched / "Normal" / "README.md").read_text()
    assert "Its images are those that the run began with: real ones, unchanged." in text and "synthetic" not in text


def test_folders_are_names_that_every_file_system_takes():
    assert folder_names(("a/b", "..", "Cat", "cat", "n02 dog")) == ["a-b", "class", "Cat 2", "cat 3", "n02 dog"]
    assert folder_names(("Cat", "cat", "Cat 0")) == ["Cat 0 0", "cat 1", "Cat 0 2"]
    strange = ("a?", "a*", "a.", "a", "", "..", "STRASSE", "straße", "labels.json", "caf\udce9", "é" * 200,
               *("x" * 300 + end for end in "12"))
    names = folder_names(strange)
    assert len({name.casefold() for name in names} | {"labels.json"}) == len(strange) + 1
    assert all(0 < len(name.encode()) < 255 and "/" not in name and name.strip(" .") == name for name in names)


def test_no_picture_of_one_class_is_written_over_by_another(call, tmp_path):
    from safetensors.torch import save_file

    about = {"format": "datm-distilled-set-2", "classes": '["a?", "a*", "labels.json"]', "mean": "[0.5]",
             "std": "[0.5]", "config": "{}"}
    save_file({"images": torch.zeros(3, 1, 4, 4), "labels": torch.eye(3), "lr": torch.tensor(0.1)},
              tmp_path / "set.safetensors", about)
    call(EXPORT, tmp_path / "set.safetensors", f"--png={tmp_path / 'png'}")
    assert len(list((tmp_path / "png").rglob("*.png"))) == 3 and (tmp_path / "png" / "labels.json").is_file()


# --- the card ------------------------------------------------------------------------------------------------


def front(text):
    """The YAML front matter, which hubs read."""
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_states_what_the_results_say_and_no_path(call, toy, made, whole, tmp_path):
    call(EVALUATION, *toy.evaluate, f"--data_dir={whole}", f"--json={tmp_path / 'eval.json'}")
    call("distill/baseline.py", *toy.evaluate, "--ipc=2", f"--json={tmp_path / 'real.json'}")
    (tmp_path / "hard.json").write_text(changed(
        (tmp_path / "eval.json").read_text(), what="distilled images with hard labels", config={
            "dataset": "ImageFolder", "model": "ConvNetD1W4", "hard_labels": True}))
    done = call(EXPORT, whole, "--card", "--result", *(tmp_path / f"{name}.json" for name in ("eval", "real", "hard")),
                made / "result.json")
    assert f"holds paths of this machine, for anyone who gets the file to read: {toy.data}, " in done.stderr
    text = (whole.parent / "README.md").read_text()
    assert front(text)["license"] == "unknown" and "dataset-distillation" in front(text)["tags"]
    mean = json.loads((tmp_path / "eval.json").read_text())["scores"][0]["mean"]
    assert f"| ConvNetD1W4 | {100 * mean:.2f} | 1 |" in text  # no deviation for a single network
    assert ("python distill/evaluation.py --data_dir=distilled.safetensors --num_eval=1 \\\n    --epoch_eval_train=2\n"
            "```") in text
    assert "Networks trained on 2 random real images per class, tested on the test images of ImageFolder" in text
    assert "Networks trained on the set with hard labels, tested on" in text and "--hard_labels" in text
    assert "python distill/baseline.py --dataset=ImageFolder --model=ConvNetD1W4" in text
    assert "it scored best on the test images" in text and "6 synthetic images, 2 per class, 3×8×8" in text
    assert "a reimplementation of DATM" in text
    assert "Classes in order: blue, green, red." in text and "syn_steps: 3" in text
    for path in (str(tmp_path), str(toy.data), str(made.parent)):
        assert path not in text


def test_the_command_of_a_card_can_be_typed_whatever_the_set_is_called(whole):
    result = EvaluationResult("distilled images", 6, [Score("MLP", [0.5])],
                              config={"dataset": "MNIST", "model": "MLP", "dsa": False})
    text = card(DistilledSet.load(whole), "my set's.safetensors", [("eval.json", result)])
    typed = re.search("```\n(python .*?)\n```", text, re.DOTALL)[1].replace("\\\n", "")
    assert shlex.split(typed)[2:] == ["--data_dir=my set's.safetensors", "--dataset=MNIST", "--model=MLP",
                                      "--dsa=False"]


def test_a_card_states_every_protocol_and_the_rate_that_was_given(whole):
    one, other = ([Score("MLP", [share])] for share in (0.25, 0.75))
    config = {"dataset": "ImageFolder", "model": "MLP"}
    several = EvaluationResult("distilled images under dc", 6, one, config=config | {"protocol": "dc,datm"}, protocols={
        "dc": UnderProtocol(one, {"MLP": {"lr": 0.01}}), "datm": UnderProtocol(other, {"MLP": {"lr": 0.05}})})
    text = card(DistilledSet.load(whole), "x.safetensors", [("several.json", several)])
    assert "| MLP, distilled images under dc, learning rate 0.01 | 25.00 | 1 |" in text and "--protocol=dc,datm" in text
    assert "| MLP, distilled images, learning rate 0.05 | 75.00 | 1 |" in text and "Networks trained on the set" in text
    for lr, given in ((0.01, False), (float(torch.tensor(0.02)), True)):  # the set's own is 0.01
        result = EvaluationResult("distilled images", 6, one, lr, config=config | {"lr_teacher": 0.02})
        text = card(DistilledSet.load(whole), "x.safetensors", [("one.json", result)])
        assert ("--lr_teacher=0.02" in text) == given and "| MLP | 25.00 | 1 |" in text


def test_a_card_does_not_take_the_result_of_another_set(call, whole, tmp_path):
    """Such as that of another run of one sweep, with as many images and the same learning rate."""
    ours = DistilledSet.load(whole)
    result = EvaluationResult(
        "distilled images", 6, [Score("ConvNetD1W4", [0.25])], float(ours.lr), images_sha256=ours.images_sha256,
        config={"dataset": ours.config["dataset"], "model": "ConvNetD1W4"})
    for number, other in enumerate((dataclasses.replace(result, images_sha256="0" * 64),
                                    dataclasses.replace(result, images_sha256=None, lr=0.5))):
        other.write(tmp_path / f"{number}.json")
        refused = call(EXPORT, whole, "--card", f"--result={tmp_path / f'{number}.json'}", expect=2)
        assert "is of another set" in refused.stderr and not (whole.parent / "README.md").exists()
    result.write(tmp_path / "ours.json")
    call(EXPORT, whole, "--card", f"--result={tmp_path / 'ours.json'}")
    assert "25.00" in (whole.parent / "README.md").read_text()


def test_without_results_a_card_states_no_accuracy(call, whole):
    call(EXPORT, whole, "--card")
    text = (whole.parent / "README.md").read_text()
    assert "Not stated" in text and "%" not in text


def test_a_card_states_the_licence_and_the_source_that_it_is_given(call, whole):
    call(EXPORT, whole, "--card", "--license=cc-by-4.0", "--source=Photographs of <mine>")
    text = (whole.parent / "README.md").read_text()
    assert front(text)["license"] == "cc-by-4.0" and "| cc-by-4.0 |" in text and r"Photographs of \<mine\>" in text
    assert front(text)["size_categories"] == ["n<1K"] and front(text)["task_categories"] == ["image-classification"]


def test_what_a_foreign_set_and_result_say_is_text_in_a_card(whole):
    """Markdown and HTML syntax, code fences, front matter marks, line breaks, and bytes that are not text."""
    bad = "x\n```\n# shout\n<script>alert(1)</script> `` ![p](http://x)\n---\n"
    foreign = dataclasses.replace(DistilledSet.load(whole), config={"dataset": bad, "note": bad, bad: 1},
                                  classes=(bad, "caf\udce9", "b"))
    result = EvaluationResult("distilled images", 6, [Score(bad, [0.5])], config={"dataset": bad, "model": bad})
    text = card(foreign, "a`b\".safetensors", [(bad, result)], bad, bad)
    assert len(front(text)["tags"]) == 1
    outside, fence = [], ""
    for line in text.split("---\n", 2)[2].splitlines():
        mark = re.fullmatch(r" {0,3}(`{3,})[a-z]*", line)
        if mark and (not fence or (len(mark[1]) >= len(fence) and not line.strip("` "))):
            fence = "" if fence else mark[1]
        elif not fence:
            outside.append(line)
    assert not fence and [line for line in outside if line.startswith("#")] == [
        line for line in outside if re.match(r"# x|## (Accuracy|Use|How it was made)$", line)]
    shown = re.sub(r"`[^`]*`", "", re.sub(r"\\.", "", "\n".join(outside)))
    assert not re.search(r"<script|!\[|`", shown)
    assert 'DistilledSet.load("a`b\\".safetensors")' in text or "DistilledSet.load(\"a`b\\u0022.safetensors\")" in text


def test_class_names_are_text_in_a_card(whole):
    strange = dataclasses.replace(DistilledSet.load(whole), classes=("<b>", "a|b*", "n01_é"))
    assert "Classes in order: \\<b\\>, a\\|b\\*, n01\\_é." in card(strange, "x.safetensors", [])


def changed(text, **values):
    return json.dumps(json.loads(text) | values)


@pytest.mark.parametrize("change, phrase", [
    (lambda text: "{", "is not a result"), (lambda text: "[]", "is not a result"),
    (lambda text: changed(text, scores=[{}]), "is not a result"),
    (lambda text: changed(text, scores=5), "is not a result"),
    (lambda text: changed(text, images=7), "is of 7 images"),
    (lambda text: changed(text, what="the whole training set"), "the whole training set"),
    (lambda text: None, "No such file")])
def test_a_result_of_something_else_is_refused(call, toy, whole, tmp_path, change, phrase):
    path = tmp_path / "eval.json"
    call(EVALUATION, *toy.evaluate, f"--data_dir={whole}", f"--json={path}")
    text = change(path.read_text())
    path.write_text(text) if text else path.unlink()
    (line,) = call(EXPORT, whole, "--card", "--result", path, expect=2).stderr.splitlines()
    assert line.startswith("export.py: error: --result") and phrase in line
    assert not (whole.parent / "README.md").exists()


def test_the_card_of_averaged_images_has_their_accuracy(call, made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    better = result["best"] | {"iteration": 3, "scores": [
        {"network": "ConvNetD1W4", "accuracies": [0.987, 0.987]}]}
    (run / "Normal" / "README.md").unlink(missing_ok=True)
    shutil.copytree(run / "Normal", run / "EMA")
    (run / "result.json").write_text(json.dumps(result | {"best_ema": better}))
    call(EXPORT, run, "--card", "--result", run / "result.json")
    call(REPOSITORY / EXPORT, "distilled.safetensors", "--card", "--result", "../result.json", cwd=run / "Normal")
    ema, normal = ((run / name / "README.md").read_text() for name in ("EMA", "Normal"))
    assert "| 98.70" in ema and "of iteration 3," in ema and "98.70" not in normal
    (run / "EMA" / "README.md").unlink()
    for other in ({"lr": 2 * better["lr"]}, {"images_sha256": "0" * 64}):
        (run / "result.json").write_text(json.dumps(result | {"best_ema": better | other}))
        (line,) = call(EXPORT, run, "--card", "--result", run / "result.json", expect=2).stderr.splitlines()
        assert "is of a run with another set: its learning rate or its images are not this set's" in line


def test_a_run_that_is_not_finished_has_no_set_yet(call, made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    (run / "Normal" / "distilled.safetensors").unlink()
    (line,) = call(EXPORT, run, "--card", expect=2).stderr.splitlines()  # finished, and then lost
    assert "has no distilled.safetensors; give another run, or have evaluation.py --save FILE write its best" in line
    (run / "result.json").unlink()
    (line,) = call(EXPORT, run, "--card", expect=2).stderr.splitlines()
    assert "has no distilled.safetensors, which a run writes at its end; resume it" in line


@pytest.mark.parametrize("arguments, phrase", [
    (["{set}"], "nothing to do"), (["{set}", "--result", "x.json", "--png", "x"], "give --card too"),
    ([], "required: set"), (["/nowhere.safetensors", "--card"], "/nowhere.safetensors does not exist"),
    (["{set}", "--png"], "--help"),
    (["{set}", "--card", "--png={folder}"], "new or empty"), (["{set}", "--png={set}"], "new or empty")])
def test_mistakes_are_one_line_and_nothing_is_written(call, whole, arguments, phrase):
    arguments = [each.format(set=whole, folder=whole.parent) for each in arguments]
    (line,) = call(EXPORT, *arguments, expect=2).stderr.splitlines()
    assert line.startswith("export.py: error: ") and phrase in line
    assert [path.name for path in whole.parent.iterdir()] == ["distilled.safetensors"]


def test_a_card_that_may_have_been_edited_is_kept(call, whole):
    (whole.parent / "README.md").write_text("mine")
    (line,) = call(EXPORT, whole, "--card", expect=2).stderr.splitlines()
    assert "README.md exists" in line and (whole.parent / "README.md").read_text() == "mine"


def test_a_set_whose_tensors_do_not_fit_is_refused(call, tmp_path):
    from safetensors.torch import save_file

    about = {"format": "datm-distilled-set-2", "classes": '["a", "b"]', "mean": "[0.5]", "std": "[0.5]", "config": "{}"}
    for tensors, phrase in (({"labels": torch.zeros(3, 2)}, "[3, 2]; these 2 images of it need label logits [2, 2]"),
                            ({"labels": torch.zeros(2, 3)}, "[2, 3]; these 2 images of it need label logits [2, 2]"),
                            ({"images": torch.full((2, 1, 4, 4), torch.nan)}, "not finite"),
                            ({"images": torch.full((2, 1, 4, 4), 1e300, dtype=torch.float64)}, "not finite in float32"),
                            ({"labels": torch.full((2, 2), 1e300, dtype=torch.float64)}, "not finite in float32"),
                            ({"pixels": torch.zeros(2, 1, 4, 5)}, "needs floating-point images [N, 1, 4, 4]"),
                            ({"lr": torch.tensor(1e300, dtype=torch.float64)}, "one positive learning rate"),
                            ({"images": torch.zeros(2, 5, 4, 4)}, "5 channels")):
        whole = {"images": torch.zeros(2, 1, 4, 4), "labels": torch.eye(2), "lr": torch.tensor(0.1)} | tensors
        save_file(whole, tmp_path / "set.safetensors", about)
        (line,) = call(EXPORT, tmp_path / "set.safetensors", f"--png={tmp_path / 'png'}", expect=2).stderr.splitlines()
        assert phrase in line and not (tmp_path / "png").exists()


def test_the_folder_of_a_run_is_its_set_and_one_above_is_answered_by_it(call, made, tmp_path):
    call(EXPORT, made, f"--png={tmp_path / 'png'}")
    assert len(list((tmp_path / "png").rglob("*.png"))) == 6
    whole = made / "Normal" / "distilled.safetensors"
    evaluation = [EVALUATION, "--dataset=ImageFolder", f"--data_dir={made.parent}", "--label_dir=x"]
    for command, problem in (([EXPORT, made.parent, "--png=x"], "a file"), (evaluation, "the folder of one run")):
        assert f"{made.parent} is not {problem}; give {whole}" in call(*command, expect=2).stderr
