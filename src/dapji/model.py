"""`load()` and `Model`: files become a tokenizer, a template and an engine that work together.

This is where token ids meet text. Sits above the engine; knows neither the terminal nor HTTP.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from dapji.chat.formats import ANY_TOOL, Content, Event, Parser, Reasoning, ToolCall, ToolChoice
from dapji.engine import BaseEngine, Engine, Finish, Logprobs, Output, Request, Sampling, StopStrings
from dapji.errors import DapjiError, RequestError, TemplateError, UsageError
from dapji.files import Files, default_context, open_files
from dapji.models.adapter import Adapter
from dapji.models.config import Pooling
from dapji.models.executor import Executor, ExecutorKind, default_kind, open_executor
from dapji.models.size import cached_bytes
from dapji.ops import native
from dapji.ops.batch import KV_BLOCK
from dapji.ops.reference import KvFormat
from dapji.proof.record import has_part
from dapji.tokenizer import Detokenizer, Tokenizer
from dapji.weights.embedding import EmbeddingConfig, RankHead
from dapji.weights.panel_cache import PanelCache

if TYPE_CHECKING:
    from dapji.chat import ChatTemplate
    from dapji.chat.grammar import Grammar, Grammars
    from dapji.engine.vllm_http import Address

_ARGUMENTS = ("self", "messages", "tools", "name", "add_generation_prompt")
"""Of `ChatTemplate.render`, which are no variables."""
_PROBE = "def f(x): return 3.14159  # 안녕, été\n"
"""A text that hardly two vocabularies cut alike."""


def load(
    name_or_path: str | Path,
    *,
    executor: ExecutorKind | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv: KvFormat = "f16",
    kv_memory: int | None = None,
    max_running: int = 64,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    speculate: bool = True,
    adapter: str | Path | None = None,
) -> Model:
    """Open a model and make it ready to answer.

    name_or_path: an installed model (`dapji list`), a GGUF file, or a folder in the Hugging Face layout.
    executor: "native", "torch" or "reference"; by default native where it was built.
    context: the longest conversation in tokens, prompt and answer together; default: the model's, at most 8192.
    threads: native only; kv: format of the cache; kv_memory: bytes that it may take, for several conversations side by
    side; at least what one of `context` takes, which is the default. max_running: most requests computed at once, up to
    512. device, dtype (of weights and activations): torch
    only.
    speculate: compute tokens ahead where a text repeats itself (docs/engine.md); the answers are the same.
    adapter: PEFT's folder or a GGUF file, for every answer that does not choose another (docs/adapters.md).
    Where the model or the adapter has a certificate, the quick part of it is checked (docs/proof.md).
    Raises ModelNotFound, FormatError, ConfigError, TokenizerError, CertificateError, UnavailableError.
    """
    files = open_files(name_or_path)
    tokenizer = files.tokenizer()  # before the executor, which takes longer: what is wrong with it shows at once
    _check(files.checkpoint.path, tokenizer, files)
    change = None if adapter is None else _adapter(files, tokenizer, adapter)
    kind = executor or default_kind()
    if context is None:
        context = default_context(files.config)
    block_bytes = KV_BLOCK * cached_bytes(files.config, kv)
    n_blocks = max(-(-context // KV_BLOCK), (kv_memory or 0) // block_bytes)
    opened = open_executor(
        kind,
        files.config,
        files.tensors,
        context=context,
        n_blocks=n_blocks,
        threads=threads,
        kv=kv,
        device=device,
        dtype=dtype,
        cache=PanelCache.of(files.checkpoint, native.panels_version()) if kind == "native" else None,
    )
    engine = Engine(
        opened,
        end_tokens=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
        max_running=max_running,
        speculate=speculate,
    )
    memory = files.checkpoint.nbytes + n_blocks * block_bytes
    model = Model(files, tokenizer, engine, executor=opened, memory=memory)
    if change is not None:
        model.adapter = model._add_adapter(Path(str(adapter)).stem, change)
    return model


def _check(path: Path, tokenizer: Tokenizer, files: Files | None) -> None:
    """The quick part of a certificate, where there is one; as `certificate.check`."""
    if has_part(path, "certificate"):
        from dapji.proof.certificate import check

        check(path, tokenizer, files)


def _adapter(files: Files, tokenizer: Tokenizer, path: str | Path) -> Adapter:
    path = Path(path).expanduser()
    adapter = files.adapter(path)
    _check(path, tokenizer, None)
    return adapter


class LoadedAdapter(NamedTuple):
    number: int
    """As the engine knows it."""
    nbytes: int
    """Of its matrices."""


def load_on_vllm(path: Path, address: Address) -> Model:
    """The model of a folder, whose tokens a vLLM server computes that has the same folder.

    Raises what `load` raises, UnavailableError where the server does not answer, UsageError where it reads a text
    otherwise than the folder's tokenizer does.
    """
    from dapji.engine.vllm import VllmEngine  # asyncio takes its time, which a chat in the terminal can do without

    files = open_files(path)
    tokenizer = files.tokenizer()
    _check(files.checkpoint.path, tokenizer, files)
    engine = VllmEngine(address, end_tokens=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size)
    theirs, ours = engine.tokenize(_PROBE), tokenizer.encode(_PROBE)
    if theirs != ours:
        engine.close()
        raise UsageError(
            f"vLLM at {address} serves another model than {path}: it reads {_PROBE!r} as {theirs}, the folder's "
            f"tokenizer as {ours}"
        )
    return Model(files, tokenizer, engine, memory=0)


class Model:
    """A model that answers. A context manager; `close` frees weights and cache."""

    def __init__(
        self, files: Files, tokenizer: Tokenizer, engine: BaseEngine, *, memory: int, executor: Executor | None = None
    ) -> None:
        """Owns the engine from here on, and the executor that it runs on, if it runs on one. memory: bytes of weights
        and cache in this process."""
        self.files = files
        self.config = files.config
        self.tokenizer = tokenizer
        self.engine = engine
        self.executor = executor
        self.memory = memory
        self.name = files.checkpoint.path.name
        self.adapter: str | None = None
        """That of answers which do not choose one; None: they come from the model as it is."""
        self.adapters: dict[str, LoadedAdapter] = {}
        """Those that answers may choose, by name."""
        self._sampling = files.sampling()

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's own chat template. Raises TemplateError where it has none."""
        from dapji.chat import ChatTemplate

        return ChatTemplate.of(self.tokenizer)

    @cached_property
    def grammars(self) -> Grammars:
        """Of the model's tokenizer."""
        from dapji.chat.grammar import Grammars  # takes its time, which an answer without a grammar can do without

        return Grammars(self.tokenizer)

    @cached_property
    def embedding(self) -> EmbeddingConfig:
        """How a text becomes one vector. Raises RequestError where the model's files want what is not supported."""
        try:
            return self.files.embedding()
        except DapjiError as error:
            raise RequestError(f"{self.name} gives no embeddings: {error.message}", hint=error.hint) from error

    @cached_property
    def _rank_head(self) -> RankHead | None:
        try:
            return self.files.rank_head()
        except DapjiError as error:
            raise RequestError(f"{self.name} cannot rank: {error.message}", hint=error.hint) from error

    @property
    def summary(self) -> str:
        """One line: size, bits per weight, context."""
        n = sum(tensor.rows * tensor.cols for tensor in self.files.tensors.values())
        size = f"{n / 1e9:.3g}B" if n >= 1e9 else f"{n / 1e6:.3g}M"
        bits = 8 * self.files.checkpoint.nbytes / n
        return f"{size} parameters of {bits:.2g} bits, context {self.engine.context}"

    def load_adapter(self, name: str, path: str | Path) -> None:
        """What answers may choose from now on by that name, beside others: PEFT's folder or a GGUF file.

        Raises UsageError where the name is taken; ModelNotFound, FormatError and, where it is not for this model,
        ConfigError.
        """
        if name in self.adapters:
            raise UsageError(f"there is an adapter {name!r} already")
        self._add_adapter(name, _adapter(self.files, self.tokenizer, path))

    def _add_adapter(self, name: str, adapter: Adapter) -> str:
        self.adapters[name] = LoadedAdapter(self.engine.add_adapter(adapter), adapter.nbytes)
        return name

    def unload_adapter(self, name: str) -> None:
        """Frees it. Raises UsageError while answers use it, or where there is none."""
        if name not in self.adapters:
            raise UsageError(f"there is no adapter {name!r}")
        self.engine.remove_adapter(self.adapters[name].number)
        del self.adapters[name]

    def adapter_number(self, name: str | None) -> int:
        """As the engine knows it; None: that of `adapter`. Raises RequestError where there is none of that name."""
        name = self.adapter if name is None else name
        if name is None:
            return 0
        if name not in self.adapters:
            there = f"there are {', '.join(self.adapters)}" if self.adapters else "none is loaded"
            raise RequestError(f"there is no adapter {name!r}", hint=there)
        return self.adapters[name].number

    def options(
        self,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """The options of an answer, all of them, with the model's own defaults filled in.

        max_tokens, logprobs: as in `Request`. stop: the answer ends before the first of these texts. grammar: what the
        answer must be; unless max_tokens cuts it off, it is. adapter: a name of `adapters`; None: that of `adapter`.
        sampling: fields of `Sampling`. Raises RequestError for an unknown option or a value out of range.
        """
        own = {
            "max_tokens": max_tokens,
            "stop": (stop,) if isinstance(stop, str) else tuple(stop),
            "logprobs": logprobs,
            "grammar": grammar,
            "adapter": adapter,
        }
        known = {field.name for field in fields(Sampling)}
        if unknown := sampling.keys() - known:
            names = ", ".join([*sorted(known), *own])
            raise RequestError(f"unknown option {min(unknown)!r}", hint=f"options: {names}")
        return asdict(Sampling(**(self._sampling | sampling))) | own

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        thinking: bool | str | None = None,
        tool_choice: ToolChoice = ANY_TOOL,
        **options: Any,
    ) -> Reply:
        """The answer to a conversation of {"role", "content"} messages; options as in `options`.

        tools: what the model may call, each {"type": "function", "function": {"name", "description", "parameters"}}
        with a JSON schema as parameters. variables: what else the template reads. thinking: whether the model reasons
        before it answers, or how much (low, medium, high), where its template lets one choose; None: as it does.
        tool_choice: which tools it may or must call; arguments are always valid under the tool's schema, unless
        max_tokens cuts the answer off. A grammar is of the content, after the reasoning and beside calls.
        Raises TemplateError, RequestError, ContextError.
        """
        prepared = self.prepare_chat(
            messages, tools=tools, variables=variables, thinking=thinking, tool_choice=tool_choice, **options
        )
        return Reply(self.engine, prepared)

    def complete(self, text: str, **options: Any) -> Reply:
        """What follows `text`, without a chat template: control tokens in it are plain text. Raises like `chat`."""
        return Reply(self.engine, self.prepare_completion(text, **options))

    def prepare_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        thinking: bool | str | None = None,
        tool_choice: ToolChoice = ANY_TOOL,
        grammar: Grammar | None = None,
        **options: Any,
    ) -> Prepared:
        """All of `chat` but its answer: for `AsyncReply`."""
        given = dict(variables or {})
        if reserved := sorted(given.keys() & _ARGUMENTS):
            raise TemplateError(f"{reserved[0]!r} is no variable of a template's, but an argument of its own")
        chosen = {} if thinking is None else self.template.reasoning(thinking, tools=tools)
        rendered = self.template.render(messages, tools=tools, **chosen | given)
        parser, answer = self.template.answer(rendered, tools=tools, choice=tool_choice, content=grammar)
        return self._prepare(self.template.encode(rendered), {**options, "grammar": answer}, parser, continuation=False)

    def prepare_completion(self, prompt: str | Sequence[int], **options: Any) -> Prepared:
        """All of `complete` but its answer. prompt: a text, or token ids as they are."""
        tokens = self.encode(prompt) if isinstance(prompt, str) else prompt
        return self._prepare(tokens, options, Parser(), continuation=prompt != "")

    def encode(self, text: str) -> list[int]:
        """The ids of a text as `complete` reads it: with BOS at its beginning, if the model wants one."""
        return self._begin + self.tokenizer.encode(text)

    @property
    def _begin(self) -> list[int]:
        return [self.tokenizer.bos_id] if self.tokenizer.add_bos and self.tokenizer.bos_id is not None else []

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, dimensions: int | None = None, adapter: str | None = None
    ) -> NDArray[np.float32]:
        """[n, D]: a vector of length 1 for each text, or for token ids as they are; `embedding` says how it is made.

        dimensions: the vectors' first values alone, where the model was trained for that. adapter: as in `options`.
        Raises RequestError, ContextError (no text is cut), TokenizerError.
        """
        prepared = self.prepare_embeddings(texts, dimensions=dimensions)
        number = self.adapter_number(adapter)
        pooled = self.engine.embed(prepared.texts, pooling=prepared.pooling, adapter=number)
        return prepared.vectors(pooled.reshape(len(texts), self.config.dim))

    def rerank(self, query: str, documents: Sequence[str], *, adapter: str | None = None) -> list[float]:
        """How relevant each document is to the query, higher is more; see `Reranking.method`. Raises like `embed`."""
        prepared = self.prepare_reranking(query, documents)
        number = self.adapter_number(adapter)
        return prepared.scores(self.engine.embed(prepared.texts, pooling=prepared.pooling, adapter=number))

    def prepare_embeddings(
        self, texts: Sequence[str | Sequence[int]], *, dimensions: int | None = None, truncate: bool = False
    ) -> Embeddings:
        """All of `embed` but the computation. truncate: texts that are too long lose their ends."""
        config = self.embedding
        if dimensions is not None and dimensions not in config.dimensions and dimensions != self.config.dim:
            raise RequestError(
                f"dimensions ({dimensions}) must be the model's {self.config.dim}: its files do not say that it was "
                "trained for that many",
                hint="leave it out",
            )
        bos, end = self._begin, list(self.tokenizer.text_end)
        read: list[list[int]] = []
        for text in texts:
            room = self.engine.context - len(bos) - len(end) if truncate else None
            ids = [*bos, *self.tokenizer.encode(text)[:room], *end] if isinstance(text, str) else list(text)
            self.engine.check_text(ids)
            read.append(ids)
        return Embeddings(texts=read, pooling=config.pooling, dimensions=dimensions)

    def prepare_reranking(self, query: str, documents: Sequence[str]) -> Reranking:
        """All of `rerank` but the computation."""
        if self._rank_head is None:
            prepared = self.prepare_embeddings([query, *documents])
            return Reranking(texts=prepared.texts, pooling=prepared.pooling, head=None)
        template = self.tokenizer.chat_templates.get("rerank")
        if template is None:
            raise RequestError(f"{self.name} cannot rank: it has no template `rerank`, which says what it reads")
        texts = [self._filled(template, {"{query}": query, "{document}": document}) for document in documents]
        for text in texts:
            self.engine.check_text(text)
        return Reranking(texts=texts, pooling="last", head=self._rank_head)

    def _filled(self, template: str, values: Mapping[str, str]) -> list[int]:
        """The ids of a template whose places are filled. Control tokens count in the template alone."""
        parts: list[str | int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, values))})", template):
            parts += [values[piece]] if piece in values else self.tokenizer.split_control(piece)
        joined: list[str | int] = []
        for part in parts:  # texts side by side are one text
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        return self.tokenizer.encode_parts(joined)

    def _prepare(
        self, prompt: Sequence[int], options: Mapping[str, Any], parser: Parser, *, continuation: bool
    ) -> Prepared:
        """continuation: the answer goes on a text, so that a space at its beginning belongs to it."""
        chosen = self.options(**options)
        max_tokens, stop, logprobs, grammar, adapter = (
            chosen.pop(name) for name in ("max_tokens", "stop", "logprobs", "grammar", "adapter")
        )
        markers = {token: spelling for spelling, token in self.tokenizer.control.items() if parser.wants(spelling)}
        text = _Text(Detokenizer(self.tokenizer, continuation=continuation), StopStrings(stop), markers)
        request = Request(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=Sampling(**chosen),
            stop=text.push,
            constraint=None if grammar is None else self.grammars.start(grammar),
            logprobs=logprobs,
            adapter=self.adapter_number(adapter),
        )
        return Prepared(request=request, text=text, parser=parser)

    def close(self) -> None:
        """Ends what still runs, frees the executor. May be repeated."""
        self.engine.close()
        if self.executor is not None:
            self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings:
    """Texts to embed, and what becomes of what the engine makes of them."""

    texts: Sequence[Sequence[int]]
    pooling: Pooling
    dimensions: int | None

    def vectors(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dimensions] of length 1, of pooled [n, D]."""
        return _unit(pooled[:, : self.dimensions])


@dataclass(frozen=True, kw_only=True, eq=False)
class Reranking:
    """The same of a query and documents."""

    texts: Sequence[Sequence[int]]
    pooling: Pooling
    head: RankHead | None

    @property
    def method(self) -> Literal["classifier", "cosine"]:
        """classifier: the probability that the model's own head gives to yes. cosine: of the embeddings, of a model
        that was not made to rank."""
        return "cosine" if self.head is None else "classifier"

    def scores(self, pooled: NDArray[np.float32]) -> list[float]:
        """Of each document. pooled: [n, D] of `texts`."""
        if self.head is None:
            query, *documents = _unit(pooled)
            return [float(document @ query) for document in documents]
        yes, no = (pooled.astype(np.float64) @ self.head.weight.T).T
        scores: list[float] = np.exp(-np.logaddexp(0, no - yes)).tolist()
        return scores


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each of length 1; one of zeros stays what it is."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


class _Piece(NamedTuple):
    text: str
    control: bool
    """The spelling of a control token that is a marker of the answer's format."""


