"""The report of a run: its content, rebuilding it, and how a browser shows it."""

import json
import math
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from browser import CHROMIUM, browser
from helpers import TOY_RUN
from PIL import Image

from distill.distilled_set import DistilledSet
from distill.evaluate.protocols import told_by_set
from distill.report import page as report
from distill.report import page_pictures, svg
from distill.report.classes import predictions
from distill.report.commands import LABELLING, commands
from distill.report.comparison import comparison
from distill.report.frames import MOST_FRAMES, Frames
from distill.report.matplotlib_figures import save_curves
from distill.report.read_run import read_run
from distill.result_files import OF_SET, Evaluation, EvaluationResult, Iteration, Metrics, Score
from utils.config import BufferConfig, DistillConfig, EvaluationConfig, influential
from utils.program import machine
from utils.program.command_line import parse

ROOT = Path(__file__).resolve().parent.parent
VOID = {"meta", "link", "img", "br", "wbr", "source"}
STRANGE = "<script>alert(1)</script>&\"'"


@dataclass
class Element:
    tag: str
    attributes: dict
    parents: list
    text: str = ""


@dataclass
class Page(HTMLParser):
    """A page as a list of elements; asserts that tags are properly nested and closed."""

    source: str
    elements: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self.open = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {[each.tag for each in self.open]}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        element = Element(tag, dict(attrs), [each.tag for each in self.open])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs), [each.tag for each in self.open]))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop().tag == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        for each in self.open:
            each.text += data

    def all(self, *tags):
        return [each for each in self.elements if each.tag in tags]


def check(source):
    """Checks what must hold for every page; returns the parsed page."""
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>") and len(source) < 10_000_000
    assert page.all("html")[0].attributes["lang"] == "en" and page.all("title")[0].text
    levels = [int(each.tag[1]) for each in page.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), "a heading's level is left out"
    assert not page.all("script", "iframe", "object")
    for each in page.elements:
        assert not [name for name in each.attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "data"):
            assert re.match(r"data:|#", each.attributes.get(name, "#")), "a page must not fetch anything"
    assert "url(" not in source and "@import" not in source
    ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    assert len(set(ids)) == len(ids)
    assert all(each.attributes["href"][1:] in ids for each in page.all("a"))
    for image in page.all("img"):
        assert image.attributes["alt"] and int(image.attributes["width"]) and "figure" in image.parents
    for each in page.all("svg"):
        spoken = each.attributes.get("role") == "img" and each.attributes["aria-label"]
        assert spoken or each.attributes["aria-hidden"] == "true"
    assert all(each.attributes["scope"] in ("row", "col") for each in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) and len(page.all("details")) == len(page.all("summary"))
    assert "nan" not in re.findall(r"[a-z]+", "".join(each.attributes["d"] for each in page.all("path")))
    return page


@pytest.fixture(scope="module")
def runs(call, toy, toy_experts, tmp_path_factory):
    """The folders of two finished runs: exact and tesla, two images of three classes each."""
    logs = tmp_path_factory.mktemp("logs")
    for matching in ("exact", "tesla"):
        call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={logs}",
             f"--matching={matching}", f"--run_name={matching}")
    return [logs / TOY_RUN.with_name(name) for name in ("exact", "tesla")]


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of a run's folder, to be damaged."""
    return shutil.copytree(runs[0], tmp_path / "run")


def test_a_run_leaves_its_report(runs):
    page = check((runs[0] / "report.html").read_text())
    assert [each.text for each in page.all("h2")] == [
        "Summary", "Distilled images", "Progress", "Labels", "Curves", "Classes", "Options", "Reproduce",
        "Versions and hardware"]
    # For each of six images: itself, its neighbour, its start and its change. The set at three evaluations, and an
    # animation of it.
    assert len(page.all("img")) == len({each.attributes["alt"] for each in page.all("img")}) == 4 * 6 + 3 + 1
    assert Image.open(runs[0] / "evolution.webp").n_frames == 3
    bars = [each for each in page.all("ul") if each.attributes.get("aria-label", "").startswith("Soft label of")]
    assert len(bars) == 6 and all("details" in each.parents for each in bars)
    assert all(re.findall("red|green|blue", each.text) == ["blue", "green", "red"] for each in bars)
    titles = [each.text for each in page.all("h3") if "figure" in each.parents]
    assert titles == ["Mean soft label of each class", "Matching loss", "Accuracy on test images",
                      "Synthetic learning rate α", "Difficulty window", "Skipped updates", "Accuracy by class",
                      "Confusion matrix"]
    accuracy = next(each.text for each in page.all("figure") if each.text.startswith("Accuracy"))
    assert "the start (real images, expert labels): " in accuracy and "; the experts' mean: " in accuracy
    assert "±" not in accuracy + page.all("dl")[0].text  # over one network
    result = json.loads((runs[0] / "result.json").read_text())
    assert f"{100 * result['best']['scores'][0]['mean']:.2f}" in page.all("dl")[0].text
    table = page.all("table")[-1].text
    assert torch.__version__ in table and "processor" in table
    assert ("commit" in table) == (ROOT / ".git").exists()


