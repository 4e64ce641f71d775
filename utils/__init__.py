"""What every part of the program uses; knows nothing of buffer/ or distill/."""

import os

# Read by torch's thread pool (libgomp) when torch is first imported. By default a thread that waits for the others
# spins for milliseconds, which on a machine whose cores are shared makes everything up to ten times slower; this
# bound costs nothing on an idle one.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
