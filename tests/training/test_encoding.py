"""Which tokens are learned: against a loop over ChatML's parts, transformers' masks, each template's own answers."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from byte_tokenizers import ENDS, Tokenizers, control_tokens, make_tokenizers
from dapji.chat import ChatTemplate
from dapji.chat.turn import Turns
from dapji.errors import ContextError, DapjiError, FormatError, TemplateError
from dapji.tokenizer import Tokenizer
from dapji.training.data.dataset import Dataset
from dapji.training.data.encoding import Encoder, Sample
from dapji.training.data.examples import Conversation, Preference, Rated, Text
from dapji.training.data.stream import Stream
from tiny import CHATML, CONTROL

ASKED = {"role": "user", "content": "2 + 2?"}
SAID = {"role": "assistant", "content": "4."}


def conversation(*messages: Any, trained: Any = None) -> Conversation:
    learned = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    return Conversation(messages=messages, trained=frozenset(learned if trained is None else trained))


def learned_texts(tokenizer: Tokenizer, sample: Sample) -> list[str]:
    """Of each sequence, the learned runs, with | between them."""
    found = []
    for sequence in sample.sequences:
        runs: list[list[int]] = [[]]
        for token, learned in zip(sequence.ids.tolist(), sequence.learned, strict=True):
            if learned:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        found.append("|".join(tokenizer.decode(run, skip_control=False, continuation=True) for run in runs if run))
    return found


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@settings(deadline=None)
@given(
    answers=st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=4).filter(
        lambda turns: any(learned for _, _, learned in turns)
    ),
    system=st.none() | TEXTS,
)
def test_masks_of_chatml(both: Tokenizers, answers: list[tuple[str, str, bool]], system: str | None) -> None:
    """Part by part: headers and other roles' messages are not learned, answers and their end tokens are."""
    start, end = (both.ours.control[name] for name in ("<|im_start|>", "<|im_end|>"))
    messages = [{"role": "system", "content": system}] if system is not None else []
    trained = set()
    for asked, said, learned in answers:
        if learned:
            trained.add(len(messages) + 1)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    ids: list[int] = []
    mask: list[bool] = []
    for i, message in enumerate(messages[: max(trained) + 1]):
        parts = [([start, *both.ours.encode(message["role"] + "\n")], False)]
        parts += [([*both.ours.encode(message["content"]), end], i in trained), (both.ours.encode("\n"), False)]
        for part, learned in parts:
            ids += part
            mask += [learned] * len(part)
    (sample,) = Encoder(both.ours).encode(conversation(*messages, trained=trained)).samples
    (sequence,) = sample.sequences
    assert sequence.ids.tolist() == ids[:-1]  # without the newline after the last answer
    assert sequence.learned.tolist() == mask[:-1]


GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LAGUNA = "<assistant>\n</think>"
NOT_OURS = {
    "own": "",
    "LFM2.5-8B-A1B": "\n",
    "poolside-Laguna-S-2.1": "<assistant><think>\n<assistant><think>",
    "poolside-Laguna-XS-2.1": f"{_LAGUNA}\n{_LAGUNA}",
    "poolside-Laguna-XS.2": f"{_LAGUNA}\n{_LAGUNA}",
}
"""Templates that mark what is generated, and what they mark beyond what a model writes: headers, which stand in the
prompt already, and what follows an end token."""


def published() -> dict[str, str]:
    folder = oracles.llama_cpp_models() / "templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


@pytest.mark.parametrize("name", NOT_OURS)
def test_masks_of_transformers(name: str, tmp_path: Path) -> None:
    source = GENERATION if name == "own" else published()[name]
    both = make_tokenizers(control_tokens(source), tmp_path, ENDS.get(name, []), template=source)
    messages = [{"role": "system", "content": "Be brief."}, ASKED, SAID, {"role": "user", "content": "3 + 3?"},
                {"role": "assistant", "content": "6, 답."}]  # fmt: skip
    theirs = both.theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    (sample,) = Encoder(both.ours).encode(conversation(*messages)).samples
    (sequence,) = sample.sequences
    n = len(sequence.ids)
    assert sequence.ids.tolist() == theirs.input_ids[:n]
    marked = np.array(theirs.assistant_masks[:n], dtype=bool)
    assert not (sequence.learned & ~marked).any()
    assert both.theirs.decode(sequence.ids[marked & ~sequence.learned]) == NOT_OURS[name]
    assert both.theirs.decode(theirs.input_ids[n:]).strip() == ""


