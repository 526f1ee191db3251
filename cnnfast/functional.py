"""The operations by the names and arguments of torch.nn.functional, plus `algorithm` and the fused `conv_bn_act`.

Every function decides by `dispatch.why_torch` who serves the call. On the kernels' path arguments are checked here, before
anything is launched, and bad ones raise what PyTorch raises, naming the argument, its value and the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from math import prod
from numbers import Real
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels.problem import output_extent, pool_extent

from .activations import LEAKY_SLOPE, activate, check_activation
from .dispatch import launch, operation, record_torch, why_torch

# Without triton no call gets as far as an operator.
ops: Any = import_module(".ops", __package__) if launch is not None else None

ALGORITHMS = ("auto", "direct", "im2col", "torch")

Size = int | tuple[int, ...] | list[int]


def _as_int(value: Any) -> Any:
    """`value` as an int: anything with __index__ but a bool. Raises TypeError, and ValueError beyond 64 bits, as PyTorch does."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool):
        raise TypeError
    value = index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError
    return value


def _refuse(function: str, name: str, value: Any, kind: str, error: Exception) -> Exception:
    """What to raise for a value that `_as_int` refused."""
    if isinstance(error, ValueError):
        return ValueError(f"{function}(): {name} must fit into 64 bits, but got {name}={value!r}")
    return TypeError(f"{function}(): {name} must be {kind}, but got {name}={value!r}")


def _int(function: str, name: str, value: Any) -> int:
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    try:
        return _as_int(value)
    except (TypeError, ValueError) as error:
        raise _refuse(function, name, value, "an int", error) from None


def _sizes(function: str, name: str, value: Any, least: int, n: int = 2) -> tuple[int, ...]:
    """`value`, an int or a tuple or list of them, as n ints, one an axis (n is 1 or 2), each at least `least`."""
    if type(value) is int:
        values = (value,) * n
    elif type(value) is tuple and len(value) == n and type(value[0]) is int and type(value[-1]) is int:
        values = value
    else:
        values = _as_sizes(function, name, value, n)
    if not least <= values[0] < 2**31 or not least <= values[-1] < 2**31:
        values = _as_sizes(function, name, value, n)  # what does not even fit into 64 bits is refused as that
        rule = "less than 2**31" if min(values) >= least else "non-negative" if least == 0 else "positive"
        raise RuntimeError(f"{function}(): {name} must be {rule}, but got {name}={values}")
    return values


def _as_sizes(function: str, name: str, value: Any, n: int) -> tuple[int, ...]:
    """`value`, an int or a tuple or list of them, as n ints."""
    values: tuple[Any, ...] = tuple(value) if isinstance(value, tuple | list) else (value,)
    try:
        values = tuple(map(_as_int, values))
    except (TypeError, ValueError) as error:
        kind = "an int or a pair of ints" if n == 2 else "an int or a tuple of one int"
        raise _refuse(function, name, value, kind, error) from None
    if len(values) not in (1, n):
        raise RuntimeError(f"{function}(): {name} must be a single integer value or a list of {n} values, but got {name}={list(values)}")
    return values if len(values) == n else values * n


def _check_flag(function: str, name: str, value: Any) -> None:
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{function}(): {name} must be a bool, but got {name}={value!r}")


def _float(function: str, name: str, value: Any) -> Any:
    """A number, or a tensor of no dimension, as PyTorch takes a float."""
    if isinstance(value, (float, torch.SymFloat)):
        return value
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0):
        return float(value)
    raise TypeError(f"{function}(): {name} must be a float, but got {name}={value!r}")


