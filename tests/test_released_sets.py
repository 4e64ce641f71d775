"""Sets in the files that other projects release."""

import json
from unittest import mock

import pytest
import torch

from distill.distilled_set import DistilledSet
from utils.errors import UserError

EVALUATION = "distill/evaluation.py"


@pytest.fixture
def evaluated(call, toy, tmp_path):
    """Options of evaluation.py → the set that it used and the process; on the toy, without --zca."""
    def evaluated(*options, expect=0):
        plain = [each for each in toy.evaluate if each != "--zca"]
        done = call(EVALUATION, *plain, *options, f"--save={tmp_path / 'set.safetensors'}", expect=expect)
        return (None if expect else DistilledSet.load(tmp_path / "set.safetensors")), done

    return evaluated


@pytest.fixture
def parts():
    torch.manual_seed(0)
    classes = torch.arange(3).repeat_interleave(2)
    return torch.randn(6, 3, 8, 8), classes, torch.randn(6, 3)


def write(folder, **tensors):
    folder.mkdir(exist_ok=True)
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pt")
    return folder


# --- each form, as one --data_dir ----------------------------------------------------------------------------


def test_the_name_of_a_dc_file_gives_dataset_and_network(call, tmp_path):
    images, classes = torch.randn(10, 1, 28, 28), torch.arange(10)
    for name in ("res_DSA_MiniFashion_ConvNetD1W4_1ipc.pt", "res_MiniFashion_ConvNetD1W4_1ipc.pt"):
        torch.save({"data": [[images, classes]], "accs_all_exps": {}}, tmp_path / name)
        done = call(EVALUATION, f"--data_dir={tmp_path / name}", "--num_eval=1", "--epoch_eval_train=1",
                    "--device=cpu", f"--json={tmp_path / 'test.json'}")
        assert "ConvNetD1W4:" in done.stdout and "note:" not in done.stderr
        config = json.loads((tmp_path / "test.json").read_text())["config"]
        assert config["dataset"] == "MiniFashion" and config["zca"] is False
    (line,) = call(EVALUATION, f"--data_dir={tmp_path}", expect=2).stderr.splitlines()
    assert "holds 2 sets, such as res_DSA_MiniFashion_ConvNetD1W4_1ipc.pt" in line


def test_a_folder_of_mtt_or_ftd_is_read(evaluated, parts, tmp_path):
    images, classes, _ = parts
    mtt = write(tmp_path / "mtt", images_1000=images + 1, labels_1000=classes, images_best=images, labels_best=classes)
    found, done = evaluated(f"--data_dir={mtt}", "--lr_teacher=0.02")
    assert torch.equal(found.images, images) and torch.equal(found.labels, classes)
    assert float(found.lr) == pytest.approx(0.02) and found.config["zca"] is False
    assert done.stderr.count("note:") == 1 and "nothing says whether the set's images are whitened" in done.stderr
    assert "note:" not in evaluated(f"--data_dir={mtt}", "--lr_teacher=0.02", "--zca=False")[1].stderr
    write(mtt, images_zca_1000=images, lr=torch.tensor(0.3))  # none for `best`, but of the same set
    found, done = evaluated(f"--data_dir={mtt}", f"--lr_dir={mtt / 'lr.pt'}")
    assert found.config["zca"] is True and float(found.lr) == pytest.approx(0.3) and "note:" not in done.stderr
    assert "made with zca True, and here zca is False" in evaluated(f"--data_dir={mtt}", "--zca=False")[1].stderr
    ftd = write(tmp_path / "ftd", ema_images_900=images + 1, ema_labels_900=classes, ema_images_5000=images,
                ema_labels_5000=classes, images_zca_5000=images)
    found, done = evaluated(f"--data_dir={ftd}")
    assert torch.equal(found.images, images) and found.config["zca"] is True
    assert "the set's learning rate is not among its files" in done.stderr


def test_teslas_soft_labels_are_probabilities(evaluated, parts, tmp_path):
    images, _, logits = parts
    tesla = write(tmp_path / "tesla", images_best=images, labels_best=logits.softmax(1))
    found, done = evaluated(f"--data_dir={tesla}", "--lr_teacher=0.01", "--zca=False")
    torch.testing.assert_close(found.labels.softmax(1), logits.softmax(1))
    assert "note:" not in done.stderr
    assert "taken for logits" in evaluated(f"--data_dir={tesla}", "--label_kind=logits")[1].stderr
    evaluated(f"--data_dir={tesla}")
    saved = (tmp_path / "set.safetensors").rename(tmp_path / "saved.safetensors")
    torch.testing.assert_close(evaluated(f"--data_dir={saved}")[0].labels.softmax(1), logits.softmax(1))