def test_it_is_made_again_from_the_folder_alone(call, runs, copied):
    before = (runs[0] / "report.html").read_text()
    (runs[0] / "report.html").unlink()
    assert "report.html (" in call("scripts/report.py", runs[0]).stdout
    assert (runs[0] / "report.html").read_text() == before
    call("scripts/report.py", runs[0], "--out", copied / "other.html")
    assert (copied / "other.html").read_text() == before
    config = copied / "config.yaml"  # of data in a folder whose name is not text
    config.write_text(re.sub("(?m)^data_path: .*", r'data_path: "/caf\\uDCE9"', config.read_text()))
    assert "report.html (" in call("scripts/report.py", copied).stdout
    assert "caf\\udce9" in (copied / "report.html").read_text()


def test_the_picture_of_the_curves_shows_the_loss_as_the_page_does(monkeypatch, tmp_path):
    """The loss of a skipped update is a gap in the line, and is left out of the running mean."""
    steps = [Iteration(at, [0.5, 1e6, math.nan][at % 3], at % 3 == 0, 0.1, 0, 1) for at in range(40)]
    metrics, drawn = Metrics(steps, []), []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    save_curves(tmp_path / "curves.png", metrics, 1.0, "test")
    raw, mean = drawn[0].axes[0].lines
    assert np.nanmax(raw.get_ydata()) == 0.5 and np.isnan(raw.get_ydata()).sum() == 26
    assert list(zip(mean.get_xdata(), mean.get_ydata())) == metrics.running_mean()[1]


def test_neighbours_are_the_nearest_of_the_class(runs, toy_data):
    saved = read_run(runs[0]).pictures
    best = torch.load(runs[0] / "Normal" / "images_zca_best.pt", weights_only=True)
    low, high = best.mean() - 2.5 * best.std(), best.mean() + 2.5 * best.std()
    real = toy_data.space.to_pixels(toy_data.train_images)
    for row, position in enumerate(saved.which):
        distance = (real - best[position].clamp(low, high)).square().sum((1, 2, 3))
        distance[toy_data.train_labels != position // 2] = torch.inf
        nearest = page_pictures.scaled_bytes(real[distance.argmin()][None])[0]
        assert (saved.neighbour[row].int() - nearest.int()).abs().max() <= 1


def test_neighbours_are_found_without_all_pictures(toy_data, monkeypatch):
    """The same as among all pictures, though only NEAR candidates per image are un-whitened."""
    torch.manual_seed(0)
    classes = torch.arange(3).repeat_interleave(5)
    real = toy_data.space.to_pixels(toy_data.train_images)
    torch.testing.assert_close(toy_data.train_energy, (real.flatten(1) - toy_data.space.whitening.mean).square().sum(1))
    images = real[torch.arange(15) * 3] + torch.randn(15, 3, 8, 8)
    other = toy_data.train_labels[None] != classes[:, None]
    expected = real[(torch.cdist(images.flatten(1), real.flatten(1)) + 1000 * other).argmin(1)]
    plain = page_pictures._neighbours(replace(toy_data, train_energy=None), images, classes.tolist())
    seen = []
    invert = type(toy_data.space.whitening).invert
    monkeypatch.setattr(type(toy_data.space.whitening), "invert",
                        lambda self, some: [seen.append(len(some)), invert(self, some)][1])
    found = page_pictures._neighbours(toy_data, images, classes.tolist())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=0)
    assert sum(seen) == 15 * page_pictures.NEAR


