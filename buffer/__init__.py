"""Experts: training, and the files of their trajectories."""
