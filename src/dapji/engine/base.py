"""`BaseEngine`: what every engine answers to, whatever computes its tokens, and the iterators that it feeds.

An engine's jobs run somewhere else, on its own thread or another machine, and deliver what they have through a
callback. Here that becomes iterators and awaitables, and here is what can be checked before a job begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from dapji.engine.request import Output, Request, Scores
from dapji.errors import ContextError, RequestError, UnavailableError, UsageError
from dapji.models.config import Pooling

if TYPE_CHECKING:
    from dapji.models.adapter import Adapter

Deliver = Callable[[object], None]
"""Passes a result, the exception that ended the job, or None where it was cancelled, to who waits. Any thread; never
blocks or raises."""


class Handle(NamedTuple):
    """What was submitted, for who waits for it."""

    cancel: Callable[[], None]
    """Ends it, if it has not ended, and delivers None."""
    abandon: Callable[[], None]
    """For finalisers, which the collector may run on any thread, whatever that holds: takes no lock, delivers nothing.
    """


class Stream(Iterator[Output]):
    """The outputs of one request, as they come. Closing it, or letting it go, cancels the request."""

    _ended = True  # until the request is submitted: for the finaliser, if that fails

    def __init__(self, start: Callable[[Deliver], Handle]) -> None:
        self._queue: SimpleQueue[object] = SimpleQueue()
        self._handle = start(self._queue.put)
        self._ended = False

    def __next__(self) -> Output:
        """Waits for the next token. Raises what ended the request, if it was an error."""
        if self._ended:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, Output):
            self._ended |= item.finish is not None
            return item
        self._ended = True
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def close(self) -> None:
        """Cancels the request, if it has not ended: its blocks are free on return, and a waiting reader is released."""
        self._ended = True
        self._handle.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._ended:
            self._handle.abandon()


class AsyncStream(AsyncIterator[Output]):
    """`Stream` for one asyncio loop. Cancelling a read, as a timeout does, cancels the request."""

    _ended = True  # as in Stream

    def __init__(self, start: Callable[[Deliver], Handle]) -> None:
        import asyncio  # takes 20 ms, which a chat in the terminal can do without

        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[object] = asyncio.Queue()

        def deliver(item: object) -> None:  # does not refer to self, which would keep a stream that nobody reads alive
            with suppress(RuntimeError):  # the loop was closed: nobody reads any more
                loop.call_soon_threadsafe(queue.put_nowait, item)

        self._queue = queue
        self._handle = start(deliver)
        self._ended = False

    async def __anext__(self) -> Output:
        """Waits for the next token. Raises what ended the request, if it was an error."""
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._queue.get()
        except BaseException:
            await self.aclose()
            raise
        if isinstance(item, Output):
            self._ended |= item.finish is not None
            return item
        self._ended = True
        if isinstance(item, BaseException):
            raise item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancels the request, if it has not ended: its blocks are free on return, and a waiting reader is released."""
        self._ended = True
        self._handle.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._ended:
            self._handle.abandon()


