"""Checkpoints of a run: written aside while training goes on, and there only when they are whole.

torch's distributed checkpoint: each rank writes its shards, and another number of ranks reads them. A folder gets its
name by renaming, when all is on the disk, so that a run that is killed at any moment finds the last whole one.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dapji.errors import FormatError

_PREFIX, _PARTIAL = "step-", ".partial"
_PROGRESS = "progress.json"
_KEPT = 2
"""Whole checkpoints that are kept: one might be read while the next replaces it."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. Randomness has no state: it follows from the seed and the number of a window."""

    step: int = 0
    """Steps that are done."""
    windows: int = 0
    """Windows that all ranks have taken together."""
    trained_tokens: int = 0
    """Learned tokens in them."""
    seconds: float = 0.0
    """Of training, without what was lost when a run was killed."""


class Checkpoints:
    """Of one run, in a folder of its own. All ranks call the same methods."""

    def __init__(self, folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._folder = folder
        self._network = network
        self._optimizer = optimizer
        self._alone = not dist.is_initialized()
        self._first = self._alone or dist.get_rank() == 0
        # Ranks talk about a checkpoint while they talk about gradients: each in a group of its own.
        self._group = None if self._alone else dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, progress: Progress) -> None:
        """Begins to write the state as it is now; training may go on at once. Waits for the checkpoint before."""
        self.wait()
        self._writing = self._thread.submit(self._write, _copied(self._state()), progress)

    def _write(self, state: dict[str, Any], progress: Progress) -> None:
        whole = self._folder / f"{_PREFIX}{progress.step:08}"
        partial = whole.with_name(whole.name + _PARTIAL)
        if self._first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
            with (partial / _PROGRESS).open("w") as file:
                json.dump(asdict(progress), file)
                os.fsync(file.fileno())
        writer = FileSystemWriter(partial, sync_files=True)
        with _quiet():
            save(state, storage_writer=writer, process_group=self._group, no_dist=self._alone)
        if self._first:  # whose part of it ends when all ranks have written theirs
            partial.rename(whole)
            _sync_folder(self._folder)
            for old in whole_ones(self._folder)[:-_KEPT]:
                shutil.rmtree(old)

    def wait(self) -> None:
        """Until the last checkpoint is there. Raises what kept it from being written."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def resume(self) -> Progress | None:
        """Loads the last checkpoint and says where the run stands; None where there is none. Raises FormatError."""
        found = whole_ones(self._folder)
        if not found:
            return None
        try:
            progress = Progress(**json.loads((found[-1] / _PROGRESS).read_text()))
            state = self._state()
            with _quiet():
                load(state, checkpoint_id=found[-1], process_group=self._group, no_dist=self._alone)
        except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
            raise FormatError(f"{found[-1]}: {error}", hint="remove it to go on from the one before") from error
        set_state_dict(
            self._network,
            self._optimizer,
            model_state_dict=state["network"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        return progress

    def remove(self) -> None:
        """All of them."""
        self.wait()
        if self._first:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _state(self) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=True)
        network, optimizer = get_state_dict(self._network, self._optimizer, options=options)
        return {"network": network, "optimizer": optimizer}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a process alone is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _copied(state: Any) -> Any:
    """The same state, which training does not change."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state.detach().clone() if isinstance(state, torch.Tensor) else state


def whole_ones(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of their steps."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.suffix != _PARTIAL)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
