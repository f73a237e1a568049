"""What a grammar costs: tokens per second of answers that are held to one, beside answers that are not.

    python benchmarks/grammar.py                                        the two small models, 1 and 8 streams
    python benchmarks/grammar.py smollm2-135m --streams 8 --only call text

Every stream reads 32 tokens of a text and answers greedily, without speculation: first held to the grammar, then as
many tokens without it, in turn, so that whatever else the machine does hits both. A stream's rate is that of its
answer, from first token to last, by the engine's own clock; the total is the median stream's times their number. Rates
and the ratio of the two are medians of the rounds; so is the ratio of the processor time that all threads took, which
says more where others keep the machine busy. Grammars are compiled before: how long that takes, and how long a mask
takes alone, is told beside it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from statistics import median
from time import perf_counter, process_time
from typing import Any

from dapji import load
from dapji.chat.formats import AnswerFormat
from dapji.chat.grammar import Grammar
from dapji.engine import Engine, Request, Sampling
from dapji.evaluation.machine import describe_machine
from dapji.model import Model
from streams import DEFAULT, PROMPT, prompts, total

ANSWER = 64
STREAMS = [1, 8]
TEXT = {"type": "string", "minLength": 400}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "born": {"type": "string", "format": "date"},
        "kind": {"enum": ["king", "queen", "fool", "citizen"]},
        "friends": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
    },
    "required": ["name", "age", "born", "kind", "friends"],
    "additionalProperties": False,
}
TOOLS = [
    {"name": "write", "parameters": {"type": "object", "properties": {"text": TEXT}, "required": ["text"]}},
    {"name": "add", "parameters": {"type": "object", "properties": {"person": PERSON}, "required": ["person"]}},
]
SCHEMAS: dict[str, Any] = {
    "string": {"type": "object", "properties": {"text": TEXT}, "required": ["text"], "additionalProperties": False},
    "records": {"type": "array", "items": PERSON, "minItems": 9},
    "enums": {"type": "array", "items": {"enum": [f"value-{i:04d}" for i in range(600)]}, "minItems": 30},
    "numbers": {"type": "array", "items": {"type": "number", "minimum": -5, "maximum": 5}, "minItems": 60},
    "object": {"type": "object", "additionalProperties": {"type": "array", "minItems": 40}, "required": ["a"]},
}


def grammars(model: Model) -> dict[str, Grammar]:
    """By name; none ends before ANSWER tokens."""
    made = {name: Grammar.json_schema(schema) for name, schema in SCHEMAS.items()}
    format, control = AnswerFormat.of("<tool_call>"), model.tokenizer.control
    rules = format.grammar(tools=TOOLS, control=control)
    assert rules is not None
    made["text"] = Grammar.answer(rules, None)  # which may go on without a call
    call = json.dumps('{"name": "write", "arguments": ')
    text = json.dumps({"type": "object", "properties": {"text": TEXT}, "required": ["text"]})
    made["call"] = Grammar.answer(f'start: "<tool_call>\\n" {call} r1 "}}\\n</tool_call>"\nr1: %json {text}', None)
    return made


def run(model: Model, n: int, grammar: Grammar | None, lengths: list[int]) -> tuple[float, float, list[int]]:
    """Tokens per second of n streams together, processor seconds of all, and the tokens of each."""
    requests = [
        Request(prompt=prompt, max_tokens=length, sampling=Sampling(temperature=0), ignore_eos=grammar is None)
        for prompt, length in zip(prompts(model, n), lengths, strict=True)
    ]
    if grammar is not None:
        requests = [replace(request, constraint=model.grammars.start(grammar)) for request in requests]
    begin = process_time()
    with Engine(
        model.executor, end_tokens=model.tokenizer.stop_ids, vocab_size=model.tokenizer.vocab_size, speculate=False
    ) as engine:
        ends = [list(stream)[-1].finish for stream in [engine.generate(request) for request in requests]]
    rates = [end.tokens_per_second or 0.0 for end in ends if end is not None]
    return total(rates), process_time() - begin, [end.usage.generated for end in ends if end is not None]


def mask_seconds(model: Model, grammar: Grammar) -> tuple[float, float]:
    """To compile the grammar, and for a mask: the median of a greedy answer's."""
    model.grammars.start(Grammar.regex("a")).allowed()  # so that the vocabulary is ready
    begin = perf_counter()
    constraint = model.grammars.start(grammar)
    constraint.allowed()
    compiled = perf_counter() - begin
    times = []
    with Engine(model.executor, vocab_size=model.tokenizer.vocab_size, speculate=False) as engine:
        request = Request(
            prompt=prompts(model, 1)[0],
            max_tokens=ANSWER,
            sampling=Sampling(temperature=0),
            constraint=model.grammars.start(grammar),
        )
        tokens = [output.token for output in engine.generate(request)]
    for token in tokens:
        begin = perf_counter()
        constraint.push(token)
        constraint.allowed()
        times.append(perf_counter() - begin)
    return compiled, median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--only", nargs="+", help="grammars")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(describe_machine())
    for name in arguments.models:
        with load(name, context=max(arguments.streams) * (PROMPT + ANSWER)) as model:
            model.engine.close()
            for key, grammar in grammars(model).items():
                if arguments.only and key not in arguments.only:
                    continue
                compiled, mask = mask_seconds(model, grammar)
                for n in arguments.streams:
                    *_, lengths = run(model, n, grammar, [ANSWER] * n)
                    pairs = [
                        (run(model, n, grammar, lengths), run(model, n, None, lengths)) for _ in range(arguments.rounds)
                    ]
                    held, free = (median(run[0] for run in column) for column in zip(*pairs, strict=True))
                    ratio = median(a[0] / b[0] for a, b in pairs)
                    work = median(a[1] / b[1] for a, b in pairs)
                    print(
                        f"{name:20} {n:2} streams  {key:8} {held:7.1f} of {free:7.1f} tokens/s: {ratio:6.1%}, "
                        f"processor time {work:6.1%}   "
                        f"({sum(lengths)} tokens, compiled in {compiled * 1e3:.0f} ms, a mask in {mask * 1e6:.0f} us)",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
