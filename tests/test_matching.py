"""The three gradients: against the published iteration, and against each other in float64."""

from types import SimpleNamespace

import pytest
import torch

from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.matching import METHODS, Match, deep_part, far_part, losses_on_the_way, match_trajectory, matching_loss
from utils.config import DistillConfig, make
from utils.data import augment
from utils.data.names import parse_strategy
from utils.loss_and_accuracy import cross_entropy
from utils.networks import build_network
from utils.parameters import FlatModel, flatten


def per_image_error(actual, expected):
    error = (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return float(error.max())


@pytest.fixture(scope="module")
def model():
    """In float64: in float32, a single ReLU flipped by another processor's rounding moves every image by 1e-3."""
    return FlatModel(build_network("ConvNetW32", 3, 10, (32, 32)).double())


def published_match(golden_iteration, model, method):
    """The published code's results, and our match of the same inputs."""
    published = golden_iteration["tesla" if method == "tesla" else "exact"]
    start, target = (flatten(golden_iteration[name]).double() for name in ("start", "target"))
    images, labels, lr = (published[name].double() for name in ("images", "labels", "lr"))
    return published, match_trajectory(model, start, target, images, labels, lr, published["batches"], method=method)


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_published_iteration(golden_iteration, model, method):
    published, match = published_match(golden_iteration, model, method)
    assert float(match.loss) == pytest.approx(published["loss"], rel=1e-5)
    assert per_image_error(match.grad_images, published["grad_images"]) < 1e-5
    assert per_image_error(match.grad_labels, published["grad_labels"]) < 1e-5
    assert float(match.grad_lr) == pytest.approx(float(published["grad_lr"]), rel=1e-5)


@pytest.mark.parametrize("method", ["exact", "tesla"])
def test_update_equals_the_published_one(golden_iteration, model, method):
    """With the loop's own optimiser, so it covers learning rates, momenta, and which tensor gets which."""
    meta = golden_iteration["meta"]
    published, match = published_match(golden_iteration, model, method)
    start = DistilledSet(published["images"].double(), published["labels"].double(), published["lr"].double())
    config = make(DistillConfig, **{key: meta[key] for key in ("lr_img", "lr_lr", "lr_y", "Momentum_y")})
    distillation = Distillation(config, SimpleNamespace(image_size=(32, 32)), None, start)
    distillation.update(match)
    distilled = distillation.set
    assert per_image_error(distilled.images, published["after_images"]) < 1e-5
    assert per_image_error(distilled.labels, published["after_labels"]) < 1e-5
    assert float(distilled.lr) == pytest.approx(float(published["after_lr"]), rel=1e-5)


@pytest.mark.parametrize("lr_param", ["plain", "log"])
def test_each_tensor_has_its_own_rate_and_momentum(lr_param):
    """As torch.optim.SGD; with `log`, the step is one of log α, of the same size at first."""
    config = make(DistillConfig, lr_img=3, lr_lr=0.01, lr_y=5, Momentum_y=0.8, lr_teacher=0.1, lr_param=lr_param)
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 1, 2, 2, generator=random), torch.randn(2, 2, generator=random), torch.tensor(0.1)]
    state = Distillation(config, SimpleNamespace(image_size=(2, 2)), None, DistilledSet(*tensors))
    images, labels, rate = theirs = [*tensors[:2], tensors[2].log() if lr_param == "log" else tensors[2]]
    optimiser = torch.optim.SGD([{"params": [images], "lr": 3, "momentum": 0.5},
                                 {"params": [labels], "lr": 5, "momentum": 0.8},
                                 {"params": [rate], "lr": 0.01 if lr_param == "plain" else 1.0, "momentum": 0.5}], 1.0)
    for _ in range(3):
        images.grad, labels.grad, rate.grad = (torch.randn(each.shape, generator=random) for each in theirs)
        of_lr = rate.grad / state.set.lr if lr_param == "log" else rate.grad
        state.update(Match(torch.tensor(0.5), images.grad, labels.grad, of_lr))
        optimiser.step()
    assert torch.equal(state.set.images, images) and torch.equal(state.set.labels, labels)
    assert float(state.set.lr) == pytest.approx(float(rate.exp() if lr_param == "log" else rate), rel=1e-5)


