"""A tokenizer whose ids are bytes, with a ChatML template, in our reading and in transformers'."""

from __future__ import annotations

import pytest

from byte_tokenizers import Tokenizers, make_tokenizers
from dapji.files import Files, open_files
from tiny import CHATML, CONTROL, SCRIPT, write_tiny


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    return make_tokenizers(CONTROL, tmp_path_factory.mktemp("chatml"), template=CHATML)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of a model that can be run."""
    return open_files(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", SCRIPT))
