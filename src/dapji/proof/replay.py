"""`Passage`: tokens and what a model thinks of each place; made on one executor, replayed on any.

What an executor gives is compared by the Kullback-Leibler divergence from what was kept: the mean over a passage's
places, in nats, over the likeliest tokens there and all others as one. Knows no files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from dapji.engine.sampling import log_probabilities
from dapji.errors import FormatError, RequestError
from dapji.files import Files
from dapji.models.adapter import Adapter
from dapji.models.executor import Executor, ExecutorKind, open_executor
from dapji.models.size import parameters
from dapji.ops import native
from dapji.ops.batch import Batch
from dapji.ops.reference import Activations

K = 5
"""Tokens that are kept of each place."""
ANSWER = 12
"""Most tokens of an answer."""
LARGEST = 4 << 30
"""Bytes of weights in float32 up to which the reference computes a certificate, and torch is measured beside it."""
NOISE = 1e-5
"""Nats. What float32 sums in another order may differ by: far more than was measured (docs/proof.md), and so little
that in the mean a token of probability 0.5 moves by 0.002."""
_DIGITS = 6
"""Of logarithms, after the point: what is lost is below NOISE."""

Floats = NDArray[np.float64]
Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Passage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    tokens: tuple[Id, ...]
    """[n]; the last of them may be an answer of the model's, each the likeliest after those before."""
    adapter: bool
    """Whether with the adapter that is certified."""
    likeliest: tuple[tuple[Id, ...], ...]
    """[n, K] of what follows each token, the likeliest first."""
    log_probs: tuple[tuple[float, ...], ...]
    """[n, K] natural logarithms."""

    def __post_init__(self) -> None:
        widths = {len(each) for each in (*self.likeliest, *self.log_probs)}
        if len(widths) != 1 or not len(self.tokens) == len(self.likeliest) == len(self.log_probs):
            raise ValueError("tokens, likeliest and log_probs are not of the same places")


class Tolerance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nats: a passage's mean divergence."""

    measured: float
    """The largest of any passage when the certificate was made."""
    allowed: float


class Runner:
    """A model on an executor, a passage at a time, with or without its adapter. A context manager."""

    def __init__(
        self,
        kind: ExecutorKind,
        files: Files,
        adapter: Adapter | None,
        *,
        context: int,
        activations: Activations = "f32",
    ) -> None:
        """Raises as `open_executor`; keys and values are float32, so that only the arithmetic of weights differs."""
        self._executor: Executor = open_executor(
            kind, files.config, files.tensors, context=context, kv="f32", activations=activations
        )
        try:
            self._adapter = 0 if adapter is None else self._executor.add_adapter(adapter)
        except BaseException:
            self._executor.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.close()

    def log_probs(self, tokens: Sequence[int], *, adapter: bool, past: int = 0) -> Floats:
        """[n, V] of what follows each token. past: how many were computed just before."""
        batch = Batch.single(list(tokens), past=past)
        if adapter:
            batch = dataclasses.replace(batch, adapters=np.array([self._adapter], dtype=np.int32))
        with np.errstate(all="ignore"):  # what a damaged weight gives is compared like any other number
            return log_probabilities(self._executor.step(batch))

    def passage(self, name: str, prompt: Sequence[int], *, adapter: bool, answer: int, vocab_size: int) -> Passage:
        """With the model's own answer to the prompt. answer: how many tokens. vocab_size: ids from here on are
        none. Raises FormatError where the model gives no numbers."""
        tokens, places = list(prompt), self.log_probs(prompt, adapter=adapter)[:, :vocab_size]
        if np.isnan(places).any():
            raise FormatError("the model's logits are not numbers", hint="its weights are probably damaged")
        while len(tokens) < len(prompt) + answer:
            tokens.append(int(places[-1].argmax()))
            row = self.log_probs(tokens[-1:], adapter=adapter, past=len(tokens) - 1)[:, :vocab_size]
            places = np.concatenate([places, row])
        likeliest = np.argsort(-places, axis=-1, kind="stable")[:, :K]  # [n, K]
        kept = np.take_along_axis(places, likeliest, axis=-1).round(_DIGITS)
        return Passage(
            name=name,
            tokens=tuple(tokens),
            adapter=adapter,
            likeliest=tuple(map(tuple, likeliest.tolist())),
            log_probs=tuple(map(tuple, kept.tolist())),
        )

    def divergence(self, passage: Passage) -> tuple[float, int]:
        """From what the passage has: mean KL over its places, and in how many the likeliest token is another.

        NaN where the model gives no numbers. Raises RequestError where it has not all of these tokens."""
        ids = np.array(passage.likeliest)
        places = self.log_probs(passage.tokens, adapter=passage.adapter)
        if ids.max() >= places.shape[-1]:
            raise RequestError(f"token id {ids.max()} is beyond the vocabulary of {places.shape[-1]}")
        before, now = np.array(passage.log_probs), np.take_along_axis(places, ids, axis=-1)
        others = int((places.argmax(axis=-1) != ids[:, 0]).sum())
        p, q = _with_rest(np.exp(before)), _with_rest(np.exp(now))
        return float((p * np.log(p / q)).sum(axis=-1).mean()), others


def _with_rest(kept: Floats) -> Floats:
    """[n, K + 1] probabilities, all other tokens as one; none is quite 0."""
    rest = 1 - kept.sum(axis=-1, keepdims=True)
    return np.concatenate([kept, rest], axis=-1).clip(1e-9)


def makers(files: Files) -> list[tuple[ExecutorKind, Activations]]:
    """On what a certificate is computed, and then on what else its divergence is measured.

    The reference is the truth. It also stands in for the native executor where that was not built: rounded as there.
    Models that are too large for it are computed by the native executor alone.
    """
    small = 4 * parameters(files.config) <= LARGEST
    if not small and native.available():
        return [("native", "f32")]
    others: list[tuple[ExecutorKind, Activations]] = [("native", "f32") if native.available() else ("reference", "q8")]
    if importlib.util.find_spec("torch") is not None:
        others.append(("torch", "f32"))
    return [("reference", "f32"), *others]
