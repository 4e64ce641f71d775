"""The short form of scripts/trials/kill_test.py: each program killed once."""

import json


def test_killed_programs_resume_to_the_bit(run, tmp_path):
    done = run("scripts/trials/kill_test.py", "--kills", 3, "--signals", 0, "--json", tmp_path / "kills.json")
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["kills"] == 3 and result["failures"] == [], done.stdout
    assert all(case["runs"] and case["tensors compared"] for case in result["cases"].values())
