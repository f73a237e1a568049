"""What a model has to answer, by every published template: what transformers renders, and read again as the message.

Each template gets a tokenizer with its own control tokens and with the end tokens that its model has.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from conversations import ARGUMENTS, ASSISTANT, KOREAN, SYSTEM, TOOLS, USER, call, calls, result

from byte_tokenizers import ENDS, Tokenizers, control_tokens, make_tokenizers
from dapji.chat import ChatTemplate
from dapji.chat.formats import AnswerFormat, Content, Event, Reasoning
from dapji.chat.formats.thinking import Thinking
from dapji.chat.turn import Turn, Turns
from dapji.errors import TemplateError

THOUGHT = "먼저 \n생각."
REASONED = {"role": "assistant", "content": "답.", "reasoning_content": THOUGHT}
BYE = {"role": "user", "content": "Bye."}
CALLED = calls(call(1, ARGUMENTS), content="")
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER, ASSISTANT],
    "system": [SYSTEM, USER, ASSISTANT],
    "turns": [KOREAN, ASSISTANT, BYE, {"role": "assistant", "content": "So long."}],
    "reasoning": [USER, REASONED],
    "after reasoning": [USER, REASONED, BYE, ASSISTANT],
    "call": [USER, CALLED],
    "after a call": [USER, CALLED, result(1, "맑음"), ASSISTANT],
}
"""The last message is the answer."""


NEEDS = {
    "CohereForAI-c4ai-command-r-plus-tool_use": "is not iterable",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "is not iterable",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "is not iterable",
    "fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "the answer goes on after '<|END_OF_TURN_TOKEN|>'",
}
"""Templates that are made for conversations with tools alone, or answer in a way of their own."""
NO_TOOLS = {
    "HuggingFaceTB-SmolLM3-3B",
    "SmolLM2",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.1",
    "google-gemma-2-2b-it",
    "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
}
_OTHERWISE = "the answer goes on otherwise"
_CALLS = {
    "CohereForAI-c4ai-command-r-plus-tool_use": _OTHERWISE,
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "the answer goes on after '<|END_OF_TURN_TOKEN|>'",
    "Kimi-K2-Instruct": "'append' of 'list' object is unsafe",
    "Kimi-K2-Thinking": "'append' of 'list' object is unsafe",
    "fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined",
    "llama-cpp-deepseek-r1": "generator is not JSON serializable",
    "meetkai-functionary-medium-v3.2": "can only concatenate str",
    **dict.fromkeys(NO_TOOLS, "no place for tools"),
}
REFUSED: dict[str, dict[str, str]] = {
    "plain": NEEDS,
    "system": NEEDS | {"google-gemma-2-2b-it": "System role not supported"},
    "turns": NEEDS,
    "reasoning": NEEDS
    | {
        "Apriel-1.6-15b-Thinker-fixed": _OTHERWISE,
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use": _OTHERWISE,
        "google-gemma-4-31B-it": _OTHERWISE,
        "google-gemma-4-31B-it-interleaved": _OTHERWISE,
        "muse-glimmer": "the answer goes on after '<|eom|>'",
        "tencent-Hy3": _OTHERWISE,
    },
    "after reasoning": NEEDS,
    "call": _CALLS
    | {
        "Apertus-8B-Instruct": "ends an answer with '<|tools_suffix|>'",
        "GigaChat3-10B-A1.8B": "the answer goes on after '<|message_sep|>'",
    },
    "after a call": _CALLS
    | {
        "Apertus-8B-Instruct": _OTHERWISE,
        "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": _OTHERWISE,
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": _OTHERWISE,
    },
}
"""Which templates have no such answer, and why; beside those that leave reasoning or calls out of every answer."""
NEED_SWITCH = {
    "Qwen-QwQ-32B",
    "Reka-Edge",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.2",
    "deepseek-ai-DeepSeek-V4",
    "deepseek-ai-DeepSeek-V4-Flash-0731",
    "llama-cpp-rwkv-world",
    "poolside-Laguna-XS-2.1",
    "poolside-Laguna-XS.2",
}
"""They reason only where they are told to."""
OPENED = {
    "Apriel-1.6-15b-Thinker-fixed",
    "Cohere2MoE",
    "GLM-4.7-Flash",
    "MiniMax-M2",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "NVIDIA-Nemotron-Nano-v2",
    "Qwen-QwQ-32B",
    "Spark2.5",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.2",
    "google-gemma-4-31B-it",
    "google-gemma-4-31B-it-interleaved",
    "llama-cpp-deepseek-r1",
}
"""Their prompts begin reasoning, or close it, and their answers without reasoning do not go on from there."""


def events(template: ChatTemplate, prompt: str, tools: Any, answer: list[int]) -> list[Event]:
    """As `Model.chat` reads an answer."""
    parser, _ = template.answer(prompt, tools=tools)
    spellings = {token: spelling for spelling, token in template.tokenizer.control.items()}
    found, text = [], bytearray()
    for token in answer:
        if token not in spellings:
            text += template.tokenizer.token_bytes(token)
            continue
        found += parser.feed(text.decode())
        text.clear()
        if parser.wants(spellings[token]):
            found += parser.feed(spellings[token], control=True)
    return found + parser.feed(text.decode()) + parser.finish()


def said(found: list[Event], kind: type[Content] | type[Reasoning]) -> str:
    return "".join(event.text for event in found if isinstance(event, kind)).strip()


def test_answers_of_every_published_template(templates: dict[str, str], tmp_path: Path) -> None:
    """The prompt is the one that the model gets; the answer is what transformers renders after it, through one end
    token; where it is composed, or a switch is needed, it is read as the message."""
    refused: dict[str, dict[str, str]] = defaultdict(dict)
    composed: dict[str, set[str]] = defaultdict(set)
    switched, ended, ended_by_next = set(), set(), set()
    for name, source in templates.items():
        ends = ENDS.get(name, [])
        both = make_tokenizers(control_tokens(source), tmp_path / name, ends)
        template = ChatTemplate(both.ours, {"default": source})

        def render(messages: Any, **options: Any) -> str:
            return both.theirs.apply_chat_template(messages, tokenize=False, chat_template=source, **options)  # noqa: B023

        turns: dict[str, Turn] = {}
        for label, messages in CONVERSATIONS.items():
            tools = TOOLS if "call" in label else None
            try:
                turn = turns[label] = Turns(template).turn(messages, len(messages) - 1, tools)
            except TemplateError as error:
                if "leaves out" in error.message:
                    n_before = render(messages[:-1], tools=tools).count("weather") if tools else 0
                    switches = [{}, {"enable_thinking": True, "thinking": True}]
                    texts = [render(messages, tools=tools, **switch) for switch in switches]
                    assert not any(text.count("weather" if tools else THOUGHT) > n_before for text in texts), name
                else:
                    refused[label][name] = error.message
                continue
            assert [token in both.ours.stop_ids for token in turn.answer].index(True) == len(turn.answer) - 1, name
            *before, message = messages
            prompt = render(before, tools=tools, add_generation_prompt=True, **turn.variables)
            assert turn.prompt == both.theirs(prompt, add_special_tokens=False).input_ids, name
            if turn.variables:
                switched.add((label, name))
            if turn.end_added:
                ended.add(name)
            whole = render(messages, tools=tools, **turn.variables)
            rest = whole.removeprefix(prompt)
            end = both.theirs.decode(turn.answer[-1:])
            answer = both.theirs.decode(turn.answer)
            if rest.count(end) == 0:
                answer = answer.removesuffix(end)
                ended_by_next.add(name)
            if rest != whole and rest.startswith(answer):
                assert rest[len(answer) :].removesuffix("</s>").strip("\n") == "", name
                continue
            composed[label].add(name)
            found = events(template, prompt, tools, turn.answer)
            assert said(found, Content) == message["content"], name
            assert said(found, Reasoning) == message.get("reasoning_content", ""), name
        thinking = AnswerFormat.of(source).reasoning
        if isinstance(thinking, Thinking) and "reasoning" in turns:
            content = f"{thinking.opener}\n{THOUGHT}\n{thinking.closer}\n\n답."
            assert Turns(template).turn([USER, {"role": "assistant", "content": content}], 1) == turns["reasoning"]
    for label, reasons in REFUSED.items():
        assert refused[label].keys() == reasons.keys(), label
        for name, reason in reasons.items():
            assert reason in refused[label][name]
    assert composed["plain"] == composed["turns"] == composed["after reasoning"] == OPENED
    assert composed["system"] == OPENED | {"mistralai-Mistral-Nemo-Instruct-2407"}  # moves what the system says
    assert ended == {"llama-cpp-rwkv-world", "Apriel-1.6-15b-Thinker-fixed"}  # the second after calls alone
    assert switched == {("reasoning", name) for name in NEED_SWITCH}
    assert {"tencent-Hy3", "GLM-4.6", "Apertus-8B-Instruct"} <= ended_by_next


def test_nothing_is_taught_that_the_template_or_the_engine_does_not_know(both: Tokenizers) -> None:
    def turn(source: str, answer: Any = "Yes.", **fields: Any) -> Turn:
        messages = [USER, {"role": "assistant", "content": answer} | fields]
        return Turns(ChatTemplate(both.ours, {"default": source})).turn(messages, 1)

    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    chatml += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert both.theirs.decode(turn(chatml).answer) == "Yes.<|im_end|>"
    for source, message, reason in (
        (chatml, {"answer": ""}, "empty answer"),
        (chatml, {"reasoning_content": "Hm."}, "leaves out or changes the reasoning"),
        (chatml.replace("m.content", "m.content | lower"), {}, "leaves out or changes the content"),
        (chatml.replace("im_end", "END_TOOL_RESULT"), {}, "no token that ends this model's answers"),
        (chatml.replace("assistant\n{%", "assistant: {%"), {}, "the answer goes on otherwise"),
    ):
        with pytest.raises(TemplateError, match=reason):
            turn(source, **message)
    with pytest.raises(TemplateError, match="answers nothing"):
        Turns(ChatTemplate(both.ours, {"default": chatml})).turn([ASSISTANT, USER], 0)


def test_an_end_token_in_the_content_is_text(both: Tokenizers) -> None:
    source = (
        "{% for m in messages %}[INST]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[INST]{% endif %}"
    )
    turn = Turns(ChatTemplate(both.ours, {"default": source})).turn(
        [USER, {"role": "assistant", "content": "</s> ends it"}], 1
    )
    assert len(turn.answer) == len("</s> ends it") + 1
    assert turn.answer[-1] == both.ours.eos_id
