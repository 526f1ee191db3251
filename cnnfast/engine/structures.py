"""Structures of arguments and results: tuples, lists and dicts, with tensors as their leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

LEAF = "tensor"
CONSTANTS = (bool, int, float, str, type(None))
DEEPEST = 32  # A file is hostile until proven otherwise, and a list can contain itself.


@dataclass(frozen=True)
class Structure:
    """kind: "tensor", "constant", "tuple", "list" or "dict". keys: of a dict. value: of a constant. cls: what the
    original was, where that is a class of its own; a file does not keep it, and loads the tuple, list or dict. Two
    structures are equal whatever their classes.
    """

    kind: str
    parts: tuple[Structure, ...] = ()
    keys: tuple[str, ...] = ()
    value: Any = None
    cls: type | None = field(default=None, compare=False)

    @staticmethod
    def flatten(tree: Any) -> tuple[list[Tensor], Structure]:
        """The tensors of a tree, from left to right, and the structure that builds the tree again. Raises ValueError
        for what is neither a tensor nor a constant (None, bool, int, float, str) nor a tuple, list, dict or dataclass
        of such.
        """
        leaves: list[Tensor] = []
        return leaves, _structure(tree, leaves, 0)

    def build(self, leaves: Sequence[Any]) -> Any:
        """The tree with these leaves in place of its tensors. Raises ValueError if they are too few or too many."""
        if len(leaves) != self.count:
            raise ValueError(f"the structure {self} takes {self.count} tensors, but there are {len(leaves)}")
        return self._take(iter(leaves))

    @property
    def count(self) -> int:
        """How many tensors it has."""
        return 1 if self.kind == LEAF else sum(part.count for part in self.parts)

    def _take(self, leaves: Iterator[Any]) -> Any:
        if self.kind == LEAF:
            return next(leaves)
        if self.kind == "constant":
            return self.value
        parts = [part._take(leaves) for part in self.parts]
        if self.kind == "dict":
            items = dict(zip(self.keys, parts, strict=True))
            if self.cls is None:
                return items
            return self.cls(**items) if dataclasses.is_dataclass(self.cls) else self.cls(items)
        if hasattr(self.cls, "_make"):  # collections.namedtuple takes its members one by one
            return self.cls(*parts)  # type: ignore[misc]
        return (self.cls or {"tuple": tuple, "list": list}[self.kind])(parts)

    def __str__(self) -> str:
        """As a person would write it: (tensor, {"mask": tensor})."""
        if self.kind == LEAF:
            return LEAF
        if self.kind == "constant":
            return repr(self.value)
        if self.kind == "dict":
            return "{" + ", ".join(f'"{key}": {part}' for key, part in zip(self.keys, self.parts, strict=True)) + "}"
        inner = ", ".join(map(str, self.parts))
        if self.kind == "list":
            return f"[{inner}]"
        return f"({inner},)" if len(self.parts) == 1 else f"({inner})"

    def to_json(self) -> Any:
        """What json.dumps writes as standard JSON, which has no infinities: those become {"float": "inf"}."""
        if self.kind == "constant":
            special = isinstance(self.value, float) and not math.isfinite(self.value)
            return {"kind": self.kind, "value": {"float": str(self.value)} if special else self.value}
        parts = {"parts": [part.to_json() for part in self.parts]} if self.kind != LEAF else {}
        keys = {"keys": list(self.keys)} if self.kind == "dict" else {}
        return {"kind": self.kind, **keys, **parts}

    @staticmethod
    def from_json(data: Any) -> Structure:
        """The structure that to_json wrote. Raises ValueError for anything else, however it is made."""
        return _read(data, 0)


def _structure(tree: Any, leaves: list[Tensor], depth: int) -> Structure:
    if depth > DEEPEST:
        raise ValueError(f"tensors lie deeper than {DEEPEST} tuples, lists and dicts")
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return Structure(LEAF)
    if type(tree) in CONSTANTS:
        return Structure("constant", value=tree)
    cls, before = type(tree), len(leaves)
    # transformers' ModelOutput is both a dict and a dataclass; as a dict it leaves out what is None.
    if isinstance(tree, Mapping):
        items = dict(tree.items())
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        items = {one.name: getattr(tree, one.name) for one in dataclasses.fields(tree) if one.init}
    else:
        items = None
    if items is not None:
        for key in items:
            if type(key) is not str:
                raise ValueError(f"the keys of a dict of tensors must be str, but one is {key!r}")
        parts = tuple(_structure(item, leaves, depth + 1) for item in items.values())
        return _rebuildable(Structure("dict", parts, tuple(items), cls=None if cls is dict else cls), leaves[before:])
    if isinstance(tree, (tuple, list)):
        kind = "list" if isinstance(tree, list) else "tuple"
        parts = tuple(_structure(item, leaves, depth + 1) for item in tree)
        return _rebuildable(Structure(kind, parts, cls=None if cls in (tuple, list) else cls), leaves[before:])
    raise ValueError(
        f"an object of class {cls.__module__}.{cls.__qualname__} is neither a tensor nor a constant nor a tuple, list, "
        "dict or dataclass of such"
    )


def _rebuildable(structure: Structure, leaves: Sequence[Tensor]) -> Structure:
    """The structure itself, if its class, called as we call it, gives the same parts again. That is tried here, where
    the error can name the class, and not when the first result is on its way to the caller.
    """
    cls = structure.cls
    if cls is not None:
        try:
            built = structure.build(leaves)
            if isinstance(built, Mapping) and tuple(built) != structure.keys:
                raise ValueError(f"its keys become {tuple(built)}")
            if isinstance(built, (tuple, list)) and len(built) != len(structure.parts):
                raise ValueError(f"its length becomes {len(built)}")
        except Exception as error:
            raise ValueError(
                f"an object of class {cls.__module__}.{cls.__qualname__} cannot be built again from its parts: {error}"
            ) from error
    return structure


def _read(data: Any, depth: int) -> Structure:
    if depth > DEEPEST or not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise ValueError("a structure of arguments or results is damaged")
    kind, names = data["kind"], set(data) - {"kind"}
    if kind == LEAF and not names:
        return Structure(LEAF)
    if kind == "constant" and names == {"value"}:
        value = data["value"]
        if isinstance(value, dict) and set(value) == {"float"} and value["float"] in ("inf", "-inf", "nan"):
            return Structure(kind, value=float(value["float"]))
        if type(value) in CONSTANTS:
            return Structure(kind, value=value)
    if kind in ("tuple", "list", "dict") and isinstance(data.get("parts"), list):
        parts = tuple(_read(part, depth + 1) for part in data["parts"])
        keys = data.get("keys", [])
        if kind != "dict" and names == {"parts"}:
            return Structure(kind, parts)
        strings = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if kind == "dict" and names == {"parts", "keys"} and strings and len(set(keys)) == len(keys) == len(parts):
            return Structure(kind, parts, tuple(keys))
    raise ValueError("a structure of arguments or results is damaged")
