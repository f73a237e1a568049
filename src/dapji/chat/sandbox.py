"""Renders a template that somebody else wrote: in jinja2's sandbox, within limits, and noting what the template wrote.

The language is the one that transformers gives chat templates: trimmed blocks, `break` and `continue`, `tojson` without
HTML escapes, `raise_exception`, `strftime_now`, `{% generation %}`. jinja2's sandbox keeps a template from reaching
Python; it does not keep it from looping for ever or from filling the memory, so here every step (loop turn, call,
filter, operator) is counted against a budget of time and characters, and what could grow beyond it in one step is
refused before. Knows neither messages nor tokens.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.runtime import Context, Macro
from jinja2.visitor import NodeTransformer

from dapji.chat.written import Safe, Written, joined
from dapji.errors import TemplateError

Clock = Callable[[], datetime.datetime]

MAX_SOURCE = 1 << 17
"""Characters of a template; published ones have up to 30,000."""
TIME_LIMIT = 2.0
"""Seconds of the rendering thread's own processor time, for a short conversation; usual are milliseconds."""
_SIZE_PER_SECOND = 100_000
"""Characters and elements of the input for which there is a second more: some templates are quadratic in messages."""
_BASE_SIZE, _SIZE_FACTOR, _TOTAL_FACTOR = 1 << 20, 8, 64
"""One value may have 2^20 characters and elements plus 8 for each of the input's, all values together 64 times that."""
_MAX_SMALL = 1000
_MAX_INT_BITS = 4096

_REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""No chat template wants them, and each can be made to take very long in one step."""
_REMOVED_METHODS = frozenset({"encode", "expandtabs", "format_map", "to_bytes", "translate"})
_SMALL_METHODS = frozenset({"center", "ljust", "lstrip", "rjust", "rstrip", "strip", "zfill"})
_SMALL_FILTERS = {
    "batch": "linecount", "center": "width", "indent": "width", "round": "precision", "slice": "slices",
    "trim": "chars",
}  # fmt: skip
"""Methods and filters whose first argument sets how much work they are: a width, a count, characters to strip."""
_WIDE_FIELD = re.compile(r"%(\([^)]*\))?[#0 +-]*(\*|\d{4}|\d*\.(\*|\d{4}))")
"""In the language of the operator %: a width or precision of four digits, or one that an argument gives."""
_INTERNAL_ARGUMENTS = ("_loop_vars", "_block_vars")
"""What jinja2's code passes along with every call in a loop or a block."""
_COUNTED = "count turns"
"""Name of an internal filter; with its space no template can write it."""


class _Refused(jinja2.TemplateRuntimeError):
    """The template itself called raise_exception."""


class _Exceeded(jinja2.TemplateRuntimeError):
    """A limit was met."""


class _Budget:
    """What one rendering may still spend."""

    def __init__(self, input_size: int, seconds: float) -> None:
        self.max_size = _BASE_SIZE + _SIZE_FACTOR * input_size
        self.left = _TOTAL_FACTOR * self.max_size
        self.seconds = seconds + input_size / _SIZE_PER_SECOND
        self.deadline = time.thread_time() + self.seconds

    def step(self) -> None:
        if time.thread_time() > self.deadline:
            raise _Exceeded(f"it took longer than {self.seconds:.3g} s")

    def spend(self, size: int) -> None:
        if size > self.max_size:
            raise _Exceeded(f"it made something of more than {self.max_size} characters")
        self.left -= size
        if self.left < 0:
            raise _Exceeded("it made too much text on its way")

    def check(self, value: Any) -> Any:
        """Passes a new value on; raises where it is too large."""
        if isinstance(value, str | list | tuple | dict):
            self.spend(size_of(value, self.max_size))
        elif isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise _Exceeded(f"it made a number of more than {_MAX_INT_BITS} bits")
        return value


def size_of(value: Any, limit: int) -> int:
    """Characters and elements, written out (a part that occurs twice counts twice); stops counting beyond `limit`."""
    size, open_values = 0, [value]
    while open_values and size <= limit:
        part = open_values.pop()
        if isinstance(part, str):
            size += len(part)
        elif isinstance(part, Mapping):
            open_values += part.keys()
            open_values += part.values()
        elif isinstance(part, list | tuple):
            open_values += part
        size += 1
    return size


class _Namespace(jinja2.utils.Namespace):
    """`namespace()`, whose attributes a template must not use to reach Python and that says nothing of its content."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"a namespace's attribute must not begin with an underscore: {name!r}"
            )
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    made = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        made[name] = value
    return made


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> NoReturn:
    raise _Refused(str(message))


@jinja2.pass_environment
def _tojson(
    environment: _Environment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own one escapes for HTML; this is the signature that transformers offers."""
    for small in (indent, *(separators or ())):
        _check_small(small)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return encoder.encode(value) if indent is None else environment.concat(encoder.iterencode(value))


