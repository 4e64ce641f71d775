"""What a distillation writes and prints when it finishes, and the pictures and page it updates while it runs."""

from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

from buffer.manifests import accuracies_reached, made_by
from buffer.trajectories import Buffer
from distill.distillation import FIXED_SEGMENTS
from distill.distilled_set import DistilledSet
from distill.load import Inputs
from distill.report.commands import LABELLING, evaluation
from distill.report.frames import Frames
from distill.report.names import ANIMATION, CURVES, IMAGES_PNG, PAGE, PICTURES, SHOWN, missing
from distill.report.page_pictures import SAVED, save_pictures
from distill.report.read_run import read_run
from distill.report.show import noting_failure, show
from distill.result_files import (
    EMA,
    METRICS,
    NORMAL,
    RESULT,
    Best,
    FixedLoss,
    Metrics,
    RunResult,
    better_of,
    images_tested,
    skipped_advice,
    tested_on,
)
from distill.run_folder import STATE, RunFolder, data_id
from distill.run_state import Candidate, DistillView, RunState, best_of
from distill.set_files import WHOLE
from utils.config import STARTS, DistillConfig, as_dict, influential
from utils.data.datasets import Dataset
from utils.errors import UserError, note, number_of, wrapped
from utils.program import commands, ranks
from utils.program.console import say, shown
from utils.program.machine import environment
from utils.program.progress import watched

MANY_SKIPPED = 0.5  # share of a run's updates; if more are skipped, it says so


def conclude(run: RunState) -> None:
    """Writes the outputs of a finished run and says where they are: first the result, then its pictures and page,
    which may fail."""
    config, dataset, start, folder = run.config, run.dataset, run.start, run.folder

    # The matching loss before and after: all ranks take part, and the first one does the rest. Without any update the
    # set is still the initial one.
    learned = run.distillation.skipped < config.Iteration
    with watched("measuring the matching loss", FIXED_SEGMENTS * (1 + learned), config.quiet) as advance:
        before = run.distillation.fixed_loss(start, advance)
        after = run.distillation.fixed_loss(run.distillation.set, advance) if learned else before
    if not ranks.first():
        return

    # Write the best sets again: a run that was killed after writing one but before saving its state may have chosen
    # another after it was resumed.
    for name, best in run.best.items():
        best.set.save(folder.path / name, "best", dataset)
        best.set.save_whole(folder.path / name / WHOLE, dataset, influential(config))

    # The pictures and page drawn during the run are out of date.
    for name in (*SHOWN, PICTURES):
        (folder.path / name).unlink(missing_ok=True)

    # The result, which marks the run as finished; then its pictures and page.
    chosen_on = tested_on(config.val_fraction)
    tested = images_tested(chosen_on)
    results = {name: Best(best.iteration, float(best.set.lr), best.scores, best.set.images_sha256)
               for name, best in run.best.items()}
    summary = "; ".join(f"{'' if name == NORMAL else name + ' '}best on the {tested} images "
                        f"{best.scores[0].percent} % at iteration {best.iteration}"
                        for name, best in results.items())
    skipped, held = run.distillation.skipped, run.distillation.held
    RunResult(summary, best=results[NORMAL], best_ema=results.get(EMA), chosen_on=chosen_on, skipped=skipped, held=held,
              seconds=run.seconds, fixed_loss=FixedLoss(before, after, FIXED_SEGMENTS),
              environment=environment(start.images.device) | run.on, data=data_id(run.checksums)).write(folder.result)
    run.tracker.finish()
    _save_pictures(config, dataset, run.distillation.buffer, folder.path, start, run.best, run.frames)
    show(read_run(folder.path))

    # Say what was reached and where it is.
    say(config, f"matching loss over {FIXED_SEGMENTS} fixed segments: {before:.4f} before, {after:.4f} after")
    say(config, f"{skipped} of {number_of(config.Iteration, 'update')} skipped, {number_of(held, 'update')} of α held "
                f"back{', which would have left the positive numbers' * (held > 0)}")
    if config.Iteration and not learned:
        # Based on the losses that were compared with the threshold; those of the fixed segments may be below it.
        advice = skipped_advice(Metrics.read(folder.log).mean_loss, as_dict(config))
        note(f"every update was skipped: {advice}")
    elif skipped > MANY_SKIPPED * config.Iteration:
        note(f"{skipped} of {number_of(config.Iteration, 'update')} were skipped, as their matching loss was above "
             f"--threshold {config.threshold:g} or not finite; a smaller --lr_img"
             f"{' or --lr_teacher' * (config.pix_init in STARTS)}, or a window that starts earlier, may learn more")
    if learned and run.best[better_of(run.best)].iteration == 0:
        note(f"the best set is the initial one: no later set scored better on the {tested} images")
    print(wrapped(summary))
    _say_where(config, folder.path, run.best, better_of(run.best))


