"""Expert files and their manifests: names, numbers, options and checksums, all read without torch.

Beside `replay_buffer_{n}.pt` lies a manifest `.yaml` with the options of the run that trained the experts, and their
accuracies; published files have none.
"""

import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import files
from utils.config import BaselineConfig, BufferConfig, DataConfig, DistillConfig, differences, identity, influential
from utils.data.watching import Watch, unwatched
from utils.errors import UserError, number_of
from utils.files import read_text, read_yaml, reading
from utils.networks import same_network
from utils.program import ranks

if TYPE_CHECKING:
    from utils.data.datasets import Dataset

_NAME = re.compile(r"replay_buffer_(\d+)\.pt")


def buffer_folder(config: BufferConfig | DistillConfig | BaselineConfig) -> Path:
    """The published folder of a network's experts on a dataset, below `buffer_path`."""
    dataset = Path(config.buffer_path) / config.dataset
    if config.dataset == "ImageNet":
        dataset = dataset / config.subset / str(config.res or 128)
    elif config.dataset in ("CIFAR10", "CIFAR100") and not config.zca:
        dataset = dataset.with_name(f"{dataset.name}_NO_ZCA")
    return dataset / config.model


def expert_files(folder: Path) -> list[Path]:
    """The expert files of a folder, ordered by number."""
    numbers = {path: int(match[1]) for path in folder.glob("*.pt") if (match := _NAME.fullmatch(path.name))}
    return sorted(numbers, key=numbers.__getitem__)


BUFFER_PATH = "--buffer_path"  # the option that usually gives a folder of experts
# Options in which experts of one folder may differ: their number, seed and epochs, and the paths of the folder and the
# data, as both may have been moved.
_HOW_MANY = ("num_experts", "save_interval")
_PATHS = ("buffer_path", "data_path")
_MAY_DIFFER = (*_HOW_MANY, *_PATHS, "seed", "train_epochs")
ACCURACIES = "train_accuracy", "test_accuracy"  # of an expert in a manifest, and in each line of a .jsonl
# Entries of a manifest other than the run's options.
_FACTS = ("fingerprint", "threads", "on", "experts", "sha256")
# The options that determine which images an expert was trained on.
_DATA = ("dataset", "zca", "val_fraction")


def manifest_path(path: Path) -> Path:
    """An expert file's manifest: options, the dataset's fingerprint, the experts' accuracies and the checksum."""
    return path.with_suffix(".yaml")


