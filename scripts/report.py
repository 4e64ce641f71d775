"""Makes the page of finished runs again, and of several one page that compares them.

    python scripts/report.py RUN [RUN …] [--out FILE]

RUN is a run's folder, whose report.html is made again from what lies in it; of one RUN, --out says where else to put
the page. Several are compared in --out (default: comparison.html in the current folder).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.distilled_set import DistilledSet
from utils import record, report
from utils.errors import UserError
from utils.figures import clip_outliers
from utils.files import write_text
from utils.program.console import shown
from utils.program.entry import entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to put the page")
    given = parser.parse_args()
    runs = [with_pictures(record.read_run(path)) for path in given.runs]
    out = given.out or (runs[0].path / report.PAGE if len(runs) == 1 else Path("comparison.html"))
    pages = {out: report.page(runs[0])} if len(runs) == 1 else {
        **{run.path / report.PAGE: report.page(run) for run in runs}, out: report.comparison(runs)}
    for path, page in pages.items():
        write_text(path, page)
        print(f"{shown(path)} ({len(page.encode()) / 1e6:.1f} MB)")


def with_pictures(run: record.Run) -> record.Run:
    """The run of an older version with what its distilled set shows: its images and labels."""
    path = run.path / "Normal" / "distilled.safetensors"
    if run.pictures is not None or not path.is_file():
        return run
    distilled = DistilledSet.load(path)
    images, labels, classes = distilled.pixels(), distilled.labels, distilled.classes
    if not classes or not len(images) or len(images) % len(classes) or len(labels) != len(images):
        raise UserError(f"{path} does not hold a whole number of images a class; put back the run's own")
    ipc = len(images) // len(classes)
    which = record.chosen(len(classes), ipc, images[0].numel())
    return replace(run, pictures=record.Pictures(
        classes, ipc, "Normal", which, record.scaled_bytes(clip_outliers(images)[which]),
        record.probabilities(labels[which], len(classes))))


if __name__ == "__main__":
    entry(main)
