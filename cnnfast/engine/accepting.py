"""Whether arguments of a call are what a frozen network takes; what is wrong with them is said by the name of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .graph import Input
from .planning.limits import written
from .structures import LEAF, Structure


def accept(given: tuple[Any, ...], arguments: Structure, takes: Sequence[Input], dtype: torch.dtype) -> list[Tensor]:
    """The tensors of a call's arguments, in the order of `takes`; those that are floating-point are cast to `dtype`.

    arguments: the structure that the network takes. Raises ValueError if the structure is another one, or a tensor has
    another number of dimensions, is no number of the right kind, or is not a dense tensor on the CPU. Sizes are not
    looked at: see `misfits`.
    """
    try:
        leaves, structure = Structure.flatten(_in_order(given, arguments))
    except ValueError as error:
        raise ValueError(f"frozen(): {error}") from None
    if problem := next(_differences(structure, arguments, ""), ""):
        raise ValueError(f"frozen(): {problem}")
    return [_accepted(t, one, dtype) for t, one in zip(leaves, takes, strict=True)]


def _in_order(tree: Any, wanted: Structure) -> Any:
    """The same tree, with the keys of its dicts in the order that the structure has."""
    if isinstance(tree, Mapping) and wanted.kind == "dict" and tree.keys() == set(wanted.keys):
        parts = zip(wanted.keys, wanted.parts, strict=True)
        return {key: _in_order(tree[key], part) for key, part in parts}
    if type(tree) in (list, tuple) and len(tree) == len(wanted.parts):
        parts = [_in_order(part, one) for part, one in zip(tree, wanted.parts, strict=True)]
        return parts if isinstance(tree, list) else tuple(parts)
    return tree


def _differences(given: Structure, wanted: Structure, path: str) -> Iterator[str]:
    """What is wrong with a structure, as sentences. path: where in the arguments it stands, such as "argument 1[0]"."""
    if given.kind != wanted.kind:
        yield f"{path} must be {_kind(wanted)}, but got {_kind(given)}"
    elif wanted.kind == "constant" and given.value != wanted.value:
        yield f"{path} was {wanted.value!r} when the network was frozen and cannot change, but got {given.value!r}"
    elif len(given.parts) != len(wanted.parts):
        what = path or "the network"
        yield f"{what} takes {_count(len(wanted.parts), path)}, but got {_count(len(given.parts), path)}"
    elif given.keys != wanted.keys:
        yield f"{path} must have the keys {', '.join(wanted.keys)}, but got {', '.join(given.keys)}"
    else:
        for where, one, other in zip(places(wanted, path), given.parts, wanted.parts, strict=True):
            yield from _differences(one, other, where)


def places(structure: Structure, path: str) -> list[str]:
    """How each part of a structure at `path` is written, as in "argument 2['mask'][0]"."""
    if structure.kind == "dict":
        return [f"{path}[{key!r}]" for key in structure.keys]
    return [f"{path}[{i}]" if path else f"argument {i + 1}" for i in range(len(structure.parts))]


def _count(count: int, path: str) -> str:
    return f"{count} {'part' if path else 'argument'}{'s' * (count != 1)}"


def _kind(structure: Structure) -> str:
    if structure.kind == "constant":
        return repr(structure.value)
    return "a tensor" if structure.kind == LEAF else f"a {structure.kind}"


def _accepted(t: Tensor, one: Input, dtype: torch.dtype) -> Tensor:
    """The tensor as the network takes it."""
    if t.device.type != "cpu":
        raise ValueError(f"frozen(): {one.name} must be on the CPU, but got a tensor on {t.device}: call .cpu() first")
    if t.layout != torch.strided or t.is_quantized:
        raise ValueError(f"frozen(): {one.name} must be a dense tensor, but got {t.dtype} in layout {t.layout}")
    if one.dtype.is_floating_point:
        if not t.is_floating_point():
            raise ValueError(f"frozen(): {one.name} must be floating-point, but got {t.dtype}: call .float() first")
    elif t.dtype != one.dtype:
        raise ValueError(f"frozen(): {one.name} must be of {one.dtype}, but got {t.dtype}")
    if t.dim() != len(one.shape):
        advice = f": an image alone needs a batch axis, {one.name}[None]" if t.dim() == len(one.shape) - 1 else ""
        raise ValueError(f"frozen(): {one.name} must be {written(one)}, but got {list(t.shape)}{advice}")
    return t.detach().to(dtype) if one.dtype.is_floating_point else t.detach()


def misfits(takes: Sequence[Input], shapes: Sequence[Sequence[int]]) -> str:
    """What sizes are not what the network takes, in a sentence; the empty string if all are."""
    for one, shape in zip(takes, shapes, strict=True):
        if any(wanted is not None and size != wanted for size, wanted in zip(shape, one.shape, strict=True)):
            return f"{one.name} must be {written(one)}, but got {list(shape)}"
    return ""