def test_the_commands_mean_the_same_run(runs, tmp_path):
    """The commands on the page give the options of the run and of its experts."""
    run = read_run(runs[1])
    (_, experts), (_, distil), (_, evaluation), (_, again) = commands(run)
    text = re.search(r"<<'END'\n(.*)END\n", distil, re.DOTALL)[1]
    (tmp_path / "again.yaml").write_text(text)
    made = parse(DistillConfig, "", ["--cfg", str(tmp_path / "again.yaml")], yaml_file=True)
    assert yaml.safe_load(yaml.safe_dump(influential(made))) == run.config
    assert set(yaml.safe_load(text)) >= {"matching", "ipc", "threshold"} and "lr_lr" not in text
    assert "distill/DATM.py --cfg=again.yaml --run_name=tesla_again --device=cpu" in distil
    words = experts.replace("\\\n", " ").split()
    assert words[:2] == ["python", "buffer/buffer_FTD.py"]
    made = parse(BufferConfig, "", words[2:])
    assert (made.num_experts, made.train_epochs, made.lr_teacher, made.zca) == (3, 3, 0.1, True)
    words = evaluation.replace("\\\n", " ").split()
    assert words[2:] == [f"--data_dir={runs[1]}", f"--json={runs[1] / 'evaluation.json'}", "--num_eval=5",
                         "--epoch_eval_train=1", "--batch_train=256"]
    made = parse(EvaluationConfig, "", words[2:], known=told_by_set)
    assert (made.dataset, made.model, made.res, made.zca) == ("ImageFolder", "ConvNetD1W4", 8, True)
    assert again == f"python scripts/report.py {runs[1]}"


def test_experts_of_several_folders_are_trained_there_and_gathered(runs):
    run = read_run(runs[1])
    (made,) = run.pictures.experts
    experts = [made | {"buffer_path": f"b/parts/{seed}", "seed": seed} for seed in (0, 1)]
    told = commands(replace(run, pictures=replace(run.pictures, experts=[*experts, made | {LABELLING: True}])))
    assert [what for what, _ in told[:4]] == ["Train the experts", "Train more experts", "Put them into one folder",
                                              "Train the experts that label the first images"]
    assert ["--buffer_path=b/parts/0" in told[0][1], "--buffer_path=b/parts/1" in told[1][1]] == [True, True]
    assert told[2][1] == "BUFFERS=b bash scripts/datm.slurm gather"
    told = commands(replace(run, pictures=replace(run.pictures, experts=experts[:1])))  # one part, gathered
    assert f"--buffer_path={run.config['buffer_path']}" in told[0][1] and "gather" not in told[1][1]


def test_images_are_called_un_whitened_where_they_were_whitened(runs):
    run = read_run(runs[0])
    plain = replace(run, config=run.config | {"zca": False})
    assert "un-whitened" in report.page(run) and "un-whitened" in comparison([run, run])
    assert "un-whitened" not in report.page(plain) and "un-whitened" not in comparison([plain, plain])


def test_infinity_survives_the_commands(copied, tmp_path):
    config = yaml.safe_load((copied / "config.yaml").read_text()) | {"threshold": float("inf")}
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    text = re.search(r"<<'END'\n(.*)END\n", commands(read_run(copied))[1][1], re.DOTALL)[1]
    (tmp_path / "again.yaml").write_text(text)
    assert parse(DistillConfig, "", ["--cfg", str(tmp_path / "again.yaml")], yaml_file=True).threshold == float("inf")


def test_runs_are_compared(call, runs, tmp_path):
    call(ROOT / "scripts/report.py", *runs, cwd=tmp_path)
    page = check((tmp_path / "comparison.html").read_text())
    refusal = call("scripts/report.py", *runs, f"--out={runs[0]}/report.html", expect=2).stderr
    assert "is the page of one run; give another file" in refusal
    assert len(page.all("img")) == 2 * 2 * 3
    assert "update skipped" not in page.source and "Running means" not in page.source
    different = page.all("table")[1].text
    assert "matching" in different and "exact" in different and "tesla" in different and "ipc" not in different
    assert [each.text for each in page.all("th")][:3] == ["what", "exact", "tesla"]
    # Giving the dataset's own size is no difference, neither between runs nor from the default.
    one, other = (replace(run, config=run.config | {"dataset": "MNIST", "res": res, "matching": "exact"})
                  for run, res in zip(map(read_run, runs), (28, None)))
    assert "All options are the same." in comparison([one, other])
    assert "<code>res</code>" not in report.page(one).split('id="options"')[1].split("</table>")[0]


def test_what_is_strange_is_escaped(copied):
    """Names of folders, options, classes and machines are shown as text, never as markup."""
    strange = copied.rename(copied.parent / STRANGE.replace("/", "_"))
    config = yaml.safe_load((strange / "config.yaml").read_text())
    (strange / "config.yaml").write_text(yaml.safe_dump(config | {"dataset": STRANGE, STRANGE: STRANGE}))
    result = json.loads((strange / "result.json").read_text())
    result["environment"]["device"] = STRANGE
    result["best"]["scores"][0]["network"] = STRANGE
    (strange / "result.json").write_text(json.dumps(result))
    metrics = (strange / "metrics.jsonl").read_text().replace('"ConvNetD1W4"', json.dumps(STRANGE))
    (strange / "metrics.jsonl").write_text(metrics)
    run = read_run(strange)
    object.__setattr__(run.pictures, "classes", (STRANGE, "b", "c"))
    assert "<b>" in report.page(run) and "<script" not in report.page(run) + comparison([run, run])
    page = check(report.page(run))
    check(comparison([run, run]))
    assert page.all("h3")[0].text == STRANGE


