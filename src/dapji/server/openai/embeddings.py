"""POST /v1/embeddings: texts become vectors of length 1; none is cut."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from dapji.model import Embeddings, Model
from dapji.server.answering import JsonObject, ignored_fields, key_of
from dapji.server.openai.common import Texts, texts_of
from dapji.server.service import Service
from dapji.server.wire import Reads, Strict, json_response, read, while_connected


class Asked(Strict):
    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    """base64: of little-endian float32."""
    dimensions: int | None = None
    user: str | None = None  # changes nothing


@Reads(body=Asked)
async def create(request: Request) -> Response:
    """Makes vectors of texts, of length 1."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, Asked, limit=service.settings.max_body)
    texts = texts_of("input", asked.input)

    def prepare(model: Model) -> Embeddings:
        return model.prepare_embeddings(texts, dimensions=asked.dimensions)

    pooled = service.pool(key_of(request), asked.model, len(texts), prepare)
    name, prepared, vectors = await while_connected(request, asyncio.ensure_future(pooled))
    told = [_told(i, vector, asked.encoding_format) for i, vector in enumerate(prepared.vectors(vectors.pooled))]
    body = {
        "object": "list",
        "data": told,
        "model": name,
        "pooling": prepared.pooling,
        "usage": {"prompt_tokens": vectors.n_tokens, "total_tokens": vectors.n_tokens},
    }
    return json_response(body, headers=ignored_fields(left_out))


def _told(index: int, vector: NDArray[np.float32], encoding: Literal["float", "base64"]) -> JsonObject:
    values = b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": values}
