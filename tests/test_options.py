"""Options beyond the published ones: each has its effect, and none when it is off."""

import dataclasses
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import TOY_EXPERTS, TOY_RUN

from buffer.curriculum import Curriculum, epoch_share, grand_scores
from buffer.experts import SavedEpochs, train_expert
from buffer.gsam import gsam_gradient
from distill.distillation import Distillation, Segment, matched_part
from distill.distilled_set import DistilledSet
from distill.evaluate.networks import evaluate
from distill.matching import Match
from distill.option_checks import check_options
from utils.config import BufferConfig, DistillConfig, EvaluationConfig, make
from utils.data import augment
from utils.errors import UserError
from utils.loss_and_accuracy import accuracy
from utils.parameters import FlatModel
from utils.program.prepare import drawer, network_for
from utils.program.processes import in_processes
from utils.program.seeds import generator, seeded


def distilled(labels=None):
    random = torch.Generator().manual_seed(0)
    return DistilledSet(torch.randn(6, 1, 4, 4, generator=random),
                        torch.randn(6, 3, generator=random) if labels is None else labels, torch.tensor(0.1))


def distillation(start=None, **options):
    start = distilled() if start is None else start
    return Distillation(make(DistillConfig, **options), SimpleNamespace(image_size=(4, 4)), None, start)


SEGMENT = Segment(expert=0, start_epoch=0, bound=1, batches=[torch.arange(6)], augment=[augment.Draw()])


def a_match(state, grad_lr=0.0, loss=0.5):
    return Match(torch.tensor(loss), torch.ones_like(state.set.images),
                 torch.ones_like(state.set.labels) if state.set.labels.is_floating_point() else None,
                 torch.tensor(grad_lr))


# --- --labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels, moves", [("learned", True), ("soft", False), ("target", False)])
def test_only_learned_labels_move(labels, moves):
    state = distillation(labels=labels)
    before = state.set.copy()
    state.update(a_match(state))
    assert (not torch.equal(state.set.labels, before.labels)) == moves
    assert not torch.equal(state.set.images, before.images)


def test_hard_labels_stay_classes():
    classes = torch.tensor([0, 0, 1, 1, 2, 2])
    state = distillation(distilled(classes), labels="hard")
    state.update(a_match(state))
    assert torch.equal(state.set.labels, classes)


@pytest.mark.parametrize("labels", ["hard", "target"])
def test_labels_of_a_whole_run(call, toy, toy_experts, tmp_path, labels):
    call("distill/DATM.py", *toy.distil, f"--labels={labels}", f"--buffer_path={toy_experts}", "--run_name=run",
         f"--log_path={tmp_path}")
    folder = tmp_path / TOY_RUN / "Normal"
    first, last = (torch.load(folder / f"labels_{it}.pt", weights_only=True) for it in (0, 4))
    if labels == "hard":
        assert last.tolist() == [0, 0, 1, 1, 2, 2]
    else:
        assert last.shape == (6, 3) and not torch.equal(first, last)


# --- --lr_param, --ema ---------------------------------------------------------------------------------------


def test_log_rate_stays_positive_where_the_plain_one_does_not():
    plain, log = (distillation(lr_lr=1.0, lr_teacher=0.05, lr_param=kind) for kind in ("plain", "log"))
    for state in (plain, log):
        state.update(a_match(state, grad_lr=0.2))
    assert float(plain.set.lr) == pytest.approx(0.1 - 0.2)
    # The step is scaled by the first α, 0.1: log α moves by lr_lr / 0.1² · α · 0.2.
    assert float(log.set.lr) == pytest.approx(0.1 * math.exp(-1 / 0.1**2 * 0.1 * 0.2))


def test_the_first_steps_of_log_and_plain_agree():
    start = DistilledSet(distilled().images, distilled().labels, torch.tensor(0.01))
    plain, log = (distillation(start, lr_lr=1e-7, lr_teacher=0.01, lr_param=kind) for kind in ("plain", "log"))
    for state in (plain, log):
        state.update(a_match(state, grad_lr=300.0))
    assert float(log.set.lr) - 0.01 == pytest.approx(float(plain.set.lr) - 0.01, rel=0.01)


