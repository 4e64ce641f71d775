"""Trains networks on a distilled set and tests them on real images.

    python distill/evaluation.py --dataset MiniFashion --model ConvNetW32 --zca
        --data_dir …/Normal/images_best.pt --label_dir …/Normal/labels_best.pt --lr_dir …/Normal/lr_best.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.evaluate import evaluate_files
from utils.config import EvaluationConfig, parse
from utils.run import entry


def main() -> None:
    evaluate_files(parse(EvaluationConfig, __doc__))


if __name__ == "__main__":
    entry(main)
