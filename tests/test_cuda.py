"""Engines, captures, memory and devices, on a GPU or on the stand-in of `fakecuda/`."""

import gc
import subprocess
import sys

import fakecuda
import pytest
import torch
from test_engine import assert_close, assert_replays, inputs_of, network_of
from test_matching import assert_equal_matches, problem, through_the_last

from buffer.experts import kept_of, train_step
from buffer.gsam import gsam_gradient
from distill.distillation import Segment
from distill.evaluate.train import train_network
from distill.matching import match_trajectory
from utils.config import BufferConfig, make
from utils.data import augment
from utils.data.names import parse_strategy
from utils.derivatives import choose_engine
from utils.derivatives import engine as engines
from utils.derivatives.choose_engine import Work, repays, set_precision
from utils.errors import UserError
from utils.files import REPOSITORY
from utils.memory import available, to_device
from utils.networks import build_network
from utils.parameters import FlatModel
from utils.program.device import gpu_count, listed_gpus, select_device

on_a_gpu = pytest.mark.cuda


@pytest.mark.skipif(torch.cuda.is_available() or fakecuda.why_not() is not None, reason="a GPU, or no stand-in for one")
def test_a_part_of_these_on_the_stand_in():
    """Makes an ordinary test run include a few of these; all of them take minutes."""
    part = "ConvNetD2W4-None-graph or refused or counted"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", __file__, "-k",
                           part], cwd=REPOSITORY, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout + done.stderr


@pytest.fixture
def compiled_as_it_is(monkeypatch):
    """Runs the code that would be compiled without compiling it: the stand-in cannot run compiled code."""
    monkeypatch.setattr(engines, "_compiled", lambda network_pass: (network_pass.gradient, network_pass.adjoint))
    monkeypatch.setattr(choose_engine, "_why_not_compiled", lambda device: None)


@pytest.fixture
def precision():
    """`set_precision`, undone after the test."""
    leaves = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [leaf.fp32_precision for leaf in leaves]
    yield lambda name: set_precision(name, torch.device("cuda:0"))
    for leaf, value in zip(leaves, before):
        leaf.fp32_precision = value


# --- captured ------------------------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("backend", ["graph", "compile"])
@pytest.mark.parametrize("hard, micro_batch", [(False, None), (True, 2)], ids=["None", "2"])
@pytest.mark.parametrize("name", ["ConvNetD2W4", "ConvNetD2W4LNASMP", "ConvNetD2W4GNALNP", "ConvNetD2W4NN", "MLP"])
def test_captured_equals_plain(compiled_as_it_is, name, hard, micro_batch, backend):
    network = network_of(name).cuda()
    captured = FlatModel(network, backend, micro_batch=micro_batch)
    by_hand = backend == "compile" and name != "MLP"
    expected = f"{'hand-written, compiled' if by_hand else 'autograd'}, captured"
    assert captured.engine.name == expected
    assert_replays(captured, FlatModel(network, "plain"), hard)
    assert captured.engine.name == expected and len(captured.engine._graphs) == 4  # none was refused


def on_the_gpu(given, backend, precision="auto", dtype=torch.float64):
    """The arguments of `match_trajectory`, moved to the GPU."""
    there = {name: value.to("cuda", dtype) for name, value in given.items() if isinstance(value, torch.Tensor)}
    draws, batches = augment.to_device(given["augment"], given["batches"], "cuda")
    return there | {"model": FlatModel(given["model"].network.to("cuda", dtype), backend, precision),
                    "batches": batches, "augment": draws}


@on_a_gpu
@pytest.mark.parametrize("name", ["ConvNetD2W4", "ConvNetD2W4GNASMP", "MLP"])
@pytest.mark.parametrize("backend", ["graph", "compile", "eager", "plain"])
def test_a_match_equals_one_on_the_cpu(compiled_as_it_is, name, backend):
    """Batches of uneven sizes, augmented; the exact gradient, then a truncated one by the same graphs."""
    given = problem(0, name=name)
    expected = match_trajectory(**given, method="unroll"), through_the_last(given, 2)
    there = on_the_gpu(given, backend)
    for found, one in zip((match_trajectory(**there), match_trajectory(**there, adjoint_steps=2)), expected):
        assert all(each.is_cuda for each in found)
        assert_equal_matches(type(found)(*(each.cpu() for each in found)), one, 1e-9)