REWRITE = {
    "Apriel-1.6-15b-Thinker-fixed",
    "Cohere2MoE",
    "GLM-4.7-Flash",
    "MiniMax-M2",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "NVIDIA-Nemotron-Nano-v2",
    "Qwen-QwQ-32B",
    "Qwen-Qwen3-0.6B",
    "Qwen3.5-4B",
    "Spark2.5",
    "StepFun3.5-Flash",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.2",
    "google-gemma-4-31B-it",
    "google-gemma-4-31B-it-interleaved",
    "llama-cpp-deepseek-r1",
    "llama-cpp-rwkv-world",
    "openai-gpt-oss-120b",
}
"""Templates that write an answer otherwise once the conversation goes on: each answer is a sequence of its own."""


def test_conversations_of_every_published_template(tmp_path: Path) -> None:
    """Each answer is learned once, after the prompt that the model gets; sequences are shared where they can be."""
    messages = [ASKED, SAID, {"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6."},
                {"role": "user", "content": "4 + 4?"}, {"role": "assistant", "content": "8."}]  # fmt: skip
    rewrite, refused = set(), set()
    for name, source in published().items():
        both = make_tokenizers(control_tokens(source), tmp_path / name, ENDS.get(name, []), template=source)
        turns = Turns(ChatTemplate.of(both.ours))
        try:
            encoded = Encoder(both.ours).encode(conversation(*messages))
        except TemplateError:
            refused.add(name)
            continue
        if len(encoded.samples) > 1:
            rewrite.add(name)
        assert len(encoded.samples) in (1, 3), name
        assert ("split by the template" in encoded.notes) == (len(encoded.samples) > 1)
        sequences = [sample.sequences[0] for sample in encoded.samples]
        for i, sequence in zip((1, 3, 5), sequences if len(sequences) > 1 else sequences * 3, strict=True):
            turn = turns.turn(messages, i)
            end = len(turn.prompt) + len(turn.answer)
            assert sequence.ids[:end].tolist() == turn.prompt + turn.answer, name
            assert sequence.learned[len(turn.prompt) : end].all(), name
            assert len(sequences) == 1 or not sequence.learned[: len(turn.prompt)].any(), name
        assert sum(int(sequence.learned.sum()) for sequence in sequences) == sum(
            len(turns.turn(messages, i).answer) for i in (1, 3, 5)
        )
    assert rewrite == REWRITE
    assert len(refused) == 5


def test_what_is_learned(both: Tokenizers) -> None:
    encoder = Encoder(both.ours)

    def learned(example: Any) -> list[list[str]]:
        return [learned_texts(both.ours, sample) for sample in encoder.encode(example).samples]

    assert learned(conversation(ASKED, SAID, ASKED, SAID)) == [["4.<|im_end|>|4.<|im_end|>"]]
    assert learned(conversation(ASKED, SAID, ASKED, SAID, trained={3})) == [["4.<|im_end|>"]]
    assert learned(Text(text="a 한 줄")) == [[" 한 줄</s>"]]  # nothing is before the first token
    assert learned(Text(prompt="2 + 2 =", text=" 4")) == [[" 4</s>"]]
    wrong = conversation(ASKED, {"role": "assistant", "content": "5."})
    pair = Preference(chosen=conversation(ASKED, SAID), rejected=wrong)
    assert learned(pair) == [["4.<|im_end|>", "5.<|im_end|>"]]
    (sample,) = encoder.encode(Rated(answer=wrong, good=False)).samples
    assert (learned_texts(both.ours, sample), sample.good) == (["5.<|im_end|>"], False)


def test_a_text_is_what_completion_reads(add_bos: Tokenizer) -> None:
    """BOS, which is not learned, then the prompt's ids as `Model.complete` has them, then the text's."""
    (sample,) = Encoder(add_bos).encode(Text(prompt="a", text="b")).samples
    (sequence,) = sample.sequences
    assert sequence.ids.tolist() == [add_bos.bos_id, *add_bos.encode("a"), *add_bos.encode("b"), add_bos.eos_id]
    assert sequence.learned.tolist() == [False, False, True, True]


