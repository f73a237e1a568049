"""Formats of answers: the examples of every format, whole and in any cut; and text that only looks like them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapji.chat.formats import AnswerFormat, Content, Event, Parser, Reasoning, ToolCall
from dapji.chat.formats.choose import CALLS, THINKING

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "where": {"anyOf": [{"type": "object"}, {"type": "null"}]},
                    "words": {"type": ["array", "null"]},
                    "ratio": {"type": "number"},
                    "anything": {},
                },
            },
        },
    },
    {"name": "now"},
    {"name": "odd", "parameters": {"properties": None}},
    {"name": "more", "parameters": {"properties": {"x": {"type": [[], "no"], "anyOf": 3}}}},
]
CITY = '{"city": "서울 👍🏽", "days": 2}'


@dataclass(frozen=True)
class Answer:
    """What an answer should be read as. Neighbouring texts of a kind are one."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    malformed: str = ""


def answer_of(events: list[Event]) -> Answer:
    calls = [event for event in events if isinstance(event, ToolCall)]
    contents = [event for event in events if isinstance(event, Content)]
    return Answer(
        content="".join(event.text for event in contents if not event.malformed),
        reasoning="".join(event.text for event in events if isinstance(event, Reasoning)),
        calls=[(call.name, call.arguments) for call in calls],
        ids=[call.id for call in calls if call.id is not None],
        malformed="".join(event.text for event in contents if event.malformed),
    )


