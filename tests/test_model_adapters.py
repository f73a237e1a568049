"""Adapters of a `Model`: loaded beside each other, chosen by name; as files, through the command line too."""

from __future__ import annotations

from pathlib import Path

import pytest

import dapji
from dapji.errors import ConfigError, FormatError, ModelNotFound, RequestError, UsageError
from tiny import COUNTING, SCRIPT, write_adapter, write_tiny

QUESTION = [{"role": "user", "content": "?"}]


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "counting.gguf", COUNTING, endless=True)


@pytest.fixture(scope="module")
def backwards(counting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "backwards"
    return write_adapter(folder, counting, {"하나 ": "셋 ", "셋 ": "둘 ", "둘 ": "하나 "})


@pytest.fixture(scope="module")
def twice(counting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "twice", counting, {"둘 ": "둘 "})


@pytest.mark.parametrize("executor", ["reference", "native", "torch"])
def test_answers_choose_an_adapter_by_name(executor: str, counting: Path, backwards: Path, twice: Path) -> None:
    with dapji.load(counting, executor=executor, context=512) as model:  # type: ignore[arg-type]
        model.load_adapter("backwards", backwards)
        model.load_adapter("twice", twice)
        assert {name: loaded.nbytes for name, loaded in model.adapters.items()} == {
            "backwards": 4 * 3 * (64 + model.config.vocab_size),
            "twice": 4 * (64 + model.config.vocab_size),
        }
        options = {"max_tokens": 5, "temperature": 0}
        names = (None, "backwards", "twice", "backwards", None)
        replies = [model.chat(QUESTION, adapter=name, **options) for name in names]
        base, back, again = "하나 둘 셋 하나 둘 ", "하나 셋 둘 하나 셋 ", "하나 둘 둘 둘 둘 "
        assert ["".join(reply) for reply in replies] == [base, back, again, back, base]
        model.unload_adapter("twice")
        with pytest.raises(RequestError, match="there is no adapter 'twice'\nhint: there are backwards"):
            model.chat(QUESTION, adapter="twice")
        with pytest.raises(UsageError, match="there is an adapter 'backwards' already"):
            model.load_adapter("backwards", twice)
        with pytest.raises(UsageError, match="there is no adapter 'twice'"):
            model.unload_adapter("twice")


def test_a_model_opened_with_an_adapter_answers_with_it(counting: Path, backwards: Path) -> None:
    with dapji.load(counting, adapter=backwards) as model:
        assert model.adapter == "backwards"
        assert "".join(model.complete("\n", max_tokens=4, temperature=0)) == "하나 셋 둘 하나 "


def test_what_is_no_adapter_for_the_model_is_refused(counting: Path, backwards: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", SCRIPT)
    with pytest.raises(
        ConfigError, match=r"backwards: lm_head is \[\d+, 64\] in this model, but the adapter's matrices"
    ):
        dapji.load(other, adapter=backwards)
    with pytest.raises(ModelNotFound, match="nowhere: no such file or folder"):
        dapji.load(counting, adapter=tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"no adapter_model\.safetensors"):
        dapji.load(counting, adapter=tmp_path)
    with pytest.raises(ConfigError, match=r"general\.type 'model' is not supported"):
        dapji.load(counting, adapter=other)
