"""Rebuilds the report page of a run, or makes a page that compares several runs.

    python scripts/report.py RUN [RUN …] [--out FILE]

RUN is a run's folder. Of a single one, report.html is rebuilt from the files in the folder, and so are missing
pictures, from its report.safetensors. For an unfinished run, whether still running or stopped, page and pictures are
always rebuilt: they show the run as of its last log entry, and the images that it last drew. The page shows the tests
of the set that are in the folder, and beside it as many real images (random or a coreset) if `baseline.py --json
RUN/NAME.json` put their results there, trained alike.

With one RUN, --out writes the page to another file. With several, --out is the comparison page (default:
comparison.html in the current folder).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.report.names import PAGE, SHOWN, missing
from distill.report.read_run import check_is_run, read_run
from distill.result_files import METRICS
from scripts.common import ScriptParser
from utils.errors import UserError, note
from utils.files import check_outputs, write_text
from utils.program.console import short_count, shown
from utils.program.entry import entry


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_output("out", "html", "where to put the page")
    options = parser.parse_args()
    for path in options.runs:
        check_is_run(path)

    from distill.report.comparison import comparison  # imports torch, which takes seconds
    from distill.report.page import page
    from distill.report.show import show

    runs = [read_run(path) for path in options.runs]
    run, alone = runs[0], len(runs) == 1
    out = options.out or (run.path / PAGE if alone else Path("comparison.html"))
    check_outputs({"the page": out}, {"the page": "html"})
    if not alone and out.name == PAGE and (out.parent / METRICS).exists():
        raise UserError(f"--out {shown(out)} is the page of one run; give another file for several")
    text = page(run) if alone else comparison(runs)
    if alone:
        show(run, [name for name in (missing(run.path) if run.finished else SHOWN) if name != PAGE])
    write_text(out, text)
    for left_out in run.left_out if alone else ():
        note(f"not shown beside the run: {left_out}")
    print(f"{shown(out)} ({short_count(out.stat().st_size)}B)")


if __name__ == "__main__":
    entry(main)