@pytest.mark.parametrize("lr_param", ["plain", "log"])
def test_a_rate_that_was_held_has_lost_its_momentum(lr_param):
    state = distillation(lr_lr=1.0, lr_param=lr_param)
    held, free = (state.learn(0, SEGMENT, a_match(state, gradient)) for gradient in (200.0, 0.0))
    assert held.held and held.updated and not free.held and held.lr == pytest.approx(0.1) == free.lr


@pytest.mark.parametrize("loss, threshold, updated", [
    (0.5, 0.5, True), (0.5, 0.499, False), (math.nan, math.inf, False), (math.inf, math.inf, False)])
def test_a_loss_that_is_above_the_threshold_or_not_finite_updates_nothing(loss, threshold, updated):
    state = distillation(threshold=threshold)
    before = state.set.copy()
    record = state.learn(0, SEGMENT, a_match(state, loss=loss))
    assert record.updated == updated and state.skipped == (not updated)
    assert record.loss == pytest.approx(loss, nan_ok=True) and torch.equal(state.set.images, before.images) != updated


def test_a_resumed_run_has_the_counts_of_the_one_before():
    state, resumed = distillation(), distillation()
    state.skipped, state.held, state.held_in_a_row, state.lost_in_a_row = 4, 3, 2, 1
    resumed.restore(state.state())
    assert (resumed.skipped, resumed.held, resumed.held_in_a_row, resumed.lost_in_a_row) == (4, 3, 2, 1)


def test_target_labels_are_what_the_target_expert_says():
    state, model = distillation(labels="target", expert_epochs=1), FlatModel(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)))
    thetas = torch.randn(2, 51, generator=torch.Generator().manual_seed(1))
    state.buffer = SimpleNamespace(model=model, snapshot=lambda expert, epoch: thetas[epoch])
    state.match(SEGMENT)
    torch.testing.assert_close(state.set.labels, model(thetas[1], state.set.images).detach())


def test_ema_averages_the_images_and_leaves_them_alone():
    plain, averaged = distillation(), distillation(ema=True, ema_decay=0.9)
    start = averaged.set.copy()
    for state in (plain, averaged):
        state.update(a_match(state))
    assert torch.equal(plain.set.images, averaged.set.images)
    versions = averaged.versions()
    torch.testing.assert_close(versions["EMA"].images, 0.9 * start.images + 0.1 * averaged.set.images)
    assert torch.equal(versions["Normal"].images, averaged.set.images) and list(plain.versions()) == ["Normal"]


def test_ema_decay_without_ema_is_said_to_have_no_effect(call, toy, tmp_path):
    for ema in ("False", "True"):
        done = call("distill/DATM.py", *toy.distil, "--ema_decay=0.9", f"--ema={ema}", f"--buffer_path={tmp_path}",
                    expect=2)
        assert ("without effect: ema_decay" in done.stderr) == (ema == "False")


# --- PAD -----------------------------------------------------------------------------------------------------


def test_curriculum_shares_are_the_published():
    config = make(BufferConfig, pad=True)
    shares = [epoch_share(epoch, config) for epoch in (0, 10, 20, 39, 40, 59, 60, 99)]
    assert shares == [(0, 0.75), (0, 0.875), (0, 1), (0, 1), (0.1, 1), (0.1, 1), (0.2, 1), (0.2, 1)]
    other = make(BufferConfig, pad=True, rm_easy_ratio_first=0.3, rm_easy_ratio_second=0.5)
    assert [epoch_share(epoch, other)[0] for epoch in (39, 40, 60)] == [0, 0.3, 0.5]


def test_curriculum_takes_the_easiest_of_every_class_and_leaves_them_out_later(toy_data):
    scores = torch.rand(len(toy_data.train_labels), generator=torch.Generator().manual_seed(0))
    curriculum = Curriculum(make(BufferConfig, pad=True, init_ratio=0.5, add_end_epoch=1, rm_epoch_first=2), toy_data,
                            scores)
    first, whole, late = (curriculum.indices(epoch) for epoch in range(3))
    assert sorted(whole.tolist()) == list(range(72))
    for label in range(3):
        members = toy_data.class_indices(label)
        easiest = members[scores[members].argsort()]
        assert set(first[toy_data.train_labels[first] == label].tolist()) == set(easiest[:12].tolist())
        assert set(members.tolist()) - set(late.tolist()) == set(easiest[:2].tolist())


