"""Output on a terminal of 80 columns, in a pipe and with --quiet; the commands that programs print work."""

import fcntl
import os
import pty
import re
import shlex
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
    """The mocked time: a list of one number."""
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
    """100 steps, 90 of them done before. The forecast comes after three measured steps, or five seconds of them."""
    with Progress(100, "test", initial=90, later=lambda: later, device=torch.device("cpu")) as bar:
        for _ in range(10):
            clock[0] += seconds
            bar.update()
    assert re.findall(r"expect about (.*) more, [\d.]+ GB of memory so far", capsys.readouterr().out) == said


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


def test_what_is_done_aside_is_shown_and_ends(clock, capsys):
    with Progress(4, "test") as bar:
        bar.update()
        with bar.aside("evaluating", 3) as tick:
            tick()
            assert "evaluating 33 %" in str(bar)
        assert "evaluating" not in str(bar)


@pytest.mark.parametrize("total, before", [(0, 0), (5, 5)])
def test_a_bar_without_a_step_of_its_own_ends_too(capsys, total, before):
    """As when only iteration 0 is evaluated, or when a run resumes at its last evaluation."""
    with Progress(total, "test", initial=before) as bar:
        with bar.aside("evaluating", 1):
            bar.refresh()  # as happens after half a minute
        bar.show("accuracy 50.0 %")
    assert re.search(r"100 %, took 00:00, accuracy 50\.0 %\n$", capsys.readouterr().err)


# --- the programs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_terminal(environment):
    """Runs a program on a terminal of 80 columns; returns everything it wrote there."""
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
            except OSError:  # the other end is closed
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
    """A finished distillation of the toy: its set, its arguments without --log_path, and the process (in a pipe)."""
    folder = tmp_path_factory.mktemp("made")
    arguments = [*toy.distil, f"--buffer_path={toy_experts}", "--ema", "--run_name=one"]
    done = run(DATM, *arguments, f"--log_path={folder}")
    return next(folder.rglob("Normal/distilled.safetensors")), arguments, done


@pytest.fixture(scope="module")
def program(toy, made):
    """Program, output folder → the program's arguments."""
    def program(script, folder):
        whole, distil, _ = made
        return {BUFFER: [*toy.train, f"--buffer_path={folder}"], DATM: [*distil, f"--log_path={folder}"],
                EVALUATION: [*toy.evaluate, f"--data_dir={whole}", f"--json={folder / 'result.json'}"],
                BASELINE: [*toy.evaluate, "--ipc=2", f"--json={folder / 'result.json'}"]}[script]
    return program


LAST = {  # a program's last progress line, after its label
    BUFFER: r"epoch 3/3 100 %, took 00:\d\d, loss [\d.]+, train [\d.]+ %, test [\d.]+ %, [\d.]+k? images/s",
    DATM: r"4/4 100 %, took 00:\d\d, loss [\d.]+, accuracy [\d.]+ %, α [\d.]+, start epoch \d, skipped 0, "
          r"[\d.]+k? images/s",
    EVALUATION: r"3/3 100 %, took 00:\d\d, 1 of 1 network, accuracy [\d.]+ %, [\d.]+k? images/s",
    BASELINE: r"3/3 100 %, took 00:\d\d, 1 of 1 network, accuracy [\d.]+ %, [\d.]+k? images/s"}
FIRST = r"on cpu \(1 thread\), float32, hand-written, batch \d+"


@pytest.mark.parametrize("script", LAST)
def test_on_a_terminal_of_80_columns_bars_are_one_line(on_terminal, program, tmp_path, script):
    written = on_terminal(script, *program(script, tmp_path)).replace("\r\n", "\n")
    assert re.match(FIRST, written)
    bars = [bar for line in written.split("\n") for bar in line.split("\r") if " left" in bar or " took " in bar]
    assert bars and all(disp_len(bar.rstrip()) <= 80 for bar in bars)
    # The same text as in a pipe, plus a bar, cut to the terminal's width.
    assert any(re.search(r"100 % \|.*\| took 00:\d\d, (loss [\d.]+|1 of 1 network), ", bar) for bar in bars), bars[-1]
    # Only paths, which cannot be wrapped, may make a line longer.
    for line in re.split("[\r\n]", written):
        assert disp_len(line.rstrip()) <= 80 or str(tmp_path.parent.parent) in line, line


@pytest.mark.parametrize("script", LAST)
def test_in_a_pipe_there_are_whole_lines_and_few(call, program, made, tmp_path, script):
    done = made[2] if script == DATM else call(script, *program(script, tmp_path))
    assert "\r" not in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr
    (bar,) = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert re.fullmatch(rf"(expert 2|distil|evaluate) {LAST[script]}", bar), bar
    assert re.match(FIRST, done.stdout)


