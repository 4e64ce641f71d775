"""Worker processes that divide the threads of this machine's CPU."""

import multiprocessing
import os
import pickle
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from utils.errors import UserError, out_of_memory, reason
from utils.program import interrupt
from utils.program.ranks import Job, Result

LOOK_SECONDS = 0.2  # between two polls of the processes


def in_processes(function: Callable[[Job, Callable[[], None]], Result], jobs: Sequence[Job], processes: int,
                 on_tick: Callable[[], None] = lambda: None,
                 on_result: Callable[[Job, Result], None] = lambda job, result: None) -> None:
    """Calls `function(job, tick)` for each job, in processes that divide the CPU's threads.

    The processes end with this one, however it ends. They import the program's main script, so its code must be guarded
    by `if __name__ == "__main__"`.

    Args:
        function: must be picklable; it may call `tick` any number of times.
        on_tick: called in this process, once for every tick.
        on_result: called in this process, as soon as a result is there.

    Raises:
        UserError: a process was killed from outside, or the function raised a UserError.
        MemoryError: the function ran out of memory.
        RuntimeError: the function raised another exception; the message is its traceback.
    """
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit thread pools without their threads
    others = set(multiprocessing.active_children())
    ticks = context.RawArray("q", len(jobs))
    shown = 0
    with tempfile.TemporaryDirectory() as folder:
        # Passed in a file: with a pipe, a process that died while starting would leave a large write blocked for ever,
        # and torch would put the tensors into shared memory, which is small in containers.
        path = Path(folder) / "function"
        path.write_bytes(pickle.dumps(function))
        threads = max(1, torch.get_num_threads() // processes)
        with ProcessPoolExecutor(min(processes, len(jobs)), context, _begin, (path, ticks, threads)) as pool:
            try:
                with interrupt.blocked():  # inherited by the processes: Ctrl-C reaches all, only this one reacts
                    futures = {pool.submit(_run, number, job): job for number, job in enumerate(jobs)}
                waiting: set = set(futures)
                while waiting:
                    done, waiting = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                    for future in done:
                        on_result(futures[future], future.result())
                    for _ in range(sum(ticks) - shown):
                        on_tick()
                        shown += 1
            except BaseException as error:
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                if isinstance(error, BrokenProcessPool):
                    raise UserError("a helper process was ended from outside, perhaps for lack of "
                                    "memory; run it again with --threads 1, which does one part at a time"
                                    ) from error
                raise


# Of a helper process, set by `_begin`.
_function: Callable | None = None
_ticks: Sequence[int] | None = None


def _begin(path: Path, ticks: Sequence[int], threads: int) -> None:
    global _function, _ticks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _function, _ticks = pickle.loads(path.read_bytes()), ticks


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(number: int, job: object) -> object:
    def tick() -> None:
        _ticks[number] += 1
    try:
        return _function(job, tick)
    except UserError:
        raise
    except Exception as error:  # not every exception survives pickling
        if out_of_memory(error):
            raise MemoryError(reason(error)) from None
        raise RuntimeError(traceback.format_exc()) from None
