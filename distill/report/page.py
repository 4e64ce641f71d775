"""A run's page, `report.html`: one file for any browser, without scripts or network access.

It is made from a `SavedRun`, which is plain data, so it can be made again without the dataset. page.html has its
structure, report.css its style.
"""

import base64
import math
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from distill.report import classes, curves
from distill.report.commands import commands
from distill.report.frames import animation, strip
from distill.report.page_pictures import Pictures
from distill.report.read_run import SavedRun
from distill.report.svg import MOST_POINTS
from distill.report.template import code, document, draw, joined, option
from distill.result_files import (
    EMA,
    METRICS,
    NORMAL,
    THEN,
    EvaluationResult,
    Iteration,
    Score,
    images_tested,
    skipped_advice,
)
from utils.config import DistillConfig, EvaluationConfig, about, canonical, changed, defaults, value_in_words
from utils.errors import number_of
from utils.program.console import duration, thinned

MOST_COLUMNS = 8  # evaluations at which the set is shown
MOST_BARS, LIKELIEST = 10, 5  # of more than MOST_BARS classes, a soft label shows only the LIKELIEST
LONG_NAME = 20  # characters; a longer class name may be cut off, so it gets a tooltip
OPEN_UP_TO = 20  # images; with more, their details are folded at first
TABLE_ROWS = 20
OF_TRAINING = ("batch_train", "dsa", "dsa_strategy")  # named of a test unless they are the defaults


def page(run: SavedRun) -> str:
    """The page of one run."""
    config = run.config
    ipc, factor = config.get("ipc"), config.get("factor", 1)
    grid = f", each holding {factor} × {factor} smaller ones with a label each" if factor != 1 else ""
    lead = [config.get("dataset"), config.get("model"), config and f"{number_of(ipc, 'image')} per class{grid}",
            config and f"{config.get('matching')} gradient{_truncated(config)}", run.result.environment.get("date"),
            "" if run.finished else "not finished"]
    sections = [("summary", "Summary", _summary(run)), ("images", "Distilled images", _images(run)),
                ("evolution", "Progress", _evolution(run)), ("labels", "Labels", _labels(run)),
                ("curves", "Curves", _curves(run)), ("classes", "Classes", _classes(run)),
                ("options", "Options", _options(run)), ("reproduce", "Reproduce", _reproduce(run)),
                ("machine", "Versions and hardware", _machine(run))]
    sections = [section for section in sections if section[2]]
    return document(f"{config.get('dataset', 'Run')} · {run.name}", "Distillation run", run.name,
                    [str(word) for word in lead if word], sections)


def _truncated(config: dict[str, Any]) -> str:
    steps, of = config.get("adjoint_steps"), config.get("syn_steps")
    return f" truncated to the last {steps} of {of} steps" if steps and of and steps < of else ""


# --- the numbers ---------------------------------------------------------------------------------------------


def in_words(score: Score) -> str:
    return f"{score.percent} %".replace(" ", "\N{NO-BREAK SPACE}")


def facts(run: SavedRun, compared: bool = False) -> list[tuple[str, str]]:
    """The numbers that a run is judged by, with their units.

    Args:
        compared: beside other runs: with a row for every set, also the best one.
    """
    result, (name, best) = run.result, run.result.better
    fixed, score, updates = result.fixed_loss, best.scores[0], len(run.metrics.iterations)
    networks = len(score.accuracies)
    of = {NORMAL: "images as they are", EMA: "averaged images (EMA)"}
    others = {each: other for each, other in result.versions.items() if compared or each != name}
    segments = "fixed segments" if fixed.segments is None else number_of(fixed.segments, "fixed segment")
    loss = " → ".join("not finite" if value is None else f"{value:.4g}" for value in (fixed.before, fixed.after))
    return [(f"Best accuracy on the {images_tested(result.chosen_on)} images",
             in_words(score) + (f", {of[name]}" if len(result.versions) > 1 else "")),
            ("Measured on", f"{number_of(networks, 'network')}, {score.network}"),
            ("Reached at iteration", f"{best.iteration:,}"),
            *((f"Best accuracy of the {of[each]}", in_words(other.scores[0])) for each, other in others.items()),
            *((f"Test by evaluation.py on {images_tested(result.tested_on)} images, {score.network}, "
               f"{_training(run, result)}", f"{in_words(score)}, {number_of(len(score.accuracies), 'network')}")
              for result in run.tests for score in result.scores),
            *((f"The same number of {kind}, tested on {images} images",
               f"{in_words(score)}, {number_of(len(score.accuracies), 'network')}")
              for (kind, images), score in run.real_images.items()),
            *([(f"Matching loss, first set → last set, over {segments} of this run",
                _recorded(fixed.segments, lambda _: loss))] if run.finished else []),
            ("Learning rate α of the best set", "not recorded" if math.isnan(best.lr) else f"{best.lr:.4g}"),
            ("Skipped updates (loss above the threshold, or not finite)",
             _recorded(result.skipped, lambda count: _share(count, updates))),
            ("Updates of α held back, because α would no longer have been positive",
             _recorded(result.held, lambda count: ["never", "once", f"{count:,} times"][min(count, 2)])),
            ("Time", _recorded(result.seconds, duration)) if run.finished else ("Not finished", _progress(run))]


