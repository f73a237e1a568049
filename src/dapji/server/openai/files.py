"""/v1/files: the input and the output of batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from dapji.server.answering import JsonObject, key_of
from dapji.server.batches.form import read_form
from dapji.server.batches.store import File, Purpose, store_of
from dapji.server.problem import Problem
from dapji.server.service import Service
from dapji.server.wire import NoQuery, Reads, Strict, convert, json_response, read_query

PURPOSES: tuple[Purpose, ...] = ("batch", "batch_output")
"""Of the files that clients see."""


class ExpiresAfter(Strict):
    anchor: Literal["created_at"]
    seconds: Annotated[int, msgspec.Meta(ge=3600, le=2592000)]


class Uploaded(Strict):
    """A form. Types that allow one value only are of fields that would change what we do with the file."""

    file: Annotated[str, msgspec.Meta(extra_json_schema={"contentMediaType": "application/octet-stream"})]
    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


class Page(Strict):
    """Which files are told."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    """The last file of the page before."""
    purpose: Literal["batch", "batch_output"] | None = None


@Reads(form=Uploaded)
async def create(request: Request) -> Response:
    """Keeps a file."""
    service: Service = request.app.state.service
    store = store_of(request)
    async with store.writing() as (name, body):
        fields, filename = await read_form(request, body, limit=service.settings.max_file)
        asked, _ = convert({"file": filename} | _nested(fields), Uploaded, strict=False)
    seconds = None if asked.expires_after is None else asked.expires_after.seconds
    return json_response(_told(await store.add(key_of(request), name, asked.purpose, filename, seconds)))


@Reads(query=Page)
async def index(request: Request) -> Response:
    """The files of whoever asks."""
    asked = read_query(request, Page)
    purposes = PURPOSES if asked.purpose is None else (asked.purpose,)
    found = await store_of(request).files(
        key_of(request), purposes, after=asked.after, limit=asked.limit + 1, newest_first=asked.order == "desc"
    )
    return json_response(page_of([_told(file) for file in found], asked.limit))


@Reads(query=NoQuery)
async def show(request: Request) -> Response:
    """What is known of a file."""
    read_query(request, NoQuery)
    return json_response(_told(await _file(request)))


@Reads(query=NoQuery)
async def content(request: Request) -> Response:
    """A file's bytes."""
    read_query(request, NoQuery)
    file = await _file(request)
    path = store_of(request).body(file.id)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


@Reads(query=NoQuery)
async def delete(request: Request) -> Response:
    """Deletes a file and its bytes."""
    read_query(request, NoQuery)
    file = await _file(request)
    await store_of(request).delete(key_of(request), file.id)
    return json_response({"id": file.id, "object": "file", "deleted": True})


def page_of(found: list[JsonObject], limit: int) -> JsonObject:
    """found: one more than `limit`, where there are more."""
    page = found[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(found) > limit}


async def _file(request: Request) -> File:
    name: str = request.path_params["id"]
    file = await store_of(request).file(key_of(request), name)
    if file.purpose not in PURPOSES:
        raise Problem("not_found", f"there is no file {name!r} here", "file_id")
    return file


def _nested(fields: dict[str, str]) -> dict[str, Any]:
    """expires_after[seconds] as forms write it: {"expires_after": {"seconds": ...}}."""
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        outer, bracket, inner = name.partition("[")
        if bracket and inner.endswith("]") and isinstance(nested.setdefault(outer, {}), dict):
            nested[outer][inner[:-1]] = value
        else:
            nested[name] = value
    return nested


def _told(file: File) -> JsonObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
