"""The library's convolution, cuDNN's on a GPU, followed by one pass of our kernels for statistics, norm, addition and
activation: what our operators do where serving.py says that the library serves. Where cuDNN has one kernel for
convolution, bias, addition and ReLU, that one serves.

Results are laid out as those of our kernels are. PyTorch's settings hold: torch.backends.cudnn.benchmark, and
torch.backends.cudnn.deterministic for whoever wants the same bits from the same inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnfast_kernels import batchnorm, devices, memory
from cnnfast_kernels.epilogue import NO_NORM, Epilogue
from cnnfast_kernels.layout import Layout, convolution_format, result_format
from cnnfast_kernels.questions import Geometry

from .plain import pad
from .serving import Decision

UNPADDED = (0, 0, 0, 0)


def _laid(t: Tensor, layout: Layout) -> Tensor:
    """`t` in the strides that our kernels would have given it: the operators' fakes promise those to torch.compile."""
    return t if t.stride() == layout.strides else memory.empty(layout, t).copy_(t)


def _arguments(geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    """(stride, padding, dilation) as torch.convolution takes them."""
    top, _, left, _ = geometry.padding
    return list(geometry.stride), [top, left], list(geometry.dilation)


def _convolve(x: Tensor, w: Tensor, geometry: Geometry, bias: Tensor | None, pads: bool) -> Tensor:
    if pads:
        x, geometry = pad(x, geometry.padding), geometry._replace(padding=UNPADDED)
    y = torch.convolution(x, w, bias, *_arguments(geometry), False, [0, 0], geometry.groups)
    # PyTorch cannot know that a meta tensor stands for a GPU's, and makes a contiguous result of it. Warming wants the
    # layout that a GPU's has.
    return y.to(memory_format=convolution_format(x, w)) if y.is_meta else y


def fprop(x: Tensor, w: Tensor, geometry: Geometry, bias: Tensor | None, decision: Decision) -> Tensor:
    return _laid(_convolve(x, w, geometry, bias, decision.pads), decision.result)


def stats(
    x: Tensor, w: Tensor, geometry: Geometry, bias: Tensor | None, decision: Decision
) -> tuple[Tensor, Tensor, Tensor]:
    y = fprop(x, w, geometry, bias, decision)
    return y, *batchnorm.batch_moments(y)


def with_epilogue(x: Tensor, w: Tensor, geometry: Geometry, epilogue: Epilogue, decision: Decision) -> Tensor:
    """What `epilogue` makes of the convolution, by one pass after it. Without a norm this pass adds the bias too: for
    the library that would be a pass of its own.
    """
    bias, norm, residual, activation, slope, slopes = epilogue
    if norm.mean is None:
        if _cudnn_finishes(x, w, geometry, epilogue, decision):
            return _by_cudnn(x, w, geometry, epilogue, decision)
        norm, bias = NO_NORM._replace(beta=bias), None
    y = _convolve(x, w, geometry, bias, decision.pads)
    z = batchnorm.normalize(
        y, norm.mean, norm.var, norm.gamma, norm.beta, residual, norm.eps, activation, slope, slopes, decision.result
    )
    return _laid(z, decision.result)


def _has_cudnn(x: Tensor) -> bool:
    """Whether cuDNN is there for x, or for the GPU's tensor that x stands for."""
    cudnn = torch.backends.cudnn
    return (x.is_cuda and cudnn.enabled and cudnn.is_available()) or (x.is_meta and devices.type_of(x.device) == "cuda")


def _cudnn_finishes(x: Tensor, w: Tensor, geometry: Geometry, epilogue: Epilogue, decision: Decision) -> bool:
    """Whether cuDNN does all of it in one kernel, without a copy of an operand: ReLU, padding alike at both ends, one
    group, everything in the result's format. That kernel is chosen without regard to the settings that ask for the same
    bits each time.
    """
    if epilogue.activation != "relu" or decision.pads or geometry.groups > 1 or x.dtype == torch.float64:
        return False
    residual, result = epilogue.residual, decision.result
    fmt = result_format(result)
    return (
        _has_cudnn(x)
        and not (torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled())
        and x.is_contiguous(memory_format=fmt)
        and w.is_contiguous(memory_format=fmt)
        and (residual is None or residual.stride() == result.strides)
        and (epilogue.bias is None or epilogue.bias.is_contiguous())
    )


def _by_cudnn(x: Tensor, w: Tensor, geometry: Geometry, epilogue: Epilogue, decision: Decision) -> Tensor:
    if x.is_meta:  # for which PyTorch does not have these operators; nothing of ours is launched
        return memory.empty(decision.result, x)
    how = *_arguments(geometry), geometry.groups
    if epilogue.residual is None:
        z = torch.cudnn_convolution_relu(x, w, epilogue.bias, *how)
    else:
        z = torch.cudnn_convolution_add_relu(x, w, epilogue.residual, 1.0, epilogue.bias, *how)
    return _laid(z, decision.result)


def dgrad(
    dy: Tensor, w: Tensor, x_shape: Sequence[int], geometry: Geometry, bias: Tensor | None, decision: Decision
) -> Tensor:
    """With `bias` [C], the transposed convolution to which it belongs."""
    if not decision.pads:
        return _laid(_convolve_back(dy, w, x_shape, geometry, bias), decision.result)
    N, C, H, W = x_shape
    top, bottom, left, right = geometry.padding
    padded = _convolve_back(dy, w, (N, C, H + top + bottom, W + left + right), geometry._replace(padding=UNPADDED))
    dx = pad(padded, geometry.padding, -1)  # also adds rows that no tap reaches, which get the bias too
    return _laid(dx if bias is None else dx + bias.view(-1, 1, 1), decision.result)


def _convolve_back(
    dy: Tensor, w: Tensor, x_shape: Sequence[int], geometry: Geometry, bias: Tensor | None = None
) -> Tensor:
    stride, padding, dilation = _arguments(geometry)
    if geometry.groups > 1 and geometry.groups == x_shape[1]:
        # PyTorch has kernels for the gradient of a depthwise convolution, and none for a transposed one. Only the
        # layout of x is read.
        x = memory.empty(x_shape, dy, convolution_format(dy, w))
        arguments = stride, padding, dilation, False, [0, 0], geometry.groups
        dx = torch.ops.aten.convolution_backward(dy, x, w, None, *arguments, [True, False, False])[0]
        return dx if bias is None else dx.add_(bias.view(-1, 1, 1))
    # The library is called as for the gradient, but without x, which need not have been kept.
    reached = [
        (n - 1) * s - 2 * p + d * (taps - 1) + 1
        for n, s, p, d, taps in zip(dy.shape[2:], stride, padding, dilation, w.shape[2:], strict=True)
    ]
    more = [size - least for size, least in zip(x_shape[2:], reached, strict=True)]
    return torch.convolution(dy, w, bias, stride, padding, dilation, True, more, geometry.groups)


def wgrad(x: Tensor, dy: Tensor, w_shape: Sequence[int], geometry: Geometry, decision: Decision) -> Tensor:
    if decision.pads:
        x, geometry = pad(x, geometry.padding), geometry._replace(padding=UNPADDED)
    w = memory.empty(decision.result, x)  # only its layout is read
    arguments = *_arguments(geometry), False, [0, 0], geometry.groups
    dw = torch.ops.aten.convolution_backward(dy, x, w, None, *arguments, [False, True, False])[1]
    return _laid(dw, decision.result)
