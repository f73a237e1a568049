"""Requests, KV blocks, scheduler, sampling: token ids in, token ids out.

`Engine` runs any number of requests at once on one executor of dapji.models. Knows neither text nor templates nor
files; the layer above (dapji.model) turns messages into ids and ids into text. A request's life: docs/engine.md.
"""

from dapji.engine.base import AsyncStream, BaseEngine, Stream
from dapji.engine.engine import Engine
from dapji.engine.request import Finish, Logprobs, Output, Request, Sampling, Scores, Timings, Usage
from dapji.engine.sampling import seed_of
from dapji.engine.stop import StopStrings

__all__ = [
    "AsyncStream",
    "BaseEngine",
    "Engine",
    "Finish",
    "Logprobs",
    "Output",
    "Request",
    "Sampling",
    "Scores",
    "StopStrings",
    "Stream",
    "Timings",
    "Usage",
    "seed_of",
]
