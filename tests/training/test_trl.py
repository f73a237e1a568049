"""The conventions of TRL's data sets as TRL itself reads them: the same prompts, the same answers."""

from __future__ import annotations

from typing import Any

import pytest
import trl.data_utils as theirs

from byte_tokenizers import Tokenizers
from dapji.training.data.conventions import detect
from dapji.training.data.encoding import Encoder

ASKED = {"role": "user", "content": "2 + 2?"}
SAID = {"role": "assistant", "content": "4, 답."}
WRONG = {"role": "assistant", "content": "5."}
ROWS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "2 + 2 =", "completion": " 4"},
    "messages": {"prompt": [ASKED, WRONG, ASKED], "completion": [SAID]},
    "two answers": {"prompt": [ASKED], "completion": [SAID, ASKED, WRONG]},
    "language modelling": {"messages": [ASKED, SAID]},
    "text": {"text": "2 + 2 = 4"},
    "preference of texts": {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    "preference": {"prompt": [ASKED], "chosen": [SAID], "rejected": [WRONG]},
    "preference with an implicit prompt": {
        "chosen": [ASKED, WRONG, ASKED, SAID],
        "rejected": [ASKED, WRONG, ASKED, WRONG],
    },
    "unpaired": {"prompt": [ASKED], "completion": [WRONG], "label": False},
    "unpaired texts": {"prompt": "2 + 2 =", "completion": " 4", "label": True},
}


@pytest.mark.parametrize("name", ROWS)
def test_the_same_prompts_and_answers(name: str, both: Tokenizers) -> None:
    """Texts with the end token that TRL's trainers add; conversations through the end token, after which TRL still has
    the template's newline."""
    row = ROWS[name]
    texts = theirs.maybe_apply_chat_template(theirs.maybe_extract_prompt(row), both.theirs)
    conversational = theirs.is_conversational(row)
    (sample,) = Encoder(both.ours).encode(detect(row).example(row)).samples
    assert sample.good == row.get("label")
    sides = ["chosen", "rejected"] if "chosen" in row else ["completion"]
    for side, sequence in zip(sides, sample.sequences, strict=True):
        prompt, answer = (texts["prompt"], texts[side]) if side in texts else ("", texts["text"])
        end = "\n" if conversational else ""
        whole = (prompt + answer).removesuffix(end) + ("" if conversational else "</s>")
        assert both.theirs.decode(sequence.ids) == whole
        assert sequence.ids.tolist() == both.theirs(whole).input_ids
        learned = both.theirs.decode(sequence.ids[sequence.learned])
        if name == "two answers":
            assert learned == "4, 답.<|im_end|>5.<|im_end|>"  # TRL learns all of a completion, the question too
        elif "prompt" in texts:
            assert learned == whole.removeprefix(prompt)
        elif conversational:
            assert learned == "4, 답.<|im_end|>"
        else:
            assert learned == whole[1:]  # nothing is before the first
