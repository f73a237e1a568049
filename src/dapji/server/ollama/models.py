"""GET /api/tags, /api/ps and /api/version, POST /api/show; and what is refused."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response

from dapji import __version__
from dapji.chat.formats import AnswerFormat
from dapji.model import Files, open_files
from dapji.models.size import parameters
from dapji.server.answering import JsonObject
from dapji.server.problem import Problem
from dapji.server.registry import Served
from dapji.server.service import Service
from dapji.server.wire import Reads, Strict, json_response, read


class AskedModel(Strict):
    model: str


async def tags(request: Request) -> Response:
    service: Service = request.app.state.service
    return json_response({"models": [_listed(each) for each in service.registry.models.values()]})


async def ps(request: Request) -> Response:
    """Those that are open; when they are closed depends on who asks for others."""
    service: Service = request.app.state.service
    opened = [
        _listed(each) | {"context_length": each.model.engine.context}
        for each in service.registry.models.values()
        if each.model is not None
    ]
    return json_response({"models": opened})


@Reads(body=AskedModel)
async def show(request: Request) -> Response:
    """Reads of a model's files what describes it, and no weights."""
    service: Service = request.app.state.service
    asked, _ = await read(request, AskedModel, limit=service.settings.max_body)
    served = service.registry.find(asked.model)
    return json_response(await asyncio.to_thread(_shown, served))


async def version(request: Request) -> Response:
    return json_response({"version": __version__})


async def embed(request: Request) -> Response:
    raise Problem("not_found", f"{request.url.path}: this server computes no embeddings")


def _listed(served: Served) -> JsonObject:
    details = {"format": "safetensors" if served.path.is_dir() else "gguf"}
    return {
        "name": served.name,
        "model": served.name,
        "modified_at": _modified(served),
        "size": served.size,
        "details": details if served.model is None else _details(served.model.files),
    }


def _shown(served: Served) -> JsonObject:
    files = open_files(served.path) if served.model is None else served.model.files
    config, templates = files.config, files.tokenizer().chat_templates
    template = templates.get("default", "")
    capabilities = ["completion"]
    if any("tools" in source for source in templates.values()):
        capabilities.append("tools")
    if AnswerFormat.of(template).reasoning is not None:
        capabilities.append("thinking")
    return {
        "modified_at": _modified(served),
        "details": _details(files),
        "template": template,
        "parameters": "\n".join(f"{name} {value}" for name, value in files.sampling().items()),
        "capabilities": capabilities,
        "model_info": {
            "general.architecture": config.family,
            "general.parameter_count": parameters(config),
            f"{config.family}.context_length": config.max_context,
            f"{config.family}.embedding_length": config.dim,
            f"{config.family}.block_count": len(config.layers),
            f"{config.family}.vocab_size": config.vocab_size,
        },
    }


def _details(files: Files) -> JsonObject:
    n = parameters(files.config)
    return {
        "parent_model": "",
        "format": "gguf" if files.checkpoint.kind == "gguf" else "safetensors",
        "family": files.config.family,
        "families": [files.config.family],
        "parameter_size": f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M",
        "quantization_level": next(iter(files.checkpoint.formats)),
    }


def _modified(served: Served) -> str:
    return datetime.fromtimestamp(served.created, UTC).isoformat().replace("+00:00", "Z")
