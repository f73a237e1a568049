"""Adapters: on every executor what PEFT computes, and beside it a base that does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft_adapters import RANK, loaded, make, written
from peft_adapters import logits as peft_logits
from tiny_models import (
    DISTINCT,
    EXECUTORS,
    TEXT,
    TOLERANCE,
    VOCAB,
    opened,
    oracle_logits,
    read,
    text,
    translated,
)

from dapji.errors import ConfigError
from dapji.models import families
from dapji.models.adapter import Adapter, adaptable
from dapji.models.torch_executor import load_pairs, load_weights, sequence_logits
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.low_rank import LowRank
from dapji.ops.tensor import Tensor
from dapji.ops.torch import TorchTables
from dapji.weights.adapter_file import open_adapter, write_adapter

DORA = ("llama-bias", "qwen2", "phi3", "gemma2", "deepseek-v2")
"""Biases, fused matrices, a norm after each part, and latent attention."""


def batch(sequences: list[list[int]], adapters: list[int] | None) -> Batch:
    """Whole sequences, all rows."""
    n_blocks = -(-max(map(len, sequences)) // KV_BLOCK)
    n = sum(map(len, sequences))
    return Batch(
        tokens=np.concatenate(sequences).astype(np.int32),
        positions=np.concatenate([np.arange(len(one)) for one in sequences]).astype(np.int32),
        starts=np.cumsum([0, *map(len, sequences)]).astype(np.int32),
        blocks=np.arange(len(sequences) * n_blocks, dtype=np.int32).reshape(len(sequences), n_blocks),
        rows=np.arange(n, dtype=np.int32),
        adapters=None if adapters is None else np.array(adapters, dtype=np.int32),
    )


def adapter_of(name: str, folder: Path, **options: Any) -> tuple[Adapter, NDArray[np.float32]]:
    """One that PEFT writes, and its logits of `text()` there."""
    model = make(name, **options)
    config, _ = translated(name)
    return open_adapter(written(model, folder), config), peft_logits(model)


@pytest.mark.parametrize(
    ("name", "kind", "dora"),
    [*((*each, False) for each in DISTINCT), *((name, kind, True) for name in DORA for kind in EXECUTORS)],
)
def test_executors_compute_what_peft_does(name: str, kind: str, dora: bool, tmp_path: Path) -> None:
    adapter, expected = adapter_of(name, tmp_path, use_dora=dora)
    assert all((pair.magnitude is not None) == dora for pair in adapter.pairs.values())
    assert np.abs(expected - oracle_logits(name)).max() > 0.5, "the adapter does something"
    config, tensors = translated(name)
    executor = opened(kind, config, tensors, context=TEXT, n_blocks=2 * TEXT // KV_BLOCK, kv="f32")
    number = executor.add_adapter(adapter)
    got = executor.step(batch([text(), text()], [number, 0]))
    np.testing.assert_allclose(got[:TEXT], expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got[TEXT:], oracle_logits(name), rtol=0, atol=TOLERANCE)
    executor.remove_adapter(number)
    np.testing.assert_allclose(executor.step(batch([text()], None)), oracle_logits(name), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_alpha": 7, "r": 20}])
def test_scales_and_ranks_are_as_in_peft(options: dict[str, Any], tmp_path: Path) -> None:
    """Patterns are for single modules, whose names may be given in part or as a whole."""
    patterns = {
        "rank_pattern": {"q_proj": 5, "model.layers.1.mlp.up_proj": 2, r"^model\.layers\.0\.mlp\.down_proj": 6},
        "alpha_pattern": {"layers.2.self_attn.v_proj": 11, r".*\.o_proj": 2},
    }
    adapter, expected = adapter_of("llama-2", tmp_path, **options, **patterns)
    assert {pair.rank for pair in adapter.pairs.values()} == {5, 2, 6, options.get("r", RANK)}
    config, tensors = translated("llama-2")
    for kind in EXECUTORS:
        executor = opened(kind, config, tensors, context=TEXT, kv="f32")
        got = executor.step(batch([text()], [executor.add_adapter(adapter)]))
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama-3.1", "phi3", "exaone4", "gemma2", "qwen2"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_gguf_base_takes_the_same_adapter(name: str, dora: bool, tmp_path: Path) -> None:
    """Rows in pairs, fused matrices: the file's order of rows is the base's own affair."""
    adapter, expected = adapter_of(name, tmp_path, use_dora=dora)
    metadata, named = families.to_gguf(*translated(name))
    config, tensors = families.from_gguf(metadata, named)
    again = open_adapter(tmp_path, config)
    assert again.pairs.keys() == adapter.pairs.keys()
    executor = opened("native", config, tensors, context=TEXT, kv="f32")
    got = executor.step(batch([text()], [executor.add_adapter(again)]))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gemma2"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_computes_what_peft_merges_into_the_base(name: str, dora: bool, tmp_path: Path) -> None:
    model = make(name, use_dora=dora)
    adapter = open_adapter(written(model, tmp_path), translated(name)[0])
    config, merged = read(model.merge_and_unload())
    executor = opened("reference", *translated(name), context=TEXT, kv="f32")
    got = executor.step(batch([text()], [executor.add_adapter(adapter)]))
    expected = opened("reference", config, merged, context=TEXT, kv="f32").step(batch([text()], None))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama-bias", "phi3", "exaone4", "gemma2"])
@pytest.mark.parametrize("what", ["all", "some", "all with magnitudes"])
def test_peft_loads_what_we_write(name: str, what: str, tmp_path: Path) -> None:
    """Random pairs of ranks and scales of their own for our matrices, all or some, also those that the layout joins."""
    config, tensors = translated(name)
    random = np.random.default_rng(0)
    pairs = {}
    for i, (key, (rows, cols)) in enumerate(adaptable(config).items()):
        if key != "head" and not (what == "some" and i % 3):
            a, b = (
                Tensor.from_float32(key, random.normal(0, 0.1, size).astype("f4")) for size in ((4, cols), (rows, 4))
            )
            lengths = np.linalg.norm(tensors[key].float32(), axis=1) * random.uniform(0.5, 2, rows).astype("f4")
            magnitude = lengths if what == "all with magnitudes" else None
            pairs[key] = LowRank(a=a, b=b, scale=2.0 if i % 2 else 1.5, magnitude=magnitude)
    write_adapter(tmp_path, config, Adapter(pairs=pairs), base="tiny")
    executor = opened("reference", config, tensors, context=TEXT, kv="f32")
    want = executor.step(batch([text()], [executor.add_adapter(Adapter(pairs=pairs))]))
    again = executor.step(batch([text()], [executor.add_adapter(open_adapter(tmp_path, config))]))
    np.testing.assert_allclose(again, want, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(peft_logits(loaded(name, tmp_path)), want, rtol=0, atol=TOLERANCE)
    assert np.abs(want - oracle_logits(name)).max() > 0.5


def test_magnitudes_are_of_all_matrices_or_of_none(tmp_path: Path) -> None:
    config, tensors = translated("phi3")

    def pair(name: str, magnitude: bool) -> LowRank:
        rows, cols = tensors[name].shape
        a, b = (Tensor.from_float32(name, np.ones(size, dtype="f4")) for size in ((2, cols), (rows, 2)))
        return LowRank(a=a, b=b, scale=1.0, magnitude=np.ones(rows, dtype="f4") if magnitude else None)

    q, k, o = (f"layers.0.attention.{part}" for part in "qko")
    with pytest.raises(ConfigError, match=r"no magnitude for layers.0.attention.o; PEFT's have one for all"):
        write_adapter(tmp_path, config, Adapter(pairs={k: pair(k, True), o: pair(o, False)}), base="tiny")
    with pytest.raises(ConfigError, match=r"no magnitude for layers.0.attention.v, which PEFT has .*qkv_proj"):
        write_adapter(tmp_path, config, Adapter(pairs={q: pair(q, True), k: pair(k, True)}), base="tiny")


@pytest.mark.parametrize("kind", EXECUTORS)
def test_the_base_beside_adapters_has_the_same_bits(kind: str, tmp_path: Path) -> None:
    """And adapters do not see each other: each is as alone, but for the order of sums, native for all bits."""
    adapters = [adapter_of("qwen2", tmp_path / str(seed), seed=seed, use_dora=seed == 2)[0] for seed in (1, 2)]
    executor = opened(kind, *translated("qwen2"), context=64, n_blocks=32, kv="f32")
    one, two = map(executor.add_adapter, adapters)
    texts = [text(40, seed=seed) for seed in range(6)]
    plain = executor.step(batch(texts, None)).reshape(6, 40, -1)
    chosen = [0, one, two, one, 0, two]
    got = executor.step(batch(texts, chosen)).reshape(6, 40, -1)
    for i, number in enumerate(chosen):
        if number == 0:
            np.testing.assert_array_equal(got[i].view(np.uint32), plain[i].view(np.uint32))
        alone = executor.step(batch([texts[i]], [number]))
        np.testing.assert_allclose(got[i], alone, rtol=0, atol=0 if kind == "native" else TOLERANCE)
    assert np.abs(got[1] - plain[1]).max() > 0.1


@pytest.mark.parametrize("name", ["qwen2", "deepseek-v2", "phi3"])
def test_gradients_of_an_adapter_are_those_of_peft(name: str, tmp_path: Path) -> None:
    model = make(name)
    config, tensors = translated(name)
    adapter = open_adapter(written(model, tmp_path), config)
    device, tokens = torch.device("cpu"), torch.tensor([text(64), text(64, seed=6)])
    weights = load_weights(tensors, device=device, dtype=torch.float32)
    pairs = load_pairs(adapter, weights, dtype=torch.float32)
    for pair in pairs.values():
        pair.a.requires_grad_()
        pair.b.requires_grad_()
    got = sequence_logits(config, weights, tokens, TorchTables(64, device), pairs)
    loss = torch.nn.functional.cross_entropy(got[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
    loss.backward()

    model.get_input_embeddings().padding_idx = None
    expected = model(tokens, labels=tokens, use_cache=False).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
    given = open_adapter(written(model, tmp_path / "gradients"), config)
    # the parts of a fused matrix share an A, so its gradient is the sum of theirs
    sums: dict[int, torch.Tensor] = {}
    for key, pair in given.pairs.items():
        np.testing.assert_allclose(pairs[key].b.grad, pair.b.float32(), rtol=0, atol=1e-5)
        sums[id(pair.a)] = sums.get(id(pair.a), 0) + pairs[key].a.grad
    for pair in given.pairs.values():
        np.testing.assert_allclose(sums[id(pair.a)], pair.a.float32(), rtol=0, atol=1e-5)
