"""What moves, picks, repeats or makes elements, in ONNX: reshapes, slices, concatenations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .onnx_sizes import NoOnnxForm
from .onnx_writer import Number, OnnxValue, OnnxWriter

SPLITS = ("chunk.default", "split.Tensor", "split.sizes", "split_with_sizes.default")
SPLITS += ("tensor_split.sections", "tensor_split.indices")


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


def expanded(w: OnnxWriter, x: OnnxValue | str, sizes: Sequence[Number]) -> str:
    """ONNX's Expand keeps a size where 1 is asked for."""
    asked = [1 if not isinstance(size, OnnxValue) and size == -1 else size for size in sizes]
    return w.call("Expand", x, w.integers(asked))


def repeated(w: OnnxWriter, x: OnnxValue, repeats: Sequence[Number]) -> str:
    more, fewer = len(repeats) - len(x.shape), len(x.shape) - len(repeats)
    y: OnnxValue | str = w.call("Unsqueeze", x, w.integers(range(more))) if more > 0 else x
    return w.call("Tile", y, w.integers([*([1] * fewer), *repeats]))


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


def filled(w: OnnxWriter, sizes: Sequence[Number], value: Number) -> str:
    return w.call("Expand", w.cast(value, w.result.dtype), w.integers(sizes))


def counted(w: OnnxWriter, start: Number, end: Number, step: Number = 1) -> str:
    dtype = w.result.dtype
    return w.call("Range", *(w.cast(each, dtype) for each in (start, end, step)))


def size(w: OnnxWriter, x: OnnxValue, dim: int) -> str:
    return w.call("Gather", w.call("Shape", x), w.number(dim % len(x.shape), torch.int64), axis=0)


def repeated_each(w: OnnxWriter, x: OnnxValue, repeats: int, dim: int | None = None, *_: Any) -> str:
    """Each element `repeats` times, one behind the other; dim None: of the flattened tensor."""
    at = len(x.shape) if dim is None else dim % len(x.shape) + 1
    once = w.call("Unsqueeze", x, w.integers([at]))
    counts = [1] * (len(x.shape) + 1)
    counts[at] = repeats
    return in_shape(w, w.call("Tile", once, w.integers(counts)))


def of_the_batch(w: OnnxWriter, *_: Any) -> str:
    """What is made of known numbers is a constant, and not written."""
    raise NoOnnxForm("eye, or linspace, as large as the batch")


FORMS: dict[str, Callable[..., Any]] = {
    "python.getitem": lambda w, x, i: x[i].name,
    "aten.sym_size.int": size,
    "aten.reshape.default": reshape,
    **{f"aten.{name}": reshaped for name in ("flatten.using_ints", "squeeze.dims", "unsqueeze.default")},
    "aten.clone.default": lambda w, x, *_: x.name,
    "aten.permute.default": permuted,
    "aten.transpose.int": transpose,
    "aten.cat.default": concatenated,
    "aten.stack.default": stacked,
    **{f"aten.{name}": split for name in SPLITS},
    "aten.unbind.int": unbound,
    "aten.expand.default": lambda w, x, sizes, implicit=False: expanded(w, x, sizes),
    "aten.repeat.default": repeated,
    "aten.tile.default": repeated,
    "aten.repeat_interleave.self_int": repeated_each,
    "aten.pad.default": padded,
    "aten.full.default": lambda w, sizes, value, *_: filled(w, sizes, value),
    "aten.scalar_tensor.default": lambda w, value, *_: w.cast(value, w.result.dtype),
    "aten.eye.default": of_the_batch,
    "aten.eye.m": of_the_batch,
    "aten.linspace.default": of_the_batch,
    "aten.arange.start_step": lambda w, start, end, step=1, *_: counted(w, start, end, step),
}
