"""Distillation, evaluation and baselines."""
