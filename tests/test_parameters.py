"""Flattening networks to θ and back, the losses, and steps of SGD."""

import gc
import weakref

import pytest
import torch

from utils.loss_and_accuracy import cross_entropy
from utils.networks import build_network
from utils.parameters import FlatModel, flatten, sgd_step


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FlatModel(build_network("ConvNetD2W4", 1, 3, (8, 8)))


def test_flatten_and_unflatten_are_inverse(model):
    theta = model.flatten()
    assert theta.shape == (model.num_parameters,) and not theta.requires_grad
    for part, parameter in zip(model.unflatten(theta), model.network.parameters(), strict=True):
        assert torch.equal(part, parameter)
    assert torch.equal(flatten(model.unflatten(theta)), theta)


def test_flatten_copies(model):
    theta = model.flatten()
    theta += 1
    assert not torch.equal(theta, model.flatten())


def test_forward_takes_its_parameters_from_theta(model):
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(model.flatten(), x), model.network(x))
    other = model.flatten() * 0
    assert torch.equal(model(other, x), torch.zeros(2, 3))
    assert model.flatten().abs().sum() > 0  # the network's own parameters are unchanged


def test_soft_cross_entropy_equals_the_published(golden_ops):
    golden = golden_ops["soft_cross_entropy"]
    loss = cross_entropy(golden["logits"], golden["label_logits"])
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-6)


def test_confident_soft_labels_become_hard_ones():
    logits, classes = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 0])
    soft = 1000.0 * torch.nn.functional.one_hot(classes, 4)
    torch.testing.assert_close(cross_entropy(logits, soft), cross_entropy(logits, classes))


def test_nothing_keeps_a_network_alive_but_its_model():
    """An evaluation trains many networks; GPU memory held until garbage collection would be missing for the next."""
    model = FlatModel(build_network("ConvNetD1W4", 1, 3, (8, 8)))
    network = weakref.ref(model.network)
    gc.disable()
    try:
        del model
        assert network() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("momentum, weight_decay", [(0.0, 0.0), (0.0, 0.1), (0.9, 0.0), (0.9, 5e-4)])
def test_a_step_is_that_of_torchs_sgd_to_the_bit(momentum, weight_decay):
    random = torch.Generator().manual_seed(0)
    ours = torch.randn(50, generator=random)
    theirs, velocity = ours.clone(), torch.zeros(50) if momentum else None
    optimiser = torch.optim.SGD([theirs], 0.1, momentum=momentum, weight_decay=weight_decay)
    for _ in range(3):
        theirs.grad = torch.randn(50, generator=random)
        sgd_step(ours, theirs.grad.clone(), velocity, 0.1, momentum, weight_decay)
        optimiser.step()
        assert torch.equal(ours, theirs)