def merged(events: list[Event]) -> list[Event]:
    """Neighbouring events of a kind that only differ in where a stream was cut, as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if last is not None and not isinstance(event, ToolCall) and replace(last, text="") == replace(event, text=""):
            found[-1] = replace(last, text=last.text + event.text)
        else:
            found.append(event)
    return found


def read(parser: Parser, *pieces: str) -> list[Event]:
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def calls(marker: str) -> AnswerFormat:
    """The format of a template with this text."""
    found = AnswerFormat.of(marker)
    assert found.calls is not None
    return found


JSON = calls("<tool_call>")
LISTED = calls("<TOOLCALL>")
LLAMA = calls('{"name": f, "parameters": {}} ipython')
PYTHON = calls("<|python_start|>")
LFM = calls("<|tool_call_start|>")
XML = calls("<tool_call><function=")
MINIMAX = calls('<minimax:tool_call><invoke name="')
DSML = calls("｜DSML｜function_calls")
GLM = calls("<tool_call><arg_key>")
DEEPSEEK = calls("<｜tool▁calls▁begin｜>")
KIMI = calls("<|tool_calls_section_begin|>")
MISTRAL = calls("[TOOL_CALLS]")
APERTUS = calls("<|tools_prefix|>")
GEMMA = calls("<|tool_call>call:")
K3 = AnswerFormat.of("<|open|><|sep|><|close|>")
HARMONY = AnswerFormat.of("<|channel|><|message|>")
THINK = AnswerFormat.of("<think></think>")
BOTH = AnswerFormat.of("<think></think><tool_call>")
NONE = AnswerFormat.of("")

NESTED = r'{"city": "a \"</tool_call>\" {[ \\", "where": {"x": [1, {"y": null}]}}'
EXAMPLES: list[tuple[AnswerFormat, str, Answer]] = [
    (NONE, " as it is \n", Answer(" as it is \n")),
    # Reasoning
    (THINK, "<think>\nHm, 음.\n</think>\n\nYes. ", Answer("Yes. ", "Hm, 음.")),
    (THINK, " \n no thought", Answer(" \n no thought")),
    (THINK, "<think></think>Yes.", Answer("Yes.")),
    (THINK, "<think>\n\n</think>\n\nYes.", Answer("Yes.")),
    (THINK, "<think>cut off \n", Answer("", "cut off \n")),
    (THINK, "<think>a < b </thin </think>c</think>", Answer("c</think>", "a < b </thin")),
    (THINK, "I write <think> myself", Answer("I write <think> myself")),
    (AnswerFormat.of("[THINK][/THINK]"), "[THINK]a[/THINK]b", Answer("b", "a")),
    (
        BOTH,
        '<think>a<tool_call></think>b\n<tool_call>{"name": "now"}</tool_call>',
        Answer("b", "a<tool_call>", [("now", "{}")]),
    ),
    # JSON between markers
    (JSON, f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>', Answer(calls=[("weather", CITY)])),
    (
        JSON,
        f'I look.\n\n<tool_call>{{"arguments":{NESTED} , "name":"weather"}}</tool_call>\n'
        '<tool_call> { "name" : "now" } </tool_call> So.',
        Answer("I look. So.", calls=[("weather", NESTED), ("now", "{}")]),
    ),
    (
        JSON,
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"</tool_call>\\"}"}',
        Answer(calls=[("now", '{"a": "</tool_call>"}')]),
    ),
    (JSON, '<tool_call>{"name": "now", "arguments": "text"}</tool_call>', Answer(calls=[("now", '"text"')])),
    (JSON, '<tool_call>{"name": "now", "arg', Answer(malformed='<tool_call>{"name": "now", "arg')),
    (JSON, "a <tool_call> marks", Answer("amarks", malformed=" <tool_call> ")),
    (JSON, '<tool_call>{"name": 1}</tool_call>', Answer("</tool_call>", malformed='<tool_call>{"name": 1}')),
    (JSON, '<tool_call>{"name": "x",}</tool_call>', Answer("</tool_call>", malformed='<tool_call>{"name": "x",}')),
    (JSON, "<tool_call>" + "[" * 9999, Answer("[" * (9999 - 66), malformed="<tool_call>" + "[" * 66)),
    (JSON, '{"name": "now", "arguments": {}}\n', Answer(calls=[("now", "{}")])),
    (JSON, '\n```json\n{"name": "now", "arguments": {}}\n```\nSo.', Answer("\nSo.", calls=[("now", "{}")])),
    (
        JSON,
        '{"name": "now", "arguments": {}}\n{"name": "weather", "arguments": {}}',
        Answer(calls=[("now", "{}"), ("weather", "{}")]),
    ),
    (JSON, '{"name": "Kim", "arguments": {}}', Answer('{"name": "Kim", "arguments": {}}')),
    (
        JSON,
        '```json\n{"name": "now", "arguments": {}}, ...```',
        Answer('```json\n{"name": "now", "arguments": {}}, ...```'),
    ),
    (JSON, '```\n{"a": 1}```', Answer('```\n{"a": 1}```')),
    (JSON, "```json\n```", Answer("```json\n```")),
    (JSON, "<tool_call>{'name': 'now'}</tool_call>", Answer("</tool_call>", malformed="<tool_call>{'name': 'now'}")),
    (JSON, r'<tool_call>{"name": "\ud800"}', Answer(malformed=r'<tool_call>{"name": "\ud800"}')),
    (JSON, '<tool_call>{"name": %s}' % ("9" * 5000), Answer(malformed='<tool_call>{"name": %s}' % ("9" * 5000))),
    (JSON, "a <tool_cal", Answer("a <tool_cal")),
    (JSON, "1 < 2 <  tool", Answer("1 < 2 <  tool")),
    (
        LISTED,
        '<TOOLCALL>[{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]</TOOLCALL>!',
        Answer("!", calls=[("a", '{"x": 1}'), ("b", "{}")]),
    ),
    (LISTED, '<TOOLCALL>[{"name": "a"}, b]', Answer("b]", calls=[("a", "{}")], malformed=" ")),
    (
        APERTUS,
        '<|tools_prefix|>[{"a": {"x": 1}}, {"b": {}}]<|tools_suffix|>',
        Answer(calls=[("a", '{"x": 1}'), ("b", "{}")]),
    ),
    # Llama
    (LLAMA, f'{{"name": "weather", "parameters": {CITY}}}', Answer(calls=[("weather", CITY)])),
    (
        LLAMA,
        f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {CITY}}}',
        Answer(calls=[("weather", CITY)]),
    ),
    (
        LLAMA,
        '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {"a": "};"}}\n',
        Answer(calls=[("now", "{}"), ("now", '{"a": "};"}')]),
    ),
    (LLAMA, '<|python_tag|>search.call(query="수도, 서울")', Answer(calls=[("search", '{"query": "수도, 서울"}')])),
    (LLAMA, "<|python_tag|>print(1)", Answer(malformed="<|python_tag|>print(1)")),
    (LLAMA, ' {"answer": 42}', Answer(' {"answer": 42}')),
    (LLAMA, '{"name": "Kim", "parameters": {}}', Answer(malformed='{"name": "Kim", "parameters": {}}')),
    (LLAMA, '{"name": "Kim"} is JSON', Answer(" is JSON", malformed='{"name": "Kim"}')),
    (LLAMA, 'So: {"name": "now", "parameters": {}}', Answer('So: {"name": "now", "parameters": {}}')),
    # Python
    (PYTHON, '[weather(city="서울 👍🏽", days=2), now()]', Answer(calls=[("weather", CITY), ("now", "{}")])),
    (
        PYTHON,
        "<|python_start|>[a.b(x=None, y=[1, -2.5, ('t',)], z={'k': True, \"q\": 'it\\'s ])'})]<|python_end|> ok",
        Answer(" ok", calls=[("a.b", '{"x": null, "y": [1, -2.5, ["t"]], "z": {"k": true, "q": "it\'s ])"}}')]),
    ),
    (
        PYTHON,
        '[f(a=true, b=null, c="""x"y""", d=r"\\d", e="")]',
        Answer(calls=[("f", json.dumps({"a": True, "b": None, "c": 'x"y', "d": r"\d", "e": ""}))]),
    ),
    (PYTHON, '[f(a="\\d\\n")]', Answer(calls=[("f", r'{"a": "\\d\n"}')])),
    (PYTHON, "[f(a='x\n\"\\\ny')]", Answer(calls=[("f", r'{"a": "x\n\"y"}')])),
    (PYTHON, r"[f(a='\ud800')]", Answer(calls=[("f", r'{"a": "\ud800"}')])),
    (PYTHON, "[1, 2] is a list", Answer("[1, 2] is a list")),
    (PYTHON, "[link](http://x)", Answer("[link](http://x)")),
    *[
        (PYTHON, text, Answer(malformed=text))
        for text in (
            "[f(a=open('x'))]",
            "[f(1)]",
            "[f(**{})]",
            "[f(a=1j)]",
            "[f(a=1e999)]",
            "[f(a={1: 2})]",
            "[f(a=b'x')]",
            "[f(a=1+1)]",
            "[f(a=f'{x}')]",
            "[f(a=1), 2]",
            "[f(a=",
        )
    ],
    (LLAMA, "[now()]\n", Answer(calls=[("now", "{}")])),
    (PYTHON, '<|python_start|><|python_end|>{"name": "now", "parameters": {}}', Answer(calls=[("now", "{}")])),
    (
        PYTHON,
        '<|python_start|>{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}<|python_end|> ok',
        Answer(" ok", calls=[("now", "{}")] * 2),
    ),
    (PYTHON, "<|python_start|>search.call(q=1)<|python_end|>", Answer(calls=[("search", '{"q": 1}')])),
    (
        PYTHON,
        "<|python_start|>print(1)<|python_end|>.",
        Answer(".", malformed="<|python_start|>print(1)<|python_end|>"),
    ),
    (LFM, "Hm. <|tool_call_start|>[now()]<|tool_call_end|>", Answer("Hm.", calls=[("now", "{}")])),
    # Elements
    (
        XML,
        "I look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\n\n두 줄\n</parameter> x\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n"
        '<parameter=exact>True</parameter><parameter=where>\n{"x": "</function>"}\n</parameter>'
        "<parameter=anything>\n3\n</parameter>"
        "<parameter=words>None</parameter><parameter=ratio>zwei</parameter></function>\n</tool_call>",
        Answer(
            "I look.",
            calls=[
                (
                    "weather",
                    '{"city": "\\n두 줄\\n</parameter> x", "days": 2, "exact": true, "where": {"x": "</function>"}, '
                    '"anything": "3", "words": null, "ratio": "zwei"}',
                )
            ],
        ),
    ),
    (
        XML,
        "<tool_call><function=now></function></tool_call><tool_call><function=now></function>",
        Answer(calls=[("now", "{}")] * 2),
    ),
    (
        XML,
        "<tool_call><function=now></function>\n<function=f><parameter=a>1</parameter></function></tool_call>",
        Answer(calls=[("now", "{}"), ("f", '{"a": "1"}')]),
    ),
    (XML, "<function=now>\n</function>", Answer(calls=[("now", "{}")])),
    (XML, '<function=f>{"a": "</function>"}</function>', Answer(calls=[("f", '{"a": "</function>"}')])),
    (
        XML,
        "<tool_call>\n<function=now>\n<parameter=a>b",
        Answer(malformed="<tool_call>\n<function=now>\n<parameter=a>b"),
    ),
    (XML, "<function=odd><parameter=x>1</parameter></function>", Answer(calls=[("odd", '{"x": "1"}')])),
    (XML, "<function=more><parameter=x>1</parameter></function>", Answer(calls=[("more", '{"x": "1"}')])),
    (XML, "<function=> x", Answer("> x", malformed="<function=")),
    (
        MINIMAX,
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">서울</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        Answer(calls=[("weather", '{"city": "서울"}'), ("now", "{}")]),
    ),
    (
        DSML,
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="a" string="true">1</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="false">[1]</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        Answer(calls=[("f", '{"a": "1", "b": [1]}')]),
    ),
    (
        GLM,
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>서울</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call><tool_call>now</tool_call>",
        Answer(calls=[("weather", '{"city": "서울", "days": 2}'), ("now", "{}")]),
    ),
    # DeepSeek
    (
        DEEPSEEK,
        "음.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        + CITY
        + "\n```<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        Answer("음.", calls=[("weather", CITY), ("now", "{}")]),
    ),
    (
        DEEPSEEK,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        + NESTED
        + "<｜tool▁call▁end｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        Answer(calls=[("weather", NESTED), ("function", "{}")]),
    ),
    # Kimi
    (
        KIMI,
        "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        + CITY
        + "<|tool_call_end|><|tool_call_begin|> functions.a.b:1 "
        "<|tool_call_argument_begin|> {} <|tool_call_end|><|tool_calls_section_end|>",
        Answer("I look.", calls=[("weather", CITY), ("a.b", "{}")], ids=["functions.weather:0", "functions.a.b:1"]),
    ),
    (
        K3,
        "<|open|>think<|sep|>음.<|close|>think<|sep|><|open|>response<|sep|> I look.<|close|>response<|sep|>"
        "<|open|>tools<|sep|>"
        '<|open|>call tool="weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>"서울"\n'
        '<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>2<|close|>argument<|sep|>'
        '<|close|>call<|sep|><|open|>call tool="now" index="2"<|sep|><|open|>json type="object"<|sep|>{"a":1}'
        "<|close|>json<|sep|><|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>",
        Answer(" I look.", "음.", calls=[("weather", '{"city": "\\"서울\\"\\n", "days": 2}'), ("now", '{"a":1}')]),
    ),
    (K3, "<|open|>tools<|sep|>x", Answer("x", malformed="<|open|>tools<|sep|>")),
    (
        GEMMA,
        'Hm.<|tool_call>call:weather{city:<|"|>서울 "}<|"|>,days:-2.5,where:{<|"|>k:<|"|>: [ true,None,[] ], e:{}}}'
        "<tool_call|>",
        Answer(
            "Hm.",
            calls=[("weather", '{"city": "서울 \\"}", "days": -2.5, "where": {"k:": [true, null, []], "e": {}}}')],
        ),
    ),
    (GEMMA, "<|tool_call>call:now{}<tool_call|><|tool_call>call:now{}", Answer(calls=[("now", "{}")] * 2)),
    (GEMMA, "<|tool_call>call:now{a:b}", Answer("}", malformed="<|tool_call>call:now{a:b")),
    # Mistral
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "weather", "arguments": ' + CITY + ', "id": "abc"}]',
        Answer(calls=[("weather", CITY)], ids=["abc"]),
    ),
    (
        MISTRAL,
        "So.[TOOL_CALLS]weather[CALL_ID]x1[ARGS]" + CITY + "[TOOL_CALLS]now[ARGS]{}",
        Answer("So.", calls=[("weather", CITY), ("now", "{}")], ids=["x1"]),
    ),
    (MISTRAL, "[TOOL_CALLS]now[ARGS]", Answer(malformed="[TOOL_CALLS]now[ARGS]")),
    # Harmony
    (
        HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + CITY,
        Answer("I look.", "Hm.", calls=[("weather", CITY)]),
    ),
    (HARMONY, " to=functions.now<|channel|>commentary json<|message|>{}<|call|>", Answer(calls=[("now", "{}")])),
    (HARMONY, "<|channel|>final<|message|>네.", Answer("네.")),
    (HARMONY, " plain < text ", Answer(" plain < text ")),
]
TEXTS = [text for _, text, _ in EXAMPLES]


