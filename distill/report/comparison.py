"""The page of several runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distill.report import curves
from distill.report.page import facts, machine_of
from distill.report.page_pictures import IMAGE_BYTES
from distill.report.read_run import SavedRun
from distill.report.template import code, document, draw, joined, option
from distill.result_files import METRICS
from utils.config import DistillConfig, canonical, defaults, from_repository
from utils.errors import number_of

MOST_PER_CLASS = 3  # images


def comparison(runs: Sequence[SavedRun]) -> str:
    """The page that compares these runs."""
    named = dict(zip(_distinct_names(runs), runs))
    title = number_of(len(runs), "distillation run")
    drawn = curves.charts(named)
    sections = [("summary", "Summary", _numbers(named)), ("options", "Options that differ", _options(named)),
                ("curves", "Curves", draw.charts(drawn) if drawn else
                 draw.paragraph(f"None of these folders holds {METRICS}.")),
                ("images", "Distilled images", _images(named)),
                ("machine", "Versions and hardware", _table("What the runs were made with", "what", {
                    name: machine_of(run) for name, run in named.items()}, "not recorded"))]
    return document(title, f"{title} side by side", "", list(named), sections)


def _table(caption: str, corner: str, columns: dict[str, dict[Any, Any]], absent: str) -> Markup:
    """A table with a column for each run, and a row for each name in any column."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, absent) for column in columns.values())] for name in names]
    return draw.table(caption, [corner, *columns], rows)


def _numbers(runs: dict[str, SavedRun]) -> Markup:
    several = any(len(run.result.versions) > 1 for run in runs.values())
    columns: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        column = columns[name] = {}
        for what, said in facts(run, several):  # tests of the same options have one row
            column[what] = f"{column[what]}; {said}" if what in column else said
        column["Folder"] = code(from_repository(run.path))
    missing = [f"{name}: {what}" for name, run in runs.items() for what in run.missing]
    return joined(_table("What each run reached", "what", columns, "none"),
                  draw.note("Not in these folders:", missing) if missing else Markup(""))


def _options(runs: dict[str, SavedRun]) -> Markup:
    # An option that a run does not record had no effect in it, so it differs only from what is not the default.
    default = defaults(DistillConfig)
    configs = [canonical(default | run.config) for run in runs.values() if run.config]
    different = [name for name in dict.fromkeys(name for config in configs for name in config)
                 if any(config.get(name) != configs[0].get(name) for config in configs)]
    if not different:
        return draw.paragraph("All options are the same." if len(configs) == len(runs) else
                              "Not all of these folders record their options; those of the others are the same.")
    columns = {of: {code(name): option(run.config[name]) if name in run.config else
                    "without effect" if run.config else "not recorded" for name in different}
               for of, run in runs.items()}
    return _table("Options that differ between the runs", "option", columns, "")


def _images(runs: dict[str, SavedRun]) -> Markup:
    with_pictures = [run.pictures for run in runs.values() if run.pictures]
    classes = dict.fromkeys(pictures.classes[number] for pictures in with_pictures for number in pictures.rows())
    if not classes:
        return draw.paragraph("None of these folders holds pictures.")
    room = IMAGE_BYTES // (len(classes) * len(runs) * max(pictures.distilled[0].numel() for pictures in with_pictures))
    most = max(1, min(MOST_PER_CLASS, room, max(pictures.stored_per_class for pictures in with_pictures)))
    cards = [(name, [(run_name, _of_class(run, name, run_name, most)) for run_name, run in runs.items()])
             for name in classes]
    return draw.compared_cards(cards, any(run.config.get("zca") for run in runs.values()),
                               any(pictures.factor > 1 for pictures in with_pictures), most)


def _of_class(run: SavedRun, name: str, run_name: str, most: int) -> list[tuple[Any, str, str]]:
    """A class's first images, each with its label's largest class; of a factor above 1, the first stored images."""
    pictures = run.pictures
    if pictures is None or name not in pictures.classes:
        return []
    rows = pictures.rows().get(pictures.classes.index(name), [])
    if pictures.stored is not None:
        return [(image, f"distilled {name}, stored image {number} of {run_name}",
                 f"{pictures.factor} × {pictures.factor} smaller ones")
                for number, image in enumerate(pictures.stored_of(rows)[:most], start=1)]
    rows = rows[:most]
    says = {row: int(pictures.labels[row].argmax()) for row in rows}
    return [(pictures.distilled[row], f"distilled {name}, image {number} of {run_name}",
             f"{pictures.classes[says[row]]} {100 * float(pictures.labels[row].max()):.0f}\N{NO-BREAK SPACE}%")
            for number, row in enumerate(rows, start=1)]


def _distinct_names(runs: Sequence[SavedRun]) -> list[str]:
    """The folders' names, with as many parent folders as it takes to tell them apart."""
    for depth in range(1, max(len(run.path.parts) for run in runs) + 1):
        names = [str(Path(*run.path.parts[-depth:])) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {name}" for number, name in enumerate(names, start=1)]
