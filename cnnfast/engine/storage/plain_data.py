"""Taking apart plain data that came from JSON, and may be anything."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def field(data: Any, name: str, kind: type[T], otherwise: T | None = None) -> T:
    """The entry of a mapping, of this class and of none derived from it. Raises ValueError; an entry that is missing
    is `otherwise`, where that is not None.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{shortened(data)} stands where a mapping with {name!r} belongs")
    if name not in data:
        if otherwise is None:
            raise ValueError(f"{name!r} is missing")
        return otherwise
    if type(data[name]) is not kind:
        raise ValueError(f"{name!r} is {shortened(data[name])}, and no {kind.__name__}")
    return data[name]


def strings(data: Any, what: str) -> list[str]:
    """A list of strings. Raises ValueError, which says what each is, for anything else."""
    if not isinstance(data, list) or not all(isinstance(one, str) for one in data):
        raise ValueError(f"{shortened(data)} is no list of {what}")
    return data


def shortened(value: Any) -> str:
    """As Python writes it, cut off after sixty characters."""
    text = repr(value[:60] if isinstance(value, str | list) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
