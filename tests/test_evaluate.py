"""The evaluation's learning rates and training; the real images and labels that a distillation starts from."""

from dataclasses import replace

import pytest
import torch

from distill.distilled_set import DistilledSet
from distill.evaluate.networks import evaluate
from distill.evaluate.real_images import drawn
from distill.evaluate.saved_accuracies import key_of
from distill.evaluate.train import learning_rate, train_network
from distill.initialize import class_labels, expert_labels, expert_logits, predicted_correctly, random_real
from distill.result_files import Score, as_json
from utils.config import BaselineConfig, EvaluationConfig, make
from utils.data.augment import Draw
from utils.data.datasets import Dataset, ImageSpace
from utils.loss_and_accuracy import predictions
from utils.networks import build_network
from utils.parameters import FlatModel, flatten


def test_rates_equal_the_published(golden_ops):
    for epochs, published in golden_ops["eval_lr"].items():
        rates = [learning_rate(0.01, epoch, epochs) for epoch in range(epochs + 1)]
        assert rates == pytest.approx(published, rel=1e-12), epochs


def test_training_is_torch_sgd_with_a_fresh_optimiser_at_the_drop():
    """With full batches and no augmentation only the order is random, and the batch mean does not depend on it."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    ours, theirs = (build_network("ConvNetD1W4", 1, 3, (8, 8)).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    model = FlatModel(ours)
    theta = train_network(model, model.flatten(), images, labels, 0.1, epochs=5, batch_size=4,
                          draw=lambda batch, random: Draw(), random=torch.Generator())
    for rate, epochs in ((0.1, 4), (0.01, 2)):
        optimiser = torch.optim.SGD(theirs.parameters(), rate, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            optimiser.zero_grad()
            (-(labels.softmax(1) * theirs(images).log_softmax(1)).sum(1).mean()).backward()
            optimiser.step()
    for one, other in zip(model.unflatten(theta), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_every_epoch_of_a_training_has_an_order_of_its_own(monkeypatch):
    model, seen = FlatModel(build_network("ConvNetD1W4", 1, 10, (8, 8))), []
    gradient = model.gradient
    monkeypatch.setattr(model, "gradient", lambda theta, x, y: seen.extend(y.tolist()) or gradient(theta, x, y))
    train_network(model, model.flatten(), torch.zeros(10, 1, 8, 8), torch.arange(10), 0.1, epochs=2, batch_size=4,
                  draw=lambda batch, random: Draw(), random=torch.Generator().manual_seed(0))
    epochs = {tuple(seen[first:first + 10]) for first in range(0, 30, 10)}
    assert len(seen) == 30 and len(epochs) == 3 and all(sorted(epoch) == list(range(10)) for epoch in epochs)


def test_each_network_has_an_initialisation_of_its_own_and_keeps_it(toy_data, monkeypatch):
    config = make(EvaluationConfig, dataset="ImageFolder", model="ConvNetD1W4", num_eval=3, epoch_eval_train=1)
    distilled = DistilledSet(toy_data.train_images[:6], toy_data.train_labels[:6], torch.tensor(0.1))
    begun, orders = [], []
    monkeypatch.setattr("distill.evaluate.networks.train_network", lambda model, theta, *given, random, **more: (
        begun.append(theta), orders.append(random.initial_seed()), theta)[-1])
    for address in ("here", "here", "there"):  # as the evaluations of a run at different iterations
        evaluate(config, toy_data, distilled, address)
    assert len(torch.stack(begun).unique(dim=0)) == 6 and all(map(torch.equal, begun[:3], begun[3:6]))
    assert len(set(orders)) == 6 and orders[:3] == orders[3:6]


def test_saved_accuracies_are_of_one_set_and_one_dataset(toy_data):
    one = DistilledSet(toy_data.train_images[:3], torch.tensor([0, 1, 2]), torch.tensor(0.1))
    sets = one, one.at(0.2), replace(one, labels=one.labels.flip(0)), replace(one, images=one.images + 1)
    assert len({key_of([make(EvaluationConfig)], data, each) for each in sets
                for data in (toy_data, replace(toy_data, fingerprint="other"))}) == 8


def test_each_seed_draws_other_real_images(toy_data):
    one, other = (drawn(make(BaselineConfig, ipc=4, num_eval=2, seed=seed), toy_data) for seed in (0, 1))
    assert not any(map(torch.equal, [*one, one[0]], [*other, one[1]]))


def test_experts_with_batch_norm_label_by_the_statistics_of_the_images():
    model, x = FlatModel(build_network("ConvNetD1W4BN", 1, 3, (8, 8))), torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(expert_logits(model, model.flatten(), x), model.network.train()(x).detach())


def test_score_is_mean_and_population_std():
    score = Score("ConvNet", [0.5, 0.7])
    assert score.mean == pytest.approx(0.6) and score.std == pytest.approx(0.1)
    assert str(score) == "ConvNet: 60.00 ± 10.00 % over 2"
    assert as_json(Score("ConvNet", [0.5]))["std"] is None  # unknown, of one network


def test_label_initialisation_equals_the_published(golden_iteration):
    meta, published = golden_iteration["meta"], golden_iteration["exact"]
    model = FlatModel(build_network(meta["model"], 3, 10, (32, 32)))
    classes = torch.arange(10).repeat_interleave(meta["ipc"])
    labels, unknown = expert_labels(model, map(flatten, golden_iteration["final_params"]), published["images"], classes)
    torch.testing.assert_close(labels, published["labels"], rtol=1e-4, atol=1e-5)
    assert unknown == 0


class FirstPixel(torch.nn.Module):
    """A network with one parameter, `shift`: it predicts class round(first pixel + shift)."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1))
        self.num_classes = num_classes

    def forward(self, x):
        guess = (x[:, 0, 0, 0] + self.shift).round().long() % self.num_classes
        return 10.0 * torch.nn.functional.one_hot(guess, self.num_classes).float() + x[:, 0, 0, 1:2] / 100


