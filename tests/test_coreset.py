"""Coresets: herding and k-center against their definitions, and the features they are computed from."""

import pytest
import torch

from distill.evaluate.coreset import expert_features, herding, k_center
from distill.initialize import expert_logits
from utils.networks import build_network
from utils.parameters import FlatModel


def by_definition(features, count, cost):
    """Greedy selection: each time the index that adds the least cost to those chosen; ties go to the first."""
    chosen = []
    for _ in range(count):
        left = [index for index in range(len(features)) if index not in chosen]
        chosen.append(min(left, key=lambda index: float(cost(features, chosen, index))))
    return chosen


def of_mean(features, chosen, index):
    return (features.mean(0) - features[[*chosen, index]].mean(0)).norm()


def of_nearest(features, chosen, index):
    """k-center's cost: minus the distance to the nearest chosen point; the first point is the nearest to the mean."""
    return -(features[index] - features[chosen]).norm(dim=1).min() if chosen else of_mean(features, [], index)


@pytest.mark.parametrize("choose, cost", [(herding, of_mean), (k_center, of_nearest)])
def test_a_coreset_is_what_its_definition_says(choose, cost):
    for seed in range(5):
        features = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 5
        assert choose(features, 12).tolist() == by_definition(features, 12, cost)
    same = torch.cat([torch.ones(4, 2), torch.zeros(2, 2)])  # no index twice, even among equal images
    assert sorted(choose(same, 6).tolist()) == list(range(6)) and set(choose(same, 2).tolist()) == {0, 4}


@pytest.mark.parametrize("name, last", [
    ("ConvNetD1W4", "classifier"), ("ConvNetD2W4BN", "classifier"), ("MLP", "fc_3"), ("LeNet", "fc_3"),
    ("AlexNet", "fc"), ("VGG11", "classifier"), ("ResNet18BN", "classifier"), ("ResNet18_AP", "classifier")])
def test_features_are_what_the_last_layer_reads(name, last):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = build_network(name, 1, 10, (28, 28)), torch.randn(3, 1, 28, 28)
    model = FlatModel(network)
    theta = model.flatten() * 1.5  # other parameters than the network's
    features, weights = expert_features(model, theta, x), dict(zip(model.names, model.unflatten(theta)))
    logits = features @ weights[f"{last}.weight"].T + weights[f"{last}.bias"]
    torch.testing.assert_close(logits, expert_logits(model, theta, x), rtol=1e-4, atol=1e-4)
    assert not features.requires_grad
