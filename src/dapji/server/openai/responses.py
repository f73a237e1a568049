"""/v1/responses: conversations that the server may keep (`ResponseStore`), as items and named events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dapji.chat.formats import Content, Event, Reasoning, ToolCall
from dapji.chat.grammar import Grammar
from dapji.errors import DapjiError
from dapji.model import AsyncReply, Model
from dapji.server.answering import (
    JsonObject,
    answered_in_parts,
    answered_whole,
    ignored_fields,
    key_of,
    template_tool,
    tool_options,
)
from dapji.server.openai.common import Drawn, Effort, sampling_of, thinking_of
from dapji.server.openai.responses_items import Item, item_id, items_of, messages_of, with_types
from dapji.server.openai.stored import ResponseStore, Stored
from dapji.server.problem import Problem
from dapji.server.service import Answers, Service
from dapji.server.wire import NoQuery, Reads, Strict, convert, event, event_stream, json_response, read, read_query


class Tool(Strict, tag_field="type", tag="function"):
    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FunctionChoice(Strict, tag_field="type", tag="function"):
    name: str


class AllowedChoice(Strict, tag_field="type", tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice]


class PlainFormat(Strict, tag_field="type", tag="text"):
    pass


class ObjectFormat(Strict, tag_field="type", tag="json_object"):
    pass


class SchemaFormat(Strict, tag_field="type", tag="json_schema"):
    name: str
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class TextConfig(Strict):
    format: PlainFormat | ObjectFormat | SchemaFormat = msgspec.field(default_factory=PlainFormat)
    verbosity: Literal["medium"] | None = None


class StreamOptions(Strict):
    include_obfuscation: Literal[False] = False


class ReasoningConfig(Strict):
    effort: Effort | None = None
    summary: None = None
    generate_summary: None = None


class Asked(Drawn, kw_only=True):
    """What may stand in a request; see `chat.Asked`."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    metadata: dict[str, str] | None = None
    # Who asks and what for: changes no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None


@Reads(body=Asked)
async def create(request: Request) -> Response:
    """Answers a conversation, which the server may keep."""
    service: Service = request.app.state.service
    store: ResponseStore = request.app.state.responses
    asked, left_out = await read(request, Asked, limit=service.settings.max_body, prepare=with_types)
    key, items = key_of(request), items_of(asked.input)
    messages = messages_of([*await _before(store, key, asked.previous_response_id), *items], asked.instructions)
    answers = service.chat(key, asked.model, messages, **_options(asked))
    keep = _Keep(store if asked.store is not False else None, key, items)
    headers = ignored_fields(left_out)
    if asked.stream:
        return await answered_in_parts(request, answers, partial(_streamed, asked, keep), event_stream, headers)
    return await answered_whole(request, answers, partial(_whole, asked, keep), headers)


