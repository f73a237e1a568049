r"""Pre-tokenizers of byte-level BPE: how a text is cut into words before merging, by the GGUF key `tokenizer.ggml.pre`.

A tokenizer.json states its pre-tokenizer in full; a GGUF file carries only a name, so what the name stands for has to
be known here. The regular expressions are those of the models' own tokenizer.json files, in Oniguruma's syntax. They
are applied one after the other: each cuts the pieces that the ones before it left, into matches and what lies between.

Knows nothing of vocabularies or files.
"""

from __future__ import annotations

from dataclasses import dataclass

from dapji.errors import TokenizerError


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """What a name in `tokenizer.ggml.pre` stands for."""

    patterns: tuple[str, ...]
    """Regular expressions, applied in this order."""
    ignore_merges: bool = False
    """A word that is a token as a whole becomes that token without merging."""
    add_bos: bool = False
    """Whether a BOS is added where the file does not say."""
    nfc: bool = False
    """Text is normalised to NFC first (matters for Korean typed on a Mac, which arrives as single letters)."""


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"

_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n]*|{_SPACE}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_PUNCTUATION}[\r\n]*|{_SPACE}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
_GPT4O = rf"{_CASED.replace('{0}', f'{_CONTRACTION}?')}|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n/]*|{_SPACE}"
_TEKKEN = rf"{_CASED.replace('{0}', '')}|\p{{N}}|{_PUNCTUATION}[\r\n/]*|{_SPACE}"
_KIMI = (
    r"\p{Han}+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    rf"{_CONTRACTION}?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    rf"{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n]*|{_SPACE}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
"""The letters with case of Unicode 13, as DeepSeek-LLM's tokenizer.json lists them; escaped where NFC changes them."""


def _same(names: str, pre_tokenizer: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre_tokenizer)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_same(
        "gpt-2 phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum granite-docling",
        PreTokenizer(patterns=(_GPT2,)),
    ),
    **_same(
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        PreTokenizer(patterns=(r"\p{N}", _GPT2)),
    ),
    **_same(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **_same("glm4 glm5", PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True)),
    **_same("dbrx smaug-bpe chatglm-bpe", PreTokenizer(patterns=(_LLAMA3,))),
    **_same("qwen2 deepseek-r1-qwen", PreTokenizer(patterns=(_QWEN2,), nfc=True)),
    **_same("stablelm2 hunyuan megrez solar-open grok-2 kormo", PreTokenizer(patterns=(_QWEN2,))),
    "qwen35": PreTokenizer(patterns=(_QWEN35,), nfc=True),
    **_same("gpt-4o kanana2", PreTokenizer(patterns=(_GPT4O,))),
    "llama4": PreTokenizer(patterns=(_GPT4O,), ignore_merges=True),
    "minimax-m2": PreTokenizer(patterns=(_GPT4O,), nfc=True),
    "tekken": PreTokenizer(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "kimi-k2": PreTokenizer(patterns=(_KIMI,), ignore_merges=True),
    "deepseek-llm": PreTokenizer(
        patterns=(
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            r"[一-龥ࠀ-一가-퟿]+",
            r"\p{N}",
        )
    ),
    "deepseek-coder": PreTokenizer(
        patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    ),
    **_same("deepseek-v3 hunyuan-dense joyai-llm", PreTokenizer(patterns=_DEEPSEEK3)),
    "falcon": PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "default": PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "seed-coder": PreTokenizer(
        patterns=(rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}",),
    ),
    "bailingmoe": PreTokenizer(
        patterns=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    "exaone-moe": PreTokenizer(
        patterns=(
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"|{_PUNCTUATION}[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
}
"""By the value of `tokenizer.ggml.pre`. docs/tokenizers.md lists the names; a test keeps the two together."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """What `name` stands for. Raises TokenizerError with the known names for any other."""
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r}, which is not a pre-tokenizer that Dapji knows; "
            f"known: {', '.join(sorted(PRE_TOKENIZERS))}",
            hint="a folder with the model's tokenizer.json states its pre-tokenizer in full and needs no name",
        )
    return PRE_TOKENIZERS[name]
