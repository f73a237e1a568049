"""Rows in the conventions that people have, and what is wrong with rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from byte_tokenizers import Tokenizers
from dapji.errors import DapjiError, FormatError
from dapji.training.data.conventions import CONVENTIONS, detect
from dapji.training.data.encoding import Encoder
from dapji.training.data.examples import Conversation, Example, Preference, Rated, Text

ASKED = {"role": "user", "content": "2 + 2?"}
SAID = {"role": "assistant", "content": "4."}
WRONG = {"role": "assistant", "content": "5."}
BRIEF = {"role": "system", "content": "Be brief."}
BARE_TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": BARE_TOOL}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}
WRITTEN_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": null}'}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}


def talk(*messages: Any, trained: set[int], tools: Any = ()) -> Conversation:
    return Conversation(messages=messages, trained=frozenset(trained), tools=tools)


PLAIN = talk(ASKED, SAID, trained={1})
PAIR = Preference(chosen=PLAIN, rejected=talk(ASKED, WRONG, trained={1}))
CASES: dict[str, tuple[str, dict[str, Any], Example]] = {
    "chat": ("chat", {"messages": [ASKED, SAID]}, PLAIN),
    "chat, several answers": (
        "chat",
        {"messages": [BRIEF, ASKED, SAID, ASKED, SAID], "parallel_tool_calls": False},
        talk(BRIEF, ASKED, SAID, ASKED, SAID, trained={2, 4}),
    ),
    "chat, weights": (
        "chat",
        {"messages": [ASKED, WRONG | {"weight": 0}, ASKED, SAID | {"weight": 1}]},
        talk(ASKED, WRONG, ASKED, SAID, trained={3}),
    ),
    "chat, tools": (
        "chat",
        {
            "messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": "1"} | WRITTEN_CALL]}, RESULT, SAID],
            "tools": [TOOL],
        },
        talk(ASKED, CALLS | {"tool_calls": [{"id": "1"} | CALL]}, RESULT, SAID, trained={1, 3}, tools=(TOOL,)),
    ),
    "chat, functions": (
        "chat",
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "function_call": WRITTEN_CALL["function"]},
                {"role": "function", "name": "add", "content": "4"},
            ],
            "functions": [BARE_TOOL],
        },
        talk(ASKED, CALLS, RESULT | {"name": "add"}, trained={1}, tools=(TOOL,)),
    ),
    "chat, parts and reasoning": (
        "chat",
        {"messages": [ASKED | {"content": [{"type": "text", "text": "?"}]}, SAID | {"reasoning_content": "Hm."}]},
        talk(ASKED | {"content": [{"type": "text", "text": "?"}]}, SAID | {"reasoning_content": "Hm."}, trained={1}),
    ),
    "chat in a cell": ("chat", {"messages": json.dumps([ASKED, SAID]), "tools": ""}, PLAIN),
    "OpenAI's preference": (
        "openai-preference",
        {
            "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [SAID],
            "non_preferred_output": [WRONG],
        },
        PAIR,
    ),
    "ShareGPT": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4."}],
            "system": "Be brief.",
        },
        talk(BRIEF, ASKED, SAID, trained={2}),
    ),
    "ShareGPT, tools": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": null}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4."},
            ],
            "tools": json.dumps([BARE_TOOL]),
        },
        talk(ASKED, CALLS, RESULT, SAID, trained={1, 3}, tools=(TOOL,)),
    ),
    "Alpaca": ("alpaca", {"instruction": "2 + 2?", "input": "", "output": "4."}, PLAIN),
    "Alpaca, all fields": (
        "alpaca",
        {
            "instruction": "Add.",
            "input": "2, 2",
            "output": "4.",
            "system": "Be brief.",
            "history": [["2 + 2?", "4."]],
        },
        talk(BRIEF, ASKED, SAID, {"role": "user", "content": "Add.\n\n2, 2"}, SAID, trained={2, 4}),
    ),
    "completion": ("completion", {"prompt": "2 + 2 =", "completion": " 4"}, Text(prompt="2 + 2 =", text=" 4")),
    "completion of messages": ("completion", {"prompt": [ASKED, SAID, ASKED], "completion": [SAID]},
                               talk(ASKED, SAID, ASKED, SAID, trained={3})),
    "preference of texts": (
        "preference",
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
        Preference(chosen=Text(prompt="2 + 2 =", text=" 4"), rejected=Text(prompt="2 + 2 =", text=" 5")),
    ),
    "preference of messages": ("preference", {"prompt": [ASKED], "chosen": [SAID], "rejected": [WRONG]}, PAIR),
    "preference without a prompt": ("preference", {"chosen": [ASKED, SAID], "rejected": [ASKED, WRONG]}, PAIR),
    "preference that repeats its prompt": (
        "preference", {"prompt": "2 + 2?", "chosen": [ASKED, SAID], "rejected": [ASKED, WRONG]}, PAIR
    ),
    "preference of LLaMA-Factory": (
        "preference",
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4."},
            "rejected": {"from": "gpt", "value": "5."},
        },
        PAIR,
    ),
    "preference of hh-rlhf": (
        "preference",
        {
            "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 5.\n\nHuman: 2 + 2?\n\nAssistant: 4.",
            "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5.\n\nHuman: 2 + 2?\n\nAssistant: 5.",
        },
        Preference(
            chosen=talk(ASKED, WRONG, ASKED, SAID, trained={3}), rejected=talk(ASKED, WRONG, ASKED, WRONG, trained={3})
        ),
    ),
    "rated text": (
        "rated",
        {"prompt": "2 + 2 =", "completion": " 4", "label": True},
        Rated(answer=Text(prompt="2 + 2 =", text=" 4"), good=True),
    ),
    "rated messages": ("rated", {"messages": [ASKED, WRONG], "label": False},
                       Rated(answer=talk(ASKED, WRONG, trained={1}), good=False)),
    "rated, of a table": ("rated", {"prompt": "2 + 2 =", "completion": " 4", "label": "FALSE"},
                          Rated(answer=Text(prompt="2 + 2 =", text=" 4"), good=False)),
    "text": ("text", {"text": "2 + 2 = 4", "label": "arithmetic"}, Text(text="2 + 2 = 4")),
    "nulls of Parquet": ("chat", {"messages": [ASKED | {"weight": None, "tool_calls": None}, SAID], "tools": None},
                         PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reads_every_convention(name: str) -> None:
    convention, row, expected = CASES[name]
    found = detect(row)
    assert found.name == convention
    assert found.example(row) == expected


def test_each_convention_has_a_case() -> None:
    assert {convention for convention, _, _ in CASES.values()} == set(CONVENTIONS)


WRONG_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"question": "2 + 2?", "answer": "4."}, "fields question, answer are of no known convention"),
    "ambiguous": ({"text": "a", "messages": []}, "may be 'chat' or 'text'"),
    "role": ({"messages": [{"role": "critic"}]}, r'messages\[0\].role is "critic", expected one of system'),
    "no role": ({"messages": [{"content": "a"}]}, r"messages\[0\].role is missing"),
    "not a list": ({"messages": "hello"}, 'messages is "hello", expected a list'),
    "not objects": ({"messages": ["hello"]}, r'messages\[0\] is "hello", expected an object'),
    "empty": ({"messages": []}, r"messages is \[\], expected at least one message"),
    "nothing learned": ({"messages": [ASKED]}, "no message of an assistant is learned"),
    "weight": ({"messages": [ASKED, SAID | {"weight": 0.5}]}, r"messages\[1\].weight is 0.5, expected 0 .* or 1"),
    "weight of a user": ({"messages": [ASKED | {"weight": 1}, SAID]}, r"messages\[0\].weight is 1, expected none"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, SAID]},
        r"content\[0\] is .* expected a text, or parts",
    ),
    "arguments": (
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        r'messages\[1\].tool_calls\[0\].function.arguments is "{", expected an object',
    ),
    "tool": ({"messages": [ASKED, SAID], "tools": [{"type": "function"}]}, r"tools\[0\] is .* expected a function"),
    "tools twice": ({"messages": [ASKED, SAID], "tools": [TOOL], "functions": [BARE_TOOL]}, "not both"),
    "speaker": ({"conversations": [{"from": "bard", "value": ""}]}, r'conversations\[0\].from is "bard"'),
    "call": ({"conversations": [{"from": "function_call", "value": "add"}]}, r'value is "add", expected the JSON'),
    "output": ({"instruction": "a", "output": 4}, "output is 4, expected a text"),
    "history": ({"instruction": "a", "output": "b", "history": [["a"]]}, r'history\[0\] is \["a"\]'),
    "empty completion": ({"prompt": "a", "completion": ""}, 'completion is "", expected a text that is not empty'),
    "empty text": ({"text": ""}, 'text is "", expected a text that is not empty'),
    "no prompt": ({"chosen": "a", "rejected": "b"}, 'chosen is "a", expected a field prompt beside it'),
    "same": ({"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, "expected a conversation that differs"),
    "other prompt": ({"prompt": "3 + 3?", "chosen": [ASKED, SAID], "rejected": [ASKED, WRONG]}, r'prompt is "3 \+ 3'),
    "label": ({"prompt": "a", "completion": "b", "label": "good"}, 'label is "good", expected true or false'),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_names_the_field_and_its_value(name: str) -> None:
    row, message = WRONG_ROWS[name]
    with pytest.raises(FormatError, match=message):
        detect(row).example(row)


def test_all_rows_are_in_one_convention() -> None:
    with pytest.raises(FormatError, match=r"prompt, completion are not those of 'chat': messages"):
        CONVENTIONS["chat"].example({"prompt": "a", "completion": "b"})


def test_tells_the_fields_that_it_does_not_read() -> None:
    row = {"instruction": "a", "input": None, "output": "b", "id": 3, "source": "x"}
    assert detect(row).unread(row) == ["id", "source"]


ODD: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, "", "x", "\ud800", "[", "[1]", '{"a": 1}', "[" * 10_000, [], [[]], [None], {},
    {"a": 1}, {"role": "assistant"}, {"from": 1}, [{"role": "user", "content": None}], {"type": "text", "text": 3},
    {"function": None}, [{"function": {"name": "f", "arguments": [1]}}],
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [path, *(place for key, item in inside for place in _places(item, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    if not path:
        return odd
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(value[path[0]], path[1:], odd)
    return copy


@pytest.mark.parametrize("name", CASES)
def test_no_row_fails_otherwise_than_by_saying_what_is_wrong(name: str, both: Tokenizers) -> None:
    """Every value of every row replaced by odd ones: the row is read, or refused in the project's own words."""
    convention, row, _ = CASES[name]
    encoder = Encoder(both.ours, max_length=5000)
    refused = 0
    for path in _places(row)[1:]:
        for odd in ODD:
            try:
                encoder.encode(CONVENTIONS[convention].example(_replaced(row, path, odd)))
            except DapjiError:
                refused += 1
    assert refused > len(ODD) // 2 * (len(_places(row)) - 1) // 2
