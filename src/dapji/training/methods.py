"""The methods of recipes: what a table [method] becomes, and the windows that it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dapji.training.data.stream import Stream
from dapji.training.network import Network
from dapji.training.preference import Dpo, Kto, Orpo, Simpo
from dapji.training.reference import RatedSource, ReferencedSource, reference_log_probs
from dapji.training.settings import DpoSettings, KtoSettings, MethodSettings, OrpoSettings, SimpoSettings
from dapji.training.supervised import Supervised
from dapji.training.trainer import Method, Source


def make_method(settings: MethodSettings) -> Method:
    match settings:
        case DpoSettings():
            return Dpo(settings)
        case KtoSettings():
            return Kto(settings)
        case OrpoSettings():
            return Orpo(settings)
        case SimpoSettings():
            return Simpo(settings)
        case _:
            return Supervised()


def make_source(
    settings: MethodSettings,
    stream: Stream,
    network: Network,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Source:
    """The windows of a stream with what the method needs beside them. network: as it is before the first step. path: of
    the file where the log-probabilities of a reference are kept. All ranks call this."""
    match settings:
        case DpoSettings():
            return ReferencedSource(stream, reference_log_probs(network, stream, path, progress))
        case KtoSettings():
            return RatedSource(stream, reference_log_probs(network, stream, path, progress))
        case _:
            return stream
