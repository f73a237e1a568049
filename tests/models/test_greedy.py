"""Greedy text far beyond every threshold of position, the same on every executor as transformers generates."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import DISTINCT, opened, oracle, text, translated

from greedy import decode

PROMPT, TOKENS = 200, 60
TIE = 1e-4
"""Between an executor's two best logits where it prefers another token: what logits may differ by (test_parity.py)."""


@cache
def generated(name: str) -> NDArray[np.int64]:
    """[1, TOKENS] by transformers, one token after another over its own cache."""
    model = oracle(name)
    model.generation_config.eos_token_id = None  # a random model's text has no end
    with torch.no_grad():
        tokens = model.generate(torch.tensor([text(PROMPT)]), max_new_tokens=TOKENS, do_sample=False)
    continuation: NDArray[np.int64] = tokens[:, PROMPT:].numpy()
    return continuation


@pytest.mark.parametrize(("name", "kind"), DISTINCT)
def test_greedy_text_is_that_of_transformers(name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    want = generated(name)
    assert want.shape == (1, TOKENS)
    assert np.unique(want).size > 5  # a text, not one token again and again
    config, tensors = translated(name)
    executor = opened(kind, config, tensors, context=PROMPT + TOKENS, kv="f32")
    chosen, margins = decode(executor, [text(PROMPT)], TOKENS, follow=want)
    for place in np.flatnonzero(chosen != want):
        with capsys.disabled():
            print(f"\n{kind}, {name}: a tie of {margins[0, place]:.1e} at token {place}")
        assert margins[0, place] <= TIE
