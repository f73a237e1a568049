"""Many clients for minutes, and the time to a first token behind a long prefix, beside llama-server, over HTTP.

    python benchmarks/load.py                                   smollm2-135m, 64 streams, 10 minutes
    python benchmarks/load.py --seconds 60 --peer-seconds 60    a short look
    python benchmarks/load.py --draw                            measures nothing: tables from the results

Both servers serve the same file and hear the same requests from the same client: each stream sends a conversation,
reads its answer to the end, and sends the next. Answers have one length: an end token is biased away. All are drawn
with a seed, so that Dapji's, asked again alone when the load is over, must be the same texts. llama-server first tries
its flags (weights repacked or not, its tiled kernels or not, flash attention or not); with the best it runs before and
after us, half of its time each. Tokens count when they arrive, in a window that begins when the streams have settled.

Then the prefix: a question behind 2,000 tokens that the server has not seen, and another behind the same ones.

Results are kept in benchmarks/data/load.json, and written into docs/performance.md from there. Wants the peer:
benchmarks/peer.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise, product
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import peer
import report
from cpu import find_model, named
from dapji.files import open_files
from dapji.tokenizer import Tokenizer

ANSWER = 128
"""Tokens of every answer."""
PROMPT = 96
"""Tokens of the longest question; the shortest has a sixth."""
SLOT = 512
"""Tokens that llama-server keeps for a stream: its conversation fits, chat template included."""
SETTLING = 20.0
"""Seconds of load before tokens count."""
PREFIX = 2000
TEXT = report.ROOT / "benchmarks" / "data" / "shakespeare.txt"
DATA = report.ROOT / "benchmarks" / "data" / "load.json"

Results = dict[str, Any]
Body = dict[str, Any]


@dataclass(eq=False)
class Answer:
    """To one request, as its client saw it."""

    sent: float
    arrived: list[float] = field(default_factory=list)
    """When its pieces of text came."""
    text: str = ""
    usage: Results = field(default_factory=dict)


async def ask(port: int, body: Body) -> Answer:
    """Raises RuntimeError for anything but a whole answer."""
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    answer = Answer(perf_counter())
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError((status + await reader.read()).decode(errors="replace"))
        async for line in reader:  # an event is a line, and never split over chunks of the transfer encoding
            if not line.startswith(b"data: {"):
                continue
            now, event = perf_counter(), json.loads(line[6:])
            if "choices" not in event:
                raise RuntimeError(line.decode())
            if event.get("usage"):
                answer.usage = event["usage"]
            if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                answer.arrived.append(now)
                answer.text += text
    finally:
        writer.close()
    if not answer.usage:
        raise RuntimeError("the answer broke off")
    return answer


class Questions:
    """Conversations, all of them different."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokenizer.encode(TEXT.read_text())
        self._never = {str(token): -100 for token in tokenizer.stop_ids}

    def request(self, i: int) -> Body:
        """The i-th, of a length between PROMPT / 6 and PROMPT."""
        length = PROMPT // 6 + i * 37 % (PROMPT - PROMPT // 6)
        return self._body(f"Go on with this: {self._stretch(i * 61, length)}", i, ANSWER)

    def behind(self, prefix: int, question: int) -> Body:
        """A question behind a prefix of PREFIX tokens, the same for all questions of the same number."""
        said = self._stretch(prefix * (PREFIX + 1), PREFIX)
        return self._body(f"{said}\n\nQuestion {question}: {self._stretch(question * 61, 12)}", question, 4)

    def _stretch(self, start: int, length: int) -> str:
        start %= len(self._tokens) - length
        return self._tokenizer.decode(self._tokens[start : start + length])

    def _body(self, content: str, seed: int, length: int) -> Body:
        return {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": length,
            "seed": seed,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0,
            "logit_bias": self._never,
        }


