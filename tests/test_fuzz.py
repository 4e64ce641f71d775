"""A few of the odd inputs that `scripts/trials/fuzz.py` draws a thousand of, always the same ones."""


def test_odd_inputs_are_refused_in_one_line_or_obeyed(run):
    """A failure prints its command line; `scripts/trials/fuzz.py` with this seed repeats it."""
    assert "\n0 failures" in run("scripts/trials/fuzz.py", "--inputs", 60, "--seed", 0).stdout