@on_a_gpu
def test_matches_in_turn_keep_their_results_and_their_augmentation():
    """Draws of one shape share the graphs' memory; results are compared after the last match."""
    found, expected, model = [], [], None
    for seed, group in enumerate(("crop", "cutout", "crop")):
        given = problem(seed, sizes=(3, 3), strategy=group)
        given["model"] = problem(0)["model"]
        expected.append(match_trajectory(**given, method="unroll"))
        there = on_the_gpu(given, "graph")
        model = there["model"] = model or there["model"]
        found.append(match_trajectory(**there))
    for one, other in zip(found, expected):
        assert_equal_matches(type(one)(*(each.cpu() for each in one)), other, 1e-9)


@on_a_gpu
@pytest.mark.parametrize("arithmetic, tolerance", [("fp32", 1e-3), ("tf32", 0.1), ("auto", 0.1), ("bf16", 0.3)])
@pytest.mark.parametrize("backend", ["graph", "compile", "plain"])
def test_a_match_in_the_arithmetic_of_runs(compiled_as_it_is, precision, backend, arithmetic, tolerance):
    """In float32, where the library's convolutions are channels-last; in float64 they are not."""
    precision(arithmetic)
    given = problem(0, channels=3, size=(16, 16), name="ConvNetD2W32")
    expected = match_trajectory(**given, method="unroll")
    found = match_trajectory(**on_the_gpu(given, backend, arithmetic, torch.float32))
    assert_equal_matches(type(found)(*(each.double().cpu() for each in found)), expected, tolerance)


@on_a_gpu
def test_batch_norm_statistics_are_those_of_the_calls_that_were_made():
    """Neither the extra passes of a capture nor GSAM's second pass may change them."""
    plain, captured = (network_of("ConvNetD1W4BN").cuda() for _ in range(2))
    for network, backend in ((plain, "plain"), (captured, "auto")):
        model = FlatModel(network, backend)
        for seed in range(3):
            theta, _, x, y = inputs_of(model, hard=True, seed=seed)
            gsam_gradient(model, theta, x, y, 0.1, 0.1, True, model.network)
    assert_close([each.double() for each in captured.buffers()], [each.double() for each in plain.buffers()])


@on_a_gpu
def test_a_capture_that_is_refused_is_noted_once_and_the_run_goes_on(monkeypatch, capsys):
    network = network_of("ConvNetD2W4").cuda()
    model, plain = FlatModel(network, "graph"), FlatModel(network, "plain")
    gradient = model.engine.engine.gradient

    def reads(theta, x, y):
        found = gradient(theta, x, y)
        float(found[0])  # waits for the device, which a capture does not allow
        return found
    monkeypatch.setattr(model.engine.engine, "gradient", reads)
    assert_replays(model, plain)
    said = capsys.readouterr().err
    assert said.count("note: not replayed from CUDA graphs") == said.count("\n") == 1 and "captur" in said
    assert model.engine.name == "autograd"
    # The failed capture leaves nothing behind: the stream is the default one, and other models can capture.
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and gc.isenabled()
    other = FlatModel(network, "graph")
    assert_replays(other, plain)
    assert other.engine.name == "autograd, captured"


@on_a_gpu
def test_what_dies_in_a_capture_is_not_collected_there(monkeypatch):
    """The garbage is a graph in a reference cycle, as is left by an earlier run in the same process."""
    network = network_of("ConvNetD2W4").cuda()
    model = FlatModel(network, "graph")
    given = inputs_of(model)
    gradient = model.engine.engine.gradient

    def littering(theta, x, y):
        if torch.cuda.is_current_stream_capturing():
            for _ in range(20_000):
                circle = old[:]
                circle.append(circle)
                old.clear()
        return gradient(theta, x, y)
    old = [FlatModel(network, "graph")]
    old[0].gradient(*given[:1], *given[2:])
    monkeypatch.setattr(model.engine.engine, "gradient", littering)
    model.gradient(*given[:1], *given[2:])
    assert model.engine.name.endswith("captured") and gc.isenabled()


@on_a_gpu
def test_all_captures_of_a_gpu_share_a_stream_and_free_memory_is_not_that_of_graphs():
    device = torch.device("cuda:0")
    network = network_of("ConvNetD2W64", (3, 32, 32), torch.float32).cuda()
    models = [FlatModel(network, "graph") for _ in range(3)]
    theta, _, x, y = inputs_of(models[0], 64)
    engines._capture_stream.cache_clear()
    torch.cuda.empty_cache()
    for model in models:
        model.gradient(theta, x, y)
    assert engines._capture_stream.cache_info().misses == 1
    torch.cuda.empty_cache()
    # Memory that is reserved but not allocated is free, except in the graphs' pools. After a refused capture, torch
    # 2.11 keeps much of it reserved despite `empty_cache`.
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert held - (available(device) - torch.cuda.mem_get_info(device)[0]) > 2**24


