"""The command line in this process, and models for it that take milliseconds."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from in_process import Dapji, Result

from dapji.cli.main import main
from tiny import COUNTING, SCRIPT, write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every answer is ANSWER."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", SCRIPT)


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that counts to three until it is stopped."""
    return write_tiny(tmp_path_factory.mktemp("endless") / "endless.gguf", COUNTING, endless=True, max_context=1 << 17)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of one's own, empty."""
    home = tmp_path / "home"
    monkeypatch.setenv("DAPJI_HOME", str(home))
    return home


@pytest.fixture
def dapji(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dapji:
    """dapji(*arguments, stdin=text or bytes) -> exit code, stdout, stderr."""

    def run(*arguments: str | Path, stdin: str | bytes = b"") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, out, err)

    return run