def test_a_folder_says_what_it_lacks(call, copied):
    (copied / "report.safetensors").unlink()
    call("scripts/report.py", copied)
    page = check((copied / "report.html").read_text())
    assert "does not hold" in page.source and "report.safetensors: the images" in page.source
    for name in ("config.yaml", "metrics.jsonl"):
        (copied / name).unlink()
    call("scripts/report.py", copied)
    assert not check((copied / "report.html").read_text()).all("img")


@pytest.mark.parametrize(("name", "content", "message"), [
    (None, None, "is not a folder"),
    ("result.json", b"{", "result.json is damaged"),
    ("result.json", b"[]", "result.json is damaged"),
    ("config.yaml", b"]", "config.yaml is damaged"),
    ("metrics.jsonl", b'{"iteration": 0, "start_epoch": []}\n', "metrics.jsonl is damaged"),
    ("metrics.jsonl", b"\xff\xfe", "metrics.jsonl is damaged"),
    ("metrics.jsonl", b"7\n", "metrics.jsonl is damaged"),
    ("metrics.jsonl", b'{"iteration": 0, "lo', "metrics.jsonl is damaged"),
    ("report.safetensors", b"nothing", "report.safetensors is damaged"),
])
def test_bad_folders_are_one_line(call, copied, name, content, message):
    folder = copied / "none" if name is None else copied
    if name:
        (copied / name).write_bytes(content)
    done = call("scripts/report.py", folder, expect=2)
    assert done.stderr.startswith("report.py: error: ") and message in done.stderr and done.stderr.count("\n") == 1


def page_of(folder, **others):
    """The page of a run, with some fields of its pictures replaced."""
    run = read_run(folder)
    return check(report.page(replace(run, pictures=replace(run.pictures, **others))))


def test_labels_that_are_classes_have_no_bars(runs):
    classes = torch.eye(3).repeat_interleave(2, 0)
    page = page_of(runs[0], labels=classes, start_labels=classes)
    assert "Labels are the classes themselves" in page.source and not page.source.count('aria-label="Soft label of ')
    assert "Mean soft label" not in page.source
    assert {each.text.split(" of ")[0] for each in page.all("summary")[:6]} == {"Start"}


def test_labels_that_stayed_have_no_marks(runs, copied):
    labels = read_run(runs[0]).pictures.start_labels
    assert 'style="left:' in page_of(runs[0]).source and "a mark on a bar" in page_of(runs[0]).source
    config = yaml.safe_load((copied / "config.yaml").read_text()) | {"labels": "soft"}
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    page = page_of(copied, labels=labels)
    assert "which was not learned" in page.source and page.source.count('aria-label="Soft label of ') == 6
    assert 'style="left:' not in page.source and "a mark on a bar" not in page.source


def test_a_run_that_learned_nothing_says_so(copied):
    lines = [{"iteration": number, "loss": 2 + number, "updated": False, "held": False, "lr": 0.01,
              "start_epoch": 0, "bound": 1} for number in range(3)]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = json.loads((copied / "result.json").read_text())
    result["best"]["iteration"] = 0
    (copied / "result.json").write_text(json.dumps(result))
    page = check(report.page(read_run(copied)))
    assert "Every update was skipped: the matching loss" in page.source and "--lr_teacher auto" in page.source
    assert "iteration 0, before the first update" in page.source
    loss = next(each for each in page.all("figure") if each.text.startswith("Matching loss"))
    assert "update skipped" in loss.text and "each iteration" not in loss.text


def unfinished(folder):
    """Changes a run's folder to how it was after three of four iterations, with every update skipped."""
    (folder / "result.json").unlink()
    lines = [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
             if line["iteration"] < 3]
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps(line | ({"updated": False} if "loss" in line else {})) + "\n" for line in lines))
    return folder


