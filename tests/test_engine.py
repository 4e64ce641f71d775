"""Every engine against `Autograd` in float64, and the choice of the engine."""

import contextlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_matching import assert_equal_matches, problem, through_the_last

from distill.matching import match_trajectory
from utils.derivatives import choose_engine
from utils.derivatives import engine as engines
from utils.derivatives.choose_engine import Work, micro_batch_for, repays, set_precision
from utils.derivatives.convnet_pass import ConvNetPass, covers
from utils.derivatives.convolution import Columns, Direct, Winograd
from utils.derivatives.eager_pass import EagerPass
from utils.derivatives.engine import HandWritten, equal_parts
from utils.errors import UserError
from utils.files import REPOSITORY
from utils.networks import ConvNetPlan, build_network
from utils.networks.names import SUFFIXES
from utils.parameters import MOST_FOR_MAPS, SHARE_FOR_MAPS, FlatModel

NORMS, ACTIVATIONS, POOLINGS = ([suffix for suffix, (part, kind) in SUFFIXES.items() if (part, kind) != (
    "norm", "batch") and part == of] for of in ("norm", "activation", "pooling"))
CLASSES = 3
CPU = torch.device("cpu")

BY_HAND = "hand-written"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are too small for several threads, which beside other processes cost five times what they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network_of(name, shape=(3, 8, 8), dtype=torch.float64, seed=0):
    """A network for images of `shape` with perturbed parameters, so that no gain is exactly one and no shift zero."""
    torch.manual_seed(seed)
    network = build_network(name, shape[0], CLASSES, shape[1:]).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network


def inputs_of(model, batch=4, hard=False, seed=1):
    """θ, λ, x and y."""
    random = torch.Generator().manual_seed(seed)
    theta = model.flatten()

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(theta)

    y = torch.randint(CLASSES, (batch,), generator=random).to(theta.device) if hard else draw(batch, CLASSES)
    return theta, draw(*theta.shape), draw(batch, *model.network.image_shape), y


def by_hand(network, micro_batch=None, dtype=None):
    """The engine that would be compiled, run uncompiled."""
    network_pass = ConvNetPass(network.plan, network.image_shape, CPU, dtype)
    return HandWritten(network_pass, FlatModel(network).unflatten, micro_batch)


def hand_written(network, micro_batch=None):
    """Every hand-written engine that takes the network: as it would be compiled, and the uncompiled one."""
    eager = FlatModel(network, "eager", micro_batch=micro_batch)
    return [by_hand(network, micro_batch), *([eager] if eager.engine.name == BY_HAND else [])]


