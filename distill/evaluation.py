"""Trains networks on a distilled set and tests them on real images.

    python distill/evaluation.py --data_dir RUN
    python distill/evaluation.py --data_dir …/Normal/distilled.safetensors
    python distill/evaluation.py --dataset MiniFashion --model ConvNetW32 --zca
        --data_dir …/Normal/images_best.pt --label_dir …/Normal/labels_best.pt --lr_dir …/Normal/lr_best.pt

RUN is a run's folder; the better of its best sets (Normal/, EMA/) is taken. --dataset, --subset, --model, --res, --zca,
--factor, --data_path and --buffer_path default to what the set was made with, as recorded in the set or in its run's
config.yaml. The command line overrides them; a note says if dataset, size or whitening then differ from the set's. All
other options are this program's own: --epoch_eval_train and --batch_train are not taken from the run, and the set is
tested on the test images unless --val_fraction is given.

--data_dir also takes what other projects released (DC, DSA, DM, MTT, FTD, TESLA, DATM, PAD, IDC, NCFM), as a file or
the folder that holds it. --protocol datm|mtt|dc sets epochs, batch, learning rate and augmentation where these are not
given; with several, such as dc,datm, the set gets a score for each. --lr_teacher auto tries 0.001, 0.005, 0.01, 0.05,
0.1 and the set's own rate for each kind of network and takes the best on a tenth of the training images; a number
replaces the set's own rate.

    python distill/evaluation.py --data_dir res_DSA_CIFAR10_ConvNet_10ipc.pt --protocol dc,datm
    python distill/evaluation.py --data_dir FOLDER --dataset CIFAR10 --eval_mode M --lr_teacher auto

--robust_score prints DD-Ranking's label-robust score (LRS) and augmentation-robust score (ARS) of the set for each
network, with their components (HLR, IOR). It evaluates, with --num_eval networks each:

* the set with its own labels and with hard labels;
* as many random real images per class, with labels by the experts of --buffer_path (for a set with hard labels: with
  their own hard labels);
* the set and the random images without augmentation;
* the whole training set, for --epoch_eval_real epochs at --lr_teacher (which here does not replace the set's own rate).

For hard labels and for random images, the learning rate is the best of 0.001, 0.005, 0.01, 0.05 and 0.1 by the mean of
the --num_eval networks on a tenth of the training images that excludes the random ones. DD-Ranking chooses it on the
test images; distill/evaluate/robust.py lists the other differences.
"""

import sys
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

    from distill.evaluate.robust import evaluate_robust
    from distill.evaluate.saved_set import evaluate_files

    evaluate = evaluate_robust if config.robust_score else evaluate_files
    evaluate(config, given=typed(EvaluationConfig, __doc__))


def known(given: dict[str, Any]) -> dict[str, Any]:
    """The options that follow from the set and the protocol, except those that are given."""
    check_set(make(EvaluationConfig, **given))

    from distill.evaluate import protocols  # imports torch, which takes seconds

    return protocols.known(given)


if __name__ == "__main__":
    entry(main)