def readable_dataset(first_pixels, labels, num_classes=3):
    images = torch.zeros(len(labels), 1, 2, 2)
    images[:, 0, 0, 0] = torch.tensor(first_pixels, dtype=torch.float)
    images[:, 0, 0, 1] = torch.arange(len(labels))
    labels = torch.tensor(labels)
    return Dataset("readable", images, labels, images, labels, tuple(f"class {c}" for c in range(num_classes)),
                   ImageSpace((0.0,), (1.0,), None), "")


def test_only_images_that_an_expert_gets_right_are_chosen():
    labels = [0, 1, 2] * 8
    right = [position % 2 == 0 for position in range(24)]
    dataset = readable_dataset([label if ok else label + 1 for label, ok in zip(labels, right)], labels)
    model = FlatModel(FirstPixel(3))
    chosen, notes = predicted_correctly(model, lambda: iter([torch.zeros(1)]), dataset, 3, torch.Generator())
    assert notes == [] and dataset.train_labels[chosen].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert all(right[index] for index in chosen.tolist()) and len(set(chosen.tolist())) == 9


def test_the_next_expert_judges_what_the_first_got_wrong():
    labels = [0, 1, 2] * 8
    dataset = readable_dataset([label if position < 6 else label + 1 for position, label in enumerate(labels)], labels)
    model = FlatModel(FirstPixel(3))
    experts = [torch.zeros(1), torch.full((1,), -1.0)]  # the second is right wherever the first is wrong
    chosen, notes = predicted_correctly(model, lambda: iter(experts), dataset, 5, torch.Generator())
    assert notes == [] and len(set(chosen.tolist())) == 15
    assert all(set(range(6)) & set(chosen[5 * c: 5 * c + 5].tolist()) == {c, c + 3} for c in range(3))


def test_too_few_right_images_are_filled_and_said():
    labels = [0, 1, 2] * 8
    dataset = readable_dataset([label if label else 1 for label in labels], labels)  # class 0 is never right
    model = FlatModel(FirstPixel(3))
    chosen, notes = predicted_correctly(model, lambda: iter([torch.zeros(1)]), dataset, 2, torch.Generator())
    assert len(notes) == 1 and "too few images of 1 class correctly (class 0: 0 of 2 wanted)" in notes[0]
    assert sorted(chosen[:2].tolist()) == [18, 21]  # the highest logit of the class


def test_expert_labels_fall_back_to_all_experts_where_none_is_right():
    dataset = readable_dataset([0, 1, 1], [0, 1, 2])
    model = FlatModel(FirstPixel(3))
    experts = [torch.zeros(1), torch.zeros(1), torch.full((1,), -1.0)]
    labels, unknown = expert_labels(model, iter(experts), dataset.train_images, dataset.train_labels)
    assert unknown == 1
    torch.testing.assert_close(labels[0], torch.tensor([10.0, 0, 0]))  # the two that are right, not the third
    torch.testing.assert_close(labels[2], torch.tensor([10 / 3, 20 / 3, 0.0]) + 0.02)  # all three


def test_random_real_takes_ipc_of_each_class_and_some_again_where_there_are_fewer():
    dataset = readable_dataset([0] * 9, [0, 1, 2] * 3)
    chosen = random_real(dataset, 3, torch.Generator().manual_seed(0))
    assert dataset.train_labels[chosen].tolist() == [0] * 3 + [1] * 3 + [2] * 3 and len(set(chosen.tolist())) == 9
    more = random_real(dataset, 4, torch.Generator().manual_seed(0))
    assert dataset.train_labels[more].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and set(more.tolist()) == set(range(9))


def test_labels_for_noise_name_their_class():
    dataset = readable_dataset([0, 1, 2] * 3, [0, 1, 2] * 3)
    labels = class_labels(FlatModel(FirstPixel(3)), torch.zeros(1), dataset, 2, torch.Generator())
    assert labels.argmax(dim=1).tolist() == [0, 0, 1, 1, 2, 2]


def test_large_images_are_tested_fewer_at_a_time():
    for side, most in ((32, 100), (64, 100), (128, 25), (1024, 1)):
        seen = []
        images = torch.zeros(1, 1, side, side).expand(120, 1, side, side)
        predictions(lambda x, seen=seen: seen.append(len(x)) or torch.zeros(len(x), 3), images)
        assert max(seen) == most and sum(seen) == 120
