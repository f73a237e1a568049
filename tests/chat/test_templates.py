"""Rendering and ids of published chat templates, against transformers: the same text, refusals and ids."""

import re
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from conversations import ASSISTANT, CONVERSATIONS, SYSTEM, TOOLS, USER, VARIABLES

from byte_tokenizers import Tokenizers
from dapji.chat import ChatTemplate
from dapji.errors import TemplateError
from dapji.tokenizer import Tokenizer


def refusal_or_text(render: Callable[..., str], *args: Any, **options: Any) -> tuple[Exception | None, str]:
    try:
        return None, render(*args, **options)
    except Exception as error:
        return error, ""


def check_same_text(theirs: Callable[[], str], ours: Callable[[], str]) -> str | None:
    """The text, or None where both refuse and ours passes on what the template says."""
    refusal, text = refusal_or_text(theirs)
    if refusal is None:
        assert ours() == text
        return text
    with pytest.raises(TemplateError, match=re.escape(str(refusal))):
        ours()
    return None


def check_every_template(
    messages: list[dict[str, Any]],
    all_options: Iterable[dict[str, Any]],
    templates: dict[str, str],
    compiled: dict[str, ChatTemplate],
    both: Tokenizers,
) -> int:
    """The same text, byte for byte, or the same refusal; without tools and documents the same ids too.

    How many texts there were.
    """
    rendered = 0
    for name, source in templates.items():
        for given in all_options:
            options = {"add_generation_prompt": True} | given
            text = check_same_text(
                lambda: both.theirs.apply_chat_template(messages, tokenize=False, chat_template=source, **options),  # noqa: B023
                lambda: compiled[name].render(messages, **options),  # noqa: B023
            )
            if text is not None:
                rendered += 1
                if given.keys() <= {"add_generation_prompt"}:
                    # Elsewhere a schema may spell a control token, which is text to us, not to the library.
                    ids = both.theirs(text, add_special_tokens=False).input_ids
                    assert compiled[name].prompt(messages, **options) == ids, name
    return rendered


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_renders_every_published_template_as_transformers(
    conversation: str, templates: dict[str, str], compiled: dict[str, ChatTemplate], both: Tokenizers
) -> None:
    """With tools and without, with the beginning of an answer and without."""
    options: list[dict[str, Any]] = [{}, {"tools": TOOLS}, {"add_generation_prompt": False}]
    rendered = check_every_template(CONVERSATIONS[conversation], options, templates, compiled, both)
    assert rendered > len(templates)  # most do not refuse


@pytest.mark.parametrize("variables", VARIABLES)
@pytest.mark.parametrize("conversation", ["several turns", "reasoning before a call"])
def test_gives_every_published_template_its_variables(
    conversation: str, variables: str, templates: dict[str, str], compiled: dict[str, ChatTemplate], both: Tokenizers
) -> None:
    options = [VARIABLES[variables]]
    rendered = check_every_template(CONVERSATIONS[conversation], options, templates, compiled, both)
    assert rendered > len(templates) // 2


