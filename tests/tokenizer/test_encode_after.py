"""Text that goes on after a text, by real vocabularies: SentencePiece's, which begins texts with a space, and BPE."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import oracles
from dapji.tokenizer import Tokenizer
from dapji.weights import store
from dapji.weights.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(oracles.folder("mistral-common") / "tokenizer.model.v1", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    smollm2 = open_checkpoint(store.resolve("smollm2-135m")).metadata
    return {"Mistral": Tokenizer.from_folder(folder), "SmolLM2": Tokenizer.from_gguf(smollm2)}


TEXTS = st.text(st.sampled_from("ab 한글\n.!0[]INST/"), min_size=1, max_size=10)


@settings(deadline=None, max_examples=300)
@given(before=TEXTS, text=TEXTS, name=st.sampled_from(["Mistral", "SmolLM2"]), bos=st.booleans())
@example(before="[INST] 2 + 2? [/INST]", text=" 4", name="Mistral", bos=True)
@example(before="### Response:\n", text="4", name="Mistral", bos=True)
@example(before="assistant\n", text="\n4", name="SmolLM2", bos=True)
def test_nothing_is_put_between(
    before: str, text: str, name: str, bos: bool, vocabularies: dict[str, Tokenizer]
) -> None:
    tokenizer = vocabularies[name]
    start: list[str | int] = [1] if bos else []
    ids = tokenizer.encode_after([*start, before], [text])
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    prompt, whole = tokenizer.encode_parts([*start, before]), tokenizer.encode_parts([*start, before + text])
    if whole[: len(prompt)] == prompt:
        assert prompt + ids == whole


def test_after_control_tokens_and_after_nothing(vocabularies: dict[str, Tokenizer]) -> None:
    for tokenizer in vocabularies.values():
        assert tokenizer.encode_after([], ["a"]) == tokenizer.encode("a")
        for before, parts in (([1], ["a", 2]), (["a", 1], ["b"]), (["a"], [2, "b"]), (["a", ""], ["", 2])):
            expected = tokenizer.encode_parts([*before, *parts])
            assert tokenizer.encode_parts(before) + tokenizer.encode_after(before, parts) == expected