def problem(seed=0, count=7, sizes=(3, 2, 4, 3, 1), name="ConvNetD2W4", strategy="color_crop_cutout_flip_scale_rotate",
            channels=2, size=(8, 8), classes=3):
    """A small matching problem in float64; batches of uneven sizes that share images."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = build_network(name, channels, classes, size).double()
    model = FlatModel(network)
    theta = model.flatten()
    batches = [torch.randperm(count, generator=random)[:length] for length in sizes]
    draws = [augment.draw(parse_strategy(strategy), len(batch), size, random) for batch in batches]
    return dict(model=model, theta_start=theta,
                theta_target=theta + 0.1 * torch.randn(theta.shape, generator=random, dtype=torch.float64),
                images=torch.randn(count, channels, *size, generator=random, dtype=torch.float64),
                labels=torch.randn(count, classes, generator=random, dtype=torch.float64),
                lr=torch.tensor(0.05, dtype=torch.float64), batches=batches, augment=draws)


def assert_equal_matches(one, other, tolerance=1e-10):
    assert float(one.loss) == pytest.approx(float(other.loss), rel=tolerance)
    for a, b in zip(one[1:], other[1:]):
        if a is None:
            assert b is None
        else:
            assert (a - b).norm() <= tolerance * b.norm()
            assert b.norm() > 0


@pytest.mark.parametrize("strategy", ["none", "color_crop_cutout_flip_scale_rotate"])
@pytest.mark.parametrize("seed", range(4))
def test_exact_equals_unroll(strategy, seed):
    """Batches of uneven sizes, with images used by several steps."""
    given = problem(seed, strategy=strategy)
    assert_equal_matches(match_trajectory(**given, method="exact"), match_trajectory(**given, method="unroll"))


@pytest.mark.parametrize("name", ["MLP", "ConvNetD1W4BN", "ConvNetD1W4LN", "ConvNetD2W4GNAL", "ConvNetD2W4NNMP",
                                  "ConvNetD2W4ASNP", "ConvNetD1W4IN"])
def test_exact_equals_unroll_for_other_networks(name):
    given = problem(5, name=name)
    assert_equal_matches(match_trajectory(**given, method="exact"), match_trajectory(**given, method="unroll"))


def through_the_last(given, steps):
    """The definition of `adjoint_steps`: autograd through the last steps alone, from the θ at which they begin."""
    start, target, first = given["theta_start"], given["theta_target"], len(given["batches"]) - steps
    theta = start
    for batch, draw in zip(given["batches"][:first], given["augment"][:first]):
        x = augment.apply(given["images"][batch], draw)
        theta = theta - given["lr"] * given["model"].gradient(theta, x, given["labels"][batch])[2]
    last = match_trajectory(**given | {"theta_start": theta, "batches": given["batches"][first:],
                                       "augment": given["augment"][first:]}, method="unroll")
    # This match's loss is relative to the distance from that θ; rescale it to the distance from the start.
    nearer = (theta - target).square().sum() / (start - target).square().sum()
    return Match(*(each * nearer for each in last))


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_truncated_gradient_goes_through_the_last_steps_alone(steps):
    given = problem(0)
    exact, truncated = match_trajectory(**given), match_trajectory(**given, adjoint_steps=steps)
    assert_equal_matches(truncated, through_the_last(given, steps))
    assert torch.equal(truncated.loss, exact.loss)
    for one, other in zip(truncated[1:], exact[1:]):
        assert torch.equal(one, other) == (steps == 5)


def test_an_image_repeated_within_a_step_and_across_steps():
    given = problem(1, sizes=(2, 2), strategy="none")
    given["batches"] = [torch.tensor([0, 0, 3]), torch.tensor([0, 1])]
    given["augment"] = None
    exact = match_trajectory(**given, method="exact")
    assert_equal_matches(exact, match_trajectory(**given, method="unroll"))
    assert exact.grad_images[2].abs().sum() == 0  # no step used it
    assert exact.grad_images[0].abs().sum() > 0


def test_hard_labels_have_no_gradient():
    given = problem(2)
    given["labels"] = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    exact = match_trajectory(**given, method="exact")
    assert exact.grad_labels is None
    assert_equal_matches(exact, match_trajectory(**given, method="unroll"))


def test_exact_gradient_is_the_slope_of_the_loss():
    """Independent of autograd: central differences of the loss along random directions."""
    given = problem(3)
    match = match_trajectory(**given)
    random = torch.Generator().manual_seed(0)
    for key, gradient in (("images", match.grad_images), ("labels", match.grad_labels), ("lr", match.grad_lr)):
        direction = torch.randn(given[key].shape, generator=random, dtype=torch.float64)
        losses = [matching_loss(**given | {key: given[key] + step * direction}) for step in (1e-5, -1e-5)]
        slope = float(losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-9)


def test_tesla_is_exact_for_one_step_and_differs_for_more():
    one = problem(4, sizes=(5,))
    assert_equal_matches(match_trajectory(**one, method="tesla"), match_trajectory(**one, method="exact"))
    more = problem(4)
    tesla, exact = (match_trajectory(**more, method=method) for method in ("tesla", "exact"))
    assert float(tesla.loss) == float(exact.loss)
    assert (tesla.grad_images - exact.grad_images).norm() > 1e-3 * exact.grad_images.norm()


@pytest.mark.parametrize("method", METHODS)
def test_arguments_are_left_alone(method):
    given = problem(6)
    before = {key: value.clone() for key, value in given.items() if isinstance(value, torch.Tensor)}
    given["images"].requires_grad_()
    match = match_trajectory(**given, method=method)
    for key, value in before.items():
        assert torch.equal(given[key], value)
    assert given["images"].grad is None and given["labels"].requires_grad is False
    assert not any(tensor.requires_grad for tensor in match)


def test_matching_loss_is_the_loss_of_the_match():
    given = problem(7)
    assert float(matching_loss(**given)) == pytest.approx(float(match_trajectory(**given).loss), rel=1e-12)


@pytest.mark.parametrize("part", [deep_part(0.4), far_part(0.6)])
@pytest.mark.parametrize("seed", range(2))
def test_exact_equals_unroll_on_a_part_of_the_parameters(part, seed):
    given = problem(seed)
    whole = match_trajectory(**given)
    exact = match_trajectory(**given, part=part)
    assert_equal_matches(exact, match_trajectory(**given, method="unroll", part=part))
    assert float(exact.loss) != float(whole.loss)
    theta = given["theta_start"].clone().requires_grad_()
    for batch, draw in zip(given["batches"], given["augment"]):
        loss = cross_entropy(given["model"](theta, augment.apply(given["images"][batch], draw)), given["labels"][batch])
        theta = (theta - given["lr"] * torch.autograd.grad(loss, theta)[0]).detach().requires_grad_()
    kept, ends = part(theta.detach(), given["theta_target"]), (theta.detach(), given["theta_start"])
    of_end, of_start = ((each - given["theta_target"])[kept].square().sum() for each in ends)
    assert float(exact.loss) == pytest.approx(float(of_end / of_start), rel=1e-9)
    assert float(matching_loss(**given, part=part)) == pytest.approx(float(exact.loss), rel=1e-12)


def test_the_deep_part_is_the_last_and_the_far_part_the_farthest():
    final, target = torch.tensor([0.0, 5, 1, 3]), torch.zeros(4)
    assert deep_part(0.5)(final, target).tolist() == [False, False, True, True]
    assert far_part(0.5)(final, target).tolist() == [False, True, False, True]
    assert deep_part(0.0)(final, target).all() and far_part(0.0)(final, target).all()


def test_one_training_shows_the_losses_of_all_shorter_ones(golden_iteration, model):
    published = golden_iteration["exact"]
    start, target = (flatten(golden_iteration[name]).double() for name in ("start", "target"))
    given = [published[name].double() for name in ("images", "labels", "lr")]
    of_all = losses_on_the_way(model, start, [target, start + 1], *given, published["batches"],
                               steps=range(1, len(published["batches"]) + 1))
    for steps in range(1, len(published["batches"]) + 1):
        for row, end in enumerate((target, start + 1)):
            alone = matching_loss(model, start, end, *given, published["batches"][:steps])
            assert float(of_all[row, steps - 1]) == pytest.approx(float(alone), rel=1e-12)
