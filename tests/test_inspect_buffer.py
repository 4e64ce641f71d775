"""scripts/inspect_buffer.py: reports on a folder of experts."""

import json
import re
import shlex
import shutil

import pytest
import torch
from helpers import TOY_EXPERTS

from scripts.inspect_buffer import distances, distilling
from utils.files import read_config, save_config

INSPECT = "scripts/inspect_buffer.py"


@pytest.fixture
def folder(toy_experts, tmp_path):
    """A copy of the toy's experts."""
    return shutil.copytree(toy_experts / TOY_EXPERTS, tmp_path / "ConvNetD1W4")


def test_distances_are_those_of_the_formulas():
    thetas = torch.tensor([[3.0, 4.0], [3.0, 5.0], [6.0, 8.0], [0.0, 0.0]])
    step, segment = distances(thetas, 2)
    assert step == pytest.approx([1 / 5, 18**0.5 / 34**0.5, 1])
    assert segment == pytest.approx([1, 1])
    assert distances(thetas, 9)[1] == [] and distances(thetas[:1], 1) == ([], [])


def test_a_buffer_is_described_and_drawn(call, folder, tmp_path):
    done = call(INSPECT, folder, f"--png={tmp_path / 'out.png'}", f"--json={tmp_path / 'out.json'}")
    for phrase in ("ConvNetD1W4", "3 in 2 files", "epochs 0 … 3", "ImageFolder", "zca True", "--max_start_epoch 2 or",
                   "segment of 2"):
        assert phrase in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["experts"] == 3 and report["epochs"] == [3] and report["options"]["model"] == "ConvNetD1W4"
    assert report["bytes"] == sum(path.stat().st_size for path in folder.glob("*.pt"))
    first = torch.load(folder / "replay_buffer_0.pt", weights_only=True)[0]
    start, after, end = (torch.cat([each.reshape(-1) for each in first[epoch]]) for epoch in (0, 1, 2))
    assert report["trajectories"][0]["step"][0] == pytest.approx(float((after - start).norm() / start.norm()))
    assert report["trajectories"][0]["segment"][0] == pytest.approx(float((end - start).norm() / start.norm()))
    assert [len(report["by_start_epoch"][name]) for name in ("step", "segment")] == [3, 2]
    lines = [json.loads(line) for line in (folder / "replay_buffer_1.jsonl").read_text().splitlines()]
    assert report["trajectories"][2]["test_accuracy"] == [line["test_accuracy"] for line in lines]
    assert len(report["by_epoch"]["train_accuracy"]) == 3


