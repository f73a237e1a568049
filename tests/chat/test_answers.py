"""What published templates write for an answer, read again: they render what their models were trained to say."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from conversations import TOOLS, USER

from byte_tokenizers import Tokenizers
from dapji.chat import ChatTemplate
from dapji.chat.formats import AnswerFormat, Content, Event, Reasoning, ToolCall
from dapji.chat.formats.thinking import Thinking
from dapji.chat.grammar import Grammar, Grammars
from dapji.errors import TemplateError

CALLED = [("weather", {"city": '서울 "x" ]}\n</tool_call>'}), ("weather", {"city": "부산"})]
THOUGHT, SAID = "먼저 날씨를 보자.", "I look it up."
NOT_READ = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "GigaChat3-10B-A1.8B",
    "MiniMax-M3",
    "meetkai-functionary-medium-v3.2",
    "muse-glimmer",
    "tencent-Hy3",
    "upstage-Solar-Open-100B",
}
"""Their calls have formats of their own and stay text."""
NO_CALLS = {
    "HuggingFaceTB-SmolLM3-3B",
    "LFM2-8B-A1B",
    "LFM2.5-Instruct",
    "SmolLM2",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "google-gemma-2-2b-it",
    "ibm-granite-granite-3.3-2B-Instruct",
    "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
}
"""Templates that leave the calls of an answer out."""
REFUSES = {"Kimi-K2-Instruct", "Kimi-K2-Thinking", "fireworks-ai-llama-3-firefunction-v2", "llama-cpp-deepseek-r1"}
"""They take what no sandbox gives them, or another form of tools."""

WRITTEN_OTHERWISE = {
    "LFM2.5-8B-A1B": "Python's quotation marks where we write JSON's",
    "Reka-Edge": "escapes where we write letters",
    "google-gemma-4-31B-it": "held to no grammar",
    "google-gemma-4-31B-it-interleaved": "held to no grammar",
}
"""What the grammar does not allow and templates write."""


def answer(n_calls: int, *, as_text: bool, said: bool, thought: bool) -> dict[str, Any]:
    calls = [
        {
            "id": f"abcdefgh{i}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given, ensure_ascii=False) if as_text else given},
        }
        for i, (name, given) in enumerate(CALLED[:n_calls])
    ]
    message: dict[str, Any] = {"role": "assistant", "content": SAID if said else "", "tool_calls": calls}
    return message | (dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHT) if thought else {})


def answer_text(prompt: str, whole: str) -> tuple[str, str]:
    """The prompt, and what the template wrote after it.

    Some prompts go on otherwise than the answer, as with the marks of an empty reasoning: then from where they part,
    or from the beginning of a marker that both begin with.
    """
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    same = next(i for i, (a, b) in enumerate(itertools.zip_longest(prompt, whole)) if a != b)
    marker = re.search(r"<[^<>]*$", whole[:same])
    same = marker.start() if marker else same
    return (prompt if prompt[same:].strip() and not prompt[same:].startswith("<") else whole[:same]), whole[same:]


def stands_in(text: str, value: str) -> bool:
    """Whether the template wrote the value, as it is or in JSON; some write the first call alone, some none."""
    return any(form in text for form in (value, *(json.dumps(value, ensure_ascii=a)[1:-1] for a in (False, True))))


def read(format: AnswerFormat, both: Tokenizers, prompt: str, text: str) -> list[Event]:
    """As `Model.chat` feeds it: control tokens as such, and only those that the format wants."""
    parser = format.parser(prompt, tools=TOOLS, control=both.ours.control)
    spellings = {token: spelling for spelling, token in both.ours.control.items()}
    events = []
    for part in both.ours.split_control(text):
        if isinstance(part, str):
            events += parser.feed(part)
        elif parser.wants(spellings[part]):
            events += parser.feed(spellings[part], control=True)
    return events + parser.finish()


def is_written(format: AnswerFormat, grammars: Grammars, both: Tokenizers, prompt: str, text: str) -> bool:
    """Whether the grammar that holds answers to their tools' schemas lets a model write this."""
    rules = format.grammar(prompt, tools=TOOLS, control=both.ours.control)
    assert rules is not None
    constraint = grammars.start(Grammar.answer(rules, None))
    for token in both.ours.encode_parts(both.ours.split_control(text)):
        if token in both.ours.stop_ids or token not in constraint.allowed():
            break
        constraint.push(token)
    return min(both.ours.stop_ids) in constraint.allowed()


def test_reads_what_published_templates_write(
    templates: dict[str, str], compiled: dict[str, ChatTemplate], both: Tokenizers
) -> None:
    grammars = Grammars(both.ours)
    read_calls, refused = set(), set(templates)
    for name, template in compiled.items():
        for as_text, n_calls, said, thought in itertools.product((False, True), (1, 2), *[(False, True)] * 2):
            if as_text and name in read_calls:
                break  # this template wants mappings
            message = answer(n_calls, as_text=as_text, said=said, thought=thought)
            try:
                prompt = template.render([USER], tools=TOOLS)
                whole = template.render([USER, message], tools=TOOLS, add_generation_prompt=False)
            except TemplateError:
                continue
            refused.discard(name)
            prompt, text = answer_text(prompt, whole)
            expected = [call for call in CALLED[:n_calls] if stands_in(text, call[1]["city"])]
            if not expected:
                continue
            format = AnswerFormat.of(templates[name])
            thinking = format.reasoning
            if isinstance(thinking, Thinking) and thinking.closer not in text:
                prompt = ""  # a model would close the reasoning that its prompt opens
            elif isinstance(thinking, Thinking) and text.startswith(thinking.closer):
                prompt = thinking.opener  # the template leaves out an empty reasoning's beginning
            events = read(format, both, prompt, text)
            calls = [event for event in events if isinstance(event, ToolCall)]
            if name in NOT_READ:
                assert calls == []
                continue
            told = name, text, events
            assert [(call.name, json.loads(call.arguments)) for call in calls] == expected, told
            assert not any(isinstance(event, Content) and event.malformed for event in events), told
            first_call = next(i for i, event in enumerate(events) if isinstance(event, ToolCall))
            content = "".join(event.text for event in events[:first_call] if isinstance(event, Content))
            assert content.strip()[: len(SAID)] in (SAID, ""), told
            reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
            if THOUGHT in text:
                assert reasoning == THOUGHT, told
            read_calls.add(name)
            if name not in WRITTEN_OTHERWISE:
                assert is_written(format, grammars, both, prompt, text), told
    assert refused == REFUSES
    assert read_calls == set(templates) - NOT_READ - NO_CALLS - REFUSES
