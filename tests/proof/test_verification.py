"""Certificates: what is in them by transformers; what has not changed passes, on every executor; what has is named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Set
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from proven import Change, flipped, prove, replaced, write_model, write_tuned

import dapji
from dapji.errors import CertificateError, ConfigError, FormatError, UsageError
from dapji.models.executor import Executor, ExecutorKind, open_executor
from dapji.ops import native
from dapji.proof import replay
from dapji.proof.behaviour import behaviour_of
from dapji.proof.certificate import certify, read_certificate
from dapji.proof.lineage import Lineage, parent, read_lineage, write_lineage
from dapji.proof.record import record_path, write_parts
from dapji.proof.verification import verify
from dapji.weights import store
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.convert import write_folder, write_quantized
from tiny import write_tiny

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
KINDS: list[object] = ["reference", "torch", pytest.param("native", marks=needs_native)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and an adapter on it."""
    folder = tmp_path_factory.mktemp("proven")
    model = write_model(folder / "model")
    return model, write_tuned(folder / "adapter", model)


@pytest.fixture
def model(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of one's own."""
    return Path(shutil.copytree(made[0], tmp_path / "model"))


@pytest.fixture
def adapter(made: tuple[Path, Path], model: Path, tmp_path: Path) -> Path:
    """A copy of one's own; its base is `model`."""
    return Path(shutil.copytree(made[1], tmp_path / "adapter"))


def failed(path: Path, **options: object) -> set[str]:
    return {f"{check.part}: {check.name}" for check in verify(path, **options) if check.passed is False}  # type: ignore[arg-type]


def change(path: Path, how: Change) -> None:
    path.write_bytes(how(path.read_bytes()))


def read_parts(path: Path) -> None:
    assert read_certificate(path) is not None
    assert read_lineage(path) is not None


def test_what_is_kept_is_what_transformers_says(made: tuple[Path, Path]) -> None:
    certificate = read_certificate(made[0])
    assert certificate is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made[0])
    behaviour = certificate.behaviour
    for text in behaviour.texts[:5]:  # where a text spells control tokens, transformers makes them of it
        assert list(text.ids or ()) == tokenizer.encode(text.text, add_special_tokens=False)
    for rendered in behaviour.conversations:
        said = [{"content": "", **message} for message in rendered.conversation.messages]
        tools = rendered.conversation.tools
        text = tokenizer.apply_chat_template(said, tools=tools, tokenize=False, add_generation_prompt=True)
        assert rendered.text == text
    assert list(behaviour.stop_ids) == theirs.generation_config.eos_token_id
    assert certificate.executor == "reference"
    assert [passage.name for passage in certificate.passages] == ["conversation", "English", "Korean", "code"]
    for passage in certificate.passages:
        with torch.no_grad():
            logits = theirs(torch.tensor([passage.tokens])).logits[0].log_softmax(dim=-1).double().numpy()
        kept = np.take_along_axis(logits, np.array(passage.likeliest), axis=-1)
        # float32 in another order, two layers; the same tolerance as of parity tests
        np.testing.assert_allclose(passage.log_probs, kept, atol=1e-4)
    answered = certificate.passages[0]
    prompt = len(behaviour.conversations[0].ids or ())
    written = theirs.generate(
        torch.tensor([answered.tokens[:prompt]]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert written[0].tolist() == list(answered.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_not_changed_passes_on_every_executor(model: Path, adapter: Path, kind: ExecutorKind) -> None:
    for path, base in ((model, None), (adapter, str(model))):
        checks = list(verify(path, executor=kind, base=base))
        assert {check.passed for check in checks} == {True}
        parts = {check.part for check in checks}
        assert parts == {"record", "files", "lineage", "behaviour", "numbers"}
    assert [check.name for check in checks if check.part == "numbers"] == [
        f"{name} on {kind}" for name in ("conversation", "English", "Korean", "code", "conversation, the base alone")
    ]


NUMBERS = {f"numbers: {name} on reference" for name in ("conversation", "English", "Korean", "code")}
TEXTS = "behaviour: tokens of English"
CHANGES = [
    ("tokenizer.json", replaced('"e": 104', '"e": 105'), {TEXTS}),
    ("tokenizer_config.json", replaced("assistant", "assistent"), {
        "behaviour: template default", "behaviour: conversation: one question", "behaviour: its tokens: one question",
        "behaviour: conversation: a system's text and two turns", "behaviour: conversation: a call of a tool",
    }),
    ("generation_config.json", replaced("2\n", "1\n"), {"behaviour: stop tokens"}),
    ("generation_config.json", replaced("{", '{"temperature": 0.5,'), {"behaviour: sampling"}),
    ("model.safetensors", flipped(-2, 6), NUMBERS),
    ("model.safetensors", flipped(-4, 0), set()),  # the last bit of a weight, of which no number tells
    ("config.json", replaced("10000", "90000"), NUMBERS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "more"), CHANGES)
def test_a_changed_file_of_a_model_is_named_with_what_came_of_it(
    model: Path, name: str, how: Change, more: Set[str]
) -> None:
    change(model / name, how)
    found = failed(model, executor="reference")
    assert {f"files: {name}", *more} <= found
    if not more:
        assert found == {f"files: {name}"}


def test_a_file_that_is_gone_or_new_is_named(model: Path) -> None:
    (model / "generation_config.json").unlink()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    found = failed(model, executor="reference")
    assert {"files: generation_config.json", "files: chat_template.jinja", "behaviour: template default"} <= found


def test_a_file_that_cannot_be_read_any_more_ends_the_replay_only(model: Path) -> None:
    change(model / "tokenizer.json", flipped(0, 1))
    assert failed(model) == {"files: tokenizer.json", "behaviour: the model can be opened"}


@pytest.mark.parametrize(
    ("name", "how", "more"),
    [
        ("adapter_model.safetensors", flipped(-1, 6), NUMBERS),
        ("adapter_config.json", replaced('"lora_alpha": 2', '"lora_alpha": 8'), NUMBERS),
    ],
)
def test_a_changed_file_of_an_adapter_is_named(
    model: Path, adapter: Path, name: str, how: Change, more: Set[str]
) -> None:
    change(adapter / name, how)
    found = failed(adapter, executor="reference", base=str(model))
    assert {f"files: {name}"} <= found
    assert found - {f"files: {name}"} <= more  # those that tell apart a little change
    assert found & more
    assert "numbers: conversation, the base alone on reference" not in found


def test_a_changed_base_of_an_adapter_is_named(model: Path, adapter: Path) -> None:
    change(model / "model.safetensors", flipped(-2, 6))
    found = failed(adapter, executor="reference", base=str(model))
    assert f"lineage: base {model}: model.safetensors" in found
    assert "numbers: conversation, the base alone on reference" in found
    assert "files: adapter_model.safetensors" not in found


def test_one_bit_of_the_record_is_enough(model: Path) -> None:
    path = record_path(model)
    data = path.read_bytes()
    chosen = random.Random(0)
    for place in [*range(8), *(chosen.randrange(len(data) - 1) for _ in range(150))]:  # without the line's end
        path.write_bytes(flipped(place, chosen.randrange(8))(data))
        with pytest.raises(FormatError):
            read_parts(model)
    assert failed(model) == {"record: dapji.json"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("files",), {"../../secret": "0"}, "matching regex"),
        (("files",), {"/etc/passwd": "0"}, "matching regex"),
        (("passages", 0, "tokens"), [1], "not of the same places"),
        (("passages", 0, "tokens", 0), -1, ">= 0"),
        (("behaviour", "date"), "someday", "RFC3339"),
        (("behaviour", "more"), 1, "unknown field `more`"),
    ],
)
def test_a_hostile_certificate_is_refused(model: Path, path: tuple[Any, ...], value: object, message: str) -> None:
    """Its digest is right."""
    certificate = part = json.loads(record_path(model).read_bytes())["certificate"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    write_parts(model, certificate=certificate)
    with pytest.raises(FormatError, match=message):
        read_certificate(model)


def test_tokens_that_a_model_has_not_are_told(model: Path) -> None:
    certificate = read_certificate(model)
    assert certificate is not None
    first = certificate.passages[0]
    beyond = msgspec.structs.replace(first, likeliest=((300, *first.likeliest[0][1:]), *first.likeliest[1:]))
    changed = msgspec.structs.replace(certificate, passages=(beyond, *certificate.passages[1:]))
    write_parts(model, certificate=changed)
    assert failed(model, executor="reference") == {"numbers: conversation on reference"}


def test_what_lineage_names_is_checked_where_it_is_at_hand(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, source = tmp_path / "other" / "model", tmp_path / "other" / "source.gguf"
    model.parent.mkdir()
    write_model(model)
    assert failed(model) == set()
    change(source, flipped(-1, 0))
    assert failed(model) == {f"lineage: source {source}: source.gguf"}
    source.unlink()
    assert [check.detail for check in verify(model) if check.passed is None] == ["not at hand"]


def test_loading_refuses_what_can_be_told_at_once(model: Path, adapter: Path, made: tuple[Path, Path]) -> None:
    with dapji.load(made[0], adapter=adapter, executor="reference") as loaded:
        loaded.load_adapter("again", adapter)
    change(model / "tokenizer_config.json", replaced("assistant", "assistent"))
    with pytest.raises(CertificateError, match=r"is not what its certificate says: template default: ") as refused:
        dapji.load(model)
    assert refused.value.hint is not None
    assert f"dapji verify {model}" in refused.value.hint
    record_path(model).unlink()
    (model / "generation_config.json").unlink()
    with dapji.load(model, adapter=adapter, executor="reference"):  # as on a base in another format
        pass
    change(model / "tokenizer.json", replaced('"e": 104', '"e": 105'))
    with pytest.raises(CertificateError, match=f"{adapter} was made for other tokens than this model has: tokens of"):
        dapji.load(model, adapter=adapter)


def test_fewer_bits_are_compared_with_their_source(made: tuple[Path, Path], tmp_path: Path) -> None:
    """As transformers has it with the same weights."""
    out, whole = tmp_path / "q4.gguf", tmp_path / "whole"
    write_quantized(open_checkpoint(made[0]), out, "Q4_0")
    certificate = certify(out, lineage=Lineage(kind="quantize", parents=(parent("source", str(made[0])),)))
    write_folder(open_checkpoint(out), whole, "F32")
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (made[0], whole))
    total, places = 0.0, 0
    for passage in certificate.passages:
        with torch.no_grad():
            p, q = (model(torch.tensor([passage.tokens])).logits[0].log_softmax(-1) for model in (before, after))
        total += float((p.exp() * (p - q)).sum())
        places += len(passage.tokens)
    assert certificate.divergence is not None
    assert certificate.divergence.tokens == places
    assert certificate.divergence.kl == pytest.approx(total / places, rel=1e-3)  # float32 in another order
    assert 0.5 < certificate.divergence.same < 1


def test_a_certificate_is_renewed_or_goes(model: Path) -> None:
    change(model / "generation_config.json", replaced("2\n", "1\n"))
    write_parts(model, certificate=certify(model))
    assert failed(model) == set()
    write_lineage(model, Lineage(kind="merge"))
    with pytest.raises(UsageError, match="has no certificate"):
        list(verify(model))


def test_the_day_does_not_count(tmp_path: Path) -> None:
    """Some templates write it into every conversation."""
    template = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}\n{% endfor %}"
    path = write_tiny(tmp_path / "m.gguf", ["x"], template=template)
    files = dapji.files.open_files(path)
    text = behaviour_of(files, files.tokenizer()).conversations[0].text
    assert text == "31 Jan 2025 Why is the sky blue?\n"


@needs_native
def test_the_reference_stands_in_for_the_native_executor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was not built: with activations rounded as there, so that the tolerance holds where it was."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        certificate = certify(model)
    there = certify(model).tolerances["native"].measured
    # 1e-9 of sums in another order; the weights are float32 on both
    assert certificate.tolerances["native"].measured == pytest.approx(there, rel=0.05, abs=1e-8)
    write_parts(model, certificate=certificate)
    assert failed(model, executor="native") == set()


@needs_native
def test_what_is_too_large_for_the_reference_is_computed_by_the_native_executor(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "LARGEST", 0)
    write_parts(model, certificate=certify(model))
    certificate = read_certificate(model)
    assert certificate is not None
    assert (certificate.executor, [*certificate.tolerances]) == ("native", ["native"])
    assert {check.passed for check in verify(model, executor="native")} == {True}
    numbers = [check for check in verify(model, executor="reference") if check.part == "numbers"]
    assert {check.passed for check in numbers} == {None}
    assert "no tolerance was measured for reference" in numbers[0].detail


def test_an_executor_that_cannot_run_a_model_has_no_tolerance(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: ExecutorKind, *arguments: Any, **options: Any) -> Executor:
        if kind == "torch":
            raise ConfigError("cannot")
        return open_executor(kind, *arguments, **options)

    monkeypatch.setattr(replay, "open_executor", refuse)
    assert "torch" not in certify(model).tolerances


def test_a_base_that_is_not_here_is_asked_for(adapter: Path, made: tuple[Path, Path]) -> None:
    lineage = read_lineage(adapter)
    assert lineage is not None
    (base,) = lineage.parents
    moved = msgspec.structs.replace(lineage, parents=(msgspec.structs.replace(base, model="./gone"),))
    write_parts(adapter, lineage=moved)
    last = list(verify(adapter))[-1]
    assert (last.name, last.passed) == ("the model can be opened", False)
    assert "its base ./gone is not here" in last.detail
    assert "--base" in last.detail
    assert failed(adapter, base=str(made[0])) == set()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model(kind: ExecutorKind, tmp_path: Path) -> None:
    path = tmp_path / "real.gguf"
    path.symlink_to(store.resolve("smollm2-135m"))
    prove(path, Lineage(kind="convert"))
    assert {check.passed for check in verify(path, executor=kind)} == {True}
    certificate = read_certificate(path)
    assert certificate is not None
    # 1.6e-8 and 0.0066 were measured: float32 in another order, and activations of 8 bits
    assert certificate.tolerances["torch"].measured < 1e-6
    assert certificate.tolerances["native"].measured < 0.02
    path.unlink()
    shutil.copyfile(store.resolve("smollm2-135m"), path)
    change(path, flipped(-5, 0))
    assert f"files: {path.name}" in failed(path, executor=kind)
