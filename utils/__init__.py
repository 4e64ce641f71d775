"""What every part of the program uses; knows nothing of buffer/ or distill/."""
