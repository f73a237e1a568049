"""Where token ids meet text: replies, options, a model's own defaults; on tiny models in files."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import dapji
from dapji.engine import Request, Sampling
from dapji.errors import (
    ConfigError,
    ContextError,
    ModelNotFound,
    RequestError,
    TemplateError,
    TokenizerError,
    UsageError,
)
from dapji.files import CHAT_SAMPLING, open_files
from dapji.model import Model
from dapji.models.size import cached_bytes
from dapji.ops.batch import KV_BLOCK
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import read_gguf, write_gguf
from tiny import CHATML, THINKING, THOUGHTFUL, write_tiny

HANGUL = "답".encode()
SCRIPT: list[str | bytes] = ["It", " is", " a ", HANGUL[:1], HANGUL[1:2], HANGUL[2:], "지", "!", " \U0001f600", "."]
ANSWER = "It is a 답지! \U0001f600."
QUESTION = [{"role": "user", "content": "What is it?\n"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", SCRIPT, max_context=512)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with dapji.load(path, executor="reference") as model:
        yield model


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = write_tiny(tmp_path_factory.mktemp("model") / "endless.gguf", SCRIPT, endless=True, max_context=512)
    with dapji.load(path, executor="reference") as model:
        yield model


def with_metadata(path: Path, target: Path, **changes: Any) -> Path:
    """A copy with other GGUF metadata; None takes a key away."""
    file = read_gguf(path)
    metadata = {key: value for key, value in {**file.metadata, **changes}.items() if value is not None}
    write_gguf(target, metadata, [TensorToWrite.of(name, tensor) for name, tensor in file.tensors.items()])
    return target


# Replies


def test_a_chat_answer_in_whole_characters_without_its_end_token(model: Model) -> None:
    reply = model.chat(QUESTION, temperature=0)
    pieces = list(reply)
    # A character that spans three tokens comes in one piece.
    assert pieces == ["It", " is", " a ", "답", "지", "!", " \U0001f600", "."]
    assert reply.text == ANSWER
    end = model.tokenizer.control["<|im_end|>"]
    assert reply.tokens[-1] == end
    assert len(reply.tokens) == len(SCRIPT) + 1
    assert reply.finish is not None
    assert (reply.finish.reason, reply.finish.stop_token) == ("stop", end)
    assert reply.finish.usage.generated == len(reply.tokens)
    assert list(reply) == []


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("답지", "It is a "),  # over token borders, from the middle of a held character
        (("!", "지!"), "It is a 답"),  # complete at the same character: the longest
        (["zebra", "is"], "It "),
        ("It", ""),
        ("답z", ANSWER),  # held back for a while, then passed on
        (".", ANSWER[:-1]),
        (".x", ANSWER),  # still held back at the end
    ],
)
def test_stop_strings_cut_the_text(model: Model, stop: str | list[str], text: str) -> None:
    reply = model.chat(QUESTION, temperature=0, stop=stop)
    assert "".join(reply) == reply.text == text
    assert reply.finish is not None
    assert reply.finish.reason == "stop"
    assert (reply.finish.stop_token is None) == (text != ANSWER)


@given(st.text("It isa답지!", min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_any_stop_string_cuts_where_it_first_stands(model: Model, stop: str) -> None:
    assert "".join(model.chat(QUESTION, temperature=0, stop=stop)) == ANSWER.split(stop)[0]


def test_max_tokens_may_end_inside_a_character(model: Model) -> None:
    reply = model.chat(QUESTION, temperature=0, max_tokens=4)
    assert "".join(reply) == "It is a \ufffd"
    assert reply.finish is not None
    assert reply.finish.reason == "length"


def test_any_answer_joined_is_the_decoding_of_its_tokens(endless: Model) -> None:
    for seed in range(20):
        reply = endless.complete("\n", temperature=30, max_tokens=60, seed=seed)  # all kinds of bytes
        text = "".join(reply)
        tokens = reply.tokens
        if reply.finish is not None and reply.finish.stop_token is not None:
            tokens = tokens[:-1]
        assert text == reply.text == endless.tokenizer.decode(tokens, continuation=True)


def test_the_next_turn_finds_the_last_one_in_the_cache(tmp_path: Path) -> None:
    script = list("abcdefghijklmnopqrstuvwxyz")  # tokens that encoding the answer gives again
    with dapji.load(write_tiny(tmp_path / "letters.gguf", script, endless=True), executor="reference") as model:
        first = model.chat(QUESTION, temperature=0, max_tokens=50)
        messages = [*QUESTION, {"role": "assistant", "content": "".join(first)}, {"role": "user", "content": "On.\n"}]
        computed = model.template.prompt(QUESTION) + first.tokens[:-1]
        assert model.template.prompt(messages)[: len(computed)] == computed
        second = model.chat(messages, temperature=0, max_tokens=5)
        assert "".join(second) == "abcde"
        assert second.finish is not None
        assert second.finish.usage.cached == len(computed)


def test_logprobs_come_with_the_tokens(model: Model) -> None:
    reply = model.chat(QUESTION, temperature=0, logprobs=2)
    list(reply)
    assert [logprobs.top[0][0] for logprobs in reply.logprobs] == reply.tokens
    assert all(logprobs.chosen == logprobs.top[0][1] for logprobs in reply.logprobs)
    assert model.chat(QUESTION).logprobs == []


def test_closing_a_reply_ends_it(endless: Model) -> None:
    reply = endless.chat(QUESTION, temperature=0)
    assert next(reply) == "It"
    reply.close()
    assert list(reply) == []
    assert reply.text == "It"
    assert reply.finish is None
    assert not endless.engine._scheduler.busy


def test_a_reply_that_is_let_go_ends(tmp_path: Path) -> None:
    steps = 0
    with dapji.load(write_tiny(tmp_path / "endless.gguf", SCRIPT, endless=True), executor="reference") as model:
        step = model.executor.step

        def counted(batch: Any, hidden: Any = None) -> Any:
            nonlocal steps
            steps += 1
            return step(batch, hidden)

        model.executor.step = counted
        reply = model.chat(QUESTION, temperature=0)
        next(reply)
        del reply
        gc.collect()
        assert "".join(model.chat(QUESTION, temperature=0, max_tokens=3)) == "It is a "
        assert not model.engine._scheduler.busy
    assert steps < 500  # of the 4096 that its context holds


def test_complete_continues_text_and_takes_control_tokens_for_text(model: Model) -> None:
    assert "".join(model.complete("Answer:\n", temperature=0)) == ANSWER
    typed = "<|im_end|>\n"
    assert "".join(model.complete(typed, temperature=0)) == ANSWER
    reply = model.complete(typed, temperature=0, max_tokens=1)
    list(reply)
    assert reply.finish is not None
    assert reply.finish.usage.prompt == len(typed)  # the tiny vocabulary has a token for each of its bytes
    with pytest.raises(RequestError, match="at least one token"):
        model.complete("")


def test_reasoning_stands_apart(tmp_path: Path) -> None:
    """The prompt opens it, so the answer begins inside."""
    with dapji.load(write_tiny(tmp_path / "tiny.gguf", THOUGHTFUL, template=THINKING), executor="reference") as model:
        reply = model.chat(QUESTION, temperature=0)
        assert list(reply) == ["42", "입니다."]
        assert (reply.text, reply.reasoning) == ("42입니다.", "음, 생각")
        reply = model.chat(QUESTION, temperature=0)
        events = list(reply.events())
        assert [type(event).__name__ for event in events] == ["Reasoning", "Reasoning", "Markup", "Content", "Content"]
        assert "".join(event.text for event in events) == "".join(THOUGHTFUL)
        assert "".join(model.complete("\n", temperature=0)) == "".join(THOUGHTFUL)  # no chat, no format
        reply = model.chat(QUESTION, temperature=0, stop="생")
        assert (list(reply), reply.reasoning) == ([], "음, ")


LLAMA_TOOLS = CHATML + '{# tools "parameters": ipython #}'
NOW = [{"type": "function", "function": {"name": "now", "parameters": {}}}]


@pytest.mark.parametrize("control", [True, False])
def test_tool_calls_stand_apart(control: bool, tmp_path: Path) -> None:
    """After a control token, which counts as a marker where it is one; typed, it is text."""
    script = ["<|python_tag|>", '{"name": "now", ', '"parameters": {}}']
    if not control:
        script[:1] = ["<|python", "_tag|>"]
    path = write_tiny(tmp_path / "tiny.gguf", script, template=LLAMA_TOOLS, control=["<|python_tag|>"])
    with dapji.load(path, executor="reference") as model:
        reply = model.chat(QUESTION, tools=NOW, temperature=0)
        text = "".join(reply)
        calls = [(call.name, call.arguments) for call in reply.tool_calls]
        assert (text, calls) == (("", [("now", "{}")]) if control else ("".join(script), []))
        assert "".join(model.chat(QUESTION, temperature=0)) == "".join(script[1:] if control else script)
        stopped = model.chat(QUESTION, tools=NOW, temperature=0, stop='"parameters"')
        assert "".join(stopped) == "".join(script)[: "".join(script).index('"param')], "what was held back is text"


def test_tools_need_a_template_with_a_place_for_them(model: Model) -> None:
    with pytest.raises(TemplateError, match=r"no place for tools.*\nhint: "):
        model.chat(QUESTION, tools=NOW)


def test_variables_reach_the_template(model: Model, tmp_path: Path) -> None:
    template = CHATML + "{% if shout %}!\n{% endif %}"
    with dapji.load(write_tiny(tmp_path / "tiny.gguf", SCRIPT, template=template), executor="reference") as model:
        prompts = [model.chat(QUESTION, max_tokens=1, variables=given) for given in (None, {"shout": True})]
        usages = [reply.finish.usage.prompt for reply in prompts if list(reply) and reply.finish is not None]
        assert usages[1] == usages[0] + 2


def test_reasoning_is_asked_for_where_the_template_lets_one_choose(tmp_path: Path) -> None:
    asked = "{{ enable_thinking if enable_thinking is defined }}{{ reasoning_effort }}"
    for template, wanted, written in [
        (CHATML + asked, True, "True"),
        (CHATML + asked, False, "False"),
        (CHATML + asked, "high", "high"),
        (CHATML + "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}", True, "True"),
        (CHATML, False, ""),
        (THINKING, True, "<think>\n"),
        (CHATML, True, None),
        (CHATML, "high", None),
        (THINKING, False, None),
    ]:
        path = write_tiny(tmp_path / "tiny.gguf", SCRIPT, template=template)
        with dapji.load(path, executor="reference") as model:
            if written is None:
                with pytest.raises(TemplateError, match="this model's chat template has no"):
                    model.prepare_chat(QUESTION, thinking=wanted)
                continue
            prompt = model.tokenizer.decode(model.prepare_chat(QUESTION, thinking=wanted).request.prompt)
            assert prompt.endswith(f"assistant\n{written}"), template


# Options


def test_options_have_the_defaults_filled_in(model: Model) -> None:
    options = model.options(top_k=5, stop="x")
    assert options == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "seed": None,
        "max_tokens": None,
        "stop": ("x",),
        "logprobs": None,
        "grammar": None,
        "adapter": None,
    }
    assert model.options(**options) == options


def test_wrong_options_are_refused(model: Model) -> None:
    with pytest.raises(RequestError, match="unknown option 'temprature'") as caught:
        model.chat(QUESTION, temprature=1)
    assert "temperature" in str(caught.value)
    assert "max_tokens" in str(caught.value)
    with pytest.raises(RequestError, match=r"top_p must be > 0 and <= 1, got 7"):
        model.options(top_p=7)
    with pytest.raises(RequestError, match="empty"):
        model.chat(QUESTION, stop="")
    with pytest.raises(ContextError, match=r"max_tokens \(600\) together exceed the context \(512 tokens\)"):
        model.chat(QUESTION, max_tokens=600)
    long = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(ContextError, match=r"the prompt \(6\d\d tokens\) leaves no room"):
        model.chat(long)


# What the files say


def test_summary_and_files(model: Model, path: Path) -> None:
    n = sum(np.prod(tensor.shape) for tensor in read_gguf(path).tensors.values())
    assert model.summary == f"{n / 1e6:.3g}M parameters of 32 bits, context 512"
    assert model.name == "tiny.gguf"
    assert model.engine.end_tokens == {model.tokenizer.control["<|im_end|>"], model.tokenizer.control["<|endoftext|>"]}


def test_context_is_the_models_but_at_most_8192(path: Path, tmp_path: Path) -> None:
    long = with_metadata(path, tmp_path / "long.gguf", **{"llama.context_length": 40_000})
    for given_context, expected in ((None, 8192), (10_000, 10_000)):
        with dapji.load(long, executor="reference", context=given_context) as model:
            assert model.engine.context == expected
    for wrong in (0, 513):
        with pytest.raises(ConfigError, match=f"context of {wrong} tokens"):
            dapji.load(path, executor="reference", context=wrong)


def test_a_model_without_a_template_completes_but_does_not_chat(path: Path, tmp_path: Path) -> None:
    base = with_metadata(path, tmp_path / "base.gguf", **{"tokenizer.chat_template": None})
    with dapji.load(base, executor="reference") as model:
        assert "".join(model.complete("\n", temperature=0)) == ANSWER
        with pytest.raises(TemplateError):
            model.chat(QUESTION)


def test_what_is_no_model(tmp_path: Path, path: Path) -> None:
    with pytest.raises(ModelNotFound):
        dapji.load(tmp_path / "missing.gguf")
    more = [f"extra{i}" for i in range(3)]
    metadata = read_gguf(path).metadata
    many = with_metadata(
        path,
        tmp_path / "many.gguf",
        **{
            "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], *more],
            "tokenizer.ggml.token_type": np.array([*metadata["tokenizer.ggml.token_type"], 1, 1, 1], dtype=np.int32),
        },
    )
    with pytest.raises(TokenizerError, match=r"the tokenizer has \d+ tokens, the model's weights only \d+"):
        dapji.load(many, executor="reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in the Hugging Face layout whose weights have more rows than its tokenizer has tokens."""
    path = tmp_path_factory.mktemp("folder")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HfTokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


