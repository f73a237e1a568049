"""`dapji perplexity` against a loop that follows llama-perplexity's procedure word for word."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from in_process import Dapji

from dapji.files import open_files
from dapji.models.executor import ReferenceExecutor
from dapji.ops.batch import Batch

TEXT = "옛날 옛적에, once upon a time.\n하나 둘\n" * 8
CHUNK = 32


def expected(model: Path, chunks: int) -> float:
    """Token by token: the second half of each chunk, each token given all before it in the chunk."""
    files = open_files(model)
    ids = files.tokenizer().encode(TEXT.removesuffix("\n"))
    executor = ReferenceExecutor(files.config, files.tensors, context=CHUNK, n_blocks=2, kv="f16")
    losses = []
    for i in range(chunks):
        chunk = ids[i * CHUNK : (i + 1) * CHUNK]
        logits = executor.step(Batch.single(chunk)).astype(np.float64)
        for position in range(CHUNK // 2, CHUNK - 1):
            row = logits[position]
            losses.append(math.log(np.exp(row - row.max()).sum()) - (row - row.max())[chunk[position + 1]])
    return math.exp(sum(losses) / len(losses))


def test_value_of_a_file_and_of_stdin(endless: Path, dapji: Dapji, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    n_tokens = len(TEXT.encode()) - 1
    chunks = n_tokens // CHUNK
    command = ["perplexity", endless, "--chunk", str(CHUNK), "--kv", "f16", "--json"]
    from_file = dapji(*command, tmp_path / "text.txt")
    assert from_file == dapji(*command, stdin=TEXT) == dapji(*command, "-", stdin=TEXT)
    assert (from_file.code, from_file.err) == (0, ""), "no bar where there is no terminal"
    result = json.loads(from_file.out)
    # float32 logits summed in another order: far below the 0.3 % within which two programs agree
    assert result.pop("perplexity") == pytest.approx(expected(endless, chunks), rel=1e-4)
    assert result.pop("error") > 0
    assert result == {
        "chunk": CHUNK,
        "chunks": chunks,
        "scored_tokens": chunks * (CHUNK // 2 - 1),
        "left_out_tokens": n_tokens - chunks * CHUNK,
    }


def test_max_chunks(endless: Path, dapji: Dapji) -> None:
    shown = dapji("perplexity", endless, "--chunk", str(CHUNK), "--max-chunks", "2", stdin=TEXT)
    assert float(shown.out.split()[1]) == pytest.approx(expected(endless, 2), rel=1e-4)
    left_out = len(TEXT.encode()) - 1 - 2 * CHUNK
    assert f"(2 chunks of 32 tokens, 30 scored, the last {left_out} of the text left out)\n" in shown.out


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        (["--chunk", "33"], TEXT, 2, "--chunk must be even, got 33"),
        (["--chunk", "2"], TEXT, 2, "2 is not in the range x>=6"),
        (["--chunk", "200000"], TEXT, 1, "a context of 200000 tokens was asked for, but the model has 131072"),
        ([], "short", 1, "the text has 5 tokens, fewer than one chunk (512)"),
        ([], b"\xff", 1, "stdin is not UTF-8"),
        (["no-such-file.txt"], "", 1, "no-such-file.txt: No such file or directory"),
        (["LATIN1"], "", 2, "latin1.txt is not UTF-8: unexpected end of data at byte 3"),
    ],
)
def test_mistakes(
    arguments: list[str], stdin: str | bytes, code: int, message: str, endless: Path, dapji: Dapji, tmp_path: Path
) -> None:
    latin1 = tmp_path / "latin1.txt"
    latin1.write_bytes("café".encode("latin-1"))
    result = dapji("perplexity", endless, *(str(latin1) if a == "LATIN1" else a for a in arguments), stdin=stdin)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
