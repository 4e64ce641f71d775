"""Trains expert networks on real data with GSAM and saves the trajectories of their parameters.

    python buffer/buffer_FTD.py --dataset=CIFAR10 --model=ConvNet --train_epochs=100 --num_experts=100 --zca
        --buffer_path=buffer_storage --data_path=dataset --rho_max=0.01 --rho_min=0.01 --alpha=0.3
        --lr_teacher=0.01 --mom=0. --batch_train=256
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from buffer.option_checks import check_options
from utils.config import BufferConfig
from utils.program.command_line import parse
from utils.program.entry import entry


def main() -> None:
    config = parse(BufferConfig, __doc__)
    check_options(config)

    from buffer.expert_run import train_buffer  # imports torch, which takes seconds

    train_buffer(config)


if __name__ == "__main__":
    entry(main)