def test_a_long_text_is_cut_and_each_token_is_learned_once(both: Tokenizers, add_bos: Tokenizer) -> None:
    text = "abcdefghijklmnop"
    for tokenizer, expected in (
        (add_bos, ["<s>abcdefg", "<s>ghijklm", "<s>mnop</s>"]),
        (both.ours, ["abcdefgh", "hijklmno", "op</s>"]),
    ):
        encoded = Encoder(tokenizer, max_length=8).encode(Text(text=text))
        sequences = [sample.sequences[0] for sample in encoded.samples]
        assert [tokenizer.decode(sequence.ids, skip_control=False) for sequence in sequences] == expected
        learned = [token for sequence in sequences for token in sequence.ids[sequence.learned].tolist()]
        whole = [*tokenizer.encode(text), tokenizer.eos_id]
        assert learned == (whole if tokenizer.add_bos else whole[1:])  # nothing is before the very first
        assert encoded.notes == {"cut into pieces"}


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=8), size=st.integers(4, 40), seed=st.integers(0, 9))
def test_windows_hold_every_token_of_every_text_once(
    both: Tokenizers, lengths: list[int], size: int, seed: int
) -> None:
    """Also of texts that are much longer than a window; each end is learned, and a sequence is a part of one text."""
    encoder = Encoder(both.ours, max_length=size)
    texts = ["".join(chr(33 + (7 * i + n) % 90) for i in range(n)) for n in lengths]
    samples = [sample for text in texts for sample in encoder.encode(Text(text=text)).samples]
    with TemporaryDirectory() as folder:
        stream = Stream(Dataset.write(Path(folder) / "set", samples), capacity=2 * size, seed=seed)
        windows = [stream.window(i) for i in range(len(stream.epoch(0)))]
    learned = Counter(token for window in windows for token in window.labels.tolist())
    whole = [[*both.ours.encode(text), both.ours.eos_id] for text in texts]
    assert learned == Counter(token for ids in whole for token in ids[1:])  # nothing is before the very first
    found = [window.tokens[a:b].tolist() for window in windows for a, b in pairwise(window.starts.tolist())]
    assert all(any(ids[i : i + len(part)] == part for ids in whole for i in range(len(ids))) for part in found)


@pytest.fixture
def add_bos(both: Tokenizers, tmp_path: Path) -> Tokenizer:
    both.theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    return Tokenizer.from_folder(tmp_path)


def test_the_end_is_learned_where_it_is_the_pad_token_too(both: Tokenizers, tmp_path: Path) -> None:
    both.theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|im_end|>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_tokens["pad_token"] == "<|im_end|>"
    (sample,) = Encoder(tokenizer).encode(conversation(ASKED, SAID)).samples
    assert learned_texts(tokenizer, sample) == ["4.<|im_end|>"]


def test_a_template_that_drops_reasoning_gets_an_example_for_each_answer(tmp_path: Path) -> None:
    source = CHATML.replace(
        "{{ message.content }}",
        "{% if message.reasoning_content and loop.last %}"
        "<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ message.content }}",
    )
    tokenizer = make_tokenizers(CONTROL, tmp_path, template=source).ours
    thought = SAID | {"reasoning_content": "Hm."}
    encoded = Encoder(tokenizer).encode(conversation(ASKED, thought, ASKED, thought))
    assert [learned_texts(tokenizer, sample) for sample in encoded.samples] == [
        ["<think>\nHm.\n</think>\n\n4.<|im_end|>"]
    ] * 2
    first, second = (tokenizer.decode(sample.sequences[0].ids, skip_control=False) for sample in encoded.samples)
    assert second.startswith(first.replace("<think>\nHm.\n</think>\n\n", ""))
    assert encoded.notes == {"split by the template"}
    with pytest.raises(FormatError, match="the chosen has answers that the chat template rewrites"):
        Encoder(tokenizer).encode(
            Preference(chosen=conversation(ASKED, thought, ASKED, thought), rejected=conversation(ASKED, SAID))
        )


def test_what_cannot_be_learned_is_refused(both: Tokenizers, tmp_path: Path) -> None:
    plain = conversation(ASKED, SAID)
    doubled = make_tokenizers(CONTROL, tmp_path / "a", template="<s><s>" + CHATML).ours
    cases: list[tuple[Encoder, Any, type[DapjiError], str]] = [
        (Encoder(both.ours), conversation(ASKED, {"role": "assistant", "content": " "}), TemplateError, "empty answer"),
        (Encoder(both.ours), conversation(SAID, ASKED), TemplateError, "answers nothing"),
        (Encoder(both.ours), Preference(chosen=plain, rejected=plain), FormatError, "the same"),
        (Encoder(both.ours, max_length=27), plain, ContextError, "28 tokens, but the context has 27"),
        (Encoder(both.ours, max_length=10, truncate=True), plain, FormatError, "none of its 10 tokens is learned"),
        (Encoder(doubled), plain, FormatError, "begins with BOS twice"),
    ]
    for encoder, example, kind, message in cases:
        with pytest.raises(kind, match=message):
            encoder.encode(example)


def test_truncating_is_asked_for_and_counted(both: Tokenizers) -> None:
    encoded = Encoder(both.ours, max_length=27, truncate=True).encode(conversation(ASKED, SAID))
    assert learned_texts(both.ours, encoded.samples[0]) == ["4."]
    assert encoded.notes == {"truncated"}
