"""Typed look-ups in a Hugging Face config.json, whose errors name the key, the value and what was expected.

Knows JSON, not models: which keys a family has is afd.spec's business. A null counts as an absent key, as it does in
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

from afd.errors import UnsupportedModel


class HfConfig:
    """One JSON object of a config.json; `where` names it in errors, for example "config.json text_config".

    `serving` False: it is only read for what the model costs, and what changes results but not costs is not refused.
    """

    def __init__(self, data: Mapping[str, object], where: str = "config.json", *, serving: bool = True) -> None:
        self._data = data
        self.where = where
        self.serving = serving

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self._data.get(key) is not None

    def keys(self) -> frozenset[str]:
        """The keys that are there and not null."""
        return frozenset(k for k in self._data if self.has(k))

    def child(self, key: str) -> HfConfig | None:
        """The object under `key`, or None when it is absent or empty."""
        value = self._data.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(key, "an object")
        return HfConfig(value, f"{self.where} {key}", serving=self.serving) if value else None

    def nested(self, key: str, inherit: tuple[str, ...]) -> HfConfig:
        """The object under `key`, which must be there; it takes the keys of `inherit` from here where it has none."""
        inner = self.child(key)
        if inner is None:
            raise self._missing(key)
        inherited = {k: self._data[k] for k in inherit if self.has(k) and not inner.has(k)}
        return HfConfig({**inner._data, **inherited}, inner.where, serving=self.serving)

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; without a default the key is required."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(key, f"a whole number of at least {minimum}")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None when absent."""
        value = self._data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
            raise self._wrong(key, "a number")
        return float(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; without a default the key is required."""
        found = self.optional_number(key)
        value = default if found is None else found
        if value is None:
            raise self._missing(key)
        if value <= 0:
            raise self._wrong(key, "a number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default the key is required."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of exactly `length` positive numbers."""
        value = self._get(key, None)
        if isinstance(value, (list, tuple)) and len(value) == length:
            good = [float(x) for x in value if isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0]
            if len(good) == length:
                return tuple(good)
        raise self._wrong(key, f"a list of {length} numbers above 0")

    def integers(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Whole numbers of at least 0, written as one number, as a list, or as text separated by commas."""
        value = self._data.get(key)
        if value is None:
            return default
        if isinstance(value, str):
            parts = [part.strip() for part in value.split(",") if part.strip()]
            value = [int(part) if part.isdecimal() else part for part in parts]
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        good = [x for x in items if isinstance(x, int) and not isinstance(x, bool) and x >= 0]
        if len(good) != len(items):
            raise self._wrong(key, "whole numbers of at least 0")
        return tuple(good)

    def refuse(self, key: str, *harmless: object, because: str, costs: bool = False) -> None:
        """Raises UnsupportedModel when `key` is there with a value that is not one of `harmless`. `costs`: it would
        change what the model costs, too."""
        value = self._data.get(key)
        if not self.serving and not costs:
            return
        if value is not None and value not in harmless:
            raise UnsupportedModel(f"{self.where} has {key} = {_short(value)}, which cannot be served: {because}")

    def _get(self, key: str, default: object) -> object:
        value = self._data.get(key)
        if value is None:
            value = default
        if value is None:
            raise self._missing(key)
        return value

    def _missing(self, key: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.where} lacks the key {key}")

    def _wrong(self, key: str, wanted: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.where} has {key} = {_short(self._data.get(key))}, which is not {wanted}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
