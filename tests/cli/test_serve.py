"""`dapji serve` as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from in_process import Dapji
from serving import Served

from dapji.cli.serve import command
from dapji.server.authority import Authority
from dapji.server.keys import Keys
from tiny import COUNTING, SCRIPT, write_tiny

CONTEXT = 1 << 15
"""Tokens: a fast machine writes some 5,000 a second, and what waits for an end needs two of them."""
LONG: dict[str, Any] = {
    "model": "endless",
    "messages": [{"role": "user", "content": "안녕"}],
    "temperature": 10,
    "logit_bias": {"0": -100, "2": -100},
    "n": 2,
    "stream": True,
}
"""Seconds of work."""
SHORT: dict[str, Any] = {"model": "answer", "messages": LONG["messages"], "temperature": 0}


class Models(Served):
    """With two tiny models."""

    def ask(self, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=SHORT, timeout=30, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [
        write_tiny(folder / "answer.gguf", SCRIPT, max_context=CONTEXT),
        write_tiny(folder / "endless.gguf", COUNTING, endless=True, max_context=CONTEXT),
    ]


Serve = Callable[..., Models]


@pytest.fixture
def serve(models: list[Path], home: Path) -> Iterator[Serve]:
    started: list[Models] = []

    def start(*options: str | Path) -> Models:
        started.append(Models(home, *models, "--context", f"{CONTEXT}", *options))
        return started[-1]

    yield start
    for served in started:
        served.kill()


def streaming(served: Models, **more: int) -> tuple[threading.Thread, list[str]]:
    """An answer that has begun, and its lines as they come."""
    lines: list[str] = []

    def read() -> None:
        try:
            with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=LONG | more, timeout=30) as answer:
                for line in filter(None, answer.iter_lines()):
                    lines.append(line)
        except httpx.HTTPError as error:
            lines.append(f"cut off: {error!r}")

    thread = threading.Thread(target=read)
    thread.start()
    end = time.monotonic() + 20
    while len(lines) < 5:
        assert time.monotonic() < end
        time.sleep(0.005)
    return thread, lines


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_finishes_what_runs_and_takes_nothing_new(serve: Serve, sent: signal.Signals) -> None:
    served = serve()
    served.ask()
    thread, lines = streaming(served, max_tokens=300)
    served.process.send_signal(sent)
    refused = wait_for_refusal(served)
    assert refused.json()["error"]["message"] == "this server is stopping"
    assert int(refused.headers["Retry-After"]) > 0
    assert httpx.get(f"{served.url}/health").status_code == 503
    thread.join()
    assert lines[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[-3:-1]]
    assert reasons == ["length", "length"]
    assert served.ended() == 0
    assert not any("Traceback" in line for line in served.lines), served.lines


def wait_for_refusal(served: Models) -> httpx.Response:
    end = time.monotonic() + 5
    while (answer := served.ask()).status_code != 503:
        assert time.monotonic() < end
    return answer


def test_a_second_signal_ends_at_once(serve: Serve) -> None:
    served = serve()
    thread, lines = streaming(served)
    served.process.send_signal(signal.SIGTERM)
    wait_for_refusal(served)
    served.process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert served.ended() == 0
    assert time.monotonic() - start < 4
    thread.join()
    assert lines[-1].startswith("cut off: "), lines[-6:]


def test_the_grace_is_bounded(serve: Serve) -> None:
    served = serve("--grace", "0.2")
    thread, lines = streaming(served)
    served.process.send_signal(signal.SIGTERM)
    assert served.ended() == 0
    thread.join()
    assert lines[-1].startswith("cut off: "), lines[-6:]


def test_killed_amid_streams_it_starts_again_and_has_counted(serve: Serve, home: Path) -> None:
    key = Keys(home / "server" / "keys.db").add("me", 100_000)
    headers = {"Authorization": f"Bearer {key}"}
    served = serve()
    assert served.ask().status_code == 401
    tokens = served.ask(headers=headers).json()["usage"]["total_tokens"]
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=LONG, headers=headers) as answer:
        next(answer.iter_lines())
        served.process.kill()
    assert served.ended() == -signal.SIGKILL
    again = serve("--port", served.url.rpartition(":")[2])
    prompt = again.ask(headers=headers).json()["usage"]["prompt_tokens"]
    (told,) = Keys(home / "server" / "keys.db").all()
    assert told.used == 2 * tokens + prompt, "two whole answers, and the prompt of the one that was cut off"


def test_lines_of_json(serve: Serve) -> None:
    served = serve("--log", "json")
    served.ask()
    httpx.get(f"{served.url}/v1/models", headers={"Host": "evil.example"})
    served.process.send_signal(signal.SIGTERM)
    assert served.ended() == 0
    told = [json.loads(line) for line in served.lines[3:]]
    assert [(each["route"], each["status"], each["model"]) for each in told] == [
        ("/v1/chat/completions", 200, "answer"),
        ("/v1/models", 403, None),
    ]
    assert told[0]["generated_tokens"] == 8


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """In one file each."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder, ["localhost"])
    authority.renew()
    pem = authority.certificate.read_text()
    begins = pem.index("-----BEGIN PRIVATE KEY")
    (folder / "cert.pem").write_text(pem[:begins])
    (folder / "key.pem").write_text(pem[begins:])
    return folder / "cert.pem", folder / "key.pem"


