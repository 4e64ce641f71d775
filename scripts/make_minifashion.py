"""Rebuilds utils/data/minifashion/minifashion.bz2, bit for bit, from the four original files of Fashion-MNIST.

    python scripts/make_minifashion.py [--source DIR] [--out FILE]

The file holds the first 600 training and the first 100 test images of each class. bzip2 keeps no time stamp and its
one implementation has not changed for decades, so that the bytes are the same everywhere.
"""

import bz2
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts.common import script_parser
from utils.data.disk_layouts import (
    FASHION_CLASSES,
    MINIFASHION,
    MINIFASHION_PER_CLASS,
    MINIFASHION_SHA256,
    Split,
    fashion_mnist_folders,
    read_idx_folder,
)
from utils.errors import UserError
from utils.files import REPOSITORY, atomic_write
from utils.program.entry import entry


def pack(train: Split, test: Split) -> bytes:
    """Whole Fashion-MNIST → the content of MiniFashion, before compression.

    Training images, training labels, test images, test labels: each as plain bytes, sorted by class and within a
    class in the order of the original file.
    """
    content = b""
    for (images, labels), per_class in zip((train, test), MINIFASHION_PER_CLASS):
        chosen = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(len(FASHION_CLASSES))])
        content += images[chosen].numpy().tobytes() + labels[chosen].to(torch.uint8).numpy().tobytes()
    return content


def main() -> None:
    folders = fashion_mnist_folders(REPOSITORY / "dataset")
    parser = script_parser(__doc__)
    parser.add_argument("--source", type=Path, help="folder of the four idx files, gzipped or not (default: the first "
                        f"of {', '.join(map(str, folders))} that is there)")
    parser.add_output("out", "bz2", f"file to write (default: {MINIFASHION})")
    args = parser.parse_args()

    source = args.source or next((folder for folder in folders if folder.is_dir()), folders[-1])
    content = pack(*read_idx_folder(source))
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
