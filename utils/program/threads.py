"""How many of the CPU's threads a program computes with: as many as it is told, or as help."""

import copy
import os
from time import perf_counter

import torch
from torch import nn

from utils.config import AUTO, DataConfig
from utils.derivatives.choose_engine import PLAIN_BYTES, Work, activation_bytes, seconds_uncompiled
from utils.errors import number_of
from utils.parameters import FlatModel
from utils.program import ranks
from utils.program.console import note, say

WORTH_MEASURING = 60.0  # seconds of work
BLOCK, BLOCKS = 0.08, 4  # seconds of steps with one number and then the other, and how often
HELPS = 1.1  # times faster than one, which more threads must be

_left_out = 0  # threads that more than one network at a time may use, where a single one has no use for them


def take(config: DataConfig) -> None:
    """What `--threads` gives; else torch's own number: OMP_NUM_THREADS, or a thread for each core.

    More than there are cores are obeyed, as the result depends on the number, and said to be slow.
    """
    global _left_out
    _left_out = 0
    if config.threads != AUTO:
        torch.set_num_threads(config.threads)
        cores = os.cpu_count() or 1
        if config.threads > cores and ranks.first():
            note(f"note: --threads {config.threads}: there {'is' if cores == 1 else 'are'} {number_of(cores, 'core')} "
                 "here, and threads that wait for each other's core are many times slower; give no more than that")


def at_hand() -> int:
    """Threads that processes may divide, each of which computes with no more than a single one would."""
    return max(torch.get_num_threads(), _left_out)


def settle(config: DataConfig, network: nn.Module, batch: int, work: Work, known: int | None = None) -> None:
    """Where nobody gave a number: takes one thread, if all are no faster for this network here and now.

    Where a layer is small, or other programs want the cores too, all threads wait at every layer for the last of them.
    Several ranks take the number of the first. More than one and fewer than all are not tried: the result depends on
    the number, and should be one of two.

    Args:
        batch: samples of a step.
        work: what is to come, which must be worth the second that it takes to find out.
        known: with how many an unfinished run began, so that it goes on to the bit, where there are as many here.
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
    """What a gradient takes with one thread and with all, measured by turns; a large batch counts by a part of it."""
    part = min(batch, max(1, PLAIN_BYTES // activation_bytes(network)))
    model = FlatModel(copy.deepcopy(network))  # batch norm counts what passes through it
    theta = model.flatten()
    x, y = torch.rand(part, *network.image_shape), torch.zeros(part, dtype=torch.long)
    seconds, steps = {1: 0.0, everything: 0.0}, {1: 0, everything: 0}
    for block in range(BLOCKS + 1):
        for threads in seconds:
            torch.set_num_threads(threads)
            began = now = perf_counter()
            done = 0
            while not done or (block and now - began < BLOCK):  # the first is for kernels that are made, and memory
                model.gradient(theta, x, y)
                done, now = done + 1, perf_counter()
            if block:
                seconds[threads], steps[threads] = seconds[threads] + now - began, steps[threads] + done
    one, with_all = (batch / part * seconds[threads] / steps[threads] for threads in seconds)
    return one, with_all
