"""The ranks that torchrun starts: several processes that run the same program on the same data and share its work.

Lists of jobs are dealt out (`deal`, `gather`). A batch is split by rows (`own_share`), and what is computed of the
parts is summed (`sum_`). Without torchrun there is one rank, and all of this does nothing.
"""

import datetime
import os
import re
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from utils.errors import UserError
from utils.program import interrupt

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

Job = TypeVar("Job")
Result = TypeVar("Result")


PATIENCE = datetime.timedelta(days=30)  # a rank may wait while another trains experts; torchrun detects dead ranks
SUM_PATIENCE = datetime.timedelta(minutes=10)  # between GPUs, where only a timeout reveals a dead rank

_met = False  # whether this process has joined a group of several ranks
_gpus: "ProcessGroup | None" = None  # the process group for tensors on GPUs, if each rank has a GPU of its own


def _torch() -> ModuleType:
    """torch with torch.distributed, imported only if there are several ranks."""
    import torch.distributed

    return torch


def rank() -> int:
    return int(os.environ["RANK"]) if size() > 1 else 0


def size() -> int:
    """1 without torchrun, even if something else has set some of its variables."""
    if "LOCAL_RANK" not in os.environ or _wrong_variable():
        return 1
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_variables() -> None:
    """Refuses variables that ask for several ranks without saying which one this is, or how to reach the others."""
    wrong = _wrong_variable()
    if wrong:
        value = os.environ.get(wrong)
        raise UserError(f"LOCAL_RANK and WORLD_SIZE {os.environ['WORLD_SIZE']!r} are set, as torchrun does for one of "
                        f"several processes, but {wrong} is {'not' if value is None else repr(value)}; start it with "
                        "torchrun, or unset LOCAL_RANK for a single process")


def _wrong_variable() -> str | None:
    """The torchrun variable that is missing or invalid, if any; Lightning, Slurm and old shells leave some behind."""
    if "LOCAL_RANK" not in os.environ or (os.environ.get("WORLD_SIZE") or "1") == "1":
        return None
    numbers = {name: int(text) if re.fullmatch("[0-9]{1,9}", text := os.environ.get(name, default)) else -1
               for name, default in (("WORLD_SIZE", ""), ("RANK", ""), ("LOCAL_RANK", ""), ("LOCAL_WORLD_SIZE", "1"),
                                     ("MASTER_PORT", ""))}
    possible = {"WORLD_SIZE": numbers["WORLD_SIZE"] > 0, "RANK": 0 <= numbers["RANK"] < numbers["WORLD_SIZE"],
                "LOCAL_RANK": numbers["LOCAL_RANK"] >= 0, "LOCAL_WORLD_SIZE": numbers["LOCAL_WORLD_SIZE"] > 0,
                "MASTER_PORT": 0 < numbers["MASTER_PORT"] < 2**16, "MASTER_ADDR": bool(os.environ.get("MASTER_ADDR"))}
    return next((name for name, it_is in possible.items() if not it_is), None)


def ranks_here() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size()))


def first() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


def start(device: "torch.device") -> None:
    """Joins the other ranks, if there are any; all of them must call this."""
    global _met, _gpus
    if size() == 1 or _met:
        return
    dist = _torch().distributed
    interrupt.restore()  # a rank that waits for another cannot handle signals
    dist.init_process_group("gloo", timeout=PATIENCE)  # small objects go over the CPU, wherever the tensors are
    _met = True
    places = gather({rank(): (socket.gethostname(), device.index)})
    on_cpu = [(each, host) for each, (host, gpu) in places.items() if gpu is None]
    if 0 < len(on_cpu) < size():
        interrupt.install()
        raise UserError(f"rank {on_cpu[0][0]} on {on_cpu[0][1]} has no GPU that torch can use, and other ranks have "
                        "one; start ranks on machines with GPUs only, or give --device cpu")
    if not on_cpu and len(set(places.values())) == size():  # NCCL needs a GPU per rank; else sums go over the CPU
        _gpus = dist.new_group(backend="nccl", timeout=SUM_PATIENCE, device_id=device)
    interrupt.install()