FEATURES = {
    "trimmed blocks": "{% if true %}\n  a\n  {% endif %}\nb",
    "loop controls": (
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    ),
    "tojson": (
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
        "{{ {'b': '<한>', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}"
    ),
    "generation": "a{% generation %}{{ messages[0].content }}{% endgeneration %}b",
    "namespace": "{% set ns = namespace(a=1, b='x') %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.b }}",
    "dict": "{{ dict(a=1, b=[2]) }}{{ {'x': none, 'y': true} }}",
    "macros": (
        "{% macro m(a, b='!') %}{{ a ~ b }}{{ caller() if caller }}{% endmacro %}{{ m('x') }}"
        "{% call m(1) %}c{% endcall %}"
    ),
    "recursive loop": "{% for m in [[1, []], [2, [[3, []]]]] recursive %}{{ m[0] }}({{ loop(m[1]) }}){% endfor %}",
    "loop variables": (
        "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{% endfor %}"
    ),
    "filters": (
        "{{ ['b', 'a'] | sort | join('-') }}{{ ' x ' | trim | upper }}{{ 'a\nb' | indent(2) }}"
        "{{ 'xay' | replace('a', 'b') }}{{ messages | map(attribute='role') | list }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ {'b': 1, 'a': 2} | dictsort }}{{ 3.14159 | round(2) }}{{ '%s=%03d' | format('n', 7) }}"
        "{{ nothing | default('d') }}{{ [1, 2, 3] | sum }}{{ 'ab' | first }}{{ [1, 2] | last }}"
        "{{ '<a>' | e }}{{ 'a b' | title }}{{ [3, 1] | batch(1) | list }}"
    ),
    "strings": (
        "{{ 'a-b'.split('-')[1] + ('x' * 3) }}{{ ' a'.lstrip() }}{{ 'abc'[1:] }}{{ 'abc'[::-1] }}"
        "{{ 'a,b'.replace(',', ';') }}"
        "{{ '{}-{b}-{0:>4}'.format(1, b='x') if false else '{}-{b}'.format(1, b='x') }}{{ '%s' % 'x' }}"
        "{{ 'x'.join(['1', '2']) }}{{ 'a' in 'abc' }}{{ 'abc'.startswith('ab') }}{{ '  '.strip() == '' }}"
        "{{ 'aXb'.lower() }}{{ 'a'.center(5) }}{{ '{:>4}|{!r}'.format(5, 'q') }}"
    ),
    "percent": "{{ '**%s** 2024 %5.2f%%' % ('a', 1.5) }}{{ '%(x)s*' % {'x': 1} }}",
    "indented json": (
        "{{ messages | tojson(indent='\\t') }}{{ {} | tojson(indent=0) }}{{ [[], 1.5, none] | tojson(indent=3) }}"
    ),
    "safe": (
        "{{ '<b>' | safe }}{{ ('<b>' | safe) + '<i>' }}{{ '<i>' + ('<b>' | safe) }}{{ messages[0].content | safe }}"
        "{{ ('<b>' | safe).strip() + '<&\"\\'>' }}{{ ('<b>' | safe).replace('b', '<') }}{{ [1 | safe, '<' | safe] }}"
        "{{ ('<b>' | safe) ~ '<i>' }}{{ ('<b>' | safe).join(['<', 'x' | safe]) }}{{ ('<b>' | safe) % () }}"
        "{{ ('<b>' | safe)[1:] + '<' }}{{ ('<%s>' | safe) % '<' }}{{ '<' + ('<b>' | safe) * 2 }}{{ none | safe }}"
        "{{ ('<b>' | safe | string) + '<' }}{{ ('a<b' | safe).split('<')[0] + '<' }}{{ ('<b>' | safe | upper) + '<' }}"
    ),
    "undefined": (
        "{{ nothing }}{{ messages[0].nothing }}{% if nothing is defined %}x{% endif %}"
        "{% for x in nothing %}y{% endfor %}"
    ),
    "set and filter blocks": (
        "{% set x %} a {{ messages[0].role }}{% endset %}{{ x | trim }}{% filter upper %}b{{ x }}{% endfilter %}"
    ),
    "date": "{{ strftime_now('%Y') }}",
    "variables": "{{ enable_thinking }}{{ extra.list[1] }}{{ bos_token }}{{ eos_token }}",
    "refuses": "{{ raise_exception('only ' ~ messages | length ~ ' messages') }}",
    "unknown method": "{{ messages.append(1) }}",
    "arithmetic": "{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ -1 + 2.5 }}{{ 1 / 4 }}{{ [1] + [2] }}{{ [0] * 3 }}",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_speaks_the_language_of_transformers(feature: str, both: Tokenizers) -> None:
    source = FEATURES[feature]
    messages = [SYSTEM, USER, ASSISTANT]
    variables: dict[str, Any] = {"enable_thinking": False, "extra": {"list": [1, "둘"]}}
    check_same_text(
        lambda: both.theirs.apply_chat_template(
            messages, tokenize=False, chat_template=source, add_generation_prompt=True, **variables
        ),
        lambda: ChatTemplate(both.ours, {"default": source}).render(messages, **variables),
    )


def test_passes_documents_on(both: Tokenizers) -> None:
    source = "{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}"
    documents = [{"title": "하나", "text": "<b>"}]
    expected = both.theirs.apply_chat_template([USER], tokenize=False, chat_template=source, documents=documents)
    assert ChatTemplate(both.ours, {"default": source}).render([USER], documents=documents) == expected == "하나: <b>"


def test_chooses_the_template_by_name(both: Tokenizers) -> None:
    template = ChatTemplate(both.ours, {"default": "plain", "tool_use": "tools", "rag": "rag"})
    assert template.names == ("default", "tool_use", "rag")
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "tools"
    assert template.render([USER], tools=[]) == "plain"
    assert template.render([USER], name="rag") == "rag"
    assert ChatTemplate(both.ours, {"default": "plain"}).render([USER], tools=TOOLS) == "plain"
    with pytest.raises(TemplateError, match="no chat template 'x', it has 'default', 'tool_use', 'rag'"):
        template.render([USER], name="x")
    with pytest.raises(TemplateError, match="no chat template 'default', it has 'rag'"):
        ChatTemplate(both.ours, {"rag": "rag"}).render([USER])


def test_a_model_without_a_template_says_what_to_do(both: Tokenizers) -> None:
    template = ChatTemplate.of(both.ours)
    with pytest.raises(TemplateError, match=r"no chat template.*\nhint: .*-Instruct"):
        template.prompt([USER])


DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "chat.md"
INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def test_the_alpaca_template_of_the_docs_writes_alpacas_prompt(both: Tokenizers) -> None:
    """The prompt without an input, as Stanford Alpaca was trained on it."""
    (source,) = re.findall(r"^```jinja\n(.*?)\n```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    template = ChatTemplate(both.ours, {"default": source})
    question = {"role": "user", "content": "세 가지를 말해."}
    first = "### Instruction:\n세 가지를 말해.\n\n### Response:\n"
    assert template.render([question]) == INTRODUCTION + first
    assert template.render([SYSTEM, question]) == "Be brief.\n\n" + first
    assert template.render([question, ASSISTANT, question]) == INTRODUCTION + first + "I am a model.\n\n" + first


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([object()], "messages.0. is a object"),
        (["hello"], "messages.0. is a str"),
        ([USER, {"content": "x"}], "messages.1. has no role"),
        ([{"role": 3, "content": "x"}], "messages.0. has no role"),
        ([{"role": "user", "content": b"x"}], "messages.0...content.. is a bytes"),
        ([{"role": "user", "content": [{"image": object()}]}], "is a object"),
        ([{"role": "user", "content": {1: "x"}}], "has the key 1"),
        ([{"role": "user", "content": reduce(lambda inner, _: [inner], range(9999), "x")}], "more than 64 deep"),
    ],
)
def test_what_is_no_message_is_refused(messages: Any, message: str, both: Tokenizers) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(both.ours, {"default": "x"}).render(messages)


