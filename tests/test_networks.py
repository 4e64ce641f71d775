"""Networks: parameters and logits against the published code, names, refusals, derivatives."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from distill.evaluate.networks import check_pool
from utils.config import EvaluationConfig, make
from utils.errors import UserError
from utils.networks import (
    EVALUATION_POOLS,
    NAMES,
    ConvNet,
    ConvNetPlan,
    build_network,
    evaluation_pool,
    has_batch_norm,
    same_network,
)

GOLDEN = torch.load(Path(__file__).parent / "golden" / "ops.pt", weights_only=True)["networks"]


def golden_parameters(network: nn.Module) -> dict[str, Tensor]:
    """The fill that ops.pt["networks_fill"] describes: a sine over all elements, scaled by fan-in, norms around 0.5."""
    filled, start = {}, 0
    for name, parameter in network.named_parameters():
        position = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        offset = 0.0 if parameter.dim() > 1 else 0.5
        values = ((position * 0.7071).sin() * (2 / fan_in) ** 0.5 + offset).float()
        filled[name] = values.reshape(parameter.shape).to(parameter.dtype)
        start += parameter.numel()
    return filled


def readable_side(name: str) -> int:
    return 64 if name.endswith("_Tiny") else 256 if name.startswith("ConvNet") else 32


@pytest.mark.parametrize("key", GOLDEN)
def test_network_is_the_published_one(key):
    name, size = key.split("/")
    channels, side = map(int, size.split("x"))
    network = build_network(name, channels, 10, (side, side)).double().eval()  # the same on every processor

    ours = [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]
    assert ours == [(name, tuple(shape)) for name, shape in GOLDEN[key]["parameters"]]

    elements = torch.arange(2 * channels * side * side, dtype=torch.float64)
    images = (0.37 * elements).sin().reshape(2, channels, side, side).float().double()
    with torch.no_grad():
        logits = functional_call(network, golden_parameters(network), (images,))
    expected = GOLDEN[key]["logits"]
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


def test_every_published_name_builds_and_classifies():
    assert len(set(NAMES)) == len(NAMES)
    for name in NAMES:
        side = readable_side(name)
        with torch.device("meta"):
            network = build_network(name, 3, 7, (side, side))
            assert network(torch.empty(2, 3, side, side)).shape == (2, 7), name
        assert has_batch_norm(network) == ("BN" in name)


@pytest.mark.parametrize(
    "name, plan",
    [
        ("ConvNet", ConvNetPlan(3, 128, "relu", "instance", "average")),
        ("ConvNetD4W64", ConvNetPlan(depth=4, width=64)),
        ("ConvNetW64D4", ConvNetPlan(depth=4, width=64)),
        ("ConvNetW48", ConvNetPlan(width=48)),
        ("ConvNetD4BN", ConvNetPlan(depth=4, norm="batch")),
        ("ConvNetALNNNP", ConvNetPlan(activation="leaky", norm="none", pooling="none")),
        ("ConvNetD2W8ASLNMP", ConvNetPlan(2, 8, "sigmoid", "layer", "max")),
        ("ConvNetKIP", ConvNetPlan(width=1024, norm="none")),
        ("ConvNetKIPD2", ConvNetPlan(depth=2, width=1024, norm="none")),
    ],
)
def test_suffixes_combine(name, plan):
    assert ConvNetPlan.parse(name) == plan
    with torch.device("meta"):
        network = build_network(name, 3, 5, (32, 32))
    assert isinstance(network, ConvNet)
    assert network.plan == plan


def test_names_of_one_network_are_the_same():
    for one, other, same in (("ConvNet", "ConvNetIN", True), ("ConvNetD4W64", "ConvNetW64D4", True),
                             ("ConvNetAS", "ConvNetAR", False), ("ConvNetMP", "ConvNet", False), ("MLP", "MLP", True),
                             ("MLP", "MLP_Tiny", True), ("MLP", "ConvNet", False), ("ResNet18", "ResNet18_AP", False)):
        assert same_network(one, other) is same_network(other, one) is same


def test_images_need_not_be_square():
    network = build_network("ConvNetW4", 3, 5, (16, 24))
    assert network(torch.zeros(2, 3, 16, 24)).shape == (2, 5)


@pytest.mark.parametrize(
    "name",
    [
        *("", "BN", "_Tiny", "ConvNet_Tiny", "ResNet18_Tiny_Tiny"),
        *("MyConvNetD4", "ConvNetd4", "ConvNetXX", "ConvNet64"),
        *("ConvNetD0", "ConvNetD9", "ConvNetD12", "ConvNetW0", "ConvNetW064", "ConvNetW4097"),
        *("ConvNetD3D4", "ConvNetKIPW64", "ConvNetBNIN"),
    ],
)
def test_unknown_name_is_refused(name):
    with pytest.raises(UserError, match=f"unknown network '{name}'; .* one each of D1-D8, W1-W4096"):
        build_network(name, 3, 10, (32, 32))


def test_unknown_name_like_no_other_is_given_all():
    with pytest.raises(UserError) as refusal:
        build_network("xyz", 3, 10, (32, 32))
    assert all(name in str(refusal.value) for name in NAMES)


@pytest.mark.parametrize(
    "given, meant", [("convnetd3", "ConvNetD3"), ("ResNet-18", "ResNet18"), ("LeNetTiny", "LeNet_Tiny")]
)
def test_unknown_name_is_given_its_nearest(given, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        build_network(given, 3, 10, (32, 32))


@pytest.mark.parametrize(
    "name, channels, side, complaint",
    [
        ("ConvNetD6", 3, 32, "depth 6 .* 32×32 allows 5"),
        ("ConvNetD6", 1, 28, "depth 6 .* 28×28 allows 5"),
        ("ConvNetW6GN", 3, 32, "width 6, give a multiple of 4"),
        ("LeNet", 3, 64, "LeNet cannot read 3×64×64 .* LeNet_Tiny reads 3×64×64"),
        ("LeNet_Tiny", 3, 32, "LeNet_Tiny cannot read 3×32×32 .* LeNet reads 3×32×32"),
        ("AlexNet", 3, 28, "cannot read 3×28×28"),
        ("VGG11BN", 1, 32, "cannot read 1×32×32"),
        ("ResNet18_AP", 3, 128, "cannot read 3×128×128"),
    ],
)
def test_impossible_size_is_refused(name, channels, side, complaint):
    with pytest.raises(UserError, match=complaint):
        build_network(name, channels, 10, (side, side))


def test_no_pooling_allows_any_depth():
    assert build_network("ConvNetD8W4NP", 3, 10, (4, 4))(torch.zeros(2, 3, 4, 4)).shape == (2, 10)


@pytest.mark.parametrize(
    "mode, model, names",
    [
        ("S", "ConvNetD4", ["ConvNetD4"]),
        ("S", "ConvNetD4BN", ["ConvNetD4"]),
        ("S", "ConvNetBNW32", ["ConvNetW32"]),
        ("S", "ResNet18BN_AP", ["ResNet18"]),
        ("C", "ConvNetD4BN", ["ConvNetD4BN", "ConvNet"]),
        ("C", "ConvNet", ["ConvNet"]),
        ("M", "ConvNet", ["ConvNet", "AlexNet", "VGG11", "ResNet18"]),
        ("W", "ConvNet", ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"]),
    ],
)
def test_evaluation_pool(mode, model, names):
    assert evaluation_pool(mode, model) == names


def test_evaluation_pools_hold_known_names():
    assert {name for pool in EVALUATION_POOLS.values() for name in pool} <= set(NAMES)


@pytest.mark.parametrize("mode", ["M", "BN"])
def test_pools_use_the_tiny_classics_at_64x64(mode):
    """The `_Tiny` networks read 64×64 images."""
    pool = evaluation_pool(mode, "ConvNetD4", (64, 64))
    assert pool == [name if name.startswith("ConvNet") else f"{name}_Tiny" for name in EVALUATION_POOLS[mode]]
    dataset = SimpleNamespace(channels=3, num_classes=2, image_size=(64, 64))
    check_pool(make(EvaluationConfig, eval_mode=mode), dataset)
    assert evaluation_pool("S", "ResNet18BN_Tiny", (64, 64)) == ["ResNet18_Tiny"]
    assert evaluation_pool("C", "MLP", (64, 64)) == ["MLP", "ConvNet"]


def test_unknown_evaluation_mode_is_refused():
    with pytest.raises(UserError, match=r"unknown eval_mode 'X'; allowed: S, C, M, W, D, A, P, N, BN"):
        evaluation_pool("X", "ConvNet")


class Sensitivity:
    """s(θ, x) = ⟨∇_θ L(θ, x), v⟩ and its gradient in θ and x: the second derivative that trajectory matching takes."""

    def __init__(self, name: str, image_size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        self.network = build_network(name, 3, 4, image_size).double()
        self.theta = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        self.images = torch.randn(3, 3, *image_size, dtype=torch.float64)
        self.direction = [torch.randn_like(parameter) for parameter in self.theta.values()]

    def value(self, theta: list[Tensor], images: Tensor) -> Tensor:
        theta = [parameter.requires_grad_() for parameter in theta]
        logits = functional_call(self.network, dict(zip(self.theta, theta)), (images,))
        gradient = torch.autograd.grad(cross_entropy(logits, torch.tensor([0, 1, 2])), theta, create_graph=True)
        return sum((g * v).sum() for g, v in zip(gradient, self.direction))

    def gradient(self) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (*self.theta.values(), self.images)]
        # allow_unused: a bias that a norm cancels, or that only shifts the logits, may drop out of s
        gradients = torch.autograd.grad(self.value(inputs[:-1], inputs[-1]), inputs, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients)]

    def difference(self, along: list[Tensor], step: float = 1e-6) -> float:
        ends = []
        for sign in (1, -1):
            moved = [tensor + sign * step * a for tensor, a in zip((*self.theta.values(), self.images), along)]
            ends.append(self.value(moved[:-1], moved[-1]).item())
        return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("suffix", ["NN", "BN", "LN", "IN", "GN", "AS", "AL", "MP", "NP"])
def test_second_derivative_agrees_with_finite_differences(suffix):
    sensitivity = Sensitivity(f"ConvNetD2W4{suffix}", (8, 8))
    gradient = sensitivity.gradient()
    for kept in (slice(0, -1), slice(-1, None)):  # θ alone, then the images alone
        along = [torch.zeros_like(g) for g in gradient]
        along[kept] = [torch.randn_like(g) for g in gradient[kept]]
        exact = sum((g * a).sum() for g, a in zip(gradient, along)).item()
        assert exact != 0
        assert sensitivity.difference(along) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["MLP", "LeNet", "AlexNet", "VGG11BN", "ResNet18_AP"])
def test_classics_have_a_second_derivative(name):
    gradient = Sensitivity(name, (32, 32)).gradient()
    assert all(g.isfinite().all() for g in gradient)
    assert gradient[-1].abs().max() > 0
