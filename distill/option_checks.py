"""Checks before anything is loaded, including torch."""

from pathlib import Path

from buffer.manifests import BUFFER_PATH, buffer_folder, check_fitting, require_experts
from distill.evaluate.option_checks import check_evaluation
from distill.run_folder import RunFolder, run_folder
from distill.schedule import start_epoch_bound
from utils.config import STARTS, DistillConfig
from utils.errors import UserError
from utils.files import check_is_file
from utils.networks import check_network_name
from utils.program import ranks


def check_options(config: DistillConfig) -> None:
    """Refuses options that contradict each other, and named folders and files that are missing or do not fit."""
    check_evaluation(config)
    # PAD has two rules for choosing parameters.
    if config.depth_ratio and config.loss_ratio:
        raise UserError(f"--depth_ratio {config.depth_ratio:g} --loss_ratio {config.loss_ratio:g}: these are two rules "
                        "for the same choice; give one of them")
    # The unrolled gradient has no engine options.
    given = [f"--backend {config.backend}"] if config.backend not in ("auto", "plain") else []
    given += [f"--micro_batch {config.micro_batch}"] if config.micro_batch else []
    given += ["--precision bf16"] if config.precision == "bf16" else []
    if config.matching == "unroll" and given:
        raise UserError(f"--matching unroll {' '.join(given)}: the unrolled gradient is plain autograd, whole batches "
                        "in float32; leave that out, or give --matching exact, which has the same gradient")
    if config.adjoint_steps and config.matching != "exact":
        raise UserError(f"--matching {config.matching} --adjoint_steps {config.adjoint_steps}: only the exact gradient "
                        "can go through a part of the steps; leave --adjoint_steps out, or give DATM.py "
                        "--matching exact")
    if config.adjoint_steps and config.adjoint_steps > config.syn_steps:
        raise UserError(f"--adjoint_steps {config.adjoint_steps} --syn_steps {config.syn_steps}: the gradient "
                        f"cannot go through more steps than there are; give {config.syn_steps} or less, or leave "
                        "--adjoint_steps out")
    first = start_epoch_bound(0, config.max_start_epoch, config.current_max_start_epoch, config.expansion_end_epoch,
                              config.Sequential_Generation)
    if config.min_start_epoch >= first:
        name = "current_max_start_epoch" if first < config.max_start_epoch else "max_start_epoch"
        raise UserError(f"--min_start_epoch {config.min_start_epoch} --{name} {first}: the difficulty window holds no "
                        f"start epoch; --{name} is exclusive and must be larger")
    folders = {BUFFER_PATH: (buffer_folder(config), config.model)}
    if config.labelled_by_another:
        if not (config.Initialize_Label_Model and config.Initialize_Label_Model_Dir):
            raise UserError("--Initialize_Label_With_Another_Model needs --Initialize_Label_Model, a network, and "
                            "--Initialize_Label_Model_Dir, the folder of its replay_buffer_*.pt")
        check_network_name(config.Initialize_Label_Model)
        folders["--Initialize_Label_Model_Dir"] = (Path(config.Initialize_Label_Model_Dir),
                                                   config.Initialize_Label_Model)
    for option, (folder, network) in folders.items():
        require_experts(folder, option)
        check_fitting(folder, config, option, network)
    if config.pix_init not in STARTS:
        check_is_file(Path(config.pix_init), "--pix_init", "the path of a distilled.safetensors")
    if config.run_name and ranks.size() == 1:  # else the folder is known, or the ranks can agree, only later
        RunFolder(run_folder(config, {}), config)  # refuses a run of other options