@pytest.mark.parametrize(("format", "text", "expected"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_reads_every_format_in_any_cut(format: AnswerFormat, text: str, expected: Answer) -> None:
    """Whole and by single characters here, at random places below."""
    whole = read(format.parser(tools=TOOLS), text)
    assert answer_of(whole) == expected
    assert "".join(event.text for event in whole) == text
    assert merged(read(format.parser(tools=TOOLS), *text)) == merged(whole)
    for call in expected.calls:
        json.loads(call[1])


FORMATS = [NONE, THINK, HARMONY, K3, *(AnswerFormat(reasoning=THINKING[0], calls=calls) for _, calls in CALLS if calls)]
_OTHERS = [
    '{"name": "now", "arguments": {}}',
    "{'a'",
    "[f(a='",
    '"""',
    "functions.f:0",
    "```json",
    "call:",
    "to=",
    'x="y"',
]


def markers(format: AnswerFormat) -> list[str]:
    return [marker for grammar in (format.reasoning, format.calls) if grammar for marker in grammar.markers]


@given(format=st.sampled_from(FORMATS), data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_text_in_any_cut_is_read_alike_and_loses_nothing(format: AnswerFormat, data: Any) -> None:
    """Out of the format's own markers, whole answers, and what they are made of. Some markers are control tokens."""
    own = st.sampled_from(markers(format) or [" "])
    others = st.sampled_from([*TEXTS, *_OTHERS]) | st.sampled_from("{}[]()\"'\\:,;=</>x1 \n답") | st.text(max_size=3)
    pieces = data.draw(st.lists(own | others, max_size=12))
    control = data.draw(st.sets(own))

    def events(cut: Callable[[str], list[str]]) -> list[Event]:
        parser = format.parser(tools=TOOLS, control=control)
        found = []
        for piece in pieces:
            if parser.wants(piece):
                found += parser.feed(piece, control=True)
            else:
                found += [event for part in cut(piece) for event in parser.feed(part)]
        return found + parser.finish()

    def cut_anywhere(piece: str) -> list[str]:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(piece)), max_size=3)))
        return [piece[a:b] for a, b in zip([0, *cuts], [*cuts, len(piece)], strict=True)]

    whole = events(lambda piece: [piece])
    assert "".join(event.text for event in whole) == "".join(pieces)
    assert merged(events(list)) == merged(whole)
    assert merged(events(cut_anywhere)) == merged(whole)


