"""The short form of `scripts/trials/fuzz.py`: a few inputs, always the same ones."""


def test_odd_inputs_are_refused_in_one_line_or_obeyed(run):
    """A failure prints its command line; the same command repeats it."""
    assert "\n0 failures" in run("scripts/trials/fuzz.py", "--inputs", 60, "--seed", 0).stdout