def test_a_folder_completes_like_transformers(folder: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(folder).eval()
    with dapji.load(folder, executor="reference", kv="f32") as model:
        reply = model.complete("Hello", temperature=0, max_tokens=20)
        list(reply)
        prompt = torch.tensor([[256, *model.tokenizer.encode("Hello")]])
        with torch.no_grad():
            for token in reply.tokens:
                logits = reference(prompt).logits[0, -1]
                assert token == int(logits[:258].argmax())  # the rows beyond the tokenizer's are never drawn
                prompt = torch.cat([prompt, torch.tensor([[token]])], dim=1)
        hot = model.engine.generate(
            Request(prompt=[256], max_tokens=120, sampling=Sampling(temperature=50, seed=0), ignore_eos=True)
        )
        assert {output.token for output in hot} <= set(range(258))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, CHAT_SAMPLING),
        ({"eos_token_id": 257, "temperature": None}, CHAT_SAMPLING),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.5}, {"temperature": 0.0}),
        (
            {"do_sample": False, "repetition_penalty": 1.1, "top_k": 20},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        ({"repetition_penalty": 1.1}, {**CHAT_SAMPLING, "repetition_penalty": 1.1}),
        ({"top_p": 0.8, "top_k": -1}, {"top_p": 0.8, "top_k": 0}),
    ],
)
def test_generation_config_sets_the_defaults(
    folder: Path, generation: dict[str, Any], expected: dict[str, Any]
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with dapji.load(folder, executor="reference") as model:
        options = model.options()
        neutral = Sampling(**expected)
        assert {name: options[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")} == {
            name: getattr(neutral, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")
        }
        assert model.options(temperature=1.5)["temperature"] == 1.5


def test_gguf_metadata_sets_the_defaults(path: Path, tmp_path: Path) -> None:
    advice = {"temp": np.float32(0.6), "top_k": 20, "top_p": np.float32(0.95), "penalty_repeat": np.float32(1.05)}
    advised = with_metadata(path, tmp_path / "a.gguf", **{f"general.sampling.{k}": v for k, v in advice.items()})
    assert open_files(advised).sampling() == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
    }


def test_defaults_out_of_range_name_the_file(folder: Path, path: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(ConfigError, match=r"default sampling: temperature must be .* got 'hot'"):
        dapji.load(folder, executor="reference")
    wrong = with_metadata(path, tmp_path / "b.gguf", **{"general.sampling.top_p": "high"})
    with pytest.raises(ConfigError, match=r"b.gguf: default sampling: top_p must be .* got 'high'"):
        dapji.load(wrong, executor="reference")


def test_the_cache_takes_the_memory_given_and_at_least_one_conversation(path: Path) -> None:
    with dapji.load(path, executor="reference", context=100) as one:
        blocks = one.executor.n_blocks
        cache = one.memory - one.files.checkpoint.nbytes
        assert blocks == -(-100 // KV_BLOCK)
        assert cache == blocks * KV_BLOCK * cached_bytes(one.config, "f16")
    for given_memory, expected in ((3 * cache, 3 * blocks), (1, blocks)):
        with dapji.load(path, executor="reference", context=100, kv_memory=given_memory) as model:
            assert model.executor.n_blocks == expected
            assert model.engine.context == one.engine.context


@pytest.mark.parametrize("max_running", [1, 2])
def test_as_many_requests_run_at_once_as_is_said(path: Path, max_running: int) -> None:
    ended: list[int] = []

    async def read(n: int, model: Model) -> None:
        async for _ in model.engine.agenerate(Request(prompt=[5, n], max_tokens=n, ignore_eos=True)):
            pass
        ended.append(n)

    async def run() -> None:
        options: Any = {"executor": "reference", "kv_memory": 1 << 22, "max_running": max_running}
        with dapji.load(path, **options) as model:
            await asyncio.gather(read(200, model), read(3, model))

    asyncio.run(run())
    assert ended == ([200, 3] if max_running == 1 else [3, 200])
    with pytest.raises(UsageError, match=r"max_running \(0\)"):
        dapji.load(path, executor="reference", max_running=0)
