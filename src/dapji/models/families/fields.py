"""`Fields`: reading a foreign configuration strictly: every value is checked, every key is accounted for.

Knows neither which keys there are nor what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard, TypeVar

import numpy as np

from dapji.errors import ConfigError

T = TypeVar("T")


MAX_NUMBER = 1e30
"""What a float32 can hold, with room for a factor."""


class Fields:
    """The entries of a `config.json` object or of GGUF metadata. A null counts as absent."""

    def __init__(self, values: Mapping[str, object], *, where: str, prefix: str = "") -> None:
        """where: what to call it in messages. prefix: of the keys concerned, left out in calls; others are ignored."""
        self._where = where
        self._prefix = prefix
        # by key: GGUF metadata decodes its arrays (of 100,000 tokens) when asked for them
        own = {key: values[key] for key in values if key.startswith(prefix)}
        self._values = {key: value for key, value in own.items() if value is not None}
        self._nulls = own.keys() - self._values.keys()
        self._read: set[str] = set()

    def assuming(self, values: Mapping[str, object]) -> Fields:
        """The same, where a key that is absent means what it has in `values`."""
        assumed = {self._prefix + key: value for key, value in values.items()}
        own = {**dict.fromkeys(self._nulls), **assumed, **self._values}
        fields = Fields(own, where=self._where, prefix=self._prefix)
        fields._read = self._read
        return fields

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._values

    def holds(self, key: str, *types: type) -> bool:
        """Whether the key is there with a value of one of these types; for what may be written in several."""
        return isinstance(self._values.get(self._prefix + key), types)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "an integer")
        return value

    def optional_integer(self, key: str, default: int) -> int | None:
        """None where the file says null; the default only where it does not say anything."""
        return None if self._prefix + key in self._nulls else self.integer(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not _is_number(value):
            raise self._wrong(key, "a finite number")
        return float(value)

    def optional_number(self, key: str, default: float | None) -> float | None:
        """As `optional_integer`."""
        if self._prefix + key in self._nulls or (default is None and key not in self):
            self._read.add(self._prefix + key)
            return None
        return self.number(key, default)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(_is_number(item) for item in value):
            raise self._wrong(key, "a list of finite numbers")
        return tuple(map(float, value))

    def booleans(self, key: str) -> list[bool]:
        value = self._get(key, None)
        items = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(items, list) or not all(isinstance(item, bool) for item in items):
            raise self._wrong(key, "a list of true and false")
        return items

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of strings")
        return value

    def integers(self, key: str) -> list[int]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) for item in value
        ):
            raise self._wrong(key, "a list of integers")
        return value

    def mapping(self, key: str) -> Fields:
        """The object at `key` as fields of its own."""
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Fields(value, where=f"{self._where}: {self._prefix}{key}")

    def choice(self, key: str, choices: Mapping[str, T], default: str | None = None) -> T:
        value = self.string(key, default)
        if value not in choices:
            raise ConfigError(f"{self._where}: {self._prefix}{key} {value!r} is not supported", hint=_one_of(choices))
        return choices[value]

    def require(self, key: str, supported: bool | float | str) -> None:
        """Absent, or equal to the one value that we support."""
        if key in self:
            if isinstance(supported, bool):
                value: bool | float | str = self.boolean(key)
            elif isinstance(supported, int):
                value = self.integer(key)
            else:
                value = self.string(key) if isinstance(supported, str) else self.number(key)
            if value != supported:
                raise ConfigError(
                    f"{self._where}: {self._prefix}{key} = {value!r} is not supported, only {supported!r} is"
                )

    def finish(self, ignorable: Iterable[str] = ()) -> None:
        """Raise on a key that was neither read nor may be ignored."""
        known = self._read | {self._prefix + key for key in ignorable}
        unknown = sorted(self._values.keys() - known)
        if unknown:
            raise ConfigError(
                f"{self._where}: unknown {'keys' if len(unknown) > 1 else 'key'} {', '.join(unknown)}",
                hint="an unknown key may change what the model computes, so it is not ignored",
            )

    def _get(self, key: str, default: object) -> object:
        self._read.add(self._prefix + key)
        value = self._values.get(self._prefix + key, default)
        if value is None:
            raise ConfigError(f"{self._where}: {self._prefix}{key} is missing")
        return value

    def _wrong(self, key: str, expected: str) -> ConfigError:
        return ConfigError(
            f"{self._where}: {self._prefix}{key} must be {expected}, not {self._values.get(self._prefix + key)!r}"
        )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _one_of(choices: Iterable[str]) -> str:
    return f"supported: {', '.join(sorted(choices))}"


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names for a message: all, or the first few and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
