"""`dapji new`: a model from nothing, that the other commands take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import Dapji

from dapji.files import open_files

TEXT = "Now is the winter of our discontent made glorious summer by this sun of York.\n" * 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_model_with_a_tokenizer_of_its_own(dapji: Dapji, text: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    done = dapji("new", start, text, "--vocab-size", 280, "--layers", 1, "--dim", 32, "--context", 64, "--seed", 7)
    assert (done.code, done.out, done.err) == (0, f"{start}\n", "0.03M parameters, 280 tokens\n")
    assert open_files(start).config.max_context == 64
    checked = dapji("data", "check", text, "--model", start, "--json")
    assert checked.code == 0
    assert json.loads(checked.out)["notes"] == {"cut into pieces": 1}
    small = tmp_path / "small"
    done = dapji("new", small, "--tokenizer", start, "--layers", 1, "--dim", 16, "--heads", 2, "--json")
    assert json.loads(done.out) == {"folder": str(small), "parameters": 280 * 16 + 3 * 16 + 4 * 256 + 3 * 16 * 64,
                                    "vocab_size": 280}  # fmt: skip
    assert (small / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    again = dapji("new", start, text, "--vocab-size", 280)
    assert (again.code, "exists already" in again.err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give one of the two"),
        (["text.txt", "--tokenizer", "start"], 2, "give one of the two"),
        (["--tokenizer", "start", "--vocab-size", "300"], 2, "are of a tokenizer that is trained"),
        (["text.txt"], 1, "not of 4096"),
        (["text.txt", "--dim", "100", "--heads", "3"], 1, "dim (100) must be an even number for each of 3 heads"),
        (["text.txt", "--vocab-size", "259"], 2, "259 is not in the range x>=260"),
    ],
)
def test_what_makes_no_model(arguments: list[str], code: int, message: str, dapji: Dapji, text: Path) -> None:
    given = [str(text) if each == "text.txt" else each for each in arguments]
    done = dapji("new", text.parent / "new", *given)
    assert done.code == code
    assert message in done.err
    assert not (text.parent / "new").exists()