def _training(run: SavedRun, result: EvaluationResult) -> str:
    """How the networks of a test were trained: epochs, and what is unlike the run's own training or the defaults."""
    its, ours = map(canonical, run.trainings(result))
    default, epochs = defaults(EvaluationConfig), its["epoch_eval_train"]
    known = result.config.keys() & run.config.keys() - {"epoch_eval_train", "val_fraction"}
    unlike = [name for name in ours if name in known and (
        its[name] != ours[name] or (name in OF_TRAINING and its[name] != default[name]))]
    return ", ".join([number_of(epochs, "epoch") if epochs else "unknown epochs",
                      *(f"{name} {value_in_words(its[name])}" for name in unlike)])


def _recorded(value: Any, as_text: Callable[[Any], str]) -> str:
    return "not recorded" if value is None else as_text(value)


def _progress(run: SavedRun) -> str:
    """How far an unfinished run has got."""
    total = run.config.get("Iteration")
    of = f" of {total:,} ({100 * run.iteration / total:.0f} %)" if isinstance(total, int) and total else ""
    return f"iteration {run.iteration:,}{of}, {run.as_of}"


def _share(count: int, total: int) -> str:
    return f"{count:,}" + (f" of {total:,}" if total else "") + (
        f" ({100 * count / total:.1f}\N{NO-BREAK SPACE}%)" if total and count else "")


def _summary(run: SavedRun) -> Markup:
    notes = [] if run.finished else [draw.note(
        f"This run is not finished: this is how it was at {_progress(run)}. It is brought up to date at evaluations, "
        "or by the command under Reproduce.")]
    if run.learned_nothing:
        known = isinstance(run.config.get("threshold"), int | float)
        advice = skipped_advice(run.metrics.mean_loss, run.config) if known else "nothing was learned"
        so_far = "" if run.finished else " so far"
        notes.append(draw.note(f"Every update was skipped{so_far}: {advice}."))
    if run.missing:
        notes.append(draw.note("This folder does not hold:", run.missing))
    return joined(*notes, draw.facts(facts(run)))


# --- images --------------------------------------------------------------------------------------------------


def _images(run: SavedRun) -> Markup:
    pictures = run.pictures
    if pictures is None:
        return draw.paragraph("There are no pictures in this folder." if run.finished else
                              "No pictures yet: they are made at evaluations, except in the first seconds of a run.")
    rows, shown = pictures.rows(), len(pictures.which)
    best = run.result.versions.get(pictures.version, run.result.best)
    words = draw.about_images(pictures, rows, run.config.get("zca"), run.config.get("labels"),
                              not pictures.start_labels.equal(pictures.labels), best.iteration)
    if pictures.stored is not None:
        words = joined(words, draw.stored(pictures, pictures.stored_of(range(shown))))
    most = max(map(len, rows.values()))
    if most == 1:
        cards = [_card(pictures, row, shown <= OPEN_UP_TO) for of_class in rows.values() for row in of_class]
        return joined(words, draw.cards(pictures, cards, shown > OPEN_UP_TO))
    classes = [(pictures.classes[number], [_card(pictures, row, shown <= OPEN_UP_TO, alone=False) for row in of_class])
               for number, of_class in rows.items()]
    kind = "beside" if most == 2 else "below"  # two leave room for other classes beside them
    return joined(words, draw.cards_by_class(pictures, classes, kind))


def _card(pictures: Pictures, row: int, is_open: bool, alone: bool = True) -> dict[str, Any]:
    """One image, for the template.

    Args:
        alone: it is its class's only image, so that the class name is the heading.
    """
    number, position = divmod(pictures.which[row], pictures.ipc)
    image, part = divmod(position, pictures.factor**2)
    which = f"image {image + 1}" + (f", part {part + 1}" if pictures.factor > 1 else "")
    name = pictures.classes[number] + (f", {which}" if pictures.ipc > 1 else "")
    bars, rest = ([], "") if pictures.hard else _bars(pictures, row)
    return {"row": row, "name": name, "heading": name if alone else which.capitalize(), "bars": bars, "rest": rest,
            "is_open": is_open}