@pytest.mark.parametrize("inside", [".", "Normal"])
def test_the_three_files_of_datm_and_pad_are_read_from_a_folder(evaluated, parts, tmp_path, inside):
    images, _, logits = parts
    folder = write(tmp_path / "datm", lr=torch.tensor(1.0))
    write(folder / inside, images_best=images, labels_best=logits, lr_best=torch.tensor(0.03))
    found, done = evaluated(f"--data_dir={folder}", "--zca=False")
    assert torch.equal(found.images, images) and torch.equal(found.labels, logits)
    assert float(found.lr) == pytest.approx(0.03) and "note:" not in done.stderr
    _, done = evaluated(f"--data_dir={folder}", f"--lr_dir={folder / 'lr.pt'}", expect=2)
    assert "--lr_dir with --data_dir" in done.stderr


@pytest.mark.parametrize("factor", [1, 2])
def test_pixels_of_ncfm_are_read_with_their_factor(evaluated, toy_data, parts, tmp_path, factor):
    pixels, classes = torch.rand(6, 3, 8, 8), parts[1]
    ncfm = tmp_path / "ncfm"
    ncfm.mkdir()
    torch.save([pixels.flip(0), classes], ncfm / "data_init.pt")
    torch.save([pixels.flip(0), classes], ncfm / "data_9000.pt")
    torch.save([pixels, classes], ncfm / "data_20000.pt")
    for given in (ncfm, ncfm / "data_20000.pt"):
        found, done = evaluated(f"--data_dir={given}", f"--factor={factor}", "--lr_teacher=0.01")
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in toy_data.space[:2])
        torch.testing.assert_close(found.images, (pixels - mean) / std)
        torch.testing.assert_close(found.pixels(), pixels)
        assert torch.equal(found.labels, classes.repeat_interleave(factor**2)) and "note:" not in done.stderr
    torch.save([4 * pixels, classes], ncfm / "data_best.pt")
    assert "taken for pixels in [0, 1]" in evaluated(f"--data_dir={ncfm}", f"--factor={factor}")[1].stderr
    assert "made with zca False, and here zca is True" in evaluated(
        f"--data_dir={ncfm}", f"--factor={factor}", "--zca")[1].stderr


@pytest.mark.parametrize("size, loaded", [(8, 0), (32, 1)])  # CIFAR10, the default, has 32
def test_where_nothing_says_the_dataset_it_is_asked_for(call, parts, tmp_path, monkeypatch, size, loaded):
    images, classes, _ = parts
    images = images.new_zeros(6, 3, size, size)
    mtt, ncfm = write(tmp_path / "mtt", images_best=images, labels_best=classes), tmp_path / "data_1.pt"
    torch.save([images, classes], ncfm)
    load = mock.Mock(side_effect=UserError("CIFAR10 is not here and could not be downloaded"))
    monkeypatch.setattr("distill.evaluate.saved_set.load_data", load)
    for given, said in (([mtt], "--dataset is missing: "), ([ncfm], "--dataset is missing: "),
                        ([mtt, "--dataset=CIFAR10"], "CIFAR10 is not here")):
        (line,) = call(EVALUATION, f"--data_dir={given[0]}", *given[1:], "--device=cpu", expect=2).stderr.splitlines()
        assert said in line
    assert load.call_count == 1 + 2 * loaded


def test_other_folders_are_refused(evaluated, parts, tmp_path):
    images, classes, _ = parts
    none = write(tmp_path / "none", images_zca_best=images, labels_best=classes, images_5=images)
    odd = write(tmp_path / "odd", data_1=[images, 1])
    short = write(tmp_path / "short", data_1=[images, classes[:5]])
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        (runs / name / "Normal").mkdir(parents=True)
        (runs / name / "Normal" / "distilled.safetensors").touch()
    (sets := tmp_path / "sets").mkdir()
    for name in ("two", "one"):
        (sets / f"{name}.safetensors").touch()
    for given, phrase in (
            ([sets], "is a folder of sets; give one of them: one.safetensors, two.safetensors"),
            ([runs], "is not the folder of one run; give one of "),
            ([none], "is a folder without a set (Normal/distilled.safetensors, images_best.pt with labels_best.pt"),
            ([none / "images_5.pt"], "--label_dir is missing"),
            ([odd], "holds no tensor (int)"),
            ([short], "need label logits [6, 3], or int64 classes [6]"),
            ([short, f"--label_dir={none / 'labels_best.pt'}"], "--label_dir with --data_dir")):
        (line,) = evaluated(f"--data_dir={given[0]}", *given[1:], expect=2)[1].stderr.splitlines()
        assert phrase in line
