"""Merged models: transformers and llama.cpp compute with them what PEFT's `merge_and_unload` does, and what is said to
survive of the change is what a plain formula says."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from peft_adapters import logits as logits_of
from peft_adapters import make, written
from test_llama_cpp import LOGARITHM, PREFIXES, write
from tiny_models import TEXT, TOLERANCE, VOCAB, opened, oracle, oracle_logits, text, translated

from dapji.errors import ConfigError
from dapji.files import Files, open_files
from dapji.models.adapter import Adapter, adaptable, combined
from dapji.ops.batch import Batch
from dapji.ops.formats import FORMATS
from dapji.ops.low_rank import LowRank
from dapji.ops.tensor import Tensor
from dapji.weights.adapter_file import write_gguf_adapter
from dapji.weights.convert import write_folder, write_quantized
from dapji.weights.merge import Survival, merged, survival
from dapji.weights.quantize import quantize
from llama_cpp import LlamaCpp


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    process = LlamaCpp()
    yield process
    process.close()


def base(name: str, folder: Path) -> Files:
    oracle(name).save_pretrained(folder)
    return open_files(folder)


def gguf_base(name: str, path: Path) -> Files:
    write(path, *translated(name))
    return open_files(path)


def adapter_for(files: Files, *, some: bool, seed: int = 0, size: float = 0.15) -> Adapter:
    """Random pairs for our matrices, all or every third of them."""
    random = np.random.default_rng(seed)
    pairs = {}
    for i, (name, (rows, cols)) in enumerate(adaptable(files.config).items()):
        if not (some and i % 3):
            a, b = (random.normal(0, size, shape).astype("f4") for shape in ((4, cols), (rows, 4)))
            pairs[name] = LowRank(a=Tensor.from_float32(name, a), b=Tensor.from_float32(name, b), scale=1.5)
    return Adapter(pairs=pairs)


def in_transformers(folder: Path) -> NDArray[np.float32]:
    # Phi-3 has a pad token beyond this vocabulary where config.json does not say one
    config = transformers.AutoConfig.from_pretrained(folder, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager").eval()
    with torch.no_grad():
        got: NDArray[np.float32] = model(torch.tensor([text()]), use_cache=False).logits[0].numpy()
    return got


def adapted(files: Files, adapter: Adapter) -> NDArray[np.float32]:
    """Logits of the base with the adapter beside it."""
    executor = opened("reference", files.config, dict(files.tensors), context=TEXT, kv="f32")
    plain = Batch.single(text())
    number = executor.add_adapter(adapter)
    return executor.step(Batch(**{**vars(plain), "adapters": np.array([number], dtype=np.int32)}))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gemma2"])
def test_transformers_loads_what_peft_would_have_merged(name: str, dora: bool, tmp_path: Path) -> None:
    """A folder of a folder, and of a GGUF file, whose q and k have other orders of rows."""
    model = make(name, use_dora=dora)
    written(model, tmp_path / "peft")
    expected = logits_of(model.merge_and_unload())
    assert np.abs(expected - oracle_logits(name)).max() > 0.5, "the adapter does something"
    files = {"folder": base(name, tmp_path / "base")}
    if name != "llama-bias":  # GGUF's llama has no bias of the feed-forward
        files["gguf"] = gguf_base(name, tmp_path / "base.gguf")
    for kind, of in files.items():
        weights = merged(of.tensors, of.adapter(tmp_path / "peft"))
        write_folder(of.checkpoint, tmp_path / kind, "F32", weights=weights)
        # float32 sums in another order, as everywhere
        np.testing.assert_allclose(in_transformers(tmp_path / kind), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama-3", "phi3-longrope"])
def test_llama_cpp_loads_what_peft_would_have_merged(llama_cpp: LlamaCpp, name: str, tmp_path: Path) -> None:
    model = make(name)
    written(model, tmp_path / "peft")
    files = gguf_base(name, tmp_path / "base.gguf")
    weights = merged(files.tensors, files.adapter(tmp_path / "peft"))
    write_quantized(files.checkpoint, tmp_path / "merged.gguf", "F32", weights=weights)
    theirs = llama_cpp.log_probabilities(tmp_path / "merged.gguf", [text()[:n] for n in PREFIXES], VOCAB)
    rows = torch.tensor(logits_of(model.merge_and_unload())[[n - 1 for n in PREFIXES]])
    np.testing.assert_allclose(theirs, rows.log_softmax(dim=1).numpy(), rtol=0, atol=LOGARITHM)
    assert open_files(tmp_path / "merged.gguf").checkpoint.metadata.keys() == files.checkpoint.metadata.keys() | {
        "general.file_type",
        "general.quantization_version",
    }


def test_some_matrices_of_a_fused_one(tmp_path: Path) -> None:
    """Of those some are float32, once they are changed, and their neighbours what they were."""
    files = base("phi3", tmp_path / "base")
    write_folder(files.checkpoint, tmp_path / "half", "F16")
    files = open_files(tmp_path / "half")
    adapter = adapter_for(files, some=True)
    weights = merged(files.tensors, adapter)
    write_folder(files.checkpoint, tmp_path / "merged", "F32", weights=weights)
    expected = adapted(files, adapter)
    np.testing.assert_allclose(in_transformers(tmp_path / "merged"), expected, rtol=0, atol=TOLERANCE)


def test_adapters_are_added_up_each_times_its_factor(tmp_path: Path) -> None:
    files = base("llama-3", tmp_path)
    one, two = adapter_for(files, some=False, seed=1), adapter_for(files, some=True, seed=2)
    weights = merged(files.tensors, combined([(one, 0.5), (two, -2.0)]))
    assert weights.keys() == one.pairs.keys()
    for name, weight in weights.items():
        want = files.tensors[name].float32().astype(np.float64)
        for adapter, factor in ((one, 0.5), (two, -2.0)):
            if name in adapter.pairs:
                pair = adapter.pairs[name]
                want += factor * pair.scale * pair.b.float32().astype(np.float64) @ pair.a.float32()
        # sums of 8 products of about 0.02, in float32
        np.testing.assert_allclose(weight.float32(), want, rtol=0, atol=1e-6)
    assert combined([(one, 1.0)]) is one


def test_magnitudes_are_merged_alone(tmp_path: Path) -> None:
    files = base("llama-3", tmp_path / "base")
    dora = files.adapter(written(make("llama-3", use_dora=True), tmp_path / "dora"))
    for adapters in ([(dora, 0.5)], [(dora, 1.0), (adapter_for(files, some=True), 1.0)]):
        with pytest.raises(ConfigError, match="cannot be added up with others or taken times a factor"):
            combined(adapters)
    with pytest.raises(ConfigError, match=r"a magnitude for .* \(DoRA\), for which GGUF has no form"):
        write_gguf_adapter(tmp_path / "a.gguf", files.config, dora, name="tiny")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_what_survives_is_what_the_formula_says(format: str) -> None:
    """Of a base that is rounded itself."""
    random = np.random.default_rng(0)
    bases, wanted, stored = {}, {}, {}
    want = []
    for name in ("a", "b"):
        w = FORMATS["Q4_0"].dequantize(quantize(random.normal(0, 0.1, (48, 64)).astype("f4"), FORMATS["Q4_0"]))
        new = w + random.normal(0, 0.01, w.shape).astype("f4")
        kept = FORMATS[format].dequantize(quantize(new, FORMATS[format]))
        for of, values in ((bases, w), (wanted, new), (stored, kept)):
            of[name] = Tensor.from_float32(name, values)
        d, r = ((values.astype(np.float64) - w).ravel() for values in (new, kept))
        want.append([d @ d, r @ d, (r - d) @ (r - d)])
    found = survival(bases, wanted, stored)
    for change, (dd, rd, ee) in zip(found.values(), want, strict=True):
        assert (change.wanted, change.projection, change.error) == pytest.approx((dd, rd, ee), rel=1e-12)
    total = Survival.total(found.values())
    dd, rd, ee = np.sum(want, axis=0)
    assert total.share == pytest.approx(rd / dd, rel=1e-12)
    if format == "F32":
        assert (total.share, total.bits) == (1, None)
    else:
        assert total.bits == pytest.approx(np.log2(np.sqrt(dd / ee)), rel=1e-9)


def test_a_change_below_the_bases_own_steps_is_rounded_away(tmp_path: Path) -> None:
    """In the base's own format nothing is left of it; in another one as fine it is there, under as much noise."""
    files = gguf_base("llama-3", tmp_path / "base.gguf")
    write_quantized(files.checkpoint, tmp_path / "q4.gguf", "Q4_0")
    rounded = open_files(tmp_path / "q4.gguf")
    adapter = adapter_for(rounded, some=False, size=0.03)
    weights = merged(rounded.tensors, adapter)
    shares, bits = {}, {}
    for scheme in ("Q4_0", "Q8_0", "F16"):
        write_quantized(rounded.checkpoint, tmp_path / "m.gguf", scheme, weights=weights, allow_requantize=True)
        total = Survival.total(survival(rounded.tensors, weights, open_files(tmp_path / "m.gguf").tensors).values())
        assert total.share is not None
        assert total.bits is not None
        shares[scheme], bits[scheme] = total.share, total.bits
    assert shares["Q4_0"] < 0.5
    assert shares["Q8_0"] == pytest.approx(1, abs=0.05)
    assert shares["F16"] == pytest.approx(1, abs=0.01)
    assert bits["Q4_0"] < bits["Q8_0"] < bits["F16"]


def test_memory_is_that_of_a_few_matrices() -> None:
    """However many there are."""
    size, peaks = 256, []
    weight = Tensor.from_float32("w", np.ones((size, size), dtype=np.float32))
    a, b = (Tensor.from_float32("pair", np.ones(shape, dtype=np.float32)) for shape in ((4, size), (size, 4)))
    pair = LowRank(a=a, b=b, scale=1.0)
    for count in (2, 32):
        names = [str(i) for i in range(count)]
        tracemalloc.start()
        bases = dict.fromkeys(names, weight)
        weights = merged(bases, Adapter(pairs=dict.fromkeys(names, pair)))
        assert Survival.total(survival(bases, weights, weights).values()).share == 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 4 * size * size
