"""POST /api/embed, and /api/embeddings as it was before: vectors of length 1. A text is cut only where that is asked
for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from dapji.model import Embeddings, Model
from dapji.server.answering import JsonObject, ignored_fields, key_of
from dapji.server.ollama.asked import Running, check_context, ignored_of, keep_open
from dapji.server.service import Service
from dapji.server.wire import Reads, Strict, json_response, read, while_connected


class Common(Strict):
    model: str | None = None
    options: Running | None = None
    keep_alive: float | str | None = None


class Asked(Common, kw_only=True):
    input: str | list[str]
    truncate: bool = False
    dimensions: int | None = None


class AskedOne(Common, kw_only=True):
    prompt: str


@Reads(body=Asked)
async def embed(request: Request) -> Response:
    """Makes vectors of texts, of length 1; a text is cut only where that is asked for."""
    service: Service = request.app.state.service
    started = time.perf_counter_ns()
    asked, left_out = await read(request, Asked, limit=service.settings.max_body)
    left_out += keep_open(service.registry, asked.model, asked.keep_alive)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    texts = [] if texts == [""] else texts  # the model is only opened

    def prepare(model: Model) -> Embeddings:
        check_context((asked.options and asked.options.num_ctx) or 0, model)
        return model.prepare_embeddings(texts, dimensions=asked.dimensions, truncate=asked.truncate)

    name, vectors, told = await _embedded(request, asked, texts, prepare)
    body = {"model": name, "embeddings": vectors, "total_duration": time.perf_counter_ns() - started} | told
    return json_response(body, headers=ignored_fields(left_out + ignored_of(asked.options)))


@Reads(body=AskedOne)
async def embed_one(request: Request) -> Response:
    """Makes a vector of one text, as older clients ask for it."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, AskedOne, limit=service.settings.max_body)
    left_out += keep_open(service.registry, asked.model, asked.keep_alive)
    texts = [asked.prompt] if asked.prompt else []

    def prepare(model: Model) -> Embeddings:
        check_context((asked.options and asked.options.num_ctx) or 0, model)
        return model.prepare_embeddings(texts)

    _, vectors, told = await _embedded(request, asked, texts, prepare)
    return json_response(
        {"embedding": vectors[0] if vectors else []} | told,
        headers=ignored_fields(left_out + ignored_of(asked.options)),
    )


async def _embedded(
    request: Request, asked: Common, texts: Sequence[str], prepare: Callable[[Model], Embeddings]
) -> tuple[str, list[list[float]], JsonObject]:
    """The model's name, the vectors, and what else there is to tell. Without texts the model is only opened."""
    service: Service = request.app.state.service
    if not texts:
        async with service.opened(asked.model) as (name, _):
            return name, [], {}
    pooled = service.pool(key_of(request), asked.model, len(texts), prepare)
    name, prepared, vectors = await while_connected(request, asyncio.ensure_future(pooled))
    told = {"prompt_eval_count": vectors.n_tokens, "pooling": prepared.pooling}
    return name, prepared.vectors(vectors.pooled).tolist(), told