def test_tls(serve: Serve, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    served = serve("--host", "localhost", "--tls-cert", cert, "--tls-key", key)
    assert served.url.startswith("https://localhost:")
    trusted = ssl.create_default_context(cafile=str(cert.with_name("authority.pem")))
    assert served.ask(verify=trusted).status_code == 200
    own_page = httpx.get(f"{served.url}/v1/models", verify=trusted, headers={"Origin": served.url})
    assert own_page.status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        served.ask()


def test_a_certificate_of_an_authority_of_its_own(serve: Serve, tmp_path: Path) -> None:
    served = serve("--tls-self-signed", "--allow-host", "llm.example.org")
    assert served.url.startswith("https://127.0.0.1:")
    authority = next(re.findall(r"the authority (\S+): curl", line)[0] for line in served.lines if "authority" in line)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        served.ask()
    ask = (
        "import openai; "
        f"client = openai.OpenAI(base_url='{served.url.replace('127.0.0.1', 'localhost')}/v1', api_key='none'); "
        "print([model.id for model in client.models.list()])"
    )
    asked = subprocess.run(
        [sys.executable, "-c", ask], env=os.environ | {"SSL_CERT_FILE": authority}, capture_output=True, text=True
    )
    assert asked.stdout == "['answer', 'endless']\n", asked.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-self-signed", "--tls-cert", "{cert}"], "give one of them"),
        (["--host", "0.0.0.0"], r"--host 0\.0\.0\.0 is reachable from other machines.*\nhint: dapji key add NAME"),
        (["--allow-host", "*"], r"--allow-host '\*' is no name or address"),
        (["--allow-host", "http://a"], "is no name or address"),
        (["--allow-origin", "*"], r"--allow-origin '\*' is no origin"),
        (["--allow-origin", "https://*.example.org"], "is no origin"),
        (["--allow-origin", "https://example.org/"], "is no origin"),
        (["--allow-origin", "null"], "is no origin"),
        (["--host", "127.0.0.1", "--port", "1", "--tls-cert", "{cert}"], "--tls-cert and --tls-key are given together"),
        (["--tls-cert", "{cert}", "--tls-key", "{cert}"], "are no certificate and its key"),
        (["--tls-cert", "/nothing"], "does not exist"),
    ],
)
def test_what_it_does_not_start_with(
    dapji: Dapji, models: list[Path], certificate: tuple[Path, Path], options: list[str], message: str
) -> None:
    code, _, err = dapji("serve", *models, *(option.format(cert=certificate[0]) for option in options))
    assert code in (1, 2)
    assert re.search(message, err), err


def test_what_deploy_starts_is_a_command(models: list[Path]) -> None:
    folder = Path(__file__).parents[2] / "deploy"
    unit = re.findall(r"^ExecStart=\S+/dapji serve (.*)$", (folder / "dapji.service").read_text(), re.MULTILINE)
    image = re.findall(r"^CMD (\[.*\])$", (folder / "Containerfile").read_text(), re.MULTILINE)
    proxied = re.findall(r"dapji serve (--port 8410 .*\S)  +", (folder / "nginx.conf").read_text())
    started = [unit[0].split(), json.loads(image[0])[1:], proxied[0].split()]
    for arguments in started:
        command.make_context("serve", arguments).close()


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = (Path(__file__).parents[2] / "deploy" / "dapji.service").read_text()
    assert "ExecStart=/opt/dapji/bin/dapji " in unit
    (tmp_path / "dapji.service").write_text(unit.replace("/opt/dapji/bin/dapji", sys.executable))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "dapji.service")], capture_output=True, text=True
    )
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_revoked_keys_open_nothing_to_other_machines(dapji: Dapji, models: list[Path]) -> None:
    assert dapji("key", "add", "me").code == 0
    assert dapji("key", "revoke", "me").code == 0
    assert "no key opens" in dapji("key", "list").err
    assert "there is no key" in dapji("serve", *models, "--host", "0.0.0.0").err


def test_a_port_that_is_taken(dapji: Dapji, serve: Serve, models: list[Path]) -> None:
    port = serve().url.rpartition(":")[2]
    code, _, err = dapji("serve", *models, "--port", port)
    assert code == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in err


@pytest.mark.slow
def test_64_streams_at_once(serve: Serve) -> None:
    served = serve()
    start, alone = time.monotonic(), served.ask().json()["choices"][0]["message"]["content"]
    texts: list[str] = []

    def ask() -> None:
        while time.monotonic() - start < 20:
            with httpx.stream(
                "POST", f"{served.url}/v1/chat/completions", json=SHORT | {"stream": True}, timeout=60
            ) as answer:
                chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
            texts.append("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks))

    threads = [threading.Thread(target=ask) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) >= 64
    assert set(texts) == {alone}
    served.process.send_signal(signal.SIGTERM)
    assert served.ended() == 0