def test_an_unfinished_run_has_its_page(call, copied):
    unfinished(copied)
    with (copied / "metrics.jsonl").open("a") as log:
        log.write('{"iteration": 3, "lo')  # a line that is being written
    call("scripts/report.py", copied)
    page = check((copied / "report.html").read_text())
    note, skipped = [each.text for each in page.all("div") if each.attributes.get("class") == "note"]
    assert "not finished: this is how it was at iteration 3 of 4 (75 %), 20" in note
    assert "Every update was skipped so far: the matching loss" in skipped
    assert len(page.all("img")) == 4 * 6 + 3 + 1 and "Evaluate the best set" not in page.source
    check(comparison([read_run(copied)] * 2))
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(line for line in lines if "scores" not in line))
    assert "was not evaluated yet" in call("scripts/report.py", copied, expect=2).stderr


def of_many_classes(folder):
    """A run whose labels and scores are replaced by those of a hundred classes and three networks."""
    run = read_run(folder)
    names, counts = tuple(f"class number {number}" for number in range(100)), torch.eye(100).long() * 7
    counts[12, 98] = 5
    label = torch.eye(100)[:6]
    score = Score("ConvNet", [0.5, 0.6, 0.7], counts.tolist())
    pictures = replace(run.pictures, classes=names, labels=label, start_labels=label.roll(1, 0),
                       means=torch.full((100, 100), 0.005) + torch.eye(100) * 0.5)
    return replace(run, pictures=pictures, metrics=Metrics(run.metrics.iterations, [Evaluation(4, [score])]))


def test_a_hundred_classes_stay_readable(runs):
    source = report.page(of_many_classes(runs[0]))
    page = check(source)
    assert "Most frequent confusions: class number 12 mistaken for class number 98: 42 %." in source
    assert "by 3 ConvNet networks" in source
    best = read_run(runs[0]).result.best.iteration
    for last, which in ((best, "that of the best set"), (best + 1, f"not that of the best set, iteration {best}")):
        run = of_many_classes(runs[0])
        run.metrics.evaluations[0] = replace(run.metrics.evaluations[0], iteration=last)
        assert f"at the last evaluation (iteration {last}, {which}) by 3" in report.page(run)
    assert "The 5 best and the 5 worst of 100 classes" in source
    assert "± one standard deviation, over 3 networks" in source
    rows = [each for each in page.all("table") if each.text.startswith("Accuracy by class")]
    assert "13: class number 12" in rows[0].text and rows[0].text.count(": class number") == 100
    # A comparison shows the classes of which there are pictures, not the other 97.
    both = check(comparison([of_many_classes(folder) for folder in runs]))
    assert len(both.all("article")) == 3 and "not shown" not in both.source
    # The confusion map is one picture for any number of classes, with few numbers beside it.
    (map_,) = [each for each in page.all("svg") if each.attributes.get("aria-label", "").startswith("Confusion matrix")]
    assert len(re.findall(r"\d+", map_.text)) < 30 and len(source) < 500_000


def test_results_that_a_page_does_not_show_are_named_with_the_reason(copied):
    best = read_run(copied).result.better[1]

    def put(name, what=OF_SET, network="ConvNetD1W4", accuracies=(0.5,), **others):
        EvaluationResult(what, 6, [Score(network, list(accuracies))], lr=best.lr, images_sha256=best.images_sha256,
                         config=read_run(copied).config | others).write(copied / f"{name}.json")

    put("evaluation")
    put("evaluation_again", accuracies=(0.5, 0.7))  # the same test with a network more
    put("hard", f"{OF_SET} with hard labels")
    put("other_network", "2 random real images per class", "ConvNetD1W8")
    put("whole", "the whole training set")
    run = read_run(copied)
    assert [result.scores[0].accuracies for result in run.tests] == [[0.5, 0.7]]
    assert run.left_out == [f"{name}; see scripts/summary.py" for name in (
        "evaluation.json, distilled images: the same test as another file's",
        "hard.json, distilled images with hard labels: not trained as the run's own networks",
        "other_network.json, 2 random real images per class: another network",
        "whole.json, the whole training set: not as many images")]