def test_a_key_without_a_value_is_left_out(both: Tokenizers) -> None:
    """As in transformers: clients send `content: null` beside tool calls."""
    source = "{{ messages[0] }}"
    message = {"role": "assistant", "content": None, "x": 1}
    expected = both.theirs.apply_chat_template([message], tokenize=False, chat_template=source)
    assert ChatTemplate(both.ours, {"default": source}).render([message]) == expected


def test_the_messages_stay_as_they_are(both: Tokenizers) -> None:
    message = {"role": "user", "content": ["x"]}
    ChatTemplate(both.ours, {"default": "{% set m = messages[0] %}{{ m }}"}).render([message])
    assert message == {"role": "user", "content": ["x"]}
    assert type(message["role"]) is str


BOS_TEMPLATES = {
    "writes it": "{{ bos_token }}{{ messages[0].content }}",
    "writes it as text": "<s>{{ messages[0].content }}",
    "leaves it out": "{{ messages[0].content }}",
    "writes it for every turn": "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}",
}


@pytest.mark.parametrize("template", BOS_TEMPLATES)
def test_one_bos_at_the_beginning(template: str, add_bos: Tokenizer) -> None:
    assert add_bos.add_bos
    ids = ChatTemplate(add_bos, {"default": BOS_TEMPLATES[template]}).prompt([{"role": "user", "content": "hi<s>"}])
    assert ids[0] == add_bos.bos_id
    assert ids.count(add_bos.bos_id) == 1
    assert add_bos.decode(ids) == "hi<s>"


def test_no_bos_where_neither_wants_it(both: Tokenizers) -> None:
    assert not both.ours.add_bos
    template = ChatTemplate(both.ours, {"default": BOS_TEMPLATES["leaves it out"]})
    assert both.ours.bos_id not in template.prompt([USER])


def test_a_switch_of_reasoning_changes_the_prompt(compiled: dict[str, ChatTemplate]) -> None:
    switched = []
    for name, template in compiled.items():
        try:
            on, off = (template.render([USER], **template.reasoning(wanted)) for wanted in (True, False))
        except TemplateError:
            continue
        assert on != off, name
        switched.append(name)
    assert len(switched) >= 25
    assert {"Qwen-Qwen3-0.6B", "deepseek-ai-DeepSeek-V3.1", "Kimi-K3", "GLM-4.6"} <= set(switched)
    low, high = (compiled["openai-gpt-oss-120b"].reasoning(effort) for effort in ("low", "high"))
    assert [given["reasoning_effort"] for given in (low, high)] == ["low", "high"]
    texts = [compiled["openai-gpt-oss-120b"].render([USER], **given) for given in (low, high)]
    assert ["Reasoning: low" in texts[0], "Reasoning: high" in texts[1]] == [True, True]
