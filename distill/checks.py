"""Refusals and notes that need files, before a distillation starts; `option_checks` needs options only."""

import contextlib
from typing import Any

from buffer.trajectories import Buffer
from distill.distilled_set import DistilledSet
from distill.evaluate.networks import check_pool
from distill.evaluate.saved_set import check_told
from distill.plan import num_samples, share_of_batch
from distill.result_files import NORMAL, RESULT, tested_in_words
from distill.run_folder import RunFolder
from distill.set_files import WHOLE
from utils.config import STARTS, DistillConfig, differences, identity
from utils.data.datasets import Dataset
from utils.data.tiles import check_factor
from utils.derivatives.choose_engine import activation_bytes
from utils.errors import UserError, note, number_of
from utils.files import read_config
from utils.memory import available
from utils.networks import has_batch_norm
from utils.parameters import FlatModel
from utils.program import ranks
from utils.program.console import shown
from utils.program.prepare import gpus_of_ranks, network_for

FEW_IMAGES = 100  # below this number, the standard error of an accuracy is up to 5 points or more


def check_start(config: DistillConfig) -> None:
    """Refuses a `--pix_init` set that, by its own metadata, has another image size or whitening than the data."""
    if config.pix_init in STARTS:
        return
    given = f"--pix_init {config.pix_init}"
    distilled = DistilledSet.load(config.pix_init)
    check_told(config, distilled, given, distilled.config)
    if (distilled.whitening is not None) != config.zca:
        raise UserError(f"{given}: it is {'not ' * config.zca}whitened (zca), and the data here "
                        f"{'is' if config.zca else 'is not'}; give the --zca and the data that it was made with")


def check_networks(config: DistillConfig, dataset: Dataset) -> None:
    """Refuses a factor or networks (the evaluation's too) that do not fit the images, and options that do not work
    with several ranks.
    """
    check_factor(config.factor, dataset.image_size)
    check_pool(config, dataset)
    if ranks.size() == 1:
        return
    if config.matching == "unroll":
        raise UserError("--matching unroll runs in one process only; give --matching exact, which has the same "
                        "gradient")
    if has_batch_norm(network_for(config.model, dataset)):
        raise UserError(f"--model {config.model}: batch norm ties the samples of a batch together, so that ranks "
                        "cannot share one; start a single process, or take a network without batch norm")
    gpus = len(gpus_of_ranks(config))
    if dataset.device.type == "cuda" and ranks.ranks_here() > gpus:
        raise UserError(f"{ranks.ranks_here()} ranks on this machine, of whose GPUs --device {config.device} takes "
                        f"{gpus}; a distillation takes one for each rank: give --device auto, which takes all, or "
                        f"torchrun --nproc_per_node={gpus}")


def check_window(config: DistillConfig, buffer: Buffer) -> None:
    """Refuses a difficulty window that reaches beyond the experts' trajectories."""
    last = config.max_start_epoch - 1 + config.expert_epochs
    if last > buffer.epochs:
        most = buffer.epochs - config.expert_epochs + 1
        advice = f"--max_start_epoch {most} or less" if most > 0 else f"--expert_epochs {buffer.epochs} or less"
        raise UserError(f"--max_start_epoch {config.max_start_epoch} --expert_epochs {config.expert_epochs}: a segment "
                        f"would end at epoch {last}, but the shortest of the experts in {buffer.folder} has "
                        f"{number_of(buffer.epochs, 'epoch')}; give {advice}, or train the experts for longer")


def check_memory(config: DistillConfig, dataset: Dataset, model: FlatModel) -> None:
    """Refuses a run that cannot fit in memory, by a lower bound of what it needs."""
    device = dataset.device
    pixels, num_images = dataset.test_images[0].numel(), config.ipc * dataset.num_classes
    batch = share_of_batch(config, dataset)
    state = 4 * 4 * num_images * pixels  # images, their gradient and momentum, the initial images
    if config.factor > 1:
        state += 2 * 4 * num_samples(config, dataset) * pixels  # the samples cut out of them, and their gradient
    samples = batch * config.syn_steps if config.matching == "unroll" else min(batch, model.engine.micro_batch or batch)
    steps = 4 * model.num_parameters * (config.syn_steps + 1) + samples * activation_bytes(model.network)
    free = available(device)
    if state + steps > free:
        advice = ("give --matching exact, which has the same gradient in far less" if config.matching == "unroll" else
                  f"give a smaller {'--batch_syn' if has_batch_norm(model.network) else '--micro_batch'}, --syn_steps "
                  "or --ipc")
        raise UserError(f"this distillation needs at least {(state + steps) / 1e9:.1f} GB of memory, and "
                        f"{free / 1e9:.1f} GB are free on {device}; {advice}")


def note_others(config: DistillConfig, folder: RunFolder) -> None:
    """Notes unfinished runs of the same options beside a new one: without `--run_name`, other data name a run anew."""
    named = f"{config.matching}_seed{config.seed}_*/config.yaml"
    for path in () if config.run_name else folder.path.parent.glob(named):
        with contextlib.suppress(UserError):  # another run's damaged config is no concern of this one
            if path.parent != folder.path and not (path.parent / RESULT).exists() and not differences(
                    read_config(path), identity(config)):
                note(f"{shown(path.parent)} holds an unfinished run of these options with other experts or images, "
                     "or of an earlier version; this is a new one")


def few_images(config: DistillConfig, dataset: Dataset) -> list[str]:
    """A note if the images on which the best set is chosen are too few to tell similar sets apart."""
    images = len(dataset.test_labels)
    if images >= FEW_IMAGES or not config.Iteration or config.quiet:
        return []
    return [f"the best set is chosen on {tested_in_words(config.val_fraction, images)}, of which each is worth "
            f"{100 / images:.1f} points; accuracies that differ by a few images do not tell which set is better"]


def check_resumable(config: DistillConfig, saved: dict[str, Any] | None, checksums: dict[str, str],
                    folder: RunFolder) -> None:
    """Refuses to resume a run that was started with other data, is past the requested iteration, or is finished and
    has lost its checkpoint.

    Args:
        saved: the run's saved state; None: there is none.
        checksums: of everything the run reads, by name.
    """
    if (folder.finished or folder.extends) and saved is None:
        run, whole = shown(folder.path), folder.path / NORMAL / WHOLE
        start = shown(whole) if whole.exists() else f"what evaluation.py --data_dir {run} --save FILE writes"
        raise UserError(f"{run} holds a finished run, which cannot be extended to --Iteration {config.Iteration} "
                        f"without its checkpoint.pt; give another --run_name and --pix_init {start}")
    if saved is None:
        return
    before = saved["data"]
    different = [f"{name} ({'new' if name not in before else 'missing' if name not in checksums else 'changed'})"
                 for name in sorted({**before, **checksums}) if before.get(name) != checksums.get(name)]
    if different:
        raise UserError(f"{shown(folder.path)} was begun with other data: {', '.join(different)}; restore what it had"
                        f"{', move away what is new,' if checksums.keys() - before.keys() else ','} or "
                        f"{folder.to_start_over}")
    if saved["iteration"] > config.Iteration:
        raise UserError(f"--Iteration {config.Iteration}: {shown(folder.path)} is at iteration {saved['iteration']} "
                        "already; give at least that")