def test_real_images_are_compared_with_where_their_results_lie_in_the_folder(call, copied, runs, toy, toy_experts):
    """In the numbers of the page and of a comparison; several seeds give one mean."""
    def reached(name, *options):
        call("distill/baseline.py", *toy.common, "--ipc=2", "--epoch_eval_train=1", "--num_eval=1", *options,
             f"--json={copied}/{name}.json")
        return 100 * json.loads((copied / f"{name}.json").read_text())["scores"][0]["mean"]

    reached("other_training", "--no_aug", "--lr_teacher=0.00001")  # not shown: trained in another way
    kinds = {"random real images": [reached("results_random")], "herded real images with expert labels": [
        reached(f"herding_{seed}", "--pick=herding", f"--buffer_path={toy_experts}", f"--seed={seed}")
        for seed in (0, 1)]}
    page, side = report.page(read_run(copied)), comparison([read_run(copied), read_run(runs[1])])
    for kind, levels in kinds.items():
        assert f"{kind}: {np.mean(levels):.2f} %" in page
        assert all(re.search(rf"The same number of {kind}, tested on test images<[^0-9]*{np.mean(levels):.2f}\D",
                             source)
                   for source in (page, side))
    # A result with more networks of the same seed holds those again.
    both = reached("more", "--num_eval=2")
    assert f"random real images: {both:.2f} " in report.page(read_run(copied))
    (copied / "more.json").unlink()
    # What is left out is said; batches that take the whole set are alike.
    call("distill/baseline.py", *toy.common, "--ipc=2", "--epoch_eval_train=1", "--num_eval=1", "--batch_train=7",
         f"--json={copied}/whole_set.json")
    call("distill/baseline.py", *toy.common, "--ipc=2", "--epoch_eval_train=1", "--num_eval=1", "--batch_train=5",
         f"--json={copied}/less.json")
    assert call("scripts/report.py", copied).stderr.splitlines() == [
        f"note: not shown beside the run: {name}.json, 2 random real images per class: {unlike}; see "
        "scripts/summary.py" for name, unlike in (
            ("less", "batch_train (5 there, 256 here)"), ("other_training", "no_aug (True there, False here)"))]
    # Where held-out images chose the set, real images tested on the test images stand beside its test, not its curve.
    config = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump(config | {"val_fraction": 0.1}))
    chosen = json.loads((copied / "result.json").read_text()) | {"chosen_on": "validation"}
    (copied / "result.json").write_text(json.dumps(chosen))
    page = report.page(read_run(copied))
    assert "The same number of random real images, tested on test images<" in page
    assert "; random real images: " not in page
    (copied / "result.json").write_text(json.dumps(chosen | {"chosen_on": "test"}))
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    # The dataset's own size counts as the same, given or not.
    result = json.loads((copied / "results_random.json").read_text())
    result["config"] |= {"dataset": "MNIST", "res": 28}
    (copied / "results_random.json").write_text(json.dumps(result))
    config = yaml.safe_load((copied / "config.yaml").read_text()) | {"dataset": "MNIST", "res": None}
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    assert "random real images: " in report.page(read_run(copied))
    config |= {"epoch_eval_train": 2}  # another training
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    assert "random real images: " not in report.page(read_run(copied))


def test_a_test_of_the_set_is_shown(call, copied, toy):
    call("distill/evaluation.py", *toy.evaluate, f"--data_dir={copied}", f"--json={copied}/evaluation.json")
    score = json.loads((copied / "evaluation.json").read_text())["scores"][0]
    label = "Test by evaluation.py on test images, ConvNetD1W4, 2 epochs"
    assert dict(report.facts(read_run(copied)))[label].replace("\N{NO-BREAK SPACE}", " ") == (
        f"{100 * score['mean']:.2f} %, 1 network")
    # Averaged images may have the same rate, and are told apart by their checksum.
    result = json.loads((copied / "evaluation.json").read_text())
    (copied / "evaluation.json").write_text(json.dumps(result | {"images_sha256": "0" * 64}))
    assert not read_run(copied).tests
    result = json.loads((copied / "evaluation.json").read_text())
    (copied / "evaluation.json").write_text(json.dumps(result | {"lr": 2 * result["lr"]}))  # of another set
    assert label not in dict(report.facts(read_run(copied)))


def test_a_test_of_another_set_is_called_so(call, copied, toy):
    """Such as what a run had reached before it was extended."""
    call("distill/evaluation.py", *toy.evaluate, f"--data_dir={copied}", f"--json={copied}/evaluation.json")
    assert "not this run's best" not in call("scripts/summary.py", copied).stdout
    result = json.loads((copied / "evaluation.json").read_text()) | {"images_sha256": 64 * "0"}
    (copied / "evaluation.json").write_text(json.dumps(result))
    assert "| distilled images (not this run's best) |" in call("scripts/summary.py", copied).stdout
    (copied / "evaluation.json").write_text(json.dumps(result | {"images_sha256": None}))  # of an earlier version
    assert len(read_run(copied).tests) == 1
    (copied / "result.json").unlink()  # which set is the best one is not known yet
    assert not read_run(copied).tests


