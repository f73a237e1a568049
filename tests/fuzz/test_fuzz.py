"""The fuzz program, a little in every run and longer with the slow tests."""

import random

import fuzz_formats
import pytest

from dapji.errors import ConfigError, TokenizerError
from dapji.weights.gguf import parse_gguf
from dapji.weights.safetensors import parse_safetensors


@pytest.mark.parametrize("target", fuzz_formats.TARGETS)
def test_every_case_is_read_or_refused(target: str) -> None:
    tally = fuzz_formats.fuzz(target, first=0, cases=1500)
    assert tally.failures == []
    assert tally.read > 75  # the changes leave enough to be read that the code behind the first checks is reached
    assert tally.refused > 750


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz_formats.TARGETS)
def test_many_cases(target: str) -> None:
    # fixed, so that a failure belongs to the change that brings it; the program by itself takes any other cases
    assert fuzz_formats.fuzz(target, first=1 << 40, cases=100_000).failures == []


def test_a_number_of_layers_of_many_digits_is_refused() -> None:
    """Found by fuzzing: a tuple cannot be repeated -(2**70) times."""
    for n_layers in (-(2**70), 2**70):
        with pytest.raises(ConfigError, match="must be 1 to 4096"):
            fuzz_formats.families.config_from_hf({**fuzz_formats.CONFIGS[0], "num_hidden_layers": n_layers})


def test_cases_are_determined_by_their_number() -> None:
    for target, make in fuzz_formats.TARGETS.items():
        seeds = [random.Random(f"{target}/7") for _ in range(2)]
        assert make(seeds[0])[0] == make(seeds[1])[0]


def test_the_samples_are_valid() -> None:
    fuzz_formats.use_gguf(fuzz_formats.gguf_sample().encode())
    header, data = fuzz_formats.safetensors_sample()
    encoded = fuzz_formats.json.dumps(header).encode()
    fuzz_formats.use_safetensors(fuzz_formats.u64(len(encoded)) + encoded + data)
    for model in ("gpt2", "llama"):
        fuzz_formats.use_tokenizer(fuzz_formats.tokenizer_sample(model))
    for config in fuzz_formats.CONFIGS:
        fuzz_formats.families.config_from_hf(config)


def test_a_merge_into_no_token_is_refused() -> None:
    """Found by fuzzing: the tokenizers library panics where the union of a merge is not in the vocabulary."""
    metadata = fuzz_formats.tokenizer_sample("gpt2")
    metadata["tokenizer.ggml.merges"] = ["c d"]
    with pytest.raises(TokenizerError, match="the union is no token"):
        fuzz_formats.use_tokenizer(metadata)


@pytest.mark.parametrize("parse", [parse_gguf, parse_safetensors])
def test_a_failure_is_seen(parse: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: object, file: str) -> None:
        bytearray(10_000_000)
        raise ValueError("unexpected")

    monkeypatch.setattr(fuzz_formats, parse.__name__, broken)  # type: ignore[attr-defined]
    target = parse.__name__.removeprefix("parse_")  # type: ignore[attr-defined]
    failures = fuzz_formats.fuzz(target, first=0, cases=1).failures
    assert any("unexpected" in failure for failure in failures)
    assert any("bytes of memory" in failure for failure in failures)
