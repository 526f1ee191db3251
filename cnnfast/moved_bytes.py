"""How many bytes a call moves, counted from its tensors: of an operator of PyTorch's those that it reads and those that
it writes, of a launch of a kernel all that it is given.

Each tensor counts once, by its own elements: a view of a few channels does not count what it is a view of, and an
expanded tensor counts what it has in memory. A kernel that updates a tensor in place has it once, an operator that does
reads it and writes it. An operator of PyTorch's may launch several kernels, which read a tensor several times, as batch
norm does: of such the bytes are a lower bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conversion.costs import memory_of, size_of, tensors_of

WRITE_ONLY = ("copy_", "fill_", "zero_")  # operators that do not read what they write into
# Where no dtype changes, these lay a convolution's result on meta tensors out as a GPU has it from the beginning.
LAYING_OUT = ("to", "_to_copy", "copy_")


class Moved(NamedTuple):
    """What an operator reads and what it writes, each tensor once."""

    read: list[Tensor]
    written: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(map(size_of, (*self.read, *self.written)))


def by_operator(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Moved | None:
    """What a call of an operator of PyTorch's moves, as TorchDispatchMode sees it; None if it computes nothing: it
    makes a view, allocates memory, or answers a question.
    """
    name = func._overloadpacket.__name__
    read, written = tensors_of((args, kwargs)), tensors_of(result)
    if func._schema.is_mutable:
        written = [*written, *tensors_of(_changed(func, args, kwargs))]
    else:
        inside = set(map(memory_of, read))
        written = [t for t in written if memory_of(t) not in inside]
    written = [t for t in written if t.numel()]
    if not written or "empty" in name:
        return None
    if name in WRITE_ONLY:
        read = tensors_of((args[1:], kwargs))
    elif any(argument.is_out for argument in func._schema.arguments):
        read = tensors_of((args, [kwargs[a.name] for a in func._schema.arguments if a.name in kwargs and not a.is_out]))
    return Moved(_each_once(read), _each_once(written))


def lays_out(name: str, moved: Moved) -> bool:
    """Whether a call of an operator of this name only lays a tensor out."""
    return name in LAYING_OUT and len({t.dtype for t in (*moved.read, *moved.written)}) == 1


def by_launch(arguments: Iterable[Any]) -> int:
    """Bytes of the tensors among the arguments of a kernel, in tensor maps too."""
    tensors = (getattr(argument, "base", argument) for argument in arguments)  # of a tensor map: what it maps
    return sum(map(size_of, _each_once(t for t in tensors if isinstance(t, Tensor))))


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the operator writes into."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    writes = (a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return [given.get(name) for name in writes]


def _each_once(tensors: Iterable[Tensor]) -> list[Tensor]:
    found: dict[Any, Tensor] = {}
    for t in tensors:
        strided = (t.storage_offset(), t.stride()) if t.layout is torch.strided else ()
        found.setdefault((memory_of(t), *t.shape, strided), t)
    return list(found.values())