@dataclass(frozen=True)
class Running:
    """A server under load."""

    port: int
    process: int

    def memory(self) -> int:
        """Bytes that are resident."""
        for line in Path(f"/proc/{self.process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError


@contextmanager
def dapji(path: Path, threads: int, n: int) -> Iterator[Running]:
    command = [sys.executable, "-m", "dapji", "serve", str(path), "--port", "0", "--threads", str(threads)]
    command += ["--max-running", str(n)]
    with (
        tempfile.NamedTemporaryFile("r") as said,
        subprocess.Popen(command, stderr=said.fileno(), stdout=subprocess.DEVNULL) as process,
    ):
        try:
            while (port := re.search(r"listening on http://127\.0\.0\.1:(\d+)", Path(said.name).read_text())) is None:
                if process.poll() is not None:
                    raise SystemExit(Path(said.name).read_text())
                sleep(0.1)
            yield Running(int(port[1]), process.pid)
        finally:
            process.terminate()


@contextmanager
def llama_server(path: Path, threads: int, n: int, flags: peer.Flags) -> Iterator[Running]:
    with peer.server(path, n=n, context=n * SLOT, threads=threads, flags=flags) as (port, process):
        yield Running(port, process)


async def load(
    server: Running, questions: Questions, n: int, seconds: float, settling: float
) -> tuple[Results, dict[int, str]]:
    """n streams, one request after another in each, for so long after they have settled; and their answers."""
    start = perf_counter()
    begin, end = start + settling, start + settling + seconds
    numbers, answers, memory = count(), dict[int, Answer](), list[tuple[float, int]]()
    errors: list[str] = []

    async def stream() -> None:
        while perf_counter() < end:
            i = next(numbers)
            try:
                answers[i] = await ask(server.port, questions.request(i))
            except (RuntimeError, OSError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}"[:500])
                await asyncio.sleep(1)

    async def watch() -> None:
        while perf_counter() < end:
            memory.append((perf_counter() - begin, server.memory()))
            await asyncio.sleep(min(5, seconds / 20))

    await asyncio.gather(watch(), *(stream() for _ in range(n)))
    tokens = 0.0
    for answer in answers.values():
        inside = sum(begin <= moment < end for moment in answer.arrived)
        tokens += answer.usage["completion_tokens"] * inside / max(1, len(answer.arrived))
    whole = [answer for answer in answers.values() if answer.arrived]
    firsts = sorted(answer.arrived[0] - answer.sent for answer in whole if answer.sent >= begin)
    pauses = [later - earlier for answer in whole for earlier, later in pairwise(answer.arrived)]
    measured = {
        "seconds": seconds,
        "answers": len(answers),
        "errors": errors,
        "rate": tokens / seconds,
        "first": [firsts[int((len(firsts) - 1) * share)] for share in (0.5, 0.95, 1) if firsts],
        "longest_pause": max(pauses),
        "memory": memory,
    }
    return measured, {i: answer.text for i, answer in answers.items()}


async def alone(server: Running, questions: Questions, texts: dict[int, str], n: int) -> Results:
    """How many of n answers, spread over all, are the same texts when they are asked for one by one."""
    chosen = sorted(texts)[:: max(1, len(texts) // n)][:n]
    same = [(await ask(server.port, questions.request(i))).text == texts[i] for i in chosen]
    return {"asked": len(same), "same": sum(same)}


async def behind_prefix(server: Running, questions: Questions, rounds: int) -> Results:
    """Seconds to the first token: behind a prefix that is new, and behind one that is not."""
    seconds: dict[str, list[float]] = {"new": [], "known": []}
    for i in range(rounds):
        for question, known in enumerate(seconds):
            answer = await ask(server.port, questions.behind(i, question))
            seconds[known].append(answer.arrived[0] - answer.sent)
    return seconds | {"prompt": answer.usage["prompt_tokens"]}


def measure(arguments: argparse.Namespace, results: Results) -> Iterator[None]:
    name, n, threads = arguments.model, arguments.streams, arguments.threads
    path = find_model(name)
    questions = Questions(open_files(path).tokenizer())
    row: Results = {"streams": n, "threads": threads}

    def other(flags: peer.Flags, seconds: float, settling: float) -> Results:
        print(f"{name}, {n} streams: llama-server, {named(flags)}, {seconds:.0f} s", file=sys.stderr)
        with llama_server(path, threads, n, flags) as server:
            measured, _ = asyncio.run(load(server, questions, n, seconds, settling))
        if measured["errors"]:
            raise SystemExit(f"llama-server failed: {measured['errors'][0]}")
        return measured

    tried = {flags: other(flags, 10, 6)["rate"] for flags in product((1, 0), repeat=3)}
    best = max(tried, key=lambda flags: tried[flags])
    row |= {"flags": named(best), "peer": [other(best, arguments.peer_seconds / 2, SETTLING)]}
    print(f"{name}, {n} streams: Dapji, {arguments.seconds:.0f} s", file=sys.stderr)
    with dapji(path, threads, n) as server:
        row["dapji"], texts = asyncio.run(load(server, questions, n, arguments.seconds, SETTLING))
        row["dapji"]["alone"] = asyncio.run(alone(server, questions, texts, arguments.alone))
    row["peer"].append(other(best, arguments.peer_seconds / 2, SETTLING))
    with dapji(path, threads, n) as server:
        row["prefix"] = asyncio.run(behind_prefix(server, questions, arguments.rounds))
    with peer.server(path, n=1, context=8192, threads=threads, flags=best) as (port, process):
        row["peer_prefix"] = asyncio.run(behind_prefix(Running(port, process), questions, arguments.rounds))
    results[name] = row
    yield


def draw(results: Results) -> None:
    """The tables of docs/performance.md."""
    rows, prefixes = [], []
    for name, row in results.items():
        ours = row["dapji"]
        theirs = {"rate": median(half["rate"] for half in row["peer"]), "memory": row["peer"][-1]["memory"]}
        theirs["first"] = [max(half["first"][i] for half in row["peer"]) for i in range(3)]
        theirs["longest_pause"] = max(half["longest_pause"] for half in row["peer"])
        for program, told in (("Dapji", ours), (f"llama-server ({row['flags']})", theirs)):
            settled = [taken for moment, taken in told["memory"] if moment >= 0]
            rows.append(
                (
                    name,
                    program,
                    f"{told['rate']:.0f}",
                    f"{ours['rate'] / theirs['rate']:.2f}" if told is ours else "",
                    " / ".join(f"{seconds:.2f}" for seconds in told["first"]),
                    f"{told['longest_pause']:.2f}",
                    f"{settled[0] / 1e6:.0f} to {max(settled) / 1e6:.0f}",
                )
            )
        rows.append((name, f"{ours['answers']} answers of ours, {len(ours['errors'])} errors", *[""] * 5))
        for program, key in (("Dapji", "prefix"), ("llama-server", "peer_prefix")):
            new, known = median(row[key]["new"]), median(row[key]["known"])
            prefixes.append((name, program, f"{1e3 * new:.0f}", f"{1e3 * known:.1f}", f"{new / known:.1f}"))
    header = [
        "model",
        "",
        "tokens per second",
        "ratio",
        "s to the first token: median / 95 % / longest",
        "longest pause, s",
        "memory, MB",
    ]
    prefix_header = ["model", "", "prefix new, ms", "prefix known, ms", "ratio"]
    alone = ", ".join(
        f"{row['dapji']['alone']['same']} of {row['dapji']['alone']['asked']}" for row in results.values()
    )
    text = (
        f"{report.table(header, rows)}\n\nAnswers that were the same bits when they were asked for alone: {alone}.\n\n"
        f"{report.table(prefix_header, prefixes)}"
    )
    report.replace_section(report.DOCUMENT, "load", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600, help="of load on Dapji")
    parser.add_argument("--peer-seconds", type=float, default=240, help="of load on llama-server, both halves together")
    parser.add_argument("--alone", type=int, default=128, help="answers that are asked for again, one by one")
    parser.add_argument("--rounds", type=int, default=10, help="prefixes of the second part")
    report.run(parser, DATA, measure, draw)


if __name__ == "__main__":
    main()
