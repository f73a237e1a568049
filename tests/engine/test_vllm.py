"""`VllmEngine` against answers that vLLM gave (`vllm_stand_in`), and what it makes of servers that fail.

VLLM=COMMAND runs the first tests with a real one too, as in `dapji serve --vllm-command`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import dapji
from dapji.engine import Logprobs, Output, Request, Sampling
from dapji.engine.vllm import VllmEngine
from dapji.engine.vllm_http import Address
from dapji.engine.vllm_process import VllmProcess
from dapji.errors import ContextError, DapjiError, RequestError, UnavailableError, UsageError
from dapji.model import Model, load_on_vllm
from dapji.models.adapter import Adapter, adaptable
from dapji.models.config import ModelConfig
from dapji.ops.low_rank import LowRank
from dapji.ops.tensor import Tensor
from dapji.weights.adapter_file import write_adapter
from dapji.weights.convert import write_folder as write_whole_folder
from dapji.weights.merge import merged
from vllm_cases import CONTEXT, GREEDY, PROMPT, answers, refused, write_folder
from vllm_stand_in import StandIn, recorded

GRAMMARS = ("schema", "answer", "nested", "expression", "lark")
TOLERANCE = 1e-4
"""Of log-probabilities: float32 sums in another order (1.5e-5 is what occurs)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def native(folder: Path) -> dict[str, Any]:
    with dapji.load(folder, kv="f32") as model:
        return answers(model)


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    started = StandIn(tmp_path / "socket", recorded())
    yield started
    started.stop()


@pytest.fixture
def engine(stand_in: StandIn, tmp_path: Path) -> Iterator[VllmEngine]:
    with VllmEngine(Address(socket=tmp_path / "socket"), end_tokens=[0, 2], vocab_size=259) as opened:
        yield opened


