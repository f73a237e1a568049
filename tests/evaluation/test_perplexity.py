"""Perplexity against transformers: the same weights, float64 log-probabilities of each chunk on its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dapji.engine import Engine
from dapji.errors import ContextError, FormatError, UsageError
from dapji.evaluation.perplexity import perplexity
from dapji.models import families
from dapji.models.executor import ReferenceExecutor
from dapji.ops.tensor import Tensor

CHUNK, BOS = 48, 1


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from a uniform distribution
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def engine(llama: LlamaForCausalLM) -> Engine:
    tensors = {name: Tensor.from_float32(name, value.numpy()) for name, value in llama.state_dict().items()}
    config, weights = families.from_hf(llama.config.to_diff_dict(), tensors)
    with Engine(ReferenceExecutor(config, weights, context=64, n_blocks=4)) as engine:
        yield engine


def text(n: int) -> list[int]:
    return np.random.default_rng(3).integers(0, 96, n).tolist()


@pytest.mark.parametrize("bos_id", [None, BOS])
def test_it_equals_the_formula_on_the_logits_of_transformers(
    llama: LlamaForCausalLM, engine: Engine, bos_id: int | None
) -> None:
    tokens = text(5 * CHUNK + 7)
    losses = []
    for i in range(5):
        ids = tokens[i * CHUNK : (i + 1) * CHUNK]
        if bos_id is not None:
            ids = [bos_id, *ids[1:]]
        with torch.no_grad():
            logits = llama(torch.tensor([ids])).logits[0].double()
        log_probabilities = torch.log_softmax(logits, dim=-1)
        # llama-perplexity scores what the second half's positions predict: tokens chunk/2 + 1 to the chunk's last.
        losses += [-float(log_probabilities[j - 1, ids[j]]) for j in range(CHUNK // 2 + 1, CHUNK)]
    calls: list[tuple[int, int, float]] = []
    result = perplexity(engine, tokens, chunk=CHUNK, bos_id=bos_id, progress=lambda *call: calls.append(call))
    # float32 logits computed in another order: 1e-6 or so in a loss.
    assert result.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result.error == pytest.approx(result.value * np.std(losses, ddof=1) / math.sqrt(len(losses)), rel=1e-4)
    assert (result.tokens, result.chunks) == (len(losses), 5)
    assert [call[:2] for call in calls] == [(i, 5) for i in range(1, 6)]
    assert calls[-1][2] == result.value
    assert calls[1][2] == pytest.approx(math.exp(np.mean(losses[: 2 * len(losses) // 5])), rel=1e-5)


def test_max_chunks_scores_the_first_alone(engine: Engine) -> None:
    tokens = text(5 * CHUNK)
    first = perplexity(engine, tokens, chunk=CHUNK, max_chunks=2)
    assert first.value == pytest.approx(perplexity(engine, tokens[: 2 * CHUNK], chunk=CHUNK).value, rel=1e-5)
    assert first.chunks == 2


def test_numbers_that_make_no_sense(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"the text has 47 tokens, fewer than one chunk \(48\)"):
        perplexity(engine, text(47), chunk=48)
    for chunk in (4, 49):
        with pytest.raises(UsageError, match=rf"chunk \({chunk}\)"):
            perplexity(engine, text(100), chunk=chunk)
    with pytest.raises(UsageError, match=r"max_chunks \(0\)"):
        perplexity(engine, text(100), chunk=48, max_chunks=0)
    with pytest.raises(ContextError, match="66 tokens"):
        perplexity(engine, text(100), chunk=66)


def test_a_model_whose_weights_are_not_numbers_has_no_perplexity(llama: LlamaForCausalLM) -> None:
    values = {name: value.numpy().copy() for name, value in llama.state_dict().items()}
    values["model.norm.weight"][3] = np.nan
    tensors = {name: Tensor.from_float32(name, value) for name, value in values.items()}
    config, weights = families.from_hf(llama.config.to_diff_dict(), tensors)
    with (
        Engine(ReferenceExecutor(config, weights, context=64, n_blocks=4)) as engine,
        pytest.raises(FormatError, match="chunk 0: the model's logits are not numbers"),
    ):
        perplexity(engine, text(CHUNK), chunk=CHUNK)
