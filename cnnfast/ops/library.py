"""The library's convolution, cuDNN's on a GPU, inside our operators: where a row that was measured on this GPU says that it is faster.

Batch norm, residual and activation are then a kernel of ours, as in training. Results are laid out as our own. PyTorch's settings
hold here: torch.backends.cudnn.deterministic, for one, where the same inputs shall give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnfast_kernels import batchnorm, launch
from cnnfast_kernels.conv import Geometry
from cnnfast_kernels.epilogue import Epilogue
from cnnfast_kernels.tables import Row

from .. import dispatch

UNMEASURED = "unmeasured: run cnnfast tune"


def serves(geometry: Geometry) -> bool:
    """Whether it can: it pads both ends alike."""
    top, bottom, left, right = geometry.padding
    return (top, left) == (bottom, right)


def wins(row: Row | None, geometry: Geometry, x: Tensor) -> bool:
    """Whether the library serves a call for which `row` was found. Tells traces, and what was not measured on a GPU."""
    if row is None:
        if x.is_cuda:
            dispatch.note("kernels", UNMEASURED)
        return False
    if row.winner != "library" or not serves(geometry) or not dispatch.library_allowed():
        return False
    times = {name: f"{time:.1f} us" for name, time in row.microseconds.items()}
    measured = f"it took {times.get('library')}, our best kernel {times.get('kernels')} at batch {row.key.problem.N}"
    dispatch.note("library", f"{measured} when measured on this GPU")
    return True


def _laid(t: Tensor, shape: Sequence[int], like: Tensor, fmt: torch.memory_format) -> Tensor:
    """`t` in the strides that our kernels would have given it: fakes, and what torch.compile made of them, rely on those."""
    out = launch.empty(shape, like, fmt)
    return t if t.stride() == out.stride() else out.copy_(t)


def _arguments(geometry: Geometry) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    top, _, left, _ = geometry.padding
    return list(geometry.stride), [top, left], list(geometry.dilation), False, [0, 0], geometry.groups


def fprop(x: Tensor, w: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    y = torch.convolution(x, w, bias, *_arguments(geometry))
    return _laid(y, y.shape, x, launch.memory_format(x, w))


def stats(x: Tensor, w: Tensor, geometry: Geometry, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    y = fprop(x, w, geometry, bias)
    return y, *batchnorm.batch_moments(y)


def bn_act(x: Tensor, w: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    bias, norm, residual, activation, slope = epilogue
    y = fprop(x, w, geometry, bias)
    assert norm.mean is not None
    assert norm.var is not None
    z = batchnorm.normalize(y, norm.mean, norm.var, norm.weight, norm.bias, residual, norm.eps, activation, slope)
    return _laid(z, z.shape, x, launch.memory_format(x, w))


def dgrad(dy: Tensor, w: Tensor, x_shape: Sequence[int], geometry: Geometry, fmt: torch.memory_format, bias: Tensor | None) -> Tensor:
    x = launch.empty(x_shape, dy, fmt)  # only its size and strides are read
    dx = torch.ops.aten.convolution_backward(dy, x, w, None, *_arguments(geometry), [True, False, False])[0]
    dx = dx if bias is None else dx + bias.view(-1, 1, 1)
    return _laid(dx, x_shape, dy, fmt)


def wgrad(x: Tensor, dy: Tensor, w_shape: Sequence[int], geometry: Geometry, fmt: torch.memory_format) -> Tensor:
    w = launch.empty(w_shape, x, fmt)
    dw = torch.ops.aten.convolution_backward(dy, x, w, None, *_arguments(geometry), [False, True, False])[1]
    return _laid(dw, w_shape, x, fmt)
