"""What a finished distillation leaves and says."""

from collections.abc import Iterable
from pathlib import Path

from buffer.trajectories import made_by
from distill.distillation import FIXED_SEGMENTS
from distill.progression import Progression
from utils import commands, figures, parallel, record, report
from utils.config import DistillConfig, influential
from utils.files import finite, write_text
from utils.metrics import percent
from utils.program.console import note, say, shown, wrapped
from utils.program.machine import environment


def conclude(progression: Progression) -> None:
    """Writes what a finished run leaves, and says where."""
    config, dataset, best, folder = progression.config, progression.dataset, progression.best, progression.folder
    distillation, start = progression.distillation, progression.start
    before, after = (distillation.fixed_loss(each) for each in (start, distillation.set))
    if not parallel.first():
        return
    chosen_on = "validation" if config.val_fraction else "test"
    for name, each in best.items():
        # Once more: a run that was killed just after it wrote them may have gone on to another best set.
        each.set.save(folder.path / name, "best", dataset)
        each.set.save_whole(folder.path / name / "distilled.safetensors", dataset, influential(config))
    version, overall = max(best.items(), key=lambda each: each[1].scores[0].mean)
    figures.save_images(folder.path / "images.png", dataset.to_pixels(start.images),
                        dataset.to_pixels(overall.set.images), dataset.classes)
    figures.save_curves(folder.path / "curves.png", folder.metrics(), config.threshold)
    record.save_pictures(folder.path / record.PICTURES, dataset, (start.images, start.labels),
                         (overall.set.images, overall.set.labels), version, config.pix_init == "noise",
                         made_by(distillation.buffer.folder))
    summary = "; ".join(f"{'' if name == 'Normal' else name + ' '}best on the {chosen_on} images "
                        f"{percent(each.scores[0].mean, each.scores[0].std)} % at iteration {each.iteration}"
                        for name, each in best.items())
    folder.finish(summary=summary, best=best["Normal"].as_dict(),
                  best_ema=best["EMA"].as_dict() if "EMA" in best else None, chosen_on=chosen_on,
                  skipped=distillation.skipped, held=distillation.held, seconds=progression.seconds,
                  fixed_loss={"before": finite(before), "after": finite(after), "segments": FIXED_SEGMENTS},
                  environment=environment(start.images.device))
    write_text(folder.path / report.PAGE, report.page(record.read_run(folder.path)))
    progression.tracker.finish()
    say(config, f"matching loss over {FIXED_SEGMENTS} fixed segments: {before:.4f} before, {after:.4f} after")
    say(config, f"{distillation.skipped} of {config.Iteration} updates skipped, α held back {distillation.held} times")
    if distillation.skipped == config.Iteration > 0:
        note(f"note: every update was skipped, so nothing was learned; the matching loss stays above --threshold "
             f"{config.threshold:g}: give a larger one, or start nearer (--pix_init, --lr_teacher, --syn_steps)")
    print(wrapped(summary))
    _say_where(config, folder.path, best, version)


def _say_where(config: DistillConfig, path: Path, versions: Iterable[str], best: str) -> None:
    """What lies in a finished run's folder, and what to type next."""
    print(f"in {shown(path)}{'' if config.quiet else ':'}")
    say(config, f"  {report.PAGE:<29} the run on one page, for a browser")
    for version in versions:
        say(config, f"  {version + '/distilled.safetensors':<29} the best set; beside it as images_best.pt, …")
    say(config, "  images.png, curves.png, metrics.jsonl, config.yaml, result.json")
    whole = path / best / "distilled.safetensors"
    options = commands.evaluation(influential(config), whole) | commands.device_given(config.device)
    commands.say_next(config, "next, to test the set on fresh networks, and to have its images as PNG files:",
                      commands.command("distill/evaluation.py", options),
                      commands.command("scripts/export.py", {"png": path / best / "png"}, argument=whole))