def assert_close(found, expected, tolerance=1e-10):
    """Compares tensor by tensor, relative to the norm, plus 1e-12 for tensors that are zero up to rounding."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape and not one.requires_grad
            assert (one - other).norm() <= tolerance * other.norm() + 1e-12


def derivatives(engine, theta, co_state, x, y):
    """The loss, logits, ∇L, s, ∂s/∂θ, ∂s/∂x and ∂s/∂y."""
    return *engine.gradient(theta, x, y), *engine.adjoint(theta, co_state, x, y)


def assert_same_derivatives(engine, reference, *given):
    assert_close(derivatives(engine, *given), derivatives(reference, *given))


# --- the derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_by_hand_equals_autograd(norm, activation, pooling, hard):
    """Every variant, for few and many channels, one channel (padded further), odd and unequal sides."""
    shapes = [(3, 8, 4), (6, 8, 8), (1, 4, 8)] + [(3, 7, 5), (1, 3, 6)] * (pooling == "NP")
    for shape in shapes:
        network = network_of(f"ConvNetD2W4{norm}{activation}{pooling}", shape)
        model = FlatModel(network, "plain")
        given = inputs_of(model, hard=hard)
        expected = derivatives(model, *given)
        *_, of_x, of_y = expected
        assert of_x.norm() > 1e-6 and (of_y is None) == hard
        for engine in hand_written(network):
            assert_close(derivatives(engine, *given), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_by_hand_equals_autograd_whatever_the_shape(data):
    depth = data.draw(st.integers(1, 3), "depth")
    parts = data.draw(st.one_of(st.just(("IN", "AR", "AP")), st.tuples(*map(st.sampled_from, (
        NORMS, ACTIVATIONS, POOLINGS)))))
    channels, width = data.draw(st.integers(1, 6), "channels"), 4 * data.draw(st.integers(1, 2), "quarter of the width")
    if parts[2] == "NP":
        size = [data.draw(st.integers(2, 7)) for _ in range(2)]
    else:
        size = [2**depth * data.draw(st.integers(1, 3)) - (4 if channels == 1 else 0) for _ in range(2)]
        assume(min(size) > 0)
    network = network_of(f"ConvNetD{depth}W{width}{''.join(parts)}", (channels, *size))
    batch, micro_batch = data.draw(st.integers(1, 5), "batch"), data.draw(st.integers(1, 6), "micro_batch")
    given = inputs_of(FlatModel(network), batch, data.draw(st.booleans(), "hard"))
    assert covers(network)
    for engine in hand_written(network, micro_batch):
        assert_same_derivatives(engine, FlatModel(network, "plain"), *given)


@pytest.mark.parametrize("name", ["ConvNetD2W4", "ConvNetD2W4NNAS", "ConvNetD2W4LNMP", "ConvNetD2W4GNNP"])
@pytest.mark.parametrize("case", ["black", "one black", "confident label", "all confident", "large"])
def test_by_hand_equals_autograd_at_extremes(name, case):
    network = network_of(name)
    model = FlatModel(network, "plain")
    theta, co_state, x, y = inputs_of(model)
    if case in ("black", "one black"):
        x[: 1 if case == "one black" else None] = 0
    elif case in ("confident label", "all confident"):
        y[: 1 if case == "confident label" else None, 1] = 1e4
    else:
        theta[-CLASSES:] = torch.tensor([1e3, 0, -1e3])  # biases, and so logits, are large
    assert all(each.isfinite().all() for each in model.adjoint(theta, co_state, x, y))
    for engine in hand_written(network):
        assert_same_derivatives(engine, model, theta, co_state, x, y)


@pytest.mark.parametrize("norm", ["NN", "IN", "GN"])
@pytest.mark.parametrize("activation", ["AR", "AL"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_by_hand_takes_the_same_side_as_autograd_of_kinks_and_ties(norm, activation, pooling):
    """Black images and zero shifts: every activation is at zero, and all pixels of a pooling window are equal."""
    network = network_of(f"ConvNetD1W4{norm}{activation}{pooling}")
    model = FlatModel(network, "plain")
    theta, co_state, x, y = inputs_of(model)
    *of_blocks, _, _ = model.unflatten(theta)
    for part in of_blocks:
        if part.dim() == 1:
            part.zero_()
    given = theta, co_state, torch.zeros_like(x), y
    for engine in hand_written(network):
        assert_same_derivatives(engine, model, *given)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("name, backend", [("ConvNetD2W4", "eager"), ("ConvNetD2W4", "plain"), ("MLP", "plain")])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_micro_batches_change_nothing(name, backend, micro_batch, hard):
    """Seven images in equal or unequal parts: sums agree with the whole batch; per-sample results keep their order."""
    network = network_of(name)
    whole = FlatModel(network, "plain", micro_batch=7)
    given = inputs_of(whole, 7, hard)
    model = FlatModel(network, backend, micro_batch=micro_batch)
    for engine in (model, by_hand(network, micro_batch)) if backend == "eager" else (model,):
        found = derivatives(engine, *given)
        assert_close(found, derivatives(whole, *given))
        assert_close([found[1]], [whole(given[0], given[2]).detach()])


@pytest.mark.parametrize("name, engine", [
    ("ConvNetD2W4AS", lambda network: FlatModel(network, "plain")), ("ConvNetD2W4AS", by_hand),
    ("ConvNetD2W4", lambda network: FlatModel(network, "eager"))], ids=["plain", "by hand", "eager"])
def test_the_derivatives_are_what_their_definition_says(name, engine):
    """Against central differences of L, ∇L and s, which are independent of autograd."""
    network = network_of(name)
    model = engine(network)
    theta, co_state, x, y = inputs_of(FlatModel(network))
    random, step = torch.Generator().manual_seed(5), 1e-5

    def slope(function, at):
        """The slope of the function along a random direction, and the direction."""
        direction = torch.randn(at.shape, generator=random, dtype=at.dtype)
        return float(function(at + step * direction) - function(at - step * direction)) / (2 * step), direction

    _, _, gradient = model.gradient(theta, x, y)
    found = model.adjoint(theta, co_state, x, y)
    assert float(found.s) == pytest.approx(float(gradient @ co_state), rel=1e-12)
    cases = [(lambda t: model.gradient(t, x, y)[0], theta, gradient),
             (lambda t: model.gradient(t, x, y)[2] @ co_state, theta, found.theta),
             (lambda i: model.gradient(theta, i, y)[2] @ co_state, x, found.images),
             (lambda k: model.gradient(theta, x, k)[2] @ co_state, y, found.labels)]
    for function, at, expected in cases:
        rise, direction = slope(function, at)
        assert rise == pytest.approx(float((expected * direction).sum()), rel=1e-5, abs=1e-8)


def test_inputs_are_left_alone():
    network = network_of("ConvNetD2W4")
    for engine in (FlatModel(network, "plain"), FlatModel(network), by_hand(network, 3)):
        tensors = inputs_of(FlatModel(network), 4)
        before = [each.clone() for each in tensors]
        theta, co_state, x, y = (each.requires_grad_() for each in tensors)
        assert not any(each.requires_grad for each in engine.gradient(theta, x, y))
        assert not any(each.requires_grad for each in engine.adjoint(theta, co_state.detach(), x, y))
        assert all(torch.equal(*pair) and pair[0].grad is None for pair in zip(tensors, before))


# --- Winograd, in compiled code only -------------------------------------------------------------------------------


def test_compiled_code_takes_winograd_where_it_fits():
    def forms(name, shape, device=CPU, dtype=None):
        network_pass = ConvNetPass(ConvNetPlan.parse(name), shape, device, dtype)
        return [type(block.convolution) for block in network_pass.blocks]

    assert forms("ConvNetD3W64", (3, 16, 16)) == [Columns, Winograd, Winograd]
    assert forms("ConvNetD3W64", (1, 28, 28)) == [Columns, Winograd, Winograd]
    assert forms("ConvNetD3W64", (3, 8, 16)) == [Columns, Winograd, Direct]  # 2×4 cannot be tiled
    assert forms("ConvNetD2W32", (3, 16, 16)) == [Columns, Direct]
    assert forms("ConvNetD2W64", (3, 16, 16), dtype=torch.bfloat16) == [Direct, Direct]
    assert forms("ConvNetD2W64", (3, 16, 16), device=torch.device("cuda")) == [Direct, Direct]


@pytest.mark.parametrize("name, shape", [("ConvNetD2W64", (3, 16, 8)), ("ConvNetD2W64LNMP", (3, 8, 8)),
                                         ("ConvNetD2W64GNAS", (1, 4, 12)), ("ConvNetD2W64NNNP", (3, 4, 8))])
def test_the_pass_with_winograd_equals_autograd(name, shape):
    network = network_of(name, shape)
    engine = by_hand(network, 2)
    assert type(engine.network_pass.blocks[1].convolution) is Winograd
    model = FlatModel(network, "plain")
    assert_same_derivatives(engine, model, *inputs_of(model, 3))


# --- matching with these engines -----------------------------------------------------------------------------------


def median_error(found, expected):
    """The median over the images of the relative error of their gradient. A few images are far off, where rounding
    flips a ReLU."""
    return float(((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).median())


@pytest.mark.parametrize("name", ["ConvNetD2W4", "ConvNetD2W4LNAL", "ConvNetD1W8NNMP", "ConvNetD2W4GNASNP"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_match_by_hand_equals_the_textbook(name, seed, micro_batch):
    """Batches of uneven sizes that share images, with the full augmentation; exact and truncated gradients."""
    given = problem(seed, name=name, sizes=(3, 5, 2, 1))
    network = given.pop("model").network
    assert len({draw.operations for draw in given["augment"]}) > 1
    exact = match_trajectory(FlatModel(network, micro_batch=micro_batch), **given)
    assert_equal_matches(exact, match_trajectory(FlatModel(network), **given, method="unroll"))
    assert_equal_matches(exact, match_trajectory(FlatModel(network, "plain"), **given))
    expected, model = through_the_last(given | {"model": FlatModel(network, "plain")}, 2), FlatModel(network)
    for model.engine in (by_hand(network, micro_batch), FlatModel(network, "eager").engine):
        assert_equal_matches(match_trajectory(model, **given, adjoint_steps=2), expected)


def in_float32(given):
    """The problem in float32; the model's type follows from θ."""
    return given | {key: value.float() for key, value in given.items()
                    if isinstance(value, torch.Tensor) and value.is_floating_point()}


