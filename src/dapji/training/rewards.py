"""`Reward`: a function of the user's own that says how good an answer is."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dapji.errors import TrainingError, UsageError


class Reward:
    """FUNCTION(answer: str, row: dict) -> float of a file PATH.py, written PATH.py:FUNCTION.

    answer: without the token that ended it. row: the fields of the prompt's row. The file is the user's own and is run
    as it is.
    """

    def __init__(self, spelled: str) -> None:
        """Raises UsageError where there is no such function, or its file cannot be run."""
        path, colon, name = spelled.rpartition(":")
        if not colon or not name.isidentifier() or not path.endswith(".py"):
            raise UsageError(f"the reward {spelled!r} is not spelled PATH.py:FUNCTION", hint="as rewards.py:correct")
        if not Path(path).is_file():
            raise UsageError(f"the reward {spelled!r}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(f"dapji_reward_{Path(path).stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UsageError(f"the reward {spelled!r}: {path} fails: {type(error).__name__}: {error}") from error
        function = getattr(module, name, None)
        if not callable(function):
            raise UsageError(f"the reward {spelled!r}: {path} has no function {name}")
        self._spelled = spelled
        self._function: Callable[[str, dict[str, Any]], Any] = function

    def __call__(self, answer: str, row: Mapping[str, Any]) -> float:
        """Raises TrainingError where the function fails, or gives no finite number."""
        try:
            value = self._function(answer, dict(row))
        except Exception as error:
            raise TrainingError(
                f"{self._spelled} fails for the answer {answer[:60]!r}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise TrainingError(f"{self._spelled} gives {value!r} for the answer {answer[:60]!r}, expected a number")
        return float(value)
