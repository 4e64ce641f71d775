"""Distils a dataset by matching the training trajectories of experts (DATM, ICLR 2024).

    python distill/DATM.py --cfg configs/MiniFashion/ConvIN/IPC1.yaml [--key value …]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.option_checks import check_options
from utils.config import DistillConfig
from utils.program.command_line import parse
from utils.program.entry import entry


def main(config_type: type[DistillConfig] = DistillConfig, description: str = __doc__) -> None:
    config = parse(config_type, description, yaml_file=True)
    check_options(config)
    from distill.loop import distill  # imports torch, which takes seconds

    distill(config)


if __name__ == "__main__":
    entry(main)
