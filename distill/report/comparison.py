"""The page of several runs side by side."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from distill.report import curves
from distill.report.page import facts, machine_of
from distill.report.pictures import IMAGE_BYTES
from distill.report.record import FinishedRun
from distill.report.template import code, document, draw, joined, option
from utils.config import from_repository

MOST_PER_CLASS = 3  # images


def comparison(runs: Sequence[FinishedRun]) -> str:
    """The page."""
    names = _distinct_names(runs)
    title = f"{len(runs)} distillation runs"
    drawn = curves.charts(dict(zip(names, runs)))
    sections = [("summary", "Summary", _numbers(runs, names)),
                ("options", "Options that differ", _options(runs, names)),
                ("curves", "Curves", draw.charts(drawn) if drawn else
                 draw.paragraph("None of these runs recorded iterations.")),
                ("images", "Distilled images", _images(runs, names)),
                ("machine", "Versions and hardware", _table("What the runs were made with", names,
                                                            [machine_of(run) for run in runs], "not recorded"))]
    return document(title, f"{title} side by side", "", names, sections)


def _table(caption: str, names: list[str], columns: Sequence[dict[str, Any]], absent: str, *rows: list[Any]) -> Markup:
    """A column for each run, a row for each name in any of them."""
    known = dict.fromkeys(name for column in columns for name in column)
    return draw.table(caption, ["what", *names],
                      [*([name, *(column.get(name, absent) for column in columns)] for name in known), *rows])


def _numbers(runs: Sequence[FinishedRun], names: list[str]) -> Markup:
    folders = ["Folder", *(code(from_repository(run.path)) for run in runs)]
    missing = [f"{name}: {what}" for run, name in zip(runs, names) for what in run.missing]
    return joined(_table("What each run reached", names, [dict(facts(run)) for run in runs], "none", folders),
                  draw.note("Not in these folders:", missing) if missing else Markup(""))


def _options(runs: Sequence[FinishedRun], names: list[str]) -> Markup:
    absent = object()
    different = [name for name in dict.fromkeys(name for run in runs for name in run.config)
                 if any(run.config.get(name, absent) != runs[0].config.get(name, absent) for run in runs)]
    if not different:
        return draw.paragraph("All options are the same.")
    rows = [[code(name), *(option(run.config[name]) if name in run.config else "without effect" for run in runs)]
            for name in different]
    return draw.table("Options that differ between the runs", ["option", *names], rows)


def _images(runs: Sequence[FinishedRun], names: list[str]) -> Markup:
    with_pictures = [run.pictures for run in runs if run.pictures]
    classes = list(dict.fromkeys(name for pictures in with_pictures for name in pictures.classes))
    if not classes:
        return draw.paragraph("None of these folders holds pictures.")
    room = IMAGE_BYTES // (len(classes) * len(runs) * max(pictures.distilled[0].numel() for pictures in with_pictures))
    most = max(1, min(MOST_PER_CLASS, room, max(pictures.ipc for pictures in with_pictures)))
    first = "The first image" if most == 1 else f"The first {most} images"
    words = (f"{first} of each class, un-whitened, clipped at ±2.5 standard deviations; below each the class that its "
             "label holds likeliest. Each run's own report shows more.")
    cards = [(name, [(run_name, _of_class(run, name, run_name, most)) for run, run_name in zip(runs, names)])
             for name in classes]
    return joined(draw.paragraph(words), draw.compared_cards(cards, most > 1))


def _of_class(run: FinishedRun, name: str, run_name: str, most: int) -> list[tuple[Any, str, str]]:
    """The first images of a class, each with what its label says of it."""
    pictures = run.pictures
    if pictures is None or name not in pictures.classes:
        return []
    found = []
    for number, row in enumerate(pictures.rows().get(pictures.classes.index(name), [])[:most], start=1):
        says = int(pictures.labels[row].argmax())
        found.append((pictures.distilled[row], f"distilled {name}, image {number} of {run_name}",
                      f"{pictures.classes[says]} {100 * float(pictures.labels[row, says]):.0f}\N{NO-BREAK SPACE}%"))
    return found


def _distinct_names(runs: Sequence[FinishedRun]) -> list[str]:
    """The folders' names, with as much of what is above them as tells them apart."""
    for depth in range(1, max(len(run.path.parts) for run in runs) + 1):
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {name}" for number, name in enumerate(names, start=1)]
