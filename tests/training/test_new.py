"""A model from nothing: how its weights begin, that others read it alike, and that it learns a text."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from dapji.chat import ChatTemplate
from dapji.errors import ConfigError
from dapji.files import open_files
from dapji.model import load
from dapji.models.config import weight_shapes
from dapji.models.torch_executor import load_weights, sequence_logits
from dapji.ops.torch import TorchTables
from dapji.proof.lineage import read_lineage
from dapji.training.new import Sizes, initial_weights, write_new
from dapji.training.settings import read_recipe
from dapji.training.teacher import check_alike
from dapji.training.tune import tune
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.convert import write_quantized
from llama_cpp import LlamaCpp

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "benchmarks" / "data" / "shakespeare.txt"
SIZES = Sizes(layers=2, dim=64, heads=4, kv_heads=2, context=64)
TOKENS = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("new") / "deeper" / "start"
    text = path.parents[1] / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:20_000])
    write_new(path, SIZES, texts=[text], vocab_size=TOKENS, seed=3)
    return path


def test_weights_begin_as_is_said() -> None:
    config = Sizes(layers=8).config(4096)
    expected = {"embed": 0.02, ".q": 0.02, ".gate": 0.02, ".o": 0.02 / 4, ".down": 0.02 / 4}
    weights = initial_weights(config, 0)
    assert {name: tensor.shape for name, tensor in weights.items()} == weight_shapes(config)
    for name, tensor in weights.items():
        values = tensor.float32()
        if name.endswith("norm"):
            assert (values == 1).all()
        for end, deviation in expected.items():
            if name.endswith(end):
                # of n values the deviation is within 5 / sqrt(2 n) of what was drawn from, the mean within 5 / sqrt(n)
                assert values.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * values.size))
                assert abs(values.mean()) < 5 * deviation / math.sqrt(values.size)
    a, b = (weights[f"layers.{i}.attention.q"].float32() for i in (0, 1))
    assert (a != b).all()
    assert (a == initial_weights(config, 0)["layers.0.attention.q"].float32()).all()
    assert (a != initial_weights(config, 1)["layers.0.attention.q"].float32()).all()


def test_sizes_follow_from_the_layers() -> None:
    config = Sizes(layers=6).config(4096)
    (layer,) = set(config.layers)
    assert (config.dim, layer.attention.n_heads, layer.attention.head_dim) == (384, 6, 64)
    assert layer.feed_forward.hidden_dim == 1024
    with pytest.raises(ConfigError, match=r"dim \(100\) must be an even number for each of 3 heads"):
        Sizes(layers=1, dim=100, heads=3).config(300)
    with pytest.raises(ConfigError, match=r"n_heads \(4\) must be divisible by n_kv_heads \(3\)"):
        Sizes(layers=1, dim=64, heads=4, kv_heads=3).config(300)


def test_transformers_reads_it_alike(folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    ids = reader("What is the city but the people? 시민!").input_ids
    files = open_files(folder)
    ours = files.tokenizer()
    assert ids == [ours.bos_id, *ours.encode("What is the city but the people? 시민!")]
    weights = load_weights(files.tensors, device=torch.device("cpu"), dtype=torch.float32)
    logits = sequence_logits(files.config, weights, torch.tensor([ids]), TorchTables(64, torch.device("cpu")))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)  # float32, two layers, logits of about 0.2
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (0, [1, 3])
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    rendered = reader.apply_chat_template(messages * 2, add_generation_prompt=True, return_dict=True).input_ids
    template = ChatTemplate.of(ours)
    assert template.encode(template.render(messages * 2)) == rendered
    assert [ours.decode([i], skip_control=False) for i in rendered[:2]] == ["<|begin_of_text|>", "<|im_start|>"]


def test_llama_cpp_reads_it_alike(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "start.gguf"
    write_quantized(open_checkpoint(folder), path, "F32")
    ours, again = open_files(folder), open_files(path)
    assert again.config == ours.config
    tokenizer = again.tokenizer()
    assert (tokenizer.add_bos, tokenizer.stop_ids) == (True, ours.tokenizer().stop_ids)
    text = TEXT.read_text(encoding="utf-8")[:500]
    assert tokenizer.encode(text) == ours.tokenizer().encode(text)
    ids = tokenizer.encode(text)[:40]
    weights = load_weights(ours.tensors, device=torch.device("cpu"), dtype=torch.float32)
    logits = sequence_logits(ours.config, weights, torch.tensor([ids]), TorchTables(64, torch.device("cpu")))[0]
    with closing(LlamaCpp()) as llama_cpp:
        theirs = llama_cpp.log_probabilities(path, [ids[:n] for n in (1, 20, 40)], TOKENS)
    expected = torch.log_softmax(logits.double(), dim=-1)[[0, 19, 39]].numpy()
    np.testing.assert_allclose(theirs, expected, atol=1e-4)  # float32


def test_a_tokenizer_can_be_taken_from_another_model(folder: Path, tmp_path: Path) -> None:
    write_quantized(open_checkpoint(folder), tmp_path / "start.gguf", "F32")
    for name, source in (("small", folder), ("other", tmp_path / "start.gguf")):
        write_new(tmp_path / name, Sizes(layers=1), tokenizer=str(source))
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()
        lineage = read_lineage(tmp_path / name)
        assert lineage is not None
        assert [(each.role, each.model) for each in lineage.parents] == [("tokenizer", str(source))]
    check_alike(open_files(tmp_path / "small").tokenizer(), open_files(folder).tokenizer())


def test_its_lineage_names_the_texts(folder: Path) -> None:
    lineage = read_lineage(folder)
    assert lineage is not None
    (file,) = lineage.data
    text = folder.parents[1] / "text.txt"
    assert (file.use, file.file) == ("train", str(text))
    assert file.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (lineage.kind, lineage.settings["seed"], lineage.settings["layers"]) == ("new", 3, 2)


def test_a_text_is_learned_and_measured_in_bits_per_byte(folder: Path, tmp_path: Path) -> None:
    """transformers has the loss of every window of what is held out; bytes are the text's own."""
    text = TEXT.read_bytes()
    (tmp_path / "train.txt").write_bytes(text[:20_000])
    (tmp_path / "held-out.txt").write_bytes(text[20_000:24_000])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{folder}"\noutput = "{tmp_path}/out"\n[data]\ntrain = ["{tmp_path}/train.txt"]\n'
        f'evaluate = ["{tmp_path}/held-out.txt"]\nwindow = 256\n'  # of four sequences: the model's context is 64
        "[optimizer]\nlearning_rate = 1e-2\n[run]\nsteps = 30\nbatch = 4\n"
    )
    assert tune(read_recipe(recipe))
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    before, after = (metrics[i]["evaluation_bits_per_byte"] for i in (0, -1))
    assert before > 4
    assert after < before - 0.8
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = [*reader(text[20_000:24_000].decode(), add_special_tokens=False).input_ids, reader.eos_token_id]
    losses, at = [], 0
    while at < len(ids):  # windows of 64: BOS, the last token of the window before, and 62 more
        known = [reader.bos_token_id, *ids[max(0, at - 1) : at]]
        piece = ids[at : at + 64 - len(known)]
        with torch.no_grad():
            logits = theirs(torch.tensor([known + piece])).logits[0, len(known) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(piece), reduction="none"))
        at += len(piece)
    nats = torch.cat(losses)
    assert len(nats) == len(ids)
    assert metrics[-1]["evaluation_loss"] == pytest.approx(nats.mean().item(), rel=1e-4)  # float32
    assert after == pytest.approx(nats.sum().item() / math.log(2) / 4_000, rel=1e-4)


