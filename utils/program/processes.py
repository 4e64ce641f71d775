"""Helpers on this machine's CPU: processes that divide its threads."""

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

from utils.errors import UserError
from utils.program import interrupt
from utils.program.ranks import Job, Result

LOOK_SECONDS = 0.2  # between two looks at how far the processes are


def in_processes(function: Callable[[Job, Callable[[], None]], Result], jobs: Sequence[Job], processes: int,
                 on_tick: Callable[[], None] = lambda: None,
                 on_result: Callable[[Job, Result], None] = lambda job, result: None) -> list[Result]:
    """The results of `function(job, tick)`, in order, with the CPU's threads divided among so many processes.

    The processes end with this one, however it ends. They import the program's main script, so whatever that does must
    stand under `if __name__ == "__main__"`.

    Args:
        function: can be pickled; it may call `tick` as often as it likes.
        on_tick: called in this process, once for every tick.
        on_result: called in this process, as soon as a result is there.

    Raises:
        UserError: a process was ended from outside, or the function raised one.
        RuntimeError: the function raised something else; it shows where.
    """
    if not jobs:
        return []
    context = multiprocessing.get_context("spawn")  # a fork would inherit thread pools without their threads
    others = set(multiprocessing.active_children())
    ticks = context.RawArray("q", len(jobs))
    shown = 0
    with tempfile.TemporaryDirectory() as folder:
        # In a file: a process that dies while it starts would leave the other end of a long pipe waiting for ever; and
        # torch would put the tensors into shared memory, of which containers have little.
        path = Path(folder) / "function"
        path.write_bytes(pickle.dumps(function))
        threads = max(1, torch.get_num_threads() // processes)
        with ProcessPoolExecutor(min(processes, len(jobs)), context, _begin, (path, ticks, threads)) as pool:
            try:
                with interrupt.blocked():  # for ever in the processes: Ctrl-C reaches all, and the first one answers
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
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                if isinstance(error, BrokenProcessPool):
                    raise UserError("a helper process was ended from outside, perhaps for lack of "
                                    "memory; run it again with --threads 1, which does one part at a time"
                                    ) from error
                raise


_function: Callable = None

_ticks: Sequence[int] = None


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
    except Exception:  # not every exception survives the way back
        raise RuntimeError(traceback.format_exc()) from None