def test_grand_is_the_mean_norm_of_each_images_own_gradient(toy_data, monkeypatch, tmp_path):
    """Against two networks trained for an epoch, and one backward pass per image. A damaged file in the cache is
    computed again."""
    monkeypatch.setenv("DATM_CACHE", str(tmp_path))
    monkeypatch.setattr("buffer.curriculum.NETWORKS", 2)
    monkeypatch.setattr("buffer.curriculum.EPOCHS", 1)
    config = make(BufferConfig, model="ConvNetD1W4", batch_train=20, lr_teacher=0.1)
    scores = grand_scores(config, toy_data)
    expected = torch.zeros(3)
    for number in range(2):
        with seeded(0, "GraNd", number):
            network = network_for("ConvNetD1W4", toy_data)
        optimiser = torch.optim.SGD(network.parameters(), 0.1)

        def backward(rows, network=network, optimiser=optimiser):
            optimiser.zero_grad()
            logits = network(toy_data.train_images[rows])
            torch.nn.functional.cross_entropy(logits, toy_data.train_labels[rows]).backward()
        for batch in torch.randperm(72, generator=generator(0, "GraNd", number)).split(20):
            backward(batch)
            optimiser.step()
        for place, index in enumerate((0, 30, 71)):
            backward([index])
            expected[place] += torch.cat([each.grad.flatten() for each in network.parameters()]).norm() / 2
    torch.testing.assert_close(scores[[0, 30, 71]], expected, rtol=1e-4, atol=0)
    (kept,) = tmp_path.glob("grand_*.pt")
    kept.write_bytes(b"damaged")
    assert torch.equal(grand_scores(config, toy_data), scores)  # computed again
    torch.save(scores + 1, kept)
    assert torch.equal(grand_scores(config, toy_data), scores + 1)  # read
    monkeypatch.setattr("buffer.curriculum._grand_of_one", lambda *given: torch.zeros(72))
    for changed in ({"seed": 1}, {"lr_teacher": 0.2}, {"batch_train": 36}, {"model": "ConvNetD1W8"}, {"zca": True}):
        assert not grand_scores(dataclasses.replace(config, **changed), toy_data).any(), changed  # not these


def test_pad_experts_differ_only_with_the_option(call, toy, toy_experts, tmp_path, monkeypatch):
    monkeypatch.setattr("buffer.curriculum.NETWORKS", 2)
    monkeypatch.setattr("buffer.curriculum.EPOCHS", 1)

    def first_expert(folder):
        return torch.load(folder / TOY_EXPERTS / "replay_buffer_0.pt", weights_only=True)[0]

    done = call("buffer/buffer_FTD.py", *toy.train, "--num_experts=1", f"--buffer_path={tmp_path}", "--pad")
    assert "train " in done.stderr and "images/s" not in done.stderr  # an epoch's number of images varies
    pad, plain = first_expert(tmp_path), first_expert(toy_experts)
    assert torch.equal(pad[0][0], plain[0][0]) and not torch.equal(pad[1][0], plain[1][0])


def test_each_epoch_trains_on_the_images_of_its_curriculum(toy_data, monkeypatch, tmp_path):
    config = make(BufferConfig, model="ConvNetD1W4", train_epochs=3, rho_max=0, rho_min=0)
    asked = []

    class Some:
        def indices(self, epoch):
            asked.append(epoch)
            return torch.arange(10 * (epoch + 1))

    seen, right = [], []

    def gradient(model, theta, x, y, *rest):
        found = gsam_gradient(model, theta, x, y, *rest)
        seen.append(len(y))
        right.append(int((found[1].argmax(dim=1) == y).sum()))
        return found
    monkeypatch.setattr("buffer.experts.gsam_gradient", gradient)
    train_expert(config, toy_data, 0, SavedEpochs(tmp_path), curriculum=Some())
    assert asked == [0, 1, 2] and seen == [10, 20, 30] and any(right)
    reached = [each["train_accuracy"] for each in SavedEpochs(tmp_path).reached()]
    assert reached == pytest.approx([count / size for count, size in zip(right, seen)])