def test_every_test_of_the_set_is_told_apart_beside_other_runs_too(call, copied, runs, toy):
    """Networks, training and images are in its label; repetitions of one test share a row."""
    test = ["distill/evaluation.py", *toy.evaluate, f"--data_dir={copied}"]
    for number, options in enumerate(([], ["--eval_mode=C", "--no_aug"], ["--batch_train=1"], ["--seed=1"],
                                      ["--val_fraction=0.1"])):
        call(*test, *options, f"--json={copied}/test_{number}.json")
    side = comparison([read_run(copied), read_run(runs[1])])
    of_all = [score for number in range(5)
              for score in json.loads((copied / f"test_{number}.json").read_text())["scores"]]
    assert len(of_all) > 5
    for page, count in ((report.page(read_run(copied)), len(of_all)), (side, len(of_all) - 1)):  # two seeds are alike
        rows = re.findall(r"Test by evaluation\.py on ([^<]*)<", page)
        assert len(rows) == count
        assert {"test images, ConvNetD1W4, 2 epochs", "test images, ConvNetD1W4, 2 epochs, batch_train 1",
                "held-out images, ConvNetD1W4, 2 epochs",
                "test images, ConvNetD1W4, 2 epochs, no_aug True"} <= set(rows)


def test_where_averaged_images_are_better_the_numbers_are_theirs(copied):
    run = read_run(copied)
    better = replace(run.result.best, iteration=3, lr=0.125, scores=[Score("ConvNetD1W4", [0.987])])
    told = dict(report.facts(replace(run, result=replace(run.result, best_ema=better))))
    assert re.fullmatch(r"98\.7.*, averaged images \(EMA\)", told["Best accuracy on the test images"])
    assert told["Reached at iteration"] == "3" and told["Learning rate α of the best set"] == "0.125"
    assert told["Best accuracy of the images as they are"] == dict(report.facts(run))[
        "Best accuracy on the test images"]


def test_frames_are_few_and_even_however_long_the_way(toy_data):
    frames = Frames()
    distilled = DistilledSet(toy_data.train_images[:30], toy_data.train_labels[:30], torch.tensor(0.01))
    for iteration in range(0, 5010, 10):
        frames.add(iteration, distilled, toy_data)
    assert len(frames.images) == len(frames.iterations) == MOST_FRAMES
    assert (frames.iterations[0], frames.iterations[-1]) == (0, 5000)
    gaps = np.diff(frames.iterations)
    assert gaps.max() <= 4 * gaps.min() and frames.images[0].shape == (9, 3, 8, 8)  # three of each class


def test_changes_are_computed_before_clipping(toy_data, tmp_path):
    start = DistilledSet(toy_data.train_images[:6], torch.zeros(6, 3), torch.tensor(0.01))
    pixels = toy_data.space.to_pixels(start.images)
    pixels[0, 0, 0, 0] += 10  # beyond the range that a page shows
    best = replace(start, images=toy_data.space.from_pixels(pixels))
    page_pictures.save_pictures(tmp_path / "p", toy_data, start, best, "Normal", "real", Frames(), [], [])
    rms = page_pictures.Pictures.read(tmp_path / "p").rms
    assert rms[0] == pytest.approx(10 / math.sqrt(3 * 8 * 8), rel=0.01) and rms[1:].max() < 0.01


def test_outside_a_clone_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    assert machine.commit.__wrapped__() is None
    (tmp_path / ".git").mkdir()  # not a valid repository
    assert machine.commit.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit.__wrapped__() is None  # without git


def test_numbers_at_an_axis_are_not_cut():
    chart = svg.Chart("Rate", "α")
    chart.line([(0, 0.00985), (1, 0.01)], "s0")
    ends = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]+)<', chart.figure(""))
    assert any(text == "0.00995" for _, text in ends)
    # At a font size of 12 pixels a digit is 7 pixels wide; the axis' own label ends at x = 18.
    assert all(float(x) - 7 * len(text) > 18 for x, text in ends)


@pytest.mark.parametrize(("num_classes", "ipc", "size"), [
    (10, 1, 784), (10, 50, 3072), (100, 50, 3072), (200, 10, 12288), (10, 10, 3 * 128 * 128), (1000, 50, 12288)])
