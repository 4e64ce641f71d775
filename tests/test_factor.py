"""Factor above 1, several small images in one: network inputs, gradients, initial sets and files."""

import json
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TOY_EXPERTS, TOY_RUN, check_refusal
from PIL import Image
from ranks_worker import MadeUpBuffer

from buffer.trajectories import Buffer
from distill.distillation import FIXED_SEGMENTS, Distillation
from distill.distilled_set import DistilledSet, classes_of
from distill.initialize import expert_labels, expert_logits, initial_set
from distill.matching import matching_loss
from utils.config import DistillConfig, make
from utils.data import augment
from utils.data.tiles import cut, cut_adjoint, tiled
from utils.parameters import FlatModel
from utils.program.prepare import network_for

DATM, EVALUATION, BASELINE = "distill/DATM.py", "distill/evaluation.py", "distill/baseline.py"


def by_hand(images, factor):
    """IDC's cutting, tile by tile, for sides that the factor divides."""
    height, width = images.shape[2] // factor, images.shape[3] // factor
    return torch.stack([F.interpolate(images[:, :, row * height:(row + 1) * height, at * width:(at + 1) * width],
                                      images.shape[2:], mode="bilinear", align_corners=False)
                        for row in range(factor) for at in range(factor)], dim=1).flatten(0, 1)


def random_images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_tiles_are_cut_out_and_stretched_as_torch_does():
    images = random_images(2, 3, 12, 18)
    for factor in (1, 2, 3, 6):
        torch.testing.assert_close(cut(images, factor), by_hand(images, factor), rtol=0, atol=1e-12)
    samples = random_images(8, 3, 12, 18)
    assert torch.equal(tiled(samples, 2)[1, :, 6:, :9], F.avg_pool2d(samples[6], 2))
    assert cut(images, 1) is images and cut_adjoint(images, 1) is images and tiled(images, 1) is images


@pytest.mark.parametrize("factor, size", [(2, (8, 6)), (3, (28, 28)), (5, (7, 28)), (28, (28, 28))])
def test_the_gradient_is_pulled_back_and_no_pixel_is_left_out(factor, size):
    """Also for sides that the factor does not divide: 28 pixels are 9 + 9 + 10."""
    images = random_images(2, 1, *size).requires_grad_()
    samples = cut(images, factor)
    assert samples.shape == (2 * factor**2, 1, *size)
    gradient = random_images(*samples.shape)
    expected, = torch.autograd.grad(samples, images, gradient)
    torch.testing.assert_close(cut_adjoint(gradient, factor), expected, rtol=0, atol=1e-10)
    assert cut_adjoint(torch.ones_like(samples), factor).min() > 0.1
    torch.testing.assert_close(cut(torch.ones_like(images), factor), torch.ones_like(samples))
    assert tiled(samples, factor).shape == images.shape


def test_the_fixed_loss_is_the_mean_over_segments_that_differ():
    config = make(DistillConfig, syn_steps=2, batch_syn=2, max_start_epoch=4, Sequential_Generation=False,
                  depth_ratio=0.5)
    start = DistilledSet(random_images(3, 1, 8, 8), random_images(3, 3), torch.tensor(0.05, dtype=torch.float64))
    state = Distillation(config, SimpleNamespace(image_size=(8, 8)), MadeUpBuffer(), start)
    with mock.patch("distill.distillation.matching_loss", wraps=matching_loss) as measured:
        found = state.fixed_loss(start.at(0.1))
    given = [call.args for call in measured.call_args_list]
    losses = [float(matching_loss(*each)) for each in given]
    assert found == pytest.approx(np.mean(losses), rel=1e-5) and len(set(losses)) == FIXED_SEGMENTS
    assert all(float(each[5]) == pytest.approx(0.1) and each[8] is state.part is not None for each in given)


@pytest.mark.parametrize("engine, options", [("plain", {}), ("eager", {}), ("plain", {"matching": "unroll"}),
                                             ("eager", {"labels": "target"})])