@pytest.mark.parametrize("name, winograd", [("ConvNetW32", False), ("ConvNetD2W64", True)])
@pytest.mark.parametrize("seed", range(2))
def test_a_match_by_hand_is_accurate_in_float32(name, winograd, seed):
    given = problem(seed, count=6, sizes=(6, 6, 6), name=name, channels=3, size=(16, 16))
    expected = match_trajectory(**given, method="unroll")
    network = given["model"].network
    to_be_compiled = by_hand(network)
    assert (type(to_be_compiled.network_pass.blocks[-1].convolution) is Winograd) == winograd
    for given["model"].engine in (to_be_compiled, FlatModel(network, "eager").engine):
        found = match_trajectory(**in_float32(given))
        assert found.grad_images.dtype == torch.float32
        assert median_error(found.grad_images, expected.grad_images) < 1e-5
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(found.grad_lr) == pytest.approx(float(expected.grad_lr), rel=1e-4)


@pytest.mark.parametrize("micro_batch, calls", [(None, 5), (2, 3 + 1 + 2 + 3 + 1)])
def test_matching_takes_the_hand_written_adjoint(monkeypatch, micro_batch, calls):
    """One call per step and micro-batch, so it did not silently fall back to autograd."""
    taken, adjoint = [], EagerPass.adjoint
    monkeypatch.setattr(EagerPass, "adjoint", lambda *given: taken.append(1) or adjoint(*given))
    given = problem(0, sizes=(3, 2, 4, 3, 1))
    network = given.pop("model").network
    match_trajectory(FlatModel(network, "plain", micro_batch=micro_batch), **given)
    assert not taken
    match_trajectory(FlatModel(network, micro_batch=micro_batch), **given, method="exact")
    assert len(taken) == calls


