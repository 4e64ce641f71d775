"""distill/suggest.py: the settings proposed from measured losses."""

import numpy as np
import pytest
import torch

from buffer.trajectories import Buffer
from distill import suggest
from distill.initialize import expert_logits, initial_set
from distill.suggest import DIVERGED_LOSS, Losses, doubts, measured, proposed
from utils.config import DistillConfig, make
from utils.networks import build_network
from utils.parameters import FlatModel


def losses(*by_start, rates=(0.01,)):
    """Losses for one segment length and one number of steps, with a row for each rate."""
    values = np.array(by_start, dtype=float).reshape(1, 1, len(rates), -1)
    return Losses((1,), (10,), rates, tuple(range(0, 4 * values.shape[-1], 4)), values)


@pytest.mark.parametrize("of_starts, window", [
    ([0.9, 0.9, 0.9, 0.9], (0, 13)),
    ([0.4, 0.8, 0.8, 0.8], (2, 13)),  # real images teach the first epochs
    ([0.9, 0.8, 0.99, 0.99], (0, 7)),  # little is gained later
    ([0.9, 0.8, 0.99, 0.85], (0, 7)),  # a single later gain does not extend the window
    ([np.inf, 0.8, 0.8, 0.8], (4, 13)),  # nothing is learned where a training diverges
    ([0.9, 0.8, 0.8, np.nan], (0, 9))])  # beyond the trajectory
def test_the_window_is_where_something_is_gained(of_starts, window):
    options = proposed(losses(of_starts))
    assert (options["min_start_epoch"], options["max_start_epoch"]) == window
    assert options["threshold"] < DIVERGED_LOSS


def test_the_largest_rate_that_gains_nearly_as_much_is_taken():
    of_rates = [[0.9, 0.95], [0.7, 0.8], [0.72, 0.82], [1.5, 2.0]]
    assert proposed(losses(*of_rates, rates=(0.001, 0.003, 0.01, 0.03)))["lr_teacher"] == 0.01


@pytest.mark.parametrize("of_rates, words", [
    ([[0.7, 0.8], [1.1, 1.2]], ["rate that was measured"]),
    ([[1.0, 0.99], [0.99, 0.99]], ["barely approaches", "rate that was measured"])])
def test_what_is_doubtful_is_said(of_rates, words):
    found = losses(*of_rates, rates=(0.01, 0.03))
    said = doubts(found, make(DistillConfig, **proposed(found)))
    assert len(said) == len(words) and all(word in note for word, note in zip(words, said))


def test_a_truncation_that_does_not_fit_what_is_proposed_is_dropped(toy_data, toy_experts):
    folder = next(toy_experts.rglob("replay_buffer_0.pt")).parent
    buffer = Buffer(folder, FlatModel(build_network("ConvNetD1W4", 3, 3, (8, 8))))
    config = make(DistillConfig, ipc=2, syn_steps=90, adjoint_steps=85, quiet=True, threshold="inf")
    options = suggest.suggestion(config, toy_data, buffer, buffer).options
    assert options["syn_steps"] < 85 and options["adjoint_steps"] is None


def test_what_is_measured_has_the_labels_of_the_run(toy_data, toy_experts, monkeypatch):
    seen, train = [], suggest.losses_on_the_way

    def noted(model, theta, targets, images, labels, *others, **given):
        seen.append((targets, labels))
        return train(model, theta, targets, images, labels, *others, **given)

    monkeypatch.setattr(suggest, "losses_on_the_way", noted)
    folder = next(toy_experts.rglob("replay_buffer_0.pt")).parent
    buffer = Buffer(folder, FlatModel(build_network("ConvNetD1W4", 3, 3, (8, 8))))
    config = make(DistillConfig, ipc=2, labels="target", quiet=True)
    first, _ = initial_set(config, toy_data, buffer)
    losses = measured(config, toy_data, buffer, first, [1, 2], [2, 3], [0.01, 0.03], [0, 1])
    assert np.isfinite(losses.values).all() and len(seen) == 1 + 2 * 2 * 2 * 2
    for targets, labels in seen:
        assert len(targets) == 1 and torch.equal(labels, expert_logits(buffer.model, targets[0], first.images))
