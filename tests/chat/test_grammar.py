"""Answers under a grammar: what tokens may come, on a vocabulary of single bytes, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dapji.chat.grammar import Grammar, Grammars
from dapji.errors import RequestError
from dapji.model import Model, load
from tiny import COUNTING, write_tiny

SCHEMA: dict[str, Any] = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "이름": {"type": "string", "maxLength": 5},
                "children": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/tree"}},
            },
            "required": ["이름", "children"],
            "additionalProperties": False,
        }
    },
    "allOf": [{"$ref": "#/$defs/tree"}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Under a high temperature it writes any bytes."""
    path: Path = write_tiny(tmp_path_factory.mktemp("model") / "model.gguf", COUNTING, endless=True)
    return load(path, context=1024)


def answers(model: Model, grammar: Grammar, n: int = 10) -> list[str]:
    found = []
    for seed in range(n):
        reply = model.chat([{"role": "user", "content": "x"}], grammar=grammar, temperature=100.0, seed=seed)
        text = "".join(reply)
        assert reply.finish is not None
        if reply.finish.reason == "stop":  # else the context was full
            found.append(text)
    assert len(found) > n // 2
    return found


def test_json_of_a_schema_with_recursion_and_korean_keys(model: Model) -> None:
    def check(tree: Any) -> None:
        assert tree.keys() == {"이름", "children"}
        assert len(tree["이름"]) <= 5
        assert len(tree["children"]) <= 1
        for child in tree["children"]:
            check(child)

    for text in answers(model, Grammar.json_schema(SCHEMA)):
        check(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "valid"),
    [
        ({"enum": ["하나", 2, None, {"a": [1]}]}, lambda v: v in ["하나", 2, None, {"a": [1]}]),
        ({"type": "integer", "minimum": -3, "maximum": 12}, lambda v: -3 <= v <= 12),
        ({"oneOf": [{"const": 1}, {"type": "boolean"}]}, lambda v: v is True or v is False or v == 1),
        ({"type": "string", "format": "date"}, lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v)),
        ({"type": "string", "pattern": "^[a-c]{2,3}$"}, lambda v: re.fullmatch("[a-c]{2,3}", v)),
        (
            {"type": "object", "patternProperties": {"^k[0-9]$": {"const": 1}}, "additionalProperties": False},
            lambda v: all(re.fullmatch("k[0-9]", key) and value == 1 for key, value in v.items()),
        ),
    ],
)
def test_hard_keywords(model: Model, schema: dict[str, Any], valid: Any) -> None:
    for text in answers(model, Grammar.json_schema(schema)):
        assert valid(json.loads(text)), text


def test_expressions_and_grammars(model: Model) -> None:
    for text in answers(model, Grammar.regex("(예|아니요)!{1,3}")):
        assert re.fullmatch("(예|아니요)!{1,3}", text)
    for text in answers(model, Grammar.lark('start: "a" b+\nb: "(" b? ")"'), 4):
        assert re.fullmatch(r"a[()]+", text)
        assert text.count("(") == text.count(")")
    for text in answers(model, Grammar.gbnf('root ::= "v" [0-9] ("." [0-9])?')):
        assert re.fullmatch(r"v\d(\.\d)?", text)


def test_stop_tokens_come_where_the_grammar_ends_and_not_before(model: Model) -> None:
    ends = sorted(model.tokenizer.stop_ids)
    constraint = Grammars(model.tokenizer).start(Grammar.regex("ab?"))
    (a,), (b,) = model.tokenizer.encode("a"), model.tokenizer.encode("b")
    assert constraint.allowed().tolist() == [a]
    constraint.push(a)
    assert set(constraint.allowed()) == {b, *ends}
    constraint.push(b)
    assert set(constraint.allowed()) == set(ends)


def test_a_grammar_changes_no_bits_of_what_it_allows(model: Model) -> None:
    """Text that it allows anyway is drawn as without it."""
    asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30}
    free = "".join(model.chat([{"role": "user", "content": "x"}], **asked))
    assert "".join(model.chat([{"role": "user", "content": "x"}], grammar=Grammar.regex("(?s:.*)"), **asked)) == free


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (Grammar.regex, "(", "unclosed group"),
        (Grammar.lark, "start: foo", 'unknown name: "foo"'),
        (Grammar.gbnf, "root ::= (", "GBNF"),
        (Grammar.json_schema, {"unevaluatedProperties": False}, "'unevaluatedProperties' at /unevaluatedProperties"),
        (Grammar.json_schema, {"items": {"format": "no-such"}}, "'format' 'no-such' at /items/format"),
        (Grammar.json_schema, {"type": "colour"}, "colour"),
    ],
)
def test_what_cannot_be_used_is_named(model: Model, make: Any, source: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.chat([{"role": "user", "content": "x"}], grammar=make(source))
