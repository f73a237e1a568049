"""`Settings`: every limit of a server, in one place. What clients must know of them stands in /v1/models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dapji.weights import store


@dataclass(frozen=True, kw_only=True)
class Settings:
    max_running: int = 64
    """Requests computed at once."""
    max_waiting: int = 256
    """Requests that wait beside them; more are sent away."""
    max_body: int = 8 << 20
    """Bytes of a request."""
    max_file: int = 200 << 20
    """Bytes of a file that is uploaded; it is written to the disk as it comes."""
    max_batch: int = 50_000
    """Requests in a batch."""
    receive_timeout: float = 60.0
    """Seconds in which a request must arrive, from its first byte to its last."""
    timeout: float | None = None
    """Seconds from a request's arrival to the end of its answer; None: any number."""
    grace: float = 30.0
    """Seconds that answers under way have when the server is told to stop."""
    max_choices: int = 16
    """Answers to one request: prompts times n."""
    max_inputs: int = 2048
    """Texts to embed, or documents to rank, of one request."""
    max_top: int = 100
    """Likeliest tokens told for each token."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Names under which the server may be addressed; a page of another name that points here is refused (DNS
    rebinding)."""
    origins: tuple[str, ...] = ()
    """Foreign web pages that may ask from a browser."""
    folder: Path = field(default_factory=lambda: store.home() / "server")
    """Where what is kept lies."""
