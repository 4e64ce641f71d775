"""Trains networks on a distilled set and tests them on real images.

    python distill/evaluation.py --data_dir RUN
    python distill/evaluation.py --data_dir …/Normal/distilled.safetensors
    python distill/evaluation.py --dataset MiniFashion --model ConvNetW32 --zca
        --data_dir …/Normal/images_best.pt --label_dir …/Normal/labels_best.pt --lr_dir …/Normal/lr_best.pt

RUN is a run's folder, of whose best sets (Normal/, EMA/) the better one is taken. --dataset, --subset, --model, --res,
--zca, --data_path and --buffer_path are those that the set was made with, as it says itself or the config.yaml of its
run does; what is given counts, and a note says where that is another dataset, size or whitening. All other options are
this program's own: --epoch_eval_train and --batch_train are not the run's, and it is tested on the test images unless
--val_fraction is given.

--data_dir also takes what other projects released (DC, DSA, DM, MTT, FTD, TESLA, DATM, PAD, NCFM), as a file or the
folder that holds it. --protocol datm|mtt|dc is whose epochs, batch, learning rate and augmentation count where they are
not given; of several, such as dc,datm, the set has a score each. --lr_teacher auto takes for each kind of network the
best of 0.001, 0.005, 0.01, 0.05, 0.1 and the set's own rate on a tenth of the training images; a number counts in the
place of the set's own rate too.

    python distill/evaluation.py --data_dir res_DSA_CIFAR10_ConvNet_10ipc.pt --protocol dc,datm
    python distill/evaluation.py --data_dir FOLDER --dataset CIFAR10 --eval_mode M --lr_teacher auto

--robust_score prints DD-Ranking's label-robust score (LRS) and augmentation-robust score (ARS) of the set, with what
they are made of (HLR, IOR), by network. It evaluates the set with its labels and with hard labels, as many random real
images per class with labels by the experts of --buffer_path (for a set with hard labels: with their own), the set and
the random images without augmentation, and the whole training set for --epoch_eval_real epochs at --lr_teacher (here
the set keeps its own rate all the same); --num_eval networks of each. The learning rate for hard labels and for random
images is the best of 0.001, 0.005, 0.01, 0.05 and 0.1 by the mean of the --num_eval networks on a tenth of the training
images, without the random ones (DD-Ranking chooses it on the test images; distill/evaluate/robust.py says what else
differs).
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.evaluate.option_checks import check_set
from utils.config import EvaluationConfig, make
from utils.program.command_line import parse, typed
from utils.program.entry import entry


def main() -> None:
    config = parse(EvaluationConfig, __doc__, known=known)

    from distill.evaluate.protocols import under
    from distill.evaluate.robust import evaluate_robust
    from distill.evaluate.saved_set import evaluate_files

    given = typed(EvaluationConfig, __doc__)
    if config.robust_score:
        evaluate_robust(config, given)
    else:
        evaluate_files(config, given, partial(under, config, given))


def known(given: dict[str, Any]) -> dict[str, Any]:
    """The options that follow from the set and the protocol, except those that are given."""
    check_set(make(EvaluationConfig, **given))

    from distill.evaluate import protocols  # imports torch, which takes seconds

    return protocols.known(given)


if __name__ == "__main__":
    entry(main)
