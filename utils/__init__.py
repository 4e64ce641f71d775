"""What every part of the program uses; knows nothing of buffer/ or distill/."""

import os

# Read by torch's thread pool (libgomp) when torch is first imported. By default a thread that waits for the others
# spins for milliseconds; where other programs want the cores too, that makes everything ten times slower and more.
# This bound is a hundredth of the default: within the noise of it on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
