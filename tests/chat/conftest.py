"""A tokenizer that knows every control token of every published template, in our reading and in transformers'."""

import json
from pathlib import Path

import pytest
from conversations import published

from byte_tokenizers import Tokenizers, control_tokens, make_tokenizers
from dapji.chat import ChatTemplate
from dapji.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return published()


@pytest.fixture(scope="session")
def both(templates: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """With the control tokens of all templates."""
    control = set().union(*map(control_tokens, templates.values()))
    control |= {"<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"}  # <|' + role + '|>
    assert len(control) > 150
    return make_tokenizers(control, tmp_path_factory.mktemp("every-control-token"))


@pytest.fixture(scope="session")
def compiled(templates: dict[str, str], both: Tokenizers) -> dict[str, ChatTemplate]:
    return {name: ChatTemplate(both.ours, {"default": source}) for name, source in templates.items()}


@pytest.fixture
def add_bos(both: Tokenizers, tmp_path: Path) -> Tokenizer:
    """The same tokenizer for a model that wants its sequences to begin with <s>."""
    both.theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    return Tokenizer.from_folder(tmp_path)
