"""/page/…: what the page asks the server for, beside answers and files. Not a protocol of others: it may change."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Annotated
from urllib.parse import quote

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dapji.errors import TemplateError
from dapji.model import Model
from dapji.server.answering import JsonObject, ignored_fields, key_of
from dapji.server.page import answer, exported, site, status
from dapji.server.page.answer import told, under_way
from dapji.server.page.conversations import Change, ConversationStore, File, Number, Settings, Turn
from dapji.server.problem import Problem
from dapji.server.service import Service
from dapji.server.wire import Reads, Strict, json_response, read, read_query


class Search(Strict):
    search: str = ""
    """A text of the title or of any turn."""
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    offset: Annotated[int, Meta(ge=0, le=2**31)] = 0


class Began(Strict):
    settings: Settings = msgspec.field(default_factory=Settings)


class Said(Strict):
    """A user's turn."""

    parent: Number | None = None
    """The answer that it follows; None: it begins the conversation."""
    content: str = ""
    files: list[File] = msgspec.field(default_factory=list)


class NoQuery(Strict):
    """No parameters."""


@Reads(query=Search)
async def index(request: Request) -> Response:
    """The conversations of who asks, the last changed first."""
    asked = read_query(request, Search)
    found, more = await _store(request).list(
        key_of(request), search=asked.search, limit=asked.limit, offset=asked.offset
    )
    return json_response({"conversations": found, "more": more})


@Reads(body=Began)
async def create(request: Request) -> Response:
    """Begins a conversation."""
    asked, left_out = await read(request, Began, limit=_limit(request))
    made = await _store(request).create(key_of(request), asked.settings)
    return json_response(made, status=201, headers=ignored_fields(left_out))


@Reads(query=NoQuery)
async def show(request: Request) -> Response:
    """A conversation with all its branches, answers also as HTML; and the turns that are being answered."""
    read_query(request, NoQuery)
    name: str = request.path_params["id"]
    answering = under_way(request, name)  # before the turns: what ends in between is one of them
    conversation = await _store(request).get(key_of(request), name)

    def described() -> JsonObject:
        head: JsonObject = msgspec.to_builtins(conversation)
        return head | {"turns": [told(turn) for turn in conversation.turns], "answering": answering}

    return json_response(await asyncio.to_thread(described))


@Reads(body=Change)
async def change(request: Request) -> Response:
    """Renames a conversation, sets how it is answered, or chooses its branch."""
    asked, left_out = await read(request, Change, limit=_limit(request))
    await _store(request).change(key_of(request), request.path_params["id"], asked)
    return json_response({}, headers=ignored_fields(left_out))


@Reads(query=NoQuery)
async def delete(request: Request) -> Response:
    """Forgets a conversation; what lies on disk of it is overwritten."""
    read_query(request, NoQuery)
    await _store(request).delete(key_of(request), request.path_params["id"])
    return json_response({})


@Reads(body=Said)
async def say(request: Request) -> Response:
    """Adds a user's turn, which is on disk when this is answered."""
    asked, left_out = await read(request, Said, limit=_limit(request))
    if not asked.content.strip() and not asked.files:
        raise Problem("invalid_request", "content: a turn needs a text or a file", "content")

    turn = partial(Turn, role="user", created=time.time(), **msgspec.structs.asdict(asked))
    added = await _store(request).add(key_of(request), request.path_params["id"], turn)
    return json_response(told(added), status=201, headers=ignored_fields(left_out))


@Reads(query=exported.Query)
async def export(request: Request) -> Response:
    """A conversation as a file."""
    asked = read_query(request, exported.Query)
    conversation = await _store(request).get(key_of(request), request.path_params["id"])
    if asked.format == "json":
        data, media_type, suffix = msgspec.json.encode(exported.exported(conversation)), "application/json", "json"
    else:
        data, media_type, suffix = exported.markdown(conversation).encode(), "text/markdown; charset=utf-8", "md"
    name = quote(f"{conversation.title or conversation.id}.{suffix}", safe="")
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}", "X-Content-Type-Options": "nosniff"}
    return Response(msgspec.json.format(data, indent=2) if suffix == "json" else data, 200, headers, media_type)


@Reads(body=exported.Exported)
async def import_(request: Request) -> Response:
    """Makes a conversation of an exported file, or of messages as OpenAI's API has them."""
    asked, left_out = await read(request, exported.Exported, limit=_limit(request))
    made = await _store(request).create(key_of(request), **exported.imported(asked))
    return json_response(made, status=201, headers=ignored_fields(left_out))


@Reads(query=NoQuery)
async def model(request: Request) -> Response:
    """What may be chosen for answers of a model. Opens it."""
    read_query(request, NoQuery)
    service: Service = request.app.state.service
    async with service.opened(request.path_params["name"]) as (name, opened):
        defaults = opened.options()
        return json_response(
            {
                "id": name,
                "context": opened.engine.context,
                "defaults": {"temperature": defaults["temperature"], "top_p": defaults["top_p"]},
                "thinking": await asyncio.to_thread(_thinking, opened),
            }
        )


def _thinking(model: Model) -> list[bool | str]:
    """What its template lets one choose."""

    def may_be(wanted: bool | str) -> bool:
        try:
            model.template.reasoning(wanted)
        except TemplateError:
            return False
        return True

    switch = [True, False] if may_be(True) and may_be(False) else []
    return [*switch, *(("low", "medium", "high") if may_be("low") else ())]


def _store(request: Request) -> ConversationStore:
    store: ConversationStore = request.app.state.conversations
    return store


def _limit(request: Request) -> int:
    service: Service = request.app.state.service
    return service.settings.max_body


def table() -> list[Route]:
    """The page's part of the application."""
    one = "/page/conversations/{id}"
    return [
        Route("/", site.chat),
        Route("/status", site.status),
        Route("/docs", site.docs),
        Route("/static/{name}", site.static),
        Route("/page/status", status.show, methods=["GET"]),
        Route("/page/conversations", index, methods=["GET"]),
        Route("/page/conversations", create, methods=["POST"]),
        Route(one, show, methods=["GET"]),
        Route(one, change, methods=["PATCH"]),
        Route(one, delete, methods=["DELETE"]),
        Route(f"{one}/turns", say, methods=["POST"]),
        Route(f"{one}/answers", answer.create, methods=["POST"]),
        Route(f"{one}/export", export, methods=["GET"]),
        Route("/page/import", import_, methods=["POST"]),
        Route("/page/models/{name:path}", model, methods=["GET"]),
    ]
