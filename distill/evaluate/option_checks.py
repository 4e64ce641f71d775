"""Checks before anything is loaded, including torch."""

from dataclasses import replace
from pathlib import Path

from buffer.manifests import buffer_folder, check_fitting, held_out_fraction, require_experts
from distill.set_files import check_whole
from utils.config import AUTO, BaselineConfig, EvaluationConfig, TrainConfig
from utils.data.names import check_dataset_name, parse_strategy
from utils.errors import UserError
from utils.files import check_is_file
from utils.networks import check_network_name, evaluation_pool

IMAGES = "a run's folder, its Normal/distilled.safetensors, or images_best.pt"  # what `--data_dir` can be, for messages


def check_evaluation(config: TrainConfig) -> None:
    """Refuses what cannot be evaluated on any data; needs no data, so it comes first.

    Raises:
        UserError: an unknown dataset, network, mode or augmentation.
    """
    check_dataset_name(config.dataset)
    check_network_name(config.model)
    parse_strategy(config.dsa_strategy)
    evaluation_pool(config.eval_mode, config.model)


def check_set(config: EvaluationConfig) -> None:
    """Refuses invalid options of an evaluation, and a set that does not exist."""
    # The robust score compares with and without these.
    for name in ("hard_labels", "no_aug"):
        if config.robust_score and getattr(config, name):
            raise UserError(f"--robust_score with --{name}: the scores compare with and without it; leave it out")
    if config.robust_score and (config.lr_teacher == AUTO or "," in config.protocol):
        raise UserError(f"--robust_score with --lr_teacher {config.lr_teacher} --protocol {config.protocol}: give a "
                        "number, which is for all real images, and one protocol")
    check_evaluation(config)
    check_given(config.data_dir, "--data_dir", IMAGES)
    path = Path(config.data_dir)
    if not path.exists():
        check_whole(path) if path.suffix == ".safetensors" else check_is_file(path, "--data_dir file", IMAGES)


def check_given(path: str, option: str, usual: str) -> None:
    """Refuses a missing option for a file of a set."""
    if not path:
        raise UserError(f"{option} is missing; give {usual}")


def check_baseline(config: BaselineConfig) -> None:
    """Refuses invalid options of a baseline, and experts that do not fit them."""
    check_evaluation(config)
    check_experts(as_experts_saw(config))


def as_experts_saw(config: BaselineConfig) -> BaselineConfig:
    """The config with the experts' hold-out, if experts choose or label the images and no hold-out is given. Images
    then come from those that the experts saw, in the same space: no method may have seen more than the others."""
    if config.ipc is None or config.val_fraction or not asks_experts(config):
        return config
    return replace(config, val_fraction=held_out_fraction(buffer_folder(config)))


def labelled_by_experts(config: BaselineConfig) -> bool:
    return config.label_source == "experts" or (config.label_source == "auto" and config.pick != "random")


def asks_experts(config: BaselineConfig) -> bool:
    """Whether experts choose or label the images."""
    return config.pick != "random" or labelled_by_experts(config)


def check_experts(config: BaselineConfig) -> None:
    """Refuses a factor for the whole training set, and experts that cannot choose or label the images as asked."""
    if config.ipc is None and config.factor > 1:
        raise UserError(f"--factor {config.factor} --ipc None: the whole training set is used as it is; give --ipc a "
                        "number")
    if asks_experts(config):
        asked = "--label_source experts" if config.pick == "random" else f"--pick {config.pick}"
        if config.ipc is None:
            raise UserError(f"{asked} --ipc None: experts choose and label a number of images per class, and not the "
                            "whole training set; give --ipc a number")
        require_experts(buffer_folder(config))
        check_fitting(buffer_folder(config), config)
