"""What the fixture `dapji` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str


Dapji = Callable[..., Result]
