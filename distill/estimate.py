"""`DATM.py --dry_run`: the time and memory that a distillation will take, extrapolated from a few measured steps, and
the settings that fit its experts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.nn.functional import one_hot

from buffer.trajectories import Buffer
from distill import checks, suggest
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.evaluate.networks import num_networks
from distill.evaluate.train import train_network
from distill.load import Inputs, saved_state, settle_threads
from distill.plan import (
    evaluations,
    gradient_in_words,
    kept_in_words,
    kept_steps,
    matched_steps,
    num_samples,
    set_in_words,
    share_of_batch,
)
from distill.run_folder import RunFolder
from utils.config import DistillConfig
from utils.data.datasets import Dataset
from utils.derivatives.engine import describe_engine
from utils.errors import number_of
from utils.loss_and_accuracy import accuracy
from utils.memory import peak, reset_peak
from utils.program import ranks
from utils.program.console import duration, say, shown
from utils.program.device import describe
from utils.program.prepare import drawer
from utils.program.progress import watched
from utils.program.seeds import generator

FEW, MORE = 1, 3  # inner steps of the two measurements
CALLS, LONG = 3, 10.0  # of which the median is taken; after this many seconds no further one is begun
LR = 0.01  # any value; the time does not depend on it


def dry_run(config: DistillConfig, inputs: Inputs, path: Path) -> None:
    """Prints an estimate of time and memory and the settings that fit the experts; writes nothing.

    Args:
        path: the run's folder.

    Raises:
        UserError: the run would be refused.
    """
    dataset, buffer = inputs.dataset, inputs.buffer
    folder, saved = RunFolder(path, config), None
    if not folder.is_done:
        saved = saved_state(config, inputs.checksums, folder)
        folder.check(saved)
    settle_threads(config, dataset, buffer, saved)
    checks.check_memory(config, dataset, buffer.model)
    _report(config, dataset, buffer)
    say(config, "which settings fit the experts (Ctrl-C, if the estimate is enough):")
    print(suggest.suggestion(config, dataset, buffer, inputs.labellers))
    print("\nnothing was distilled; " + (f"{shown(path)} is finished already" if folder.is_done else
          "leave --dry_run out to resume" if saved else
          "leave --dry_run out to start, and add what is proposed if you want it"))


def _report(config: DistillConfig, dataset: Dataset, buffer: Buffer) -> None:
    """Prints the estimate."""
    model = buffer.model
    print(f"estimate for {config.dataset}, {config.model}, {set_in_words(config, dataset)}, "
          f"{gradient_in_words(config)} ({describe_engine(model.engine, share_of_batch(config, dataset))}"
          f"{kept_in_words(config, dataset, model)}), on "
          f"{describe(dataset.device)}:", flush=True)
    print(_estimate(config, dataset, buffer))
    if "compiled" in model.engine.name:
        print("compiling comes on top of that, a minute or two the first time")
    print()


def _estimate(config: DistillConfig, dataset: Dataset, buffer: Buffer) -> str:
    """Measures a few inner steps, one epoch of an evaluation and one test pass, and shows its progress; compile time is
    not included. The matched network stands for all of the evaluation's pool."""
    device, model = dataset.device, buffer.model
    rows = torch.arange(config.ipc * dataset.num_classes, device=device) % len(dataset.train_images)
    classes = torch.arange(num_samples(config, dataset), device=device) % dataset.num_classes
    labels = classes if config.labels == "hard" else one_hot(classes, dataset.num_classes).float()
    some = DistilledSet(dataset.train_images[rows], labels, torch.tensor(LR, device=device))
    samples, theta = some.samples(), model.flatten()

    # Without the first batch of a segment, which may be a short one.
    distillation = Distillation(replace(config, syn_steps=1 + MORE, adjoint_steps=None), dataset, buffer, some)
    segment = distillation.segment(None, config.max_start_epoch, generator(config.seed, "estimate"))
    few, more = (replace(segment, batches=segment.batches[1:1 + steps], augment=segment.augment[1:1 + steps])
                 for steps in (FEW, MORE))

    def epoch() -> None:
        train_network(model, theta, samples, labels, LR, epochs=0, batch_size=config.batch_train,
                      draw=drawer(config, dataset, ()), random=generator(config.seed, "estimate", "epoch"))

    def test() -> None:
        accuracy(lambda x: model(theta, x), dataset.test_images, dataset.test_labels)

    # Before the last K steps, a truncated gradient only trains.
    matched = matched_steps(config)
    alone = config.syn_steps - matched
    with watched("measuring", 6 + (alone > 0), config.quiet) as advance:
        def measured(call: Callable[[], object]) -> tuple[float, float]:
            result = _measured(call, device)
            advance(1)
            return result

        before = reset_peak(device)
        distillation.match(more)  # warm-up: allocates, and compiles or captures if the engine does
        advance(1)
        captured = reset_peak(device) - before if device.type == "cuda" else 0  # what the warm-up keeps: CUDA graphs
        more_seconds, more_bytes = measured(lambda: distillation.match(more))
        few_seconds, few_bytes = measured(lambda: distillation.match(few))
        train_seconds = measured(lambda: distillation.loss(some, more))[0] if alone else 0.0
        epoch()  # warm-up: on a GPU each new combination of shapes and augmentation is captured
        advance(1)
        seconds_epoch, seconds_test = measured(epoch)[0], measured(test)[0]
    maps = max(0, kept_steps(config, dataset, model) - MORE) * share_of_batch(config, dataset) * model.engine.map_bytes
    state = 3 * (some.images.nbytes + labels.nbytes)  # with gradients and momenta
    step = max(0.0, more_seconds - few_seconds) / (MORE - FEW)
    once = max(0.0, few_seconds - FEW * step)  # reading the experts' snapshots, cutting out the samples, …
    iteration = once + step * matched + max(0.0, train_seconds - once) / MORE * alone
    # For each further step, the exact gradient keeps a θ and the unrolled one a graph.
    step_bytes = (more_bytes - few_bytes) / (MORE - FEW) if config.matching == "unroll" else theta.nbytes
    evaluation = (1 + config.ema) * len(ranks.deal(range(num_networks(config)))) * (
        config.epochs_trained * seconds_epoch + seconds_test)
    of_all = iteration * config.Iteration, evaluation * evaluations(config)
    matching_bytes = captured + more_bytes + maps + (config.syn_steps - MORE) * step_bytes + state
    data_bytes = sum(each.nbytes for each in (dataset.train_images, dataset.test_images)
                     if isinstance(each, torch.Tensor))  # `HostImages` take no GPU memory
    return (f"an iteration takes about {duration(iteration)}, {number_of(config.Iteration, 'iteration')} "
            f"{duration(of_all[0])}\n"
            f"an evaluation takes about {duration(evaluation)}, {number_of(evaluations(config), 'evaluation')} "
            f"{duration(of_all[1])}\n"
            f"matching takes about {matching_bytes / 1e9:.2g} GB beside {data_bytes / 1e9:.2g} GB of data; the whole "
            f"run about {duration(sum(of_all))}")


def _measured(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(median seconds of a few calls, bytes of memory added at their peak)"""
    before = reset_peak(device)
    seconds: list[float] = []
    while len(seconds) < CALLS and not ranks.any_of(sum(seconds) >= LONG):
        began = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - began)
    return median(seconds), max(0.0, peak(device) - before)