@on_a_gpu
def test_auto_compiles_on_a_gpu_what_repays_it(monkeypatch, capsys, compiled_as_it_is):
    network = build_network("ConvNet", 3, 10, (32, 32)).cuda()
    long = Work(matched=100 * 50 * 10_000)  # like cifar10_ipc10
    assert repays(network, Work(gradients=3e6)) and not repays(network, Work(matched=10 * 50 * 100))
    assert FlatModel(network, work=long, backend="auto").engine.name == "hand-written, compiled, captured"
    assert FlatModel(network, backend="auto").engine.name == "autograd, captured"
    # Without Triton, or without a compiler for the code it generates, the run goes on with one note.
    monkeypatch.setattr(choose_engine, "_why_not_compiled", lambda device: f"Triton for {device} cannot build")
    choose_engine._can_compile.cache_clear()
    for _ in range(2):
        assert FlatModel(network, work=long, backend="auto").engine.name == "autograd, captured"
    choose_engine._can_compile.cache_clear()
    assert capsys.readouterr().err.count("note: not compiled, though this is long enough to repay it: Triton") == 1


# --- what a step puts into the stream ------------------------------------------------------------------------------


def segment_of(steps, strategy, batch=10, size=(32, 32)):
    random = torch.Generator().manual_seed(0)
    groups = parse_strategy(strategy)
    return Segment(0, 0, 1, [torch.arange(batch) for _ in range(steps)],
                   [augment.draw(groups, batch, size, random) for _ in range(steps)])


@on_a_gpu
@pytest.mark.parametrize("strategy, most", [("none", 8), ("crop", 8), ("color", 8), ("flip", 9)])
def test_launches_and_waits_of_an_inner_step_are_counted(stand_in, strategy, most):
    """Two graphs a step and few other launches; no synchronisation; a segment is one copy from pinned memory."""
    model = FlatModel(build_network("ConvNetD3W4", 3, 10, (32, 32)).cuda(), "graph")
    theta = model.flatten()
    images, labels, lr = torch.zeros(20, 3, 32, 32).cuda(), torch.zeros(20, 10).cuda(), torch.tensor(0.01).cuda()

    def seen(steps):
        def match(segment):
            match_trajectory(model, theta, theta + 1, images, labels, lr, segment.batches, segment.augment)
        match(segment_of(steps, strategy).to("cuda"))
        segment = segment_of(steps, strategy)
        with stand_in.watch() as on_the_way:
            segment = segment.to("cuda")
        assert (on_the_way.launches, on_the_way.counts["h2d_pinned"], on_the_way.counts["sync"]) == (1, 1, 0)
        with stand_in.watch() as at_work:
            match(segment)
        assert not at_work.errors and not at_work.counts["sync"], at_work
        return at_work

    few, more = seen(2), seen(4)
    assert more.counts["graph"] - few.counts["graph"] == 4
    assert (more.launches - few.launches) / 2 <= most


@on_a_gpu
@pytest.mark.parametrize("strategy", ["none", "color", "crop", "cutout", "flip", "scale", "rotate"])
def test_launches_and_waits_of_a_training_step_are_counted(stand_in, strategy):
    """For evaluations and experts: one graph a step and few other launches; an epoch's draws are sent in one copy."""
    model = FlatModel(build_network("ConvNetD3W4", 3, 10, (32, 32)).cuda(), "graph")
    images, soft, hard = torch.zeros(40, 3, 32, 32).cuda(), torch.zeros(40, 10).cuda(), torch.zeros(40).long().cuda()
    groups = parse_strategy(strategy)

    def draw(batch, random):
        return augment.draw(groups, batch, (32, 32), random)

    def evaluated(steps):
        train_network(model, model.flatten(), images[:10 * steps], soft[:10 * steps], 0.1, epochs=0, batch_size=10,
                      draw=draw, random=torch.Generator())

    def trained(steps):
        config, kept = make(BufferConfig, mom=0.5), kept_of(model, model.flatten(), model.flatten())
        for batch, drawn in augment.drawn_ahead(torch.arange(10 * steps).split(10), draw, torch.Generator(), "cuda"):
            train_step(config, model, kept, images[batch], hard[batch], drawn)

    for train, most in ((evaluated, 5), (trained, 6)):
        train(4)
        seen = []
        for steps in (2, 4):
            with stand_in.watch() as at_work:
                train(steps)
            assert not at_work.errors and not at_work.counts["sync"], at_work
            seen.append(at_work)
        few, more = seen
        assert more.counts["graph"] - few.counts["graph"] == 2
        assert few.counts["h2d_pinned"] == more.counts["h2d_pinned"] == 1
        assert (more.launches - few.launches) / 2 <= most


