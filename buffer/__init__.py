"""Experts: their training, and the files of their trajectories."""
