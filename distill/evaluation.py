"""Trains networks on a distilled set and tests them on real images.

    python distill/evaluation.py --dataset MiniFashion --model ConvNetW32 --zca
        --data_dir …/Normal/images_best.pt --label_dir …/Normal/labels_best.pt --lr_dir …/Normal/lr_best.pt

--robust_score prints DD-Ranking's label-robust score (LRS) and augmentation-robust score (ARS) of the set, with what
they are made of (HLR, IOR), by network. It evaluates the set with its labels and with hard labels, as many random real
images a class with labels by the experts of --buffer_path (for a set with hard labels: with their own), the set and the
random images without augmentation, and the whole training set for --epoch_eval_real epochs at --lr_teacher; --num_eval
networks of each. The learning rate for hard labels and for random images is the best of 0.001, 0.005, 0.01, 0.05 and
0.1 by the mean of the --num_eval networks on a tenth of the training images, without the random ones (DD-Ranking
chooses it on the test images; distill/evaluate/robust.py says what else differs).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.evaluate.robust import evaluate_robust
from distill.evaluate.saved_set import evaluate_files
from utils.config import EvaluationConfig
from utils.program.command_line import parse
from utils.program.entry import entry


def main() -> None:
    config = parse(EvaluationConfig, __doc__)
    evaluate_robust(config) if config.robust_score else evaluate_files(config)


if __name__ == "__main__":
    entry(main)