@on_a_gpu
@pytest.mark.parametrize("backend", ["graph", "compile"])
def test_trainings_are_those_of_the_cpu(compiled_as_it_is, backend):
    """For evaluations and experts; augmentation and learning rate differ between replays of a graph."""
    groups = parse_strategy("color_crop_cutout_flip")
    network = network_of("ConvNetD2W4", (3, 8, 8), torch.float64)
    images = torch.randn(10, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = []

    def draw(batch, random):
        return augment.draw(groups, batch, (8, 8), random)

    for device in ("cuda", "cpu"):
        model = FlatModel(network.to(device), backend if device == "cuda" else "plain")
        x, y = images.to(device), (torch.arange(10) % 3).to(device)
        evaluated = train_network(model, model.flatten(), x, y, 0.1, epochs=9, batch_size=4, draw=draw,
                                  random=torch.Generator().manual_seed(0))
        kept = kept_of(model, model.flatten(), torch.zeros_like(evaluated))
        for batch, drawn in augment.drawn_ahead([torch.arange(4)] * 30, draw, torch.Generator().manual_seed(0), device):
            train_step(make(BufferConfig, mom=0.5, rho_max=0.1, rho_min=0.1), model, kept, x[batch], y[batch], drawn)
        ends.append([each.cpu() for each in (evaluated, *kept.values())])
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


@on_a_gpu
def test_what_is_sent_together_arrives_as_it_was():
    tensors = [torch.arange(7), torch.rand(3, 5) > 0.5, torch.tensor(2.5), torch.rand(5, 3).T, torch.empty(0, 2),
               torch.rand(3, dtype=torch.float64), torch.arange(3, dtype=torch.uint8)]
    for there, here in zip(to_device(tensors, "cuda"), tensors, strict=True):
        assert there.is_cuda and there.dtype == here.dtype and torch.equal(there.cpu(), here)


# --- memory --------------------------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("backend", ["graph", "plain"])
def test_a_full_memory_halves_wherever_it_is_met(stand_in, compiled_as_it_is, capsys, backend):
    """In a warm-up, a capture or a copy: the result stays correct, unless not even one sample fits."""
    given = problem(0, channels=3, size=(32, 32), sizes=(16, 16), count=20, name="ConvNetD2W16")
    expected = match_trajectory(**given, method="unroll")
    there = on_the_gpu(given, backend)
    network, ways = there["model"].network, set()
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    for more in (8, 56, 88, 120, 240):
        stand_in.set_memory(held + (more << 20))
        there["model"] = FlatModel(network, backend, micro_batch=16)
        try:
            found = match_trajectory(**there)
        except torch.OutOfMemoryError:
            ways.add("too small")
        else:
            assert_equal_matches(type(found)(*(each.cpu() for each in found)), expected, 1e-9)
            ways.add("halved" if there["model"].engine.micro_batch < 16 else "whole")
        assert torch.cuda.current_stream() == torch.cuda.default_stream() and gc.isenabled()
        found = there["model"] = None
        gc.collect()
        torch.cuda.empty_cache()
    assert ways >= {"halved", "whole"} and "the capture failed" not in capsys.readouterr().err


@on_a_gpu
def test_a_memory_that_is_full_in_a_capture_halves(stand_in, monkeypatch, capsys):
    network = network_of("ConvNetD2W4").cuda()
    model, plain = FlatModel(network, "graph", micro_batch=4), FlatModel(network, "plain")
    gradient = model.engine.engine.gradient

    def in_little(theta, x, y):
        full = torch.cuda.is_current_stream_capturing() and model.engine.micro_batch > 2
        stand_in.set_memory(1 if full else 0)
        try:
            return gradient(theta, x, y)
        finally:
            stand_in.set_memory(0)
    monkeypatch.setattr(model.engine.engine, "gradient", in_little)
    assert_replays(model, plain)
    assert model.engine.micro_batch == 2 and model.engine.name == "autograd, captured"
    assert capsys.readouterr().err.count("note: ") == 1


# --- devices -------------------------------------------------------------------------------------------------------


@on_a_gpu
def test_a_gpu_has_an_index_whatever_names_it(monkeypatch, capsys):
    first, count = torch.device("cuda:0"), torch.cuda.device_count()
    assert [select_device(name) for name in ("cuda", "auto", "cuda:0", [0], [count, 0])] == [first] * 5
    assert select_device([count - 1]) == torch.device("cuda", count - 1)
    with pytest.raises(UserError, match=f"this machine has {count} GPU"):
        select_device(f"cuda:{count}")
    # With a driver too old for this torch, NVML still counts the GPUs.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [gpu_count(), *listed_gpus([0])] == [0] and select_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err.count(f"note: torch cannot use the {count} GPU") == 1
