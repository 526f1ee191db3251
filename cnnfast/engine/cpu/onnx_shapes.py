"""What moves, picks, repeats or makes elements, in ONNX: reshapes, slices, concatenations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .onnx_writer import NoOnnxForm, Number, OnnxValue, OnnxWriter

END = 2**63 - 1


def in_shape(w: OnnxWriter, x: OnnxValue | str, sizes: Iterable[Number] | None = None) -> str:
    """x in the shape of the result. One size may depend on the batch: -1 stands for it. `sizes`, for more than one, are
    what the call names.
    """
    shape = w.result.shape
    if 0 not in shape and sum(not isinstance(size, int) for size in shape) <= 1:
        return w.call("Reshape", x, w.integers(size if isinstance(size, int) else -1 for size in shape))
    if sizes is None:
        raise NoOnnxForm(f"a shape {list(shape)} in which two sizes depend on the batch, or one is 0")
    return w.call("Reshape", x, w.integers(sizes), allowzero=int(0 in shape))


def reshape(w: OnnxWriter, x: OnnxValue, shape: Sequence[Number]) -> str:
    return in_shape(w, x, shape)


def reshaped(w: OnnxWriter, x: OnnxValue, *_: Any) -> str:
    """Of any operator whose result has the elements of x in their order."""
    return in_shape(w, x)


def permuted(w: OnnxWriter, x: OnnxValue, order: Sequence[int]) -> str:
    perm = [dim % len(x.shape) for dim in order]
    return x.name if perm == list(range(len(perm))) else w.call("Transpose", x, perm=perm)


def transpose(w: OnnxWriter, x: OnnxValue, first: int, second: int) -> str:
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    return permuted(w, x, order)


def turned(w: OnnxWriter, x: OnnxValue) -> str:
    return permuted(w, x, list(reversed(range(len(x.shape)))))


def moved(w: OnnxWriter, x: OnnxValue, source: Sequence[int], destination: Sequence[int]) -> str:
    rank = len(x.shape)
    places = dict(zip([d % rank for d in destination], [s % rank for s in source], strict=True))
    rest = iter(dim for dim in range(rank) if dim not in places.values())
    return permuted(w, x, [places[dim] if dim in places else next(rest) for dim in range(rank)])


def unsqueeze(w: OnnxWriter, x: OnnxValue | str, dim: int) -> str:
    return w.call("Unsqueeze", x, w.integers([dim]))


def concatenated(w: OnnxWriter, tensors: Sequence[OnnxValue], dim: int = 0) -> str:
    """PyTorch lets empty vectors go along with tensors of other shapes."""
    parts = [w.cast(t, w.result.dtype) for t in tensors if t.shape != (0,)]
    return parts[0] if len(parts) == 1 else w.call("Concat", *parts, axis=dim)


def stacked(w: OnnxWriter, tensors: Sequence[OnnxValue], dim: int = 0) -> str:
    dim %= len(w.result.shape)
    return w.call("Concat", *(unsqueeze(w, w.cast(t, w.result.dtype), dim) for t in tensors), axis=dim)


def split(w: OnnxWriter, x: OnnxValue, _: Any, dim: int = 0) -> list[str]:
    """The sizes of the parts are those of the results: PyTorch's last one may be smaller."""
    sizes = [part.shape[dim] for part in w.result]
    if not all(isinstance(size, int) for size in sizes):
        raise NoOnnxForm("a split of the batch")
    return w.calls("Split", x, w.integers(sizes), outputs=len(sizes), axis=dim)


def unbound(w: OnnxWriter, x: OnnxValue, dim: int = 0) -> list[str]:
    count = len(w.result)
    parts = w.calls("Split", x, w.integers([1] * count), outputs=count, axis=dim)
    return [w.call("Squeeze", part, w.integers([dim])) for part in parts]


def sliced(
    w: OnnxWriter,
    x: OnnxValue | str,
    dim: int = 0,
    start: Number | None = None,
    end: Number | None = None,
    step: int = 1,
) -> str:
    return w.call(
        "Slice",
        x,
        w.integers([0 if start is None else start]),
        w.integers([END if end is None else end]),
        w.integers([dim]),
        w.integers([step]),
    )


def narrow(w: OnnxWriter, x: OnnxValue, dim: int, start: int, length: int) -> str:
    return sliced(w, x, dim, start, END if start + length == 0 else start + length)


def select(w: OnnxWriter, x: OnnxValue, dim: int, index: Number) -> str:
    return w.call("Gather", x, w.cast(index, torch.int64), axis=dim)