def _window(function: str, input: Tensor, kernel_size: Size, stride: Size | None, padding: Size, dilation: Size, ceil_mode: bool):
    """The checked window of a pooling: (kernel_size, stride, padding, dilation, ceil_mode)."""
    _check_flag(function, "ceil_mode", ceil_mode)
    _check_image(function, input)
    kernel = _sizes(function, "kernel_size", kernel_size, 1)
    own = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    step = kernel if own else _sizes(function, "stride", stride, 1)
    pad = _sizes(function, "padding", padding, 0)
    dil = _sizes(function, "dilation", dilation, 1)
    if pad[0] > kernel[0] // 2 or pad[1] > kernel[1] // 2:
        raise RuntimeError(f"{function}(): padding must be at most half of kernel_size, but got padding={pad}, kernel_size={kernel}")
    _, _, H, W = input.shape
    P = pool_extent(H, kernel[0], step[0], pad[0], dil[0], ceil_mode)
    Q = pool_extent(W, kernel[1], step[1], pad[1], dil[1], ceil_mode)
    if P < 1 or Q < 1:
        raise RuntimeError(
            f"{function}(): with kernel_size={kernel} the output of input size {list(input.shape)} would be {P}x{Q}: too small"
        )
    return kernel, step, pad, dil, ceil_mode


def _check_image(function: str, input: Tensor) -> None:
    if input.dim() != 4 or 0 in input.shape[1:]:
        error = IndexError if function == "avg_pool2d" and input.dim() < 3 else RuntimeError
        raise error(f"{function}(): expected input of size [C, H, W] or [N, C, H, W], only N may be 0, but got {list(input.shape)}")


def _batched(input: Tensor, n: int = 2) -> tuple[Tensor, bool]:
    """PyTorch's unbatched [C, H, W] (n = 2 axes) as a batch of one."""
    return (input.unsqueeze(0), True) if input.dim() == n + 1 else (input, False)


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Casts as PyTorch's convolutions do under torch.autocast: floating tensors but float64, to the dtype in force, where kernels are."""
    device = "cuda" if x.is_cuda else "cpu"
    if not torch.is_autocast_enabled(device) or not (x.is_cuda or x.is_cpu):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *others))


