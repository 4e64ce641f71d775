"""A run's page, `report.html`: one file that opens without a network, without scripts, in any browser.

`page` makes it of a `Run` (utils/record.py), which is plain data, so that a page can be made again without the dataset;
`comparison` puts several runs side by side. How it looks is report.css.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from utils.config import DistillConfig, changed, defaults, from_repository
from utils.program.console import duration
from utils.record import IMAGE_BYTES, Pictures, Run, Step, commands, helps
from utils.svg import Chart, numbers_every, thinned

PAGE = "report.html"
_STYLE = Path(__file__).with_name("report.css")
MOST_BARS = 10  # of a soft label; of more classes the likeliest five are drawn
LONG_NAME = 20  # characters of a class's name, from which a browser shows it whole on its own
OPEN_UP_TO = 20  # images whose details are open from the beginning
TABLE_ROWS = 20
COMPARED_PER_CLASS = 3

escape = html.escape


# --- the page ------------------------------------------------------------------------------------------------


def page(run: Run) -> str:
    """The page of one run."""
    config = run.config
    title = f"{config.get('dataset', 'Run')} · {run.name}"
    sections = [("summary", "Summary", _summary(run)), ("images", "Distilled images", _images(run)),
                ("curves", "Curves", _curves(run)), ("options", "Options", _options(run)),
                ("reproduce", "Reproduce", _reproduce(run)), ("machine", "Versions and hardware", _machine_table(run))]
    lead = " · ".join(escape(str(each)) for each in (
        config.get("dataset"), config.get("model"), config and _images_a_class(config.get("ipc")),
        config and f"{config.get('matching')} gradient", run.result["environment"].get("date")) if each)
    return _document(title, f"Distillation run <b>{escape(run.name)}</b>", lead, sections)


def comparison(runs: Sequence[Run]) -> str:
    """The page of several runs side by side."""
    names = _distinct_names(runs)
    lead = " · ".join(map(escape, names))
    sections = [("summary", "Summary", _compared_numbers(runs, names)),
                ("options", "Options that differ", _compared_options(runs, names)),
                ("curves", "Curves", _compared_curves(runs, names)),
                ("images", "Distilled images", _compared_images(runs, names)),
                ("machine", "Versions and hardware", _compared_machines(runs, names))]
    return _document(f"{len(runs)} distillation runs", f"{len(runs)} distillation runs side by side", lead, sections)


def _document(title: str, heading: str, lead: str, sections: list[tuple[str, str, str]]) -> str:
    """A page of named sections. Its policy forbids the browser to fetch anything from anywhere."""
    links = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text, _ in sections)
    body = "".join(f'<section aria-labelledby="{name}"><h2 id="{name}" tabindex="-1">{escape(text)}</h2>\n{content}'
                   "</section>\n" for name, text, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#{sections[0][0]}">Skip to the content</a>
<header><h1>{heading}</h1>
<p>{lead}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>
{body}</main>
</body>
</html>
"""


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table whose cells are HTML; the first of a row is its header. It scrolls sideways where it is too wide."""
    top = "".join(f'<th scope="col">{each}</th>' for each in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{each}</td>" for each in row[1:]) + "</tr>\n"
                   for row in rows)
    return (f'<div class="scroll {kind}" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
            f"<caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
            "\n")


def _image(pixels: Tensor, alt: str) -> str:
    """[C, H, W] uint8 as an `img`; enlarged by the browser, without smoothing."""
    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(array.numpy()).save(file, "png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    height, width = pixels.shape[1:]
    return f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'


def _number(value: Any, form: str = ".4g") -> str:
    return "not recorded" if value is None else f"{float(value):{form}}"


def _facts(run: Run) -> list[tuple[str, str]]:
    """The numbers that a run is judged by, with their units."""
    result, fixed = run.result, run.result["fixed_loss"]
    on = "validation" if result.get("chosen_on") == "validation" else "test"
    steps = len(run.steps)
    networks = "network" if run.best.count == 1 else "networks"
    facts = [(f"Best accuracy on the {on} images", f"{run.best}"),
             ("Measured on", f"{run.best.count} {networks} ({run.best.network})"),
             ("Reached at iteration", f"{run.best.iteration:,}")]
    if run.best_ema:
        facts.append(("Best accuracy of the averaged images (EMA)", str(run.best_ema)))
    loss = "not recorded" if not fixed else f"{_number(fixed.get('before'))} → {_number(fixed.get('after'))}"
    facts += [(f"Matching loss before → after, over {fixed.get('segments', '')} fixed segments", loss),
              ("Learning rate α of the best set", _number(result["best"].get("lr"))),
              ("Skipped updates (loss above the threshold, or not finite)", _share(result.get("skipped"), steps)),
              ("α held back", "not recorded" if "held" not in result else _times(int(result["held"]))),
              ("Time", "not recorded" if "seconds" not in result else duration(float(result["seconds"])))]
    return facts


def _times(count: int) -> str:
    return "never" if count == 0 else "once" if count == 1 else f"{count:,} times"


def _images_a_class(ipc: Any) -> str:
    return f"{ipc} image{'' if ipc == 1 else 's'} a class"


def _share(count: Any, total: int) -> str:
    if count is None:
        return "not recorded"
    return f"{int(count):,}" + (f" of {total:,}" if total else "") + (
        f" ({100 * int(count) / total:.1f} %)" if total and count else "")


def _summary(run: Run) -> str:
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in _facts(run))
    missing = "".join(f"<li>{escape(each)}</li>" for each in run.missing)
    note = f'<div class="note"><p>This folder does not hold:</p><ul>{missing}</ul></div>\n' if missing else ""
    if run.steps and len(run.skipped) == len(run.steps):
        note += '<div class="note"><p>Every update was skipped, so nothing was learned.</p></div>\n'
    return f'<dl class="facts">\n{facts}</dl>\n{note}'


# --- images --------------------------------------------------------------------------------------------------


def _images(run: Run) -> str:
    pictures = run.pictures
    if pictures is None:
        return "<p>There are no pictures in this folder.</p>\n"
    rows = pictures.rows()
    total, shown = pictures.ipc * len(pictures.classes), len(pictures.which)
    parts = ["Images are un-whitened, clipped at ±2.5 standard deviations of the set, and scaled each to its own "
             "range."]
    if pictures.neighbour is not None:
        parts.append("Beside each is its nearest neighbour: of the training images of its class the one that is "
                     "nearest to it in pixels.")
    if pictures.start is not None:
        parts.append(f"Under each: the {'noise' if pictures.noise else 'real image'} that it started from, where it "
                     "became brighter (white) or darker (black; mid grey is no change; one scale for all images) "
                     "with the change's root mean square (1 is the whole range of pixels)"
                     + (". " if pictures.hard else f", and its {_label_words(run, pictures)}."))
    if pictures.hard:
        parts.append("Labels are the classes themselves.")
    if shown < total:
        parts.append(f"Shown are {shown:,} of the set's {total:,} images: {len(next(iter(rows.values())))} of "
                     f"{pictures.ipc} a class, {len(rows)} of {len(pictures.classes)} classes.")
    if pictures.version != "Normal":
        parts.append(f"This is the set {pictures.version}, which scored best.")
    best = run.best_ema if pictures.version == "EMA" and run.best_ema else run.best
    if best.iteration == 0 and pictures.start is not None:
        parts.append("The best set is that of iteration 0, before the first update: these images are those that it "
                     "started from.")
    found = [f"<p>{escape(' '.join(parts))}</p>\n"]
    if pictures.ipc == 1 or max(map(len, rows.values())) == 1:
        cards = "".join(_card(pictures, row, shown <= OPEN_UP_TO, 3) for each in rows.values() for row in each)
        return found[0] + f'<div class="cards{"" if shown <= OPEN_UP_TO else " many"}">\n{cards}</div>\n'
    for number, each in rows.items():
        cards = "".join(_card(pictures, row, shown <= OPEN_UP_TO, 4) for row in each)
        found.append(f'<div><h3>{escape(pictures.classes[number])}</h3>\n<div class="cards many">\n{cards}</div>'
                     "</div>\n")
    kind = "beside" if max(map(len, rows.values())) == 2 else "below"  # so few leave room for another class
    return f'{found[0]}<div class="{kind}">\n{"".join(found[1:])}</div>\n'


def _label_words(run: Run, pictures: Pictures) -> str:
    words = {"soft": "soft label, which was not learned",
             "target": "soft label as the last target expert gave it"}.get(run.config.get("labels"), "soft label")
    moved = pictures.start_labels is not None and not pictures.start_labels.equal(pictures.labels)
    return words + (", in which a mark on a bar is the value at the start" if moved else "")


def _card(pictures: Pictures, row: int, is_open: bool, level: int) -> str:
    """One image, beside its neighbour; folded under it, its start, its change and its label."""
    number, each = divmod(pictures.which[row], pictures.ipc)
    name = pictures.classes[number] + (f", image {each + 1}" if pictures.ipc > 1 else "")
    pair = [(pictures.distilled[row], f"distilled image of class {name}", "distilled")]
    if pictures.neighbour is not None:
        pair.append((pictures.neighbour[row], f"nearest real training image to the distilled image of class {name}",
                     "nearest real"))
    below = []
    if pictures.start is not None and pictures.change is not None:
        kind = "noise" if pictures.noise else "real image"
        rms = float(pictures.rms[row]) if pictures.rms is not None else math.nan
        below = [(pictures.start[row], f"{kind} that the distilled image of class {name} started from",
                  "start, noise" if pictures.noise else "real start"),
                 (pictures.change[row], f"change of class {name} from its start, root mean square {rms:.2f} of the "
                  "pixel range", f"change {rms:.2f}")]
    top = f"<h{level}>{f'Image {each + 1}' if level == 4 else escape(name)}</h{level}>\n"
    opened = " open" if is_open else ""
    bars = "" if pictures.hard else _bars(pictures, row, name)
    words = " and ".join(["start"] * bool(below) + ["label"] * bool(bars)).capitalize()
    details = (f'<details{opened}><summary>{words}<span class="hidden"> of {escape(name)}</span></summary>\n'
               f'{_pair(below) if below else ""}{bars}</details>')
    return f'<article class="card">{top}{_pair(pair)}{details if words else ""}</article>\n'


def _pair(images: list[tuple[Tensor, str, str]]) -> str:
    inside = "".join(f"<figure>{_image(pixels, alt)}<figcaption>{escape(caption)}</figcaption></figure>"
                     for pixels, alt, caption in images)
    return f'<div class="pair">{inside}</div>\n'


def _bars(pictures: Pictures, row: int, name: str) -> str:
    """A soft label as a list of bars: all classes, or of many the likeliest five."""
    label = pictures.labels[row]
    start = None if pictures.start_labels is None else pictures.start_labels[row]
    if start is not None and start.equal(label):
        start = None
    many = len(label) > MOST_BARS
    order = label.argsort(descending=True, stable=True)[:5].tolist() if many else range(len(label))
    items = []
    for number in order:
        now = 100 * float(label[number])
        mark, before = "", ""
        if start is not None:
            then = 100 * float(start[number])
            mark = f'<i style="left:{then:.1f}%"></i>'
            before = f'<span class="hidden"> now, {then:.0f} % at the start</span>'
        own = ' class="own"' if number == pictures.which[row] // pictures.ipc else ""
        title = pictures.classes[number]
        whole = f' title="{escape(title)}"' if len(title) > LONG_NAME else ""
        items.append(f'<li{own}><span{whole}>{escape(title)}</span><span class="bar"><b '
                     f'style="width:{now:.1f}%"></b>{mark}</span><span>{now:.0f} %{before}</span></li>\n')
    rest = f"<p>The other {len(label) - 5} classes: {100 * float(1 - label[order].sum()):.0f} %</p>\n" if many else ""
    return f'<ul class="bars" aria-label="Soft label of {escape(name)}">\n{"".join(items)}</ul>\n{rest}'


def _compared_images(runs: Sequence[Run], names: list[str]) -> str:
    classes = list(dict.fromkeys(name for run in runs if run.pictures for name in run.pictures.classes))
    if not classes:
        return "<p>None of these folders holds pictures.</p>\n"
    seen = [run.pictures for run in runs if run.pictures]
    room = IMAGE_BYTES // (len(classes) * len(runs) * max(each.distilled[0].numel() for each in seen))
    most = max(1, min(COMPARED_PER_CLASS, room, max(each.ipc for each in seen)))

    def figures(run: Run, name: str, run_name: str) -> list[str]:
        """The first images of a class, each with what its label says of it."""
        pictures = run.pictures
        if pictures is None or name not in pictures.classes:
            return []
        found = []
        for each, row in enumerate(pictures.rows().get(pictures.classes.index(name), [])[:most]):
            says = int(pictures.labels[row].argmax())
            image = _image(pictures.distilled[row], f"distilled {name}, image {each + 1} of {run_name}")
            found.append(f"<figure>{image}<figcaption>{escape(pictures.classes[says])} "
                         f"{100 * float(pictures.labels[row, says]):.0f}\N{NO-BREAK SPACE}%</figcaption></figure>")
        return found

    cards = []
    for name in classes:
        body = "".join(f'<div class="of"><p>{escape(each)}</p><div class="pair">'
                       f'{"".join(figures(run, name, each)) or "not shown"}</div></div>'
                       for run, each in zip(runs, names))
        cards.append(f'<article class="card"><h3>{escape(name)}</h3>\n<div class="side">{body}</div></article>\n')
    first = "The first image" if most == 1 else f"The first {most} images"
    note = (f"{first} of each class, un-whitened, clipped at ±2.5 standard deviations; below each the class that its "
            "label holds likeliest. Each run's own report shows more.")
    return f'<p>{note}</p>\n<div class="cards{"" if most == 1 else " wide"}">\n{"".join(cards)}</div>\n'


# --- curves --------------------------------------------------------------------------------------------------


def _curves(run: Run) -> str:
    if not run.steps and not run.scores:
        return "<p>This run recorded no iterations.</p>\n"
    drawn = len(thinned(run.steps))
    note = f"<p>{len(run.steps):,} iterations"
    if drawn < len(run.steps):
        note += f", of which {drawn:,}, evenly spaced, are drawn; averages are over all of them"
    charts = [_loss_chart([run], [run.name]), _accuracy_chart([run], [run.name]), _rate_chart([run], [run.name]),
              _window_chart(run), _skipped_chart([run], [run.name])]
    body = "".join(chart for chart in charts if chart)
    return f'{note}.</p>\n<div class="charts">\n{body}</div>\n{_numbers(run)}'


def _compared_curves(runs: Sequence[Run], names: list[str]) -> str:
    charts = [_loss_chart(runs, names), _accuracy_chart(runs, names), _rate_chart(runs, names),
              _skipped_chart(runs, names)]
    windows = [_window_chart(run, name) for run, name in zip(runs, names)]
    body = "".join(chart for chart in (*charts, *windows) if chart)
    return f'<div class="charts">\n{body}</div>\n' if body else "<p>None of these runs recorded iterations.</p>\n"


def running_mean(steps: Sequence[Step]) -> tuple[int, list[tuple[float, float]]]:
    """Over how many iterations, and the mean loss around each, without the skipped ones; nothing of a short run."""
    if len(steps) < 20:
        return 0, []
    span = max(len(steps) // 50, 5)
    losses = [step.loss if step.updated else 0.0 for step in steps]
    updated = [float(step.updated) for step in steps]
    sums = [torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0) for values in (losses, updated)]
    total, number = (each[span:] - each[:-span] for each in sums)
    means = (total / number).tolist()  # NaN where all were skipped, which is a gap in the line
    return span, [(steps[first + span // 2].iteration, mean) for first, mean in enumerate(means)]


def _loss(step: Step, form: str = ".3g") -> str:
    return "not finite" if math.isnan(step.loss) else f"{step.loss:{form}}"


def _loss_chart(runs: Sequence[Run], names: list[str]) -> str:
    """Every loss and its running mean; of several runs the means alone."""
    alone = len(runs) == 1
    chart = Chart("Matching loss", "iteration", "matching loss")
    spans = []
    for number, (run, name) in enumerate(zip(runs, names)):
        points = [(step.iteration, step.loss if step.updated else math.nan) for step in run.steps]
        span, mean = running_mean(run.steps)
        spans.append(span)
        if alone and mean:
            chart.line(thinned(points), "raw", "each iteration")
        chart.line(thinned(mean if mean else points), f"s{number % 6}",
                   (f"mean over {span}" if mean else "each iteration") if alone else name)
        if alone and run.skipped:
            chart.crosses(thinned([(step.iteration, step.loss) for step in run.skipped]), "bad", "update skipped")
    if chart.empty:
        return ""
    first = runs[0]
    words = ""
    if alone and "threshold" in first.config and isinstance(first.config["threshold"], int | float):
        words = f" Updates whose loss exceeds {first.config['threshold']:g} are skipped"
        words += ", and not in the mean; losses above the scale stand at its upper edge." if first.skipped else "."
    elif not alone:
        means = ", ".join(f"{span} iterations" for span in dict.fromkeys(spans) if span)
        words = f" Running means over {means}." if means else ""
    ends = [f"{name}: " if not alone else "" for name in names]
    described = "; ".join(f"{end}from {_loss(run.steps[0])} to {_loss(run.steps[-1])}"
                          for end, run in zip(ends, runs) if run.steps)
    return chart.figure(f"From the first iteration to the last: {described}.{words}")


def _accuracy_chart(runs: Sequence[Run], names: list[str]) -> str:
    chart = Chart("Accuracy", "iteration", "accuracy, %")
    number, spoken = 0, []
    for run, run_name in zip(runs, names):
        for kind, network in dict.fromkeys((score.set, score.network) for score in run.scores):
            mine = [score for score in run.scores if (score.set, score.network) == (kind, network)]
            name = (network if len(runs) == 1 else f"{run_name}, {network}") + ("" if kind == "Normal" else f", {kind}")
            style = f"s{number % 6}"
            chart.band([(score.iteration, 100 * (score.mean - score.std), 100 * (score.mean + score.std))
                        for score in mine], style)
            points = [(score.iteration, 100 * score.mean) for score in mine]
            chart.line(points, style, name)
            chart.dots(points, style, 2.5)
            spoken.append(f"{name}: last {mine[-1]}")
            number += 1
    if chart.empty:
        return ""
    counts = sorted({score.count for run in runs for score in run.scores})
    over = f"{' or '.join(map(str, counts))} network{'' if counts == [1] else 's'}"
    return chart.figure(f"Mean, and a band of ± one standard deviation, over {over}. {'; '.join(spoken)}.")


def _rate_chart(runs: Sequence[Run], names: list[str]) -> str:
    chart = Chart("Synthetic learning rate α", "iteration", "α")
    spoken = []
    for number, (run, name) in enumerate(zip(runs, names)):
        chart.line(thinned([(step.iteration, step.lr) for step in run.steps]), f"s{number % 6}",
                   name if len(runs) > 1 else "")
        held = [(step.iteration, step.lr) for step in run.steps if step.held]
        if held:
            chart.crosses(thinned(held), "bad", "held back")
        if run.steps:
            prefix = f"{name}: " if len(runs) > 1 else ""
            spoken.append(f"{prefix}from {run.steps[0].lr:.4g} to {run.steps[-1].lr:.4g}")
    return "" if chart.empty else chart.figure(f"After each update: {'; '.join(spoken)}.")


def _window_chart(run: Run, name: str = "") -> str:
    """The allowed start epochs as a band, the drawn ones as dots in it."""
    if not run.steps:
        return ""
    lowest = run.config.get("min_start_epoch", min(step.start_epoch for step in run.steps))
    lowest = lowest if isinstance(lowest, int) else 0
    chart = Chart(f"Difficulty window{f', {name}' if name else ''}", "iteration", "start epoch", whole=True)
    # Half an epoch wider on either side, so that dots lie inside; the bound itself is exclusive.
    chart.band(thinned([(step.iteration, lowest - 0.5, step.bound - 0.5) for step in run.steps]), "window",
               "allowed start epochs", steps=True)
    chart.dots(thinned([(step.iteration, step.start_epoch) for step in run.steps if step.updated]), "s0",
               1.2 if len(run.steps) > 500 else 2.0, "drawn, updated")
    chart.crosses(thinned([(step.iteration, step.start_epoch) for step in run.skipped]), "bad", "drawn, update skipped")
    first, last = run.steps[0].bound - 1, run.steps[-1].bound - 1
    grew = f"{lowest} to {first} at first, {lowest} to {last} at the end" if first != last else f"{lowest} to {last}"
    counts: dict[int, int] = {}
    for step in run.steps:
        counts[step.start_epoch] = counts.get(step.start_epoch, 0) + 1
    drawn = ", ".join(f"{epoch}: {count:,}" for epoch, count in sorted(counts.items())) if len(counts) <= 12 else ""
    return chart.figure(f"Allowed start epochs: {grew}." + (f" How often each was drawn: {drawn}." if drawn else ""))


def _skipped_chart(runs: Sequence[Run], names: list[str]) -> str:
    if not any(run.steps for run in runs):
        return ""
    total = "; ".join((f"{name}: " if len(runs) > 1 else "") + f"{len(run.skipped):,} of {len(run.steps):,}"
                      for run, name in zip(runs, names))
    if not any(run.skipped for run in runs):
        return ('<figure class="chart"><figcaption><h3>Skipped updates</h3>\n'
                f"<p>None was skipped ({escape(total)}).</p></figcaption></figure>\n")
    chart = Chart("Skipped updates", "iteration", "skipped so far", whole=True)
    for number, (run, name) in enumerate(zip(runs, names)):
        count, points = 0, []
        for step in run.steps:
            count += not step.updated
            points.append((step.iteration, count))
        chart.line(thinned(points), f"s{number % 6}", name if len(runs) > 1 else "")
    return chart.figure(f"Skipped: {total}.")


def _numbers(run: Run) -> str:
    """The curves as tables, for those who read numbers or hear them."""
    scores = [[f"{score.iteration:,}", escape(f"{score.set}, {score.network}"), escape(str(score)), str(score.count)]
              for score in run.scores]
    some = numbers_every(run.steps, TABLE_ROWS)
    steps = [[f"{step.iteration:,}", _loss(step, ".4g"), f"{step.lr:.4g}",
              str(step.start_epoch), f"below {step.bound}", "yes" if step.updated else "skipped"] for step in some]
    found = ""
    if scores:
        head = ["iteration", "set and network", "accuracy", "networks"]
        found += ("<details><summary>Accuracies as a table</summary>\n"
                  + _table("Accuracy at each evaluation", head, scores) + "</details>\n")
    if steps:
        found += ("<details><summary>Iterations as a table</summary>\n"
                  + _table(f"{len(some)} of {len(run.steps):,} iterations",
                           ["iteration", "matching loss", "α after it", "start epoch", "window", "updated"], steps)
                  + "</details>\n")
    return found


# --- options, commands, machine ------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """An option's value, as HTML."""
    text = "unset" if value is None or value == "" else str(value)
    return f"<code>{_breakable(text)}</code>"


