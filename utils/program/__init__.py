"""What every program does around its computation; knows nothing of buffer/ or distill/."""