@given(
    values=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_arguments_are_what_the_model_wrote(values: Any) -> None:
    """Python's own `repr` and `json.dumps` as the writers."""
    (call,) = answer_of(read(PYTHON.parser(tools=TOOLS), f"[f(a={values!r})]")).calls
    assert json.loads(call[1]) == {"a": values}
    for ascii_only in (False, True):
        written = json.dumps({"a": values}, ensure_ascii=ascii_only)
        (call,) = answer_of(
            read(JSON.parser(tools=TOOLS), f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>')
        ).calls
        assert call[1] == written


def passed_on(format: AnswerFormat, text: str) -> list[str]:
    """What of the text has been passed on after each character."""
    parser = format.parser(tools=TOOLS)
    return ["".join(event.text for event in parser.feed(char)) for char in text]


def test_text_is_held_back_only_while_it_may_be_a_marker() -> None:
    assert passed_on(JSON, "a <b <tool_x y") == ["a", "", "", " <b", "", "", "", "", "", "", "", " <tool_x", "", " y"]
    assert passed_on(LLAMA, '{"answer') == ["", "", "", '{"an', "s", "w", "e", "r"]
    assert passed_on(THINK, "<think>ab c") == ["", "", "", "", "", "", "", "<think>a", "b", "", " c"]
    assert passed_on(NONE, "a <tool_call> ") == list("a <tool_call> ")
    assert passed_on(PYTHON, "[1, 2") == ["", "", "[1,", "", " 2"]


def test_a_call_is_told_when_it_is_complete() -> None:
    events = passed_on(
        KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    )
    assert all(text == "" for text in events[:-1])
    assert events[-1]


def test_the_answer_may_begin_inside_the_reasoning() -> None:
    for prompt in ("<|im_start|>assistant\n<think>\n", "x<think>"):
        assert answer_of(read(THINK.parser(prompt), "\nHm.\n</think>\n\nYes.")) == Answer("Yes.", "Hm.")
    assert answer_of(read(THINK.parser("<think>"), "<think>\nHm.</think>Yes.")) == Answer("Yes.", "Hm.")
    for prompt in ("<think>\n\n</think>\n\n", "tell me of <think> please", ""):
        assert answer_of(read(THINK.parser(prompt), "Hm.\n</think>\n\nYes.")) == Answer("Hm.\n</think>\n\nYes.")


def test_calls_are_looked_for_where_there_are_tools() -> None:
    text = '<tool_call>{"name": "now"}</tool_call>'
    assert answer_of(read(JSON.parser(), text)) == Answer(text)


def test_a_marker_that_is_a_control_token_counts_only_as_one() -> None:
    """And one that is none counts as letters."""
    control = ["<|python_tag|>", "<|eot_id|>", "<tool_call>"]
    parser = LLAMA.parser(tools=TOOLS, control=control)
    assert [spelling for spelling in control if parser.wants(spelling)] == ["<|python_tag|>"]
    call = '{"name": "now", "parameters": {}}'
    events = parser.feed("a <|python_tag|>" + call) + parser.feed("<|python_tag|>", control=True) + parser.feed(call)
    assert answer_of(events + parser.finish()) == Answer("a <|python_tag|>" + call, calls=[("now", "{}")])
    parser = JSON.parser(tools=TOOLS, control=control)
    events = parser.feed("<tool_call>", control=True) + parser.feed('{"name": "now"}\n</tool_call>')
    assert events == [ToolCall(text='<tool_call>{"name": "now"}\n</tool_call>', name="now", arguments="{}")]


def test_a_control_token_inside_a_longer_marker() -> None:
    text = '<｜DSML｜function_calls><｜DSML｜invoke name="now"></｜DSML｜invoke></｜DSML｜function_calls>'
    parser = DSML.parser(tools=TOOLS, control=["｜DSML｜"])
    assert answer_of(read(parser, text)) == Answer(text)  # typed letters
    parser = DSML.parser(tools=TOOLS, control=["｜DSML｜"])
    pieces = text.replace("｜DSML｜", "\0｜DSML｜\0").split("\0")
    events = [event for piece in pieces for event in parser.feed(piece, control=piece == "｜DSML｜")]
    assert answer_of(events + parser.finish()) == Answer(calls=[("now", "{}")])
    assert "".join(event.text for event in events) == text


def test_long_arguments_take_no_quadratic_time() -> None:
    """A file of 200,000 characters by three characters: seconds if every piece looked at all of it again."""
    written = json.dumps({"text": "ab\n" * 50_000})
    text = f'<tool_call>{{"name": "write", "arguments": {written}}}</tool_call>'
    (call,) = answer_of(read(JSON.parser(tools=TOOLS), *(text[i : i + 3] for i in range(0, len(text), 3)))).calls
    assert call == ("write", written)