def test_large_sets_are_thinned(num_classes, ipc, size):
    which = page_pictures.chosen(num_classes, ipc, size)
    assert len(set(which)) == len(which) > 0 and max(which) < num_classes * ipc
    # Assuming no compression: image, neighbour and start in full, the change in one channel.
    assert len(which) * (3.4 * size * 4 / 3 + 3000) < 9_000_000
    assert num_classes > 100 or len({each // ipc for each in which}) == num_classes


def test_long_runs_are_thinned(copied):
    lines = [{"iteration": number, "loss": None if number % 50 == 3 else 0.5, "updated": number % 50 != 3,
              "held": False, "lr": 0.01, "start_epoch": number % 7, "bound": 8} for number in range(9000)]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = report.page(read_run(copied))
    page = check(source)
    assert "9,000 iterations, of which 2,000, evenly spaced, are drawn" in source
    assert max(len(re.findall("[ML]", each.attributes["d"])) for each in page.all("path")) <= 4 * svg.MOST_POINTS
    skipped = [each for each in page.all("path") if each.attributes["class"] == "crosses bad"]
    assert len(re.findall("M", skipped[0].attributes["d"])) == 180


def test_classes_whose_names_are_alike_when_shortened_have_numbers_and_a_bar_each():
    names = ["a very long class name 1", "a very long class name 2"]
    drawn = predictions(Score("ConvNet", [0.5], [[3, 1], [2, 2]]), names, 4, 4)
    assert drawn.count('<span title="a very long class name') == 2 and "best and the" not in drawn
    assert "Classes by their numbers." in drawn and "1: a very long class name 1" in drawn


@pytest.mark.parametrize("losses", [[], [0.5], [None] * 30, [0.0] * 30, [1e-9, 1e9, None] * 10, [-1.0, 2.0] * 20])
def test_any_losses_can_be_drawn(copied, losses):
    lines = [{"iteration": number, "loss": loss, "updated": loss is not None, "held": loss is None, "lr": 0.0,
              "start_epoch": 0, "bound": 1} for number, loss in enumerate(losses)]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    check(report.page(read_run(copied)))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_it(call, runs, copied, tmp_path):
    """Narrow and wide, light and dark: nothing wider than the screen, no errors, no requests. Also by keyboard."""
    call(ROOT / "scripts/report.py", *runs, cwd=tmp_path)
    (tmp_path / "many.html").write_text(report.page(of_many_classes(runs[0])))
    call(ROOT / "scripts/report.py", unfinished(copied), cwd=tmp_path)
    paper = set()
    with browser() as tab:
        for path in (runs[0] / "report.html", tmp_path / "comparison.html", tmp_path / "many.html",
                     copied / "report.html"):
            for width, dark in ((1280, False), (390, False), (1280, True), (390, True)):
                tab.open(path.as_uri(), width, dark=dark)
                assert tab.run("document.documentElement.scrollWidth") <= width
                assert tab.run("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
                # The text and images of a chart stay within it.
                assert tab.run("""[...document.querySelectorAll('.chart svg[role]')].every(svg => {
                    const box = svg.getBoundingClientRect()
                    return [...svg.querySelectorAll('text, image')].every(each => {
                        const own = each.getBoundingClientRect()
                        return own.left >= box.left - 1 && own.right <= box.right + 1 && own.top >= box.top - 1 &&
                            own.bottom <= box.bottom + 1 }) })"""), (path, width)
                # The tables of options need no scrolling sideways, even on a phone.
                assert tab.run("[...document.querySelectorAll('.options')].every(each => "
                               "each.scrollWidth <= each.clientWidth)")
                paper.add((dark, tab.run("getComputedStyle(document.body).backgroundColor")))
                requests = {event["params"]["request"]["url"] for event in tab.events
                            if event["method"] == "Network.requestWillBeSent"}
                assert {url for url in requests if not url.startswith("data:")} == {path.as_uri()}
                complaints = [event for event in tab.events if event["method"] in
                              ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")]
                assert not complaints
        assert len(paper) == 2  # one colour in light, one in dark

        tab.open((runs[0] / "report.html").as_uri())
        assert tab.run("document.images.length") == 4 * 6 + 3 + 1
        assert tab.run("document.querySelectorAll('.strip img').length") == 3
        moving = "document.querySelector('.moving img').currentSrc.slice(0, 15)"
        assert tab.run(moving) == "data:image/webp"
        tab("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
        until = time.monotonic() + 10
        while tab.run(moving) != "data:image/png;":  # with reduced motion, a still image is shown
            assert time.monotonic() < until
        tab.run("document.querySelectorAll('details').forEach(each => { each.open = false })")
        seen = []
        while "SUMMARY" not in seen:
            tab.press("Tab")
            seen.append(tab.run("document.activeElement.tagName"))
            assert len(seen) < 30
        assert seen[0] == "A" and tab.run("document.querySelectorAll('details[open]').length") == 0
        tab.press("Enter")
        assert tab.run("document.activeElement.parentElement.open") is True
        names = [node["name"]["value"] for node in tab("Accessibility.getFullAXTree")["nodes"]
                 if node.get("role", {}).get("value") in ("image", "img") and not node["ignored"]]
        assert len(names) >= 2 * 6 + 4 and all(names)
