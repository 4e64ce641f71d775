"""Options refused before anything is loaded, including torch."""

from buffer.manifests import buffer_folder, check_same_kind, check_same_run
from utils.config import BufferConfig
from utils.data.names import check_dataset_name, parse_strategy
from utils.errors import UserError
from utils.networks import check_network_name


def check_options(config: BufferConfig) -> None:
    """Refuses options that are invalid, or that do not fit the folder of the experts."""
    if config.rho_max != config.rho_min:
        raise UserError(f"--rho_max {config.rho_max:g} --rho_min {config.rho_min:g}: rho follows the learning rate, "
                        "which is constant here; give both the same value")
    check_dataset_name(config.dataset)  # both names become folders
    check_network_name(config.model)
    parse_strategy(config.dsa_strategy)
    if config.pad and "BN" in config.model:  # as in all names of networks with batch norm
        raise UserError(f"--pad with --model {config.model}: GraNd needs each image's own gradient, which batch norm "
                        "mixes with others'; give a network without it, such as ConvNet")
    if config.pad and not config.add_end_epoch <= config.rm_epoch_first <= config.rm_epoch_second:
        raise UserError(f"--add_end_epoch {config.add_end_epoch} --rm_epoch_first {config.rm_epoch_first} "
                        f"--rm_epoch_second {config.rm_epoch_second}: give them in rising order")
    check_same_kind(buffer_folder(config), config)
    check_same_run(buffer_folder(config), config)
