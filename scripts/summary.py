"""A table of results that `evaluation.py` and `baseline.py` wrote with --json.

    python scripts/summary.py RESULT.json [RESULT.json …] [--by_network]
    python scripts/summary.py RUN

Of a folder, such as a run's, it takes all results that lie in it. With --by_network each result is a row and each
network a column: how a set serves other networks (--eval_mode M).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.result_files import EvaluationResult, results_in
from scripts.common import script_parser
from utils.errors import UserError
from utils.program.console import table
from utils.program.entry import entry


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--by_network", action="store_true", help="a row for each result, a column for each network")
    options = parser.parse_args()
    advice, results = "give files that evaluation.py or baseline.py wrote with --json", []
    for path in options.results:
        found = results_in(path) if path.is_dir() else [EvaluationResult.read(path, advice)]
        if not found:
            raise UserError(f"{path} is a folder without a result; {advice}")
        results += found
    if options.by_network:
        networks = list(dict.fromkeys(score.network for result in results for score in result.scores))
        rows = [("set", "images", *networks)]
        for result in results:
            reached = {score.network: score.percent for score in result.scores}
            rows.append((result.what, result.size, *(reached.get(name, "-") for name in networks)))
    else:
        rows = [("set", "network", "images", "accuracy, %", "networks")]
        rows += [(result.what, score.network, result.size, score.percent, str(len(score.accuracies)))
                 for result in results for score in result.scores]
    print(table(rows))


if __name__ == "__main__":
    entry(main)
