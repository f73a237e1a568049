"""Values out of range are refused, with the value in the message."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dapji.engine import Request, Sampling
from dapji.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", 1.5),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-48),  # which is 0 in float32
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("logit_bias", {3: 101}),
        ("logit_bias", {-3: 1}),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_sampling_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{field}.*got ") as caught:
        Sampling(**{field: value})
    shown = next(iter(value)) if field == "logit_bias" and -3 in value else value
    shown = 101 if shown == {3: 101} else shown
    assert repr(shown) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt must have at least one token, got 0"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1, got 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be an integer from 0 to 4, got 5"),
        ({"stop_tokens": frozenset({-1})}, "stop_tokens: a token id must be an integer >= 0, got -1"),
        ({"logprobs": -1}, "logprobs must be an integer >= 0, got -1"),
    ],
)
def test_requests_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(**{"prompt": [1], **fields})
    assert caught.value.message == message


def test_split_counts_the_seed_up() -> None:
    sampling = Sampling(temperature=0.5, seed=2**64 - 2)
    assert sampling.split(3) == [Sampling(temperature=0.5, seed=seed) for seed in (2**64 - 2, 2**64 - 1, 0)]
    assert Sampling(top_k=3).split(2) == [Sampling(top_k=3)] * 2
