"""Answers of a teacher to prompts, as examples to learn from: distillation of sequences (Kim and Rush 2016), by which
any model teaches any other, whatever their tokens are.

An answer follows from the model, its prompt and its seed. What is written stays, so that the same call goes on where
one was cut off.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dapji.engine import seed_of
from dapji.errors import FormatError, UsageError
from dapji.evaluation.kept import begin
from dapji.model import Model, Reply
from dapji.training.data.prompts import PromptEntry, asked, read_prompts
from dapji.training.data.reading import refusal
from dapji.weights.files import keep_whole_lines
from dapji.weights.sources_base import sha256_file

_TOGETHER = 32
"""Answers at a time."""


@dataclass(frozen=True, kw_only=True)
class Written:
    examples: int
    """In the output."""
    cut: int
    """Answers that had become too long and are left out, of those written now."""


def write_answers(
    model: Model,
    prompts: Path,
    output: Path,
    *,
    n: int = 1,
    seed: int = 0,
    max_tokens: int = 1024,
    sampling: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Writes n answers to each prompt of a file (`read_prompts`) into JSON lines with `prompt` and `completion`, which
    `dapji tune` learns from, and `line`, that of the prompt. They appear at `output` when all are there; until then
    they lie in a folder beside it, OUTPUT.partial, from where the same call goes on.

    sampling: fields of `Sampling`; what is left out is the model's own default. progress: answers that are written, of
    how many. Raises FormatError where rows are no prompts, UsageError where the folder is of another call,
    RequestError.
    """
    entries = list(read_prompts(prompts, model.tokenizer, max_length=model.engine.context - max_tokens))
    if wrong := [entry for entry in entries if entry.error is not None]:
        raise refusal(wrong, len(entries))
    if not entries:
        raise FormatError(f"{prompts}: there is no prompt")
    options = {**(sampling or {}), "max_tokens": max_tokens}
    about = {
        "model": model.name,
        "the prompts' sha256": sha256_file(prompts),
        "n": n,
        "seed": seed,
        "options": options,
    }
    folder = output.with_name(f"{output.name}.partial")
    begin(folder, about)
    lines = folder / "answers.jsonl"
    done, cut = _last(keep_whole_lines(lines)), 0
    jobs = [(entry, i) for entry in entries for i in range(n)]

    def answer(job: tuple[PromptEntry, int]) -> dict[str, Any] | None:
        entry, i = job
        assert entry.prompt is not None
        drawn = {**options, "seed": seed_of(seed, entry.line, i)}
        return _answered(model, entry.prompt.row, drawn, {"line": entry.line, "answer": i})

    with ThreadPoolExecutor(_TOGETHER) as pool, lines.open("a", encoding="utf-8") as file:
        waiting = [job for job in jobs if (job[0].line, job[1]) > done]
        n_done = len(jobs) - len(waiting)
        progress(n_done, len(jobs))
        for batch in _batches(iter(waiting)):
            for row in pool.map(answer, batch):
                n_done += 1
                if row is None:
                    cut += 1
                else:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                progress(n_done, len(jobs))
            file.flush()
    with lines.open("rb") as written:
        examples = sum(1 for _ in written)
    if not examples:
        raise UsageError(f"all {cut} answers had become too long", hint=f"a larger --max-tokens than {max_tokens}")
    lines.replace(output)
    shutil.rmtree(folder)
    return Written(examples=examples, cut=cut)


def _last(lines: bytes) -> tuple[int, int]:
    """The last answer that is there; all before it have been written, or left out."""
    if not lines:
        return 0, 0
    row = json.loads(lines.splitlines()[-1])
    return row["line"], row["answer"]


def _batches(jobs: Iterator[tuple[PromptEntry, int]]) -> Iterator[list[tuple[PromptEntry, int]]]:
    while batch := list(islice(jobs, _TOGETHER)):
        yield batch


def _answered(
    model: Model, row: Mapping[str, Any], options: Mapping[str, Any], place: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The row of an example; None where the answer had become too long."""
    question = asked(row)
    if isinstance(question, str):
        reply = _read(model.complete(question, **options))
        return None if _cut(reply) else {"prompt": question, "completion": reply.text, **place}
    messages, tools = question
    reply = _read(model.chat(messages, tools=tools or None, **options))
    if _cut(reply):
        return None
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.tool_calls
        ]
    made = {"prompt": messages, "completion": [message], **place}
    return {**made, "tools": tools} if tools else made


def _read(reply: Reply) -> Reply:
    for _ in reply.events():
        pass
    return reply


def _cut(reply: Reply) -> bool:
    return reply.finish is None or reply.finish.reason != "stop"