def _check_algorithm(function: str, algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{function}(): algorithm must be one of {', '.join(ALGORITHMS)}, but got algorithm={algorithm!r}")


def _image_size(n: int) -> str:
    return ("L", "H, W")[n - 1]


def _check_operands(
    function: str, n: int, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, transposed: bool = False
) -> tuple[list[int], list[int]]:
    """What a convolution over n axes asks of its (batched) tensors: the extents of the image, and the taps."""
    if weight.dim() != n + 2:
        axes = ("S", "R, S")[n - 1]
        sizes = f"[C, K / groups, {axes}]" if transposed else f"[K, C / groups, {axes}]"
        raise RuntimeError(f"{function}(): weight must be of size {sizes}, but got {list(weight.shape)}")
    if input.dim() != n + 2:
        raise RuntimeError(
            f"{function}(): expected {n + 1}D (unbatched) or {n + 2}D (batched) input [N, C, {_image_size(n)}], but got input of size"
            f" {list(input.shape)}"
        )
    if groups < 1:
        raise RuntimeError(f"{function}(): groups must be positive, but got groups={groups}")
    N, given, *image = input.shape
    first, second, *taps = weight.shape
    if first < 1 or first % groups:
        rows = "channels" if transposed else "filters"
        raise RuntimeError(f"{function}(): groups={groups} must divide the {rows}, but weight has size {list(weight.shape)}")
    channels, filters = (first, second * groups) if transposed else (second * groups, first)
    if given != channels:
        raise RuntimeError(
            f"{function}(): with groups={groups} and weight of size {list(weight.shape)}, input must have {channels} channels,"
            f" but input has size {list(input.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != filters):
        raise RuntimeError(f"{function}(): bias must have size [{filters}], one value a filter, but got {list(bias.shape)}")
    dtype = input.dtype
    if weight.dtype != dtype:
        raise RuntimeError(f"{function}(): weight must have input's dtype {dtype}, but got {weight.dtype}")
    if bias is not None and bias.dtype != dtype:
        raise RuntimeError(f"{function}(): bias must have input's dtype {dtype}, but got {bias.dtype}")
    if 0 in taps or filters < 1:
        raise RuntimeError(f"{function}(): weight must have at least one filter and one tap, but got size {list(weight.shape)}")
    if 0 in image and N > 0 and channels > 0:
        raise RuntimeError(f"{function}(): only batch and channels of input may be empty, but got size {list(input.shape)}")
    return image, taps


def _conv_geometry(
    function: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    n: int = 2,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """The checked geometry over n axes: (stride, (top, bottom, left, right), dilation, groups)."""
    groups = _int(function, "groups", groups)
    image, taps = _check_operands(function, n, input, weight, bias, groups)
    step = _sizes(function, "stride", stride, 1, n)
    dil = _sizes(function, "dilation", dilation, 1, n)
    pads = _conv_padding(function, padding, step, dil, taps)
    first, last = image[0] + pads[0] + pads[1], image[-1] + pads[-2] + pads[-1]  # the same, of one axis
    if first <= dil[0] * (taps[0] - 1) or last <= dil[-1] * (taps[-1] - 1):
        spans = [d * (t - 1) + 1 for d, t in zip(dil, taps, strict=True)]
        raise RuntimeError(
            f"{function}(): the padded input ({' x '.join(map(str, (first, last)[:n]))}) is smaller than the kernel"
            f" ({' x '.join(map(str, spans))} with dilation={dil})"
        )
    return step, pads, dil, groups


def _conv_padding(
    function: str, padding: Size | str, stride: tuple[int, ...], dilation: tuple[int, ...], taps: Sequence[int]
) -> tuple[int, ...]:
    """(before, after) of each axis, one after the other."""
    if not isinstance(padding, str):
        pads = _sizes(function, "padding", padding, 0, len(taps))
        return (pads[0], pads[0], pads[-1], pads[-1])[: 2 * len(pads)]
    if padding == "valid":
        return (0, 0) * len(taps)
    if padding == "same":
        if max(stride) > 1:
            raise RuntimeError(f"{function}(): padding='same' is not supported for strided convolutions, but got stride={stride}")
        spans = [d * (n - 1) for d, n in zip(dilation, taps, strict=True)]
        return tuple(pad for span in spans for pad in (span // 2, span - span // 2))  # even filters: one more at the end
    raise RuntimeError(f"{function}(): padding must be 'same', 'valid', an int or a pair of ints, but got padding={padding!r}")


@operation
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    algorithm: str = "auto",
) -> Tensor:
    """2-D convolution, as torch.nn.functional.conv2d.

    input [N, C, H, W] or [C, H, W], weight [K, C / groups, R, S], bias [K], all of one dtype (float16, bfloat16, float32, float64);
    padding: int, pair, "same" or "valid". Returns [N, K, P, Q], channels_last if input or weight is.
    algorithm: "auto", "direct" (implicit GEMM), "im2col" (explicit, in a bounded workspace), "torch".
    Raises RuntimeError and TypeError where PyTorch does.
    """
    _check_algorithm("conv2d", algorithm)
    if reason := why_torch(input, weight, bias, algorithm=algorithm):
        record_torch("conv2d", reason, input, weight)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    x, w, b = _autocast(input, weight, bias)
    x, unbatched = _batched(x)
    geometry = _conv_geometry("conv2d", x, w, b, stride, padding, dilation, groups)
    y = _convolve(x, w, b, geometry, algorithm)
    return y.squeeze(0) if unbatched else y


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, geometry: Any, algorithm: str) -> Tensor:
    if x.shape[1] == 0:  # as PyTorch has it: without channels in there are none out; all gradients are zero
        N, _, P, Q = _output_size(x, w, geometry)
        return x.new_empty(N, 0, P, Q) * sum(t.sum() for t in (x, w, b) if t is not None)
    return ops.conv_fprop(x, w, b, *geometry, algorithm)


@operation
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    algorithm: str = "auto",
) -> Tensor:
    """1-D convolution, as torch.nn.functional.conv1d: conv2d of images one row high.

    input [N, C, L] or [C, L], weight [K, C / groups, S], bias [K]; dtypes, padding and algorithm as conv2d. Returns [N, K, Q], in
    memory [N, Q, K] if weight lies as [K, S, C / groups]. Raises RuntimeError and TypeError where PyTorch does.
    """
    _check_algorithm("conv1d", algorithm)
    if reason := why_torch(input, weight, bias, algorithm=algorithm):
        record_torch("conv1d", reason, input, weight)
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    x, w, b = _autocast(input, weight, bias)
    x, unbatched = _batched(x, 1)
    step, pads, dil, groups = _conv_geometry("conv1d", x, w, b, stride, padding, dilation, groups, 1)
    # PyTorch makes input contiguous: where the channels of ours are adjacent, a row's stride of 1 hides that from the output's format.
    rows = x.unsqueeze(2) if x.is_contiguous() else x.unsqueeze(3).transpose(2, 3)
    y = _convolve(rows, w.unsqueeze(2), b, ((1, *step), (0, 0, *pads), (1, *dil), groups), algorithm).squeeze(2)
    return y.squeeze(0) if unbatched else y


@operation
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    algorithm: str = "auto",
) -> Tensor:
    """2-D transposed convolution, as torch.nn.functional.conv_transpose2d: the gradient of a convolution as an operation of its own.

    input [N, C, H, W] or [C, H, W], weight [C, K / groups, R, S], bias [K]; dtypes and algorithm as conv2d. Returns [N, K, P, Q] with
    P = (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1, channels_last if input or weight is.
    Raises RuntimeError and TypeError where PyTorch does.
    """
    _check_algorithm("conv_transpose2d", algorithm)
    if reason := why_torch(input, weight, bias, algorithm=algorithm):
        record_torch("conv_transpose2d", reason, input, weight)
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    x, w, b = _autocast(input, weight, bias)
    x, unbatched = _batched(x)
    size, *geometry = _transposed_geometry("conv_transpose2d", x, w, b, stride, padding, output_padding, groups, dilation)
    channels_last = launch.memory_format(x, w) == torch.channels_last
    y = ops.conv_dgrad(x, w, b, size, channels_last, *geometry, algorithm)
    return y.squeeze(0) if unbatched else y


def _transposed_geometry(
    function: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> tuple[list[int], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """The checked (size of the output, stride, (top, bottom, left, right), dilation, groups).

    They are those of the convolution that leads from the output to input: it ends where its last window does, hence output_padding
    is taken off the padding at the end.
    """
    groups = _int(function, "groups", groups)
    _check_operands(function, 2, input, weight, bias, groups, transposed=True)
    step = _sizes(function, "stride", stride, 1)
    pads = _sizes(function, "padding", padding, 0)
    more = _sizes(function, "output_padding", output_padding, 0)
    dil = _sizes(function, "dilation", dilation, 1)
    if any(m >= max(s, d) for m, s, d in zip(more, step, dil, strict=True)):
        raise RuntimeError(
            f"{function}(): output_padding must be smaller than either stride or dilation, but got output_padding={more},"
            f" stride={step}, dilation={dil}"
        )
    P, Q = ((n - 1) * s - 2 * p + d * (t - 1) + m + 1 for n, s, p, d, t, m in zip(
        input.shape[2:], step, pads, dil, weight.shape[2:], more, strict=True
    ))  # fmt: skip
    if min(P, Q) < 1:
        raise RuntimeError(f"{function}(): with padding={pads} the output of input size {list(input.shape)} would be {P}x{Q}: too small")
    ends = (pads[0], pads[0] - more[0], pads[1], pads[1] - more[1])
    return [input.shape[0], weight.shape[1] * groups, P, Q], step, ends, dil, groups


@operation
def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    activation_arg: float | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    algorithm: str = "auto",
) -> Tensor:
    """act(batch_norm(conv2d(input, weight, bias)) + residual).

    In eval one kernel. In training the convolution leaves the statistics of its output, running_mean and running_var are
    updated in place if given, and a second kernel normalises, adds and activates.

    Shapes and dtypes as conv2d; running_mean, running_var, bn_weight, bn_bias [K], of input's dtype or float32; residual of the
    output's size. activation: None, "relu", "leaky_relu" (activation_arg: slope, 0.01), "relu6", "gelu", "gelu_tanh", "silu",
    "hardswish". Raises as conv2d and batch_norm, ValueError for an unknown activation or a residual of another size or dtype.
    """
    _check_algorithm("conv_bn_act", algorithm)
    check_activation("conv_bn_act", activation, activation_arg)
    slope = LEAKY_SLOPE if activation_arg is None else float(activation_arg)
    if reason := why_torch(input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias, algorithm=algorithm):
        record_torch("conv_bn_act", reason, input, weight)
        y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
        return activate(y if residual is None else y + residual, activation, slope)
    x, w, b, z = _autocast(input, weight, bias, residual)
    if input.dim() != 4:
        raise RuntimeError(f"conv_bn_act(): input must be of size [N, C, H, W], but got {list(input.shape)}")
    geometry = _conv_geometry("conv_bn_act", x, w, b, stride, padding, dilation, groups)
    bn_weight, bn_bias, momentum, eps = _check_norm(
        "conv_bn_act", w.shape[0], x.dtype, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps
    )
    size = _output_size(x, w, geometry) if training or z is not None else ()
    if z is not None and (z.shape != size or z.dtype != x.dtype):
        raise ValueError(
            f"conv_bn_act(): residual must be the output's size {list(size)} and dtype {x.dtype}, but got {list(z.shape)} {z.dtype}"
        )
    if not training:
        return ops.conv_bn_act(x, w, b, running_mean, running_var, bn_weight, bn_bias, z, eps, activation, slope, *geometry, algorithm)
    count = _values_per_channel("conv_bn_act", size)
    y, mean, var = ops.conv_stats(x, w, b, *geometry, algorithm)
    if running_mean is not None and count > 0:  # an empty batch leaves them as they are
        ops.update_running(running_mean, running_var, mean, var, momentum, count)
    return ops.normalize(y, mean, var, bn_weight, bn_bias, z, eps, activation, slope, True)


def _output_size(x: Tensor, w: Tensor, geometry) -> tuple[int, ...]:
    stride, pads, dilation, _ = geometry
    N, _, H, W = x.shape
    K, _, R, S = w.shape
    P = output_extent(H, R, stride[0], pads[0], pads[1], dilation[0])
    Q = output_extent(W, S, stride[1], pads[2], pads[3], dilation[1])
    return N, K, P, Q


def _check_norm(
    function: str,
    channels: int,
    dtype: torch.dtype,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, float, float]:
    """(weight, bias, momentum, eps) checked, the first two as vectors."""
    _check_flag(function, "training", training)
    momentum, eps = _float(function, "momentum", momentum), _float(function, "eps", eps)
    if eps < 0 or (training and eps == 0):
        rule = "positive in training" if training else "non-negative"
        raise ValueError(f"{function}(): eps must be {rule}, but got eps={eps}")
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError(f"{function}(): running_mean and running_var must be defined in evaluation mode")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{function}(): running_mean and running_var must either both be None or neither be None")
    vectors, size = (running_mean, running_var, weight, bias), (channels,)
    usual = dtype if dtype == torch.float64 or (running_mean is not None and running_mean.dtype == dtype) else torch.float32
    for t in vectors:
        if t is not None and (t.dtype != usual or t.shape != size):
            weight, bias = _check_vectors(function, channels, dtype, *vectors)
            break
    return weight, bias, momentum, eps


def _check_vectors(
    function: str,
    channels: int,
    dtype: torch.dtype,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias) as vectors: what a norm asks of tensors that are not all vectors of one usual dtype."""
    own = "bn_" if function == "conv_bn_act" else ""  # there weight and bias are the convolution's
    given = {"running_mean": running_mean, "running_var": running_var, f"{own}weight": weight, f"{own}bias": bias}
    first = next((t.dtype for t in given.values() if t is not None), dtype)
    for name, t in given.items():
        if t is None:
            continue
        if t.numel() != channels or (t.dim() != 1 and name.startswith("running")):
            raise RuntimeError(f"{function}(): {name} must have size [{channels}], one value a channel, but got {list(t.shape)}")
        if t.dtype not in (dtype, torch.float32) or (dtype == torch.float64 and t.dtype != dtype):
            narrower = "" if dtype in (torch.float32, torch.float64) else " or float32"
            raise RuntimeError(f"{function}(): {name} must have input's dtype {dtype}{narrower}, but got {t.dtype}")
        if t.dtype != first and function == "batch_norm":  # conv_bn_act takes any mixture
            raise RuntimeError(f"{function}(): {', '.join(given)} must have one dtype, but got {name} of {t.dtype} beside {first}")
    return None if weight is None else weight.reshape(-1), None if bias is None else bias.reshape(-1)


def _values_per_channel(function: str, size: Sequence[int]) -> int:
    count = size[0] * prod(size[2:])
    if count == 1:
        raise ValueError(f"{function}(): expected more than 1 value per channel when training, but got size {list(size)}")
    return count


@partial(operation, refusal=lambda given: AttributeError if given.get("training") else TypeError)  # asks for a size first
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, as torch.nn.functional.batch_norm: (input - mean) * weight / sqrt(var + eps) + bias.

    input [N, C] to [N, C, D, H, W]; running_mean, running_var, weight, bias [C], of input's dtype or float32. In training mean and
    biased variance are input's own, and the running ones, if given, are updated in place (with the unbiased variance).
    Raises RuntimeError and ValueError where PyTorch does.
    """
    if reason := why_torch(input, running_mean, running_var, weight, bias):
        record_torch("batch_norm", reason, input)
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.dim() < 2:
        no_index = training and (input.dim() == 0 or running_mean is None)
        raise (IndexError if no_index else RuntimeError)(f"batch_norm(): input must be of size [N, C, ...], but got {list(input.shape)}")
    count = _values_per_channel("batch_norm", input.shape) if training else 0
    if input.numel() == 0:  # as PyTorch has it: nothing is normalised, nothing updated, and of the channels the first one counts
        y = input.clone() if weight is None else input * weight[0]
        return y if bias is None else y + bias[0]
    weight, bias, momentum, eps = _check_norm(
        "batch_norm", input.shape[1], input.dtype, running_mean, running_var, weight, bias, training, momentum, eps
    )
    if not training:
        return ops.normalize(input, running_mean, running_var, weight, bias, None, eps, None, 0.0, False)
    mean, var = ops.batch_moments(input.detach())
    if running_mean is not None:
        ops.update_running(running_mean, running_var, mean, var, momentum, count)
    return ops.normalize(input, mean, var, weight, bias, None, eps, None, 0.0, True)


@operation
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows, as torch.nn.functional.max_pool2d: input [N, C, H, W] or [C, H, W]; padding counts as -inf, NaN wins.

    With return_indices also the int64 positions h * W + w of the maxima. Raises RuntimeError and TypeError where PyTorch does.
    """
    if reason := why_torch(input):
        record_torch("max_pool2d", reason, input)
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)  # pyright: ignore
    x, unbatched = _batched(input)
    window = _window("max_pool2d", x, kernel_size, stride, padding, dilation, ceil_mode)
    y, taps = ops.max_pool(x, bool(return_indices), *window)
    if not return_indices:
        return y.squeeze(0) if unbatched else y
    indices = ops.max_pool_indices(taps, x.shape, *window)
    return (y.squeeze(0), indices.squeeze(0)) if unbatched else (y, indices)


@operation
def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows, as torch.nn.functional.avg_pool2d: input [N, C, H, W] or [C, H, W].

    count_include_pad: zeros of the padding count in the divisor; divisor_override replaces it. Raises where PyTorch does.
    """
    if reason := why_torch(input):
        record_torch("avg_pool2d", reason, input)
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    _check_flag("avg_pool2d", "count_include_pad", count_include_pad)
    if divisor_override is not None:
        divisor_override = _int("avg_pool2d", "divisor_override", divisor_override)
        if divisor_override == 0:
            raise RuntimeError("avg_pool2d(): divisor_override must not be zero, but got divisor_override=0")
    x, unbatched = _batched(input)
    kernel, step, pad, _, _ = _window("avg_pool2d", x, kernel_size, stride, padding, 1, ceil_mode)
    y = ops.avg_pool(x, kernel, step, pad, ceil_mode, count_include_pad, divisor_override)
    return y.squeeze(0) if unbatched else y


@partial(operation, refusal=lambda given: AttributeError)
def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Mean over windows, as torch.nn.functional.adaptive_avg_pool2d: input [N, C, H, W] or [C, H, W] to [N, C, P, Q].

    output_size: P = Q, or (P, Q), of which each may be None (as input's) and larger than input's. Window p covers rows
    floor(p * H / P) to ceil((p + 1) * H / P). Raises RuntimeError, TypeError and ValueError where PyTorch does.
    """
    if reason := why_torch(input):
        record_torch("adaptive_avg_pool2d", reason, input)
        return F.adaptive_avg_pool2d(input, output_size)  # pyright: ignore[reportArgumentType]
    size = _adaptive_size("adaptive_avg_pool2d", input, output_size)
    if size == (1, 1):
        return _plane_means("adaptive_avg_pool2d", input)
    x, unbatched = _batched(input)
    if x.dim() != 4 or 0 in x.shape[2:]:
        raise RuntimeError(
            f"adaptive_avg_pool2d(): expected input of size [C, H, W] or [N, C, H, W] with at least one pixel, but got {list(input.shape)}"
        )
    y = ops.adaptive_avg_pool(x, size)
    return y.squeeze(0) if unbatched else y


def _plane_means(function: str, input: Tensor) -> Tensor:
    """[..., H, W] to [..., 1, 1]: PyTorch takes any number of axes here, and the mean of no pixels is NaN."""
    if input.dim() < 2:
        raise IndexError(f"{function}(): input must be of size [..., H, W], but got {list(input.shape)}")
    if input.dim() == 4:
        return ops.global_avg_pool(input)
    planes = input.shape[:-2]
    return ops.global_avg_pool(input.reshape(1, prod(planes), *input.shape[-2:])).view(*planes, 1, 1)


def _adaptive_size(function: str, input: Tensor, output_size: Any) -> tuple[int, ...]:
    if not isinstance(output_size, int | torch.SymInt):
        try:
            n = len(output_size)
        except TypeError:
            raise TypeError(f"{function}(): output_size must be an int or a pair of ints, but got output_size={output_size!r}") from None
        if input.dim() <= n:
            raise ValueError(
                f"{function}(): input must have more dimensions than output_size={output_size} has values, but got size {list(input.shape)}"
            )
        output_size = [own if v is None else v for v, own in zip(output_size, input.shape[-n:], strict=False)]
        if len(_as_sizes(function, "output_size", output_size, n)) != 2:
            raise RuntimeError(f"{function}(): output_size must be an int or have 2 values, but got output_size={output_size}")
    return _sizes(function, "output_size", output_size, 0)


@operation
def global_avg_pool2d(input: Tensor, keepdim: bool = True) -> Tensor:
    """Mean of each plane: [N, C, H, W] to [N, C, 1, 1], or [N, C] without keepdim (and likewise unbatched [C, H, W])."""
    if reason := why_torch(input):
        record_torch("global_avg_pool2d", reason, input)
        return input.mean((-2, -1), keepdim=keepdim)
    x, unbatched = _batched(input)
    _check_image("global_avg_pool2d", x)
    y = ops.global_avg_pool(x)
    y = y if keepdim else y.flatten(1)
    return y.squeeze(0) if unbatched else y
