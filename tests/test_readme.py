"""The README's commands and numbers are right, and the quickstart does what the README says."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from distill.distilled_set import DistilledSet
from utils import files
from utils.config import BaselineConfig, BufferConfig, DistillConfig, EvaluationConfig
from utils.files import REPOSITORY
from utils.program.command_line import parse

CONFIGS = {"buffer_FTD.py": BufferConfig, "DATM.py": DistillConfig, "evaluation.py": EvaluationConfig,
           "baseline.py": BaselineConfig}
SET = "quickstart/logged_files/MiniFashion/1/ConvNetW32/quickstart"
# Replaces Python: notes the command and creates the file by which its result is recognised.
PYTHON = f"""#!/bin/sh
echo "$*" >>commands
for word in "$@"; do
    case $word in
        --json=*) touch "${{word#*=}}" ;;
        --buffer_path=*) experts=${{word#*=}}/MiniFashion/ConvNetW32 ;;
    esac
done
case $1 in
    buffer/*) mkdir -p $experts; touch $experts/replay_buffer_0.pt ;;
    distill/DATM.py) mkdir -p {SET}/Normal; touch {SET}/Normal/distilled.safetensors {SET}/result.json ;;
esac
"""


def checked(command):
    """The options of a command, all of which must be valid; None: not one of `CONFIGS`."""
    words = shlex.split(command)
    at = next((at for at, word in enumerate(words) if Path(word).name in CONFIGS), None)
    return None if at is None else parse(CONFIGS[Path(words[at]).name], "", words[at + 1:],
                                         yaml_file=Path(words[at]).name == "DATM.py")


@pytest.mark.parametrize("page", ["README.md", "configs/README.md"])
def test_commands_are_valid(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    text = (REPOSITORY / page).read_text()
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", "")
    commands = [line for line in blocks.splitlines() if line.startswith(("python ", "torchrun "))]
    assert len([command for command in commands if checked(command)]) >= 3


def test_pages_lead_to_files_and_headings_that_exist():
    within = (REPOSITORY / folder for folder in ("configs", "results", "tests"))
    for page in (REPOSITORY / "README.md", *(page for folder in within for page in folder.rglob("*.md"))):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            if not link.startswith("https://"):
                assert target.exists(), f"{link} in {page}"
                headings = re.findall("^#+ (.*)", target.read_text(), re.MULTILINE) if heading else []
                assert not heading or heading in [
                    re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], f"{link} in {page}"


def test_the_readme_is_short_and_has_the_quickstarts_table(call):
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.split()) <= 1100
    results = [f"results/quickstart/{name}.json" for name in ("random", "distilled", "whole")]
    assert call("scripts/summary.py", *results).stdout in text


@pytest.fixture
def quickstart(tmp_path):
    """`quickstart()` runs it in its own folder, with PYTHON as Python; returns the commands it ran and its output."""
    for folder in ("scripts", "bin", "configs/MiniFashion/ConvIN"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("quickstart.sh", "help.sh"):
        (tmp_path / "scripts" / name).write_text((REPOSITORY / "scripts" / name).read_text())
    (tmp_path / "scripts/venv.sh").write_text("")
    (tmp_path / "configs/MiniFashion/ConvIN/IPC1.yaml").write_text("")
    (tmp_path / "bin/python").write_text(PYTHON)
    (tmp_path / "bin/python").chmod(0o755)

    def run(code=0):
        (tmp_path / "commands").write_text("")
        done = subprocess.run(["bash", tmp_path / "scripts/quickstart.sh"], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
        assert done.returncode == code, done.stderr
        return (tmp_path / "commands").read_text().splitlines(), done.stderr if code else done.stdout

    return run


def test_the_quickstart_shows_one_set_that_was_not_chosen_on_test_images(quickstart, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    commands, out = quickstart()
    experts, distillation, random, distilled, whole = map(checked, commands[:-1])
    assert experts.val_fraction == distillation.val_fraction == 0.1
    assert random.val_fraction == distilled.val_fraction == whole.val_fraction == 0
    assert distilled.data_dir == str(REPOSITORY / SET / "Normal/distilled.safetensors") and not distilled.label_dir
    assert commands[-1].startswith("scripts/summary.py ")
    assert out.splitlines()[-1].endswith(f"{SET}/report.html")

    # No result is made twice, except one that is older than a file it depends on.
    assert quickstart()[0] == commands[-1:]
    later = (tmp_path / SET / "result.json").stat().st_mtime + 1
    os.utime(tmp_path / "configs/MiniFashion/ConvIN/IPC1.yaml", (later, later))
    os.utime(tmp_path / "quickstart/distilled.json", (later - 60, later - 60))
    assert [command.split()[0] for command in quickstart()[0]] == ["distill/DATM.py", "distill/evaluation.py",
                                                                   "scripts/summary.py"]

    # If it is stopped, only the quickstart says how to resume, not the program that it ran.
    os.utime(tmp_path / "configs/MiniFashion/ConvIN/IPC1.yaml", (later + 9, later + 9))
    (tmp_path / "bin/python").write_text('#!/bin/sh\necho "$DATM_PART_OF" >&2\nexit 130\n')
    assert quickstart(130)[1].splitlines() == [
        "quickstart.sh", "The quickstart resumes with: bash scripts/quickstart.sh"]


def test_shell_scripts_explain_themselves_and_begin_nothing(tmp_path):
    for name in ("quickstart", "test", "reproduce", "gpu_check"):
        asked = ["bash", os.path.relpath(REPOSITORY / f"scripts/{name}.sh", tmp_path)]
        done = subprocess.run([*asked, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and f"bash scripts/{name}.sh" in done.stdout and not done.stderr
        assert "#" not in done.stdout.replace("     # ", "") and "set -" not in done.stdout
        if name in ("quickstart", "gpu_check"):
            refused = subprocess.run([*asked, "--fast"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert refused.returncode == 2 and refused.stderr.startswith(f"{name}.sh: error: ")


def test_a_check_of_a_gpu_keeps_what_is_not_its_own(tmp_path):
    """The folder is relative to the current one."""
    (tmp_path / "buffers").mkdir()
    (tmp_path / "evaluation.json").write_text("mine")
    done = subprocess.run(["bash", REPOSITORY / "scripts" / "gpu_check.sh", "."], cwd=tmp_path, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and f"{tmp_path} holds something other" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"buffers", "evaluation.json"}


@pytest.mark.parametrize("name, samples", [("ipc1", 10), ("ipc1_T80", 10), ("ipc1_factor2", 40), ("ipc10", 100),
                                           ("ipc10_T80", 100), ("ipc50", 500), ("ipc50_T80", 500)])
def test_the_ready_sets_are_those_that_their_page_tells_of(name, samples):
    path = REPOSITORY / f"results/sets/FashionMNIST_{name}.safetensors"
    page = path.with_name("README.md").read_text()
    score = json.loads(path.with_suffix(".json").read_text())["scores"][0]
    assert files.sha256(path) in page and f"{100 * score['mean']:.2f} ± {100 * score['std']:.2f}" in page
    distilled = DistilledSet.load(path)
    assert len(distilled) == samples and distilled.config["dataset"] == "FashionMNIST" and len(distilled.classes) == 10