@pytest.mark.parametrize("kept", [2, 5])
def test_what_is_kept_for_the_adjoint_changes_no_bit(monkeypatch, kept):
    """Two micro-batches a step. The last steps' activations are kept, for as many steps as fit, and are as large as
    `map_bytes` says."""
    given = in_float32(problem(0, sizes=(4, 4, 4, 4, 4)))
    network, found, taken = given.pop("model").network.float(), [], []
    adjoint = EagerPass.adjoint

    def watched(self, weights, tangents, x, y, maps=None):
        taken.append(maps and sum(each.nbytes for each in maps.z + maps.delta) / len(x))
        return adjoint(self, weights, tangents, x, y, maps)

    monkeypatch.setattr(EagerPass, "adjoint", watched)
    for steps in (0, kept):
        model = FlatModel(network, micro_batch=2)
        room = steps * 4 * model.engine.map_bytes
        monkeypatch.setattr("utils.parameters.available", lambda room=room: room / SHARE_FOR_MAPS)
        taken.clear()
        found.append(match_trajectory(model, **given))
        assert taken == 2 * steps * [model.engine.map_bytes] + 2 * (5 - steps) * [None]
    assert all(torch.equal(one, other) for one, other in zip(*found))
    # However much memory there is, at most MOST_FOR_MAPS is used.
    monkeypatch.setattr("utils.parameters.available", lambda: math.inf)
    assert FlatModel(network).kept_steps(4) == MOST_FOR_MAPS // (4 * model.engine.map_bytes)


@pytest.mark.parametrize("model", [lambda network: FlatModel(network, "plain", "bf16"),
                                   lambda network: by_hand(network, dtype=torch.bfloat16)],
                         ids=["plain", "by hand"])
