"""What the benchmarks stand on: the model that they make, and the documents that they write into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

import dapji
from dapji.models.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, LayerConfig, ModelConfig
from dapji.ops.rope import RopeConfig
from random_model import cut, write_random
from report import replace_section, table


def test_a_random_model_is_whole_and_has_weights_of_the_usual_size(tmp_path: Path) -> None:
    attention = AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=32, rope=RopeConfig(dim=32, theta=10000.0))
    layer = LayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=512))
    config = ModelConfig(
        family="llama", dim=256, vocab_size=300, max_context=64, norm_eps=1e-5, layers=(layer,) * 2, tied_head=False
    )
    path = tmp_path / "random.gguf"
    write_random(path, config)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.0.ffn_gate.weight"].tensor_type.name == "Q4_K"
    assert tensors["output.weight"].tensor_type.name == "Q6_K"
    for tensor in tensors.values():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            assert (values == 1).all()
            continue
        # 50 blocks of 256 at least: the deviation of a deviation is 1 % or less, that of the quantising is smaller
        assert values.std() == pytest.approx(values.shape[-1] ** -0.5, rel=0.05)
    with dapji.load(path) as model:
        assert len(model.complete("abc", max_tokens=4, temperature=0).tokens) <= 4
        logits = model.engine.score([1, 2, 3]).chosen
    assert np.isfinite(logits).all()


def test_a_cut_model_has_the_first_layers_of_a_published_one(tmp_path: Path) -> None:
    config = cut(Path(__file__).parent / "models" / "published" / "qwen3-30b-a3b.json", 1, 300)
    assert (config.n_layers, config.vocab_size, config.dim) == (1, 300, 2048)
    routed = config.layers[0].feed_forward
    assert isinstance(routed, ExpertsConfig)
    small = replace(routed, hidden_dim=256, routing=replace(routed.routing, n_experts=16))
    config = replace(config, dim=256, layers=(replace(config.layers[0], feed_forward=small),))
    path = tmp_path / "experts.gguf"
    write_random(path, config)
    router = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.ffn_gate_inp.weight")
    assert router.data.std() == pytest.approx(256**-0.5, rel=0.05)
    with dapji.load(path) as model:
        assert np.isfinite(model.engine.score([1, 2, 3]).chosen).all()


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# Page\n<!-- speed -->\nold\n<!-- /speed -->\nend\n")
    for text in ("new\n", table(["a", "b"], [(1, "x")])):
        replace_section(document, "speed", text)
        assert document.read_text() == f"# Page\n<!-- speed -->\n{text.strip()}\n<!-- /speed -->\nend\n"
    for broken in (
        "",
        "<!-- speed -->\n",
        "<!-- /speed -->\n<!-- speed -->\n",
        "<!-- speed -->\n<!-- /speed -->\n" * 2,
    ):
        document.write_text(broken)
        with pytest.raises(ValueError, match="one <!-- speed --> with one <!-- /speed -->"):
            replace_section(document, "speed", "new")
        assert document.read_text() == broken
