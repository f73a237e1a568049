"""POST /v1/rerank: documents in the order of their relevance to a query. Not OpenAI's; Jina's and Cohere's form, which
vLLM and llama-server have too."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from dapji.model import Model, Reranking
from dapji.server.answering import JsonObject, identifier, ignored_fields, key_of
from dapji.server.problem import Problem
from dapji.server.service import Service
from dapji.server.wire import Reads, Strict, json_response, read, while_connected


class Document(Strict):
    text: str


class Asked(Strict):
    query: str
    documents: list[str | Document]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool = False


@Reads(body=Asked)
async def create(request: Request) -> Response:
    """Puts documents in the order of their relevance to a query."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Asked, limit=service.settings.max_body)
    if asked.top_n is not None and asked.top_n < 1:
        raise Problem("invalid_request", f"top_n ({asked.top_n}) must be at least 1", "top_n")
    if not asked.documents:
        raise Problem("invalid_request", "documents is empty", "documents")
    documents = [document if isinstance(document, str) else document.text for document in asked.documents]

    def prepare(model: Model) -> Reranking:
        return model.prepare_reranking(asked.query, documents)

    pooled = service.pool(key_of(request), asked.model, len(documents), prepare)
    name, prepared, vectors = await while_connected(request, asyncio.ensure_future(pooled))
    scores = prepared.scores(vectors.pooled)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: asked.top_n]
    results: list[JsonObject] = [{"index": i, "relevance_score": scores[i]} for i in best]
    if asked.return_documents:
        for result in results:
            result["document"] = {"text": documents[result["index"]]}
    body = {
        "id": identifier("rerank"),
        "model": name,
        "method": prepared.method,
        "results": results,
        "usage": {"prompt_tokens": vectors.n_tokens, "total_tokens": vectors.n_tokens},
    }
    return json_response(body, headers=ignored_fields(left_out))
