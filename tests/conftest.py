"""Fixtures that several folders of tests share. Being here, it also lets every test import the helpers beside it."""

import os
from pathlib import Path

import pytest

import oracles

# One thread for numpy and torch, before either is imported: the matrices of tests are small, and threads that wait for
# each other make a busy machine many times slower. (Our own kernels do not look at these.)
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# Packed weights of the models that tests make are of no use to anybody; tests of the cache give it a folder.
os.environ["DAPJI_CACHE"] = "off"


@pytest.fixture(scope="session")
def llama_cpp_models() -> Path:
    """llama.cpp's vocabularies, vectors and chat templates; fails where they have not been fetched."""
    try:
        return oracles.llama_cpp_models()
    except FileNotFoundError as error:
        pytest.fail(str(error), pytrace=False)
