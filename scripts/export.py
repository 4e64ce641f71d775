"""Exports a distilled set for publishing: PNG files in a folder per class, and a dataset card.

    python scripts/export.py …/Normal/distilled.safetensors --png FOLDER
    python scripts/export.py …/Normal/distilled.safetensors --card [--result RESULT.json …]
    python scripts/export.py …/Normal/distilled.safetensors --whitening

--png writes FOLDER/<class>/00.png …, un-whitened and clipped to [0, 1], and FOLDER/labels.json: class names, learning
rate, and each image's class and soft label (softmax and logits). For a factor above 1, labels.json has the class and
label of each smaller image, and FOLDER/seen.png shows what a network sees, one row per stored image.

--card writes README.md beside the set: dataset, images per class, options, the source of the real images and their
licence as given here, and the accuracies in the given results with the commands that measured them.

--whitening writes whitening.safetensors beside the set (4 D² bytes, 38 MB for 3×32×32). With this file,
`DistilledSet.load(…).space.from_pixels` turns your images into network inputs on any machine; machines that made or
tested the set have it in their cache.

To turn published images_*.pt, labels_*.pt and lr_*.pt into one safetensors file, use distill/evaluation.py --save FILE.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.set_files import check_whole, whole_set
from scripts.common import ScriptParser
from utils.errors import UserError, note
from utils.files import write_text
from utils.program.console import shown
from utils.program.entry import entry


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("set", type=Path, help="a distilled.safetensors, or the folder of its run")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write PNG files and labels.json; a new folder")
    parser.add_argument("--card", action="store_true", help="write README.md beside the set")
    parser.add_argument("--whitening", action="store_true", help="write whitening.safetensors beside the set")
    parser.add_argument("--result", type=Path, nargs="+", default=[], metavar="RESULT.json",
                        help="for the card's accuracy: files of evaluation.py --json, or of baseline.py --json, or the "
                             "run's result.json")
    parser.add_argument("--license", default="", metavar="ID",
                        help="for the card: licence of the real images, such as mit")
    parser.add_argument("--source", default="", metavar="TEXT", help="for the card: where the real images are from")
    options = parser.parse_args()
    if not options.png and not options.card and not options.whitening:
        raise UserError("nothing to do; give --png FOLDER, --card, --whitening or several")
    for name in ("result", "license", "source"):
        if getattr(options, name) and not options.card:
            raise UserError(f"--{name} is for the card; give --card too")
    path = whole_set(options.set)
    check_whole(path)

    from distill.distilled_set import FOLDERS, DistilledSet  # imports torch, which takes seconds
    from distill.report.export import CARD, card_beside, check_pngs, save_pngs, whitening_of
    from utils.data.zca import BESIDE

    distilled = DistilledSet.load(path)
    beside, card = path.parent / BESIDE, path.parent / CARD
    if options.png:  # refusals come before anything is written
        check_pngs(distilled, options.png)
    whitening = whitening_of(distilled, path.parent) if options.whitening else None
    text = card_beside(path, distilled, options.result, options.license, options.source,
                       options.whitening or beside.exists()) if options.card else ""
    if whitening:
        whitening.save(beside)
        print(f"whitening: {shown(beside)}")
    if text:
        write_text(card, text)
        print(f"card: {shown(card)}")
        told = [str(distilled.config.get(name, "")) for name in FOLDERS]
        if folders := [folder for folder in told if Path(folder).is_absolute()]:
            note(f"{path.name} also holds paths of this machine, for anyone who gets the file to read: "
                 f"{', '.join(folders)}")
    if options.png:
        save_pngs(distilled, options.png)
        print(f"{distilled.size}: {shown(options.png)}")


if __name__ == "__main__":
    entry(main)
