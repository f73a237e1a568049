"""`Problem`: what a request is answered with when it is not answered. Each protocol writes it in its own form."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Literal

from dapji.errors import (
    ContextError,
    DapjiError,
    DeadlineError,
    ModelNotFound,
    RequestError,
    TemplateError,
    TokenizerError,
    UnavailableError,
)

Kind = Literal[
    "invalid_request",
    "unauthorized",
    "forbidden",
    "not_found",
    "slow",
    "too_large",
    "busy",
    "unavailable",
    "out_of_time",
    "internal",
]
STATUS: dict[Kind, int] = {
    "invalid_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "slow": 408,
    "too_large": 413,
    "busy": 429,
    "unavailable": 503,
    "out_of_time": 504,
    "internal": 500,
}


@dataclass(eq=False)
class Problem(Exception):
    """Raised by whoever finds it, written by the protocol's route."""

    kind: Kind
    message: str
    field: str | None = None
    """Which of the request is wrong, as a path: messages[0].content."""
    code: str | None = None
    """A finer name of the kind, where clients know one."""
    headers: dict[str, str] = attribute(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def status(self) -> int:
        return STATUS[self.kind]

    @staticmethod
    def of(error: DapjiError) -> Problem:
        """What an error of ours means to who asked."""
        message = str(error).replace("\nhint: ", ". Hint: ")
        if isinstance(error, ContextError):
            return Problem("invalid_request", message, code="context_length_exceeded")
        if isinstance(error, RequestError | TemplateError | TokenizerError):
            return Problem("invalid_request", message)
        if isinstance(error, ModelNotFound):
            return Problem("not_found", message, field="model", code="model_not_found")
        if isinstance(error, DeadlineError):
            return Problem("out_of_time", message)
        return Problem("unavailable" if isinstance(error, UnavailableError) else "internal", message)