def test_experts_are_compared_with_others_of_the_same_numbers(call, folder, tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    first = torch.load(folder / "replay_buffer_0.pt", weights_only=True)[0]
    moved = [[first[0][i] + 2 * (each - first[0][i]) for i, each in enumerate(snapshot)] for snapshot in first[:3]]
    torch.save([moved], others / "replay_buffer_0.pt")
    done = call(INSPECT, folder, f"--beside={others}", f"--json={tmp_path / 'out.json'}")
    assert f"1 expert with the same number in {others}" in done.stdout and "| 0.5000 |" in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    # The first expert moved half as far as its counterpart, which is an epoch shorter; the others have none.
    assert report["trajectories"][0]["apart"] == pytest.approx([0.5, 0.5], rel=1e-5)
    assert [each["apart"] for each in report["trajectories"][1:]] == [[], []]
    assert report["by_epoch"]["apart"] == [{"mean": pytest.approx(0.5), "std": None}] * 2  # over one expert

    torch.save([[[torch.zeros(2)]]], others / "replay_buffer_0.pt")
    refused = call(INSPECT, folder, f"--beside={others}", expect=2)
    assert "others/replay_buffer_0.pt" in refused.stderr and "not all of one network" in refused.stderr
    empty = call(INSPECT, folder, f"--beside={tmp_path}", expect=2)
    assert "give one of these" in empty.stderr


def test_experts_too_short_for_a_segment_are_said_to_be(call, folder):
    said = call(INSPECT, folder, "--expert_epochs=9").stdout
    assert "--expert_epochs 9 allows no window: the experts are too short" in said


def test_options_in_which_the_files_differ_are_all_told(call, folder):
    manifest = folder / "replay_buffer_1.yaml"
    save_config(manifest, read_config(manifest) | {"seed": 7})
    assert "seed 0 and 7" in call(INSPECT, folder).stdout


def test_published_files_leave_open_what_is_not_in_them(call, folder, tmp_path):
    for path in [*folder.glob("*.yaml"), *folder.glob("*.jsonl")]:
        path.unlink()
    done = call(INSPECT, folder, f"--png={tmp_path / 'out.png'}", f"--json={tmp_path / 'out.json'}")
    assert "ConvNetD1W4, by the folder's name" in done.stdout and "options     unknown" in done.stdout
    assert "accuracy    unknown" in done.stdout and "3 in 2 files" in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["options"] is None and report["trajectories"][0]["test_accuracy"] is None
    assert (tmp_path / "out.png").stat().st_size


def test_an_unfinished_run_is_shown(call, folder, tmp_path):
    saved = folder / "unfinished" / "expert_3"
    saved.mkdir(parents=True)
    started = {"model": "ConvNetD1W4", "num_experts": 2, "train_epochs": 3, "first_expert": 3, "threads": 1}
    save_config(folder / "unfinished" / "run.yaml", started)
    for epoch in range(3):
        (saved / f"epoch_{epoch}.pt").touch()
    done = call(INSPECT, folder, f"--json={tmp_path / 'out.json'}")
    assert "a run of 2 experts of 3 epochs, from expert 3 on; epochs so far: expert 3: 2\n" in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["experts"] == len(report["trajectories"]) == 3
    assert report["unfinished"]["experts"] == [{"expert": 3, "epochs": 2}]
    for path in folder.glob("replay_buffer_*"):  # now no expert is finished
        path.unlink()
    done = call(INSPECT, folder, f"--png={tmp_path / 'out.png'}")
    assert "experts     0 in 0 files" in done.stdout and "epoch s" not in done.stdout


def test_experts_that_diverged_are_named(call, folder, tmp_path):
    path = folder / "replay_buffer_1.pt"
    (expert,) = torch.load(path, weights_only=True)
    expert[2][0][:] = torch.nan
    torch.save([expert], path)
    assert "not finite  experts 2:" in call(INSPECT, folder, f"--json={tmp_path / 'out.json'}").stdout
    assert "NaN" not in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize("change, phrases", [
    (lambda folder: (folder / "replay_buffer_1.pt").write_bytes(b"PK"), ["replay_buffer_1.pt", "not a torch file"]),
    (lambda folder: torch.save([[torch.zeros(3)]], folder / "replay_buffer_1.pt"), ["is not a list of snapshots"]),
    (lambda folder: torch.save([[[1, 2]]], folder / "replay_buffer_1.pt"), ["not all of one network"]),
    (lambda folder: torch.save([[[torch.zeros(2)]]], folder / "replay_buffer_1.pt"), ["not all of one network"]),
    (lambda folder: (folder / "replay_buffer_0.jsonl").write_text("{}\n"), ["replay_buffer_0.jsonl", "is damaged"]),
    (lambda folder: (folder / "replay_buffer_0.yaml").write_text("["), ["replay_buffer_0.yaml", "is damaged"])])
def test_damaged_files_are_refused(call, folder, change, phrases):
    change(folder)
    (line,) = call(INSPECT, folder, expect=2).stderr.splitlines()
    assert line.startswith("inspect_buffer.py: error: ")
    assert all(phrase in line for phrase in phrases), line


@pytest.mark.parametrize("arguments, phrase", [
    (["{folder}", "--expert_epochs=0"], "'0': give a whole number above 0"),
    (["{folder}", "--expert_epochs=x"], "'x': give a whole number above 0"),
    (["{folder}/.."], "give one of these"), (["/nowhere"], "no replay_buffer_*.pt in /nowhere"),
    ([], "required: folder"), (["{folder}", "--png={folder}"], "which is a folder")])
def test_mistakes_are_one_line(call, folder, arguments, phrase):
    (line,) = call(INSPECT, *(each.format(folder=folder) for each in arguments), expect=2).stderr.splitlines()
    assert line.startswith("inspect_buffer.py: error: ") and phrase in line


def test_settings_are_suggested_that_work_as_they_are_printed(call, toy_experts, tmp_path):
    folder = toy_experts / TOY_EXPERTS
    done = call(INSPECT, folder, "--suggest", "--ipc=1", f"--png={tmp_path / 'a.png'}", f"--json={tmp_path / 'a.json'}")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "a.json").read_text())
    losses = {(each["expert_epochs"], each["syn_steps"], each["lr_teacher"]): each["by_start_epoch"]
              for each in report["losses"]}
    chosen = report["options"]
    of_chosen = losses[chosen["expert_epochs"], chosen["syn_steps"], chosen["lr_teacher"]]
    assert f"{of_chosen[0]:.3f}" in done.stdout and of_chosen[0] < 1
    call(INSPECT, folder, "--suggest", "--ipc=1", f"--json={tmp_path / 'a.json'}")  # over its own file
    printed = shlex.split(done.stdout.split("(the config sets the rest):")[1].replace("\\\n", " "))
    assert printed[:2] == ["python", "distill/DATM.py"] and f"--lr_teacher={chosen['lr_teacher']}" in printed
    assert "--factor=2" in printed and "factor" not in distilling(folder, 2)
    made = call(*printed[1:], "--Iteration=12", "--epoch_eval_train=1", f"--log_path={tmp_path}", "--device=cpu")
    before, after = map(float, re.search(r"fixed segments: (\S+) before, (\S+) after", made.stdout).groups())
    assert after < 0.8 * before


def test_suggestions_need_to_know_the_data(call, folder):
    for options, phrase in ((["--suggest"], "--ipc N"), (["--ipc=2"], "give --suggest and --ipc N together"),
                            (["--suggest", "--ipc=2"], "looks for in <buffer_path>/ImageFolder/ConvNetD1W4")):
        assert phrase in call(INSPECT, folder, *options, expect=2).stderr
    for path in folder.glob("*.yaml"):
        path.unlink()
    assert "DATM.py --dry_run" in call(INSPECT, folder, "--suggest", "--ipc=2", expect=2).stderr


def test_experts_in_training_have_no_suggestion_yet(call, tmp_path):
    save_config(tmp_path / "unfinished" / "run.yaml", {"dataset": "MiniFashion"})
    assert "are being trained, or were stopped" in call(INSPECT, tmp_path, "--suggest", "--ipc=1", expect=2).stderr
