"""`Record`: what a request came to, for logs and metrics. Never holds anything of its text."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Record:
    method: str
    route: str
    """The route's pattern, not the path: there are only so many."""
    started: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    """When it arrived, on the loop's clock."""
    status: int = 500
    """499: the client went away before its answer was whole."""
    key: str = ""
    background: bool = False
    """Whether nobody waits for the answer: others come first, and it may take any time."""
    model: str | None = None
    prompt: int = 0
    """Tokens; so `cached` and `generated`."""
    cached: int = 0
    generated: int = 0
    first_token: float | None = None
    """Seconds from its arrival."""
    seconds: float = 0.0
    """From its arrival to the end of its answer."""


current: ContextVar[Record] = ContextVar("current")
"""Of the request that is being answered."""
