"""Two replicas behind nginx and Caddy, by the files of deploy/: who goes where, streams, and replicas that stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dapji.server.authority import Authority
from dapji.server.keys import Keys
from tiny import COUNTING, SCRIPT, write_tiny

DEPLOY = Path(__file__).parents[2] / "deploy"
NAME = "llm.example.org"
CHAT: dict[str, Any] = {"model": "answer", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
LONG = CHAT | {"model": "endless", "stream": True}
N_KEYS = 24
"""All of them go to one replica of two once in 8 million times."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


class Replica:
    def __init__(self, models: list[Path], home: Path) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "dapji", "serve", *map(str, models), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--allow-host", NAME],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"DAPJI_HOME": str(home)},
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("listening on "):
                break
        self._reading = threading.Thread(target=self.process.stderr.read)
        self._reading.start()

    def metric(self, key: str, pattern: str) -> float:
        """The sum of the values whose name and labels match."""
        headers = {"Authorization": f"Bearer {key}"}
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", headers=headers).text
        return sum(map(float, re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE)))

    def answered(self, key: str) -> float:
        return self.metric(key, r'dapji_requests_total\{route="/v1/chat/completions",status="200"\}')

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self._reading.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


class Proxied:
    """Two replicas, a proxy and its clients."""

    def __init__(
        self, replicas: list[Replica], port: int, trusted: ssl.SSLContext, keys: list[str], *, retries: bool
    ) -> None:
        """retries: a request that one replica has refused is given to the other."""
        self.replicas = replicas
        self.retries = retries
        self.url = f"https://127.0.0.1:{port}"
        self.keys = keys
        self._trusted = trusted

    def client(self, key: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}", "Host": NAME}
        return httpx.Client(base_url=self.url, headers=headers, verify=self._trusted, timeout=30)

    def ask(self, key: str, **headers: str) -> httpx.Response:
        with self.client(key) as client:
            # what the certificate is for, which the address is not
            return client.post("/v1/chat/completions", json=CHAT, headers=headers, extensions={"sni_hostname": NAME})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [
        write_tiny(folder / "answer.gguf", SCRIPT),
        write_tiny(folder / "endless.gguf", COUNTING, endless=True, max_context=1 << 17),
    ]


@pytest.fixture(params=["nginx", "caddy"])
def proxied(request: pytest.FixtureRequest, models: list[Path], home: Path, tmp_path: Path) -> Iterator[Proxied]:
    program = shutil.which(request.param, path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip(f"{request.param} is not installed: tests/cli/setup-proxies.sh")
    store = Keys(home / "server" / "keys.db")
    keys = [store.add(f"key{i}") for i in range(N_KEYS)]
    authority = Authority(tmp_path / "tls", [NAME])
    authority.renew()
    replicas = [Replica(models, home) for _ in range(2)]
    port = free_port()
    command = (nginx if request.param == "nginx" else caddy)(
        program, tmp_path, port, [replica.port for replica in replicas], authority.certificate
    )
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HOME": str(tmp_path)})
    try:
        trusted = ssl.create_default_context(cafile=str(authority.path))
        started = Proxied(replicas, port, trusted, keys, retries=request.param == "nginx")
        wait_for_port(port)
        yield started
    finally:
        process.terminate()
        process.wait(20)
        log.close()
        for replica in replicas:
            replica.kill()


def wait_for_port(port: int) -> None:
    end = time.monotonic() + 20
    while True:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < end
        time.sleep(0.05)


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def nginx(program: str, folder: Path, port: int, replicas: list[int], certificate: Path) -> list[str]:
    (folder / "deployed.conf").write_text(
        replaced(
            (DEPLOY / "nginx.conf").read_text(),
            ("127.0.0.1:8410", f"127.0.0.1:{replicas[0]}"),
            ("127.0.0.1:8411", f"127.0.0.1:{replicas[1]}"),
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("/etc/ssl/llm.example.org.pem", str(certificate)),
            ("/etc/ssl/private/llm.example.org.key", str(certificate)),
        )
    )
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 2;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary} include {folder}/deployed.conf; }}\n"
    )
    return [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]


def caddy(program: str, folder: Path, port: int, replicas: list[int], certificate: Path) -> list[str]:
    (folder / "Caddyfile").write_text(
        "{\nadmin off\nauto_https off\n}\n"
        + replaced(
            (DEPLOY / "Caddyfile").read_text(),
            (f"{NAME} {{", f"https://{NAME}:{port} {{\nbind 127.0.0.1\ntls {certificate} {certificate}"),
            ("127.0.0.1:8410 127.0.0.1:8411", f"127.0.0.1:{replicas[0]} 127.0.0.1:{replicas[1]}"),
        )
    )
    return [program, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


def home_of(proxied: Proxied, key: str) -> Replica:
    """The replica that answers this key."""
    before = [replica.answered(key) for replica in proxied.replicas]
    assert proxied.ask(key).status_code == 200
    after = [replica.answered(key) for replica in proxied.replicas]
    (index,) = (i for i in range(2) if after[i] > before[i])
    return proxied.replicas[index]


def test_replicas_behind_a_proxy(proxied: Proxied) -> None:
    homes: dict[str, Replica] = {}
    for key in proxied.keys:
        homes[key] = home_of(proxied, key)
        if len(set(homes.values())) == 2:
            break
    assert len(set(homes.values())) == 2, "the work is shared"
    assert {key: home_of(proxied, key) for key in homes} == homes, "a key is answered where it was before"

    key, *_, other = homes
    assert homes[key] is not homes[other]
    with proxied.client(key) as client:
        sni = {"sni_hostname": NAME}
        assert client.get("/metrics", extensions=sni).status_code == 404
        assert proxied.ask(key, Origin=f"https://{NAME}").status_code == 200, "the server's own page may ask"
        assert proxied.ask(key, Origin="https://evil.example").status_code == 403

        # A stream passes as it comes: what was read was not the whole, which takes minutes; and its end is heard of.
        with client.stream("POST", "/v1/chat/completions", json=LONG, extensions=sni) as answer:
            lines = answer.iter_lines()
            assert [next(lines).startswith("data: ") for _ in range(9)][::2] == [True] * 5
            assert homes[key].metric(key, "dapji_requests_running") == 1
        wait_until(lambda: homes[key].metric(key, "dapji_requests_running") == 0)

        # One is told to stop: what it answers ends well, and whoever comes next goes to the other.
        with client.stream("POST", "/v1/chat/completions", json=LONG | {"max_tokens": 4000}, extensions=sni) as answer:
            lines = answer.iter_lines()
            next(lines)
            homes[key].process.send_signal(signal.SIGTERM)
            if proxied.retries:
                assert proxied.ask(key).status_code == 200
            wait_until(lambda: answered(proxied, key))
            assert [proxied.ask(key).status_code for _ in range(10)] == [200] * 10
            last = [line for line in lines if line][-2:]
    assert json.loads(last[0][6:])["choices"][0]["finish_reason"] == "length"
    assert last[1] == "data: [DONE]"
    assert homes[key].process.wait(20) == 0
    before = homes[other].answered(key)
    assert [proxied.ask(key).status_code for _ in range(10)] == [200] * 10
    assert homes[other].answered(key) == before + 10


def answered(proxied: Proxied, key: str) -> bool:
    """False too where a proxy that does not ask again has handed on a connection that the stopping server closed."""
    try:
        return proxied.ask(key).status_code == 200
    except httpx.RemoteProtocolError:
        return False


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