def index_select(w: OnnxWriter, x: OnnxValue, dim: int, index: OnnxValue) -> str:
    return w.call("Gather", x, index, axis=dim)


def embedding(w: OnnxWriter, weight: OnnxValue, index: OnnxValue, *_: Any) -> str:
    return w.call("Gather", weight, index, axis=0)


def gather(w: OnnxWriter, x: OnnxValue, dim: int, index: OnnxValue, sparse: bool = False) -> str:
    return w.call("GatherElements", x, index, axis=dim)


def indexed(w: OnnxWriter, x: OnnxValue, indices: Sequence[OnnxValue | None]) -> str:
    """x[:, index]: one index, of integers, in one dimension."""
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype not in (torch.int32, torch.int64):
        raise NoOnnxForm("an index by several tensors, or by truth values")
    return w.call("Gather", x, given[0][1], axis=given[0][0])


def expanded(w: OnnxWriter, x: OnnxValue | str, sizes: Sequence[Number]) -> str:
    """ONNX's Expand keeps a size where 1 is asked for."""
    asked = [1 if not isinstance(size, OnnxValue) and size == -1 else size for size in sizes]
    return w.call("Expand", x, w.integers(asked))


def expanded_as(w: OnnxWriter, x: OnnxValue, other: OnnxValue) -> str:
    return w.call("Expand", x, w.call("Shape", other))


def repeated(w: OnnxWriter, x: OnnxValue, repeats: Sequence[Number]) -> str:
    more, fewer = len(repeats) - len(x.shape), len(x.shape) - len(repeats)
    y: OnnxValue | str = w.call("Unsqueeze", x, w.integers(range(more))) if more > 0 else x
    return w.call("Tile", y, w.integers([*([1] * fewer), *repeats]))


def turned_around(w: OnnxWriter, x: str, dim: int, shift: int, size: int) -> str:
    """The last `shift` elements of a dimension come first."""
    at = shift % size
    return w.call("Concat", sliced(w, x, dim, size - at), sliced(w, x, dim, 0, size - at), axis=dim) if at else x


def rolled(w: OnnxWriter, x: OnnxValue, shifts: Sequence[int], dims: Sequence[int] = ()) -> str:
    if not dims:
        flat = w.call("Reshape", x, w.integers([-1]))
        return in_shape(w, turned_around(w, flat, 0, shifts[0], math.prod(x.sizes(*range(len(x.shape))))))
    y = x.name
    for shift, dim in zip(shifts, dims, strict=True):
        y = turned_around(w, y, dim, shift, x.size(dim))
    return y


def flipped(w: OnnxWriter, x: OnnxValue, dims: Sequence[int]) -> str:
    y: OnnxValue | str = x
    for dim in dims:
        y = sliced(w, y, dim, -1, -END, -1)
    return y if isinstance(y, str) else y.name


def pixel_shuffle(w: OnnxWriter, x: OnnxValue, factor: int) -> str:
    return w.call("DepthToSpace", x, blocksize=factor, mode="CRD")


