"""Templates from strangers: they end soon, take little memory, and reach nothing of Python."""

import pytest

from byte_tokenizers import Tokenizers
from dapji.chat import ChatTemplate
from dapji.errors import TemplateError

SECONDS = 0.2
_GROW = "{{% set ns = namespace(s='a') %}}{{% for i in range(60) %}}{{% set ns.s = {0} %}}{{% endfor %}}{{{{ ns.s }}}}"
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{{ loop([1, 2]) }}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [1] * 10 ** 10 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    _GROW.format("ns.s + ns.s"),
    _GROW.format("ns.s ~ ns.s"),
    _GROW.format("[ns.s, ns.s]"),
    _GROW.format("(ns.s, ns.s)"),
    _GROW.format("{'a': ns.s, 'b': ns.s}"),
    _GROW.format("dict(a=ns.s, b=ns.s)"),
    _GROW.format("[ns.s] * 2"),
    _GROW.format("ns.s | replace('a', 'aa')"),
    _GROW.format("ns.s.replace('a', 'aa')"),
    _GROW.format("[ns.s, ns.s] | join"),
    _GROW.format("''.join([ns.s, ns.s])"),
    _GROW.format("'%s%s' % (ns.s, ns.s)"),
    _GROW.format("'{0}{0}'.format(ns.s)"),
    "{% set n = namespace(s='a') %}{% macro g() %}{% set n.s = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ g(n.s, n.s) }}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s=['a']) %}{% for i in range(60) %}{% for b in [n.s] | batch(2, n.s) %}{% set n.s = b %}"
    "{% endfor %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = cycler(n.s, [n.s]).items %}{% endfor %}"
    "{{ n.s }}",
    "{{ ('x' * 900000).strip('a' * 900000 ~ 'x') }}",
    "{{ ('x' * 900000) | trim('a' * 900000 ~ 'x') }}",
    "{{ 'a' | center(10000000000) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ 'a'.zfill(width) }}",
    "{{ '\t'.expandtabs(10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10000000000) }}",
    "{{ messages | tojson(indent=10000000000) }}",
    "{{ 'a\nb' | indent(10000000000) }}",
    "{{ [1] | batch(10000000000, 'x') | list }}",
    "{{ [1] | slice(10000000000) | list }}",
    "{{ 1.5 | round(10000000000, 'ceil') }}",
    "{% set s = 'x' * 500000 %}{{ s.replace('x', s) }}",
    "{% set s = 'x' * 500000 %}{{ s.replace('', s) }}",
    "{% set s = 'x' * 500000 %}{{ s.translate({120: s}) }}",
    "{% set s = 'x' * 500000 %}{{ range(99999) | join(s) }}",
    "{% set s = 'x' * 500000 %}{{ s.join(range(99999) | map('string')) }}",
    "{% set s = 'x' * 500000 %}{{ range(99999) | map('replace', '0', s) | join }}",
    "{{ ([[1]] * 200000) | sum(start=[]) | length }}",
    "{{ range(10 ** 10) | list }}",
    "{{ strftime_now('x' * 900000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'x' * 500000} }}",
    "{{ ('%(a)s' * 100000) | format(a='x' * 500000) }}",
    "{{ ('{0}' * 100000).format('x' * 500000) }}",
    "{{ ('{0:>9}' * 100000).format('x' * 500000) }}",
    "{{ ('\\n' * 900000) | indent(900) }}",
    "{{ ('\\n' * 900000) | indent('x' * 900) }}",
    "{{ [1] * 500000 | tojson(indent=900) }}",
    "{{ ([1] * 500000) | tojson(indent=900) }}",
    "{{ ([1] * 500000) | tojson(separators=('x' * 500000, ':')) }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{{ {}.fromkeys(range(99999), 'x' * 500000) }}",
    "{{ lipsum(n=100000) }}",
    "{{ 'x' | wordwrap(1) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "{{ '" + "x" * 200_000 + "' }}",
]


@pytest.mark.parametrize("source", ENDLESS, ids=range(len(ENDLESS)))
@pytest.mark.timeout(30)  # a hundred times what it takes
def test_a_template_that_would_not_end_is_stopped(source: str, both: Tokenizers) -> None:
    template = ChatTemplate(both.ours, {"default": source}, seconds=SECONDS)
    with pytest.raises(TemplateError):
        template.render([{"role": "user", "content": "hi"}], width=10**10)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages[0].__class__.__mro__ }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
    "{{ ''['for' ~ 'mat_map'](messages[0]) }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{{ messages[0].clear() }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ 'x'.by_template('<|im_end|>') }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_reaches_nothing_of_python(source: str, both: Tokenizers) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(both.ours, {"default": source}).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 1", "line 1"),
        ("a\n{% if %}", "line 2"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ x.y.z }}", "UndefinedError: 'x' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_an_error_says_what_is_wrong(source: str, message: str, both: Tokenizers) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(both.ours, {"default": source}).render([{"role": "user", "content": "hi"}])


def test_a_long_conversation_is_within_the_limits(compiled: dict[str, ChatTemplate]) -> None:
    """A thousand turns, half a million characters."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": "한 말씀 더. " * 60} for i in range(1001)]
    for name in ("SmolLM2", "Qwen3.5-4B", "Kimi-K2-Thinking"):
        rendered = compiled[name].render(turns)
        assert rendered.count("한 말씀 더.") == 60 * 1001
