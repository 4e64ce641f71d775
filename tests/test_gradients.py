"""scripts/measure/gradients.py, at a tiny size."""

import json
from statistics import median

import pytest
import torch

from distill.distilled_set import DistilledSet
from scripts.measure import gradients
from utils.errors import UserError
from utils.files import sha256
from utils.program import interrupt


def test_gradients_are_compared_and_distil_for_the_same_time(toy, toy_data, toy_experts, environment, tmp_path,
                                                             monkeypatch, capsys):
    saved, report, plot = (tmp_path / name for name in ("set.safetensors", "gradients.json", "gradients.png"))
    DistilledSet(toy_data.train_images[:6], torch.eye(3).repeat_interleave(2, 0), torch.tensor(0.1)).save_whole(
        saved, toy_data, {})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, value in (("STEPS", (2, 8)), ("SEEDS", 2), ("DRAWS", 1)):
        monkeypatch.setattr(gradients, name, value)
    arguments = ["gradients.py", *toy.distil, f"--buffer_path={toy_experts}", "--Iteration=1", "--syn_steps=8",
                 f"--json={report}", f"--png={plot}", f"--distilled={saved}"]
    monkeypatch.setattr("sys.argv", arguments)
    distil, left = gradients.reached, [3]

    def stopped(*given):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return distil(*given)

    monkeypatch.setattr(gradients, "reached", stopped)
    with pytest.raises(KeyboardInterrupt):
        gradients.main()
    unfinished = json.loads((tmp_path / "gradients.json.unfinished").read_text())
    half = unfinished["found"]
    for path in (saved, *toy_experts.rglob("*.pt")):  # results depend on the set and the experts
        assert sha256(path) in str(unfinished["of"])
    assert len(half) == 2 + 2 * 2 * 2 + 2 and not report.exists()
    assert interrupt.saved() == ("the parts that are done", "")  # a stopped program says how to resume
    begun = "gradients.json.unfinished was begun with other options.*; what differs"
    for other, said in (("--lr_img=9", f"{begun}: lr_img"), ("--backend=plain", f"{begun}: backend"),
                        ("--distilled=nowhere.safetensors", "^--distilled .*nowhere.safetensors does not exist")):
        monkeypatch.setattr("sys.argv", [*arguments, other])
        with pytest.raises(UserError, match=said):
            gradients.main()
    monkeypatch.setattr("sys.argv", arguments)
    # Results kept by another version took as long, and are not overwritten.
    kept = tmp_path / "gradients.json.unfinished"
    kept.write_text(json.dumps({"key": [], "found": half}))
    with pytest.raises(UserError, match="gradients.json.unfinished is damaged .*; give another --json, or delete it"):
        gradients.main()
    assert json.loads(kept.read_text())["found"] == half
    kept.write_text(json.dumps(unfinished))
    gradients.main()
    assert not list(tmp_path.glob("*.unfinished"))

    found = json.loads(report.read_text())
    of = {(each["set"], each["steps"], each["gradient"]): each for each in found["matches"]}
    for seed, each in enumerate(half[f"distilled set, 2 steps, seed {seed}"]["TESLA"] for seed in range(2)):
        assert of["distilled set", 2, "TESLA"]["cosines"][seed] == each[0][0]  # kept, not measured again
    assert found["distillations"][0]["seeds"][0] == half["2, exact, seed 0"]
    assert len(of) == 2 * 2 * 5 and plot.read_bytes()[1:4] == b"PNG"
    for (_, steps, gradient), each in of.items():
        assert len(each["cosines"]) == len(each["seconds"]) == 2
        if gradient == "exact" or (steps, gradient) == (2, "last 3/4"):  # goes through both steps
            assert each["cosines"] == pytest.approx([1] * 2, abs=1e-6)
        else:
            assert all(0 < cosine < 1 - 1e-9 for cosine in each["cosines"])
    budget = median(of["first set", 8, "exact"]["seconds"])
    for end in found["distillations"]:
        ratios = [mine / exact for what in ("first set", "distilled set") for mine, exact in zip(
            *(of[what, end["steps"], gradient]["seconds"] for gradient in (end["gradient"], "exact")))]
        expected = budget / (median(ratios) * median(of["first set", end["steps"], "exact"]["seconds"]))
        assert [each["iterations"] for each in end["seeds"]] == [max(1, round(expected))] * 2
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert [row[2].strip() for row in rows[:-1]] == list(gradients.GRADIENTS) * 2
