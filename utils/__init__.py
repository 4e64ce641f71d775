"""What every part of the program uses; knows nothing of buffer/ or distill/."""

import ctypes
import os
import sys

# Read by torch's thread pool (libgomp) when torch is first imported. By default a thread that waits for the others
# spins for milliseconds; where other programs want the cores too, that makes everything ten times slower and more.
# This bound is a hundredth of the default: within the noise of it on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# glibc hands large blocks back to the system as soon as they are freed, and the next tensor of that size pays a page
# fault for every 4 KB: a fifth of a training step on a CPU, and more. Freed memory is kept instead, and used again.
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of <malloc.h>
if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    _libc.mallopt(_MMAP_MAX, 0)
    _libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
