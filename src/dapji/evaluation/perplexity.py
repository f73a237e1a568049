"""Perplexity of a model on a token sequence, by the procedure of llama.cpp's `llama-perplexity`.

The text is cut into chunks of `chunk` tokens that do not see each other. Of each chunk the second half is scored, so
that every scored token has at least chunk/2 tokens of context. Knows token ids only, neither text nor files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dapji.engine import BaseEngine
from dapji.errors import FormatError, UsageError


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log likelihood, and the standard error of that mean carried through exp."""

    value: float
    error: float
    tokens: int
    """Scored tokens."""
    chunks: int


def perplexity(
    engine: BaseEngine,
    tokens: Sequence[int],
    *,
    chunk: int = 512,
    max_chunks: int | None = None,
    bos_id: int | None = None,
    adapter: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Score `tokens` in chunks; what does not fill one at the end is left out.

    tokens: of the whole text, with the BOS in front where the model wants one (so that chunks lie as the peer's do).
    bos_id: where the model wants one, it replaces the first token of every chunk. adapter: as the engine knows it.
    progress: called after each chunk with chunks done, chunks in all, and the perplexity so far.
    Raises UsageError for numbers that make no sense and a text shorter than one chunk, ContextError where a chunk
    exceeds the engine's context, FormatError where the model gives no numbers.
    """
    if chunk < 6 or chunk % 2:  # an error needs two scored tokens
        raise UsageError(f"chunk ({chunk}) must be an even number of at least 6 tokens")
    if max_chunks is not None and max_chunks < 1:
        raise UsageError(f"max_chunks ({max_chunks}) must be at least 1")
    n_chunks = len(tokens) // chunk
    if n_chunks == 0:
        raise UsageError(
            f"the text has {len(tokens)} tokens, fewer than one chunk ({chunk})",
            hint="take a longer text or smaller chunks",
        )
    if max_chunks is not None:
        n_chunks = min(n_chunks, max_chunks)
    losses = np.empty((n_chunks, chunk - chunk // 2 - 1))
    for i in range(n_chunks):
        ids = list(tokens[i * chunk : (i + 1) * chunk])
        if bos_id is not None:
            ids[0] = bos_id
        losses[i] = -engine.score(ids, start=chunk // 2 + 1, adapter=adapter).chosen
        if np.isnan(losses[i]).any():
            raise FormatError(f"chunk {i}: the model's logits are not numbers", hint="its weights are probably damaged")
        if progress is not None:
            progress(i + 1, n_chunks, math.exp(float(losses[: i + 1].mean())))
    value = math.exp(float(losses.mean()))
    error = value * float(losses.std(ddof=1)) / math.sqrt(losses.size)
    return Perplexity(value=value, error=error, tokens=losses.size, chunks=n_chunks)