def test_pad_epochs_must_rise(call, toy, tmp_path):
    done = call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", "--pad", "--rm_epoch_first=70",
                expect=2)
    assert "give them in rising order" in done.stderr


def test_experts_of_other_images_of_the_same_name_are_refused(call, toy, toy_experts, tmp_path):
    shutil.copytree(toy.data, tmp_path / "data")
    (tmp_path / "data" / "train" / "red" / "0.png").unlink()
    for script, options in (("distill/DATM.py", toy.distil), ("buffer/buffer_FTD.py", toy.train)):
        done = call(script, *options, f"--data_path={tmp_path / 'data'}", f"--buffer_path={toy_experts}", expect=2)
        assert "were trained on other images" in done.stderr


def test_pad_refuses_batch_norm(call, toy, tmp_path):
    done = call("buffer/buffer_FTD.py", *toy.train, "--model=ConvNetD1W4BN", "--pad",
                f"--buffer_path={tmp_path / 'new'}", expect=2)
    assert "batch norm" in done.stderr and not (tmp_path / "new").exists()


def test_only_one_rule_chooses_the_matched_part():
    assert matched_part(make(DistillConfig)) is None
    with pytest.raises(UserError, match="give one"):
        check_options(make(DistillConfig, depth_ratio=0.5, loss_ratio=0.5))


# --- MTT: experts of plain SGD -------------------------------------------------------------------------------


def test_with_rho_0_the_experts_are_torchs_sgd_to_the_bit(toy_data, tmp_path):
    config = make(BufferConfig, model="ConvNetD1W4", train_epochs=2, rho_max=0, rho_min=0, mom=0.9, l2=1e-3,
                  dsa_strategy="none", batch_train=20, lr_teacher=0.1, backend="plain")
    train_expert(config, toy_data, 0, SavedEpochs(tmp_path))
    with seeded(0, "expert", 0):
        network = network_for("ConvNetD1W4", toy_data)
    optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for epoch in range(2):
        total = right = 0
        order = torch.randperm(72, generator=generator(0, "expert", 0, "epoch", epoch))
        for batch in order.split(20):
            optimiser.zero_grad()
            logits, labels = network(toy_data.train_images[batch]), toy_data.train_labels[batch]
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            optimiser.step()
            total, right = total + loss.item() * len(batch), right + int((logits.argmax(dim=1) == labels).sum())
    last = SavedEpochs(tmp_path)[2]
    assert torch.equal(last["theta"], FlatModel(network).flatten())
    assert last["reached"]["loss"] == pytest.approx(total / 72, rel=1e-5)
    assert last["reached"]["train_accuracy"] == pytest.approx(right / 72)


# --- --dsa False, --parall_eva -------------------------------------------------------------------------------


def test_the_older_augmentation_is_used_where_it_was_published():
    assert augment.older_operations("MNIST", "ConvNet") == ("crop", "scale", "rotate")
    assert augment.older_operations("CIFAR10", "ConvNetBN") == ("crop", "noise")
    assert augment.older_operations("CIFAR10", "ConvNet") == ()
    dataset = SimpleNamespace(name="MNIST", image_size=(8, 8), channels=1)
    draw = drawer(make(DistillConfig, dsa=False), dataset, augment.older_operations("MNIST", "ConvNet"))(
        5, torch.Generator().manual_seed(0))
    assert set(draw.parameters) == {"crop", "scale", "rotate"}
    drawn = drawer(make(DistillConfig), dataset, ())(5, torch.Generator().manual_seed(0))
    assert drawn.operations in augment.GROUPS.values()
    dataset.name = "CIFAR10"
    older = augment.older_operations(dataset.name, "ConvNet")
    assert drawer(make(DistillConfig, dsa=False), dataset, older)(5, torch.Generator()).operations == ()


