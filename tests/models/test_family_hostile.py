"""Foreign configurations with one value that is absurd: whatever it is, the model is read or refused by us."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from tiny_models import TINY, translated

from dapji.errors import ConfigError
from dapji.models import families

ABSURD = (0, 1, -1, -8, 10**12, -1.5, 1e29, "x", None, [])


def changed(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """With one value replaced, also in the objects inside."""
    for key, value in values.items():
        inner = changed(value) if isinstance(value, dict) else ()
        yield from ({**values, key: other} for other in (*ABSURD, *inner))


def survives(read: Any, values: Mapping[str, Any], tensors: Any) -> int:
    """How many are refused; any other exception ends the test."""
    refused = 0
    for other in changed(values):
        try:
            read(other, tensors)
        except ConfigError:
            refused += 1
    return refused


@pytest.mark.parametrize("name", TINY)
def test_one_absurd_value(name: str) -> None:
    config, tensors = translated(name)
    assert survives(families.from_hf, *families.to_hf(config, tensors)) > 50
    try:
        metadata, named = families.to_gguf(config, tensors)
    except ConfigError:
        return  # what GGUF cannot say
    assert survives(families.from_gguf, metadata, named) > 50
