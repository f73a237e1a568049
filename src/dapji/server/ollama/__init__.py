"""Ollama's API."""

from __future__ import annotations

from typing import Any

from dapji.server.problem import Problem


def problem_body(problem: Problem) -> dict[str, Any]:
    return {"error": problem.message}