def lost_contact(error: RuntimeError) -> bool:
    """Whether a rank's error means that another rank is gone."""
    said = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")
    return _met and (isinstance(error, _torch().distributed.DistError) or any(each in str(error) for each in said))


def leave(code: int) -> None:
    """Ends this process if it is one of several ranks; else does nothing."""
    if _met:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # torch's threads sometimes abort in an orderly shutdown


def deal(jobs: Sequence[Job]) -> Sequence[Job]:
    """This rank's share of a list that is the same on all ranks."""
    return jobs[rank()::size()]


def gather(own: dict[Any, Any]) -> dict[Any, Any]:
    """The union of all ranks' dictionaries, on every rank."""
    if size() == 1:
        return own
    of_all: list[Any] = [None] * size()
    _torch().distributed.all_gather_object(of_all, own)
    return {key: value for each in of_all for key, value in each.items()}


def check_equal(own: Callable[[], Any], what: str) -> None:
    """Refuses values that differ between ranks, as their work would be mixed.

    Args:
        own: returns this rank's value; not called if there is one rank.
        what: what the values are of, in words (plural).
    """
    if size() == 1:
        return
    of_all = gather({rank(): own()})
    for number, value in of_all.items():
        if value != of_all[0]:
            raise UserError(f"ranks 0 and {number} read different {what}; give the ranks of all machines the same")


def from_first_rank(make: Callable[[], Result]) -> Result:
    """The first rank's result, or its `UserError`, on every rank; the others wait for it. Tensors should be on the
    CPU."""
    if size() == 1:
        return make()
    broadcast = _torch().distributed.broadcast_object_list
    try:
        held = [make() if first() else None]
    except UserError as error:
        broadcast([error])
        raise
    broadcast(held)
    if isinstance(held[0], UserError):
        raise held[0]
    return held[0]


def first_rank_first(make: Callable[[], Result]) -> Result:
    """Each rank's own result, made after the first rank's, so that all can use what that left in a cache or folder."""
    made: list[Result] = []
    from_first_rank(lambda: made.append(make()))
    return made[0] if first() else make()


def barrier() -> None:
    """Waits until all ranks have called this."""
    gather({})


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if size() == 1:
        return flag
    torch = _torch()
    held = torch.tensor(flag, dtype=torch.int32)
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
    return bool(held)


def sum_(tensor: "Tensor") -> "Tensor":
    """The sum over all ranks, in place; bit-identical on all of them."""
    if size() > 1:
        _torch().distributed.all_reduce(tensor, group=_gpus if tensor.is_cuda else None)
    return tensor


def own_share() -> slice:
    """This rank's rows of a batch: r, r + n, r + 2n, … for rank r of n."""
    return slice(rank(), None, size())


def cores() -> int:
    """How many cores this process may use, which a scheduler may make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(processes: int) -> NoReturn:
    """Starts this command again as `processes` ranks on this machine, as torchrun would, and exits when they have."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    # Those that are ignored, as by nohup, stay ignored. Some versions of torch take this from the environment only,
    # others overwrite that with the setting.
    handled = ",".join(each.name for each in (*interrupt.SIGNALS, signal.SIGQUIT)
                       if signal.getsignal(each) is not signal.SIG_IGN)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = handled
    more = {each.name: handled for each in fields(LaunchConfig) if each.name == "signals_to_handle"}
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in; a second signal stops at once
    settings = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, max_restarts=0,
                            rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", monitor_interval=0.1, **more)
    try:
        elastic_launch(settings, sys.executable)("-u", *sys.argv)
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)  # the rank has printed why
        name, ended_by = Path(sys.argv[0]).name, signal.Signals(-failure.exitcode).name
        print(f"{name}: error: rank {failure.local_rank} was ended by {ended_by}; start again, which resumes from what "
              "is saved, if anything", file=sys.stderr)
        sys.exit(128 - failure.exitcode)
    except SignalException as stopped:  # the ranks got the signal too, and have saved
        sys.exit(128 + stopped.sigval)
    sys.exit(0)
