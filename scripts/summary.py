"""A table of results that `evaluation.py` and `baseline.py` wrote with --json.

    python scripts/summary.py RESULT.json [RESULT.json …]
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import UserError
from utils.run import entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    rows = [("set", "network", "images", "accuracy, %", "networks")]
    for path in parser.parse_args().results:
        try:
            result = json.loads(path.read_text())
            rows += [(result["what"], score["network"], str(result["images"]),
                      f"{100 * score['mean']:.2f} ± {100 * score['std']:.2f}", str(len(score["accuracies"])))
                     for score in result["scores"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a result: {error}; give files written by --json") from error
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


if __name__ == "__main__":
    entry(main)
