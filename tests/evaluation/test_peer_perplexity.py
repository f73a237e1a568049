"""Perplexity of a real model on real text against what llama.cpp's llama-perplexity said of it.

The figures lie in benchmarks/data/perplexities.json, one after each chunk; benchmarks/perplexity.py measured them, and
docs/performance.md has the whole table. Here a short version: the first chunks of the same text.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapji.evaluation.perplexity import perplexity
from dapji.model import load
from dapji.weights import store
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.convert import write_quantized

MODEL = "smollm2-135m"
CHUNK = 512
DATA = Path(__file__).parents[2] / "benchmarks" / "data"
TOLERANCE = 0.003
"""Relative: both engines round activations to 8 bits, each in its own order."""


def check(path: Path, name: str, n_chunks: int) -> None:
    theirs = json.loads((DATA / "perplexities.json").read_text())[name]
    with load(path, context=CHUNK) as model:
        tokens = model.tokenizer.encode((DATA / "shakespeare.txt").read_text().removesuffix("\n"))
        assert not model.tokenizer.add_bos
        ours = perplexity(model.engine, tokens, chunk=CHUNK, max_chunks=n_chunks)
    assert ours.value == pytest.approx(theirs[n_chunks - 1], rel=TOLERANCE)


def test_as_published() -> None:
    check(store.resolve(MODEL), MODEL, 16)


@pytest.mark.slow
@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K"])
def test_quantised_by_us(type: str, tmp_path: Path) -> None:
    path = tmp_path / f"{MODEL}-{type}.gguf"
    write_quantized(open_checkpoint(store.resolve(MODEL)), path, type, allow_requantize=True)
    check(path, f"{MODEL} {type}", 16)
