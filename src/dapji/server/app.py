"""The application: every route, and what happens when one of them cannot answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dapji import __version__
from dapji.errors import DapjiError
from dapji.server import metrics, openapi
from dapji.server.anthropic import batches as anthropic_batches
from dapji.server.anthropic import messages
from dapji.server.anthropic import models as anthropic_models
from dapji.server.batches.runner import BatchRunner
from dapji.server.batches.store import BatchStore
from dapji.server.guard import Guard
from dapji.server.keys import Keys
from dapji.server.observer import Observer
from dapji.server.ollama import chat as ollama_chat
from dapji.server.ollama import embed
from dapji.server.ollama import models as ollama_models
from dapji.server.openai import batches as openai_batches
from dapji.server.openai import chat, completions, embeddings, files, models, rerank, responses, tokens
from dapji.server.openai.stored import ResponseStore
from dapji.server.page import routes as page
from dapji.server.page.conversations import ConversationStore
from dapji.server.page.status import History
from dapji.server.problem import Kind, Problem
from dapji.server.protocols import problem_response, speaks_anthropic
from dapji.server.registry import Registry
from dapji.server.service import Service
from dapji.server.settings import Settings
from dapji.server.wire import json_response

log = logging.getLogger("dapji.server")


def create_app(registry: Registry, settings: Settings, *, keys: Keys | None = None) -> Starlette:
    """Owns the registry: its models are closed when the application ends. keys: None: nobody is asked for one."""
    service = Service(registry, settings, keys)
    kept = ResponseStore(settings.folder)
    conversations = ConversationStore(settings.folder)
    batches = BatchStore(settings.folder)
    handlers = {Problem: _problem, DapjiError: _error, HTTPException: _http, Exception: _failure}
    routes = _routes()
    # The lines of batches are requests like others, of keys that have been checked.
    inside = Starlette(routes=routes, middleware=[Middleware(Observer, service=service)], exception_handlers=handlers)
    history = History(service)
    runner = BatchRunner(batches, inside, registry, settings, keys)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running = [asyncio.create_task(each.run()) for each in (runner, history)]
        try:
            yield
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            registry.close()
            kept.close()
            conversations.close()
            batches.close()

    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Observer, service=service),
            Middleware(
                CORSMiddleware,
                allow_origins=settings.origins,
                allow_methods=("*",),
                allow_headers=("*",),
                expose_headers=("Retry-After", "Dapji-Ignored-Fields"),
            ),
            Middleware(Guard, settings=settings, keys=keys),
        ],
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.state.service = service
    app.state.responses = kept
    app.state.batches = batches
    app.state.runner = runner
    app.state.conversations = conversations
    app.state.history = history
    app.state.writing = set()  # answers of the page that are under way
    inside.state = app.state
    return app


def _routes() -> list[Route]:
    return [
        Route("/health", _health),
        Route("/openapi.json", openapi.show),
        Route("/metrics", metrics.show),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/completions", completions.create, methods=["POST"]),
        Route("/v1/embeddings", embeddings.create, methods=["POST"]),
        Route("/v1/rerank", rerank.create, methods=["POST"]),
        Route("/v1/files", files.create, methods=["POST"]),
        Route("/v1/files", files.index, methods=["GET"]),
        Route("/v1/files/{id}", files.show, methods=["GET"]),
        Route("/v1/files/{id}", files.delete, methods=["DELETE"]),
        Route("/v1/files/{id}/content", files.content, methods=["GET"]),
        Route("/v1/batches", openai_batches.create, methods=["POST"]),
        Route("/v1/batches", openai_batches.index, methods=["GET"]),
        Route("/v1/batches/{id}", openai_batches.show, methods=["GET"]),
        Route("/v1/batches/{id}/cancel", openai_batches.cancel, methods=["POST"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count, methods=["POST"]),
        Route("/v1/messages/batches", anthropic_batches.create, methods=["POST"]),
        Route("/v1/messages/batches", anthropic_batches.index, methods=["GET"]),
        Route("/v1/messages/batches/{id}", anthropic_batches.show, methods=["GET"]),
        Route("/v1/messages/batches/{id}", anthropic_batches.delete, methods=["DELETE"]),
        Route("/v1/messages/batches/{id}/cancel", anthropic_batches.cancel, methods=["POST"]),
        Route("/v1/messages/batches/{id}/results", anthropic_batches.results, methods=["GET"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/{id}", responses.show, methods=["GET"]),
        Route("/v1/responses/{id}", responses.delete, methods=["DELETE"]),
        Route("/v1/responses/{id}/input_items", responses.input_items, methods=["GET"]),
        Route("/api/chat", ollama_chat.chat, methods=["POST"]),
        Route("/api/generate", ollama_chat.generate, methods=["POST"]),
        Route("/api/tags", ollama_models.tags),
        Route("/api/ps", ollama_models.ps),
        Route("/api/show", ollama_models.show, methods=["POST"]),
        Route("/api/version", ollama_models.version),
        Route("/api/embed", embed.embed, methods=["POST"]),
        Route("/api/embeddings", embed.embed_one, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        *page.table(),
    ]


async def _health(request: Request) -> Response:
    """Whether the server answers."""
    return json_response({"status": "ok", "version": __version__})


async def _models(request: Request) -> Response:
    """The models that are served, and every limit; in Anthropic's form where a request has its `anthropic-version`."""
    return await (anthropic_models.index if speaks_anthropic(request.scope) else models.index)(request)


async def _model(request: Request) -> Response:
    """One of the models that are served."""
    return await (anthropic_models.show if speaks_anthropic(request.scope) else models.show)(request)


async def _problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem_response(request.scope, problem)


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DapjiError)
    return await _problem(request, Problem.of(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    kind: Kind = "not_found" if error.status_code == 404 else "invalid_request"
    return problem_response(
        request.scope, Problem(kind, message, headers=dict(error.headers or {})), status=error.status_code
    )


async def _failure(request: Request, error: Exception) -> Response:
    """A fault of ours: the client learns that, the operator the rest."""
    log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _problem(request, Problem("internal", "the server failed at this request; its log says more"))
