"""Distillation, evaluation and baselines."""

import utils  # noqa: F401  before torch: utils sets how its threads wait
