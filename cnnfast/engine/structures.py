"""Structures of arguments and results: tuples, lists and dicts, with tensors as their leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LEAF = "tensor"


@dataclass(frozen=True)
class Structure:
    """kind: "tensor", "constant", "tuple", "list" or "dict". keys: of a dict. value: of a constant. cls: what the
    original was, where that is a class of its own; a file does not keep it, and loads the tuple, list or dict.
    """

    kind: str
    parts: tuple[Structure, ...] = ()
    keys: tuple[str, ...] = ()
    value: Any = None
    cls: type | None = None

    @classmethod
    def of(cls, tree: Any) -> Structure:
        if isinstance(tree, Tensor):
            return cls(LEAF)
        if isinstance(tree, Mapping):
            own = type(tree) if type(tree) is not dict else None
            return cls("dict", tuple(map(cls.of, tree.values())), tuple(tree), cls=own)
        if isinstance(tree, Sequence) and not isinstance(tree, str):
            kind = "list" if isinstance(tree, list) else "tuple"
            return cls(kind, tuple(map(cls.of, tree)), cls=type(tree) if type(tree) not in (list, tuple) else None)
        return cls("constant", value=tree)
