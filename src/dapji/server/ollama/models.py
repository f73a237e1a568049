"""GET /api/tags, /api/ps and /api/version, POST /api/show."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from dapji import __version__
from dapji.chat.formats import AnswerFormat
from dapji.files import Files, open_files
from dapji.models.size import parameters
from dapji.server.answering import JsonObject, ignored_fields
from dapji.server.registry import Served
from dapji.server.service import Service
from dapji.server.wire import Reads, Strict, json_response, read
from dapji.weights import store

FOR_EVER = "9999-12-31T23:59:59Z"
"""When a model is closed that stays open until another needs its memory."""


class AskedModel(Strict):
    model: str | None = None
    name: str | None = None
    """The same, as older clients write it."""
    verbose: Literal[False] | None = None


async def tags(request: Request) -> Response:
    """The models that are served."""
    service: Service = request.app.state.service
    return json_response({"models": [_listed(each) for each in service.registry.models.values()]})


async def ps(request: Request) -> Response:
    """Those that are open, and when they are closed if nobody uses them until then."""
    service: Service = request.app.state.service
    opened = [
        _listed(each) | {"context_length": each.model.engine.context, "expires_at": _expires(each)}
        for each in service.registry.models.values()
        if each.model is not None
    ]
    return json_response({"models": opened})


@Reads(body=AskedModel)
async def show(request: Request) -> Response:
    """Reads of a model's files what describes it, and no weights."""
    service: Service = request.app.state.service
    asked, left_out = await read(request, AskedModel, limit=service.settings.max_body)
    served = service.registry.find(asked.model or asked.name)
    return json_response(await asyncio.to_thread(_shown, served), headers=ignored_fields(left_out))


async def version(request: Request) -> Response:
    """Of this server."""
    return json_response({"version": __version__})


def _listed(served: Served) -> JsonObject:
    details: JsonObject = {"format": "safetensors" if served.path.is_dir() else "gguf"}
    if served.model is not None:
        details = _details(served.model.files)
    name = served.name if ":" in served.name else f"{served.name}:latest"
    return {
        "name": name,
        "model": name,
        "modified_at": _modified(served),
        "size": served.size,
        "digest": _digest(served.path),
        "details": details | {"parent_model": "" if served.parent is None else served.parent.name},
    }


def _shown(served: Served) -> JsonObject:
    files = open_files((served.parent or served).path) if served.model is None else served.model.files
    config, templates = files.config, files.tokenizer().chat_templates
    template = templates.get("default", "")
    capabilities = ["completion"]
    if any("tools" in source for source in templates.values()):
        capabilities.append("tools")
    if AnswerFormat.of(template).reasoning is not None:
        capabilities.append("thinking")
    return {
        "modified_at": _modified(served),
        "details": _details(files) | {"parent_model": "" if served.parent is None else served.parent.name},
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
        "format": "gguf" if files.checkpoint.kind == "gguf" else "safetensors",
        "family": files.config.family,
        "families": [files.config.family],
        "parameter_size": f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M",
        "quantization_level": next(iter(files.checkpoint.formats)),
    }


def _digest(path: Path) -> str:
    """SHA-256 of what the store knows of the model's files: their own where there is one, else of the list that
    sha256sum would print. What is not in the store is told by its files' names, sizes and times: to read gigabytes for
    a list would take seconds."""
    record = store.record_of(path)
    if record is not None and len(record.files) == 1:
        (file,) = record.files.values()
        return file.sha256
    if record is not None:
        lines = [f"{file.sha256}  {name}\n" for name, file in sorted(record.files.items())]
    else:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [(file.name, file.stat()) for file in files]
        lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in stats]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _expires(served: Served) -> str:
    if served.keep is None:
        return FOR_EVER
    left = served.keep if served.closing is None else served.closing.when() - asyncio.get_running_loop().time()
    return (datetime.now(UTC) + timedelta(seconds=left)).isoformat().replace("+00:00", "Z")


def _modified(served: Served) -> str:
    return datetime.fromtimestamp(served.created, UTC).isoformat().replace("+00:00", "Z")
