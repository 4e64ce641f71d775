"""What a distillation begins with: the data, the experts, the student, and the checkpoint of a run that is resumed."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from buffer.manifests import buffer_folder, check_same_images, check_same_on_ranks, expert_files, manifest_path
from buffer.trajectories import Buffer
from distill import checks, plan
from distill.run_folder import RunFolder
from utils.config import STARTS, DistillConfig
from utils.data.datasets import Dataset
from utils.errors import note
from utils.files import sha256
from utils.parameters import FlatModel
from utils.program import ranks, threads
from utils.program.console import shown
from utils.program.prepare import begin, flat_model, network_for
from utils.program.progress import watched


class Inputs(NamedTuple):
    """The data and the experts of a distillation, and the checksums that identify it."""

    dataset: Dataset
    buffer: Buffer  # the experts that are matched, with the student
    labellers: Buffer  # the experts that label the initial images
    checksums: dict[str, str]  # of everything it reads apart from its checkpoint, by name


def read_inputs(config: DistillConfig) -> Inputs:
    """Loads the data, opens the experts and checks their files.

    Raises:
        UserError: options, data and experts do not fit together, or a file is damaged.
    """
    dataset, buffer = data_and_experts(config)
    checks.check_window(config, buffer)
    labellers = labellers_of(config, dataset, buffer)
    checksums = ranks.from_first_rank(lambda: data_checksums(config, dataset, buffer, labellers))
    return Inputs(dataset, buffer, labellers, checksums)


def data_and_experts(config: DistillConfig) -> tuple[Dataset, Buffer]:
    """The data and the experts of a distillation, with the student that it trains.

    Raises:
        UserError: options, data and experts do not fit together; the difficulty window is not checked.
    """
    # Refuse a --pix_init set of other data; load the data.
    checks.check_start(config)
    dataset = begin(config)

    # Build the student.
    checks.check_networks(config, dataset)
    student = student_of(config, dataset)

    # Open the experts; refuse those trained on other data.
    buffer = Buffer(buffer_folder(config), student, config.max_files, config.max_experts)
    check_same_images(buffer.folder, dataset)
    check_same_on_ranks(buffer.folder, config.max_files)
    if config.val_fraction and ranks.first() and not all(
            manifest_path(path).exists() for path in expert_files(buffer.folder)):
        note(f"experts in {shown(buffer.folder)} have no manifest, as published ones, which were trained on the "
             "held-out images too")
    return dataset, buffer


def labellers_of(config: DistillConfig, dataset: Dataset, buffer: Buffer) -> Buffer:
    """The experts that label the initial images: those that are matched, all in their folder, or another network's.

    Raises:
        UserError: the other network's expert files are missing, unreadable, or of a different network or other images.
    """
    if config.labelled_by_another:
        network = network_for(config.Initialize_Label_Model, dataset).to(dataset.device)
        buffer = Buffer(Path(config.Initialize_Label_Model_Dir), FlatModel(network))
        check_same_images(buffer.folder, dataset, "--Initialize_Label_Model_Dir")
    elif config.max_files or config.max_experts:
        # All experts label, even if only some are matched. They are part of a run's identity even where none labels, as
        # in runs of earlier versions.
        buffer = Buffer(buffer.folder, buffer.model)
    return buffer


def data_checksums(config: DistillConfig, dataset: Dataset, buffer: Buffer, labellers: Buffer) -> dict[str, str]:
    """Checksums of everything a distillation reads, by name; with the options they identify a run, whatever the paths.

    Raises:
        UserError: an expert file is damaged.
    """
    watch = partial(watched, quiet=config.quiet)
    sums = {"images": dataset.fingerprint, **buffer.verify(watch)}
    if labellers is not buffer:
        sums |= {f"labels by {name}": checksum for name, checksum in labellers.verify(watch).items()}
    if config.pix_init not in STARTS:
        sums["the set to start from"] = sha256(config.pix_init)
    return sums


def student_of(config: DistillConfig, dataset: Dataset) -> FlatModel:
    """The network that is matched, with the engine that the config asks for."""
    network = network_for(config.model, dataset).to(dataset.device)
    if config.matching == "unroll":  # plain autograd through whole batches
        model = FlatModel(network, "plain")
        model.engine.micro_batch = None
        return model
    return flat_model(config, network, plan.work_of(config, dataset), config.micro_batch)


def settle_threads(config: DistillConfig, dataset: Dataset, buffer: Buffer, saved: dict[str, Any] | None) -> None:
    """Uses as many threads as help, or as the resumed run had. If that changes their number, builds the student again,
    since its engine depends on it."""
    before = torch.get_num_threads()
    threads.settle(config, buffer.model.network, plan.share_of_batch(config, dataset), plan.work_of(config, dataset),
                   saved and saved["threads"])
    if torch.get_num_threads() != before:
        buffer.model = student_of(config, dataset)


def saved_state(config: DistillConfig, checksums: dict[str, str], folder: RunFolder) -> dict[str, Any] | None:
    """The checkpoint to resume from; None for a new run.

    Raises:
        UserError: it is damaged, or was made with other data.
    """
    saved = ranks.from_first_rank(lambda: folder.saved_state if config.resume == "auto" else None)
    checks.check_resumable(config, saved, checksums, folder)
    return saved
