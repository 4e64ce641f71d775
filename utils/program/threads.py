"""How many CPU threads a program computes with: the number given, else as many as help."""

import copy
import os
from time import perf_counter

import torch
from torch import nn

from utils.config import AUTO, DataConfig
from utils.derivatives.choose_engine import PLAIN_BYTES, Work, activation_bytes, seconds_uncompiled
from utils.errors import note, number_of
from utils.parameters import FlatModel
from utils.program import ranks
from utils.program.console import say

WORTH_MEASURING = 60.0  # seconds of work
BLOCK, BLOCKS = 0.08, 4  # seconds of steps with each number of threads in turn, and how often
HELPS = 1.1  # speed-up over one thread that all threads must exceed

_left_out = 0  # all threads, where a single network computes with one; several networks at a time may use them


def use_given(config: DataConfig) -> None:
    """Sets the number of `--threads`; without it torch keeps its own: OMP_NUM_THREADS, or one thread per core.

    A number above that of cores is respected, as the result depends on it, but a note says that it is slow.
    """
    global _left_out
    _left_out = 0
    if config.threads != AUTO:
        torch.set_num_threads(config.threads)
        cores = ranks.cores()
        if config.threads > cores and ranks.first():
            note(f"--threads {config.threads}: there {'is' if cores == 1 else 'are'} {number_of(cores, 'core')} here, "
                 "and threads that wait for each other's core are many times slower; give no more than that")


def available() -> int:
    """Threads that processes may divide; none of them computes with more than a single process would."""
    return max(torch.get_num_threads(), _left_out)


def settle(config: DataConfig, network: nn.Module, batch: int, work: Work, known: int | None = None) -> None:
    """Switches to one thread if all are no faster for this network here and now; a number that was given stays.

    With small layers, or other programs on the same cores, all threads wait for the slowest one at every layer. All
    ranks use the number of the first. Numbers between one and all are not tried: the result depends on the number,
    and should be one of two.

    Args:
        batch: samples per step.
        work: the work to come; measuring takes a second, and is skipped if the work is too short to repay it.
        known: thread count of the unfinished run that is resumed, kept for bit-identical results if available here.
    """
    global _left_out
    everything = torch.get_num_threads()
    given = (config.threads != AUTO or os.environ.get("OMP_NUM_THREADS")
             or next(network.parameters()).device.type != "cpu")

    def choose() -> int:
        if given or known in range(1, everything + 1):
            return known or everything
        if everything == 1 or seconds_uncompiled(network, work) < WORTH_MEASURING:
            return everything
        one, with_all = seconds_of_a_step(network, batch, everything)
        chosen = everything if one > HELPS * with_all else 1
        say(config, f"threads: {chosen} of {everything}; all are {one / with_all:.2g} times as fast as one here and "
                    f"now (--threads {chosen} asks for the same)")
        return chosen

    chosen = ranks.from_first_rank(choose)
    if not given:
        torch.set_num_threads(chosen)
        _left_out = everything if chosen == 1 else 0


def seconds_of_a_step(network: nn.Module, batch: int, everything: int) -> tuple[float, float]:
    """Seconds of a gradient with one thread and with all, measured in turns; a large batch is scaled up from a part."""
    part = min(batch, max(1, PLAIN_BYTES // activation_bytes(network)))
    model = FlatModel(copy.deepcopy(network))  # a copy, as steps update batch norm's running statistics
    theta = model.flatten()
    x, y = torch.rand(part, *network.image_shape), torch.zeros(part, dtype=torch.long)
    seconds, steps = {1: 0.0, everything: 0.0}, {1: 0, everything: 0}
    for block in range(BLOCKS + 1):
        for threads in seconds:
            torch.set_num_threads(threads)
            began = now = perf_counter()
            done = 0
            while not done or (block and now - began < BLOCK):  # the first block warms up kernels and memory
                model.gradient(theta, x, y)
                done, now = done + 1, perf_counter()
            if block:
                seconds[threads], steps[threads] = seconds[threads] + now - began, steps[threads] + done
    one, with_all = (batch / part * seconds[threads] / steps[threads] for threads in seconds)
    return one, with_all