def test_per_image_augmentation_changes_each_image_by_one_operation():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, 12, 12, generator=random)
    drawn = augment.draw_per_image(("crop", "scale", "rotate", "noise"), 40, (12, 12), 2, random)
    rows, cols = drawn.parameters["crop"]
    changed = torch.stack([(rows != 0) | (cols != 0), drawn.parameters["scale"][0] != 1,
                           drawn.parameters["rotate"][0] != 0, drawn.parameters["noise"][0].flatten(1).any(dim=1)])
    assert (changed.sum(dim=0) <= 1).all() and (changed.sum(dim=1) >= 4).all()
    assert rows.abs().max() <= 4 and (drawn.parameters["scale"][0] - 1).abs().max() <= 0.2
    assert drawn.parameters["rotate"][0].abs().max() <= torch.pi / 4
    y = augment.apply(x, drawn)
    moved = (y - x).flatten(1).abs().amax(dim=1) > 1e-5
    assert torch.equal(moved, changed.any(dim=0))
    scale, rotate, noise = (drawn[0] for drawn in augment.draw_per_image(
        ("scale", "rotate", "noise"), 4000, (2, 2), 1, random).parameters.values())
    assert (float(scale.min()), float(scale.max())) == pytest.approx((0.8, 1.2), abs=0.01)
    assert float(rotate.abs().max()) == pytest.approx(torch.pi / 4, abs=0.02)
    assert float(noise[noise != 0].std()) == pytest.approx(0.001, rel=0.1)


def two_sets(data):
    return [DistilledSet(data.train_images[first::6], data.train_labels[first::6], torch.tensor(0.05))
            for first in (0, 1)]


def test_each_network_is_trained_on_its_set(toy_data):
    config = make(EvaluationConfig, model="ConvNetD1W4", num_eval=3, epoch_eval_train=2, zca=True)
    few = two_sets(toy_data)
    of_first, of_second, of_both = (evaluate(config, toy_data, sets)[0].accuracies for sets in (*few, few))
    assert of_both == [of_first[0], of_second[1], of_first[2]] and of_first != of_second


def test_evaluation_in_processes_is_the_same(toy_data, monkeypatch):
    """Two processes of one thread each give the accuracies of one process; the odd network is trained last."""
    config = make(EvaluationConfig, model="ConvNetD1W4", num_eval=3, epoch_eval_train=2, zca=True)
    few = two_sets(toy_data)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = evaluate(config, toy_data, few)
        torch.set_num_threads(2)
        monkeypatch.setattr("distill.evaluate.networks.PROCESSES_PAY", 0)
        in_other_processes = []
        monkeypatch.setattr("distill.evaluate.networks.in_processes", lambda function, jobs, processes, *rest:
                            in_other_processes.extend(jobs) or in_processes(function, jobs, processes, *rest))
        epochs = []
        assert evaluate(config, toy_data, few, on_epoch=lambda: epochs.append(1))[0].accuracies[:2] == \
            one[0].accuracies[:2]
        assert len(in_other_processes) == 2 and len(epochs) == 9
    finally:
        torch.set_num_threads(threads)


def _ended_from_outside(job, tick):
    os.kill(os.getpid(), signal.SIGKILL)


def _refused(job, tick):
    raise UserError(f"no {job}")


class OddError(Exception):
    def __init__(self, one, two):  # unpickling passes one argument, so the exception itself cannot be sent back
        super().__init__(f"{one}{two}")


def _failed(job, tick):
    raise OddError("what", "ever")


class KilledAtItsStart:
    def __init__(self):
        self.large = bytes(1 << 20)

    def __setstate__(self, state):
        os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, job, tick):
        return None


def _full(job, tick):
    raise MemoryError


@pytest.mark.parametrize("function, error, said", [
    (_ended_from_outside, UserError, "ended from outside.*--threads 1"), (_refused, UserError, "^no a$"),
    (KilledAtItsStart(), UserError, "ended from outside"),
    (_failed, RuntimeError, "in _failed(.|\n)*OddError: whatever"), (_full, MemoryError, "^MemoryError$")])
def test_a_process_that_fails_is_told_of_and_others_are_left_alone(function, error, said):
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    try:
        with pytest.raises(error, match=said):
            in_processes(function, ["a", "a"], 2)
        assert other.is_alive() and multiprocessing.active_children() == [other]
    finally:
        other.kill()