class BaseEngine(ABC):
    """Answers requests of any number of threads and tasks. A context manager."""

    context: int
    """Most tokens of a prompt and its answer together."""
    end_tokens: frozenset[int]
    """The ids that end every answer of this model."""

    def __init__(self, *, context: int, vocab_size: int, end_tokens: Iterable[int]) -> None:
        """vocab_size: ids from here on are refused."""
        self.context = context
        self._vocab_size = vocab_size
        self.end_tokens = frozenset(end_tokens)
        self._check_ids("end_tokens", self.end_tokens)

    def generate(self, request: Request) -> Stream:
        """Submits the request; the iterator yields an Output for each token, the last with its Finish.

        Raises RequestError for ids outside the vocabulary, ContextError if the prompt and max_tokens do not fit the
        context together, UsageError if the engine is closed. What computing or `request.stop` raises comes out of the
        iterator.
        """
        return Stream(lambda deliver: self._generate(request, deliver))

    def agenerate(self, request: Request) -> AsyncStream:
        """`generate` for the running asyncio loop."""
        return AsyncStream(lambda deliver: self._generate(request, deliver))

    def score(
        self, tokens: Sequence[int] | NDArray[np.integer], *, start: int = 1, n_top: int = 0, adapter: int = 0
    ) -> Scores:
        """ln p(tokens[i] | tokens[:i]) for i from `start` (>= 1) on, and the n_top likeliest tokens at each.

        Runs in chunks, in the same steps as other requests; a prefix before `start` is read from the cache if it is
        there. Raises like `generate`.
        """
        queue: SimpleQueue[object] = SimpleQueue()
        handle = self._score(tokens, start, n_top, adapter, queue.put)
        try:
            return _scores(queue.get())
        except BaseException:
            handle.cancel()
            raise

    async def ascore(
        self, tokens: Sequence[int] | NDArray[np.integer], *, start: int = 1, n_top: int = 0, adapter: int = 0
    ) -> Scores:
        """`score` for the running asyncio loop. Cancelling it ends the work."""
        return _scores(await _delivered(lambda deliver: self._score(tokens, start, n_top, adapter, deliver)))

    def embed(
        self, texts: Sequence[Sequence[int] | NDArray[np.integer]], *, pooling: Pooling, adapter: int = 0
    ) -> NDArray[np.float32]:
        """[n, D]: what `pooling` makes of the hidden states (the final norm's output) of each text's tokens; the length
        of the vectors is not made 1. [0, 0] of no texts.

        Runs in chunks, many texts and other requests in one step, and never holds the states of a whole text. A prefix
        is read from the cache where pooling wants the last state alone. Raises like `generate`.
        """
        queues: list[SimpleQueue[object]] = [SimpleQueue() for _ in texts]
        handles: list[Handle] = []
        try:
            for text, queue in zip(texts, queues, strict=True):
                handles.append(self._embed(text, pooling, adapter, queue.put))
            vectors = [_vector(queue.get()) for queue in queues]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return np.stack(vectors) if vectors else np.empty((0, 0), dtype=np.float32)

    async def aembed(
        self, tokens: Sequence[int] | NDArray[np.integer], *, pooling: Pooling, adapter: int = 0
    ) -> NDArray[np.float32]:
        """[D]: `embed` of one text, for the running asyncio loop. Cancelling it ends the work."""
        return _vector(await _delivered(lambda deliver: self._embed(tokens, pooling, adapter, deliver)))

    def check_text(self, tokens: Sequence[int] | NDArray[np.integer]) -> None:
        """Raises RequestError where a text to embed has no tokens, ContextError where it has too many."""
        if len(tokens) == 0:
            raise RequestError("a text to embed must have at least one token, got 0")
        if len(tokens) > self.context:
            raise ContextError(
                f"the text ({len(tokens)} tokens) exceeds the context ({self.context} tokens)",
                hint="embed it in pieces, or open the model with a longer context",
            )

    def add_adapter(self, adapter: Adapter) -> int:
        """The number by which requests choose it from now on. Raises ConfigError where it does not fit the model,
        UnavailableError where the engine runs none."""
        raise UnavailableError("this engine runs no adapters")

    def remove_adapter(self, number: int) -> None:
        """Frees it. Raises UsageError while requests use it, or where there is none."""
        raise UsageError(f"there is no adapter {number}")

    @abstractmethod
    def close(self) -> None:
        """Ends what still runs with a UsageError. May be repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(self, request: Request, deliver: Deliver) -> Handle:
        prompt = self._token_ids("prompt", request.prompt)
        self._check_ids("stop_tokens", request.stop_tokens)
        self._check_ids("logit_bias", request.sampling.logit_bias)
        if request.logprobs is not None and request.logprobs > self._vocab_size:
            raise RequestError(f"logprobs ({request.logprobs}) must be at most the vocabulary's {self._vocab_size}")
        room = self._room(len(prompt), request.max_tokens)
        stop_tokens = request.stop_tokens if request.ignore_eos else request.stop_tokens | self.end_tokens
        return self._submit_generation(request, prompt, room, stop_tokens, deliver)

    def _score(
        self,
        tokens: Sequence[int] | NDArray[np.integer],
        start: int,
        n_top: int,
        adapter: int,
        deliver: Deliver,
    ) -> Handle:
        if not 1 <= start < len(tokens):
            raise RequestError(f"start ({start}) must be from 1 to the number of tokens less one ({len(tokens) - 1})")
        if not 0 <= n_top <= self._vocab_size:
            raise RequestError(f"n_top ({n_top}) must be from 0 to the vocabulary's {self._vocab_size}")
        return self._submit_scoring(self._token_ids("tokens", tokens), start, n_top, adapter, deliver)

    def _embed(
        self, tokens: Sequence[int] | NDArray[np.integer], pooling: Pooling, adapter: int, deliver: Deliver
    ) -> Handle:
        self.check_text(tokens)
        return self._submit_embedding(self._token_ids("tokens", tokens), pooling, adapter, deliver)

    @abstractmethod
    def _submit_generation(
        self, request: Request, prompt: NDArray[np.int32], room: int, stop_tokens: frozenset[int], deliver: Deliver
    ) -> Handle:
        """Begins to deliver an Output for each token. room: most tokens of the answer. stop_tokens: all that end it."""

    @abstractmethod
    def _submit_scoring(
        self, tokens: NDArray[np.int32], start: int, n_top: int, adapter: int, deliver: Deliver
    ) -> Handle:
        """Will deliver Scores. Raises ContextError where the text is too long."""

    @abstractmethod
    def _submit_embedding(self, tokens: NDArray[np.int32], pooling: Pooling, adapter: int, deliver: Deliver) -> Handle:
        """Will deliver the vector [D] float32 that `pooling` makes of the text's hidden states."""

    def _room(self, n_prompt: int, max_tokens: int | None) -> int:
        """How many tokens the answer may have."""
        left = self.context - n_prompt
        if left < 1:
            raise ContextError(
                f"the prompt ({n_prompt} tokens) leaves no room for an answer in the context ({self.context} tokens)",
                hint="shorten the prompt, or open the model with a longer context",
            )
        if max_tokens is not None and max_tokens > left:
            raise ContextError(
                f"the prompt ({n_prompt} tokens) and max_tokens ({max_tokens}) together exceed the context "
                f"({self.context} tokens)",
                hint="shorten the prompt, ask for fewer tokens, or open the model with a longer context",
            )
        return left if max_tokens is None else max_tokens

    def _token_ids(self, name: str, tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError(f"{name} must be a sequence of integers, got {ids.ndim} dimensions of {ids.dtype}")
        wrong = np.flatnonzero((ids < 0) | (ids >= self._vocab_size))
        if len(wrong):
            raise RequestError(
                f"{name}[{wrong[0]}] must be a token id from 0 to {self._vocab_size - 1}, got {ids[wrong[0]]}"
            )
        return ids.astype(np.int32)

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise RequestError(f"{name} must hold token ids from 0 to {self._vocab_size - 1}, got {token}")


async def _delivered(submit: Callable[[Deliver], Handle]) -> object:
    """What a job delivers that delivers once. Cancelling it cancels the job."""
    import asyncio  # as in AsyncStream

    loop = asyncio.get_running_loop()
    result: asyncio.Future[object] = loop.create_future()

    def tell(item: object) -> None:
        if not result.done():
            result.set_result(item)

    def deliver(item: object) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(tell, item)

    handle = submit(deliver)
    try:
        return await result
    except BaseException:
        handle.cancel()
        raise


def _scores(result: object) -> Scores:
    """What a scoring job delivered; raises what ended it."""
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, Scores)
    return result


def _vector(result: object) -> NDArray[np.float32]:
    """What an embedding job delivered; raises what ended it."""
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, np.ndarray)
    return result
