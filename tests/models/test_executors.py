"""Executors: one sequence in pieces, several in any mix, blocks in any order, all cache formats, and the errors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import DISTINCT, EXECUTORS, ORIGINAL, TEXT, VOCAB, opened, oracle, oracle_logits, text, translated

from dapji.errors import ConfigError, ContextError, RequestError, UnavailableError, UsageError
from dapji.models import families
from dapji.models.executor import Executor, open_executor
from dapji.models.torch_executor import TorchExecutor
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.reference import KvFormat
from dapji.weights.checkpoint import open_checkpoint

TOLERANCE = 1e-4
"""Absolute (2e-5 is what occurs), on logits up to 5: matrix products of other shapes sum in another order."""


@dataclass(kw_only=True)
class Sequence:
    """A text whose tokens go to the executor in pieces."""

    tokens: list[int]
    pieces: list[int]
    blocks: list[int]
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    past: int = 0


def run(executor: Executor, sequences: list[Sequence]) -> None:
    """Step after step, a piece of every sequence that has one left."""
    while running := [s for s in sequences if s.pieces]:
        sizes = [s.pieces.pop(0) for s in running]
        starts = np.cumsum([0, *sizes], dtype=np.int32)
        width = max(len(s.blocks) for s in running)
        batch = Batch(
            tokens=np.concatenate(
                [s.tokens[s.past : s.past + n] for s, n in zip(running, sizes, strict=True)], dtype=np.int32
            ),
            positions=np.concatenate(
                [np.arange(s.past, s.past + n) for s, n in zip(running, sizes, strict=True)], dtype=np.int32
            ),
            starts=starts,
            blocks=np.array([s.blocks + [-1] * (width - len(s.blocks)) for s in running], dtype=np.int32),
            rows=np.arange(starts[-1], dtype=np.int32),
        )
        logits = executor.step(batch)
        for s, n, start in zip(running, sizes, starts, strict=False):
            s.logits.append(logits[start : start + n].copy())
            s.past += n


@pytest.mark.parametrize(("name", "kind"), DISTINCT)
@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([1] * 80, id="token-by-token"),
        pytest.param([7, 57, 1, 1, 14], id="uneven"),
        pytest.param([16, 16, 16, 32], id="blocks"),
        pytest.param([79, 1], id="prompt-and-one"),
    ],
)
def test_a_prompt_in_pieces_is_the_whole(name: str, kind: str, pieces: list[int]) -> None:
    config, tensors = translated(name)
    executor = opened(kind, config, tensors, context=TEXT, kv="f32")
    sequence = Sequence(tokens=text(), pieces=list(pieces), blocks=list(range(5)))
    run(executor, [sequence])
    np.testing.assert_allclose(np.concatenate(sequence.logits), oracle_logits(name)[:80], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "kind"), DISTINCT)
def test_a_batch_is_each_sequence_alone(name: str, kind: str) -> None:
    """Prompt chunks and decode tokens side by side, blocks scattered over the cache."""
    config, tensors = translated(name)
    blocks = np.random.default_rng(1).permutation(20).tolist()
    sequences = [
        Sequence(tokens=text(60, seed=1), pieces=[50] + [1] * 10, blocks=blocks[:4]),
        Sequence(tokens=text(80, seed=2), pieces=[1, 1, 30, 30, 18], blocks=blocks[4:9]),
        Sequence(tokens=text(9, seed=3), pieces=[8, 1], blocks=blocks[9:10]),
        Sequence(tokens=text(90, seed=4), pieces=[90], blocks=blocks[10:16]),
    ]
    run(opened(kind, config, tensors, context=TEXT, kv="f32", n_blocks=20), sequences)
    for sequence in sequences:
        alone = opened(kind, config, tensors, context=TEXT, kv="f32")
        want = alone.step(Batch.single(sequence.tokens))
        np.testing.assert_allclose(np.concatenate(sequence.logits), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name, kind in DISTINCT if kind == "torch-cpu"])
def test_what_a_cuda_graph_records_computes_the_same(name: str) -> None:
    """On the CPU, where nothing is recorded: a token each of one to nine sequences, by the operations that would be."""
    config, tensors = translated(name)
    executor = opened("torch-cpu", config, tensors, context=TEXT, kv="f32", n_blocks=36)
    assert isinstance(executor, TorchExecutor)
    lengths = range(30, 57, 3)
    blocks = np.arange(36, dtype=np.int32).reshape(9, 4)
    for n in (1, 9):
        sequences = [
            Sequence(tokens=text(length + 1, seed=length), pieces=[length], blocks=mine)
            for length, mine in zip(lengths[:n], blocks.tolist(), strict=False)
        ]
        run(executor, sequences)
        batch = Batch(
            tokens=np.array([s.tokens[-1] for s in sequences], dtype=np.int32),
            positions=np.array(lengths[:n], dtype=np.int32),
            starts=np.arange(n + 1, dtype=np.int32),
            blocks=blocks[:n],
            rows=np.arange(n, dtype=np.int32),
        )
        want = executor.step(batch)
        with torch.inference_mode():
            got = executor._decode(executor._ops(batch, 128)).logits
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_rows_choose_whose_logits_are_given(kind: str) -> None:
    config, tensors = translated("llama-3.2")
    executor = opened(kind, config, tensors, context=TEXT, kv="f32")
    whole = executor.step(Batch.single(text(40)))
    batch = Batch.single(text(40))
    chosen = Batch(
        tokens=batch.tokens,
        positions=batch.positions,
        starts=batch.starts,
        blocks=batch.blocks,
        rows=np.array([3, 39], dtype=np.int32),
    )
    np.testing.assert_allclose(executor.step(chosen), whole[[3, 39]], rtol=0, atol=TOLERANCE)
    assert executor.step(Batch.single(text(40), all_rows=False)).shape == (1, VOCAB)


@pytest.mark.parametrize(("name", "kind"), DISTINCT)
@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_a_copied_block_continues_alike(name: str, kind: str, kv: KvFormat) -> None:
    config, tensors = translated(name)
    executor = opened(kind, config, tensors, context=TEXT, kv=kv, n_blocks=6)
    first = Sequence(tokens=text(30), pieces=[28, 1, 1], blocks=[0, 1])
    run(executor, [first])
    executor.copy_block(1, 4)
    # the last two tokens again, in the copy; then the original is overwritten and does not matter
    run(executor, [Sequence(tokens=text(30, seed=9), pieces=[30], blocks=[3, 1])])
    again = Sequence(tokens=text(30), pieces=[1, 1], blocks=[0, 4], past=28)
    run(executor, [again])
    np.testing.assert_array_equal(np.concatenate(again.logits), np.concatenate(first.logits[1:]))


@pytest.mark.parametrize(("kv", "tolerance"), [("f16", 0.02), ("q8", 1.0)])
def test_a_rounded_cache_is_rounded_alike_everywhere(kv: KvFormat, tolerance: float) -> None:
    """tests/ops checks the rounding bit for bit; here a value may fall on the other side of a step, so that the bound
    is the effect of rounding itself on this model of large weights."""
    config, tensors = translated("llama-3.1")
    executors = [opened(kind, config, tensors, context=TEXT, kv=kv) for kind in EXECUTORS]
    reference, *others = (executor.step(Batch.single(text())) for executor in executors)
    exact = oracle_logits("llama-3.1")
    effect = np.abs(reference - exact).max()
    assert 1e-4 < effect < tolerance
    for other in others:
        assert np.abs(other - reference).max() < effect
        assert np.sqrt(np.mean((other - reference) ** 2)) < 0.2 * np.sqrt(np.mean((reference - exact) ** 2))


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_token_or_position_out_of_range_is_refused(kind: str) -> None:
    config, tensors = translated("llama-3.1")
    executor = opened(kind, config, tensors, context=40)
    with pytest.raises(ContextError, match="position 40 is beyond the context of 40 tokens"):
        executor.step(Batch.single(text(41)))
    for token in (VOCAB, -1):
        with pytest.raises(RequestError, match=f"token id {token} is beyond the vocabulary of {VOCAB}"):
            executor.step(Batch.single([1, token]))


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("reference", {"context": 513}, ConfigError, "a context of 513 tokens .* has 512"),
        ("torch", {"context": 0}, ConfigError, "a context of 0 tokens"),
        ("reference", {"device": "cuda"}, UsageError, "device is an option of the torch executor, not of reference"),
        ("reference", {"dtype": "bfloat16"}, UsageError, "dtype is an option of the torch executor"),
        ("torch", {"threads": 2}, UsageError, "threads is an option of the native executor, not of torch"),
        ("torch", {"activations": "q8"}, UsageError, "activations is an option of the reference executor"),
        ("torch", {"device": "vulkan"}, UsageError, "unknown device 'vulkan'\nhint: one of: cpu, cuda"),
        ("torch", {"device": "abacus"}, UsageError, "unknown device 'abacus'"),
        ("torch", {"device": "cuda:99"}, UnavailableError, "there is no device cuda:99"),
        ("torch", {"device": "cpu:1"}, UnavailableError, "there is no device cpu:1: torch .* sees 1 of type cpu"),
        ("quantum", {}, UsageError, "unknown executor 'quantum'"),
    ],
)
def test_wrong_options(kind: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    config, tensors = translated("llama-3.1")
    with pytest.raises(error, match=message):
        open_executor(kind, config, tensors, **{"context": ORIGINAL, **options})


def test_by_default_the_cache_holds_one_sequence() -> None:
    config, tensors = translated("llama-3.1")
    for kind in EXECUTORS:
        assert opened(kind, config, tensors, context=KV_BLOCK + 1).n_blocks == 2


def test_dapji_and_its_executors_do_not_import_torch() -> None:
    program = "import dapji, dapji.models.executor, dapji.models.families, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_torch_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name in ("torch", "dapji.models.torch_executor", "dapji.ops.torch")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_NoTorch(), *sys.meta_path])
    config, tensors = translated("llama-3.1")
    with pytest.raises(UnavailableError, match=r"torch is not installed\nhint: pip install 'dapji\[train\]'"):
        open_executor("torch", config, tensors, context=ORIGINAL)


class _NoTorch:
    """An import hook of an installation without torch."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")


@pytest.mark.parametrize("kind", EXECUTORS)
def test_closing_may_be_repeated(kind: str) -> None:
    config, tensors = translated("llama-3.1")
    executor = opened(kind, config, tensors, context=ORIGINAL)
    executor.close()
    executor.close()


@pytest.mark.parametrize("kind", ["native", "torch-cpu"])
@pytest.mark.parametrize("name", ["mixtral", "llama-4-dense-layers", "phi3"])
def test_weights_are_taken_as_they_lie_in_a_folder(name: str, kind: str, tmp_path: Path) -> None:
    """Mapped, and where several foreign tensors are one weight or the other way round, joined, turned and cut when
    asked for; `translated` has copied them."""
    oracle(name).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config, tensors = families.from_hf(checkpoint.metadata, checkpoint.tensors)
    got = opened(kind, config, tensors, context=TEXT, kv="f32").step(Batch.single(text()))
    np.testing.assert_allclose(got, oracle_logits(name), rtol=0, atol=TOLERANCE)