@pytest.fixture(params=["recorded", "real"])
def model(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[Model]:
    """Whose tokens vLLM computes, or computed."""
    with ExitStack() as held:
        if request.param == "recorded":
            request.getfixturevalue("stand_in")
            address = Address(socket=tmp_path / "socket")
        else:
            process = held.enter_context(VllmProcess(vllm_command(), folder, context=None))
            process.wait_until_ready()
            address = process.address
        yield held.enter_context(load_on_vllm(folder, address))


@pytest.mark.timeout(600)
def test_the_answers_are_those_of_the_native_engine(model: Model, native: dict[str, Any]) -> None:
    got = answers(model)
    assert got.keys() == native.keys()
    for name in native.keys() - {"scores"}:
        same_outputs(got[name], native[name], end_token=name not in GRAMMARS)
    assert got["stop token"][-1].finish.stop_token == got["greedy"][2].token
    assert len(got["stopped"]) == 4
    assert len(got["minimum"]) >= 5
    assert got["read before"][-1].finish.usage.cached > 0
    scores, expected = got["scores"], native["scores"]
    np.testing.assert_allclose(scores.chosen, expected.chosen, rtol=0, atol=TOLERANCE)
    for ours, theirs in zip(scores.top, expected.top, strict=True):
        same_top(ours, theirs)
    said = refused(model)
    assert said["temperature"].startswith("vLLM refuses the request: temperature must be in [0, 2], got 3.0")
    assert said["grammar"].startswith("vLLM refuses the request: ")
    assert "bogus" in said["grammar"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("merge", [False, True])
def test_what_training_leaves_answers_as_here(folder: Path, merge: bool, tmp_path: Path) -> None:
    """An adapter beside its base, and a folder that it was merged into."""
    command = vllm_command()
    with dapji.load(folder, kv="f32") as model:
        adapter = random_adapter(model.config)
        number = model.engine.add_adapter(adapter)
        greedy = [
            [
                output.token
                for output in model.engine.generate(
                    Request(prompt=PROMPT, max_tokens=16, sampling=GREEDY, adapter=chosen, ignore_eos=True)
                )
            ]
            for chosen in (0, number)
        ]
        if merge:
            weights = merged(model.files.tensors, adapter)
            write_whole_folder(model.files.checkpoint, tmp_path / "merged", "F32", weights=weights)
        else:
            (tmp_path / "adapter").mkdir()
            write_adapter(tmp_path / "adapter", model.config, adapter, base=str(folder))
    assert greedy[0] != greedy[1]
    served = tmp_path / "merged" if merge else folder
    lora = [] if merge else ["--lora-modules", f"tuned={tmp_path / 'adapter'}", "--enable-lora"]
    command[-1:-1] = lora  # before its last word, which may be an option whose value is the folder
    with VllmProcess(command, served, context=None) as process:
        process.wait_until_ready()
        asked = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        transport = httpx.HTTPTransport(uds=str(process.address.socket))
        with httpx.Client(transport=transport, base_url="http://vllm", timeout=60) as client:
            names = [card["id"] for card in client.get("/v1/models").json()["data"]]
            got = [
                client.post("/v1/completions", json={"model": name, **asked}).json()["choices"][0]["token_ids"]
                for name in names
            ]
    assert got == (greedy[1:] if merge else greedy)


def vllm_command() -> list[str]:
    if "VLLM" not in os.environ:
        pytest.skip("needs VLLM, a command that starts one")
    return shlex.split(os.environ["VLLM"])


def random_adapter(config: ModelConfig) -> Adapter:
    """Of every matrix in the layers."""
    random = np.random.default_rng(0)
    pairs = {}
    for name, (rows, cols) in adaptable(config).items():
        if name.startswith("layers."):
            a, b = (random.normal(0, 0.1, shape).astype(np.float32) for shape in ((8, cols), (rows, 8)))
            pairs[name] = LowRank(a=Tensor.from_float32(name, a), b=Tensor.from_float32(name, b), scale=2.0)
    return Adapter(pairs=pairs)


def same_outputs(got: list[Output], expected: list[Output], *, end_token: bool) -> None:
    """end_token: whether it must be the same: under a grammar vLLM knows but one."""
    n = len(expected) if end_token else len(expected) - 1
    assert [output.token for output in got[:n]] == [output.token for output in expected[:n]]
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        if theirs.logprobs is None:
            assert ours.logprobs is None
            continue
        assert ours.logprobs is not None
        assert ours.logprobs.chosen == pytest.approx(theirs.logprobs.chosen, abs=TOLERANCE)
        same_top(ours.logprobs.top, theirs.logprobs.top)
    ended, other = got[-1].finish, expected[-1].finish
    assert ended is not None
    assert other is not None
    assert ended.reason == other.reason
    assert (ended.stop_token is None) == (other.stop_token is None)
    assert (ended.usage.prompt, ended.usage.generated) == (other.usage.prompt, other.usage.generated)


def same_top(got: tuple[tuple[int, float], ...], expected: tuple[tuple[int, float], ...]) -> None:
    assert [token for token, _ in got] == [token for token, _ in expected]
    assert [value for _, value in got] == pytest.approx([value for _, value in expected], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": 0.001}, r"temperature \(0.001\) must be 0 or at least 0.01 with vLLM"),
        ({"typical_p": 0.9}, r"typical_p \(0.9\) must be 1 with vLLM"),
        ({"min_p": 0.1, "top_p": 0.9}, r"min_p \(0.1\) and top_p \(0.9\) cannot be combined with vLLM"),
        ({"seed": 2**63}, r"seed \(9223372036854775808\) must be at most 9223372036854775807"),
    ],
)
def test_what_vllm_would_do_otherwise_is_refused(engine: VllmEngine, sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(Request(prompt=PROMPT, sampling=Sampling(**sampling)))


def test_what_every_engine_refuses(engine: VllmEngine) -> None:
    assert engine.context == CONTEXT
    with pytest.raises(RequestError, match=r"prompt\[0\] must be a token id from 0 to 258, got 259"):
        engine.generate(Request(prompt=[259]))
    with pytest.raises(ContextError, match=r"prompt \(500 tokens\) and max_tokens \(20\)"):
        engine.generate(Request(prompt=[5] * 500, max_tokens=20))
    with pytest.raises(RequestError, match="it gives no embeddings"):
        engine.embed([PROMPT], pooling="mean")
    with pytest.raises(ContextError, match=r"the text \(512 tokens\) and the one that vLLM generates behind it"):
        engine.score([5] * CONTEXT)


def test_who_goes_away_ends_the_request(engine: VllmEngine, stand_in: StandIn) -> None:
    stream = engine.generate(Request(prompt=PROMPT, max_tokens=400))
    assert [next(stream).token for _ in range(3)] == [100] * 3
    assert stand_in.streams == 1
    stream.close()
    wait_until(lambda: stand_in.streams == 0)
    assert list(stream) == []
    abandoned = engine.generate(Request(prompt=PROMPT, max_tokens=400))
    next(abandoned)
    del abandoned
    wait_until(lambda: stand_in.streams == 0)

    async def impatient() -> None:
        async with asyncio.timeout(0.2):
            async for _ in engine.agenerate(Request(prompt=PROMPT, max_tokens=400)):
                pass

    with pytest.raises(TimeoutError):
        asyncio.run(impatient())
    wait_until(lambda: stand_in.streams == 0)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_many_at_once(engine: VllmEngine) -> None:
    async def one() -> list[int]:
        return [output.token async for output in engine.agenerate(Request(prompt=PROMPT, max_tokens=20))]

    async def run() -> list[list[int]]:
        return await asyncio.gather(*(one() for _ in range(64)))

    assert asyncio.run(run()) == [[100] * 20] * 64


def test_closing_ends_what_runs(engine: VllmEngine) -> None:
    stream = engine.generate(Request(prompt=PROMPT, max_tokens=400))
    next(stream)
    engine.close()
    with pytest.raises(UsageError, match="closed before the request ended"):
        list(stream)
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.generate(Request(prompt=PROMPT))
    engine.close()


def test_what_stop_raises_comes_out(engine: VllmEngine) -> None:
    def stop(token: int) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(engine.generate(Request(prompt=PROMPT, max_tokens=5, stop=stop)))


CARD = b'{"data": [{"id": "other:lora", "parent": "m", "max_model_len": 9}, {"id": "m", "max_model_len": 64}]}'


class Broken:
    """A server whose answer to a completion is these bytes and the end of the connection."""

    def __init__(self, said: bytes) -> None:
        self._said = said
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.asked: list[bytes] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                asked = connection.recv(1 << 16)
                while asked.startswith(b"POST") and not asked.endswith(b"}"):
                    asked += connection.recv(1 << 16)
                self.asked.append(asked)
                card = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(CARD), CARD)
                connection.sendall(card if asked.startswith(b"GET /v1/models") else self._said)


def streamed(*events: str) -> bytes:
    return b"HTTP/1.1 200 OK\r\n\r\n" + "".join(f"data: {event}\n\n" for event in events).encode()


ONE = '{"choices": [{"index": 0, "text": "", "token_ids": [7]}]}'


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (b"", UnavailableError, r"closed the connection without an answer|broke off its answer"),
        (b"nonsense\r\n\r\n", UnavailableError, "broke off its answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\ndata: {}\n\n", UnavailableError, "broke off its answer"),
        (b"HTTP/1.1 502 Bad\r\n\r\n<html>no", UnavailableError, r"failed \(502\): <html>no"),
        (b'HTTP/1.1 400 Bad\r\n\r\n{"error": {"message": "why"}}', RequestError, "vLLM refuses the request: why"),
        (streamed("nonsense"), UnavailableError, "answers in a form that is not known"),
        (streamed('{"choices": [{"token_ids": "7"}]}'), UnavailableError, "answers in a form that is not known"),
        (streamed('{"choices": [{"text": "a"}]}'), UnavailableError, "too old for return_token_ids"),
        (streamed('{"choices": [{"token_ids": [259]}]}'), UnavailableError, "drew token 259, and the tokenizer ends"),
        (streamed(ONE, "[DONE]"), UnavailableError, r"ended the answer after 1 of 2 tokens \(finish_reason None\)"),
        (streamed(ONE, '{"error": {"message": "OOM", "code": 500}}'), UnavailableError, r"failed \(500\): OOM"),
    ],
)
def test_servers_that_fail(said: bytes, kind: type[DapjiError], message: str) -> None:
    broken = Broken(said)
    with VllmEngine(Address.of_url(broken.url, key="secret"), vocab_size=259) as engine:
        assert engine.context == 64
        with pytest.raises(kind, match=message):
            list(engine.generate(Request(prompt=[5], max_tokens=2, sampling=GREEDY)))
        assert b"Authorization: Bearer secret\r\n" in broken.asked[-1]
        assert b'"model":"m"' in broken.asked[-1]


