"""THE training loop: windows through a method's loss into gradients, steps, metrics and checkpoints.

One loop for all methods; it knows none. A `Method` makes a number of a window, the sum of what it counts; the loop
divides by the count of all windows of a step, whatever ranks and micro-batches they are in, and so for a method's own
metrics. A `Source` gives window
after window by number: files that were read before, or answers that are generated when they are asked for. Where a run
stands is the number of windows taken; what is random in a window follows from the seed and its number.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dapji.errors import TrainingError
from dapji.training.checkpoints import Checkpoints, Progress
from dapji.training.data.stream import Window
from dapji.training.network import Network
from dapji.training.settings import OptimizerSettings, RunSettings


class Outcome(NamedTuple):
    """What a method makes of a window."""

    loss: Tensor
    """The sum over what the method counts, a scalar, differentiable where gradients are on."""
    metrics: Mapping[str, tuple[float, float]] = {}
    """Name -> a sum, and the number that it becomes a mean over. The same names of every window."""


class Method(Protocol):
    """How a window becomes a loss. The same on every rank."""

    def count(self, window: Window) -> int:
        """What the loss is a mean over: learned tokens, pairs, answers."""
        ...

    def begin(self, network: Network, windows: Sequence[tuple[Window, bool]], total: Total) -> None:
        """Before the losses of a step, or of an evaluation, with all its windows of this rank, and whether each counts:
        for what follows from all of them and must not depend on how they are split. total: sums over all ranks."""
        return

    def loss(self, network: Network, window: Window) -> Outcome: ...


class Source(Protocol):
    """Windows by number."""

    def take(self, indices: Sequence[int]) -> Sequence[Window]:
        """Those that a rank has of a step, or of an evaluation. All ranks ask together, each for as many, and after the
        steps before: a source may generate them by the model as it is."""
        ...


Total = Callable[..., tuple[float, ...]]
"""Numbers to their sums over all ranks."""
Report = Callable[[Mapping[str, Any]], None]
"""Takes the metrics of a step, or of an evaluation."""


class Trainer:
    """A run. All ranks make one, and call the same methods."""

    def __init__(
        self,
        network: Network,
        method: Method,
        source: Source,
        *,
        windows: int,
        optimizer: OptimizerSettings,
        run: RunSettings,
        seed: int,
        checkpoints: Checkpoints,
        torch_optimizer: torch.optim.Optimizer,
        evaluation: tuple[Source, int] | None = None,
        report: Report = lambda metrics: None,
        watch: Callable[[int], None] = lambda step: None,
    ) -> None:
        """windows: that the run takes in all, `run.batch` at a time. evaluation: what is held out, and how many windows
        that is. report: called on the first rank. watch: called on all ranks, with the steps that are done, before the
        first and wherever `run` says to evaluate, after that; may look at the network."""
        self._network = network
        self._method = method
        self._source = source
        self._evaluation = evaluation
        self._windows = windows
        self._settings = optimizer
        self._run = run
        self._seed = seed
        self._checkpoints = checkpoints
        self._optimizer = torch_optimizer
        self._rank, self._ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._report = report if self._rank == 0 else lambda metrics: None
        self._watch = watch
        self.steps = -(-windows // run.batch)
        self.progress = Progress()

    def resume(self) -> int:
        """Goes on from the last checkpoint, if there is one; gives the number of steps that are done."""
        self.progress = self._checkpoints.resume() or self.progress
        return self.progress.step

    def train(self) -> bool:
        """Until all windows are taken: True; or until it is interrupted (SIGINT, SIGTERM), when the step that runs is
        ended and kept: False.

        Raises TrainingError where the loss is no number.
        """
        run = self._run
        with _interrupts() as interrupted:
            if self.progress.step == 0:
                self._look()
            stop = False
            while self.progress.step < self.steps and not stop:
                self._step()
                step, last = self.progress.step, self.progress.step == self.steps
                if last or (run.evaluate_every and step % run.evaluate_every == 0):
                    self._look()
                stop = self._any(interrupted())
                if last or stop or step % run.save_every == 0:
                    self._checkpoints.save(self.progress)
            self._checkpoints.wait()
        return self.progress.step == self.steps

    def _look(self) -> None:
        self.evaluate()
        self._watch(self.progress.step)

    def evaluate(self) -> float | None:
        """The mean loss over what is held out; None where nothing is."""
        if self._evaluation is None:
            return None
        source, n_windows = self._evaluation
        self._network.eval()
        loss = count = 0.0
        means = _Means()
        with torch.no_grad():
            mine = self._mine(source, 0, n_windows)
            self._method.begin(self._network, [(window, counts) for _, window, counts in mine], self._sum)
            for _, window, counts in mine:
                given = self._method.loss(self._network, window)
                means.add(given.metrics, counts)
                loss, count = loss + counts * given.loss.item(), count + counts * self._method.count(window)
        self._network.train()
        loss, count = self._sum(loss, count)
        metrics = {f"evaluation_{name}": value for name, value in means.over(self._sum).items()}
        self._report({"step": self.progress.step, "evaluation_loss": loss / count, **metrics})
        return loss / count

    def _mine(self, source: Source, first: int, end: int) -> list[tuple[int, Window, bool]]:
        """Of the windows from first to end those of this rank, part by part, each with a number of its own. All ranks
        have as many, since they gather sharded weights together: what is missing is the first again, which does not
        count."""
        mine = [(index, True) for index in range(first + self._rank, end, self._ranks)]
        if len(mine) < -(-(end - first) // self._ranks):
            mine.append((first, False))
        windows = source.take([index for index, _ in mine])
        return [
            ((index << 32) + number, part, counts)
            for (index, counts), window in zip(mine, windows, strict=True)
            for number, part in enumerate(window.parts())
        ]

    def _step(self) -> None:
        started = time.perf_counter()
        end = min(self.progress.windows + self._run.batch, self._windows)
        mine = self._mine(self._source, self.progress.windows, end)
        count, tokens = self._sum(
            sum(self._method.count(window) for _, window, counts in mine if counts),
            sum(int(window.learned.sum()) for _, window, counts in mine if counts),
        )
        with torch.no_grad():
            self._method.begin(self._network, [(window, counts) for _, window, counts in mine], self._sum)
        loss, means = 0.0, _Means()
        for number, (index, window, counts) in enumerate(mine, start=1):
            _sum_gradients(self._network, number == len(mine))
            torch.manual_seed(self._seed + index)
            # Sharded gradients are averaged over the ranks, but what is wanted is the sum.
            outcome = self._method.loss(self._network, window)
            means.add(outcome.metrics, counts)
            given = outcome.loss * (self._ranks * counts / count)
            given.backward()  # type: ignore[no-untyped-call]
            loss += given.item() / self._ranks
        (loss,) = self._sum(loss)
        norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.progress.step + 1}: the loss is {loss}, the length of its gradient {norm}",
                hint="a smaller optimizer.learning_rate, or more of optimizer.warmup",
            )
        rate = self._settings.rate(self.progress.step, self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            windows=end,
            trained_tokens=self.progress.trained_tokens + int(tokens),
            seconds=self.progress.seconds + seconds,
        )
        self._report(
            {
                "step": self.progress.step,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "trained_tokens": int(tokens),
                "seconds": seconds,
                "memory": peak_memory(self._network.device),
                **means.over(self._sum),
            }
        )

    def _clip(self) -> float:
        """The gradient's length before it is cut."""
        parameters = [parameter for parameter in self._network.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self._settings.clip or math.inf)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _sum(self, *values: float) -> tuple[float, ...]:
        """Of each over all ranks."""
        if self._ranks == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def _any(self, value: bool) -> bool:
        return bool(self._sum(float(value))[0])


class _Means:
    """Of a method's metrics, over windows and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, tuple[float, float]], counts: bool) -> None:
        for name, (value, number) in metrics.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + counts * value, before[1] + counts * number)

    def over(self, total: Total) -> dict[str, float]:
        """Without those that nothing was counted for."""
        values = total(*(part for pair in self._sums.values() for part in pair))
        pairs = zip(self._sums, values[::2], values[1::2], strict=True)
        return {name: value / number for name, value, number in pairs if number}


def make_optimizer(network: Network, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW over what is trained: matrices decay, vectors (norms, biases) do not."""
    trained = network.trained().values()
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def peak_memory(device: torch.device) -> int:
    """Bytes, since the process began: on the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _sum_gradients(network: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass sums the gradients of all ranks; before the last each keeps its own."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(wanted)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether one came. The second ends the program as the first would have."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