def test_an_iteration_has_the_gradient_of_autograd_through_everything(engine, options):
    buffer = MadeUpBuffer()
    buffer.model = FlatModel(buffer.model.network, engine)
    config = make(DistillConfig, factor=2, syn_steps=4, batch_syn=7, max_start_epoch=4, Sequential_Generation=False,
                  current_max_start_epoch=4, **options)
    start = DistilledSet(random_images(3, 1, 8, 8), random_images(12, 3), torch.tensor(0.05, dtype=torch.float64))
    state = Distillation(config, SimpleNamespace(image_size=(8, 8)), buffer, start)
    segment = state.draw(0)
    assert torch.cat(segment.batches[:2]).sort().values.tolist() == list(range(12))  # all samples, four to an image
    match = state.match(segment)

    theta_start, target = (buffer.snapshot(segment.expert, segment.start_epoch + epochs) for epochs in (0, 2))
    images, lr = start.images.clone().requires_grad_(), start.lr.clone().requires_grad_()
    x = by_hand(images, 2)
    labels = expert_logits(buffer.model, target, x).detach() if options.get("labels") == "target" else start.labels
    labels, theta = labels.clone().requires_grad_(), theta_start.clone().requires_grad_()
    for batch, draw in zip(segment.batches, segment.augment):
        logits = buffer.model(theta, augment.apply(x[batch], draw))
        loss = F.cross_entropy(logits, labels[batch].softmax(1))
        theta = theta - lr * torch.autograd.grad(loss, theta, create_graph=True)[0]
    loss = (theta - target).square().sum() / (theta_start - target).square().sum()
    expected = loss, *torch.autograd.grad(loss, [images, labels, lr])
    for found, each in zip((match.loss, match.grad_images, match.grad_labels, match.grad_lr), expected):
        torch.testing.assert_close(found, each.detach(), rtol=1e-10, atol=1e-10)


def real_images_in(images, dataset):
    """The training image that each of the 2 × 2 tiles is a smaller version of; asserts that none occurs twice."""
    tiles = images.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    from_, at = torch.cdist(tiles.flatten(1), F.avg_pool2d(dataset.train_images, 2).flatten(1)).min(1)
    assert from_.max() < 1e-3 and len(set(at.tolist())) == len(tiles)
    return at


@pytest.mark.parametrize("pix_init", ["real", "samples_predicted_correctly", "noise"])
def test_a_set_starts_with_the_labels_of_what_networks_see(toy_data, toy_experts, pix_init):
    model = FlatModel(network_for("ConvNetD1W4", toy_data))
    buffer = Buffer(toy_experts / TOY_EXPERTS, model)
    start, _ = initial_set(make(DistillConfig, ipc=2, factor=2, pix_init=pix_init), toy_data, buffer)
    assert start.images.shape == (6, 3, 8, 8) and start.labels.shape == (24, 3) and start.factor == 2
    if pix_init == "noise":
        return
    classes = torch.arange(3).repeat_interleave(8)
    assert toy_data.train_labels[real_images_in(start.images, toy_data)].equal(classes)
    thetas = [buffer.snapshot(number, -1) for number in range(3)]
    expected = (expert_logits(model, thetas[0], start.samples()) if pix_init == "real" else
                expert_labels(model, thetas, start.samples(), classes)[0])
    assert torch.equal(start.labels, expected)


@pytest.fixture(scope="module")
def made(call, toy, toy_experts, tmp_path_factory):
    """The folder of a finished run on the toy."""
    folder = tmp_path_factory.mktemp("made")
    done = call(DATM, *toy.distil, "--factor=2", f"--buffer_path={toy_experts}", f"--log_path={folder}",
                "--run_name=run", "--ema")
    assert "ipc 2, factor 2 (24 labels)" in done.stdout
    return folder / TOY_RUN