@pytest.mark.parametrize("option", ["--hard_labels", "--robust_score"])
def test_the_first_line_says_on_what_whatever_is_evaluated(call, program, toy_experts, tmp_path, option):
    done = call(EVALUATION, *program(EVALUATION, tmp_path), option, *(
        [f"--buffer_path={toy_experts}", "--epoch_eval_real=1"] if option == "--robust_score" else []))
    assert re.match(FIRST, done.stdout) and "classes are taken from" in done.stdout


QUIET = {
    BUFFER: r"trained 3 experts of 3 epochs; .* holds 3 in replay_buffer_0\.pt, replay_buffer_1\.pt\n",
    DATM: r"best on the test images .* %.*; EMA best .*\nin .*/one\n",
    EVALUATION: r"ConvNetD1W4: [\d.]+ % over 1\n", BASELINE: r"ConvNetD1W4: [\d.]+ % over 1\n"}


@pytest.mark.parametrize("script", QUIET)
def test_quiet_leaves_the_results(call, program, tmp_path, script):
    done = call(script, *program(script, tmp_path), "--quiet")
    assert re.fullmatch(QUIET[script], done.stdout)
    known = "did not learn", "whitening also amplifies"  # notes that --quiet keeps
    assert all(any(words in line for words in known) for line in done.stderr.splitlines())


def test_quiet_leaves_errors_and_warnings(call, toy, toy_experts, tmp_path):
    arguments = [*toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--quiet"]
    assert "every update was skipped" in call(DATM, *arguments, "--threshold=0").stderr
    assert "DATM.py: error: --max_start_epoch 9" in call(DATM, *arguments, "--max_start_epoch=9", expect=2).stderr


def test_quiet_changes_nothing_of_a_run(call, made, toy, tmp_path):
    """The same tensors and config, also as a key of the YAML; a finished run is recognised with or without it."""
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


def test_what_takes_long_with_much_data_says_how_far_it_is(call, environment, toy, toy_experts, monkeypatch, tmp_path):
    """Bars appear after three seconds: never in so short a run, and all of them once that limit is 0."""
    monkeypatch.setitem(environment, "DATM_CACHE", str(tmp_path))
    command = BASELINE, *toy.evaluate, "--ipc=1", "--pick=correct", f"--buffer_path={toy_experts}"
    steps = "looking for colours", "reading the images", "fitting the whitening", "whitening the images"
    steps += "reading the experts",
    before = call(*command).stderr
    assert not any(step in before for step in steps)
    next(tmp_path.glob("zca_*.pt")).unlink()
    monkeypatch.setattr(progress, "WORTH_SHOWING", 0.0)
    said = call(*command).stderr
    assert all(f"{step} 100 %, took 00:00" in said for step in steps[1:]), said
    next(tmp_path.glob("zca_*.pt")).unlink()
    quiet = call(*command, "--quiet").stderr
    assert not any(step in quiet for step in steps)


def typed(text):
    """The commands that a program prints."""
    return re.findall(r"^  (python (?:.*\\\n)*.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("inside", [".", "distill"])
def test_the_printed_commands_lead_from_experts_to_pictures(call, toy, tmp_path, inside):
    """Run as printed, plus options for small sizes; from the root and from a subfolder, with spaces in paths."""
    cwd = REPOSITORY / inside
    folder = tmp_path / "my experts"

    def type_in(command):
        return call(*shlex.split(command.replace("\\\n", ""))[1:], cwd=cwd).stdout

    said = call(REPOSITORY / BUFFER, *toy.train, "--num_experts=1", "--train_epochs=2", f"--buffer_path={folder}",
                cwd=cwd)
    (inspect,) = typed(said.stdout)
    (distil,) = typed(type_in(inspect))
    assert "--res=8" in distil
    small = "--Iteration=2 --syn_steps=2 --eval_it=2 --epoch_eval_train=1 --num_eval=1"
    evaluate, export = typed(type_in(f"{distil} {small} --threshold=inf --log_path='{tmp_path / 'my logs'}'"))
    assert "ConvNetD1W4: " in type_in(evaluate) and "--epoch_eval_train=1" in evaluate
    assert "3 images of 2 × 2 smaller ones (12 labels): " in type_in(export)
    # Two of the run, three images of the set, and one of what networks see.
    assert len(list((tmp_path / "my logs").rglob("*.png"))) == 2 + 3 + 1
