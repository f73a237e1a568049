"""The decoder on every executor against transformers, on a tiny model of every generation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import (
    CASES,
    DEVICES,
    DISTINCT,
    EXECUTORS,
    ORIGINAL,
    TEXT,
    TINY,
    TOLERANCE,
    WINDOW,
    gradients,
    logits,
    oracle_gradients,
    oracle_logits,
    text,
    translated,
)

from dapji.models.config import LayerConfig
from dapji.models.executor import open_executor
from dapji.models.torch_executor import load_weights
from dapji.ops.batch import Batch

DIFFERENTIATED = [name for name, kind in DISTINCT if kind == "torch-cpu"]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_are_those_of_transformers(name: str, kind: str) -> None:
    """At every position: before, at and far beyond each threshold of position and window."""
    config, tensors = translated(name)
    np.testing.assert_allclose(logits(config, tensors, kind=kind), oracle_logits(name), rtol=0, atol=TOLERANCE)


def without_scaling(layer: LayerConfig) -> LayerConfig:
    assert layer.attention.rope is not None
    return replace(layer, attention=replace(layer.attention, rope=replace(layer.attention.rope, scaling=None)))


def without_window(layer: LayerConfig) -> LayerConfig:
    return replace(layer, attention=replace(layer.attention, window=None))


@pytest.mark.parametrize("name", [name for name in TINY if name.startswith(("llama-3.", "llama-yarn", "llama-linear"))])
def test_scaling_matters_at_these_positions(name: str) -> None:
    config, tensors = translated(name)
    plain = replace(config, layers=tuple(map(without_scaling, config.layers)))
    assert np.abs(logits(plain, tensors) - oracle_logits(name))[ORIGINAL:].max() > 0.1


def test_layers_without_rope_matter() -> None:
    config, tensors = translated("smollm3")
    rotated = replace(config, layers=(config.layers[0],) * config.n_layers)
    assert np.abs(logits(rotated, tensors) - oracle_logits("smollm3")).max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "qwen2-window"])
def test_the_window_matters_from_its_length_on(name: str) -> None:
    config, tensors = translated(name)
    difference = logits(replace(config, layers=tuple(map(without_window, config.layers))), tensors) - oracle_logits(
        name
    )
    assert np.abs(difference[:WINDOW]).max() <= TOLERANCE
    assert np.abs(difference[WINDOW:]).max() > 0.1


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("context", [ORIGINAL, 100, TEXT])
def test_dynamic_scaling_is_that_of_the_executors_context(kind: str, context: int) -> None:
    """transformers takes the length of the text that it sees in one pass; we the context, whatever the text."""
    config, tensors = translated("llama-dynamic")
    assert config.max_context == 8 * ORIGINAL
    want = oracle_logits("llama-dynamic", context)
    np.testing.assert_allclose(logits(config, tensors, context, kind=kind), want, rtol=0, atol=TOLERANCE)
    # a shorter text in the same context turns by the same angles: its logits are the beginning of the longer one's
    part = logits(config, tensors, ORIGINAL, kind=kind, context=context)
    np.testing.assert_allclose(part, want[:ORIGINAL], rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # from the thread of the first backward pass
@pytest.mark.parametrize("device", [torch.device(device) for device in DEVICES], ids=str)
@pytest.mark.parametrize("name", [*DIFFERENTIATED, "llama-3.2", "llama-bias", "qwen2-yarn"])
def test_gradients_are_those_of_transformers(name: str, device: torch.device) -> None:
    """Of the loss of two sequences, for every weight but the selection bias, which has none."""
    (want_loss, want), (loss, got) = oracle_gradients(name), gradients(name, device)
    assert abs(loss - want_loss) < 1e-5
    assert got.keys() == {key for key in want if not key.endswith(".selection_bias")}
    for key, gradient in got.items():
        np.testing.assert_allclose(  # of gradients up to 0.3; 1.5e-6 occurs
            gradient, want[key].float32(), rtol=1e-4, atol=5e-6, err_msg=key
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_bfloat16_is_as_near_float32_as_that_of_transformers(name: str, device: str) -> None:
    """8 bits of mantissa: an error of some 2^-8 of a logit's magnitude per layer, and where experts are chosen at times
    another one. Here 0.7 to 1.3 times as much as there."""
    config, tensors = translated(name)
    executor = open_executor("torch", config, tensors, context=TEXT, kv="f32", device=device, dtype="bfloat16")
    got, want = executor.step(Batch.single(text())), oracle_logits(name)
    error, theirs = (np.sqrt(np.mean((x - want) ** 2)) for x in (got, oracle_logits(name, dtype=torch.bfloat16)))
    assert 0 < error < 1.5 * theirs


def test_what_chooses_experts_stays_float32() -> None:
    _, tensors = translated("qwen3-moe")
    weights = load_weights(tensors, device=torch.device("cpu"), dtype=torch.bfloat16)
    name = "layers.0.feed_forward.router"
    np.testing.assert_array_equal(weights[name], tensors[name].float32())
    assert {weight.dtype for name, weight in weights.items() if "router" not in name} == {torch.bfloat16}
