"""`Engine`: many requests at once on one executor. The background thread and its lock.

Takes and returns token ids; knows neither text nor templates nor files. Above it sits dapji.model; below it the
executor. docs/engine.md tells a request's life.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Iterable
from functools import partial
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dapji.engine.base import BaseEngine, Deliver, Handle
from dapji.engine.generation import Embedding, Generation, Job, Scoring
from dapji.engine.request import Request
from dapji.engine.scheduler import Chunk, Scheduler
from dapji.errors import ContextError, RequestError, UsageError
from dapji.models.config import Pooling
from dapji.ops.batch import KV_BLOCK

if TYPE_CHECKING:
    from dapji.models.adapter import Adapter
    from dapji.models.executor import Executor


class Engine(BaseEngine):
    """Runs requests of any number of threads and tasks on one executor, mixed in every step.

    Its thread starts with the first request and ends with `close()`. The executor stays open: who
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
        if vocab_size is not None and not 1 <= vocab_size <= padded_size:
            raise UsageError(f"vocab_size ({vocab_size}) must be from 1 to the model's {padded_size}")
        if not 1 <= max_running <= step_tokens:
            raise UsageError(f"max_running ({max_running}) must be from 1 to step_tokens ({step_tokens})")
        if mixed_prompt_tokens < 1:
            raise UsageError(f"mixed_prompt_tokens ({mixed_prompt_tokens}) must be at least 1")
        super().__init__(
            context=min(executor.context, executor.n_blocks * KV_BLOCK),
            vocab_size=padded_size if vocab_size is None else vocab_size,
            end_tokens=end_tokens,
        )
        self._executor = executor
        self._speculate = speculate
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
        self._adapters: set[int] = set()

    def add_adapter(self, adapter: Adapter) -> int:
        number = self._executor.add_adapter(adapter)
        with self._wake:
            self._adapters.add(number)
        return number

    def remove_adapter(self, number: int) -> None:
        with self._wake:
            if number not in self._adapters:
                raise UsageError(f"there is no adapter {number}")
            users = sum(job.adapter == number for job in self._scheduler)
            if users:
                raise UsageError(f"{users} requests use the adapter {number}", hint="wait until they have ended")
            self._adapters.remove(number)
        self._executor.remove_adapter(number)

    def close(self) -> None:
        """Waits for the step under way, ends what still runs with a UsageError, stops the thread. May be repeated."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self.close)

    def _submit_generation(
        self, request: Request, prompt: NDArray[np.int32], room: int, stop_tokens: frozenset[int], deliver: Deliver
    ) -> Handle:
        self._check_head()
        tokens = np.empty(len(prompt) + room, dtype=np.int32)
        tokens[: len(prompt)] = prompt
        job = Generation(
            request,
            tokens,
            stop_tokens=stop_tokens,
            vocab_size=self._vocab_size,
            speculate=self._speculate,
            deliver=deliver,
        )
        return self._submit(job)

    def _submit_scoring(
        self, tokens: NDArray[np.int32], start: int, n_top: int, adapter: int, deliver: Deliver
    ) -> Handle:
        self._check_head()
        if len(tokens) - 1 > self.context:
            raise ContextError(
                f"the text ({len(tokens)} tokens, of which {len(tokens) - 1} are read) exceeds the context "
                f"({self.context} tokens)",
                hint="score it in pieces, or open the model with a longer context",
            )
        return self._submit(Scoring(tokens, start=start, n_top=n_top, adapter=adapter, deliver=deliver))

    def _check_head(self) -> None:
        if self._executor.config.headless:
            raise RequestError(
                "the model was published without the matrix that makes logits, so it writes and scores nothing",
                hint="it gives embeddings",
            )

    def _submit_embedding(self, tokens: NDArray[np.int32], pooling: Pooling, adapter: int, deliver: Deliver) -> Handle:
        return self._submit(Embedding(tokens, pooling=pooling, adapter=adapter, deliver=deliver))

    def _submit(self, job: Job) -> Handle:
        with self._wake:
            if self._closed:
                raise UsageError("the engine is closed") from self._failure
            if job.adapter and job.adapter not in self._adapters:
                raise RequestError(f"there is no adapter {job.adapter}")
            if self._thread is None:
                self._thread = Thread(target=self._run, name="dapji-engine", daemon=True)
                self._thread.start()
                atexit.register(self.close)  # the interpreter must not end under a step of native code
            self._scheduler.add(job)
            self._wake.notify()
        return Handle(partial(self._cancel, job), partial(self._abandon, job))

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
                n_hidden = len(batch.hidden_rows)
                hidden = np.empty((n_hidden, self._executor.config.dim), dtype=np.float32) if n_hidden else None
                logits = self._executor.step(batch, hidden)
            except Exception as error:
                self._fail([chunk.sequence for chunk in chunks], error)
            else:
                self._complete(chunks, logits, hidden)

    def _complete(
        self, chunks: list[Chunk[Job]], logits: NDArray[np.float32], hidden: NDArray[np.float32] | None
    ) -> None:
        results: list[tuple[Job, object]] = []
        for chunk in chunks:
            if chunk.rows.start == chunk.rows.stop:
                continue
            job = chunk.sequence
            try:
                rows = hidden if job.wants_hidden else logits
                assert rows is not None
                for item in job.accept(rows[chunk.rows]):
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