def test_a_set_knows_its_factor_and_its_three_files_are_told(call, toy, toy_experts, made, tmp_path):
    files = {kind: made / "Normal" / f"{kind}_best.pt" for kind in ("images", "labels", "lr")}
    whole = DistilledSet.load(made)
    assert torch.equal(whole.images, torch.load(files["images"])) and whole.images.shape == (6, 3, 8, 8)
    assert torch.equal(whole.labels, torch.load(files["labels"])) and whole.labels.shape == (24, 3)
    assert len(whole) == 24 and classes_of(whole, 3)[0].equal(torch.arange(3).repeat_interleave(8))
    x, y = next(iter(torch.utils.data.DataLoader(whole, batch_size=24)))
    torch.testing.assert_close(x, by_hand(whole.images, 2), rtol=1e-5, atol=1e-5)
    assert torch.equal(y, whole.labels) and torch.equal(whole[-1][1], y[-1])
    assert all(map(torch.equal, whole[2:7], (x[2:7], y[2:7])))

    copies = {name: tmp_path / f"{name}.pt" for name in files}  # without a config.yaml nearby
    for name, path in copies.items():
        path.write_bytes(files[name].read_bytes())
    three = [f"--{option}_dir={copies[kind]}" for option, kind in (("data", "images"), ("label", "labels"),
                                                                   ("lr", "lr"))]
    results = []
    for name, options in {"run": [f"--data_dir={made}"], "three": [*three, "--factor=2"]}.items():
        done = call(EVALUATION, *toy.evaluate, *options, f"--json={tmp_path / name}.json",
                    f"--save={tmp_path / name}.safetensors")
        assert "6 images of 2 × 2 smaller ones (24 labels)" in done.stdout
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert results[0]["scores"] == results[1]["scores"]
    assert [(each["images"], each["labels"], each["config"]["factor"]) for each in results] == 2 * [(6, 24, 2)]
    assert DistilledSet.load(tmp_path / "three.safetensors").factor == 2

    for options, hint in ((three, "give --factor 2"), ([f"--data_dir={made}", "--factor=1"], "give --factor 2"),
                          ([f"--data_dir={made}", "--factor=3"], "[54, 3]")):
        check_refusal(call(EVALUATION, *toy.evaluate, *options, expect=2), "[24, 3]; these 6 images", hint)
    check_refusal(call(DATM, *toy.distil, f"--pix_init={made / 'Normal' / 'distilled.safetensors'}", "--run_name=x",
                       f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", expect=2), "--pix_init",
                  "give --factor 2")


def test_what_is_stored_and_what_networks_see_are_shown(call, made, tmp_path):
    page = (made / "report.html").read_text()
    assert "2 images per class, each holding 2 × 2 smaller ones" in page and page.count('alt="stored image ') == 6
    assert len(re.findall('alt="distilled image of class [^"]*, image 2, part 4"', page)) == 3
    done = call("scripts/export.py", made, f"--png={tmp_path / 'png'}", "--card")
    assert "6 images of 2 × 2 smaller ones (24 labels)" in done.stdout
    labels = json.loads((tmp_path / "png" / "labels.json").read_text())["images"]
    assert [each["file"] for each in labels][:2] == ["blue/00.png", "blue/01.png"] and len(labels) == 6
    assert labels[2]["class"] == [1] * 4 and np.shape(labels[2]["logits"]) == (4, 3)
    assert Image.open(tmp_path / "png" / "seen.png").size == (4 * 8, 6 * 8)
    assert "24 labels in all" in (made / "Normal" / "README.md").read_text()

    # A comparison shows the stored images.
    call("scripts/report.py", made, made, f"--out={tmp_path / 'both.html'}")
    both = (tmp_path / "both.html").read_text()
    assert re.findall(r'alt="distilled red, ([^"]*) of ', both) == 2 * ["stored image 1", "stored image 2"]
    assert both.count("2 × 2 smaller ones</figcaption>") == 12 and both.count('alt="distilled ') == 12


def test_random_images_are_treated_in_the_same_way(call, toy, toy_data, toy_experts):
    """Each part is a different real image of its class; its label is computed on the part as networks see it."""
    model, classes, drawn = FlatModel(network_for("ConvNetD1W4", toy_data)), torch.arange(3).repeat_interleave(8), []
    buffer = Buffer(toy_experts / TOY_EXPERTS, model)
    for source in ("hard", "experts"):
        with mock.patch("distill.evaluate.real_images.evaluate_and_say") as report:
            call(BASELINE, *toy.evaluate, "--ipc=2", "--factor=2", "--num_eval=2", f"--label_source={source}",
                 f"--buffer_path={toy_experts}")
        sets, what = report.call_args.args[2:4]
        assert len(sets) == 2 and what.startswith("2 random real images per class") and what.endswith(", factor 2")
        for each in sets:
            assert each.images.shape == (6, 3, 8, 8) and each.factor == 2
            drawn.append(real_images_in(each.images, toy_data))
            assert toy_data.train_labels[drawn[-1]].equal(classes)
            expected = classes if source == "hard" else expert_labels(
                model, [buffer.snapshot(number, -1) for number in range(3)], by_hand(each.images, 2), classes)[0]
            torch.testing.assert_close(each.labels, expected, rtol=1e-4, atol=1e-4)
    assert drawn[0].equal(drawn[2]) and not drawn[0].equal(drawn[1])


def test_nothing_is_measured_twice_where_nothing_is_learned(call, toy, toy_experts, tmp_path):
    """With --Iteration=0 the loss after equals the loss before; measuring a set of many parts takes long."""
    with mock.patch("distill.distillation.matching_loss", wraps=matching_loss) as measured:
        call(DATM, *toy.distil, "--factor=4", "--Iteration=0", f"--buffer_path={toy_experts}", f"--log_path={tmp_path}")
    result = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert measured.call_count == FIXED_SEGMENTS
    assert result["fixed_loss"]["before"] == result["fixed_loss"]["after"] > 0


@pytest.mark.parametrize("script, options, phrases", [
    (DATM, ["--factor=0"], ["--factor 0: it must be greater than or equal to 1"]),
    (DATM, ["--factor=9"], ["--factor 9: images of 8×8 pixels cannot hold 9 × 9", "at most 8"]),
    (BASELINE, ["--factor=9"], ["--factor 9: images of 8×8 pixels"]),
    (BASELINE, ["--factor=2", "--ipc=None"], ["--factor 2 --ipc None", "give --ipc a number"])])
def test_a_factor_that_cannot_be_is_refused(call, toy, toy_experts, script, options, phrases):
    given = [*toy.distil, f"--buffer_path={toy_experts}"] if script == DATM else toy.evaluate
    check_refusal(call(script, *given, *options, expect=2), *phrases)