class _Text:
    """Turns the tokens of an answer into text, up to a stop string. Knows nothing of the `Reply`: the engine holds on
    to this, and a reply that is let go must end."""

    def __init__(self, detokenizer: Detokenizer, stop: StopStrings, markers: Mapping[int, str]) -> None:
        """`markers`: the control tokens that are kept."""
        self._detokenizer = detokenizer
        self._stop = stop
        self._markers = markers
        self.pieces: deque[list[_Piece]] = deque()
        """One list for each token pushed."""

    def push(self, token: int) -> bool:
        """Runs on the engine's thread, before the token's Output is delivered. True: a stop string was found."""
        if token in self._markers:  # ends what may be a stop string, and a character that lacks bytes
            self.pieces.append([*self.end(), _Piece(self._markers[token], True)])
        else:
            self.pieces.append([_Piece(self._stop.feed(self._detokenizer.push(token)), False)])
        return self._stop.found is not None

    @property
    def stop_string(self) -> str | None:
        """The one that was found."""
        return self._stop.found

    def end(self) -> list[_Piece]:
        """What was held back, when no more tokens come; nothing after a stop string."""
        return [_Piece(self._stop.feed(self._detokenizer.flush()) + self._stop.flush(), False)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A request, and what makes an answer of its tokens. For one answer."""

    request: Request
    text: _Text
    parser: Parser


class _Answer:
    """An answer so far."""

    def __init__(self, prepared: Prepared) -> None:
        self.text = ""
        """The content that has been passed on so far."""
        self.reasoning = ""
        """What the model wrote to itself before it answered."""
        self.tool_calls: list[ToolCall] = []
        self.tokens: list[int] = []
        """Every generated token, an end token included."""
        self.logprobs: list[Logprobs] = []
        """One for each token, where they were asked for."""
        self.finish: Finish | None = None
        """Why and how it ended; None while it runs, and when it was closed before."""
        self.prompt_length = len(prepared.request.prompt)
        """Tokens."""
        self._text = prepared.text
        self._parser = prepared.parser
        self._events: deque[Event] = deque()

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._text.stop_string

    def _read(self, output: Output) -> None:
        self.tokens.append(output.token)
        if output.logprobs is not None:
            self.logprobs.append(output.logprobs)
        self.finish = output.finish
        ended_by_token = self.finish is not None and self.finish.stop_token is not None
        pieces = [] if ended_by_token else self._text.pieces.popleft()  # an end token has no text
        if self.finish is not None:
            pieces += self._text.end()
        for piece in pieces:
            self._events += self._parser.feed(piece.text, control=piece.control)
        if self.finish is not None:
            self._events += self._parser.finish()

    def _told(self, event: Event) -> Event:
        if isinstance(event, Content):
            self.text += event.text
        elif isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, ToolCall):
            self.tool_calls.append(event)
        return event


class Reply(_Answer, Iterator[str]):
    """The answer's content as it is generated, in pieces that never split a character; reasoning and tool calls apart.

    Which is which tells the format of the model's chat template (docs/answers.md). Letting it go ends the generation.
    `Model.chat` and `Model.complete` make it.
    """

    def __init__(self, engine: BaseEngine, prepared: Prepared) -> None:
        super().__init__(prepared)
        self._stream = engine.generate(prepared.request)

    def __next__(self) -> str:
        """Waits for the next piece of content. Raises what ended the generation, if it was an error."""
        for event in self.events():
            if isinstance(event, Content):
                return event.text
        raise StopIteration

    def events(self) -> Iterator[Event]:
        """Everything in the order of the answer, from where it has been read so far. Waits and raises as `__next__`."""
        while True:
            while self._events:
                yield self._told(self._events.popleft())
            output = None if self.finish is not None else next(self._stream, None)
            if output is None:
                return
            self._read(output)

    def close(self) -> None:
        """End the generation now."""
        self._stream.close()


class AsyncReply(_Answer):
    """`Reply` for the running asyncio loop. Cancelling who reads ends the generation."""

    def __init__(self, engine: BaseEngine, prepared: Prepared) -> None:
        """Raises as `Model.chat` does where the request does not fit."""
        super().__init__(prepared)
        self._stream = engine.agenerate(prepared.request)

    async def events(self) -> AsyncIterator[Event]:
        """Everything in the order of the answer, from where it has been read so far."""
        while True:
            while self._events:
                yield self._told(self._events.popleft())
            output = None if self.finish is not None else await anext(self._stream, None)
            if output is None:
                return
            self._read(output)

    async def whole(self) -> Self:
        """Itself, when it has ended."""
        async for _ in self.events():
            pass
        return self

    async def aclose(self) -> None:
        """End the generation now."""
        await self._stream.aclose()
