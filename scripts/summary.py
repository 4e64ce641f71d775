"""Prints a table of results that `evaluation.py` and `baseline.py` wrote with --json.

    python scripts/summary.py RESULT.json [RESULT.json …] [--by_network]
    python scripts/summary.py RUN

Given a folder, such as a run's, it takes all results in it. A result has a row for each of its protocols. Epochs and
batch are shown where those of equally many images differ, the learning rate where it tells rows apart or was chosen on
a tenth of the training images (auto), and the file where nothing else tells rows apart. If the results are of different
datasets, or some of test and some of held-out images, each row says which. With --by_network there is one row for each
result and protocol, and a column for each network: how well the set trains other networks (--eval_mode M).
"""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.result_files import EvaluationResult, Trained, images_tested, results_in
from scripts.common import ScriptParser
from utils.errors import UserError
from utils.program.console import shown, table
from utils.program.entry import entry


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--by_network", action="store_true", help="a row for each result, a column for each network")
    options = parser.parse_args()
    advice, files = "give files that evaluation.py or baseline.py wrote with --json", {}
    for path in options.results:
        found = results_in(path) if path.is_dir() else {"": EvaluationResult.read(path, advice)}
        if not found:
            raise UserError(f"{path} has no result of evaluation.py or baseline.py; give them --json "
                            f"{shlex.quote(str(path / 'NAME.json'))}")
        files |= {path / name: result for name, result in found.items()}
    results = list(files.values())
    # A row for each protocol, or for each of its networks if these are not columns.
    images = [(str(each.config.get("dataset", "")), f"{images_tested(each.tested_on)} images") for each in results]
    differ = [len(set(column)) > 1 for column in zip(*images)]
    tested = [" on " * any(differ) + " ".join(word for word, tells in zip(of, differ) if tells) for of in images]
    whitened = {bool(each.config.get("zca")) for each in results}
    how = [", without augmentation" * bool(each.config.get("no_aug"))
           + ", not whitened" * (len(whitened) > 1 and not each.config.get("zca")) for each in results]
    found = [(what + unlike, on, result.size, list(zip(scores, trained)), file)
             for (file, result), unlike, on in zip(files.items(), how, tested)
             for what, scores, trained in result.by_protocol()]
    if not options.by_network:
        found = [(*what, [of_network], file) for *what, reached, file in found for of_network in reached]
    sets = named([(what, on, size, *(score.network for score, _ in reached)) for what, on, size, reached, _ in found],
                 [[trained for _, trained in reached] for *_, reached, _ in found], [file for *_, file in found])
    if options.by_network:
        networks = list(dict.fromkeys(score.network for *_, reached, _ in found for score, _ in reached))
        rows = [("set", "images", *networks)]
        for name, (*_, size, reached, _) in zip(sets, found):
            percents = {score.network: score.percent for score, _ in reached}
            rows.append((name, size, *(percents.get(network, "-") for network in networks)))
    else:
        rows = [("set", "network", "images", "accuracy, %", "networks")]
        rows += [(name, score.network, size, score.percent, str(len(score.accuracies)))
                 for name, (*_, size, ((score, _),), _) in zip(sets, found)]
    print(table(rows))


def named(rows: Sequence[tuple[str, ...]], trained: Sequence[Sequence[Trained]], files: Sequence[Path]) -> list[str]:
    """The name of each row's set: with its learning rate if that tells rows apart or was chosen (auto), with its epochs
    and its batch if other sets of that size have others, and with its file if nothing else tells rows apart.

    Args:
        rows: of each row the set in words, what it was tested on in words, its size, and its networks.
        trained: of each row, for each of its networks.
        files: of each row.
    """
    names = [what + on for what, on, *_ in rows]
    for kind, in_words in (("rate", "learning rate {}".format),
                           ("epochs", lambda epochs: f"{epochs} epoch{'s' * (epochs != '1')}"),
                           ("batch", "batches of {}".format)):
        values = [", ".join(dict.fromkeys(getattr(each, kind) for each in of_row)) for of_row in trained]
        same = [(row[0], *row[2:]) if kind == "rate" else row[2:] for row in rows]
        compared = [{of_other for other, of_other in zip(same, values) if other == each and of_other != "-"}
                    for each in same]
        names = [f"{name}, {in_words(value)}" if value.endswith("(auto)") or len(others) > 1 else name
                 for name, others, value in zip(names, compared, values)]
    alike = Counter((name, *row) for name, row in zip(names, rows))
    return [f"{name}, {shown(file)}" if alike[name, *row] > 1 else name for name, row, file in zip(names, rows, files)]


if __name__ == "__main__":
    entry(main)
