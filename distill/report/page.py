"""A run's page, `report.html`: one file that opens without a network, without scripts, in any browser.

It is made of a `FinishedRun`, which is plain data, so that it can be made again without the dataset. How it is built is
page.html, how it looks report.css.
"""

from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from distill.report import curves
from distill.report.commands import commands
from distill.report.page_pictures import Pictures
from distill.report.read_run import FinishedRun
from distill.report.svg import numbers_every, thinned
from distill.report.template import code, document, draw, joined, option
from distill.result_files import EMA, Iteration, Score
from utils.config import DistillConfig, about, changed, defaults
from utils.loss_and_accuracy import percent
from utils.program.console import duration

PAGE = "report.html"
MOST_BARS, LIKELIEST = 10, 5  # of a soft label, all classes or of more the likeliest are drawn
LONG_NAME = 20  # characters of a class's name, from which a browser shows it whole on its own
OPEN_UP_TO = 20  # images whose details are open from the beginning
TABLE_ROWS = 20


def page(run: FinishedRun) -> str:
    """The page of one run."""
    config = run.config
    ipc = config.get("ipc")
    lead = [config.get("dataset"), config.get("model"), config and f"{ipc} image{'s' * (ipc != 1)} a class",
            config and f"{config.get('matching')} gradient", run.result.environment.get("date")]
    sections = [("summary", "Summary", _summary(run)), ("images", "Distilled images", _images(run)),
                ("curves", "Curves", _curves(run)), ("options", "Options", _options(run)),
                ("reproduce", "Reproduce", _reproduce(run)), ("machine", "Versions and hardware", _machine(run))]
    return document(f"{config.get('dataset', 'Run')} · {run.name}", "Distillation run", run.name,
                    [str(word) for word in lead if word], sections)


# --- the numbers ---------------------------------------------------------------------------------------------


def in_words(score: Score) -> str:
    return f"{percent(score.mean, score.std)} %".replace(" ", "\N{NO-BREAK SPACE}")


def facts(run: FinishedRun) -> list[tuple[str, str]]:
    """The numbers that a run is judged by, with their units."""
    result, best = run.result, run.result.best
    fixed, score, updates = result.fixed_loss, best.scores[0], len(run.metrics.iterations)
    networks = len(score.accuracies)
    averaged = [result.best_ema.scores[0]] if result.best_ema else []
    loss = " → ".join(_recorded(value, "{:.4g}".format) for value in (fixed.before, fixed.after))
    return [(f"Best accuracy on the {result.chosen_on or 'test'} images", in_words(score)),
            ("Measured on", f"{networks} network{'s' * (networks != 1)} ({score.network})"),
            ("Reached at iteration", f"{best.iteration:,}"),
            *(("Best accuracy of the averaged images (EMA)", in_words(score)) for score in averaged),
            (f"Matching loss before → after, over {fixed.segments or ''} fixed segments",
             _recorded(fixed.segments, lambda _: loss)),
            ("Learning rate α of the best set", f"{best.lr:.4g}"),
            ("Skipped updates (loss above the threshold, or not finite)",
             _recorded(result.skipped, lambda count: _share(count, updates))),
            ("α held back", _recorded(result.held, lambda count: ["never", "once", f"{count:,} times"][min(count, 2)])),
            ("Time", _recorded(result.seconds, duration))]


def _recorded(value: Any, as_text: Callable[[Any], str]) -> str:
    return "not recorded" if value is None else as_text(value)


def _share(count: int, total: int) -> str:
    return f"{count:,}" + (f" of {total:,}" if total else "") + (
        f" ({100 * count / total:.1f} %)" if total and count else "")


def _summary(run: FinishedRun) -> Markup:
    missing = [draw.note("This folder does not hold:", run.missing)] if run.missing else []
    learned_nothing = 0 < len(run.metrics.iterations) == len(run.metrics.skipped)
    nothing = [draw.note("Every update was skipped, so nothing was learned.")] if learned_nothing else []
    return joined(draw.facts(facts(run)), *missing, *nothing)


# --- images --------------------------------------------------------------------------------------------------


def _images(run: FinishedRun) -> Markup:
    pictures = run.pictures
    if pictures is None:
        return draw.paragraph("There are no pictures in this folder.")
    rows, shown = pictures.rows(), len(pictures.which)
    best = run.result.best_ema if pictures.version == EMA and run.result.best_ema else run.result.best
    words = draw.about_images(pictures, rows, run.config.get("labels"), _labels_moved(pictures), best.iteration)
    most = max(map(len, rows.values()))
    if most == 1:
        cards = [_card(pictures, row, shown <= OPEN_UP_TO) for of_class in rows.values() for row in of_class]
        return joined(words, draw.cards(pictures, cards, shown > OPEN_UP_TO))
    classes = [(pictures.classes[number], [_card(pictures, row, shown <= OPEN_UP_TO, alone=False) for row in of_class])
               for number, of_class in rows.items()]
    kind = "beside" if most == 2 else "below"  # two leave room for others
    return joined(words, draw.cards_by_class(pictures, classes, kind))