def manifests_of(folder: Path) -> dict[Path, dict[str, Any]]:
    """The manifests of a folder's expert files, by their paths; published files have none."""
    paths = map(manifest_path, expert_files(folder))
    return {path: read_manifest(path) for path in paths if path.exists()}


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest; its checksum, which is written last, shows that it is complete.

    Raises:
        UserError: it is damaged.
    """
    with reading(path, "copy it again, or move it away: the experts beside it then count as published ones"):
        manifest = read_yaml(path)
        complete = re.fullmatch("[0-9a-f]{64}", str(manifest.get("sha256")))
        if not complete or not isinstance(manifest.get("experts"), list):
            raise ValueError("it ends too early")
        return manifest


def made_by(folder: Path) -> list[dict[str, Any]]:
    """The options of the commands that would train a folder's experts again, oldest first, as far as manifests tell.

    Consecutive files that differ only in how many experts they hold count as one command for all of them. Paths are
    those of the last file, as the folder may have been moved; but experts whose numbers begin anew were trained in
    folders of their own (`scripts/datm.slurm gather`), and keep these.
    """
    kinds: list[dict[str, Any]] = []
    manifests = list(manifests_of(folder).values())
    numbers = [expert["number"] for manifest in manifests for expert in manifest["experts"] if "number" in expert]
    gathered = len(set(numbers)) < len(numbers)
    moved = ("data_path",) if gathered else _PATHS
    paths = {name: manifests[-1][name] for name in moved if manifests and name in manifests[-1]}
    for manifest in manifests:
        kind = {name: value for name, value in manifest.items() if name not in _FACTS} | paths
        count = len(manifest["experts"])
        if kinds and kinds[-1] == kind | {name: kinds[-1][name] for name in _HOW_MANY if name in kinds[-1]}:
            kinds[-1]["num_experts"] += count
        else:
            kinds.append(kind | {"num_experts": count})
    return kinds


def accuracies_by_epoch(path: Path) -> list[dict[str, list[float]]]:
    """The accuracies of each expert of a file by epoch, from the `.jsonl` beside it; empty if there is none."""
    found: dict[int, dict[str, list[float]]] = {}
    log = path.with_suffix(".jsonl")
    if log.is_file():
        with reading(log, "copy it again, or move it away, and its accuracies are unknown"):
            for epoch in map(json.loads, read_text(log).splitlines()):
                of_expert = found.setdefault(epoch["expert"], {name: [] for name in ACCURACIES})
                for name in ACCURACIES:
                    of_expert[name].append(float(epoch[name]))
    return list(found.values())


def accuracies_reached(folder: Path) -> list[float]:
    """Test accuracies of the experts of a folder after their last epoch, as far as manifests tell."""
    return [float(expert["test_accuracy"]) for manifest in manifests_of(folder).values()
            for expert in manifest["experts"]]


def held_out_fraction(folder: Path) -> float:
    """The fraction of the training images held out from the experts of a folder, as far as manifests tell."""
    return next((float(manifest["val_fraction"]) for manifest in manifests_of(folder).values()
                 if "val_fraction" in manifest), 0.0)


def check_fitting(folder: Path, config: DataConfig, option: str = BUFFER_PATH, network: str | None = None) -> None:
    """Refuses experts whose manifests tell that they are of another network or were trained on other data; published
    ones have no manifest.

    Args:
        option: the option that gave the folder, for the message.
        network: the name of the network that they must be of, if it is not the config's.

    Raises:
        UserError: the experts are of another network, were trained on other data, or with options that differ among
            them.
    """
    network = network or config.model
    manifests = manifests_of(folder)
    for path, saved in manifests.items():
        different = differences(saved, {name: getattr(config, name) for name in _DATA})
        if different:
            raise UserError(f"the experts of {path} were trained on other data: {different}; give the same options, or "
                            f"another {option}")
        if not same_network(saved.get("model", network), network):
            raise UserError(f"the experts of {path} are of the network {saved['model']}, not {network}; name that "
                            f"network, or give another {option}")
        _check_same_kind(path, saved, next(iter(manifests.values())), option)


def check_same_kind(folder: Path, config: BufferConfig) -> None:
    """Refuses to add experts to a folder whose experts were trained with other options."""
    for path, saved in manifests_of(folder).items():
        _check_same_kind(path, saved, influential(config))


def _check_same_kind(path: Path, saved: dict[str, Any], options: dict[str, Any], option: str = BUFFER_PATH) -> None:
    fixed = {name: value for name, value in options.items() if name not in _MAY_DIFFER + _FACTS}
    different = differences(saved, fixed)
    if different:
        raise UserError(f"{path.parent} holds experts of another kind ({path.name}): {different}; give the same "
                        f"options, or another {option}")


def run_file(folder: Path) -> Path:
    """The file with the options of a folder's unfinished run."""
    return folder / "unfinished" / "run.yaml"


