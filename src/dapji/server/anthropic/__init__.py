"""Anthropic's Messages API."""

from __future__ import annotations

from typing import Any

from dapji.server.problem import Kind, Problem

_TYPES: dict[Kind, str] = {
    "invalid_request": "invalid_request_error",
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "not_found_error",
    "slow": "invalid_request_error",
    "too_large": "request_too_large",
    "busy": "rate_limit_error",
    "unavailable": "api_error",
    "out_of_time": "timeout_error",
    "internal": "api_error",
}


def problem_body(problem: Problem) -> dict[str, Any]:
    return {"type": "error", "error": {"type": _TYPES[problem.kind], "message": problem.message}}
