"""Fixtures that several folders of tests share. Being here, it also lets every test import the helpers beside it."""

from pathlib import Path

import pytest

import oracles


@pytest.fixture(scope="session")
def llama_cpp_models() -> Path:
    """llama.cpp's vocabularies, vectors and chat templates; fails where they have not been fetched."""
    try:
        return oracles.llama_cpp_models()
    except FileNotFoundError as error:
        pytest.fail(str(error), pytrace=False)
