"""scripts/reproduce.sh: its commands are valid, and a tiny form of it runs, stops, resumes and fills its tables."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import wait_for

from distill.result_files import Best, Evaluation, EvaluationResult, Iteration, RunResult, Score, append_metrics
from scripts import reproduce
from scripts.reproduce import CPU, FULL, PER_FILE, SMALL, Plan, Results, spent, windows, write_tables
from utils.config import BaselineConfig, BufferConfig, DistillConfig, EvaluationConfig
from utils.errors import UserError
from utils.files import REPOSITORY
from utils.program.command_line import parse, read_yaml

CONFIGS = {"buffer_FTD": BufferConfig, "DATM": DistillConfig, "evaluation": EvaluationConfig,
           "baseline": BaselineConfig}
TINY = """
import sys
from pathlib import Path
from scripts import reproduce
root = Path(sys.argv.pop(1))
reproduce.SMALL = reproduce.Form(
    root / "out", "MiniFashion", "ConvNetD1W4", str(root), experts=2, epochs=3,
    windows={"early": (0, 1), "late": (1, 2)}, ideas_at=2, seeds=(0, 1), cross=1,
    cross_lr={"MLP": 0.02}, networks=2, epoch_eval={1: 2, 2: 2}, whole_epochs=1, random_lr=0.01, backend="auto",
    threads=1,
    spent_at={2: (0,)}, experts_tried=(1,), steps_tried=(1,), many=(2, 2))
