"""Distils with several settings, one after the other, and ranks them.

    python scripts/sweep.py --cfg configs/MiniFashion/ConvIN/IPC1.yaml --lr_img 30,100,300 --syn_steps 20,40

Values are separated by commas. Each combination is a run of distill/DATM.py, in DATM.py's usual folder, named by its
values of the swept options, such as lr_img=30_syn_steps=20 (after --run_name and _, if that is given). The same command
resumes a stopped sweep and repeats no finished run; with more values, or a larger --Iteration, it does what is missing.
It ends with a table, best first, and a page that compares the runs, in place of the page of an earlier sweep of
these options. Runs without a result, for example because they diverged at a rate, are named.

Settings should be chosen without the test images, so --val_fraction is 0.1 unless it is given, here or in the YAML. The
experts must have been trained with the same value (buffer_FTD.py --val_fraction 0.1); otherwise the runs are refused.

Existing paths are not split at commas, nor are options that do not affect the result, such as --device [0,1].
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.program.process_settings import tune_process

tune_process()  # before torch is imported

from distill.option_checks import check_options
from distill.report.read_run import SavedRun, read_run
from distill.result_files import images_tested, tested_on
from distill.run_folder import run_folder
from scripts.common import report_kind, save_report
from utils.config import STARTS, DistillConfig, about, canonical, influential, is_path
from utils.errors import UserError, note
from utils.files import REPOSITORY, check_outputs, resolved, write_text
from utils.program import commands, interrupt
from utils.program.command_line import config_of, typed
from utils.program.console import duration, percent, say, shown, table
from utils.program.entry import entry

DATM = "distill/DATM.py"
VAL_FRACTION = "0.1"
REFUSED = 2  # exit code of a program that says in one line why it cannot go on
LOOK_SECONDS = 0.1  # between two polls of the run


class Run(NamedTuple):
    """One combination of values."""

    name: str
    differs: dict[str, str]  # its value of each swept option
    options: dict[str, str]  # everything that DATM.py is given
    config: DistillConfig
    sweep: str | None  # the name that the sweep was given

    @property
    def folder(self) -> Path:
        return run_folder(self.config, {})


def main() -> None:
    options = typed(DistillConfig, __doc__, yaml_file=True, other_defaults={"val_fraction": VAL_FRACTION},
                    json="write the table to this file")
    json = resolved(options.pop("json")) if options.get("json") else None
    runs = combinations(options)
    config, swept = runs[0].config, list(runs[0].differs)

    # Refuse whatever can be checked before hours of work.
    for run in runs:
        check_options(run.config)
    if any(run.config.pix_init not in STARTS for run in runs):
        from distill.checks import check_start  # imports torch, which takes seconds

        for run in runs:
            check_start(run.config)
    together = Path(os.path.commonpath([run.folder.parent for run in runs]))
    page = together / f"{'_'.join(['sweep', *filter(None, [runs[0].sweep]), *swept])}.html"
    check_outputs({"the page": page} | ({"--json": json} if json else {}),
                  {"the page": "html", "--json": report_kind()})

    if not config.dry_run:
        interrupt.saves("the runs that it began")
    ended = []
    for number, run in enumerate(runs, start=1):
        say(config, f"[{number} of {len(runs)}] {run.name}")
        if run_to_its_end(run):
            ended.append(run)
    if ended and not config.dry_run:
        rank(ended, options, page, json)
    if failed := [run.name for run in runs if run not in ended]:
        raise UserError(f"no result of {', '.join(failed)}; what each said is above, and the same command tries again")


def rank(runs: list[Run], options: dict[str, str], page: Path, json: Path | None) -> None:
    """Shows finished runs side by side, the best first.

    Args:
        options: of the sweep, as they were typed.
    """
    from distill.report.commands import evaluation  # imports torch, which takes seconds
    from distill.report.comparison import comparison
    from utils.program.device import select_device

    config, swept = runs[0].config, list(runs[0].differs)
    finished = {run.name: read_run(run.folder) for run in runs}
    for run in runs:
        if (done := len(finished[run.name].metrics.iterations)) > run.config.Iteration:
            note(f"{run.name} had been extended to iteration {done} before, beyond {run.config.Iteration}")
    ranked = sorted(runs, key=lambda run: -finished[run.name].result.better[1].scores[0].mean)
    reached = {run.name: numbers(run, finished[run.name]) for run in ranked}
    tested = images_tested(tested_on(config.val_fraction))
    print(table([[*swept, f"accuracy on the {tested} images, %", "networks", "iteration", "skipped",
                  "loss, first → last set", "time"],
                 *([*run.differs.values(), *in_words(reached[run.name])] for run in ranked)]))
    write_text(page, comparison([finished[run.name] for run in ranked]))
    save_report(json, {"options": options, "tested_on": tested, "runs": list(reached.values())},
                select_device(config.device))
    print(f"in {shown(page)}{f' and {shown(json)}' if json else ''}")
    best = ranked[0]
    if finished[best.name].result.better[1].iteration == 0:
        note("the best set is an initial one: no later set of any run scored better")
    test = evaluation(influential(best.config), best.folder) | commands.device_given(config.device)
    commands.say_next(config, "next, to test the best set on the test images:",
                      commands.command("distill/evaluation.py", test))


def combinations(options: dict[str, str]) -> list[Run]:
    """A run for each combination of the values, all of them parsed.

    Args:
        options: as they are typed, including `cfg`.

    Raises:
        UserError: a wrong or repeated value, or nothing to sweep.
    """
    # In the order of declaration, so that a run's name does not depend on the order in which options are typed.
    order = ["cfg", *(field.name for field in fields(DistillConfig))]
    values = {name: split(name, options[name]) for name in order if name in options}
    swept = [name for name in values if len(values[name]) > 1]
    if of_data := {"dataset", "subset", "data_path", "val_fraction"}.intersection(swept):
        raise UserError(f"--{min(of_data)} has several values, and sets that are tested on different images cannot be "
                        "ranked; give one")
    if not swept:
        raise UserError(f"every option has one value; give several to one at least, such as --lr_img 30,100,300, or "
                        f"use {DATM}")
    runs: dict[str, Run] = {}
    first: dict[str, str] = {}  # the options that decide a result → the name of the first run with these
    for chosen in itertools.product(*values.values()):
        asked = dict(zip(values, chosen))
        config, known = config_of(DistillConfig, asked)
        asked |= {} if "val_fraction" in known else {"val_fraction": VAL_FRACTION}
        differs = {each: in_a_name(each, asked[each], getattr(config, each)) for each in swept}
        name = "_".join([*filter(None, [config.run_name]), *(f"{each}={value}" for each, value in differs.items())])
        if name in runs:
            raise UserError(f"{name} would be the name of two runs; give each value once, and paths whose names differ")
        asked["run_name"] = name
        run = Run(name, differs, asked, config_of(DistillConfig, asked)[0], config.run_name)
        if (same := first.setdefault(repr(canonical(influential(run.config))), name)) != name:
            raise UserError(f"{name} would be the run of {same} again, as these options stand; give one value")
        runs[name] = run
    return list(runs.values())


def in_a_name(option: str, text: str, value: Any) -> str:
    """A value as part of a folder's name: the same however it was typed, unless it is a path."""
    if not is_path(option, text, DistillConfig):
        text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    return re.sub(r"[/\\]+", "-", text)


