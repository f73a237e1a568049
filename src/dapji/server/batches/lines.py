"""The lines of a batch's file, in OpenAI's form (https://platform.openai.com/docs/guides/batch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from dapji.server.answering import JsonObject
from dapji.server.problem import Problem
from dapji.server.wire import Strict, convert

_MOST_ERRORS = 100


class Line(Strict):
    """A request."""

    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: JsonObject


class LineError(msgspec.Struct, kw_only=True):
    """What is wrong with a file."""

    code: str
    message: str
    line: int | None = None
    """From 1."""
    param: str | None = None


def read_lines(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """Each line that is not empty, with its number from 1; of one that is longer than `limit` bytes the beginning."""
    with path.open("rb") as file:
        number, begins = 1, True
        while part := file.readline(limit + 1):
            if begins and part.strip():
                yield number, part
            begins = part.endswith(b"\n")
            number += begins


def parse(line: bytes) -> Line:
    """Raises Problem."""
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("invalid_request", f"this line is not JSON: {error}", code="invalid_json_line") from None
    return convert(value, Line)[0]


def check(
    path: Path, *, endpoint: str, most_bytes: int, most_lines: int, find_model: Callable[[str], object]
) -> tuple[int, list[LineError]]:
    """The number of requests, and what is wrong with them before any is asked; the fields of a body are its endpoint's
    to judge. most_bytes: of a line. find_model: raises Problem where there is none of that name."""
    errors: list[LineError] = []
    seen: dict[str, int] = {}
    total = 0
    for number, line in read_lines(path, most_bytes):
        total += 1
        try:
            if len(line) > most_bytes:
                raise Problem("too_large", f"this line is longer than {most_bytes} bytes", code="line_too_long")
            found = parse(line)
            _check(found, endpoint, find_model)
            first = seen.setdefault(found.custom_id, number)
            if first != number:
                told = f"custom_id {found.custom_id!r} is that of line {first}"
                raise Problem("invalid_request", told, "custom_id", code="duplicate_custom_id")
        except Problem as problem:
            code = problem.code or "invalid_request"
            errors.append(LineError(code=code, message=problem.message, line=number, param=problem.field))
            if len(errors) == _MOST_ERRORS:
                told = f"these are the first {_MOST_ERRORS} errors; what follows was not read"
                return total, [*errors, LineError(code="too_many_errors", message=told)]
    if total == 0:
        errors.append(LineError(code="empty_file", message="the file has no requests"))
    if total > most_lines:
        told = f"the file has {total} requests, more than this server's limit of {most_lines}"
        errors.append(LineError(code="too_many_requests", message=told))
    return total, errors


def _check(line: Line, endpoint: str, find_model: Callable[[str], object]) -> None:
    if line.url != endpoint:
        told = f"url {line.url!r} is not the endpoint of the batch, {endpoint!r}"
        raise Problem("invalid_request", told, "url", code="invalid_url")
    model = line.body.get("model")
    if not isinstance(model, str) or not model:
        told = "body.model is missing: every request of a batch names its model"
        raise Problem("invalid_request", told, "body.model", code="missing_required_parameter")
    try:
        find_model(model)
    except Problem as problem:
        problem.field = "body.model"
        raise
    if line.body.get("stream"):
        told = "body.stream: nobody is there to whom the answer of a batch could be streamed"
        raise Problem("invalid_request", told, "body.stream", code="invalid_request")
