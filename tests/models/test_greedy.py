"""Greedy text far beyond every threshold of position, the same on every executor as transformers generates."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import DISTINCT, opened, oracle, text, translated

from dapji.ops.batch import KV_BLOCK
from greedy import decode

LENGTH, TOKENS = 200, 60
PROMPTS = [text(LENGTH, seed) for seed in (1, 2, 3)]
TIE = 1e-4
"""Between an executor's two best logits where it prefers another token: what logits may differ by (test_parity.py)."""


@cache
def generated(name: str) -> NDArray[np.int64]:
    """[prompts, TOKENS] by transformers, one token after another over its own cache."""
    model = oracle(name)
    model.generation_config.eos_token_id = None  # a random model's text has no end
    with torch.no_grad():
        tokens = model.generate(torch.tensor(PROMPTS), max_new_tokens=TOKENS, do_sample=False)
    continuation: NDArray[np.int64] = tokens[:, LENGTH:].numpy()
    return continuation


@pytest.mark.parametrize(("name", "kind"), DISTINCT)
def test_greedy_text_is_that_of_transformers(name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    want = generated(name)
    assert want.shape == (len(PROMPTS), TOKENS)
    assert np.unique(want).size > 10  # texts, not one token again and again
    config, tensors = translated(name)
    context = LENGTH + TOKENS
    n_blocks = len(PROMPTS) * -(-context // KV_BLOCK)
    executor = opened(kind, config, tensors, context=context, n_blocks=n_blocks, kv="f32")
    chosen, margins = decode(executor, PROMPTS, TOKENS, follow=want)
    for prompt, place in np.argwhere(chosen != want):
        margin = margins[prompt, place]
        with capsys.disabled():
            print(f"\n{kind}, {name}: a tie of {margin:.1e} at token {place} of text {prompt}")
        assert margin <= TIE