def pixel_unshuffle(w: OnnxWriter, x: OnnxValue, factor: int) -> str:
    """ONNX's SpaceToDepth puts the channels last in order, PyTorch first."""
    C, H, W = x.sizes(1, 2, 3)
    y = w.call("Reshape", x, w.integers([-1, C, H // factor, factor, W // factor, factor]))
    return in_shape(w, w.call("Transpose", y, perm=[0, 1, 3, 5, 2, 4]))


def channel_shuffle(w: OnnxWriter, x: OnnxValue, groups: int) -> str:
    C, *image = x.sizes(*range(1, len(x.shape)))
    y = w.call("Reshape", x, w.integers([-1, groups, C // groups, math.prod(image)]))
    return in_shape(w, w.call("Transpose", y, perm=[0, 2, 1, 3]))


PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def padded(w: OnnxWriter, x: OnnxValue, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> str:
    """PyTorch names the last dimension first, with both its sides."""
    if not all(isinstance(p, int) for p in pad):
        raise NoOnnxForm("padding that depends on the batch")
    rank = len(x.shape)
    starts, ends = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):
        starts[rank - 1 - i], ends[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    fill = w.number(value or 0, x.dtype) if mode == "constant" else None
    return w.call("Pad", x, w.integers(starts + ends), fill, mode=PAD_MODES[mode])


def pad_mode(mode: str) -> Callable[..., str]:
    return lambda w, x, pad: padded(w, x, pad, mode)


def filled(w: OnnxWriter, sizes: Sequence[Number], value: Number) -> str:
    return w.call("Expand", w.cast(value, w.result.dtype), w.integers(sizes))


def filled_with(value: float) -> Callable[..., str]:
    return lambda w, sizes, *_: filled(w, sizes, value)


def like(w: OnnxWriter, x: OnnxValue, value: Number) -> str:
    return w.call("Expand", w.cast(value, w.result.dtype), w.call("Shape", x))


def filled_like(value: float) -> Callable[..., str]:
    return lambda w, x, *_: like(w, x, value)


def counted(w: OnnxWriter, start: Number, end: Number, step: Number = 1) -> str:
    dtype = w.result.dtype
    return w.call("Range", *(w.cast(each, dtype) for each in (start, end, step)))


def size(w: OnnxWriter, x: OnnxValue, dim: int) -> str:
    return w.call("Gather", w.call("Shape", x), w.number(dim % len(x.shape), torch.int64), axis=0)


RESHAPED = (
    *("flatten.using_ints", "unflatten.int", "squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default"),
    *("ravel.default", "view_as.default", "reshape_as.default"),
)
PADS = {
    **{f"reflection_pad{axes}d": "reflect" for axes in (1, 2, 3)},
    **{f"replication_pad{axes}d": "replicate" for axes in (1, 2, 3)},
}
FORMS: dict[str, Callable[..., Any]] = {
    "python.getitem": lambda w, x, i: x[i].name,
    "aten.sym_size.int": size,
    **{f"aten.{name}.default": reshape for name in ("reshape", "view", "_unsafe_view")},
    **{f"aten.{name}": reshaped for name in RESHAPED},
    **{f"aten.{name}.default": lambda w, x, *_: x.name for name in ("clone", "contiguous", "alias", "detach")},
    "aten.permute.default": permuted,
    "aten.transpose.int": transpose,
    **{f"aten.{name}.default": turned for name in ("t", "numpy_T")},
    "aten.movedim.intlist": moved,
    "aten.movedim.int": lambda w, x, source, destination: moved(w, x, [source], [destination]),
    "aten.cat.default": concatenated,
    "aten.concat.default": concatenated,
    "aten.stack.default": stacked,
    **{f"aten.{name}": split for name in ("chunk.default", "split.Tensor", "split_with_sizes.default", "split.sizes")},
    "aten.unbind.int": unbound,
    "aten.slice.Tensor": sliced,
    "aten.narrow.default": narrow,
    "aten.select.int": select,
    "aten.index_select.default": index_select,
    "aten.embedding.default": embedding,
    "aten.gather.default": gather,
    "aten.index.Tensor": indexed,
    "aten.expand.default": lambda w, x, sizes, implicit=False: expanded(w, x, sizes),
    "aten.expand_as.default": expanded_as,
    "aten.repeat.default": repeated,
    "aten.tile.default": repeated,
    "aten.roll.default": rolled,
    "aten.flip.default": flipped,
    "aten.pixel_shuffle.default": pixel_shuffle,
    "aten.pixel_unshuffle.default": pixel_unshuffle,
    "aten.channel_shuffle.default": channel_shuffle,
    "aten.pad.default": padded,
    "aten.constant_pad_nd.default": lambda w, x, pad, value=0: padded(w, x, pad, "constant", value),
    **{f"aten.{name}.default": pad_mode(mode) for name, mode in PADS.items()},
    "aten.full.default": lambda w, sizes, value, *_: filled(w, sizes, value),
    "aten.zeros.default": filled_with(0),
    "aten.ones.default": filled_with(1),
    "aten.full_like.default": lambda w, x, value, *_: like(w, x, value),
    "aten.zeros_like.default": filled_like(0),
    "aten.ones_like.default": filled_like(1),
    "aten.new_zeros.default": lambda w, x, sizes, *_: filled(w, sizes, 0),
    "aten.new_ones.default": lambda w, x, sizes, *_: filled(w, sizes, 1),
    "aten.new_full.default": lambda w, x, sizes, value, *_: filled(w, sizes, value),
    "aten.scalar_tensor.default": lambda w, value, *_: w.cast(value, w.result.dtype),
    "aten.arange.default": lambda w, end, *_: counted(w, 0, end),
    "aten.arange.start": lambda w, start, end, *_: counted(w, start, end),
    "aten.arange.start_step": lambda w, start, end, step=1, *_: counted(w, start, end, step),
    "aten.triu.default": lambda w, x, diagonal=0: w.call("Trilu", x, w.number(diagonal, torch.int64), upper=1),
    "aten.tril.default": lambda w, x, diagonal=0: w.call("Trilu", x, w.number(diagonal, torch.int64), upper=0),
}
