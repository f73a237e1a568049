"""Which protocol a request speaks, told by its path and headers, and how that protocol says a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from dapji.server import anthropic, ollama
from dapji.server.openai.common import problem_body
from dapji.server.problem import Problem
from dapji.server.wire import json_response


def speaks_anthropic(scope: Scope) -> bool:
    """Its clients name a version of the API with every request; /v1/models is OpenAI's too."""
    path: str = scope["path"]
    return path.startswith("/v1/messages") or (path.startswith("/v1/") and "anthropic-version" in Headers(scope=scope))


def problem_response(scope: Scope, problem: Problem, *, status: int | None = None) -> Response:
    """status: other than the problem's own."""
    body: Callable[[Problem], dict[str, Any]] = problem_body
    if scope["path"].startswith("/api/"):
        body = ollama.problem_body
    elif speaks_anthropic(scope):
        body = anthropic.problem_body
    return json_response(body(problem), status=status or problem.status, headers=problem.headers)
