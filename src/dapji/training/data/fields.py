"""`Fields`: a row's values, each with the type that it must have, and one form of error for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from dapji.errors import FormatError

_MAX_SHOWN = 60
"""Characters of a value in an error."""
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}


class Fields:
    """A mapping out of a file. Every getter raises FormatError with the field, its value and what was expected."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        """where: what to put before the names of fields, as "messages[2]."."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def values(self) -> Mapping[str, Any]:
        return self._values

    def fail(self, name: str, value: Any, expected: str, hint: str | None = None) -> NoReturn:
        shown = json.dumps(value, ensure_ascii=False, default=repr)
        shown = shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "…"
        raise FormatError(f"{self._where}{name} is {shown}, expected {expected}", hint=hint)

    def _get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name, default)
        if value is None:
            raise FormatError(f"{self._where}{name} is missing", hint=f"there are: {', '.join(self._values)}")
        return value

    def is_text(self, name: str) -> bool:
        """Whether it is a text, and not a list written as one, as cells of tables hold."""
        value = self._get(name)
        return isinstance(value, str) and _list_in(value) is None

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            self.fail(name, value, "a text")
        return value

    def array(self, name: str, default: list[Any] | None = None) -> list[Any]:
        """A list, or the JSON of one."""
        value = self._get(name, default)
        value = _json_in(value) if isinstance(value, str) else value
        if not isinstance(value, list):
            self.fail(name, self._get(name), "a list")
        return value

    def objects(self, name: str) -> list[Fields]:
        """A list of objects, or one object alone."""
        value = self._get(name)
        values = [value] if isinstance(value, dict) else self.array(name)
        for i, item in enumerate(values):
            if not isinstance(item, dict):
                self.fail(f"{name}[{i}]", item, "an object")
        return [Fields(item, f"{self._where}{name}[{i}].") for i, item in enumerate(values)]

    def object(self, name: str) -> dict[str, Any]:
        """An object, or the JSON of one."""
        value = self._get(name)
        value = _json_in(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            self.fail(name, self._get(name), "an object")
        return value

    def inside(self, name: str) -> Fields:
        """The fields of an object."""
        return Fields(self.object(name), f"{self._where}{name}.")

    def truth(self, name: str) -> bool:
        """true or false, or in tables their spelling."""
        value = self._get(name)
        if isinstance(value, str) and value.lower() in _TRUTHS:
            return _TRUTHS[value.lower()]
        if not isinstance(value, bool):
            self.fail(name, value, "true or false")
        return value


def _list_in(value: str) -> list[Any] | None:
    found = _json_in(value) if value.lstrip()[:1] == "[" else None
    return found if isinstance(found, list) else None


def _json_in(value: str) -> Any:
    """The value that is written in JSON; None where it is none."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