@pytest.mark.parametrize("name", ["ConvNetD2W32", "ConvNetD2W32LNAS"])
def test_bf16_points_the_same_way(model, name):
    """Rounded but close; results have the type of the inputs."""
    network = network_of(name, (3, 16, 16), torch.float32)
    exact, rounded = FlatModel(network, "plain"), model(network)
    theta, co_state, x, y = inputs_of(exact, 16)
    expected, found = ((*each.gradient(theta, x, y)[1:], *each.adjoint(theta, co_state, x, y)[1:])
                       for each in (exact, rounded))
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32
        assert 0.95 < torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert not torch.allclose(one, other, rtol=1e-4, atol=0)


# --- which engine is taken -----------------------------------------------------------------------------------------

COVERED = [("ConvNetD3W4", (3, 32, 32)), ("ConvNetD3W4", (1, 28, 28)), ("ConvNetD3W4NP", (3, 30, 31)),
           ("ConvNetD1W4MP", (3, 30, 6)), ("ConvNetD2W4GNASMP", (2, 4, 12))]
NOT_COVERED = [("ConvNetD1W4BN", (3, 8, 8)), ("ConvNetD3W4", (3, 30, 30)), ("ConvNetD3W4", (3, 32, 28)),
               ("ConvNetD1W4MP", (3, 8, 7)), ("ConvNetD3W4", (1, 32, 32)), ("MLP", (3, 8, 8)),
               ("LeNet", (3, 32, 32)), ("ResNet18", (3, 32, 32)), ("ResNet18BN_AP", (3, 32, 32))]


@pytest.mark.parametrize("name, shape", COVERED)
def test_the_published_network_is_done_by_hand_and_others_where_they_are_compiled(name, shape):
    network = build_network(name, shape[0], CLASSES, shape[1:])
    assert covers(network)
    published = network.plan.norm == "instance" and network.plan.pooling == "average"
    assert FlatModel(network).engine.name == FlatModel(network, "eager").engine.name == (
        BY_HAND if published else "autograd")
    # In bf16, too, autograd is used: it is faster.
    assert FlatModel(network, "plain").engine.name == FlatModel(network, precision="bf16").engine.name == "autograd"


@pytest.mark.parametrize("name, shape", NOT_COVERED)
@pytest.mark.parametrize("backend", ["auto", "plain", "eager", "compile"])
def test_other_networks_are_left_to_autograd(name, shape, backend, monkeypatch):
    if backend == "compile":  # with or without a compiler
        monkeypatch.setattr(choose_engine, "check_backend", lambda *given: None)
    network = build_network(name, shape[0], CLASSES, shape[1:])
    assert not covers(network)
    assert FlatModel(network, backend, work=Work(matched=1e12)).engine.name == "autograd"


@pytest.mark.parametrize("part", ["activation", "norm", "pooling"])
def test_a_kind_of_layer_for_which_nothing_is_written_out_is_left_to_autograd(part):
    network = network_of("ConvNet")
    assert covers(network)
    network.plan = replace(network.plan, **{part: "new"})
    assert not covers(network)


def test_a_network_from_elsewhere_is_left_to_autograd():
    """Its image size is unknown, so batches are not split into micro-batches either."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, CLASSES)).double()
    model = FlatModel(network, "auto", work=Work(matched=1e12))
    assert model.engine.name == "autograd" and micro_batch_for(network, 1) is None
    assert model.gradient(model.flatten(), torch.randn(2, 3, 2, 2).double(), torch.tensor([0, 1]))[2].norm() > 0


def test_only_the_first_few_sizes_of_batches_are_compiled(monkeypatch):
    """Each epoch of PAD's curriculum has another last batch, and torch compiles one function a few times only."""
    network, compiled = network_of("ConvNetD1W4"), []
    uncompiled = by_hand(network).network_pass
    model = FlatModel(network, "plain")
    engine = HandWritten(uncompiled, model.unflatten, compiled=True)

    def gradient(weights, x, y):
        compiled.append(len(x))
        return uncompiled.gradient(weights, x, y)

    monkeypatch.setattr(engines, "_compiled", lambda network_pass: (gradient, network_pass.adjoint))
    for size in (*range(1, 12), 3):
        theta, _, x, y = inputs_of(model, size)
        engine.gradient(theta, x, y)
    assert compiled == [*range(1, engines.MOST_SIZES + 1), 3]