def _labels_moved(pictures: Pictures) -> bool:
    return pictures.start_labels is not None and not pictures.start_labels.equal(pictures.labels)


def _card(pictures: Pictures, row: int, is_open: bool, alone: bool = True) -> dict[str, Any]:
    """One image, for the template.

    Args:
        alone: of its class, whose name then is the heading.
    """
    number, position = divmod(pictures.which[row], pictures.ipc)
    name = pictures.classes[number] + (f", image {position + 1}" if pictures.ipc > 1 else "")
    bars, rest = ([], "") if pictures.hard else _bars(pictures, row)
    words = " and ".join(["start"] * (pictures.start is not None) + ["label"] * bool(bars)).capitalize()
    return {"row": row, "name": name, "heading": name if alone else f"Image {position + 1}", "bars": bars, "rest": rest,
            "words": words, "is_open": is_open}


def _bars(pictures: Pictures, row: int) -> tuple[list[dict[str, Any]], str]:
    """A soft label: all classes, or of many the likeliest, and what there is to say of the others."""
    label = pictures.labels[row]
    start = pictures.start_labels[row] if _labels_moved(pictures) else None
    if start is not None and start.equal(label):
        start = None
    many = len(label) > MOST_BARS
    order = label.argsort(descending=True, stable=True)[:LIKELIEST].tolist() if many else range(len(label))
    bars = [{"name": pictures.classes[number], "long": len(pictures.classes[number]) > LONG_NAME,
             "now": 100 * float(label[number]), "start": None if start is None else 100 * float(start[number]),
             "own": number == pictures.which[row] // pictures.ipc} for number in order]
    rest = f"The other {len(label) - LIKELIEST} classes: {100 * float(1 - label[order].sum()):.0f} %" if many else ""
    return bars, rest


# --- curves, options, commands, machine ----------------------------------------------------------------------


def _curves(run: FinishedRun) -> Markup:
    iterations = run.metrics.iterations
    if not iterations and not run.metrics.evaluations:
        return draw.paragraph("This run recorded no iterations.")
    how_many = draw.how_many(len(iterations), len(thinned(iterations)))
    return joined(how_many, draw.charts(curves.charts({run.name: run})), _numbers(run))


def _numbers(run: FinishedRun) -> Markup:
    """The curves as tables, for those who read numbers or hear them."""
    scores = [[f"{evaluation.iteration:,}", f"{evaluation.set}, {score.network}", in_words(score),
               str(len(score.accuracies))] for evaluation in run.metrics.evaluations for score in evaluation.scores]
    some: list[Iteration] = numbers_every(run.metrics.iterations, TABLE_ROWS)
    iterations = [[f"{step.iteration:,}", curves.loss_in_words(step, ".4g"), f"{step.lr:.4g}", str(step.start_epoch),
                   f"below {step.bound}", "yes" if step.updated else "skipped"] for step in some]
    tables = [("Accuracies as a table", "Accuracy at each evaluation",
               ["iteration", "set and network", "accuracy", "networks"], scores),
              ("Iterations as a table", f"{len(some)} of {len(run.metrics.iterations):,} iterations",
               ["iteration", "matching loss", "α after it", "start epoch", "window", "updated"], iterations)]
    return joined(*(draw.folded(name, draw.table(caption, head, rows)) for name, caption, head, rows in tables if rows))


def _options(run: FinishedRun) -> Markup:
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


def _reproduce(run: FinishedRun) -> Markup:
    steps = commands(run)
    if not steps:
        return draw.paragraph("Without config.yaml the commands are not known.")
    return draw.commands(steps, run.pictures and run.pictures.about, str(run.result.environment.get("device", "")))


def machine_of(run: FinishedRun) -> dict[str, str]:
    machine = (run.pictures.about or {}).get("machine", {}) if run.pictures else {}
    return {str(name): str(value) for name, value in (run.result.environment | machine).items()}


def _machine(run: FinishedRun) -> Markup:
    rows = list(machine_of(run).items())
    made_with = "What the run was made with"
    return draw.table(made_with, ["what", "value"], rows) if rows else draw.paragraph("Not recorded.")
