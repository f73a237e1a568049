"""The regular expressions of the pre-tokenizers: documented, and meaning the same to another engine.

Published models were trained with the Rust crates fancy-regex and onig or with Python's `regex`; we run Oniguruma.
Where an expression meant something else to it, words would be cut elsewhere than in training.
"""

import re
import unicodedata
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from dapji.errors import TokenizerError
from dapji.tokenizer import pretokenizers
from dapji.tokenizer.pretokenizers import PRE_TOKENIZERS, pre_tokenizer

EXPRESSIONS = sorted({pattern for pre in PRE_TOKENIZERS.values() for pattern in pre.patterns})
PARTS = [
    "a", "B", "Word", "camelCase", "don't", "I'LL", "'s", "é", "e\u0301", "가", "각", "ㄱ", "漢字", "ひ", "カ", "ー",
    "Я", "ä", "ß", "ǅ", "ʰ", "़", "हिन्दी", "ไทย", "٣", "½", "Ⅷ", "x²", "0", "123", "12345", " ", "  ",
    "\u3000", "\u00a0", "\t", "\n", "\r\n", "\r", ".", "...", "!?", "(", "/", "//", "$", "+", "=", "^", "~", "_", "-",
    "「", "、", "。", "～", "😀", "👨‍👩‍👧", "🇰🇷", "\u200d", "\x00", "\ufeff",
]  # fmt: skip
"""Letters of every kind, marks, digits of every kind, white space of every kind, punctuation, symbols."""
texts = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


def split_by_regex(expression: str, text: str) -> list[str]:
    """Matches and what lies between them, by Python's `regex`."""
    pieces, at = [], 0
    for match in regex.finditer(expression, text, flags=regex.VERSION1 | regex.MULTILINE):
        pieces += [text[at : match.start()], match[0]]
        at = match.end()
    return [piece for piece in [*pieces, text[at:]] if piece]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
@settings(max_examples=50)
@given(text=texts)
def test_means_the_same_to_another_engine(expression: str, text: str) -> None:
    split = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == split_by_regex(expression, text)


def test_the_letters_of_deepseek_llm_are_undamaged() -> None:
    """A list of 217 ranges is easily damaged, by an editor that normalises for one; it holds letters with case only."""
    source = Path(pretokenizers.__file__).read_text(encoding="utf-8")
    assert unicodedata.is_normalized("NFC", source)
    (expression,) = [e for e in PRE_TOKENIZERS["deepseek-llm"].patterns if "A-Za-z" in e]
    everything = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    listed = set("".join(re.findall(expression.removeprefix(r"\s?"), everything)))
    cased = set("".join(regex.findall(r"[\p{Lu}\p{Ll}\p{Lt}]+", everything)))
    assert listed - cased <= {"ʕ"}  # which Unicode has moved since
    assert len(listed) > 2000


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("smollm", "I've 123 things", ["I", "'ve", " ", "1", "2", "3", " things"]),
        ("exaone", "답지 2개", ["답지", " ", "2", "개"]),
        ("exaone4", "답지 22개", ["답지", " 22", "개"]),
        ("exaone-moe", "열린 언어 모델1", ["열린 언어 모델", "1"]),
        ("llama-bpe", "I'VE 12345\n\n  x", ["I", "'VE", " ", "123", "45", "\n\n", " ", " x"]),
        ("qwen2", "12 a\u0301b", ["1", "2", " a", "\u0301b"]),
        ("qwen35", "12 a\u0301b", ["1", "2", " a\u0301b"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("gpt-4o", "camelCase's 1234", ["camel", "Case's", " ", "123", "4"]),
        ("kimi-k2", "中文abc가1234", ["中文", "abc가", "123", "4"]),
        ("deepseek-v3", "中文abc 1234.com", ["中文", "abc", " ", "123", "4", ".com"]),
        ("deepseek-llm", "中文abc 12.", ["中文", "abc", " ", "1", "2", "."]),
        ("deepseek-coder", "abc, 12", ["abc", ",", " ", "1", "2"]),
        ("falcon", "a$1234", ["a", "$", "123", "4"]),
    ],
)
def test_words_of_an_example(name: str, text: str, words: list[str]) -> None:
    pieces = [text]
    for pattern in pre_tokenizer(name).patterns:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        pieces = [word for piece in pieces for word, _ in split.pre_tokenize_str(piece)]
    assert pieces == words


def test_every_name_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    page = page.partition("## Pre-tokenizers")[2]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    documented = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(documented) == sorted(PRE_TOKENIZERS)


def test_an_unknown_name_gives_the_known_ones() -> None:
    with pytest.raises(TokenizerError, match=r"'unheard-of'.*llama-bpe.*\nhint: .*tokenizer.json"):
        pre_tokenizer("unheard-of")
