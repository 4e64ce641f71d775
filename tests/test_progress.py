"""What the programs show on a terminal of 80 columns, in a pipe and with --quiet; what they say to type next works."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from tqdm.utils import disp_len

from distill import plan
from utils.config import BufferConfig, DistillConfig, influential, make
from utils.files import REPOSITORY
from utils.program import progress
from utils.program.console import duration, short_count
from utils.program.progress import Pace, Progress

BUFFER, DATM, EVALUATION, BASELINE = ("buffer/buffer_FTD.py", "distill/DATM.py", "distill/evaluation.py",
                                      "distill/baseline.py")


@pytest.fixture
def clock(monkeypatch):
    """A list of one number, the time."""
    now = [0.0]
    monkeypatch.setattr(progress, "perf_counter", lambda: now[0])
    return now


# --- the pace and the time left ------------------------------------------------------------------------------


def test_neither_the_first_step_nor_a_pause_counts(clock):
    pace = Pace()
    assert pace.seconds is None and not pace.sure
    for done in range(1, 6):
        clock[0] += 100 if done == 1 else 2
        pace.reached(done)
        assert pace.seconds == (None if done == 1 else 2)
        with pace.pause():
            clock[0] += 1000
            assert pace.paused_for == 1000
    assert pace.sure and pace.paused_for == 0


def test_the_pace_is_that_of_the_last_steps_and_counts_parts(clock):
    pace = Pace()
    for step in range(400):
        clock[0] += 5 if step < 200 else 1
        pace.reached((step + 1) / 2)
    assert pace.seconds == pytest.approx(2)


@pytest.mark.parametrize("seconds, later, said", [(2, 60, ["1 min 12 s"]), (30, 0, ["4 min 0 s"]), (3, 0, [])])
def test_what_is_to_be_expected_is_said_once_where_it_matters(clock, capsys, seconds, later, said):
    """Of 100 steps, 90 done before; three that count, or five seconds of them, decide."""
    with Progress(100, "test", initial=90, later=lambda: later, device=torch.device("cpu")) as bar:
        for _ in range(10):
            clock[0] += seconds
            bar.update()
    assert re.findall(r"to be expected: about (.*) more, [\d.]+ GB of memory so far", capsys.readouterr().out) == said


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("iterations", [0, 1, 4, 5, 9])
def test_evaluations_to_come_are_those_that_the_loop_makes(iterations, skip):
    config = make(DistillConfig, Iteration=iterations, eval_it=4, skip_first_eva=skip)
    for begin in range(iterations + 1):
        made = [each for each in range(begin, iterations + 1) if plan.is_evaluated(config, each)]
        assert plan.evaluations(config, begin) == len(made) >= 1


def test_numbers_and_durations_are_short():
    assert [short_count(number) for number in (0.0421, 8.13, 81.3, 812.4, 12345, 1.2e6)] == [
        "0.042", "8.1", "81", "812", "12.3k", "1.20M"]
    assert [duration(seconds) for seconds in (0.034, 42, 200, 11700, 190000)] == [
        "0.034 s", "42 s", "3 min 20 s", "3 h 15 min", "2 days 4 h"]


# --- the line ------------------------------------------------------------------------------------------------


LINES = {  # description, count, percent, numbers: the longest that a published run can show
    "distillation": ("distil", "10000/10000", "100 %", [
        "51:03:12 left", "loss 0.513", "accuracy 72.6 %", "α 0.0123", "start epoch 60", "skipped 10000",
        "12.3k images/s"]),
    "its beginning": ("distil", "7/5000", "0 %", ["?:?? left", "loss 0.513", "α 0.01", "start epoch 6", "skipped 0"]),
    "experts": ("expert 99", "epoch 100/100", "100 %", [
        "51:03:12 left", "loss 0.513", "train 91.2 %", "test 88.0 %", "12.3k images/s"]),
    "evaluation": ("evaluate", "5005/5005", "100 %", [
        "51:03:12 left", "5 of 5 networks", "ResNet18BN_AP 72.6 %", "12.3k images/s"])}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_fits_and_at_80_columns_lacks_no_number(line):
    values = re.findall(r"[\d.:]+", " ".join(line[3]))
    bar = Progress(1, "test", quiet=True)
    bar.ascii = False
    for columns in range(200, 9, -1):
        shown = bar._fitted(*line, columns)
        assert disp_len(shown) <= columns and "\n" not in shown
        if columns >= 80:
            found = re.findall(r"[\d.:]+", shown.replace(line[1].removeprefix("epoch "), ""))
            assert [value for value in found if value in values] and set(values) <= set(found), shown
        if columns == 200:
            assert "|" in shown and all(number in shown for number in line[3])
        if columns >= 30:
            assert line[3][0].removesuffix(" left") in shown and line[1].removeprefix("epoch ") in shown


def test_a_line_does_not_flicker(monkeypatch):
    """A number that is shorter for once does not bring back the longer form."""
    bar = Progress(1, "test", quiet=True)
    bar.ascii = False
    words = [f"number {10 ** 6}", "other 1"]
    assert "|" in bar._fitted("test", "1/2", "50 %", ["short"], 40)
    assert "|" not in bar._fitted("test", "1/2", "50 %", words, 40)
    assert "|" not in bar._fitted("test", "1/2", "50 %", ["short"], 40)
    assert "|" in bar._fitted("test", "1/2", "50 %", ["short"], 41)  # another terminal


def test_what_is_done_aside_is_shown_and_ends(clock, capsys):
    with Progress(4, "test") as bar:
        bar.update()
        with bar.aside("evaluating", 3) as tick:
            tick()
            assert "evaluating 33 %" in str(bar)
        assert "evaluating" not in str(bar)


@pytest.mark.parametrize("total, before", [(0, 0), (5, 5)])
def test_a_bar_without_a_step_of_its_own_ends_too(capsys, total, before):
    """Iteration 0 is evaluated and nothing else; so is the last one of a run that was stopped there."""
    with Progress(total, "test", initial=before) as bar:
        with bar.aside("evaluating", 1):
            bar.refresh()  # as after half a minute
        bar.show("accuracy 50.0 %")
    assert re.search(r"100 %, took 00:00, accuracy 50\.0 %\n$", capsys.readouterr().err)


# --- the programs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_terminal(environment):
    """An entry on a terminal of 80 columns → everything it wrote there."""
    def on_terminal(script, *arguments):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        process = subprocess.Popen([sys.executable, script, *map(str, arguments)], cwd=REPOSITORY, stdin=theirs,
                                   stdout=theirs, stderr=theirs,
                                   env={**os.environ, **environment, "PYTHONIOENCODING": "utf-8"})
        os.close(theirs)
        written = b""
        while True:
            try:
                some = os.read(ours, 1 << 16)
            except OSError:  # nobody is left who could write
                break
            if not some:
                break
            written += some
        os.close(ours)
        assert process.wait() == 0, written.decode()
        return written.decode()
    return on_terminal


@pytest.fixture(scope="module")
def made(run, toy, toy_experts, tmp_path_factory):
    """A finished distillation of the toy: its set, its arguments but for --log_path, and what it wrote in a pipe."""
    folder = tmp_path_factory.mktemp("made")
    arguments = [*toy.distil, f"--buffer_path={toy_experts}", "--ema", "--run_name=one"]
    done = run(DATM, *arguments, f"--log_path={folder}")
    return next(folder.rglob("Normal/distilled.safetensors")), arguments, done


@pytest.fixture(scope="module")
def program(toy, made):
    """The name of a program → its arguments, with a folder for what it writes."""
    def program(script, folder):
        whole, distil, _ = made
        return {BUFFER: [*toy.train, f"--buffer_path={folder}"], DATM: [*distil, f"--log_path={folder}"],
                EVALUATION: [*toy.evaluate, f"--data_dir={whole}", f"--json={folder / 'result.json'}"],
                BASELINE: [*toy.evaluate, "--ipc=2", f"--json={folder / 'result.json'}"]}[script]
    return program


LAST = {  # a program's last bar, wherever it is shown; words may be abbreviated
    BUFFER: r"expert 2 (epoch )?3/3 100 ?%.* took 00:\d\d.* loss [\d.]+.* train [\d.]+ ?%.* test [\d.]+ ?%.* "
            r"[\d.]+k? (images|img)/s",
    DATM: r"(distil )?4/4 .*took 00:\d\d.* loss [\d.]+.* (accuracy|acc) [\d.]+ ?%.* α [\d.]+.* start( epoch)? \d.* "
          r"(skipped|skip) 0.* [\d.]+k? (images|img)/s",
    EVALUATION: r"evaluate 3/3 100 ?%.* took 00:\d\d.* 1 of 1 networks.* (accuracy|acc) [\d.]+ ?%.* "
                r"[\d.]+k? (images|img)/s",
    BASELINE: r"evaluate 3/3 100 ?%.* took 00:\d\d.* 1 of 1 networks.* (accuracy|acc) [\d.]+ ?%.* "
              r"[\d.]+k? (images|img)/s"}
FIRST = r"on cpu \(1 threads\), float32, autograd, hand-written adjoint, batch \d+"


@pytest.mark.parametrize("script", LAST)
def test_on_a_terminal_of_80_columns_bars_are_one_line(on_terminal, program, tmp_path, script):
    written = on_terminal(script, *program(script, tmp_path)).replace("\r\n", "\n")
    assert re.match(FIRST, written)
    bars = [bar for line in written.split("\n") for bar in line.split("\r") if " left" in bar or " took " in bar]
    assert bars and all(disp_len(bar.rstrip()) <= 80 for bar in bars)
    assert any(re.fullmatch(LAST[script], re.sub(r"\|.*\|", "", bar.rstrip())) for bar in bars), bars[-1]
    # What cannot be broken, a path, may be longer; nothing else is.
    for line in re.split("[\r\n]", written):
        assert disp_len(line.rstrip()) <= 80 or str(tmp_path.parent.parent) in line, line


@pytest.mark.parametrize("script", LAST)
def test_in_a_pipe_there_are_whole_lines_and_few(run, program, made, tmp_path, script):
    done = made[2] if script == DATM else run(script, *program(script, tmp_path))
    assert "\r" not in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr
    (bar,) = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert re.fullmatch(LAST[script], bar.replace("distil 4/4 100 %,", "distil 4/4")) and " 100 %" in bar
    assert re.match(FIRST, done.stdout)


@pytest.mark.parametrize("option", ["--hard_labels", "--robust_score"])
def test_the_first_line_says_on_what_whatever_is_evaluated(call, program, toy_experts, tmp_path, option):
    done = call(EVALUATION, *program(EVALUATION, tmp_path), option, *(
        [f"--buffer_path={toy_experts}", "--epoch_eval_real=1"] if option == "--robust_score" else []))
    assert re.match(FIRST, done.stdout) and "the class of an image is known by" in done.stdout


QUIET = {
    BUFFER: r"3 experts of 3 epochs are trained; .* holds 3 in replay_buffer_0\.pt, replay_buffer_1\.pt\n",
    DATM: r"best on the test images .* %.*; EMA best .*\nin .*/one\n",
    EVALUATION: r"ConvNetD1W4: [\d.]+ ± [\d.]+ % over 1\n", BASELINE: r"ConvNetD1W4: [\d.]+ ± [\d.]+ % over 1\n"}


@pytest.mark.parametrize("script", QUIET)
def test_quiet_leaves_the_results(call, program, tmp_path, script):
    done = call(script, *program(script, tmp_path), "--quiet")
    assert re.fullmatch(QUIET[script], done.stdout)
    assert all("did not learn" in line for line in done.stderr.splitlines())  # which is to be known


def test_quiet_leaves_errors_and_warnings(call, toy, toy_experts, tmp_path):
    arguments = [*toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--quiet"]
    assert "every update was skipped" in call(DATM, *arguments, "--threshold=0").stderr
    assert "DATM.py: error: --max_start_epoch 9" in call(DATM, *arguments, "--max_start_epoch=9", expect=2).stderr


def test_quiet_changes_nothing_of_a_run(call, made, toy, toy_experts, tmp_path):
    """The same tensors and config; also as a key of the YAML; and a run is gone on with, quietly or not."""
    whole, distil, _ = made
    quiet = tmp_path / "quiet.yaml"
    quiet.write_text((toy.data / "toy.yaml").read_text() + "quiet: True\n")
    call(DATM, *distil, f"--cfg={quiet}", f"--log_path={tmp_path}")
    (ours,) = tmp_path.rglob("one")
    theirs = whole.parent.parent
    assert (ours / "config.yaml").read_text() == (theirs / "config.yaml").read_text()
    for path in (theirs / "Normal").glob("*_4.pt"):
        assert torch.equal(*(torch.load(each / "Normal" / path.name, weights_only=True) for each in (ours, theirs)))
    again = call(DATM, *distil, f"--log_path={tmp_path}", "--Iteration=4", "--quiet=False")
    assert "is finished" in again.stdout
    assert influential(make(BufferConfig, quiet=True)) == influential(make(BufferConfig))


# --- what to type next ---------------------------------------------------------------------------------------


def typed(text):
    """The commands that a program prints."""
    return re.findall(r"^  (python (?:.*\\\n)*.*)$", text, re.MULTILINE)


def type_in(command, environment, cwd=REPOSITORY):
    done = subprocess.run(["bash", "-c", command], cwd=cwd, text=True, capture_output=True,
                          env=os.environ | environment | {"PATH": f"{os.path.dirname(sys.executable)}:"
                                                                  f"{os.environ['PATH']}"})
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("inside", [".", "distill"])
def test_the_printed_commands_lead_from_experts_to_pictures(call, toy, environment, tmp_path, inside):
    """As they are, but for smaller numbers; from the root and from a folder in it, with odd names."""
    cwd = REPOSITORY / inside
    folder = tmp_path / "my experts"
    said = call(REPOSITORY / BUFFER, *toy.train, "--num_experts=1", "--train_epochs=2", f"--buffer_path={folder}",
                cwd=cwd)
    inspect, distil = typed(said.stdout)
    assert "1 in 1 file" in type_in(inspect, environment, cwd)
    assert "--res=8" in distil
    small = ("--Iteration=2 --syn_steps=2 --eval_it=2 --epoch_eval_train=1 --num_eval=1 --expert_epochs=1 "
             "--max_start_epoch=2 --Sequential_Generation=False")
    evaluate, export = typed(type_in(f"{distil} {small} --threshold=inf --log_path='{tmp_path / 'my logs'}'",
                                     environment, cwd))
    assert "ConvNetD1W4: " in type_in(evaluate, environment, cwd) and "--epoch_eval_train=1" in evaluate
    assert "3 images: " in type_in(export, environment, cwd)
    assert len(list((tmp_path / "my logs").rglob("*.png"))) == 2 + 3  # the run's own, and the set's
