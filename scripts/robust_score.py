"""DD-Ranking's scores of a distilled set, from results that evaluation.py and baseline.py wrote with --json.

    python distill/evaluation.py $data --data_dir=SET.safetensors                --json=syn.json
    python distill/evaluation.py $data --data_dir=SET.safetensors --hard_labels  --json=syn_hard.json
    python distill/baseline.py   $data --ipc=IPC --label_source=experts          --json=random.json
    python distill/baseline.py   $data --ipc=None --epoch_eval_train=…           --json=real.json
    python scripts/robust_score.py --syn syn.json --syn_hard syn_hard.json --random random.json --real real.json

with $data the same --dataset, --model, --zca, --epoch_eval_train and --batch_train (whose default differs between the
two programs). The first and the third once more with --no_aug, as --syn_no_aug and --random_no_aug, give the second
score. `distill/evaluation.py --robust_score` does all this in one command; this is for results that there are already,
as of the whole training set when several sets are compared. distill/robust.py has the formulas. The learning rates are
those of the results, the set's and --lr_teacher for real images: choose the latter with --val_fraction first, or the
set looks better than it is.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.robust import WEIGHT, in_words, robust_scores
from utils.config import differences
from utils.errors import UserError
from utils.files import write_json
from utils.program.command_line import Parser
from utils.program.entry import entry

# What may differ between two results that are compared "under the same evaluation": the files, and the learning rate.
_MAY_DIFFER = ("data_path", "buffer_path", "data_dir", "label_dir", "lr_dir", "lr_teacher", "ipc", "label_source")
_OF_DATA = ("dataset", "subset", "res", "zca", "val_fraction")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, what in (("syn", "distilled images with their labels"), ("syn_hard", "the same with --hard_labels"),
                       ("random", "as many random real images"), ("real", "the whole training set")):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="JSON", help=what)
    for name in ("syn", "random"):
        parser.add_argument(f"--{name}_no_aug", type=Path, metavar="JSON", help=f"as --{name}, with --no_aug")
    parser.add_argument("--weight", type=float, default=WEIGHT, metavar="W", help=f"w and γ [{WEIGHT}]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores")
    options = vars(parser.parse_args())
    weight, target = options.pop("weight"), options.pop("json")
    if not 0 <= weight <= 1:
        raise UserError(f"--weight {weight:g}: it must be between 0 and 1")
    if (options["syn_no_aug"] is None) != (options["random_no_aug"] is None):
        raise UserError("--syn_no_aug and --random_no_aug belong together; give both or none")
    results = {name: read(f"--{name}", path) for name, path in options.items() if path is not None}
    check(results)
    scores = {}
    for network in set.intersection(*(set(result["by_network"]) for result in results.values())):
        at = {name: result["by_network"][network] for name, result in results.items()}
        scores[network] = robust_scores(at, weight)
    if not scores:
        raise UserError("no network is in all of the results; evaluate all with the same --model and --eval_mode")
    scores = {name: scores[name] for name in results["syn"]["by_network"] if name in scores}
    for network, score in scores.items():
        print(in_words(network, score))
    if target:
        write_json(target, {"weight": weight, "scores": scores,
                            "results": {name: str(path) for name, path in options.items() if path is not None}})


def read(option: str, path: Path) -> dict[str, Any]:
    """A result, with its mean accuracies by network.

    Raises:
        UserError
    """
    try:
        result = json.loads(path.read_text())
        found = {name: result[name] for name in ("what", "images", "config", "tested_on")}
        if not isinstance(found["config"], dict):
            raise TypeError("its config is none")
        return found | {"by_network": {score["network"]: float(score["mean"]) for score in result["scores"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{option} {path} is not a result ({type(error).__name__}: {error}); give a file written by "
                        "--json") from error


def check(results: dict[str, dict[str, Any]]) -> None:
    """Refuses results that are not what they are given as, or that cannot be compared.

    Raises:
        UserError
    """
    what = {"syn": "distilled images", "syn_no_aug": "distilled images", "real": "the whole training set",
            "syn_hard": "distilled images with hard labels"}
    count, options = results["syn"]["images"], results["syn"]["config"]
    for name, result in results.items():
        said = str(result["what"])
        if said != what[name] if name in what else "random real" not in said:
            raise UserError(f"--{name} is a result of {said!r}; --help says which it should be")
        if name != "real" and result["images"] != count:
            raise UserError(f"--{name} is of {result['images']} images, --syn of {count}; compare as many")
        if result["tested_on"] != results["syn"]["tested_on"]:
            raise UserError(f"--{name} was tested on the {result['tested_on']} images, --syn on the "
                            f"{results['syn']['tested_on']} images; give the same --val_fraction to all")
        if bool(result["config"].get("no_aug")) != name.endswith("no_aug"):
            raise UserError(f"--{name}: its no_aug is {result['config'].get('no_aug')}; only --syn_no_aug and "
                            "--random_no_aug are without augmentation")
        same = _OF_DATA if name == "real" else tuple(set(options) - {*_MAY_DIFFER, "no_aug", "hard_labels"})
        different = differences(options, {key: result["config"][key] for key in same if key in result["config"]})
        if different:
            raise UserError(f"--{name} was evaluated in another way than --syn: {different}; compare like with like")


if __name__ == "__main__":
    entry(main)
