"""`Engine`: many requests at once on one executor. The background thread, its lock, and the iterators that it feeds.

Takes and returns token ids; knows neither text nor templates nor files. Above it sits dapji.model; below it the
executor. docs/engine.md tells a request's life.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Condition, Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from dapji.engine.generation import Generation, Job, Scoring
from dapji.engine.request import Output, Request, Scores
from dapji.engine.scheduler import Chunk, Scheduler
from dapji.errors import ContextError, RequestError, UsageError
from dapji.ops.batch import KV_BLOCK

if TYPE_CHECKING:
    from dapji.models.executor import Executor


class Stream(Iterator[Output]):
    """The outputs of one request, as they come. Closing it, or letting it go, cancels the request."""

    _ended = True  # until the request is submitted: for the finaliser, if that fails

    def __init__(self, engine: Engine, start: Callable[[Callable[[object], None]], Job]) -> None:
        self._queue: SimpleQueue[object] = SimpleQueue()
        self._engine = engine
        self._job = start(self._queue.put)
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
        self._engine._cancel(self._job)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._ended:
            self._engine._abandon(self._job)


class AsyncStream(AsyncIterator[Output]):
    """`Stream` for one asyncio loop. Cancelling a read, as a timeout does, cancels the request."""

    _ended = True  # as in Stream

    def __init__(self, engine: Engine, start: Callable[[Callable[[object], None]], Job]) -> None:
        import asyncio  # takes 20 ms, which a chat in the terminal can do without

        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[object] = asyncio.Queue()

        def deliver(item: object) -> None:  # does not refer to self, which would keep a stream that nobody reads alive
            with suppress(RuntimeError):  # the loop was closed: nobody reads any more
                loop.call_soon_threadsafe(queue.put_nowait, item)

        self._queue = queue
        self._engine = engine
        self._job = start(deliver)
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
        self._engine._cancel(self._job)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._ended:
            self._engine._abandon(self._job)


class Engine:
    """Runs requests of any number of threads and tasks on one executor, mixed in every step.

    A context manager. Its thread starts with the first request and ends with `close()`. The executor stays open: who
    opened it closes it, after the engine; nobody else may use it meanwhile.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        end_tokens: Iterable[int] = (),
        vocab_size: int | None = None,
        step_tokens: int = 512,
        mixed_prompt_tokens: int = 64,
        max_running: int = 64,
        speculate: bool = True,
    ) -> None:
        """end_tokens: the ids that end every answer of this model.
        vocab_size: ids from here on are padding of the weights, never drawn and refused in prompts; default: none are.
        step_tokens: most tokens in a step.
        mixed_prompt_tokens: most prompt tokens in a step in which a stream also advances: fewer keep the streams
        smoother while a long prompt is read, more read it faster.
        max_running: most requests in a step.
        speculate: compute tokens ahead where a text repeats itself and few requests run; the answers are the same.

        Raises UsageError for numbers that make no sense: every running request needs a token of every step.
        """
        padded_size = executor.config.vocab_size
        self._vocab_size = padded_size if vocab_size is None else vocab_size
        if not 1 <= self._vocab_size <= padded_size:
            raise UsageError(f"vocab_size ({vocab_size}) must be from 1 to the model's {padded_size}")
        if not 1 <= max_running <= step_tokens:
            raise UsageError(f"max_running ({max_running}) must be from 1 to step_tokens ({step_tokens})")
        if mixed_prompt_tokens < 1:
            raise UsageError(f"mixed_prompt_tokens ({mixed_prompt_tokens}) must be at least 1")
        self._executor = executor
        self._speculate = speculate
        self.end_tokens = frozenset(end_tokens)
        self._check_ids("end_tokens", self.end_tokens)
        self.context = min(executor.context, executor.n_blocks * KV_BLOCK)
        """Most tokens of a prompt and its answer together."""
        self._scheduler: Scheduler[Job] = Scheduler(
            n_blocks=executor.n_blocks,
            budget=step_tokens,
            mixed_prompt_tokens=mixed_prompt_tokens,
            max_running=max_running,
        )
        self._wake = Condition(Lock())  # guards the scheduler and the fields below; never held during a step
        self._thread: Thread | None = None
        self._closed = False
        self._failure: BaseException | None = None  # what ended the thread, if it was not `close`
        self._abandoned: deque[Job] = deque()

    def generate(self, request: Request) -> Stream:
        """Submits the request; the iterator yields an Output for each token, the last with its Finish.

        Raises RequestError for ids outside the vocabulary, ContextError if the prompt and max_tokens do not fit the
        context together, UsageError if the engine is closed. What the executor or `request.stop` raises comes out of
        the iterator.
        """
        return Stream(self, lambda deliver: self._submit_generation(request, deliver))

    def agenerate(self, request: Request) -> AsyncStream:
        """`generate` for the running asyncio loop."""
        return AsyncStream(self, lambda deliver: self._submit_generation(request, deliver))

    def score(self, tokens: Sequence[int] | NDArray[np.integer], *, start: int = 1, n_top: int = 0) -> Scores:
        """ln p(tokens[i] | tokens[:i]) for i from `start` (>= 1) on, and the n_top likeliest tokens at each.

        Runs in chunks, in the same steps as other requests; a prefix before `start` is read from the cache if it is
        there. Raises like `generate`.
        """
        queue: SimpleQueue[object] = SimpleQueue()
        job = self._submit_scoring(tokens, start, n_top, queue.put)
        try:
            return _scores(queue.get())
        except BaseException:
            self._cancel(job)
            raise

    async def ascore(self, tokens: Sequence[int] | NDArray[np.integer], *, start: int = 1, n_top: int = 0) -> Scores:
        """`score` for the running asyncio loop. Cancelling it ends the work."""
        import asyncio  # as in AsyncStream

        loop = asyncio.get_running_loop()
        result: asyncio.Future[object] = loop.create_future()

        def tell(item: object) -> None:
            if not result.done():
                result.set_result(item)

        def deliver(item: object) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(tell, item)

        job = self._submit_scoring(tokens, start, n_top, deliver)
        try:
            return _scores(await result)
        except BaseException:
            self._cancel(job)
            raise

    def close(self) -> None:
        """Waits for the step under way, ends what still runs with a UsageError, stops the thread. May be repeated."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit_generation(self, request: Request, deliver: Callable[[object], None]) -> Generation:
        prompt = self._token_ids("prompt", request.prompt)
        self._check_ids("stop_tokens", request.stop_tokens)
        self._check_ids("logit_bias", request.sampling.logit_bias)
        if request.logprobs is not None and request.logprobs > self._vocab_size:
            raise RequestError(f"logprobs ({request.logprobs}) must be at most the vocabulary's {self._vocab_size}")
        max_tokens = self._room(len(prompt), request.max_tokens)
        tokens = np.empty(len(prompt) + max_tokens, dtype=np.int32)
        tokens[: len(prompt)] = prompt
        stop_tokens = request.stop_tokens if request.ignore_eos else request.stop_tokens | self.end_tokens
        job = Generation(
            request,
            tokens,
            stop_tokens=stop_tokens,
            vocab_size=self._vocab_size,
            speculate=self._speculate,
            deliver=deliver,
        )
        self._submit(job)
        return job

    def _submit_scoring(
        self, tokens: Sequence[int] | NDArray[np.integer], start: int, n_top: int, deliver: Callable[[object], None]
    ) -> Scoring:
        if not 1 <= start < len(tokens):
            raise RequestError(f"start ({start}) must be from 1 to the number of tokens less one ({len(tokens) - 1})")
        if not 0 <= n_top <= self._vocab_size:
            raise RequestError(f"n_top ({n_top}) must be from 0 to the vocabulary's {self._vocab_size}")
        ids = self._token_ids("tokens", tokens)
        if len(ids) - 1 > self.context:
            raise ContextError(
                f"the text ({len(ids)} tokens, of which {len(ids) - 1} are read) exceeds the context "
                f"({self.context} tokens)",
                hint="score it in pieces, or open the model with a longer context",
            )
        job = Scoring(ids, start=start, n_top=n_top, deliver=deliver)
        self._submit(job)
        return job

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

    def _submit(self, job: Job) -> None:
        with self._wake:
            if self._closed:
                raise UsageError("the engine is closed") from self._failure
            if self._thread is None:
                self._thread = Thread(target=self._run, name="dapji-engine", daemon=True)
                self._thread.start()
                atexit.register(self.close)  # the interpreter must not end under a step of native code
            self._scheduler.add(job)
            self._wake.notify()

    def _cancel(self, job: Job) -> None:
        with self._wake:
            self._scheduler.remove(job)
        job.deliver(None)

    def _abandon(self, job: Job) -> None:
        """`_cancel` for finalisers: the collector may run them on a thread that holds the lock. Seen before the next
        step; while there is none to come, there is nothing to cancel."""
        self._abandoned.append(job)

    def _run(self) -> None:
        failure: BaseException = UsageError("the engine was closed before the request ended")
        try:
            self._loop()
        except BaseException as error:  # nobody must wait for ever, whatever broke
            failure = self._failure = error
        with self._wake:
            self._closed = True
            live = list(self._scheduler)
            for job in live:
                self._scheduler.remove(job)
        for job in live:
            job.deliver(failure)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while True:
                    while self._abandoned:
                        self._scheduler.remove(self._abandoned.popleft())
                    if self._closed:
                        return
                    if self._scheduler.busy:
                        break
                    self._wake.wait()
                copies, chunks, batch = self._scheduler.plan()
            try:
                for source, target in copies:
                    self._executor.copy_block(source, target)
                logits = self._executor.step(batch)
            except Exception as error:
                self._fail([chunk.sequence for chunk in chunks], error)
            else:
                self._complete(chunks, logits)

    def _complete(self, chunks: list[Chunk[Job]], logits: NDArray[np.float32]) -> None:
        results: list[tuple[Job, object]] = []
        for chunk in chunks:
            if chunk.rows.start == chunk.rows.stop:
                continue
            job = chunk.sequence
            try:
                for item in job.accept(logits[chunk.rows]):
                    results.append((job, item))
            except Exception as error:  # its own mistake (`stop`, logits without a maximum): nobody else's affair
                job.done = True
                results.append((job, error))
        with self._wake:
            self._scheduler.advance(chunks)
            for chunk in chunks:
                if chunk.sequence.done:
                    self._scheduler.remove(chunk.sequence)
        for job, item in results:
            job.deliver(item)

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        """The step failed: what it was to write into its jobs' blocks is unknown, and none of it was published."""
        with self._wake:
            for job in jobs:
                self._scheduler.remove(job)
        for job in jobs:
            job.deliver(error)


def _scores(result: object) -> Scores:
    """What a scoring job delivered; raises what ended it."""
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, Scores)
    return result