reproduce.entry(reproduce.main)
"""


@pytest.mark.parametrize("form", [SMALL, CPU, FULL], ids=["small", "cpu", "full"])
def test_every_command_is_one_of_the_programs(form, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    plan = Plan(form, 1)
    runs, epochs = set(), {}
    for step in (step for step in plan.steps if step not in plan.looks.values()):
        program, options = Path(step.command[1]).stem, list(step.command[2:])
        config = parse(CONFIGS[program], "", options, yaml_file=program == "DATM")
        assert config.zca and config.dataset == form.dataset
        assert config.model in (form.model, "MLP", form.wider, *form.cross_lr)
        # Settings are chosen without the test images, which only the last evaluation sees.
        chosen = program in ("buffer_FTD", "DATM") or "random_lr" in step.name
        assert config.val_fraction == (0.1 if chosen else 0)
        if program == "buffer_FTD":
            epochs[config.buffer_path] = config.train_epochs
        if program == "DATM":
            # A change in the YAML makes the result anew.
            assert step.config == read_yaml(options[0].removeprefix("--cfg="), DistillConfig)
            assert config.max_start_epoch - 1 + config.expert_epochs <= epochs[config.buffer_path]
            path = Path(config.log_path) / config.dataset / str(config.ipc) / config.model / config.run_name
            assert Path(step.result) == path.relative_to(REPOSITORY) / "result.json"
            assert path not in runs
            runs.add(path)
    assert len({step.result for step in plan.steps}) == len({step.name for step in plan.steps}) == len(plan.steps)
    rows = {row.name: row for row in plan.rows}  # a row in two tables has one first evaluation
    assert len(rows) == len({row.evaluations[0] for row in plan.rows})


@pytest.mark.parametrize("form", [SMALL, CPU, FULL], ids=["small", "cpu", "full"])
def test_rows_have_the_experts_and_the_inner_steps_that_they_are_shown_at(form):
    plan = Plan(form, 1)
    total, by_experts, by_steps = form.many[0] if form.many else form.experts, *plan.spent.values()
    for ipc, rows in ((ipc, rows) for by_ipc in (by_experts, by_steps) for ipc, rows in by_ipc.items()):
        for amount, row in rows.items():
            (step, *_), everything = row.made_by, by_experts[ipc][total]
            config = parse(DistillConfig, "", list(step.command[2:]), yaml_file=True)
            matched = min(total, (config.max_files or 2) * (config.max_experts or PER_FILE))
            assert row.says == f"experts: {matched}, T: {config.syn_steps}"
            assert amount == (matched if rows is by_experts[ipc] else config.syn_steps)
            assert [need.name for need in step.needs] == ["experts_many" if form.many else "experts_FTD"]
        assert everything in rows.values() and list(rows) == sorted(rows)


def test_the_number_of_ranks_changes_nothing_that_is_asked():
    one, two = Plan(SMALL, 1), Plan(SMALL, 2)
    assert "--nproc_per_node=2" in two.steps[0].command and "torchrun" not in one.steps[0].command
    assert [step.asked for step in one.steps] == [step.asked for step in two.steps]


@pytest.fixture
def tiny(environment, tmp_path):
    """`tiny(*options)`: arguments for subprocess that run the tiny form."""
    for ipc in (1, 2):
        (tmp_path / f"IPC{ipc}.yaml").write_text(
            f"dataset: MiniFashion\nmodel: ConvNetD1W4\nipc: {ipc}\nval_fraction: 0.1\nIteration: 3\neval_it: 2\n"
            "syn_steps: 2\nexpert_epochs: 1\nmax_start_epoch: 2\ncurrent_max_start_epoch: 1\nexpansion_end_epoch: 2\n"
            "num_eval: 1\nepoch_eval_train: 1\nskip_first_eva: True\nthreshold: 1000\ndevice: cpu\n"
            f"buffer_path: {tmp_path}/out/experts/FTD\nlog_path: {tmp_path}/out/logged_files\n")

    def command(*options):
        return {"args": [sys.executable, "-c", TINY, str(tmp_path), "--small", *options], "cwd": REPOSITORY,
                "env": os.environ | environment | {"PYTHONPATH": str(REPOSITORY)}, "text": True}
    return command


def unpadded(path):
    """The text of a file of tables, with the padding of columns reduced to one space."""
    return re.sub(" +", " ", path.read_text())


def test_rows_stop_resume_and_fill_the_tables(tiny, tmp_path):
    only = ("--jobs=2", "--only", "ipc1_window_*", "ipc2_exact")
    began = subprocess.Popen(**tiny(*only), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: list(tmp_path.glob("out/logged_files/**/metrics.jsonl")), began)  # a distillation has begun
    began.send_signal(signal.SIGTERM)
    out, err = began.communicate(timeout=120)
    assert began.returncode == 143 and "Traceback" not in out + err
    experts = tmp_path / "out/experts/FTD/MiniFashion/ConvNetD1W4/replay_buffer_0.pt"
    trained = experts.stat().st_mtime_ns

    done = subprocess.run(**tiny(*only), capture_output=True, timeout=600)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert "buffer_FTD.py" not in done.stdout  # the experts are trained already
    assert experts.stat().st_mtime_ns == trained
    results = tmp_path / "out" / "results"
    accuracies = json.loads((results / "ipc1_window_late.json").read_text())["scores"][0]["accuracies"]
    tables = unpadded(results / "tables.md")
    row = next(line for line in tables.splitlines() if line.startswith("| ipc1_window_late |"))
    said = f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies):.2f}"
    assert f"| {said} | 2 |" in row and "--run_name=window_late" in row
    assert re.search(rf"^ipc1_window_late +ConvNetD1W4: {re.escape(said)} % \(2\)$", done.stdout, re.M)
    # For two distillations, ± is over their means.
    scores = [json.loads((results / f"{name}.json").read_text())["scores"][0]["accuracies"]
              for name in ("ipc2_exact", "ipc2_exact_seed_1")]
    means = 100 * np.mean(scores, axis=1)
    assert f"| exact gradient (DATM) | – | {100 * np.mean(scores[0]):.2f} ± {100 * np.std(scores[0]):.2f} |" in tables
    assert f"| {means.mean():.2f} ± {means.std():.2f} | 2 sets × 2 |" in tables
    assert sum("start_epoch" in line for line in
               (results / "ipc1_window_early.metrics.jsonl").read_text().splitlines()) == 3
    assert {path.name for path in results.glob("*.png")} == {
        "accuracy.png", "windows.png", "spent.png", "ipc2_exact.png"}

    again = subprocess.run(**tiny(*only), capture_output=True, timeout=120)
    assert again.returncode == 0 and "[1 of" not in again.stdout
    assert again.stdout.splitlines() == [line for line in done.stdout.splitlines()
                                         if line.startswith(("ipc", "in "))]

    # Tables of results in another folder; results made by other commands are left out and named.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(results, elsewhere)
    ledger = json.loads((elsewhere / "commands.json").read_text())
    ledger["ipc1_window_early_tested"]["asked"] += " --seed=7"
    (elsewhere / "commands.json").write_text(json.dumps(ledger))
    (elsewhere / "tables.md").unlink()
    there = subprocess.run(**tiny("--tables", "--results", "elsewhere") | {"cwd": tmp_path}, capture_output=True,
                           timeout=120)
    assert there.returncode == 0 and "ipc1_window_early_tested is left out" in there.stderr
    assert row in unpadded(elsewhere / "tables.md")
    assert re.search("^ipc1_window_early +no result$", there.stdout, re.M)
    (elsewhere / "ipc2_exact_seed_1.json").unlink()  # one of the two sets of a row
    fewer = subprocess.run(**tiny("--tables", "--results", str(elsewhere), "--only", "ipc2_exact"), capture_output=True,
                           timeout=120)
    assert fewer.returncode == 0 and "ipc2_exact  ConvNetD1W4: not all of its sets are tested" in fewer.stdout


def test_experts_are_compared_and_a_rate_is_given_to_another_network(tiny, tmp_path):
    done = subprocess.run(**tiny("--jobs=1", "--only", "experts_SGD", "experts_many", "ipc1_exact_mlp_lr",
                                 "--only=ipc1_random_mlp"), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "out" / "results"
    seen = json.loads((results / "experts_SGD.json").read_text())["by_epoch"]
    assert [each["mean"] for each in seen["apart"]] == [0, 0, 0]  # compared with themselves
    tables = unpadded(results / "tables.md")
    assert re.search(r"^\| experts_many \| 0 \| [\d.]+ ± [\d.]+ \| – \|", tables, re.M)  # no experts to compare with
    assert (results / "experts_many.yaml").exists()
    assert f"| experts_SGD | 0 | {100 * seen['test_accuracy'][-1]['mean']:.2f} ± " in tables
    tested = json.loads((results / "ipc1_exact_mlp_lr.json").read_text())
    assert tested["lr"] == pytest.approx(0.02) and tested["config"]["model"] == "MLP"  # not the learned rate
    row = next(line for line in tables.splitlines() if line.startswith("| ipc1_random_mlp |"))
    accuracies = json.loads((results / "ipc1_random_mlp.json").read_text())["scores"][0]["accuracies"]
    assert f"| {100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies):.2f} | 2 |" in row


def test_the_commands_of_a_row_are_listed_and_not_run(tiny, tmp_path):
    done = subprocess.run(**tiny("--list", "--only", "ipc1_exact"), capture_output=True, timeout=60)
    wanted = "buffer/buffer_FTD.py", "distill/DATM.py", "distill/evaluation.py"  # what it needs, itself, its test
    lines = done.stdout.splitlines()
    assert len(lines) == len(wanted) and all(f" {script} --" in line for script, line in zip(wanted, lines))
    assert not (tmp_path / "out").exists()


def test_odd_options(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "SMALL", replace(SMALL, root=tmp_path / "out"))
    for options, words in ((("--only=ipc7*",), "no row fits; the rows are ipc"),
                           (("--only", "ipc1_*", "ipc1_exakt"), "ipc1_exakt: no row fits; did you mean 'ipc1_exact'?"),
                           (("--jobs=0",), "--jobs: '0': give a whole number above 0"),
                           (("--results", "x"), "--tables"), (("--tables", "--results", "nowhere"), "holds no results"),
                           (("--tables",), "holds no results"), (("--tables", "--list"), "not allowed with")):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--small", *options])
        with pytest.raises((UserError, SystemExit)) as refused:
            reproduce.main()
        assert words in f"{refused.value}{capsys.readouterr().err}" and getattr(refused.value, "code", 2) == 2
    assert not (tmp_path / "out").exists()


def test_results_of_the_other_form_are_refused(tmp_path):
    folder = REPOSITORY / "results/FashionMNIST/small"
    elsewhere = shutil.copytree(folder, tmp_path / "small")
    done = subprocess.run([sys.executable, str(REPOSITORY / "scripts/reproduce.py"), "--tables", "--results", "small"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "/small is of this form" in done.stderr
    assert (elsewhere / "tables.md").read_text() == (folder / "tables.md").read_text()


def make_up(rows, folder, network, held_out):
    """Writes results of these rows, with these accuracies on held-out images at iteration 1; returns the ledger."""
    made = {}
    for row in rows:
        (step,), (evaluation,) = row.made_by, row.evaluations
        made |= {each.name: {"asked": each.asked, "config": each.config, "seconds": 0}
                 for each in (step, evaluation, *step.needs)}
        EvaluationResult("distilled images", 10, [Score(network, [0.5, 0.7])], seconds=1).write(
            folder / evaluation.result.name)
        scores = [Score(network, held_out)]
        for line in (*(Iteration(at, 0.5, True, 0.01, 0, 1) for at in (0, 1)), Evaluation(1, scores)):
            append_metrics(folder / f"{step.name}.metrics.jsonl", line)
        RunResult("done", Best(1, 0.01, scores), seconds=240).write(folder / f"{step.name}.run.json")
    (folder / "commands.json").write_text(json.dumps(made))
    return made


def test_a_form_without_some_of_the_tables_reports_what_it_has(tmp_path):
    plan = Plan(CPU, 1)
    rows = [plan.main[1]["exact"], plan.windows[10]["0 – 2"]]
    make_up(rows, tmp_path, "ConvNet", [0.25, 0.35])
    made = Results(plan, tmp_path)
    assert spent(plan, made)["iterations\n(held-out images)"]["1 image per class"] == [
        (1, pytest.approx(30), pytest.approx(5))]
    reproduce.report(plan, rows, made)
    tables = unpadded(tmp_path / "tables.md")
    assert "| exact gradient (DATM) | 60.00 ± 10.00 | – | – |" in tables and "ipc10_window_early | early" in tables
    for absent in ("Apart:", "single ideas", "other networks"):
        assert absent not in tables
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "windows.png", "spent.png"}


def test_results_are_those_that_the_rows_commands_made(tmp_path):
    plan = Plan(SMALL, 1)
    rows = [plan.windows[1]["0 – 2"], plan.windows[1]["6 – 8"], plan.main[1]["exact"],
            *plan.spent["inner steps T"][10].values()]
    made = make_up(rows, tmp_path, "ConvNetW32", [0.25])
    results = Results(plan, tmp_path)
    assert not results.others
    tested = pytest.approx(60), pytest.approx(10)
    assert windows(plan, results) == {"1 image per class": [("0 – 2", *tested), ("6 – 8", *tested)],
                                      "10 images per class": [], "50 images per class": []}
    iterations, experts, steps = spent(plan, results).values()
    assert iterations == {"1 image per class": [(1, 25, pytest.approx(math.nan, nan_ok=True))],
                          "10 images per class": [], "50 images per class": []}
    assert steps == {"1 image per class": [], "10 images per class": [(at, *tested) for at in (5, 10, 20, 40, 80)]}
    assert experts["10 images per class"] == [(10, *tested)]

    for name, text, reader in (("ipc1_window_early.run.json", "{}", write_tables),
                               ("ipc1_window_early.json", '{"scores": [{}]}', lambda *_: Results(plan, tmp_path)),
                               ("ipc1_exact.metrics.jsonl", "5", spent)):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            reader(plan, results)
        (tmp_path / name).write_text(whole)

    # Nothing is shown that depends on experts made by other commands.
    for kind in ("FTD", "many"):
        made[f"experts_{kind}"]["asked"] += " --seed=7"
    (tmp_path / "commands.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match="nothing in .* is of this form"):
        Results(plan, tmp_path)
    for kind in ("FTD", "many"):
        made[f"experts_{kind}"]["asked"] = plan.experts[kind].asked
    made["ipc1_exact"]["asked"] += " --seed=7"
    (tmp_path / "commands.json").write_text(json.dumps(made))
    results = Results(plan, tmp_path)
    assert results.others == ["ipc1_exact_tested"] and results.cell(rows[2]) is None


def table(text):
    """The rows of the first table in `text`, without its head: what each says → its cells."""
    lines = re.search(r"^\|.*\n\|[- |]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1].splitlines()
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {says: cells for says, *cells in rows}


def test_the_pages_have_the_numbers_of_the_results():
    results = REPOSITORY / "results"
    pages = {name: (results / name / "README.md").read_text() for name in (
        ".", "FashionMNIST/gpu", "FashionMNIST/small")}
    # Row → file in results/FashionMNIST; {}: the column's images per class.
    factor, longer, whole = "cpu/ipc{}_factor_2", "../sets/FashionMNIST_ipc{}_T80", "cpu/whole"
    on_gpu = {
        "random real images": "gpu/random_{}", "random real images, with experts' labels": "gpu/random_labels_{}",
        "herded real images, labelled by experts": "gpu/herding_{}",
        "random real images, four in one": "gpu/random_factor2_{}",
        "the same with experts' labels": "gpu/random_factor2_labels_{}", "TESLA's gradient": "gpu/ipc{}_tesla",
        "exact gradient (DATM)": "gpu/ipc{}", "exact gradient, four images in one (`--factor 2`)": "gpu/ipc{}_factor2",
        "the whole training set, 30 epochs, two networks": "gpu/whole"}
    first_page = {
        "random real images": "cpu/ipc{}_random", "herded real images, labelled by experts": "cpu/ipc{}_herding",
        "TESLA's gradient": "cpu/ipc{}_tesla", "exact gradient (DATM)": "cpu/ipc{}_exact",
        "its averaged images (`--ema=True --ema_decay=0.97`)": "cpu/ipc{}_averaged",
        "four images in one (`--factor 2`)": factor, "best set without `--factor`": longer,
        "the whole training set": whole}
    overview = {
        "random real images": "cpu/ipc{}_random", "herded real images, labelled by experts": "cpu/ipc{}_herding",
        "random real images, four in one": "cpu/ipc{}_random_factor_2", "TESLA's gradient": "cpu/ipc{}_tesla",
        "exact gradient (DATM)": "cpu/ipc{}_exact",
        "its averaged images (`--ema=True --ema_decay=0.97`)": "cpu/ipc{}_averaged",
        "exact gradient, four images in one (`--factor=2`)": factor,
        "best set of other runs, without `--factor`": longer,
        "the whole training set, 30 epochs, two networks": whole}
    main = table((results / "FashionMNIST/cpu/tables.md").read_text())
    of_sets = main["real images that experts get right, labelled by them"]
    for text, files in (((REPOSITORY / "README.md").read_text().split("## Results")[1], first_page),
                        (pages["."].split("## Fashion-MNIST")[1], overview), (pages["FashionMNIST/gpu"], on_gpu)):
        for says, cells in table(text).items():
            if says.startswith("published: "):
                name = says.removeprefix("published: ")
                assert cells == [f"{figure}" for figure in reproduce.PUBLISHED[name]]
                continue
            assert any(cells)
            if says.endswith("(five sets)"):
                assert cells == [cell.replace("–", "") for cell in of_sets]
                continue
            for ipc, cell in zip((1, 10, 50), cells, strict=True):
                path = results / f"FashionMNIST/{files[says].format(ipc)}.json"
                assert cell in ("", EvaluationResult.read(path, "").scores[0].percent if path.exists() else ""), says

    number = r"\d+\.\d+ ± \d+\.\d+"
    found: dict[str, list[str]] = {}
    for line in (results / "FashionMNIST/small/tables.md").read_text().splitlines():
        if name := re.match(r"\| (\w[\w.]*) +\|", line):
            found.setdefault(name[1], []).extend(re.findall(number, line))
    lines = [line for line in pages["FashionMNIST/small"].splitlines() if line[:1] == "|" and re.search(number, line)]
    assert len(lines) >= 12
    for line in lines:
        *cells, rows = line.strip("|").split("|")
        at = iter([each for name in re.findall("`(.*?)`", rows) for each in found[name]])
        for quoted in re.findall(number, "|".join(cells)):
            assert quoted in at, f"{quoted} in {line}"  # quoted in this order


def test_headers_and_tables_quote_the_same_figures():
    """The configs' headers quote the same figures as the tables that `reproduce.py` makes."""
    small, configs = REPOSITORY / "results/FashionMNIST/small", REPOSITORY / "configs"
    text = (small / "tables.md").read_text()
    for figures in (*reproduce.PUBLISHED.values(), (reproduce.PUBLISHED_WHOLE,)):
        assert any(all(f"{figure}" in line for figure in figures) for line in text.splitlines()), figures
    random = [(small / f"ipc{ipc}_random.json", configs / f"FashionMNIST/ConvIN_W32/IPC{ipc}.yaml") for ipc in
              reproduce.PUBLISHED_IPCS]
    random.append((REPOSITORY / "results/quickstart/random.json", configs / "MiniFashion/ConvIN/IPC1.yaml"))
    for result, config in random:
        mean = json.loads(result.read_text())["scores"][0]["mean"]
        assert f"To beat: random real images, {100 * mean:.1f} %." in config.read_text(), config
    for ipc, mtt in zip(reproduce.PUBLISHED_IPCS, reproduce.PUBLISHED["MTT, by later papers"]):
        for folder in ("ConvIN", "ConvIN_cpu"):
            header = (configs / f"FashionMNIST/{folder}/IPC{ipc}.yaml").read_text()
            assert f"MTT, {mtt} %" in header and f"{reproduce.PUBLISHED_WHOLE} %" in header
