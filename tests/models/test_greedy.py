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
"""Between an executor's two best logits where it prefers another token: what logits may differ by (TOLERANCE)."""


@cache
def generated(name: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """[prompts, TOKENS] by transformers, one token after another over its own cache, and how far each one's logit lies
    above the second."""
    model = oracle(name)
    model.generation_config.eos_token_id = None  # a random model's text has no end
    prompts = torch.tensor(PROMPTS)
    mask = torch.ones_like(prompts)  # else what looks like padding counts as that
    with torch.no_grad():
        result = model.generate(
            prompts, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    best = torch.stack(result.logits, dim=1).topk(2).values  # [prompts, TOKENS, 2]
    return result.sequences[:, LENGTH:].numpy(), (best[..., 0] - best[..., 1]).numpy()


@pytest.mark.parametrize(("name", "kind"), DISTINCT)
def test_greedy_text_is_that_of_transformers(name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Some random models repeat themselves, so that the lead of each token is compared too."""
    want, leads = generated(name)
    assert want.shape == (len(PROMPTS), TOKENS)
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
    np.testing.assert_allclose(margins, leads, rtol=0, atol=2 * TIE)  # differences of two logits