def _breakable(path: str) -> str:
    """A long path as HTML that a browser may break after each folder."""
    return escape(path).replace("/", "/<wbr>")


def _options(run: Run) -> str:
    if not run.config:
        return "<p>This folder does not hold its options.</p>\n"
    default, help = defaults(DistillConfig), helps(DistillConfig)
    differing = changed(run.config, DistillConfig)

    def row(name: str) -> list[str]:
        return [f"<code>{escape(name)}</code>", _shown(run.config[name]),
                _shown(default[name]) if name in default else "unknown here", escape(help.get(name, ""))]

    rest = [name for name in run.config if name not in differing]
    head = ["option", "this run", "default", "meaning"]
    found = _table(f"{len(differing)} options that differ from the defaults", head, map(row, differing), "options")
    if rest:
        found += (f"<details><summary>The other {len(rest)} options, at their defaults</summary>\n"
                  + _table("Options at their defaults", head, map(row, rest), "options") + "</details>\n")
    return found


def _reproduce(run: Run) -> str:
    found = commands(run)
    if not found:
        return "<p>Without config.yaml the commands are not known.</p>\n"
    steps = "".join(f'<li><p>{escape(what)}:</p><pre tabindex="0" aria-label="{escape(what)}"><code>{escape(text)}'
                    "</code></pre></li>\n" for what, text in found)
    notes = ["In the root of the repository."]
    if not found[0][1].startswith("python buffer/"):
        notes.append("How the experts were trained is not known: " + (
            "their folder holds no manifest." if run.pictures and run.pictures.about else
            "the run did not save it."))
    device = str(run.result["environment"].get("device", ""))
    if device.startswith("cpu"):
        notes.append(f"The same numbers to the bit need the versions below and the same device and threads: {device}.")
    return f"<p>{escape(' '.join(notes))}</p>\n<ol class=\"commands\">\n{steps}</ol>\n"


