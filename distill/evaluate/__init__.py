"""Evaluation of a set: fresh networks are trained on it and tested on real images."""
