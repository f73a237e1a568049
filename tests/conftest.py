"""One thread for numpy and torch in tests: the matrices are small, and threads that wait for each other make a busy
machine many times slower. Set before either is imported; the environment overrides it. (Our own kernels do not look at
these.)"""

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
