"""The file of a distilled set: size and contents, where its whitening is found, its labels, and DC's files."""

import dataclasses
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.distilled_set import DistilledSet, checked_set
from utils.data.datasets import Dataset, ImageSpace
from utils.data.zca import Whitening
from utils.errors import UserError
from utils.files import load_tensors

EVALUATION, EXPORT = "distill/evaluation.py", "scripts/export.py"


@pytest.fixture
def whole(toy_data, tmp_path):
    """The file of a set of two images per class, in its own folder. Uses one thread, as the programs do in these tests:
    the last bit of the pixels may depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path / "set" / "distilled.safetensors"
    real = torch.cat([toy_data.class_indices(each)[:2] for each in range(3)])
    distilled = DistilledSet(toy_data.train_images[real], torch.randn(6, 3), torch.tensor(0.01))
    distilled.save_whole(path, toy_data, {"dataset": "ImageFolder", "zca": True, "ipc": 2})
    yield path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape, most", [((1, 28, 28), 200_000), ((3, 32, 32), 400_000)])
def test_ten_images_weigh_little_and_are_pictures_as_they_are(tmp_path, shape, most):
    dimension = torch.Size(shape).numel()
    whitening = Whitening(torch.full((1, dimension), 0.5), 4 * torch.eye(dimension), torch.eye(dimension) / 4, "0" * 32)
    none, names = torch.zeros(0, *shape), tuple(f"n0{number:07}, a name of the usual length" for number in range(10))
    dataset = Dataset("X", none, none, none, none, names,
                      ImageSpace((0.5,) * shape[0], (0.2,) * shape[0], whitening), "")
    images = torch.randn(10, *shape)
    DistilledSet(images, torch.randn(10, 10), torch.tensor(0.01)).save_whole(tmp_path / "set.safetensors", dataset, {})
    assert (tmp_path / "set.safetensors").stat().st_size <= most
    assert load_file(tmp_path / "set.safetensors")["pixels"].allclose(images / 4 + 0.5, atol=1e-6)


def test_a_whitening_travels_on_request(call, toy, toy_data, environment, whole, monkeypatch, tmp_path):
    """It is found in the cache where the set was made, elsewhere beside the set; `pixels` does not need it."""
    photos = torch.rand(2, 3, 8, 8)
    inputs = toy_data.space.from_pixels(photos)
    photos_as_bytes = (255 * photos).round().to(torch.uint8)  # as torchvision reads them
    torch.testing.assert_close(toy_data.space.from_pixels(photos_as_bytes),
                               toy_data.space.from_pixels(photos_as_bytes.double() / 255), rtol=1e-4, atol=1e-4)
    call(EXPORT, whole, "--whitening")
    monkeypatch.setenv("DATM_CACHE", str(tmp_path / "nothing"))
    elsewhere = DistilledSet.load(whole)
    assert torch.equal(elsewhere.space.from_pixels(photos), inputs)
    for wrong in (torch.rand(2, 3, 9, 8), torch.rand(2, 1, 8, 8), torch.rand(3, 8, 8)):
        with pytest.raises(UserError, match=r"are not of this space; give \[N, 3, H, W\] with 192 values in each"):
            elsewhere.space.from_pixels(wrong)
    assert repr(elsewhere) == (
        "DistilledSet(images [6, 3, 8, 8], labels [6, 3], factor 1, lr 0.01, dataset ImageFolder)")
    assert repr(toy_data) == "Dataset(ImageFolder, 72 training and 24 test images [3, 8, 8], 3 classes, whitened)"
    torch.testing.assert_close(elsewhere.space.to_pixels(elsewhere.images), toy_data.space.to_pixels(elsewhere.images),
                               rtol=0, atol=1e-5)

    travelled = whole.parent / "whitening.safetensors"
    tensors = load_file(travelled)
    assert set(tensors) == {"mean", "transform"}
    save_file(tensors, travelled, {"fingerprint": "0" * 32})  # the whitening of another set
    for file in (None, travelled):
        if file:
            file.unlink()
        alone = DistilledSet.load(whole)
        torch.testing.assert_close(alone.pixels(), toy_data.space.to_pixels(alone.images))
        with pytest.raises(UserError, match=r"is neither in .*nothing nor in .*whitening\.safetensors; run distill/ev"):
            alone.space.from_pixels(photos)
    call(EVALUATION, *toy.evaluate, f"--data_dir={whole}")  # the dataset brings its whitening into the cache
    monkeypatch.setenv("DATM_CACHE", environment["DATM_CACHE"])
    assert torch.equal(DistilledSet.load(whole).space.from_pixels(photos), inputs)


def test_another_whitening_or_normalisation_than_the_datasets_is_said(call, toy, whole, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy.data, data)
    for number in range(12):
        (data / "train" / "red" / f"{number}.png").unlink()
    here = [each for each in toy.evaluate if "data_path" not in each]
    done = call(EVALUATION, *here, f"--data_path={data}", f"--data_dir={whole}")
    assert "it was whitened by other training images than those of ImageFolder" in done.stderr
    assert "note:" not in call(EVALUATION, *toy.evaluate, f"--data_dir={whole}").stderr
    tensors = load_file(whole)
    about = {"format": "datm-distilled-set-2", "classes": '["blue", "green", "red"]', "mean": "[0.1, 0.1, 0.1]",
             "std": "[0.5, 0.5, 0.5]", "config": "{}"}
    save_file(tensors, whole, about)
    plain = [each for each in toy.evaluate if each != "--zca"]
    assert "it was normalised by mean and deviation 0.1, 0.1, 0.1 and 0.5, 0.5, 0.5" in call(
        EVALUATION, *plain, f"--data_dir={whole}").stderr


@pytest.mark.parametrize("classes, said", [
    ('["blue", "green", "pink"]', "only the set has pink, only the images have red, so its labels do not fit"),
    ('["red", "green", "blue"]', "in another order")])
def test_a_set_of_other_classes_is_refused(call, toy, whole, classes, said):
    tensors, about = load_file(whole), {"mean": "[0.1, 0.1, 0.1]", "std": "[0.5, 0.5, 0.5]", "config": "{}"}
    save_file(tensors, whole, about | {"format": "datm-distilled-set-2", "classes": classes})
    assert said in call(EVALUATION, *toy.evaluate, f"--data_dir={whole}", expect=2).stderr


@pytest.mark.parametrize("name, value", [("whitening", "../../etc/passwd"), ("config", "[1]"), ("mean", '"x"'),
                                         ("classes", "5")])
def test_a_file_that_says_something_else_of_itself_is_refused(whole, name, value):
    tensors, about = load_tensors(whole)
    save_file(tensors, whole, about | {name: value})
    with pytest.raises(UserError, match="is damaged or no distilled set"):
        DistilledSet.load(whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_kinds_of_numbers_become_float32(call, whole, dtype):
    tensors, about = load_tensors(whole)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, whole, about)
    assert all(tensor.dtype == torch.float32 for tensor in DistilledSet.load(whole).tensors().values())
    call(EXPORT, whole, f"--png={whole.parent / 'png'}", "--card")


# --- labels --------------------------------------------------------------------------------------------------


def test_labels_that_look_like_probabilities_are_said_and_taken_as_it_is_told(call, toy, toy_data, tmp_path):
    labels = torch.tensor([[1.0, 0, 0], [0.2, 0.5, 0.3], [0, 0, 1]])
    torch.save(toy_data.train_images[:3], tmp_path / "images.pt")
    torch.save(labels, tmp_path / "labels.pt")
    files = [f"--data_dir={tmp_path / 'images.pt'}", f"--label_dir={tmp_path / 'labels.pt'}", "--lr_teacher=0.01"]
    saved = tmp_path / "set.safetensors"
    done = call(EVALUATION, *toy.evaluate, *files, f"--save={saved}")
    assert "taken for logits" in done.stderr and "--label_kind probabilities" in done.stderr
    assert torch.equal(DistilledSet.load(saved).labels, labels)
    done = call(EVALUATION, *toy.evaluate, *files, f"--save={saved}", "--label_kind=probabilities")
    assert "note:" not in done.stderr
    torch.testing.assert_close(DistilledSet.load(saved).labels.softmax(1), labels)
    torch.save(labels - 1, tmp_path / "labels.pt")
    done = call(EVALUATION, *toy.evaluate, *files, "--label_kind=probabilities", expect=2)
    assert "--label_kind probabilities: the labels are not rows of at least 0 that sum to 1" in done.stderr


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16])
def test_classes_are_whole_numbers_of_any_size(toy_data, dtype):
    distilled = DistilledSet(toy_data.train_images[:3], torch.tensor([2, 0, 1], dtype=torch.int64), torch.tensor(0.1))
    foreign = dataclasses.replace(distilled, labels=distilled.labels.to(dtype))
    assert torch.equal(checked_set(foreign, toy_data, ["x"] * 3).labels, distilled.labels)
    with pytest.raises(UserError, match="no classes outside 0 … 2"):
        checked_set(dataclasses.replace(foreign, labels=foreign.labels.long().add(1).to(dtype)), toy_data,
                    ["--data_dir", "--label_dir", "--lr_dir"])


# --- DC's files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["core", "_core"])  # numpy 1, which wrote the published files, and 2
def test_the_first_set_in_a_file_of_dc_is_evaluated(call, toy, toy_data, tmp_path, core):
    images, classes = toy_data.train_images[::12], toy_data.train_labels[::12]
    torch.save({"data": [[images, classes], [images + 1, classes]], "accs_all_exps": {"ConvNet": [np.float64(0.5)]}},
               tmp_path / "written.pt")
    path = tmp_path / "res_DC_X_ConvNet_2ipc.pt"
    with zipfile.ZipFile(tmp_path / "written.pt") as written, zipfile.ZipFile(path, "w") as file:
        for entry in written.infolist():
            file.writestr(entry.filename, written.read(entry).replace(b"numpy._core.", f"numpy.{core}.".encode()))
    done = call(EVALUATION, *toy.evaluate, f"--data_dir={path}", f"--save={tmp_path / 'set.safetensors'}")
    saved = DistilledSet.load(tmp_path / "set.safetensors")
    assert torch.equal(saved.images, images) and torch.equal(saved.labels, classes)
    assert "holds 2 sets; the first is taken" in done.stderr and "made with zca False" in done.stderr


@pytest.mark.parametrize("data, phrase", [([], "is no res_*.pt of DC, DSA or DM"), ([[1]], "is no res_*.pt"),
                                          ([["x", 1]], "holds no tensor (str)")])
def test_another_table_is_refused(call, toy, tmp_path, data, phrase):
    torch.save({"data": data}, tmp_path / "res.pt")
    (line,) = call(EVALUATION, *toy.evaluate, f"--data_dir={tmp_path / 'res.pt'}", expect=2).stderr.splitlines()
    assert phrase in line
