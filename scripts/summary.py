"""A table of results that `evaluation.py` and `baseline.py` wrote with --json.

    python scripts/summary.py RESULT.json [RESULT.json …] [--by_network]

With --by_network each result is a row and each network a column: how a set serves other networks (--eval_mode M).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import UserError
from utils.metrics import percent
from utils.program.command_line import Parser
from utils.program.entry import entry


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--by_network", action="store_true", help="a row for each result, a column for each network")
    options = parser.parse_args()
    rows, scores = [("set", "network", "images", "accuracy, %", "networks")], []
    for path in options.results:
        try:
            result = json.loads(path.read_text())
            here = {score["network"]: percent(score["mean"], score["std"]) for score in result["scores"]}
            rows += [(result["what"], score["network"], str(result["images"]), here[score["network"]],
                      str(len(score["accuracies"]))) for score in result["scores"]]
            scores.append((result["what"], str(result["images"]), here))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give files written by --json") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not the result of an evaluation; give files that evaluation.py or baseline.py "
                            "wrote with --json") from error
    if options.by_network:
        networks = list(dict.fromkeys(name for _, _, here in scores for name in here))
        rows = [("set", "images", *networks)]
        rows += [(what, images, *(here.get(name, "-") for name in networks)) for what, images, here in scores]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


if __name__ == "__main__":
    entry(main)