def test_processes_get_no_more_than_they_need(toy_data, monkeypatch):
    config = make(EvaluationConfig, model="ConvNetD1W4", num_eval=2, epoch_eval_train=1, zca=True)
    larger = dataclasses.replace(toy_data, train_images=toy_data.train_images.repeat(100, 1, 1, 1))
    monkeypatch.setattr("distill.evaluate.networks._processes_that_pay", lambda *_: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    sizes = []

    def measured(function, jobs, *rest):
        sizes.append(len(pickle.dumps(function)))
        return in_processes(function, jobs, *rest)
    monkeypatch.setattr("distill.evaluate.networks.in_processes", measured)
    evaluate(config, larger, DistilledSet(larger.train_images[:3], torch.tensor([0, 1, 2]), torch.tensor(0.1)))
    assert sizes[0] < 200_000


# --- the self-describing file --------------------------------------------------------------------------------


def test_a_set_saved_whole_comes_back(call, toy, toy_experts, tmp_path):
    call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", "--run_name=run", f"--log_path={tmp_path}")
    folder = tmp_path / TOY_RUN / "Normal"
    loaded = DistilledSet.load(folder / "distilled.safetensors")
    assert torch.equal(loaded.images, torch.load(folder / "images_best.pt", weights_only=True))
    assert torch.equal(loaded.labels, torch.load(folder / "labels_best.pt", weights_only=True))
    assert float(loaded.lr) == float(torch.load(folder / "lr_best.pt", weights_only=True))
    assert loaded.classes == ("blue", "green", "red") and loaded.config["ipc"] == 2
    pixels = torch.load(folder / "images_zca_best.pt", weights_only=True)
    torch.testing.assert_close(loaded.pixels(), pixels)
    torch.testing.assert_close(loaded.space.from_pixels(pixels), loaded.images, rtol=1e-3, atol=1e-3)
    images, labels = next(iter(torch.utils.data.DataLoader(loaded, batch_size=4)))
    assert images.shape == (4, 3, 8, 8) and labels.shape == (4, 3)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_set_is_refused(tmp_path, content):
    (tmp_path / "distilled.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="distilled"):
        DistilledSet.load(tmp_path / "distilled.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        DistilledSet.load(tmp_path / "none.safetensors")


# --- what the options do not show ----------------------------------------------------------------------------


def test_every_so_many_iterations_a_set_is_saved_evaluated_or_not(call, toy, toy_experts, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.plan.SAVE_INTERVAL", 3)
    call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--eval_it=4",
         "--skip_first_eva")
    assert {path.stem for path in tmp_path.rglob("images_[0-9].pt")} == {"images_0", "images_3", "images_4"}


def test_experts_train_in_train_mode_and_are_tested_in_eval_mode(toy_data, monkeypatch, tmp_path):
    """Only batch norm depends on the mode."""
    modes = []
    monkeypatch.setattr("buffer.experts.gsam_gradient", lambda model, *rest: modes.append(model.network.training) or
                        gsam_gradient(model, *rest))
    monkeypatch.setattr("buffer.experts.accuracy", lambda predict, *rest: modes.append(predict.func.network.training) or
                        accuracy(predict, *rest))
    config = make(BufferConfig, model="ConvNetD1W4BN", train_epochs=2, batch_train=40, rho_max=0.01, rho_min=0.01)
    train_expert(config, toy_data, 0, SavedEpochs(tmp_path))
    assert modes == [True, True, False, True, True, False]


def test_an_expert_that_diverges_ends_its_training(toy_data, tmp_path):
    config = make(BufferConfig, model="ConvNetD1W4", lr_teacher=1e30, rho_max=0, rho_min=0, batch_train=16)
    saved = SavedEpochs(tmp_path)
    with pytest.raises(UserError, match="expert 0 diverged in epoch 1"):
        train_expert(config, toy_data, 0, saved)
    assert len(saved) == 1  # the initial parameters


def test_networks_are_tested_in_eval_mode(toy_data, monkeypatch):
    modes = []
    monkeypatch.setattr("distill.evaluate.networks.predictions", lambda predict, images: modes.append(
        predict.func.network.training) or torch.zeros(len(images), dtype=torch.long))
    config = make(EvaluationConfig, model="ConvNetD1W4", num_eval=2, epoch_eval_train=1)
    evaluate(config, toy_data, DistilledSet(toy_data.train_images[:6], toy_data.train_labels[:6], torch.tensor(0.1)))
    assert modes == [False, False]