class Page(Strict):
    """Which input items are told."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    """The last item of the page before."""


@Reads(query=NoQuery)
async def show(request: Request) -> Response:
    """A response that was kept."""
    read_query(request, NoQuery)
    return json_response((await _stored(request)).body)


@Reads(query=NoQuery)
async def delete(request: Request) -> Response:
    """Forgets a response; what lies on disk of it is overwritten."""
    read_query(request, NoQuery)
    store: ResponseStore = request.app.state.responses
    name: str = request.path_params["id"]
    await store.delete(key_of(request), name)
    return json_response({"id": name, "object": "response", "deleted": True})


@Reads(query=Page)
async def input_items(request: Request) -> Response:
    """The items that a response was asked with, without those of the responses before it."""
    asked = read_query(request, Page)
    items = (await _stored(request)).input
    if asked.order == "desc":
        items = items[::-1]
    if asked.after is not None:
        ids = [item["id"] for item in items]
        if asked.after not in ids:
            raise Problem("invalid_request", f"after: there is no item {asked.after!r}", "after")
        items = items[ids.index(asked.after) + 1 :]
    page = items[: asked.limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(page) < len(items)
    return json_response({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})


async def _stored(request: Request) -> Stored:
    store: ResponseStore = request.app.state.responses
    return await store.get(key_of(request), request.path_params["id"])


async def _before(store: ResponseStore, key: str, name: str | None) -> list[Item]:
    """All items of a response and of those before it, in order."""
    turns: list[list[JsonObject]] = []
    while name is not None:
        try:
            stored = await store.get(key, name)
        except Problem as problem:
            problem.field, problem.code = "previous_response_id", "previous_response_not_found"
            raise
        turns.append(stored.input + stored.body["output"])
        name = stored.body["previous_response_id"]
    return [convert(item, Item)[0] for turn in reversed(turns) for item in turn]  # type: ignore[arg-type]


def _options(asked: Asked) -> JsonObject:
    options = sampling_of(asked)
    options["max_tokens"] = asked.max_output_tokens
    options |= _tool_options(asked) | thinking_of(None if asked.reasoning is None else asked.reasoning.effort)
    wanted = None if asked.text is None else asked.text.format
    if isinstance(wanted, ObjectFormat):
        options["grammar"] = Grammar.json_object()
    elif isinstance(wanted, SchemaFormat):
        options["grammar"] = Grammar.json_schema(wanted.schema, "text.format.schema")
    return options


def _tool_options(asked: Asked) -> JsonObject:
    tools = [template_tool(tool.name, tool.description, tool.parameters) for tool in asked.tools or ()]
    choice, parallel = asked.tool_choice, asked.parallel_tool_calls
    if isinstance(choice, FunctionChoice):
        return tool_options(tools, "required", names=[choice.name], parallel=parallel)
    if isinstance(choice, AllowedChoice):
        return tool_options(tools, choice.mode, names=[tool.name for tool in choice.tools], parallel=parallel)
    return tool_options(tools, choice or "auto", parallel=parallel)


class _Keep:
    """Where a response goes when it has ended, before anybody is told that it has."""

    def __init__(self, store: ResponseStore | None, key: str, items: list[Item]) -> None:
        self._store = store
        self._key = key
        self._items = items

    async def __call__(self, body: JsonObject) -> None:
        if self._store is not None:
            items = [msgspec.to_builtins(item) for item in self._items]
            await self._store.put(self._key, Stored(body=body, input=items))


async def _whole(asked: Asked, keep: _Keep, opened: Answers) -> JsonObject:
    writer = _Writer(_body(asked, opened.name, opened.model))
    (reply,) = opened.replies
    async for part in reply.events():
        list(writer.feed(part, reply))
    list(writer.end(reply))
    await keep(writer.body)
    return writer.body


async def _streamed(asked: Asked, keep: _Keep, opened: Answers) -> AsyncIterator[bytes]:
    writer = _Writer(_body(asked, opened.name, opened.model))
    (reply,) = opened.replies

    def sent(told: JsonObject) -> bytes:
        return event(told, told["type"])

    try:
        yield sent(writer.whole("created"))
        yield sent(writer.whole("in_progress"))
        async for part in reply.events():
            for told in writer.feed(part, reply):
                yield sent(told)
        for told in writer.end(reply):
            yield sent(told)
        await keep(writer.body)
    except DapjiError as error:
        writer.fail(Problem.of(error))
    yield sent(writer.whole(writer.body["status"]))


def _body(asked: Asked, name: str, model: Model) -> JsonObject:
    """The response before its first token."""
    defaults = model.options()
    return {
        "id": item_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "metadata": asked.metadata or {},
        "model": name,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": asked.reasoning and asked.reasoning.effort, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": asked.store is not False,
        "temperature": defaults["temperature"] if asked.temperature is None else asked.temperature,
        "text": msgspec.to_builtins(asked.text or TextConfig()),
        "tool_choice": msgspec.to_builtins(asked.tool_choice or "auto"),
        "tools": [msgspec.to_builtins(tool) for tool in asked.tools or ()],
        "top_logprobs": 0,
        "top_p": defaults["top_p"] if asked.top_p is None else asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
    }


class _Writer:
    """Makes the items of a response from an answer's events, and tells each step as an event of the protocol."""

    def __init__(self, body: JsonObject) -> None:
        self.body = body
        self._items: list[JsonObject] = body["output"]
        self._n_events = 0
        self._part: JsonObject | None = None  # the text that grows, in the last item
        self._n_reasoning = 0

    def whole(self, name: str) -> JsonObject:
        return self._event(name, response=self.body)

    def feed(self, part: Event, reply: AsyncReply) -> Iterator[JsonObject]:
        if isinstance(part, Content | Reasoning):
            if not part.text:
                return
            kind = "output_text" if isinstance(part, Content) else "reasoning_text"
            if self._part is None or self._part["type"] != kind:
                yield from self._close()
                yield from self._open(kind)
                assert self._part is not None
            self._part["text"] += part.text
            if kind == "reasoning_text":
                self._n_reasoning = len(reply.tokens)
                yield self._event("reasoning_text.delta", **self._place(), delta=part.text)
            else:
                yield self._event("output_text.delta", **self._place(), delta=part.text, logprobs=[])
        elif isinstance(part, ToolCall):
            yield from self._close()
            yield from self._call(part)

    def _call(self, call: ToolCall) -> Iterator[JsonObject]:
        item: JsonObject = {"type": "function_call", "id": item_id("fc"), "status": "in_progress"}
        item |= {"call_id": call.id or item_id("call"), "name": call.name, "arguments": ""}
        self._items.append(item)
        index = len(self._items) - 1
        place = {"item_id": item["id"], "output_index": index}
        yield self._event("output_item.added", output_index=index, item=item)
        yield self._event("function_call_arguments.delta", **place, delta=call.arguments)
        yield self._event("function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._event("output_item.done", output_index=index, item=item)

    def end(self, reply: AsyncReply) -> Iterator[JsonObject]:
        """The last item, and what the response says of itself then."""
        assert reply.finish is not None
        status = "incomplete" if reply.finish.reason == "length" else "completed"
        yield from self._close(status)
        self.body["status"] = status
        if status == "incomplete":
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.body["completed_at"] = int(time.time())
        usage = reply.finish.usage
        self.body["usage"] = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.generated,
            "output_tokens_details": {"reasoning_tokens": self._n_reasoning},
            "total_tokens": usage.prompt + usage.generated,
        }

    def fail(self, problem: Problem) -> None:
        code = "server_error" if problem.status >= 500 else problem.code or "invalid_prompt"
        self.body |= {"status": "failed", "completed_at": None, "error": {"code": code, "message": problem.message}}

    def _event(self, kind: str, /, **fields: Any) -> JsonObject:
        told = {"type": f"response.{kind}", "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return told

    def _place(self) -> JsonObject:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _open(self, kind: str) -> Iterator[JsonObject]:
        if kind == "output_text":
            item: JsonObject = {"type": "message", "id": item_id("msg"), "status": "in_progress", "role": "assistant"}
            part: JsonObject = {"type": kind, "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"type": "reasoning", "id": item_id("rs"), "status": "in_progress", "summary": []}
            part = {"type": kind, "text": ""}
        self._items.append({**item, "content": []})
        yield self._event("output_item.added", output_index=len(self._items) - 1, item=self._items[-1])
        yield self._event("content_part.added", **self._place(), part=part)
        self._items[-1]["content"] = [part]
        self._part = part

    def _close(self, status: str = "completed") -> Iterator[JsonObject]:
        if self._part is None:
            return
        part, self._part = self._part, None
        more: JsonObject = {"logprobs": []} if part["type"] == "output_text" else {}
        yield self._event(f"{part['type']}.done", **self._place(), text=part["text"], **more)
        yield self._event("content_part.done", **self._place(), part=part)
        self._items[-1]["status"] = status
        yield self._event("output_item.done", output_index=len(self._items) - 1, item=self._items[-1])
