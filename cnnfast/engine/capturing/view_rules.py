"""One spelling for what changes shapes, dtypes and places of elements, and nothing for what changes none of them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from .rules import SpelledCall, aten, rule


@rule(
    *(aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default, aten.positive.default),
    *(aten.lift.default, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.detach_copy.default),
    *(aten.resolve_conj.default, aten.resolve_neg.default),
)
def _same(call: SpelledCall) -> fx.Node:
    return call.first


@rule(
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default),
    *(aten.type_as.default,),
)
def _cast(call: SpelledCall) -> fx.Node | None:
    dtype = call.value().dtype
    if dtype == call.value(call.first).dtype:
        return call.first
    if call.target is aten.to.dtype:
        call.arguments.update(non_blocking=False, copy=False, memory_format=None)
        return None
    return call.write(aten.to.dtype, call.first, dtype, False, False, None)


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.view_copy.default)
def _reshape(call: SpelledCall) -> fx.Node:
    if call.shape_is(call.first):
        return call.first
    return call.write(aten.reshape.default, call.first, call["shape" if "shape" in call.arguments else "size"])


@rule(aten.view_as.default, aten.reshape_as.default)
def _reshape_as(call: SpelledCall) -> fx.Node:
    return call.write(aten.reshape.default, call.first, call.sizes(call["other"]))


@rule(aten.unflatten.int)
def _unflatten(call: SpelledCall) -> fx.Node:
    sizes, dim = call.sizes(call.first), call["dim"]
    sizes[dim : dim + 1 or None] = call["sizes"]
    return call.write(aten.reshape.default, call.first, sizes)


@rule(aten.flatten.using_ints)
def _flatten(call: SpelledCall) -> fx.Node | None:
    return call.first if call.shape_is(call.first) else None


@rule(aten.ravel.default)
def _ravel(call: SpelledCall) -> fx.Node:
    return call.write(aten.flatten.using_ints, call.first, 0, -1)


@rule(aten.expand.default, aten.broadcast_to.default)
def _expand(call: SpelledCall) -> fx.Node:
    return call.first if call.shape_is(call.first) else call.write(aten.expand.default, call.first, call["size"])


@rule(aten.expand_as.default)
def _expand_as(call: SpelledCall) -> fx.Node:
    if call.shape_is(call.first):
        return call.first
    return call.write(aten.expand.default, call.first, call.sizes(call["other"]))


@rule(
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default),
    *(aten.movedim.int, aten.movedim.intlist, aten.swapaxes.default, aten.swapdims.default),
)
def _permute(call: SpelledCall) -> fx.Node:
    rank = call.value(call.first).dim()
    order = _order(call, rank)
    return call.first if order == list(range(rank)) else call.write(aten.permute.default, call.first, order)


def _order(call: SpelledCall, rank: int) -> list[int]:
    """For each dimension of the result the dimension of the argument: what PyTorch makes of an argument that is only
    names of its dimensions.
    """
    names = torch.empty(tuple(range(1, rank + 1)), device="meta")
    numbers = {name: value for name, value in call.arguments.items() if name != "self"}
    return [size - 1 for size in call.target(names, **numbers).shape]  # type: ignore[operator]


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(call: SpelledCall) -> fx.Node:
    """What torch.export took for one wide is dropped, whatever is one wide later: a batch of one stays a batch."""
    shape = call.value(call.first).shape
    given = call.arguments.get("dim", range(len(shape)))
    asked = {dim % len(shape) for dim in ([given] if isinstance(given, int) else given)}
    dropped = sorted(dim for dim in asked if isinstance(shape[dim], int) and shape[dim] == 1)
    return call.write(aten.squeeze.dims, call.first, dropped) if dropped else call.first


@rule(aten.slice.Tensor)
def _slice(call: SpelledCall) -> fx.Node | None:
    call.arguments["start"] = call["start"] if call["start"] is not None else 0
    call.arguments["end"] = call["end"] if call["end"] is not None else sys.maxsize
    whole = isinstance(call["end"], int) and call["end"] == sys.maxsize and call["start"] == 0 and call["step"] == 1
    return call.first if whole or call.shape_is(call.first) else None


@rule(aten.slice_scatter.default)
def _slice_scatter(call: SpelledCall) -> Any:
    """A tensor with a slice replaced is what lies before the slice, the other tensor, and what lies behind it."""
    x, dim = call.first, call["dim"]
    size = call.value(x).shape[dim]
    start, end = call["start"] or 0, sys.maxsize if call["end"] is None else call["end"]
    if start == 0 and end == sys.maxsize and call["step"] == 1:
        return call["src"]
    if call["step"] != 1 or not all(isinstance(number, int) for number in (size, start, end)):
        return None
    start, end, _ = slice(start, end).indices(size)
    parts = [call["src"]]
    if start > 0:
        parts.insert(0, call.write(aten.slice.Tensor, x, dim, 0, start, 1))
    if end < size:
        parts.append(call.write(aten.slice.Tensor, x, dim, end, sys.maxsize, 1))
    return call.write(aten.cat.default, parts, dim) if len(parts) > 1 else parts[0]


@rule(aten.select_scatter.default)
def _select_scatter(call: SpelledCall) -> Any:
    x, dim, index = call.first, call["dim"], call["index"]
    size = call.value(x).shape[dim]
    if not isinstance(size, int) or not isinstance(index, int):
        return None
    index %= size
    parts = [call.write(aten.unsqueeze.default, call["src"], dim % call.value(x).dim())]
    if index > 0:
        parts.insert(0, call.write(aten.slice.Tensor, x, dim, 0, index, 1))
    if index + 1 < size:
        parts.append(call.write(aten.slice.Tensor, x, dim, index + 1, sys.maxsize, 1))
    return call.write(aten.cat.default, parts, dim) if len(parts) > 1 else parts[0]


@rule(aten.copy.default)
def _copy(call: SpelledCall) -> fx.Node:
    """What copy_ writes: its argument, in the shape and dtype of what it writes into."""
    copied: fx.Node = call["src"]
    if call.value(copied).dtype != call.value().dtype:
        copied = call.write(aten.to.dtype, copied, call.value().dtype, False, False, None)
    same = call.shape_is(call["src"])
    return copied if same else call.write(aten.expand.default, copied, call.sizes(call.first))


@rule(
    *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
)
def _full(call: SpelledCall) -> fx.Node:
    return _filled(call, call["size"])


@rule(
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default),
    *(aten.zero.default, aten.fill.Scalar),
)
def _full_like(call: SpelledCall) -> fx.Node:
    return _filled(call, call.sizes(call.first))


def _filled(call: SpelledCall, sizes: Any) -> fx.Node:
    """Memory that is not filled holds anything: 0 too."""
    number = call.arguments.get("fill_value", call.arguments.get("value", 1 if "ones" in str(call.target) else 0))
    return call.write(aten.full.default, sizes, number, dtype=call.value().dtype)


@rule(aten.fill.Tensor)
def _fill_with_tensor(call: SpelledCall) -> fx.Node:
    value = call["value"]
    if call.value(value).dtype != call.value().dtype:
        value = call.write(aten.to.dtype, value, call.value().dtype, False, False, None)
    return call.write(aten.expand.default, value, call.sizes(call.first))


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(call: SpelledCall) -> fx.Node:
    start, step = call.arguments.get("start", 0), call.arguments.get("step", 1)
    return call.write(aten.arange.start_step, start, call["end"], step, dtype=call.value().dtype)