def say_finished(config: DistillConfig, inputs: Inputs, folder: RunFolder) -> None:
    """Says that the run is already finished, after making pictures and page if they are missing.

    Raises:
        UserError: the run was made of other data.
    """
    result, where = RunResult.read(folder.result), shown(folder.path)
    if result.data not in (None, data_id(inputs.checksums)):
        raise UserError(f"{where} is finished, and was made of other images, experts or a different set to start from; "
                        "restore what it had, or give another --run_name")
    _restore(config, inputs.dataset, inputs.buffer, folder)
    extendable = config.resume == "auto" and (folder.path / STATE).exists()
    more = "a larger --Iteration to extend it, or " if extendable else ""
    did = number_of(folder.did, "iteration")
    print(wrapped(f"{where} is finished, after {did} ({result.summary}); give {more}another --run_name to run it "
                  "again"))


def _restore(config: DistillConfig, dataset: Dataset, buffer: Buffer, folder: RunFolder) -> None:
    """Makes a finished run's missing pictures and page; what the pictures need is in the checkpoint."""
    path = folder.path
    if PICTURES in missing(path):
        try:
            state, why = folder.saved_state, f"there is no {STATE}"
        except UserError as error:
            state, why = None, str(error)
        if state is None:
            note(f"{shown(path)} has no {PICTURES}, which cannot be made again: {why}")
        else:
            with noting_failure(path, PICTURES):
                start = DistilledSet(**state["start"]).to(dataset.device)
                _save_pictures(config, dataset, buffer, path, start, best_of(state, dataset.device),
                               Frames(**state["frames"]))
    if unseen := missing(path):
        with noting_failure(path, ", ".join(unseen)):
            show(read_run(path), unseen)


def show_so_far(run: RunState, view: DistillView) -> None:
    """Updates the pictures and page of an unfinished run, no more often than `RunState.drew_for` allows."""
    if not ranks.first() or run.iteration == run.config.Iteration or perf_counter() < run.draw_from:
        return
    path, began = run.folder.path, perf_counter()
    with view.aside("drawing", 1), noting_failure(path, PAGE):
        _save_pictures(run.config, run.dataset, run.distillation.buffer, path, run.start, run.best, run.frames)
        show(read_run(path))
    run.drew_for(perf_counter() - began)


def _save_pictures(config: DistillConfig, dataset: Dataset, buffer: Buffer, path: Path, start: DistilledSet,
                   best: dict[str, Candidate], frames: Frames) -> None:
    with noting_failure(path, PICTURES):
        version = better_of(best)
        labelling = [kind | {LABELLING: True} for kind in made_by(Path(config.Initialize_Label_Model_Dir))] if (
            config.labelled_by_another) else []
        save_pictures(path / PICTURES, dataset, start, best[version].set, version,
                      "noise" if config.pix_init == "noise" else "real" if config.pix_init in STARTS else SAVED, frames,
                      made_by(buffer.folder) + labelling,
                      accuracies_reached(buffer.folder))


def _say_where(config: DistillConfig, path: Path, versions: Iterable[str], best: str) -> None:
    """Prints what a finished run's folder contains and which commands to run next."""
    print(f"in {shown(path)}{'' if config.quiet else ':'}")
    say(config, f"  {PAGE:<29} the run on one page, for a browser")
    for name in versions:
        say(config, f"  {f'{name}/{WHOLE}':<29} the best set{' of averaged images' * (name == EMA)}; beside it as "
                    "images_best.pt, …")
    say(config, f"  {', '.join([IMAGES_PNG, ANIMATION, CURVES, METRICS])}, config.yaml, {RESULT}; {STATE}, to "
                "resume from")
    whole = path / best / WHOLE
    options = evaluation(influential(config), path) | commands.device_given(config.device)
    commands.say_next(config, "next, to test the set on fresh networks, and to have its images as PNG files:",
                      commands.command("distill/evaluation.py", options),
                      commands.command("scripts/export.py", {"png": path / best / "png"}, argument=whole))
