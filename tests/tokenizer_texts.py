"""Texts on which tokenizers differ, for comparing ids. All of them are made here, from a fixed seed."""

import random

PLAIN = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    " \n \n\n  \t x",
    "a" * 300,
    " " * 300,
    "\n" * 100,
    "1" * 200,
    "가" * 150,
    "!" * 90,
    "The quick brown fox jumps over the lazy dog. It's 9:41 a.m., isn't it? We'll see; they've gone, I'd say.",
    "I'M SURE THEY'LL SAY WE'VE WON. don'T DON'T Don't 'Tis 's 'S ’s rock'n'roll O'Neill's l'été",
    "답지는 열린 언어 모델을 직접 돌리는 도구입니다. 2024년 3월 15일 오후 3시30분, GPT-4o보다 1.5배 빠릅니다!",
    "안녕하세요? 저는 학생이에요ㅋㅋㅋㅋ ㅠㅠ ㄱㄴㄷ ㅏㅑㅓ 뷁쀍 값어치 닭볶음탕 Python으로3번 API를호출했습니다.",
    "\u1112\u1161\u11ab\u1100\u1173\u11af 한글 \u1103\u1161\u11b8\u110c\u1175 답지",
    "今天天气不错，我们去公园玩吧。2024年的GDP增长率是5.2%。「你好」——他说：“再见”……㐀㐁𠀀𠮷",
    "吾輩は猫である。名前はまだ無い。カタカナとひらがな、ﾊﾝｶｸ、漢字が混ざったTEXTです。1,000円〜",
    "السلام عليكم ورحمة الله وبركاته. ١٢٣٤٥ كتاب، قَلَمٌ؟",
    "שָׁלוֹם עולם 123",
    "Привет, мир! Ёжик съел 42 яблока.",
    "สวัสดีครับ ภาษาไทย กำลัง ๑๒๓",
    "नमस्ते दुनिया, क्षत्रिय १२३",
    "Ελληνικά ΑΩ ὦ",
    "Tiếng Việt rất đẹp: Nguyễn, Đặng",
    "🙂 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇰🇷🇯🇵 1️⃣ ❤️‍🔥 ☺︎☺️ 🧑🏿‍💻",
    "e\u0301 é a\u0308\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔ ñ n\u0303 ﬁ Å \u212b",
    "def f(x: int) -> str:\n\tif x >= 10:\n\t\treturn f'{x:>5}'  # TODO\n\n    else:\r\n        pass\r\n\r\n\r\n",
    '#include <stdio.h>\nint main(void) { for (int i = 0; i != 0xFF; ++i) printf("%d\\n", i && ~i); }\n//////\n/***/',
    '{"name": "x", "values": [1, 2.50, -3e10, null], "url": "https://a.b/c?d=e&f=%20#g"}',
    "SELECT * FROM t WHERE a<>'b';",
    "1 12 123 1234 12345 123456 1234567 12345678901234567890 3.14159 1,234,567.89 0x7fff ½ ² ³ Ⅷ ① ٣ 〇 １２３",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case HTTPServer iPhone15Pro XMLHttpRequest ǅ ʰ",
    "<s></s><unk><pad><|im_start|>user\n<|im_end|><|eot_id|><｜User｜><｜end▁of▁sentence｜>",
    "[INST] [/INST]<end_of_turn>[|endofturn|]",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<bos><eos>[BOS][EOS]<0x0A><0xE2><|endoftext|>",
    "<think>\nhm\n</think> <tool_call>{}</tool_call>",
    "▁ ▁▁ _▁_ a▁b",
    "Ġ Ċ ĠHello",
    "\u00a0 \u2003 \u3000\u200b\ufeff\u2028x\u2029\u0085y",
    "a\x00b\x01\x7f\x80\x9f",
    "\U0010ffff \ue000 \ufffe \ufffd",
    "   leading and trailing   ",
    "\n\n\nx\n\n\n",
    "x \n y\t\n z",
    "~!@#$%^&*()_+`-={}|[]\\:\";'<>?,./ ¡¿§¶•–—‘’“”…€£¥₩±×÷≠≤≥∞∑√∫",
]
_PARTS = [
    "a", "B", "Word", "word", "the", "ing", "HTTP", "don't", "I'LL", "'s", "'S", "é", "e\u0301", "가", "각",
    "한국어", "을", "ㄱ", "\u1112\u1161\u11ab", "漢字", "的", "ひ", "カ", "ー", "Я", "и", "ä", "ß", "ǅ", "ʰ",
    "़", "हिन्दी", "ไทย", "٣", "½", "Ⅷ", "x²", "0", "7", "12", "123", "1234", "12345", ".", ",", "...", "!?",
    "(", ")", "/", "//", "$", "+", "=", "^", "~", "_", "-", "<", ">", "|", "「", "、", "。", "～", "😀",
    "👨‍👩‍👧", "🇰🇷", "\u200d", "\ufeff", "▁", "<s>", "</s>", "<|im_end|>", "<｜", "｜>", " ", " ", " ", "  ",
    "    ", "\u3000", "\u00a0", "\t", "\n", "\n\n", "\r\n", "\r",
]  # fmt: skip


def texts(count: int) -> list[str]:
    """PLAIN and `count` random ones: two thirds of them put together from parts, the others of any characters."""
    chance = random.Random(0)
    made = ["".join(chance.choices(_PARTS, k=chance.randint(2, 24))) for _ in range(2 * count // 3)]
    made += ["".join(_any(chance) for _ in range(chance.randint(1, 12))) for _ in range(count - len(made))]
    return [*PLAIN, *made]


def _any(chance: random.Random) -> str:
    """A character of the first plane as often as one of any plane; no surrogate."""
    code = chance.randrange(0x10000 if chance.random() < 0.8 else 0x110000)
    return chr(code) if not 0xD800 <= code < 0xE000 else "가"
