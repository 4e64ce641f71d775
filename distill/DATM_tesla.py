"""DATM with the TESLA gradient: `DATM.py` with `matching: tesla`.

    python distill/DATM_tesla.py --cfg configs/CIFAR-10/ConvIN/IPC1000.yaml [--key value …]
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.DATM import main
from utils.config import TeslaConfig
from utils.program.entry import entry

if __name__ == "__main__":
    entry(partial(main, TeslaConfig, __doc__))
