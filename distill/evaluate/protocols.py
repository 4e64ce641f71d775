"""How papers evaluate a set, as options of evaluation.py where they are not given.

                    datm        mtt         dc
    epochs          1000        1000        300; 1000 with augmentation
    batch           128         256         256
    learning rate   the set's   the set's   0.01, whatever the set's
    augmentation    DSA         DSA         DC's own: on MNIST crop, scale or rotate, for ConvNetBN crop or noise, else
                                            none; DSA for the sets of DSA and DM

In all of them epochs 0 … E inclusive of SGD with momentum 0.9 and weight decay 5e-4, whose rate is a tenth after epoch
E // 2 + 1, with fresh momentum; the accuracy after the last epoch (`train.py`). `mtt` is that of FTD and TESLA too.

(dc: Zhao et al., ICLR 2021, Zhao & Bilen, ICML 2021 and WACV 2023, and their code, VICO-UoE/DatasetCondensation,
main.py, main_DM.py and utils.py: lr_net, batch_train, epoch_eval_train, get_daparam, evaluate_synset. mtt: Cazenavette
et al., CVPR 2022, and its code, GeorgeCazenavette/mtt-distillation, distill.py and utils.py. datm: evaluation.py of its
code. They test 20 networks of each of five sets, and 5 networks; here `--num_eval` says how many. What differs of DC's
augmentation is said in utils/data/augment.py.)
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from distill.evaluate.released_sets import made_with
from distill.evaluate.saved_set import told_by_set
from utils.config import EvaluationConfig, make
from utils.data import augment
from utils.data.names import parse_strategy
from utils.networks import evaluation_pool


def known(given: dict[str, Any]) -> dict[str, Any]:
    """The options that are known by the set and by the first protocol, but for those that are given.

    Args:
        given: options by name, of any spelling.

    Raises:
        UserError: one cannot be what is given, or what the set says of itself.
    """
    told = told_by_set(given)
    config = make(EvaluationConfig, **told | given)
    network = evaluation_pool(config.eval_mode, config.model)[0]
    return told | _settings(config, given, config.protocol.split(",")[0], network)


def under(config: EvaluationConfig, given: Collection[str], protocol: str, network: str) -> EvaluationConfig:
    """A config under one of its protocols, for one kind of network.

    Args:
        given: the names of the options that are given.
    """
    return replace(config, protocol=protocol, **_settings(config, given, protocol, network))


def _settings(config: EvaluationConfig, given: Collection[str], protocol: str, network: str) -> dict[str, Any]:
    """What a protocol says of the options that are not given."""
    settings = {"epoch_eval_train": 1000, "batch_train": 128 if protocol == "datm" else 256, "dsa": True}
    if protocol == "dc":
        method = made_with(config.data_dir).get("method")
        settings["dsa"] = config.dsa if "dsa" in given else method in ("DSA", "DM")
        drawn = (parse_strategy(config.dsa_strategy) if settings["dsa"]
                 else augment.older_operations(config.dataset, network))
        settings["epoch_eval_train"] = 1000 if drawn and not config.no_aug else 300
    return {name: value for name, value in settings.items() if name not in given}