def _check_small(value: Any) -> None:
    if (isinstance(value, int) and abs(value) > _MAX_SMALL) or (isinstance(value, str) and len(value) > _MAX_SMALL):
        raise _Exceeded(f"it asked for a width or count of more than {_MAX_SMALL}")


def _check_percent(text: str, values: Any, budget: _Budget) -> None:
    """For text % values: no wide field, and not too much of a mapping whose values may occur any number of times."""
    if _WIDE_FIELD.search(text.replace("%%", "")):
        raise _Exceeded("a format has a width of more than 3 digits")
    if isinstance(values, Mapping):
        budget.spend(text.count("%(") * size_of(values, budget.max_size))


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """str.format, which follows what the template wrote."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{4}", format_spec):
            raise _Exceeded("a format has a width of more than 3 digits")
        return super().format_field(value, format_spec)

    def write(
        self, text: Written, args: Sequence[Any], kwargs: Mapping[str, Any], automatic: Iterator[int] | None = None
    ) -> Written:
        """`automatic` numbers the fields that have neither number nor name, those inside a format_spec included."""
        environment: Any = self._env
        return environment.concat(self._pieces(text, args, kwargs, automatic or itertools.count()))  # type: ignore[no-any-return]

    def _pieces(
        self, text: Written, args: Sequence[Any], kwargs: Mapping[str, Any], automatic: Iterator[int]
    ) -> Iterator[str]:
        by_template = text.all_by_template(0, len(text))
        for literal, field, spec, conversion in self.parse(text):
            yield Written.by_template(literal) if by_template else literal
            if field is None:
                continue
            name = f"{next(automatic)}{field}" if not field or field[0] in ".[" else field
            value = self.convert_field(self.get_field(name, args, kwargs)[0], conversion)
            spec = self.write(Written(spec or ""), args, kwargs, automatic)
            yield value if isinstance(value, str) and not spec else self.format_field(value, spec)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @staticmethod
    def _body(caller: Macro) -> Any:
        return caller()


class _CountTurns(NodeTransformer):
    """Every loop runs over an iterator that counts."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _COUNTED, [], [], None, None, lineno=node.lineno)
        return node


