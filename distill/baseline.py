"""Tests networks trained on real images: ipc per class (random or a coreset), or the whole training set.

    python distill/baseline.py --dataset MiniFashion --model ConvNetW32 --zca --ipc 1
    python distill/baseline.py --dataset MiniFashion --model ConvNetW32 --zca --ipc 1 --pick herding
    python distill/baseline.py --dataset MiniFashion --model ConvNetW32 --zca --ipc None --epoch_eval_train 20

The training is that of evaluation.py, so the accuracies compare with a distilled set's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.evaluate.option_checks import check_baseline
from utils.config import BaselineConfig
from utils.program.command_line import parse
from utils.program.entry import entry


def main() -> None:
    config = parse(BaselineConfig, __doc__)
    check_baseline(config)

    from distill.evaluate.real_images import evaluate_real  # imports torch, which takes seconds

    evaluate_real(config)


if __name__ == "__main__":
    entry(main)