def test_several_tokens_in_one_event() -> None:
    events = [
        '{"choices": [{"token_ids": []}]}',
        '{"choices": [{"token_ids": [5, 6, 7, 8], "logprobs": {"token_logprobs": [-1, -2, -3, -4], "top_logprobs": '
        '[{"token_id:5": -1}, {"token_id:6": -2, "token_id:9": -0.5}, {"token_id:7": -3}, {"token_id:8": -4}]}}]}',
        '{"choices": [{"token_ids": [2], "finish_reason": "stop"}]}',
    ]
    with VllmEngine(Address.of_url(Broken(streamed(*events, "[DONE]")).url), vocab_size=259) as engine:
        request = Request(prompt=[5], max_tokens=9, sampling=GREEDY, logprobs=1)
        outputs = list(engine.generate(request))
        assert [output.token for output in outputs] == [5, 6, 7, 8, 2]
        assert outputs[1].logprobs == Logprobs(chosen=-2, top=((9, -0.5),))
        # an end token of which only vLLM knows
        assert outputs[-1].finish is not None
        assert outputs[-1].finish.stop_token == 2
        cut = list(engine.generate(Request(prompt=[5], max_tokens=9, sampling=GREEDY, stop=lambda token: token == 6)))
        assert [output.token for output in cut] == [5, 6]


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="vLLM at a socket of this machine cannot be reached: No such file"):
        VllmEngine(Address(socket=tmp_path / "none"), vocab_size=259)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnavailableError, match=rf"vLLM at http://127.0.0.1:{port} cannot be reached"):
        VllmEngine(Address.of_url(f"http://127.0.0.1:{port}"), vocab_size=259)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://a/v1", "http://", "http://a:port"])
def test_no_addresses(url: str) -> None:
    with pytest.raises(UsageError, match="is no address of a vLLM server"):
        Address.of_url(url)


def test_addresses() -> None:
    assert str(Address.of_url("http://[::1]:8000/")) == "http://[::1]:8000"
    assert Address.of_url("https://gpu.example").port == 443


def test_a_server_of_another_model(stand_in: StandIn, folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other")
    description = json.loads((other / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    vocabulary["d"], vocabulary["e"] = vocabulary["e"], vocabulary["d"]
    (other / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match="vLLM at a socket of this machine serves another model than"):
        load_on_vllm(other, Address(socket=tmp_path / "socket"))
