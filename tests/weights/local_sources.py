"""Where models come from in tests: a server that speaks the hub's API, wheels, made-up GGUF files. All local."""

import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf


def gguf_bytes(folder: Path, n_values: int = 50_000, seed: int = 0) -> bytes:
    """A GGUF file of about 4 * n_values bytes."""
    values = np.random.default_rng(seed).standard_normal((1, n_values)).astype(np.float32)
    path = folder / f"made-{seed}.gguf"
    write_gguf(path, {"general.architecture": "llama"}, [TensorToWrite.of("w", Tensor.from_float32("w", values))])
    data = path.read_bytes()
    path.unlink()
    return data


def split_gguf(folder: Path, count: int, *, declared: int | None = None) -> list[Path]:
    """The files of a split model, m-00001-of-…, of one tensor per part."""
    paths = [folder / f"m-{index + 1:05}-of-{count:05}.gguf" for index in range(count)]
    for index, path in enumerate(paths):
        metadata = {
            "split.no": np.uint16(index),
            "split.count": np.uint16(count),
            "split.tensors.count": np.int32(count if declared is None else declared),
        }
        values = np.full((2, 2), index, dtype=np.float32)
        write_gguf(path, metadata, [TensorToWrite.of(f"w{index}", Tensor.from_float32("w", values))])
    return paths


class Hub:
    """Repositories of one owner, over HTTP as huggingface_hub expects it; large files by redirect, as the real one."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.lies: dict[str, str] = {}
        """File name -> sha256 that the listing claims."""
        self.cut_after: list[int] = []
        """The next responses with a file's bytes end after so many bytes; then whole ones."""
        self.chunk = 1 << 16
        self.on_sent: Callable[[int], None] = lambda total: None
        """Called after every chunk, with the bytes of files sent so far."""
        self.sent = 0
        self.ranges: list[str | None] = []
        """The Range header of every request for a file's bytes."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                try:
                    hub.answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that was killed

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)", path):
            self._listing(request, match[1])
        elif match := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/(\w+)/(.+)", path):
            assert match[2] == self.commit, "a download must name the commit that was listed"
            _send(request, 302, b"", Location=f"{self.url}/cdn/{match[1]}/{match[3]}")
        elif match := re.fullmatch(r"/cdn/(\w+/[\w.-]+)/(.+)", path):
            self._file(request, self.repositories[match[1]][match[2]])
        else:
            _send(request, 404, b"{}")

    def _listing(self, request: BaseHTTPRequestHandler, repository: str) -> None:
        if repository in self.gated:
            _send(request, 403, b'{"error": "gated"}', **{"X-Error-Code": "GatedRepo"})
            return
        files = self.repositories.get(repository)
        if files is None:
            _send(request, 401, b'{"error": "not found"}', **{"X-Error-Code": "RepoNotFound"})
            return
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": "0",
                "lfs": {
                    "sha256": self.lies.get(name, hashlib.sha256(data).hexdigest()),
                    "size": len(data),
                    "pointerSize": 1,
                },
            }
            for name, data in files.items()
        ]
        content = {"id": repository, "sha": self.commit, "siblings": siblings, "cardData": {"license": "apache-2.0"}}
        _send(request, 200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _file(self, request: BaseHTTPRequestHandler, data: bytes) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        start, status, headers = 0, 200, {"ETag": etag}
        if asked and request.headers.get("If-Range") in (None, etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.cut_after:
            body = body[: self.cut_after.pop(0)]
            request.close_connection = True
        for at in range(0, len(body), self.chunk):
            request.wfile.write(body[at : at + self.chunk])
            request.wfile.flush()
            self.sent += len(body[at : at + self.chunk])
            self.on_sent(self.sent)


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def make_wheel(folder: Path, package: str, version: str, members: dict[str, bytes]) -> Path:
    """A minimal valid wheel that carries files."""
    module = package.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{module}/{name}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path