def split(name: str, text: str) -> list[str]:
    """The values of an option, split at commas unless it is `cfg`, an existing path, or does not decide the result."""
    whole = name == "cfg" or not about(name, DistillConfig)["decides"] or (
        is_path(name, text, DistillConfig) and os.path.exists(os.path.expanduser(text)))
    return [text] if whole else text.split(",")


def run_to_its_end(run: Run) -> bool:
    """Starts or resumes a run and waits for it; returns False if it was refused. A first signal is passed on, and the
    run saves; a second one is too, and stops it at once.

    Raises:
        Stopped: a signal came.
        SystemExit: the run crashed; with its exit code.
    """
    sys.stdout.flush()
    stopped = None
    with interrupt.queued() as signals:  # so that the run is not left behind
        # A session of its own, so that Ctrl-C in a terminal reaches it only through this process.
        process = subprocess.Popen([sys.executable, str(REPOSITORY / DATM), *(
            f"--{name}={value}" for name, value in run.options.items())], stdin=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | {interrupt.PART_OF: Path(sys.argv[0]).name})
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            while signals:
                stopped = signals.pop(0)
                process.send_signal(stopped)
    if stopped:
        raise interrupt.Stopped(stopped)
    code = process.returncode
    if code not in (0, REFUSED):
        how = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
        print(f"{Path(sys.argv[0]).name}: error: the run {run.name} {how}; the same command resumes once that is "
              "fixed", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
    return code == 0


def numbers(run: Run, finished: SavedRun) -> dict[str, Any]:
    """What a run reached, for the JSON."""
    result = finished.result
    version, best = result.better
    return {"name": run.name, "folder": str(run.folder), "options": run.differs, "set": version,
            "accuracy": best.scores[0].mean, "std": best.scores[0].std, "networks": len(best.scores[0].accuracies),
            "iteration": best.iteration, "skipped": result.skipped, "updates": len(finished.metrics.iterations),
            "loss_before": result.fixed_loss.before, "loss_after": result.fixed_loss.after, "seconds": result.seconds}


def in_words(reached: dict[str, Any]) -> list[str]:
    """The same, for the table."""
    return [percent(reached["accuracy"], reached["std"]), str(reached["networks"]),
            str(reached["iteration"]),
            f"{reached['skipped']} of {reached['updates']}",
            " → ".join("-" if loss is None else f"{loss:.4f}"
                       for loss in (reached["loss_before"], reached["loss_after"])),
            duration(reached["seconds"])]


if __name__ == "__main__":
    entry(main)
