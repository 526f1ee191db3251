"""FLOPs and bytes of a run, by who spends them: a module that is called, a fused step, or a forward by itself.

FLOPs are multiplications and additions of convolutions and matrix products, as torch.utils.flop_counter counts them.
Bytes are computed from shapes and dtypes, and not measured: of each call what it reads that it has not made itself
(inputs, weights, statistics), and what it returns, each tensor once. A view moves nothing, and an operation in place
reads its tensor and writes it. What a call keeps for itself in between does not count, with one exception: see
`Unit.between`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Spender(NamedTuple):
    """Who spends. what: "module" (a call of it by itself, or a fused step that begins with it), "attention" (operators
    that an attention module's forward calls), "product" (another forward's operator that has FLOPs), "operation" (one
    that has none), or "function" (of cnnfast.functional). name: of the module, the operator or the function.
    """

    what: str
    name: str


@dataclass
class Spent:
    """flops, bytes: of all calls together. saved: bytes that the operators of fused steps would have moved more if each
    had been called by itself. calls: how many there were.
    """

    flops: int = 0
    bytes: int = 0
    saved: int = 0
    calls: int = 0


@dataclass
class Unit:
    """A call whose operators count as one. fused: whether these are calls of several modules.

    between: bytes of what it writes and reads again on the way, as a convolution with batch statistics has to: the norm
    is applied once the whole of its result is known. `results`: what it returns; by default what its last operator
    returned first.
    """

    spender: Spender
    fused: bool = False
    around: Unit | None = None
    flops: int = 0
    apart: int = 0  # bytes of its operators one by one
    between: int = 0
    results: list[Tensor] | None = None
    last: list[Tensor] = field(default_factory=list)
    read: dict[tuple[int, int], int] = field(default_factory=dict)  # bytes, by memory and offset in it
    made: dict[int, Tensor] = field(default_factory=dict)  # what it has written, kept so that no other takes its memory

    def operator(self, func: Any, read: list[Tensor], written: list[Tensor]) -> None:
        inside = {memory_of(t) for t in read}
        if "empty" in func._overloadpacket.__name__:  # allocates, and neither reads nor writes
            self.made |= {memory_of(t): t for t in written}
            return
        if not func._schema.is_mutable and all(memory_of(t) in inside for t in written):  # a view, or a question
            return
        self.apart += sum({_place(t): size_of(t) for t in read}.values()) + sum(map(size_of, written[:1]))
        for t in read:
            if memory_of(t) not in self.made:
                self.read[_place(t)] = max(size_of(t), self.read.get(_place(t), 0))
        self.made |= {memory_of(t): t for t in written}
        self.last = written

    @property
    def bytes(self) -> int:
        results = self.last[:1] if self.results is None else self.results
        written = {_place(t): size_of(t) for t in results if memory_of(t) in self.made}
        return sum(self.read.values()) + sum(written.values()) + self.between


_OF_A_FORWARD = {False: "operation", True: "product"}


class CostCounter(TorchDispatchMode):
    """Sees every operator of this thread, and adds it to what the unit spends that is running, or, where none
    is, to what the forward spends that calls it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[Spender, Spent] = {}
        self.running: Unit | None = None
        self.attention: list[str] = []  # the names of the attention modules whose forwards are running

    def begin(self, spender: Spender, fused: bool = False) -> Unit:
        """What runs from here to `end` counts as one call of `spender`, and not as part of the unit around it."""
        self.running = Unit(spender, fused, self.running)
        return self.running

    def end(self) -> None:
        if (unit := self.running) is not None:
            self.running = unit.around
            self._add(unit)

    def _add(self, unit: Unit) -> None:
        spent = self.spent.setdefault(unit.spender, Spent())
        spent.flops += unit.flops
        spent.bytes += unit.bytes
        spent.saved += max(0, unit.apart - unit.bytes) if unit.fused else 0
        spent.calls += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        read, written = tensors_of((args, kwargs)), tensors_of(result)
        name = func._overloadpacket.__name__.strip("_")
        alone = Spender("attention", self.attention[-1]) if self.attention else Spender(_OF_A_FORWARD[flops > 0], name)
        unit = self.running or Unit(alone, results=written)
        unit.flops += flops
        unit.operator(func, read, written)
        if unit is not self.running and (unit.flops or unit.bytes):
            self._add(unit)
        return result


def size_of(t: Tensor) -> int:
    """Bytes of the elements that a tensor has in memory: one that was expanded has them once."""
    elements = t.numel()
    if elements and t.layout is torch.strided:
        for extent, stride in zip(t.shape, t.stride(), strict=True):
            elements = elements // extent if stride == 0 else elements
    return elements * t.element_size()


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def memory_of(t: Tensor) -> int:
    """What tells the memory of one tensor from that of others, as long as the tensor is there."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none of its own
        return id(t)


def _place(t: Tensor) -> tuple[int, int]:
    return memory_of(t), int(t.storage_offset()) if t.layout is torch.strided else 0
