"""Whether an answer to a sum is right. `dapji tune` calls a function for each answer that the model has written."""

import re


def correct(answer: str, row: dict) -> float:
    """1 where the last number of the answer is the right one, and a little for any number at all."""
    numbers = re.findall(r"-?\d+", answer)
    if not numbers:
        return 0.0
    return 1.0 if numbers[-1] == row["answer"] else 0.1