def _machine_of(run: Run) -> dict[str, str]:
    machine = (run.pictures.about or {}).get("machine", {}) if run.pictures else {}
    return {str(name): str(value) for name, value in (run.result["environment"] | machine).items()}


def _machine_table(run: Run) -> str:
    rows = [[escape(name), escape(value)] for name, value in _machine_of(run).items()]
    return _table("What the run was made with", ["what", "value"], rows) if rows else "<p>Not recorded.</p>\n"


def _compared_machines(runs: Sequence[Run], names: list[str]) -> str:
    machines = [_machine_of(run) for run in runs]
    known = dict.fromkeys(name for machine in machines for name in machine)
    rows = [[escape(name), *(escape(machine.get(name, "not recorded")) for machine in machines)] for name in known]
    return _table("What the runs were made with", ["what", *map(escape, names)], rows)


def _compared_numbers(runs: Sequence[Run], names: list[str]) -> str:
    facts = [dict(_facts(run)) for run in runs]
    known = dict.fromkeys(name for each in facts for name in each)
    rows = [[escape(name), *(escape(each.get(name, "none")) for each in facts)] for name in known]
    rows.append(["Folder", *(f"<code>{_breakable(from_repository(str(run.path)))}</code>" for run in runs)])
    missing = "".join(f"<li>{escape(f'{name}: {each}')}</li>" for run, name in zip(runs, names) for each in run.missing)
    note = f'<div class="note"><p>Not in these folders:</p><ul>{missing}</ul></div>\n' if missing else ""
    return _table("What each run reached", ["what", *map(escape, names)], rows) + note


def _compared_options(runs: Sequence[Run], names: list[str]) -> str:
    known = dict.fromkeys(name for run in runs for name in run.config)
    absent = object()
    different = [name for name in known
                 if any(run.config.get(name, absent) != runs[0].config.get(name, absent) for run in runs)]
    if not different:
        return "<p>All options are the same.</p>\n"
    rows = [[f"<code>{escape(name)}</code>", *(_shown(run.config[name]) if name in run.config else "without effect"
                                               for run in runs)] for name in different]
    return _table("Options that differ between the runs", ["option", *map(escape, names)], rows)


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as much of what is above them as tells them apart."""
    for depth in range(1, max(len(run.path.parts) for run in runs) + 1):
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return names if len(set(names)) == len(names) else [f"{number + 1}: {each}" for number, each in enumerate(names)]