def unfinished_run(folder: Path) -> dict[str, Any] | None:
    """The options of a folder's unfinished run, with `first_expert` and `threads`; None: there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = run_file(folder)
    if not path.is_file():
        return None
    with reading(path, "put it back; --resume never, or moving its folder away, discards that run"):
        run = read_yaml(path)
        if not all(isinstance(run.get(name), int) for name in ("num_experts", "first_expert", "threads")):
            raise ValueError("it ends too early")
        return run


def resumed_run(folder: Path, config: BufferConfig) -> dict[str, Any] | None:
    """As `unfinished_run`, but None if a run with this config would discard it."""
    return unfinished_run(folder) if config.resume == "auto" else None


def check_same_run(folder: Path, config: BufferConfig, more: dict[str, Any] | None = None) -> None:
    """Refuses to resume the folder's unfinished run with other options, or with other values of `more`."""
    if run := resumed_run(folder, config):
        if different := differences(run, identity(config) | (more or {})):
            raise UserError(f"{folder} holds an unfinished run of other options: {different}; give those to resume "
                            "it, --resume never to discard it, or another --buffer_path")


def check_same_images(folder: Path, dataset: "Dataset", option: str = BUFFER_PATH) -> None:
    """As `check_fitting`, but compares the images: two datasets of one name, such as ImageFolder, may differ."""
    for path, saved in manifests_of(folder).items():
        if saved.get("fingerprint", dataset.fingerprint) != dataset.fingerprint:
            raise UserError(f"the experts of {path} were trained on other images than those of {dataset.name} here; "
                            f"give the same --data_path and options, or another {option}")


def check_same_on_ranks(folder: Path, max_files: int | None = None) -> None:
    """Refuses ranks that read different experts, as machines with folders of their own may. Published ones, without
    manifest, are told apart by the names and sizes of their files only."""
    def described() -> list[tuple[str, int, str | None]]:
        manifests = manifests_of(folder)
        return [(path.name, path.stat().st_size, manifests.get(manifest_path(path), {}).get("sha256"))
                for path in expert_files(folder)[:max_files]]

    ranks.check_equal(described, "experts")


def require_experts(folder: Path, option: str = BUFFER_PATH) -> None:
    """Refuses a folder without expert files, before anything expensive is done."""
    if expert_files(folder):
        return
    for above in folder.parents:
        if above.is_file():
            raise UserError(f"{option} {above} is a file; give the folder that holds <dataset>/<model>/")
        if expert_files(above):
            raise UserError(f"no replay_buffer_*.pt in {folder}, but in {above}; give as {option} the folder that "
                            "holds <dataset>/<model>/")
    if run_file(folder).is_file():
        raise UserError(f"no replay_buffer_*.pt in {folder} yet: its experts are being trained, or were stopped; give "
                        f"the command of buffer/buffer_FTD.py again, or another {option}")
    raise UserError(f"no replay_buffer_*.pt in {folder}; train experts with buffer/buffer_FTD.py (same --dataset, "
                    f"--model, --zca and --buffer_path), or give another {option}")


def experts_in_words(experts: int, epochs: int) -> str:
    """For example `4 experts of 10 epochs`."""
    return f"{number_of(experts, 'expert')} of {number_of(epochs, 'epoch')}"


def checksums(paths: Sequence[Path], watch: Watch = unwatched) -> dict[str, str]:
    """The SHA-256 of each file, by its name."""
    one_at_a_time, stopped = threading.Lock(), threading.Event()
    with (watch("reading the experts", sum(path.stat().st_size for path in paths)) as advance,
          ThreadPoolExecutor(ranks.cores()) as pool):  # hashing releases the GIL
        def report(size: int) -> None:
            if stopped.is_set():
                raise InterruptedError
            with one_at_a_time:
                advance(size)

        try:
            return dict(zip([path.name for path in paths], pool.map(partial(files.sha256, report=report), paths)))
        finally:  # the pool waits for its threads, also when a signal ends this
            stopped.set()


def is_as_written(path: Path, checksum: str) -> bool:
    """Whether an expert file has the checksum in its manifest; False without a manifest.

    Raises:
        UserError: the checksums differ.
    """
    manifest = manifest_path(path)
    if not manifest.exists():
        return False
    if read_manifest(manifest)["sha256"] != checksum:
        raise UserError(f"expert file {path} is damaged: it is not the file that {manifest.name} was written for; copy "
                        "it again, or move both away and train the experts again")
    return True
