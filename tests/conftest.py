"""The same threads as in the Makefile, set before torch is imported: digits of a training depend on them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