@pytest.mark.parametrize("backend, work, compiler, name", [
    ("auto", 0, True, BY_HAND), ("auto", 1e12, True, "hand-written, compiled"),
    ("auto", 1e12, False, BY_HAND), ("eager", 1e12, True, BY_HAND),
    ("compile", 0, True, "hand-written, compiled"), ("plain", 1e12, True, "autograd"),
])
def test_compiles_where_that_is_asked_for_or_repaid(monkeypatch, backend, work, compiler, name):
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}" if compiler else None)
    monkeypatch.setattr(choose_engine, "_why_not_compiled", lambda device: None)
    choose_engine._can_compile.cache_clear()
    try:
        assert FlatModel(network_of("ConvNetD2W4"), backend, work=Work(matched=work)).engine.name == name
    finally:
        choose_engine._can_compile.cache_clear()  # it knows what was only made up


COMPILES_NOT = """
from utils.derivatives import choose_engine
from utils.parameters import FlatModel
from utils.networks import build_network
choose_engine.COMPILING_PAYS["cpu"] = -1
for _ in range(2):
    print(FlatModel(build_network("ConvNetD1W4", 1, 3, (8, 8)), "auto").engine.name)
choose_engine.check_backend("compile", choose_engine.torch.device("cpu"))
"""


def test_a_compiler_that_cannot_build_is_noted_once_and_refused_where_it_is_asked_for(tmp_path, environment):
    """As happens without Python's headers. A fresh cache folder keeps earlier builds out of the test."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\ncase $* in *-version*) echo g++ 13; exit;; esac\n"
                        "echo 'x.cpp:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1\n")
    compiler.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", COMPILES_NOT], cwd=REPOSITORY, text=True, capture_output=True,
                          env=os.environ | environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CXX": "g++",
                                                          "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    reason = f"{compiler} is here and cannot build what torch compiles (x.cpp:1:10: fatal error: Python.h: No such"
    assert done.stdout == f"{BY_HAND}\n" * 2
    first, *_, last = done.stderr.splitlines()
    assert first.startswith(f"note: not compiled, though this is long enough to repay it: {reason}")
    assert f"UserError: --backend compile: {reason}" in last and done.stderr.count("note: ") == 1


def test_compiling_repays_long_runs_of_large_networks():
    small, large = (build_network(f"ConvNetW{width}", 3, 10, (32, 32)) for width in (4, 128))
    assert not repays(large, Work()) and repays(small, Work(matched=1e12))
    works = [10.0**power for power in range(13)]
    first = [next(work for work in works if repays(network, Work(matched=work))) for network in (large, small)]
    assert first[0] < first[1]
    assert all(repays(large, Work(matched=work)) == (work >= first[0]) for work in works)


@pytest.mark.parametrize("name, shape, values", [("MLP", (3, 8, 8), 128 + 128 + CLASSES),
                                                 ("ConvNetD1W4", (3, 8, 8), 3 * 4 * 64 + 4 * 16 + CLASSES),
                                                 ("ConvNetD1W4NNNP", (1, 4, 4), 2 * 4 * 64 + CLASSES)])
def test_activations_are_counted(name, shape, values):
    network = build_network(name, shape[0], CLASSES, shape[1:])
    assert choose_engine.activation_bytes(network) == 4 * values
    assert next(network.parameters()).device == CPU
    assert network(torch.zeros(1, *shape)).isfinite().all()
    assert micro_batch_for(network, 4 * values * 5 + 1) == 5


def test_micro_batches_shrink_as_networks_grow_and_never_to_nothing():
    sizes = [micro_batch_for(build_network(f"ConvNetW{width}", 3, 10, (32, 32)), 1 << 21) for width in (4, 32, 256)]
    assert sizes[0] > sizes[1] > sizes[2] == 1
    assert micro_batch_for(build_network("ConvNetD1W4BN", 3, 10, (8, 8)), 1) is None


@given(st.integers(1, 400), st.integers(1, 450))
def test_parts_make_up_the_batch_and_are_equal_where_that_is_cheap(batch, most):
    sizes = equal_parts(batch, most)
    assert sum(sizes) == batch and 1 <= min(sizes) and max(sizes) <= most and max(sizes) - min(sizes) <= 1
    fewest = math.ceil(batch / most)
    cheap = [number for number in range(fewest, 2 * fewest) if batch % number == 0]
    assert len(sizes) == (cheap[0] if cheap else fewest)
    assert equal_parts(batch, None) == [batch]


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options, option", [
    ("ConvNetD1W4", {"backend": "graph"}, "--backend graph"),
    ("MLP", {"backend": "graph"}, "--backend graph"),
    ("ConvNetD1W4", {"backend": "compile"}, "--backend compile"),
    ("ConvNetD1W4BN", {"micro_batch": 2}, "--micro_batch 2"),
    ("ConvNetD1W4BN", {"micro_batch": 2, "backend": "plain"}, "--micro_batch 2"),
])
def test_refuses_what_cannot_be_had(monkeypatch, name, options, option):
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(UserError, match=option):
        FlatModel(build_network(name, 3, CLASSES, (8, 8)), **options).engine  # noqa: B018


def test_tf32_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for device in (CPU, torch.device("cuda")):
        with pytest.raises(UserError, match="--precision tf32"):
            set_precision("tf32", device)


@pytest.mark.parametrize("precision, device, expected", [("fp32", "cpu", "ieee"), ("fp32", "cuda", "ieee"),
                                                         ("tf32", "cuda", "tf32"), ("auto", "cuda", None),
                                                         ("bf16", "cpu", None)])
def test_precision_is_set_for_products_and_convolutions(monkeypatch, precision, device, expected):
    backends = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace(fp32_precision=None)),
                               cudnn=SimpleNamespace(conv=SimpleNamespace(fp32_precision=None)))
    monkeypatch.setattr(torch, "backends", backends)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    set_precision(precision, torch.device(device))
    assert backends.cuda.matmul.fp32_precision == backends.cudnn.conv.fp32_precision == expected


# --- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(choose_engine._compiler() is None, reason="no C++ compiler")
def test_compiled_code_equals_autograd():
    """Really compiled, once for all networks of one plan."""
    graphs = torch._dynamo.utils.counters["stats"]
    seen = []
    for seed in range(2):
        network = network_of("ConvNetD1W4", seed=seed)
        model = FlatModel(network, "compile", micro_batch=2)
        assert model.engine.name == "hand-written, compiled"
        assert_same_derivatives(model, FlatModel(network, "plain"), *inputs_of(model))
        seen.append(graphs["unique_graphs"])
    assert seen[0] == seen[1]


# --- captured ------------------------------------------------------------------------------------------------------


def captured_on_the_cpu(monkeypatch, network):
    """The captured engine with stand-ins for CUDA graphs: a replay applies the function to the captured inputs and
    writes into the captured outputs. Also a list of (number of inputs, batch size), one entry per capture."""
    captures = []

    def capture(self, function, kept, inputs):
        held = [each.clone() for each in inputs]
        outputs = function(self.engine, kept, *held)
        captures.append((len(held), len(held[-1])))

        def replay():
            for own, new in zip(outputs, function(self.engine, kept, *held)):
                if own is not None:
                    own.copy_(new)

        return SimpleNamespace(replay=replay), held, outputs

    monkeypatch.setattr(engines.Captured, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return engines.Captured(FlatModel(network, "eager").engine), captures


def assert_replays(captured, reference, hard=False):
    """Alternates two shapes, with new values in each call; all results are compared after the last call."""
    results, expected = [], []
    for seed, batch in enumerate((4, 3, 4, 4, 3)):
        given = inputs_of(reference, batch, hard, seed)
        results.append(derivatives(captured, *given))
        expected.append(derivatives(reference, *given))
    for one, other in zip(results, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", ["ConvNetD2W4", "MLP"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_a_replay_takes_the_inputs_at_hand_and_keeps_earlier_results(monkeypatch, name, hard):
    network = network_of(name)
    captured, captures = captured_on_the_cpu(monkeypatch, network)
    assert_replays(captured, FlatModel(network, "plain"), hard)
    assert sorted(captures) == [(3, 3), (3, 4), (4, 3), (4, 4)]  # gradient (3 inputs) and adjoint (4), two batch sizes
