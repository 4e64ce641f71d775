"""Preparations of every program: turn a config into a device, data and models."""

import os
from functools import partial

import torch
from torch import nn

from utils import files
from utils.config import (
    DataConfig,
    DistillConfig,
    TrainConfig,
    about,
    as_dict,
    differences,
    how_much,
    identity,
    is_path,
)
from utils.data import augment
from utils.data.augment import Drawer
from utils.data.datasets import Dataset, load_dataset
from utils.data.names import parse_strategy
from utils.derivatives.choose_engine import Work, check_backend, set_precision
from utils.errors import UserError
from utils.networks import build_network
from utils.parameters import FlatModel
from utils.program import ranks, threads
from utils.program.device import gpu_count, listed_gpus, select_device
from utils.program.progress import watched


def network_for(name: str, dataset: Dataset) -> nn.Module:
    """The named network for a dataset's images and classes."""
    return build_network(name, dataset.channels, dataset.num_classes, dataset.image_size)


def begin(config: DataConfig) -> Dataset:
    """Starts a program: its ranks, its device, and the real data, which is on that device.

    Raises:
        UserError: see `take_device` and `load_dataset`.
    """
    return load_data(config, take_device(config))


def take_device(config: DataConfig) -> torch.device:
    """This rank's device as the config asks for it, with the precision set and backend and output files checked.

    Raises:
        UserError: see `select_device`, `check_backend`, `set_precision` and `check_output_options`; or the ranks'
            options differ.
    """
    start_as_ranks(config)
    threads.use_given(config)
    device = select_device(config.device)
    if device.type == "cuda" and ranks.size() > 1:
        gpus = gpus_of_ranks(config)
        device = torch.device("cuda", gpus[int(os.environ.get("LOCAL_RANK", ranks.rank())) % len(gpus)])
        torch.cuda.set_device(device)
    ranks.start(device)
    _check_same_options(config)
    check_backend(config.backend, device)
    set_precision(config.precision, device)
    check_output_options(config)
    return device


def gpus_of_ranks(config: DataConfig) -> list[int]:
    """The GPUs that this machine's ranks take in turn: those that `device` names or lists, else all. More ranks than
    GPUs share them. Empty if `device` names the CPU."""
    if isinstance(config.device, str) and config.device not in ("auto", "cuda"):
        named = select_device(config.device)
        return [] if named.index is None else [named.index]
    return listed_gpus(config.device) or list(range(gpu_count()))


def check_output_options(config: DataConfig) -> None:
    """Refuses, before long work, an output file that cannot be written, that another option names too, or whose path
    holds another kind of file.
    """
    given = {name: value for name, value in as_dict(config).items() if is_path(name, value, type(config))}
    if ranks.first():
        files.check_outputs({f"--{name}": path for name, path in given.items()},
                            {f"--{name}": kind for name in given if (kind := about(name, type(config))["writes"])})


def _check_same_options(config: DataConfig) -> None:
    """Refuses ranks that were started with different options, as their work would be mixed."""
    # Paths may differ between machines; which run it is, and whether to resume it, may not.
    named = {name: getattr(config, name, None) for name in ("run_name", "resume")}
    of_all = ranks.gather({ranks.rank(): identity(config) | how_much(config) | named})
    for number, options in of_all.items():
        different = differences(of_all[0], options)
        if different:
            raise UserError(f"ranks 0 and {number} were started with different options: {different}; give all ranks "
                            "the same")


def load_data(config: DataConfig, device: torch.device) -> Dataset:
    """The real dataset that a config names.

    Raises:
        UserError: it cannot be read, has one class only, or is not the same on all ranks.
    """
    dataset = ranks.first_rank_first(lambda: load_dataset(
        config.dataset, config.data_path, subset=config.subset, zca=config.zca, res=config.res,
        val_fraction=config.val_fraction, device=device, watch=partial(watched, quiet=config.quiet)))
    ranks.check_equal(lambda: dataset.fingerprint, f"images of {config.dataset}")  # machines may have their own copies
    if dataset.num_classes < 2:
        raise UserError(f"{config.dataset} in {config.data_path} has only the class {dataset.classes[0]}; networks "
                        "need at least two classes")
    return dataset


def start_as_ranks(config: DataConfig) -> None:
    """Restarts this command as one rank per GPU if there are several to use, and exits with them: those that `device`
    lists (published configs list up to four) or, for evaluations with `--parall_eva`, those of `gpus_of_ranks`."""
    if ranks.size() > 1 or "TORCHELASTIC_RUN_ID" in os.environ or getattr(config, "dry_run", False):
        return
    gpus = listed_gpus(config.device)
    if isinstance(config, TrainConfig) and config.parall_eva and not isinstance(config, DistillConfig):
        gpus = gpus_of_ranks(config)
    if len(gpus) > 1:
        ranks.launch(len(gpus))


def flat_model(config: DataConfig, network: nn.Module, work: Work, micro_batch: int | None = None) -> FlatModel:
    """A network on its device, with the engine that the config selects for the work to come."""
    return FlatModel(network, config.backend, config.precision, micro_batch, work)


def dsa_groups(config: DataConfig, inner_loop: bool = False) -> tuple[str, ...]:
    """The DSA groups of a config; empty without DSA, and in the inner loop with `no_aug`.

    Raises:
        UserError: an unknown group.
    """
    groups = parse_strategy(config.dsa_strategy)
    return groups if config.dsa and not (inner_loop and config.no_aug) else ()


def drawer(config: DataConfig, dataset: Dataset, older_operations: tuple[str, ...]) -> Drawer:
    """The augmentation of a training: DSA, or with `--dsa False` the older one, with `older_operations`."""
    if config.dsa:
        groups = dsa_groups(config)
        return lambda batch, random: augment.draw(groups, batch, dataset.image_size, random)
    return lambda batch, random: augment.draw_per_image(older_operations, batch, dataset.image_size, dataset.channels,
                                                        random)
