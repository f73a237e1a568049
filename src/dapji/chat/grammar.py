"""Grammars of answers: which tokens may come next, so that an answer is JSON of a schema, or matches an expression.

llguidance compiles and runs them (Earley over a lexer, byte by byte, so that tokens may end anywhere). Masks are
computed on a thread of their own, beside the model's next step. Knows tokens' bytes and no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from dapji.chat.schema import prepared, said, whole_subschemas
from dapji.errors import RequestError
from dapji.tokenizer import Tokenizer

_KEPT = 16
"""Compiled grammars: clients send the same ones with every request, and 40 tools take 40 ms."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must be. Checked when it meets a tokenizer."""

    parts: str
    """JSON: a list of grammars as llguidance has them, the first the whole, which may name the others."""

    @property
    def source(self) -> str:
        """As llguidance reads it."""
        return json.dumps({"grammars": json.loads(self.parts)})

    @staticmethod
    def json_schema(schema: Mapping[str, Any] | bool, where: str = "the JSON schema") -> Grammar:
        """JSON that is valid under a schema (draft 2020-12).

        Raises RequestError, which begins with `where`, for what is no schema, and for a keyword that is not supported.
        """
        return Grammar(json.dumps([{"json_schema": prepared(schema, where)}]))

    @staticmethod
    def json_object() -> Grammar:
        """Any JSON object."""
        return Grammar.json_schema({"type": "object"})

    @staticmethod
    def regex(pattern: str) -> Grammar:
        """Text that matches as a whole (Rust's regex syntax)."""
        return Grammar.lark(f"start: /{llguidance.regex_to_lark(pattern, '')}/")

    @staticmethod
    def lark(text: str) -> Grammar:
        """Lark's notation, with llguidance's extensions."""
        return Grammar(json.dumps([{"lark_grammar": text}]))

    @staticmethod
    def answer(lark: str, content: Grammar | None) -> Grammar:
        """A whole answer's grammar, which names that of its content `@content`."""
        first, *others = json.loads(content.parts) if content is not None else [None]
        named = [] if first is None else [{**first, "name": "content"}, *others]
        return Grammar(json.dumps([{"lark_grammar": lark}, *named]))

    @staticmethod
    def gbnf(text: str) -> Grammar:
        """llama.cpp's notation. Raises RequestError."""
        try:
            return Grammar.lark(gbnf_to_lark(text))
        except Exception as error:  # its parser raises whatever it meets
            raise RequestError(f"the GBNF grammar cannot be read: {error}") from None


class Grammars:
    """Of one tokenizer. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocab_size = tokenizer.vocab_size
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        self._tokenizer = llguidance.LLTokenizer(vocabulary, eos_token=sorted(tokenizer.stop_ids))
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="dapji-grammar")
        self._compiled = lru_cache(maxsize=_KEPT)(self._compile)

    def start(self, grammar: Grammar) -> Constraint:
        """For one answer. Raises RequestError where the grammar cannot be compiled; names what it has not."""
        matcher = self._compiled(grammar).deep_copy()
        return Constraint(matcher, grammar.source, self._vocab_size, self._threads)

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar.source, limits=limits)
        if matcher.is_error():
            raise next(
                _refusals(json.loads(grammar.parts)), RequestError(f"the grammar cannot be used: {matcher.get_error()}")
            )
        return matcher


def _refusals(parts: Sequence[Mapping[str, Any]]) -> Iterator[RequestError]:
    """What is wrong with the JSON schemas in a grammar: which keyword, and where."""
    for part in parts:
        schemas = map(json.loads, re.findall(r"^\w+: %json (.*)$", part.get("lark_grammar", ""), re.MULTILINE))
        for schema in [part["json_schema"]] if "json_schema" in part else schemas:
            if not (error := _error(schema)):
                continue
            for at, each in whole_subschemas(schema, schema):
                if _error(each) == error:
                    keywords = sorted(said(each), key=lambda key: (key == "type", key))  # the type is rarely to blame
                    blamed = [k for k in keywords if _error({o: v for o, v in each.items() if o != k}) != error]
                    place = "/".join([at, *blamed[:1]]) or "the whole"
                    told = error.partition(". Enable ")[0].splitlines()[-1]
                    yield RequestError(f"{schema['$comment']}: answers cannot be held to {place}: {told}")
                    break


def _error(schema: Mapping[str, Any]) -> str:
    """Why llguidance cannot use a schema; empty: it can."""
    return llguidance.LLMatcher.validate_grammar(json.dumps({"grammars": [{"json_schema": schema}]}))


class Constraint:
    """The tokens that may come next, given those so far: what `Request.constraint` wants."""

    def __init__(
        self, matcher: llguidance.LLMatcher, source: str, vocab_size: int, threads: ThreadPoolExecutor
    ) -> None:
        self.source = source
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._threads = threads
        self._ids: Future[NDArray[np.intp]] = threads.submit(self._compute)

    def allowed(self) -> NDArray[np.intp]:
        """Ids, rising. Waits until they are known. Raises RequestError where the grammar grew beyond llguidance's
        limits."""
        return self._ids.result()

    def push(self, token: int) -> None:
        """The token that was drawn, one of those allowed; begins to compute what may follow."""
        self._ids.result()
        self._matcher.consume_token(token)
        self._ids = self._threads.submit(self._compute)

    def _compute(self) -> NDArray[np.intp]:
        bits = llguidance.numpy.allocate_token_bitmask(1, self._vocab_size)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, bits, 0)
        mask = np.unpackbits(bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        ids = np.flatnonzero(mask.view(np.bool_))  # of bytes it takes six times as long
        if self._matcher.is_error() or not len(ids):
            raise RequestError(f"the grammar failed: {self._matcher.get_error() or 'nothing may follow'}")
        return ids


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.control.values())
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
