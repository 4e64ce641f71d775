"""Rebuilds utils/data/minifashion/minifashion.bz2, bit for bit, from the four original files of Fashion-MNIST.

    python scripts/make_minifashion.py [--source DIR] [--out FILE]

The file holds the first 600 training and the first 100 test images of each class. bzip2 stores no time stamp and its
only implementation has not changed for decades, so the bytes are the same everywhere.
"""

import bz2
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from scripts.common import ScriptParser
from utils.errors import UserError
from utils.files import REPOSITORY, atomic_write
from utils.program.entry import entry


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--source", type=Path, help="folder of the four idx files, gzipped or not (default: where "
                        "FashionMNIST is in dataset/, else where Debian's package has it)")
    parser.add_output("out", "bz2", "file to write (default: the repository's)")
    args = parser.parse_args()

    from utils.data.disk_layouts import (  # imports torch, which takes seconds
        MINIFASHION,
        MINIFASHION_SHA256,
        fashion_mnist_folders,
        pack_minifashion,
        read_idx_folder,
    )

    folders = fashion_mnist_folders(REPOSITORY / "dataset")
    source = args.source or next((folder for folder in folders if folder.is_dir()), folders[-1])
    content = pack_minifashion(*read_idx_folder(source))
    digest = hashlib.sha256(content).hexdigest()
    if digest != MINIFASHION_SHA256:
        raise UserError(f"the files in {source} are not the original Fashion-MNIST (SHA-256 of the selection is "
                        f"{digest}, expected {MINIFASHION_SHA256}); fetch the four files again")
    out = args.out or MINIFASHION
    with atomic_write(out) as aside:
        aside.write_bytes(bz2.compress(content, 9))
    print(f"wrote {out}")


if __name__ == "__main__":
    entry(main)
