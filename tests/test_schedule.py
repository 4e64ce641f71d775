"""The difficulty window against the published bounds."""

from distill.schedule import start_epoch_bound


def test_bounds_equal_the_published(golden_ops):
    cases = golden_ops["start_epoch_upper_bound"]
    for case in cases:
        bound = start_epoch_bound(case["iteration"], case["max_start_epoch"], case["current_max_start_epoch"],
                                  case["expansion_end_epoch"], case["Sequential_Generation"])
        assert bound == case["upper_bound_exclusive"], case
    assert len(cases) == 18
