"""GSAM against the published optimiser, and its limits."""

import pytest
import torch

from buffer.gsam import ascent, descent_direction, frozen_batch_norm_statistics, gsam_gradient
from utils.networks import build_network
from utils.parameters import FlatModel, flatten


@pytest.mark.parametrize("case, tolerance", [("gsam_convnet", 1e-6), ("gsam_momentum_decay", 5e-4),
                                             ("gsam_not_adaptive", 5e-4)])
def test_three_steps_equal_the_published_ones(golden_ops, case, tolerance):
    golden = golden_ops[case]
    model = FlatModel(build_network(golden["model"], 3, 10, (32, 32)))
    theta = flatten(golden["before"])
    optimiser = torch.optim.SGD([theta], golden["lr"], momentum=golden["momentum"], weight_decay=golden["weight_decay"])
    for x, y, published in zip(golden["images"], golden["labels"], golden["losses"]):
        loss, logits, theta.grad = gsam_gradient(
            model, theta, x, y, golden["rho"], golden["alpha"], golden["adaptive"], model.network)
        assert float(loss) == pytest.approx(published, rel=tolerance)
        assert logits.shape == (8, 10)
        optimiser.step()
    after = flatten(golden["after"])
    assert (theta - after).norm() <= tolerance * after.norm()


def test_ascent_has_length_rho():
    gradient, theta = torch.randn(50), torch.randn(50)
    assert float(ascent(theta, gradient, 0.3, adaptive=False).norm()) == pytest.approx(0.3, rel=1e-5)
    adaptive = ascent(theta, gradient, 0.3, adaptive=True)
    assert float((adaptive / theta.abs()).norm()) == pytest.approx(0.3, rel=1e-4)  # in ASAM's scaled norm


def test_descent_direction_subtracts_what_is_orthogonal():
    gradient, perturbed = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    torch.testing.assert_close(descent_direction(gradient, perturbed, 0.5), torch.tensor([3.0, -1.0]))
    torch.testing.assert_close(descent_direction(perturbed, perturbed, 0.5), perturbed)


def test_rho_zero_is_the_plain_gradient_to_the_bit():
    torch.manual_seed(0)
    network = build_network("ConvNetD2W4", 1, 3, (8, 8))
    model = FlatModel(network, "plain")
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    _, _, direction = gsam_gradient(model, model.flatten(), x, y, 0.0, 0.4, True, model.network)
    torch.nn.functional.cross_entropy(network(x), y).backward()
    assert torch.equal(direction, torch.cat([parameter.grad.reshape(-1) for parameter in network.parameters()]))


def test_batch_norm_statistics_move_once_a_step():
    torch.manual_seed(0)
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    once, stepped = (build_network("ConvNetD2W4BN", 1, 3, (8, 8)) for _ in range(2))
    stepped.load_state_dict(once.state_dict())
    once(x)
    model = FlatModel(stepped)
    gsam_gradient(model, model.flatten(), x, y, 0.5, 0.3, True, model.network)
    for (name, expected), actual in zip(once.named_buffers(), stepped.buffers()):
        if "running" in name:
            assert torch.equal(actual, expected), name
    with frozen_batch_norm_statistics(stepped):
        assert all(layer.momentum == 0 for layer in stepped.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    assert all(layer.momentum == 0.1 for layer in stepped.modules() if isinstance(layer, torch.nn.BatchNorm2d))
