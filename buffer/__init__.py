"""Experts: training, and the files of their trajectories."""

import utils  # noqa: F401  before torch: utils sets how its threads wait
