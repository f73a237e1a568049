"""How far a model's next-token distributions are from those of what it was made from, on texts.

As llama.cpp's `llama-perplexity --kl-divergence` compares a quantised model with its original, here of those tokens
that training would learn. Both models compute side by side, so that no distributions are stored. Takes token ids;
which text they are is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapji.engine.sampling import log_probabilities
from dapji.errors import FormatError
from dapji.files import Files
from dapji.models.adapter import Adapter
from dapji.models.executor import Executor, ExecutorKind, default_kind, open_executor
from dapji.ops.batch import KV_BLOCK, Batch

_CHUNK = 64
"""Tokens of a text in one step: as many rows of logits are held of each model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Tokens that see each other, of which some are judged."""

    ids: NDArray[np.int32]
    """[T]"""
    judged: NDArray[np.bool_]
    """[T] never the first."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Means over all judged tokens; natural logarithms."""

    tokens: int
    base_loss: float | None
    """-ln p of the tokens that are there, by the source without its adapter; None where it has none."""
    source_loss: float
    """By the source, with its adapter."""
    loss: float
    """By the model."""
    kl: float
    """KL(source || model), over the whole vocabulary."""
    kl_error: float
    """Standard error of that mean."""
    same_top: float
    """Share of places in which both have the same likeliest token."""


def divergence(
    source: Files,
    adapter: Adapter | None,
    model: Files,
    texts: Sequence[Text],
    *,
    executor: ExecutorKind | None = None,
    threads: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Divergence:
    """Of a model from its source, which has an adapter beside it or none. Both as they run: on the executor (by default
    native where it was built, which rounds activations that are multiplied by quantised weights), with a cache of
    float32. progress: called after each text.

    Raises FormatError where a model gives no numbers, ConfigError where a text is longer than the models' context.
    """
    kind = default_kind() if executor is None else executor
    context = max(len(text.ids) for text in texts)
    rows: list[NDArray[np.float64]] = []
    opened: list[Executor] = []
    try:
        for files, sequences in ((source, 1 if adapter is None else 2), (model, 1)):
            blocks = sequences * -(-context // KV_BLOCK)
            opened.append(
                open_executor(
                    kind, files.config, files.tensors, context=context, n_blocks=blocks, threads=threads, kv="f32"
                )
            )
        adapters = [0] if adapter is None else [0, opened[0].add_adapter(adapter)]
        for text in texts:
            for start in range(0, len(text.ids) - 1, _CHUNK):
                rows.append(_judged(text, start, opened[0], opened[1], adapters))
            progress()
    finally:
        for each in opened:
            each.close()
    values = np.concatenate(rows)
    if np.isnan(values).any():
        raise FormatError("the model's logits are not numbers", hint="its weights are probably damaged")
    base_loss, source_loss, loss, kl, same_top = values.mean(axis=0).tolist()
    return Divergence(
        tokens=len(values),
        base_loss=None if adapter is None else base_loss,
        source_loss=source_loss,
        loss=loss,
        kl=kl,
        kl_error=float(values[:, 3].std()) / math.sqrt(len(values)),
        same_top=same_top,
    )


def _judged(text: Text, start: int, source: Executor, model: Executor, adapters: Sequence[int]) -> NDArray[np.float64]:
    """[R, 5] of the judged tokens that follow those from `start` on: the three losses, KL, whether the top is the same.
    What is before `start` is in the caches. adapters: of the source, none (0) first."""
    end = min(start + _CHUNK, len(text.ids) - 1)
    places = start + np.flatnonzero(text.judged[start + 1 : end + 1])
    labels = text.ids[places + 1]
    logits = source.step(_batch(text, start, end, places, adapters))  # of the same rows, without and with the adapter
    p = log_probabilities(logits[len(logits) - len(labels) :])
    taken = np.arange(len(labels)), labels
    losses = [-log_probabilities(logits[: len(labels)])[taken], -p[taken]]
    q = log_probabilities(model.step(_batch(text, start, end, places, [0])))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    return np.stack([*losses, -q[taken], kl, p.argmax(axis=1) == q.argmax(axis=1)], axis=1)


def _batch(text: Text, start: int, end: int, places: NDArray[np.intp], adapters: Sequence[int]) -> Batch:
    """The tokens from `start` to `end`, once for each of `adapters`."""
    n, n_sequences = end - start, len(adapters)
    n_blocks = -(-len(text.ids) // KV_BLOCK)
    return Batch(
        tokens=np.tile(text.ids[start:end], n_sequences),
        positions=np.tile(np.arange(start, end, dtype=np.int32), n_sequences),
        starts=np.arange(n_sequences + 1, dtype=np.int32) * n,
        blocks=np.arange(n_sequences * n_blocks, dtype=np.int32).reshape(n_sequences, n_blocks),
        rows=np.concatenate([places - start + i * n for i in range(n_sequences)]).astype(np.int32),
        adapters=np.array(adapters, dtype=np.int32),
    )
