"""The page "From an OpenAI fine-tune to your own model", walked through: its commands and its Python, in order."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Served

from dapji.weights import store

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "from-openai.md", ROOT / "docs" / "from-openai.ko.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and text."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def test_both_pages_have_the_same_steps() -> None:
    english, korean = ([(language, re.sub(r"  # .*", "", text)) for language, text in blocks(page)] for page in PAGES)
    assert english == korean


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    """With the examples that the page names, in a folder of its own; only the server's port is another."""
    for name in ("train.jsonl", "held-out.jsonl"):
        shutil.copy(ROOT / "runs" / "support-faq" / name, tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    serve: list[str] = []
    said = ""
    for language, text in blocks(PAGES[0]):
        if language == "json":
            assert text in (tmp_path / "held-out.jsonl").read_text(encoding="utf-8")
        elif language == "toml":
            (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
        elif language == "sh":
            for line in text.splitlines():
                command = shlex.split(line)
                assert command[0] == "dapji", line
                if command[1] == "serve":
                    serve = command
                    continue
                done = subprocess.run(
                    [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        else:
            assert language == "python"
            server = Served(store.home(), *serve[2:], folder=tmp_path)
            try:
                here = text.replace("http://localhost:8410", server.url)
                assert here != text
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile(here, "page", "exec"), {})
            finally:
                server.kill()
            said = printed.getvalue()
    assert "45 days" in said
    exam = json.loads((tmp_path / "exam.json").read_text(encoding="utf-8"))
    assert exam["before"]["value"] < 0.1
    assert exam["difference"]["low"] > 0.6
    for name in ("adapter_model.safetensors", "dapji.json", "report.html"):
        assert (tmp_path / "support" / name).exists()
    assert (tmp_path / "support.gguf").exists()
