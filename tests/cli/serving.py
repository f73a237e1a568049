"""`dapji serve` as a process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path


class Served:
    """On a port of its own; made when it listens."""

    def __init__(self, home: Path, *arguments: str | Path, folder: Path | None = None) -> None:
        """home: of the models. folder: where it is started, if not here."""
        command = [sys.executable, "-m", "dapji", "serve", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ | {"DAPJI_HOME": str(home)}
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("listening on "):
                break
        self.url = self.lines[-1].split()[-1]
        self._reading = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or []))
        self._reading.start()

    def ended(self) -> int:
        code = self.process.wait(20)
        self._reading.join()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.ended()
        assert self.process.stderr is not None
        self.process.stderr.close()
