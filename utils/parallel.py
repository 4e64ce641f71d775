"""Several processes of this machine at once."""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from utils import interrupt
from utils.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

LOOK_SECONDS = 0.2  # between two looks at how far the processes are


def in_processes(function: Callable[[Job, Callable[[], None]], Result], jobs: Sequence[Job], processes: int,
                 on_tick: Callable[[], None] = lambda: None,
                 on_result: Callable[[Job, Result], None] = lambda job, result: None) -> list[Result]:
    """The results of `function(job, tick)`, in order, with the CPU's threads divided among so many processes.

    The processes end with this one, however it ends.

    Args:
        function: can be pickled; it may call `tick` as often as it likes.
        on_tick: called in this process, once for every tick.
        on_result: called in this process, as soon as a result is there.

    Raises:
        UserError: a process was ended from outside, or the function raised one.
    """
    if not jobs:
        return []
    context = multiprocessing.get_context("spawn")  # a fork would inherit thread pools without their threads
    ticks = context.RawArray("q", len(jobs))
    shown = 0
    # Pickled here, since torch would put the tensors into shared memory, of which containers have little.
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, context, _begin, (pickle.dumps(function), ticks, threads)) as pool:
        try:
            futures = {pool.submit(_run, number, job): job for number, job in enumerate(jobs)}
            waiting: set = set(futures)
            while waiting:
                done, waiting = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                for future in done:
                    on_result(futures[future], future.result())
                for _ in range(sum(ticks) - shown):
                    on_tick()
                    shown += 1
            return [future.result() for future in futures]
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.kill()
            if isinstance(error, BrokenProcessPool):
                interrupt.check()  # a signal to all of them, before they could ignore it
                raise UserError("a process that trained a network was ended from outside, perhaps for lack of memory; "
                                "run it again with OMP_NUM_THREADS=1, which trains one network at a time") from error
            raise


# --- in such a process ---------------------------------------------------------------------------------------

_function: Callable = None
_ticks: Sequence[int] = None


def _begin(function: bytes, ticks: Sequence[int], threads: int) -> None:
    global _function, _ticks
    interrupt.ignore()  # Ctrl-C reaches every process of a terminal; the first one answers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _function, _ticks = pickle.loads(function), ticks


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(number: int, job: object) -> object:
    def tick() -> None:
        _ticks[number] += 1
    return _function(job, tick)
