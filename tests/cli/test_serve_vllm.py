"""`dapji serve --engine vllm` as a process, with a stand-in for vLLM: how it starts, what it refuses, how both end."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from in_process import Dapji
from serving import Served

from tiny import SCRIPT, write_tiny
from vllm_cases import write_folder

STAND_IN = Path(__file__).parents[1] / "vllm_stand_in.py"
COMMAND = f"{sys.executable} {STAND_IN}"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("vllm") / "tiny")


class OnVllm(Served):
    """With the stand-in."""

    @property
    def socket(self) -> Path:
        """Of the stand-in."""
        found = re.search(r"--uds (\S+)", "".join(self.lines))
        assert found is not None
        return Path(found[1])


Serve = Callable[..., OnVllm]


@pytest.fixture
def serve(folder: Path, home: Path) -> Iterator[Serve]:
    started: list[OnVllm] = []

    def start(*options: str) -> OnVllm:
        started.append(OnVllm(home, folder, "--engine", "vllm", *options))
        return started[-1]

    yield start
    for served in started:
        served.kill()


def streaming(served: OnVllm) -> tuple[threading.Thread, list[str]]:
    """An answer that has begun, and its lines as they come."""
    lines: list[str] = []

    def read() -> None:
        body = CHAT | {"max_tokens": 100, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=30) as answer:
            lines.extend(filter(None, answer.iter_lines()))

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: httpx.get(f"{served.url}/metrics").text.count("dapji_requests_running 1.0") == 1)
    time.sleep(0.1)
    return thread, lines


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_every_protocol_answers(serve: Serve) -> None:
    served = serve("--vllm-command", COMMAND)
    assert "".join(served.lines).count("vLLM is ready after ") == 1
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5)
    assert chat.choices[0].message.content == "aaaaa"
    assert chat.choices[0].finish_reason == "length"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 5
    with anthropic.Anthropic(base_url=served.url, api_key="none") as asker:
        said = asker.messages.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, stop_sequences=["aaa"]
        )
    assert said.stop_reason == "stop_sequence"
    generate = {"model": "tiny", "prompt": "Hi", "options": {"num_predict": 3}, "raw": True, "stream": False}
    told = httpx.post(f"{served.url}/api/generate", json=generate)
    assert told.json()["response"] == "aaa"
    refused = httpx.post(f"{served.url}/v1/chat/completions", json=CHAT | {"typical_p": 0.5})
    assert refused.status_code == 400
    assert "typical_p (0.5) must be 1 with vLLM" in refused.json()["error"]["message"]
    assert served.socket.exists()
    assert served.socket.parent.stat().st_mode & 0o077 == 0, "other users cannot ask vLLM behind our back"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_finishes_and_stops_vllm(serve: Serve, sent: signal.Signals) -> None:
    served = serve("--vllm-command", COMMAND)
    thread, lines = streaming(served)
    served.process.send_signal(sent)
    thread.join()
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert served.ended() == 0
    assert not served.socket.exists()
    assert not any("Traceback" in line for line in served.lines), served.lines


def test_when_vllm_dies_it_says_so_and_ends(serve: Serve) -> None:
    served = serve("--vllm-command", COMMAND)
    thread, lines = streaming(served)
    failed = httpx.post(f"{served.url}/v1/completions", json={"prompt": "!die", "max_tokens": 5})
    assert failed.status_code == 503
    assert re.search(r"vLLM at a socket of this machine (closed|broke)", failed.json()["error"]["message"])
    thread.join()
    assert "vLLM at a socket of this machine broke off its answer" in "".join(lines)
    assert served.ended() == 1
    assert "error: vLLM ended with exit code 3\n" in served.lines


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_vllm_does_not_outlive_it(serve: Serve) -> None:
    served = serve("--vllm-command", COMMAND)
    address = str(served.socket)
    served.process.kill()
    served.ended()

    def is_gone() -> bool:
        with socket.socket(socket.AF_UNIX) as asking:
            return asking.connect_ex(address) == errno.ECONNREFUSED

    wait_until(is_gone)
    shutil.rmtree(Path(address).parent)  # nobody was left to do it


def test_one_that_runs_already(serve: Serve, folder: Path, tmp_path: Path) -> None:
    running = subprocess.Popen([*COMMAND.split(), str(folder), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        url = running.stdout.readline().strip()
        served = serve("--vllm-url", url)
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=CHAT)
        assert answer.json()["choices"][0]["message"]["content"] == "aaaaa"
    finally:
        running.kill()
        running.communicate()
    gone = httpx.post(f"{served.url}/v1/chat/completions", json=CHAT)
    assert gone.status_code == 503
    assert f"vLLM at {url} cannot be reached" in gone.json()["error"]["message"]
    assert httpx.get(f"{served.url}/health").status_code == 200, "the other machine's failure is not ours"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "vllm", "--kv", "f32"], "--kv is an option of Dapji's own engine, and --engine is vllm"),
        (["--engine", "vllm", "--no-speculate"], "--no-speculate is an option of Dapji's own engine"),
        (["--engine", "vllm", "--memory", "4"], "--memory is an option of Dapji's own engine"),
        (["--vllm-url", "http://gpu:8000"], "--vllm-url is an option of vLLM, and --engine is dapji"),
        (["--vllm-command", "vllm serve"], "--vllm-command is an option of vLLM"),
        (["--engine", "vllm", "--vllm-url", "http://gpu", "--context", "9"], "--context is for a server that is start"),
        (["--engine", "vllm", "--vllm-url", "gpu:8000"], "'gpu:8000' is no address of a vLLM server"),
        (["--engine", "vllm", "--vllm-command", "/no/vllm"], "'/no/vllm' cannot be started: No such file"),
        (["--engine", "vllm", "--vllm-command", "false"], "vLLM ended with exit code 1\nhint: its own lines above"),
        (["--engine", "vllm", "--vllm-command", "'"], '--vllm-command "\'" cannot be read: No closing quotation'),
        (["--engine", "vllm", "--vllm-command", ""], "--vllm-command is empty"),
    ],
)
def test_what_it_does_not_start_with(dapji: Dapji, folder: Path, options: list[str], message: str) -> None:
    code, _, err = dapji("serve", folder, "--port", "0", *options)
    assert code == 1
    assert message in err


def test_one_folder_only(dapji: Dapji, folder: Path, tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "answer.gguf", SCRIPT)
    assert "one file, and vLLM reads folders" in dapji("serve", file, "--port", "0", "--engine", "vllm").err
    two = dapji("serve", folder, file, "--port", "0", "--engine", "vllm")
    assert "a vLLM server computes for one model, and there are 2" in two.err
