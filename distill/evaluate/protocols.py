"""The evaluation protocols of papers, as defaults for options of evaluation.py that are not given.

                    datm        mtt         dc
    epochs          1000        1000        300; 1000 with augmentation
    batch           128         256         256
    learning rate   the set's   the set's   0.01, whatever the set's
    augmentation    DSA         DSA         DC's own: on MNIST crop, scale or rotate, for ConvNetBN crop or noise, else
                                            none; DSA for the sets of DSA and DM

All train for epochs 0 … E inclusive by SGD with momentum 0.9 and weight decay 5e-4; after epoch E // 2 + 1 the rate is
a tenth and the momentum is reset. The accuracy is that after the last epoch (`train.py`). FTD and TESLA use `mtt` too.

(dc: Zhao et al., ICLR 2021, Zhao & Bilen, ICML 2021 and WACV 2023, and their code, VICO-UoE/DatasetCondensation,
main.py, main_DM.py and utils.py: lr_net, batch_train, epoch_eval_train, get_daparam, evaluate_synset. mtt: Cazenavette
et al., CVPR 2022, and its code, GeorgeCazenavette/mtt-distillation, distill.py and utils.py. datm: evaluation.py of its
code. dc tests 20 networks on each of five sets, the others test 5 networks; here `--num_eval` decides. For differences
from DC's augmentation see utils/data/augment.py.)
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.distilled_set import FOLDERS, TOLD
from distill.evaluate.released_sets import made_with
from utils.config import EvaluationConfig, from_root, make
from utils.data import augment
from utils.data.names import parse_strategy
from utils.errors import UserError
from utils.networks import evaluation_pool


def known(given: dict[str, Any]) -> dict[str, Any]:
    """The options that follow from the set and its first protocol, except those that are given.

    Args:
        given: options by name, values in any spelling.

    Raises:
        UserError: an option has an invalid value, given or stated by the set.
    """
    told = told_by_set(given)
    config = make(EvaluationConfig, **told | given)
    network = evaluation_pool(config.eval_mode, config.model)[0]
    return told | _settings(config, given, config.protocol.split(",")[0], network)


def told_by_set(given: dict[str, Any]) -> dict[str, Any]:
    """The options for reading the set of `--data_dir` that it states itself, except those that are given: what it was
    made of, its network, and the folders of the real data and of the experts, where these can be expected to exist.

    Raises:
        UserError: the set states an invalid value.
    """
    made = made_with(given.get("data_dir", ""))
    told = {name: from_root(made[name]) if name in FOLDERS else made[name]
            for name in (*TOLD, "label_kind") if name in made and name not in given}
    told = {name: value for name, value in told.items() if name not in FOLDERS or Path(str(value)).is_dir()
            or (name == "data_path" and made.get("dataset") == "ImageFolder")}  # the user's own, so nowhere else
    try:
        make(EvaluationConfig, **told)
    except UserError as error:
        raise UserError(f"--data_dir {given['data_dir']} says of itself: {error}; give what it is") from error
    return told


def under(config: EvaluationConfig, given: Collection[str], protocol: str, network: str) -> EvaluationConfig:
    """The config under one of its protocols, for one kind of network.

    Args:
        given: the names of the options that are given.
    """
    return replace(config, protocol=protocol, **_settings(config, given, protocol, network))


def _settings(config: EvaluationConfig, given: Collection[str], protocol: str, network: str) -> dict[str, Any]:
    """A protocol's values of the options that are not given."""
    settings = {"epoch_eval_train": 1000, "batch_train": 128 if protocol == "datm" else 256, "dsa": True}
    if protocol == "dc":
        method = made_with(config.data_dir).get("method")
        settings["dsa"] = config.dsa if "dsa" in given else method in ("DSA", "DM")
        drawn = (parse_strategy(config.dsa_strategy) if settings["dsa"]
                 else augment.older_operations(config.dataset, network))
        settings["epoch_eval_train"] = 1000 if drawn and not config.no_aug else 300
    return {name: value for name, value in settings.items() if name not in given}
