"""What the engine's tests run on: a fake executor whose logits hash the history that it finds in its cache, and a tiny
random model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from hashlib import blake2b
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from dapji.engine.blocks import BlockPool
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig, weight_shapes
from dapji.models.executor import Executor, ExecutorKind, open_executor
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.formats import FORMATS
from dapji.ops.reference import KvFormat
from dapji.ops.rope import RopeConfig
from dapji.ops.tensor import Tensor

VOCAB = 32


def hash_logits(history: NDArray[np.int32]) -> NDArray[np.float32]:
    """[VOCAB]: a function of the whole history and of nothing else."""
    key = int.from_bytes(blake2b(history.astype(np.int32).tobytes(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(VOCAB, dtype=np.float32)


def repeating_logits(history: NDArray[np.int32]) -> NDArray[np.float32]:
    """`hash_logits` with a liking for the token six places before: texts that mostly repeat and sometimes do not."""
    logits = hash_logits(history)
    if len(history) >= 6:
        logits[history[-6]] += 4
    return logits


def greedy(prompt: list[int], n: int) -> list[int]:
    """The n tokens that greedy decoding gives, computed without an engine."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(hash_logits(np.array(tokens)).argmax()))
    return tokens[len(prompt) :]


class HashExecutor:
    """Its cache holds token ids and positions, so that a block of another history changes the answer or fails. Hidden
    states are what the logits are."""

    def __init__(
        self,
        *,
        n_blocks: int = 64,
        context: int = 1024,
        on_step: Callable[[], None] | None = None,
        logits: Callable[[NDArray[np.int32]], NDArray[np.float32]] = hash_logits,
    ) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB, dim=VOCAB, headless=False)
        self.context = context
        self.n_blocks = n_blocks
        self.batches: list[Batch] = []
        self._on_step = on_step
        self._logits = logits
        self._cache = np.full((2, n_blocks * KV_BLOCK), -1, dtype=np.int32)  # tokens, positions

    def step(self, batch: Batch, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        self.batches.append(batch)
        if self._on_step is not None:
            self._on_step()
        assert batch.positions.max() < self.context
        logits = np.empty((len(batch.rows), VOCAB), dtype=np.float32)
        row = 0
        written: set[int] = set()
        for b in range(len(batch.starts) - 1):
            new = slice(batch.starts[b], batch.starts[b + 1])
            slots = batch.slots(b)
            own = slots[batch.positions[new]]
            assert not written & set(own.tolist()), "two sequences write one slot"
            written |= set(own.tolist())
            self._cache[:, own] = batch.tokens[new], batch.positions[new]
            assert np.array_equal(self._cache[1, slots], np.arange(len(slots))), "a block of another sequence"
            for t in range(new.start, new.stop):
                history = self._cache[0, slots[: batch.positions[t] + 1]]
                if row < len(batch.rows) and batch.rows[row] == t:
                    logits[row] = self._logits(history)
                    row += 1
                if hidden is not None and t in batch.hidden_rows:
                    hidden[np.searchsorted(batch.hidden_rows, t)] = self._logits(history)
        assert row == len(batch.rows)
        return logits

    def copy_block(self, source: int, target: int) -> None:
        source, target = source * KV_BLOCK, target * KV_BLOCK
        self._cache[:, target : target + KV_BLOCK] = self._cache[:, source : source + KV_BLOCK]

    def close(self) -> None:
        pass


def tree(pool: BlockPool) -> dict[int, tuple[int, ...]]:
    """Each block of the pool's tree, with all tokens from the root to its end."""
    found: dict[int, tuple[int, ...]] = {}

    def visit(parent: int, history: tuple[int, ...]) -> None:
        for key, block in pool._children[parent].items():
            assert block not in found, "twice in the tree"
            found[block] = (*history, *np.frombuffer(key, dtype=np.int32).tolist())
            visit(block, found[block])

    visit(pool.root, ())
    return found


class Gate:
    """Lets steps through one by one: `on_step` of a HashExecutor."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)

    def __call__(self) -> None:
        self.entered.release()
        assert self._permits.acquire(timeout=60)

    def open(self, steps: int = 1) -> None:
        self._permits.release(steps)


def tiny_config(*, window: int | None = None) -> ModelConfig:
    attention = AttentionConfig(
        n_heads=4, n_kv_heads=2, head_dim=16, rope=RopeConfig(dim=16, theta=10000.0), window=window
    )
    layer = LayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=96))
    return ModelConfig(
        family="llama", dim=64, vocab_size=64, max_context=512, norm_eps=1e-5, layers=(layer, layer), tied_head=False
    )


def tiny_executor(
    kind: ExecutorKind = "reference",
    *,
    quantized: bool = False,
    kv: KvFormat = "f16",
    n_blocks: int = 32,
    window: int | None = None,
) -> Executor:
    """Weights large enough that the distribution is far from uniform and every token of the context matters.

    quantized: the matrices as Q8_0 (per 32 values a float16 scale and 32 int8 codes), else float32.
    """
    config = tiny_config(window=window)
    rng = np.random.default_rng(7)
    tensors = {}
    for name, shape in weight_shapes(config).items():
        values = 0.3 * rng.standard_normal(shape, dtype=np.float32)
        tensors[name] = Tensor.from_float32(name, values)
        if quantized and len(shape) == 2:
            codes = np.rint(values * 100).clip(-127, 127).astype(np.int8).reshape(shape[0], -1, 32)
            scales = np.full((*codes.shape[:2], 1), 0.01, dtype=np.float16)
            data = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=-1).reshape(shape[0], -1)
            tensors[name] = Tensor(name=name, format=FORMATS["Q8_0"], shape=shape, source=data)
    return open_executor(kind, config, tensors, context=512, n_blocks=n_blocks, kv=kv)
