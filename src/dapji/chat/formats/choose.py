"""Which grammars a model's answers have: told by its chat template, which contains the markers, never by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from dapji.chat.formats.parser import Calls, Grammar, Parser, WholeAnswers, argument_schemas
from dapji.chat.formats.pythonic import PythonicCalls
from dapji.chat.formats.rules import ANY_TOOL, CONTENT, SPACE, Form, Rules, ToolChoice, Wanted, pattern_of
from dapji.chat.formats.thinking import Thinking
from dapji.chat.formats.xml_calls import XmlCalls
from dapji.chat.schema import prepared, resolved, said, with_definitions, without_definitions
from dapji.errors import RequestError

_LLAMA_3 = LlamaCalls(opener="<|python_tag|>", closer=None)
_LLAMA_4 = LlamaCalls(opener="<|python_start|>", closer="<|python_end|>")
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
    (("<｜tool▁calls▁begin｜>", "```json"), DeepSeekCalls(fenced=True)),
    (("<｜tool▁calls▁begin｜>",), DeepSeekCalls()),
    (("｜DSML｜", "function_calls"), _dsml("function_calls")),
    (("｜DSML｜", "tool_calls"), _dsml("tool_calls")),
    (("[TOOL_CALLS]", "[CALL_ID]"), MistralCalls(listed=False, id=True)),
    (("[TOOL_CALLS]", "[ARGS]"), MistralCalls(listed=False)),
    (("[TOOL_CALLS]",), MistralCalls()),
    (("<|tool_call>call:",), GemmaCalls()),
    (("<|python_start|>", "[func_name1("), replace(_LLAMA_4, listed=True)),
    (("<|python_start|>",), _LLAMA_4),
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
    (("<tool_calls>[",), JsonCalls(opener="<tool_calls>", closer="</tool_calls>", listed=True)),
    (("<tool_calls>",), JsonCalls(opener="<tool_calls>", closer="</tool_calls>")),
    (("<tool_call>",), JsonCalls(opener="<tool_call>", closer="</tool_call>", bare=True)),
    (("<TOOLCALL>",), JsonCalls(opener="<TOOLCALL>", closer="</TOOLCALL>", listed=True)),
    (
        ("<|START_ACTION|>",),
        JsonCalls(
            opener="<|START_ACTION|>",
            closer="<|END_ACTION|>",
            listed=True,
            id_key="tool_call_id",
            keys=("tool_name", "parameters"),
        ),
    ),
    (("<|tools_prefix|>",), JsonCalls(opener="<|tools_prefix|>", closer="<|tools_suffix|>", listed=True, keys=None)),
    (("<|tool_call|>",), JsonCalls(opener="<|tool_call|>", closer=None, listed=True)),
    (("<|function_call|>",), JsonCalls(opener="<|function_call|>", closer=None)),
    (("functools[",), JsonCalls(opener="functools", closer=None, listed=True)),
    (('"parameters": ', "ipython"), _LLAMA_3),
    (("[func_name1(",), replace(_LLAMA_3, listed=True)),
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
        self,
        prompt: str = "",
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        control: Iterable[str] = (),
        written: bool = False,
    ) -> Parser:
        """For an answer that follows `prompt`; tools and control as in `Parser`. No tools: no calls are looked for.
        written: the answer is held to `grammar`."""
        grammars: list[Grammar] = []
        if self.reasoning is not None:
            grammars.append(self.reasoning.after(prompt))
        if tools and self.calls is not None:
            grammars.append(self.calls.written() if written else self.calls)
        return Parser(*grammars, control=control, tools=tools or ())

    def grammar(
        self,
        prompt: str = "",
        *,
        tools: Iterable[Mapping[str, Any]] = (),
        choice: ToolChoice = ANY_TOOL,
        content: bool = False,
        control: Mapping[str, int] | None = None,
    ) -> str | None:
        """Rules of an answer that follows `prompt`, which may call these tools, as llguidance reads them.

        content: where it is no call, it is what the grammar `@content` says. control: ids of control tokens by their
        spellings. None: any answer will do. Raises RequestError for tools that cannot be chosen, or not written.
        """
        schemas = argument_schemas(choice.of(tools))
        wanted = Wanted(
            tools={name: _of_object(name, schema) for name, schema in schemas.items()},
            required=choice.required,
            parallel=choice.parallel,
            content=content,
        )
        reasoning = None if self.reasoning is None else self.reasoning.after(prompt)
        parts = [part for part in (reasoning, self.calls) if part is not None]
        rules = Rules([marker for part in parts for marker in part.markers], control or {})
        if isinstance(reasoning, WholeAnswers):
            return rules.source(reasoning.answer(rules, wanted)) if wanted.tools or content else None
        forms = self.calls.forms(rules, wanted) if self.calls is not None and wanted.tools else ()
        if wanted.tools and not forms and choice != ANY_TOOL:
            raise RequestError(
                "the calls of this model's format cannot be required, counted or chosen",
                hint="leave out tool_choice and parallel_tool_calls",
            )
        if not forms and not content:
            return None
        thinking = reasoning if isinstance(reasoning, Thinking) else None
        write = _free if wanted.free else _closed
        return rules.source(write(rules, forms, wanted, thinking))


def _of_object(tool: str, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema, of objects alone: arguments are one. Raises RequestError for what is none that can be enforced."""
    prepared(schema, f"tool {tool!r}")
    if "type" not in schema and not said(schema) & {"$ref"}:
        return {**schema, "type": "object"}
    whole = resolved(schema, schema)
    if isinstance(whole, Mapping) and whole.get("type") == "object":
        return schema
    return with_definitions({"allOf": [without_definitions(schema), {"type": "object"}]}, schema)


def _free(rules: Rules, forms: Sequence[Form], wanted: Wanted, thinking: Thinking | None) -> str:
    """Text and calls."""
    anywhere = [form for form in forms if not (form.bare or form.last)]
    rest = rules.space
    if wanted.parallel:
        rules.define("more", rules.until(*(replace(form, rest=f"{form.rest} more") for form in anywhere), end=True))
        rest = "more"
    turns = [form if form.last else replace(form, rest=f"{form.rest} {rest}") for form in forms]
    if thinking is None:
        return rules.until(*turns, end=True)
    answer = rules.rule(rules.until(*turns, end=True))
    thought = rules.until(Form(opener=thinking.closer, rest=answer), end=True)
    if thinking.opened:
        return thought
    if rules.is_token(thinking.opener):
        return f"({rules.text(thinking.opener)} {thought} | {answer})"
    opener = Form(opener=SPACE + pattern_of(thinking.opener), rest=thought, bare=True)
    return rules.until(opener, *turns, end=True)


def _closed(rules: Rules, forms: Sequence[Form], wanted: Wanted, thinking: Thinking | None) -> str:
    """Calls or what the content must be, after reasoning if there is any."""
    answers = [rules.begun(form) for form in forms if form.last]
    if followed := [form for form in forms if not form.last]:
        calls = rules.one_of(map(rules.begun, followed))
        answers.append(f"{calls} ({rules.space} {calls})*" if wanted.parallel else calls)
    if wanted.content and not wanted.required:
        answers.append(CONTENT)
    answer = rules.one_of(answers)
    if thinking is None:
        return answer
    thought = rules.until(Form(opener=thinking.closer, rest=f"{rules.space} {answer}"))
    if thinking.opened:
        return thought
    opener = thinking.opener if rules.is_token(thinking.opener) else SPACE + pattern_of(thinking.opener)
    begin = Form(opener=opener, rest=thought, bare=not rules.is_token(thinking.opener))
    return f"({rules.begun(begin)} | {answer})"