class _Code(jinja2.compiler.CodeGenerator):
    """Python code in which the template's own strings are `Written`, and new values are checked."""

    def visit_Const(self, node: nodes.Const, frame: jinja2.compiler.Frame) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.written({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.written({''.join(group)!r})"

    def visit_Concat(self, node: nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat(map(environment.text, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def _checked(self, visit: Callable[[Any, jinja2.compiler.Frame], None], node: Any, frame: Any) -> None:
        self.write("environment.check(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: jinja2.compiler.Frame) -> None:
        self._checked(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: jinja2.compiler.Frame) -> None:
        self._checked(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: jinja2.compiler.Frame) -> None:
        if node.ctx == "load":
            self._checked(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Clock) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=jinja2.pass_context(lambda context, value: self.text(value)),
            optimized=False,  # it would run parts of the template while compiling, without a budget
        )
        self._local = threading.local()
        self._constants: dict[str, Written] = {}
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": _tojson, "join": _join, "safe": Safe}
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        self.filters[_COUNTED] = self._count_turns
        del self.globals["lipsum"]

        def strftime_now(format: str) -> str:
            _check_small(format)
            return now().strftime(format)

        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": strftime_now,
            "dict": _dict,
            "namespace": _namespace,
        }

    @property
    def budget(self) -> _Budget:
        return self._local.budget  # type: ignore[no-any-return]

    @budget.setter
    def budget(self, budget: _Budget) -> None:
        self._local.budget = budget

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _CountTurns().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    # What compiled templates call.

    def written(self, text: str) -> Written:
        if text not in self._constants:
            self._constants[text] = Written.by_template(text)
        return self._constants[text]

    def text(self, value: Any) -> str:
        """As str() does, but only what is not too long."""
        if isinstance(value, str):
            return value
        self.budget.check(value)
        return str(value)

    def concat(self, pieces: Iterable[str]) -> Written:
        size, kept = 0, []
        for piece in pieces:
            size += len(piece)
            if size > self.budget.max_size:
                break
            kept.append(piece)
        self.budget.spend(size)
        return joined(kept)

    def check(self, value: Any) -> Any:
        return self.budget.check(value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    self.budget.spend(max(times, 0) * size_of(sequence, self.budget.max_size))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MAX_INT_BITS:
                raise _Exceeded(f"it made a number of more than {_MAX_INT_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            _check_percent(left, right, self.budget)
        return self.budget.check(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.step()
        given = [*args, *(value for key, value in kwargs.items() if key not in _INTERNAL_ARGUMENTS)]
        containers = [value for value in given if isinstance(value, list | tuple | dict)]
        if len(containers) > 1:  # a macro's varargs and a cycler's items hold them all
            self.budget.check(containers)
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", None)
        if isinstance(owner, str):
            if name in _SMALL_METHODS:
                _check_small(args[0] if args else None)
            elif name == "replace":
                self._check_replace(owner, *args, **kwargs)
            elif name == "join" and args:
                args = (_listed(args[0], self.budget),)
                self.budget.spend(size_of(args[0], self.budget.max_size) + len(owner) * len(args[0]))
        return self.budget.check(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in _REMOVED_METHODS or (isinstance(obj, Written) and not hasattr(str, attr)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        if value.__name__ != "format":
            raise jinja2.exceptions.SecurityError("format_map is not available")
        text = value.__self__
        written = text if isinstance(text, Written) else Written(text)
        return lambda *args, **kwargs: _Formatter(self).write(written, args, kwargs)

    # Filters.

    def _count_turns(self, values: Iterable[Any]) -> Iterator[Any]:
        made_on_the_way = isinstance(values, Iterator)  # as by the filter batch
        for value in values:
            self.budget.step()
            yield self.budget.check(value) if made_on_the_way else value

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter with a look at what goes in and what comes out."""
        marked = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            value, options = args[marked], args[marked + 1 :]
            if name == "join" and isinstance(value, Iterator):
                value = _listed(value, self.budget)
                args = (*args[:marked], value, *options)
            if name in _SMALL_FILTERS:
                small = options[0] if options else kwargs.get(_SMALL_FILTERS[name])
                _check_small(small)
                if name == "indent":
                    self.budget.spend(str(value).count("\n") * (len(small) if isinstance(small, str) else small or 4))
            elif name == "replace":
                self._check_replace(str(value), *options, **kwargs)
            elif name == "join":
                glue = options[0] if options else kwargs.get("d", "")
                self.budget.spend(len(str(glue)) * len(value) if isinstance(value, Sequence) else 0)
            elif name == "format":
                _check_percent(str(value), kwargs, self.budget)
            elif name == "sum" and not isinstance(
                kwargs.get("start", options[1] if len(options) > 1 else 0), int | float
            ):
                raise _Exceeded("sum adds numbers only")
            return self.budget.check(function(*args, **kwargs))

        return guarded

    def _check_replace(self, text: str, old: Any = "", new: Any = "", *rest: Any, **kwargs: Any) -> None:
        growth = len(str(kwargs.get("new", new))) * (str.count(text, str(kwargs.get("old", old))) + 1)
        self.budget.spend(len(text) + growth)


def _listed(values: Iterable[Any], budget: _Budget) -> list[Any]:
    """A list of what an iterator yields, as long as there is budget."""
    found: list[Any] = []
    for value in values:
        budget.step()
        budget.spend(1)
        found.append(value)
    return found


@jinja2.pass_environment
def _join(environment: _Environment, values: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    """As jinja2's, but following what the template wrote."""
    if attribute is not None:
        values = map(jinja2.filters.make_attrgetter(environment, attribute), values)
    glue = environment.text(d)
    return (glue if isinstance(glue, Written) else Written(glue)).join(map(environment.text, values))


class Template:
    """A compiled template. Safe to share between threads."""

    def __init__(self, source: str, *, seconds: float = TIME_LIMIT, now: Clock = datetime.datetime.now) -> None:
        """now: what the template takes for the time. Raises TemplateError where `source` is no template."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, the limit is {MAX_SOURCE}")
        self._environment = _Environment(now)
        self._seconds = seconds
        try:
            self._template = self._environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(self._environment.parse(source)))
            """Names that it reads from outside."""
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template cannot be read: line {error.lineno}: {error.message}") from error
        except Exception as error:  # a hostile source also reaches Python's limits on nesting
            raise TemplateError(f"the chat template cannot be read: {type(error).__name__}: {error}") from error

    def render(self, variables: dict[str, Any]) -> Written:
        """The text. `variables` are plain values (None, bool, int, float, str, list, dict), or `Written`.

        Raises TemplateError where the template refuses, fails, or meets a limit.
        """
        size = size_of(variables, 1 << 60)
        self._environment.budget = _Budget(size, self._seconds)
        try:
            return self._environment.concat(self._template.root_render_func(self._template.new_context(variables)))
        except _Refused as error:
            raise TemplateError(f"the chat template refuses this conversation: {error.message}") from error
        except _Exceeded as error:
            raise TemplateError(f"the chat template was stopped: {error.message}") from error
        except Exception as error:  # whatever Python raises inside the template's own code
            raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error
