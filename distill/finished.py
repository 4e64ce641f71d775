"""Where a run's folder is, and the answer to a command whose run is finished; works without torch."""

import contextlib
from functools import partial
from pathlib import Path

from buffer.manifests import buffer_folder, checksums, expert_files, is_as_written, manifests_of
from distill.report.names import missing
from distill.result_files import METRICS, RESULT, RunResult
from distill.set_files import WHOLE
from utils.config import STARTS, DistillConfig
from utils.errors import UserError
from utils.program import ranks
from utils.program.console import shown, wrapped
from utils.program.progress import watched
from utils.program.run_folder import STATE, RunFolder, data_id, run_id


def run_folder(config: DistillConfig, data: dict[str, str]) -> Path:
    """`logged_files/<dataset>/<ipc>/<model>/<run name>`, as published; the default name is derived from the config and
    the checksums of the data."""
    name = config.run_name or f"{config.matching}_seed{config.seed}_{run_id(config, data)}"
    return Path(config.log_path) / config.dataset / str(config.ipc) / config.model / name


def answer_finished(config: DistillConfig) -> bool:
    """Whether the run is finished and none of its files are missing; if so, prints that it is.

    False also if files alone cannot tell; `distill.loop` then decides.

    Raises:
        UserError: the folder holds a run with other options or of other data, or an expert file is damaged.
    """
    if ranks.size() > 1 or config.dry_run or (data := _data_by_manifests(config)) is None:
        return False
    path = run_folder(config, data)
    if not RunFolder(path, config, METRICS, RESULT).is_done:
        return False
    result = RunResult.read(path / RESULT)
    check_same_data(path, result, data)
    if missing(path) or lost_sets(path, result):
        return False
    say_it_is(config, path, result)
    return True


def _data_by_manifests(config: DistillConfig) -> dict[str, str] | None:
    """The checksums of what a run reads: those of the expert files and, from their manifests, of the images that all
    experts were trained on.

    None: no run with these options is finished, the manifests do not tell, or the run reads other files too.

    Raises:
        UserError: the folder of `run_name` holds a run with other options, or an expert file is damaged.
    """
    if config.run_name:
        done = RunFolder(run_folder(config, {}), config, METRICS, RESULT).is_done
    else:
        runs = run_folder(config, {}).parent.glob(f"{config.matching}_seed{config.seed}_*/{RESULT}")
        done = any(_is_done(config, path.parent) for path in runs)
    more = config.Initialize_Label_With_Another_Model or config.max_files or config.max_experts
    if not done or more or config.pix_init not in STARTS:
        return None
    folder = buffer_folder(config)
    paths, manifests = expert_files(folder), manifests_of(folder)
    images = {manifest.get("fingerprint") for manifest in manifests.values()}
    if len(manifests) < len(paths) or len(images) != 1 or None in images:
        return None
    found = checksums(paths, partial(watched, quiet=config.quiet))
    return {"images": images.pop(), **found} if all(is_as_written(path, found[path.name]) for path in paths) else None


def _is_done(config: DistillConfig, folder: Path) -> bool:
    """Whether the run in a folder has these options and needs no further iterations."""
    with contextlib.suppress(UserError):  # the folder may hold a run with other options
        return RunFolder(folder, config, METRICS, RESULT).is_done
    return False


def check_same_data(path: Path, result: RunResult, data: dict[str, str]) -> None:
    """Refuses a finished run that was made of other data than these.

    Args:
        data: checksums of everything that a run of these options reads.

    Raises:
        UserError
    """
    if result.data not in (None, data_id(data)):
        raise UserError(f"{shown(path)} is finished, and was made of other images, experts or a different set to start "
                        "from; restore what it had, or give another --run_name")


def lost_sets(path: Path, result: RunResult) -> list[str]:
    """The names of a finished run's best sets that are missing from its folder."""
    return [name for name in result.versions if not (path / name / WHOLE).exists()]


def say_it_is(config: DistillConfig, path: Path, result: RunResult) -> None:
    goes_on = config.resume == "auto" and (path / STATE).exists()
    more = "a larger --Iteration to go on with it, or " if goes_on else ""
    print(wrapped(f"{shown(path)} is finished ({result.summary}); give {more}another --run_name to run it again"))