def _bars(pictures: Pictures, row: int) -> tuple[list[dict[str, Any]], str]:
    """The bars of a soft label, for all classes or the likeliest of many, and a line on the others."""
    label = pictures.labels[row]
    start = None if pictures.start_labels[row].equal(label) else pictures.start_labels[row]
    many = len(label) > MOST_BARS
    order = label.argsort(descending=True, stable=True)[:LIKELIEST].tolist() if many else range(len(label))
    bars = [{"name": pictures.classes[number], "long": len(pictures.classes[number]) > LONG_NAME,
             "now": 100 * float(label[number]), "start": None if start is None else 100 * float(start[number]),
             "own": number == pictures.which[row] // pictures.ipc} for number in order]
    rest = f"The other {len(label) - LIKELIEST} classes: {100 * float(1 - label[order].sum()):.0f} %" if many else ""
    return bars, rest


def _evolution(run: SavedRun) -> Markup:
    """The set at some of its evaluations."""
    pictures = run.pictures
    if pictures is None or pictures.frames is None or len(pictures.frames) < 2:
        return Markup("")
    iterations, positions = pictures.frames_of
    reached = {evaluation.iteration: f"{100 * evaluation.scores[0].mean:.1f}\N{NO-BREAK SPACE}%"
               for evaluation in run.metrics.of_set(NORMAL)}
    columns = [(pixels, f"{iteration:,}", reached.get(iteration, ""))
               for pixels, iteration in thinned(list(zip(strip(pictures.frames), iterations)), MOST_COLUMNS)]
    moving, last = animation(pictures.frames)
    names = [pictures.classes[position // pictures.stored_per_class] for position in positions]
    return draw.evolution(columns, names, pictures.version != NORMAL, base64.b64encode(moving).decode(), last)


def _labels(run: SavedRun) -> Markup:
    pictures = run.pictures
    if pictures is None or pictures.hard or pictures.means is None:
        return Markup("")
    return classes.labels(pictures.means, pictures.classes)


def _classes(run: SavedRun) -> Markup:
    """The predictions of the last evaluation, by class."""
    name, best = run.result.better
    evaluations = run.metrics.of_set(name)
    score = evaluations[-1].scores[0] if evaluations else None
    if score is None or score.confusion is None:
        return Markup("")
    count = len(score.confusion)
    named = run.pictures is not None and len(run.pictures.classes) == count
    names = run.pictures.classes if named else [f"class {number + 1}" for number in range(count)]
    return classes.predictions(score, names, evaluations[-1].iteration, best.iteration)


# --- curves, options, commands, machine ----------------------------------------------------------------------


def _curves(run: SavedRun) -> Markup:
    iterations = run.metrics.iterations
    if not iterations and not run.metrics.evaluations:
        return draw.paragraph(f"This folder holds no {METRICS}.")
    how_many = draw.how_many(len(iterations), min(len(iterations), MOST_POINTS))
    return joined(how_many, draw.charts(curves.charts({run.name: run})), _numbers(run))


def _numbers(run: SavedRun) -> Markup:
    """The curves as tables, for exact numbers and for screen readers."""
    scores = [[f"{evaluation.iteration:,}", f"{evaluation.set}, {score.network}", in_words(score),
               str(len(score.accuracies))] for evaluation in run.metrics.evaluations for score in evaluation.scores]
    some: list[Iteration] = thinned(run.metrics.iterations, TABLE_ROWS)
    iterations = [[f"{step.iteration:,}", curves.loss_in_words(step, ".4g"), f"{step.lr:.4g}", str(step.start_epoch),
                   f"below {step.bound}", "yes" if step.updated else "skipped"] for step in some]
    tables = [("Accuracies as a table", "Accuracy at each evaluation",
               ["iteration", "set and network", "accuracy", "networks"], scores),
              ("Iterations as a table", f"{len(some)} of {len(run.metrics.iterations):,} iterations",
               ["iteration", "matching loss", "α after it", "start epoch", "window", "updated"], iterations)]
    return joined(*(draw.folded(name, draw.table(caption, head, rows)) for name, caption, head, rows in tables if rows))


def _options(run: SavedRun) -> Markup:
    if not run.config:
        return draw.paragraph("This folder does not hold its options.")
    default, differing = defaults(DistillConfig), changed(run.config, DistillConfig)

    def row(name: str) -> list[Any]:
        known = name in default
        return [code(name), option(run.config[name]), option(default[name]) if known else "unknown here",
                about(name, DistillConfig)["help"] if known else ""]

    rest = [name for name in run.config if name not in differing]
    head = ["option", "this run", "default", "meaning"]
    tables = draw.table(f"{len(differing)} options that differ from the defaults", head, map(row, differing), "options")
    if rest:
        tables += draw.folded(f"The other {len(rest)} options, at their defaults",
                              draw.table("Options at their defaults", head, map(row, rest), "options"))
    return tables


def _reproduce(run: SavedRun) -> Markup:
    steps = commands(run)
    if not steps:
        return draw.paragraph("Without config.yaml the commands are not known.")
    device, torch = (str(run.result.environment.get(name, "")) for name in ("device", "torch"))
    same = THEN not in device + torch  # else no single command gives the same bits
    return draw.commands(steps, run.pictures is not None, device if same else "")


def machine_of(run: SavedRun) -> dict[str, str]:
    machine = run.pictures.machine if run.pictures else {}
    return {str(name): str(value) for name, value in (machine | run.result.environment).items()}


def _machine(run: SavedRun) -> Markup:
    rows = list(machine_of(run).items())
    made_with = "What the run was made with"
    return draw.table(made_with, ["what", "value"], rows) if rows else draw.paragraph("Not recorded.")
