"""Real data: name → whole tensors, whitened and augmented."""
