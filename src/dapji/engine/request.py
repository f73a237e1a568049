"""What goes into an engine and comes out: `Request`, `Sampling`, `Output`, `Finish`, `Usage`, `Timings`, `Scores`.

Plain data, checked on creation against everything that can be checked without a model. Token ids only: knows neither
text nor templates. What depends on the model (vocabulary, context) is checked by `Engine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dapji.errors import RequestError

_MISSING_HINT = "leave it out for the default"


def _check_number(name: str, value: object, condition: str, valid: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not valid(value):
        raise RequestError(f"{name} must be {condition}, got {value!r}", hint=_MISSING_HINT)


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    condition = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise RequestError(f"{name} must be {condition}, got {value!r}", hint=_MISSING_HINT)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits. Every default is neutral: the model's own distribution.

    The steps, in this order:

    1. repetition penalty, frequency and presence penalty, logit bias;
    2. temperature; 0 takes the largest value of step 1 and skips the rest;
    3. top-k, top-p, min-p, typical-p, each on what the one before left, renormalised (transformers' order).

    Raises RequestError for a value out of range.
    """

    temperature: float = 1.0
    """>= 0; logits are divided by it; 0: greedy."""
    top_k: int = 0
    """Keep the k most likely tokens (and those tied with the k-th); 0: all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose mass reaches p (and those tied with the last) (Holtzman et al. 2020);
    1: all."""
    min_p: float = 0.0
    """Drop tokens less likely than p times the likeliest (Nguyen et al. 2024); 0: none."""
    typical_p: float = 1.0
    """Keep the fewest tokens whose surprise is closest to the entropy and whose mass reaches p (and those tied with the
    last) (Meister et al. 2023); 1: all."""
    repetition_penalty: float = 1.0
    """1e-6 to 1e6; logits of tokens in prompt or answer are divided (positive) or multiplied (negative) by it
    (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """-2 to 2; subtracted from a token's logit once for each time it stands in the answer."""
    presence_penalty: float = 0.0
    """-2 to 2; subtracted once from the logit of each token that stands in the answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> -100 to 100, added to its logit."""
    seed: int | None = None
    """0 to 2^64 - 1: same seed, same tokens, whatever else is in the batch. None: drawn afresh."""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, "finite and >= 0", lambda v: 0 <= v < math.inf)
        _check_integer("top_k", self.top_k, 0)
        _check_number("top_p", self.top_p, "> 0 and <= 1", lambda v: 0 < v <= 1)
        _check_number("min_p", self.min_p, ">= 0 and <= 1", lambda v: 0 <= v <= 1)
        _check_number("typical_p", self.typical_p, "> 0 and <= 1", lambda v: 0 < v <= 1)
        _check_number("repetition_penalty", self.repetition_penalty, "from 1e-6 to 1e6", lambda v: 1e-6 <= v <= 1e6)
        _check_number("frequency_penalty", self.frequency_penalty, "from -2 to 2", lambda v: -2 <= v <= 2)
        _check_number("presence_penalty", self.presence_penalty, "from -2 to 2", lambda v: -2 <= v <= 2)
        for token, bias in self.logit_bias.items():
            _check_integer("logit_bias: a token id", token, 0)
            _check_number(f"logit_bias[{token}]", bias, "from -100 to 100", lambda v: -100 <= v <= 100)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, 2**64 - 1)

    def split(self, n: int) -> list[Sampling]:
        """For n answers to one prompt: they differ in the seed, which counts up from this one's, if it has one."""
        if self.seed is None:
            return [self] * n
        return [replace(self, seed=(self.seed + i) % 2**64) for i in range(n)]


class Constraint(Protocol):
    """Which tokens may come next. For one answer; the engine's thread alone calls it."""

    source: str
    """The grammar as llguidance reads it, for an engine that computes the masks itself: JSON, {"grammars": [...]}, the
    first the whole, which may name the others as @NAME."""

    def allowed(self) -> NDArray[np.intp]:
        """Their ids, rising, at least one. Should have been computed beside the step; an error ends the request."""
        ...

    def push(self, token: int) -> None:
        """The token that was drawn."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue. Raises RequestError for a value out of range."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_tokens: int | None = None
    """Most tokens to generate, an end token included; None: until the context is full."""
    min_tokens: int = 0
    """Stop tokens get no probability before this many tokens. `stop` is not held back by it."""
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    """Token ids that end the answer, besides the engine's end tokens."""
    ignore_eos: bool = False
    """The engine's end tokens do not end this answer (`stop_tokens` still do)."""
    stop: Callable[[int], bool] | None = None
    """Called with every generated token except a stop token, in order, before its Output is delivered; True ends the
    answer. Runs on the engine's thread: must be quick. This is how the layer that knows text stops at strings."""
    constraint: Constraint | None = None
    """None: any token may come. It decides of stop tokens too."""
    logprobs: int | None = None
    """None: none. n: log-probability of each generated token and of the n likeliest."""
    background: bool = False
    """Others go first: it waits behind them, and gives up its KV blocks for them and is computed again later."""
    adapter: int = 0
    """As `Engine.add_adapter` gave it; 0: the model as it is."""

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise RequestError("prompt must have at least one token, got 0", hint="begin with the BOS token")
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        for token in self.stop_tokens:
            _check_integer("stop_tokens: a token id", token, 0)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprobs:
    """Natural logarithms of the model's own distribution: before penalties, bias, temperature and filters."""

    chosen: float
    """Of the token that was generated."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens, likeliest first, as (id, log-probability); ties by id."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """Of a text's tokens given those before them; natural logarithms of the model's own distribution."""

    chosen: NDArray[np.float64]
    """[n]: of each token of the text."""
    top: Sequence[tuple[tuple[int, float], ...]]
    """[n]: the likeliest tokens in its place, as in `Logprobs`; none where none were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens that a request has used."""

    prompt: int
    cached: int
    """Prompt tokens whose keys and values were already in the cache when the request was admitted."""
    generated: int
    """An end token included."""
    proposed: int
    """Tokens computed on the guess that they come next (docs/engine.md, speculation)."""
    accepted: int
    """Those of them that did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds, on the engine's clock."""

    first_token: float
    """From submission to the first generated token: waiting and reading the prompt."""
    decode: float
    """From the first generated token to the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """Why and how a request ended."""

    reason: Literal["stop", "length"]
    stop_token: int | None
    """The stop token that ended it (it is also the last Output's token); None if `stop` or the length did."""
    usage: Usage
    timings: Timings

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, the first token (which the prompt pays for) left out; None for fewer than two tokens."""
        return (self.usage.generated - 1) / self.timings.decode if self.timings.decode > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One generated token."""

    token: int
    logprobs: Logprobs | None
    """As the request asked."""
    finish: Finish | None
    """On the last token only."""