def test_everything_runs_it(folder: Path) -> None:
    """The reference and the torch executor; the native one where it was built."""
    files = open_files(folder)
    ids = files.tokenizer().encode("Speak, speak.")
    scores = []
    for executor in ("reference", "torch", None):
        with load(folder, executor=executor) as model:
            scores.append(model.engine.score(ids, start=1).chosen)
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)  # float32
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-3)  # float16 keys and values


@pytest.mark.slow
@pytest.mark.timeout(900)  # some twenty programs, one after the other
def test_the_run_from_scratch(tmp_path: Path) -> None:
    """With tiny profiles: the script twice, of which the second time trains nothing; then students with a teacher."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("out"))
    program = tmp_path / "bin" / "dapji"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m dapji "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["sh", "runs/scratch/run.sh", str(TEXT), "--profile", "tiny"]
    out = tmp_path / "runs" / "scratch" / "out"
    times = []
    for _ in range(2):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=400)
        times.append([(out / name / "dapji.json").stat().st_mtime_ns for name in ("start", "pretrained", "chat")])
    assert times[0] == times[1]
    lineage = read_lineage(out / "chat")
    assert lineage is not None
    assert [each.lineage and each.lineage.kind for each in lineage.parents] == ["tune"]
    assert (out / "train.txt").read_bytes() + (out / "held-out.txt").read_bytes() == TEXT.read_bytes()
    subprocess.run(
        ["sh", "runs/distillation/run.sh", "--profile", "tiny"], cwd=tmp_path, env=environment, check=True, timeout=400
    )
    taught = read_lineage(tmp_path / "runs" / "distillation" / "out" / "taught-2")
    assert taught is not None
    assert [each.role for each in taught.parents] == ["base", "teacher"]
