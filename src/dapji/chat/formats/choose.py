"""Which grammars a model's answers have: told by its chat template, which contains the markers, never by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapji.chat.formats.deepseek import DeepSeekCalls
from dapji.chat.formats.gemma import GemmaCalls
from dapji.chat.formats.glm import GlmCalls
from dapji.chat.formats.harmony import Harmony
from dapji.chat.formats.json_calls import JsonCalls
from dapji.chat.formats.kimi import KimiCalls
from dapji.chat.formats.kimi_k3 import KimiK3
from dapji.chat.formats.llama import LlamaCalls
from dapji.chat.formats.mistral import MistralCalls
from dapji.chat.formats.parser import Calls, Grammar, Parser
from dapji.chat.formats.pythonic import PythonicCalls
from dapji.chat.formats.thinking import Thinking
from dapji.chat.formats.xml_calls import XmlCalls

_LLAMA_3 = LlamaCalls(opener="<|python_tag|>", closer=None)
_LFM_2 = PythonicCalls(opener="<|tool_call_start|>", closer="<|tool_call_end|>")


def _named(opener: str, prefix: str = "", typed: tuple[str, str] | None = None) -> XmlCalls:
    """Elements with attributes: <invoke name="f"><parameter name="x">. prefix: of these two."""
    return XmlCalls(
        opener=f"<{opener}>",
        closer=f"</{opener}>",
        function=(f'<{prefix}invoke name="', '">', f"</{prefix}invoke>"),
        parameter=(f'<{prefix}parameter name="', '">', f"</{prefix}parameter>"),
        typed=typed,
    )


def _dsml(opener: str) -> XmlCalls:
    return _named(f"｜DSML｜{opener}", "｜DSML｜", ('" string="true">', '" string="false">'))


CALLS: Sequence[tuple[tuple[str, ...], Calls | None]] = (
    (("<|tool_calls_section_begin|>",), KimiCalls()),
    (("<｜tool▁calls▁begin｜>",), DeepSeekCalls()),
    (("｜DSML｜", "function_calls"), _dsml("function_calls")),
    (("｜DSML｜", "tool_calls"), _dsml("tool_calls")),
    (("[TOOL_CALLS]",), MistralCalls()),
    (("<|tool_call>call:",), GemmaCalls()),
    (("<|python_start|>",), LlamaCalls(opener="<|python_start|>", closer="<|python_end|>")),
    (("<|tool_call_start|>",), _LFM_2),
    (("<|tool_list_start|>",), _LFM_2),
    (("<minimax:tool_call>", '<invoke name="'), _named("minimax:tool_call")),
    (
        ('<function name="', '<param name="'),
        XmlCalls(
            opener=None,
            closer=None,
            function=('<function name="', '">', "</function>"),
            parameter=('<param name="', '">', "</param>"),
            cdata=True,
        ),
    ),
    (("<seed:tool_call>", "<function="), XmlCalls(opener="<seed:tool_call>", closer="</seed:tool_call>")),
    (("<function=",), XmlCalls()),
    (("<tool_call>", "<arg_key>"), GlmCalls()),
    (("]<]minimax[>[",), None),  # its <tool_call> is another one
    (("<tool_calls>",), JsonCalls(opener="<tool_calls>", closer="</tool_calls>")),
    (("<tool_call>",), JsonCalls(opener="<tool_call>", closer="</tool_call>", bare=True)),
    (("<TOOLCALL>",), JsonCalls(opener="<TOOLCALL>", closer="</TOOLCALL>")),
    (("<|START_ACTION|>",), JsonCalls(opener="<|START_ACTION|>", closer="<|END_ACTION|>")),
    (("<|tools_prefix|>",), JsonCalls(opener="<|tools_prefix|>", closer="<|tools_suffix|>", name_is_key=True)),
    (("<|tool_call|>",), JsonCalls(opener="<|tool_call|>", closer=None)),
    (("<|function_call|>",), JsonCalls(opener="<|function_call|>", closer=None)),
    (("functools[",), JsonCalls(opener="functools", closer=None)),
    (('"parameters": ', "ipython"), _LLAMA_3),
    (("[func_name1(",), _LLAMA_3),
)
"""What a template contains, all of it -> its tool calls; the first that fits counts. None: they are not read."""

THINKING: Sequence[Thinking] = (
    Thinking(opener="<think>", closer="</think>"),
    Thinking(opener="[THINK]", closer="[/THINK]"),
    Thinking(opener="<seed:think>", closer="</seed:think>"),
    Thinking(opener="<mm:think>", closer="</mm:think>"),
    Thinking(opener="<|START_THINKING|>", closer="<|END_THINKING|>"),
    Thinking(opener="<|inner_prefix|>", closer="<|inner_suffix|>"),
    Thinking(opener="<|channel>thought\n", closer="<channel|>"),
    Thinking(opener="Here are my reasoning steps:\n", closer="[BEGIN FINAL RESPONSE]"),
)
"""The first whose closer a template contains counts."""


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """The grammars of one chat template's answers."""

    reasoning: Grammar | None
    """Of an answer's beginning; where it reads whole answers, it reads their calls too."""
    calls: Calls | None

    @classmethod
    def of(cls, template: str) -> AnswerFormat:
        """As the template's source tells."""
        if "<|channel|>" in template and "<|message|>" in template:
            return cls(reasoning=Harmony(), calls=None)
        if all(part in template for part in ("<|open|>", "<|sep|>", "<|close|>")):
            return cls(reasoning=KimiK3(), calls=None)
        thinking = next((thinking for thinking in THINKING if thinking.closer in template), None)
        calls = next((calls for parts, calls in CALLS if all(part in template for part in parts)), None)
        return cls(reasoning=thinking, calls=calls)

    def parser(
        self, prompt: str = "", *, tools: Iterable[Mapping[str, Any]] | None = None, control: Iterable[str] = ()
    ) -> Parser:
        """For an answer that follows `prompt`; tools and control as in `Parser`. No tools: no calls are looked for."""
        grammars: list[Grammar] = []
        if self.reasoning is not None:
            grammars.append(self.reasoning.after(prompt))
        if tools and self.calls is not None:
            grammars.append(self.calls)
        return Parser(*grammars, control=control, tools=tools or ())
