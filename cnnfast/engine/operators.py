"""The operators that a plan may call, by name: those of the engine, in plain PyTorch, and a fixed list of PyTorch's.

None of them opens a file or a connection, draws random numbers, runs Python of the model's, or writes into an argument.
A file of a frozen network names operators, and what is not named here is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Activations of the fused operators: of an argument and the numbers that belong to each.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "hardtanh": F.hardtanh,  # lowest, highest: relu6 is 0, 6
    "leaky_relu": F.leaky_relu,  # slope
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,  # alpha
}


def activate(u: Tensor, activation: str | None, numbers: Sequence[float] = ()) -> Tensor:
    return u if activation is None else ACTIVATIONS[activation](u, *numbers)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    numbers: Sequence[float],
) -> Tensor:
    """activation(conv(x, weight) + bias + residual). x [N, C, *sizes], weight [K, C / groups, *taps], bias [K], and
    residual has the result's shape. One, two or three dimensions; stride, padding and dilation have a number for each.
    """
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    y = convolve(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    return activate(y if residual is None else y + residual, activation, numbers)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, numbers: Sequence[float]) -> Tensor:
    """activation(x @ weight.T + bias). x [..., C], weight [K, C], bias [K]."""
    return activate(F.linear(x, weight, bias), activation, numbers)


def affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str | None,
    numbers: Sequence[float],
) -> Tensor:
    """activation(x * scale + shift + residual). scale and shift [C, 1, 1], one number a channel of x [N, C, H, W]: a
    batch norm that follows no convolution.
    """
    y = torch.addcmul(shift, x, scale)
    return activate(y if residual is None else y + residual, activation, numbers)


def sum_of(x: Tensor, y: Tensor, activation: str | None, numbers: Sequence[float]) -> Tensor:
    """activation(x + y), broadcast as PyTorch does."""
    return activate(x + y, activation, numbers)


OURS: dict[str, Callable[..., Any]] = {
    "convolution": convolution,
    "linear": linear,
    "affine": affine,
    "sum": sum_of,
}

# Those of PyTorch's that make tensors of nothing.
FROM_NOTHING = (
    "full.default",
    "arange.start_step",
    "linspace.default",
    "eye.default",
    "eye.m",
    "scalar_tensor.default",
)
# PyTorch's, without the "aten." before each: none whose reading PyTorch does not check
# (as_strided, _unsafe_index), that writes into an argument, or that draws random numbers.
ATEN = (
    # Layers
    *("conv1d.default", "conv2d.default", "conv3d.default"),
    *("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input"),
    *("linear.default", "matmul.default", "mm.default", "bmm.default", "addmm.default", "baddbmm.default"),
    *("mv.default", "dot.default", "einsum.default", "bilinear.default", "embedding.default"),
    *("batch_norm.default", "layer_norm.default", "group_norm.default", "instance_norm.default", "rms_norm.default"),
    "scaled_dot_product_attention.default",
    *("max_pool1d.default", "max_pool2d.default", "max_pool3d.default"),
    *("max_pool2d_with_indices.default", "max_unpool2d.default"),
    *("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default"),
    *("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default"),
    *("adaptive_max_pool1d.default", "adaptive_max_pool2d.default", "adaptive_max_pool3d.default"),
    *("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec"),
    *("_upsample_nearest_exact1d.vec", "_upsample_nearest_exact2d.vec", "_upsample_nearest_exact3d.vec"),
    *("upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec", "upsample_bicubic2d.vec"),
    *("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec"),
    "affine_grid_generator.default",
    *("pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default"),
    *("im2col.default", "col2im.default", "pad.default"),
    # Activations
    *("relu.default", "hardtanh.default", "leaky_relu.default", "prelu.default", "elu.default", "celu.default"),
    *("selu.default", "silu.default", "gelu.default", "mish.default", "hardswish.default", "hardsigmoid.default"),
    *("sigmoid.default", "log_sigmoid.default", "tanh.default", "softplus.default"),
    *("hardshrink.default", "softshrink.default", "threshold.default", "glu.default"),
    *("softmax.int", "log_softmax.int", "logit.default"),
    # Arithmetic
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "div.Tensor_mode", "div.Scalar_mode"),
    *("rsub.Tensor", "rsub.Scalar", "addcmul.default", "addcdiv.default", "lerp.Scalar", "lerp.Tensor"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "sqrt.default", "rsqrt.default", "reciprocal.default"),
    *("exp.default", "exp2.default", "expm1.default", "log.default", "log1p.default", "log2.default", "log10.default"),
    *("abs.default", "neg.default", "sign.default", "floor.default", "ceil.default", "round.default", "trunc.default"),
    *("frac.default", "fmod.Scalar", "fmod.Tensor", "remainder.Scalar", "remainder.Tensor", "floor_divide.default"),
    *("floor_divide.Scalar", "sin.default", "cos.default", "tan.default", "asin.default", "acos.default"),
    *("atan.default", "atan2.default", "sinh.default", "cosh.default", "erf.default", "erfc.default"),
    *("maximum.default", "minimum.default", "clamp.default", "clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor"),
    *("max.other", "min.other", "nan_to_num.default", "logsumexp.default", "logaddexp.default"),
    # Sums, extremes and their like
    *("sum.default", "sum.dim_IntList", "mean.default", "mean.dim", "prod.default", "prod.dim_int"),
    *("var.correction", "var.dim", "var.default", "std.correction", "std.dim", "std.default"),
    *("var_mean.correction", "std_mean.correction", "linalg_vector_norm.default", "norm.ScalarOpt_dim", "norm.Scalar"),
    *("amax.default", "amin.default", "max.default", "min.default", "max.dim", "min.dim"),
    *("argmax.default", "argmin.default", "topk.default", "sort.default", "argsort.default", "cumsum.default"),
    *("cumprod.default", "all.default", "all.dim", "any.default", "any.dim", "median.dim", "median.default"),
    # Comparisons and choices
    *(f"{name}.{kind}" for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")),
    *("logical_and.default", "logical_or.default", "logical_not.default", "logical_xor.default", "isnan.default"),
    *("isinf.default", "isfinite.default"),
    *("bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_not.default", "bitwise_xor.Tensor"),
    *("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar"),
    *("masked_fill.Scalar", "masked_fill.Tensor"),
    # Shapes and places
    *("reshape.default", "flatten.using_ints", "squeeze.dims", "unsqueeze.default", "permute.default"),
    *("transpose.int", "expand.default", "repeat.default", "tile.default", "to.dtype"),
    *("repeat_interleave.self_int", "cat.default", "stack.default", "chunk.default", "split.Tensor"),
    *("split.sizes", "split_with_sizes.default", "tensor_split.sections", "tensor_split.indices", "unbind.int"),
    *("slice.Tensor", "select.int", "narrow.default", "slice_scatter.default", "select_scatter.default"),
    *("index.Tensor", "index_select.default", "gather.default", "roll.default", "flip.default", "rot90.default"),
    *("unfold.default", "tril.default", "triu.default", "diagonal.default", "one_hot.default"),
    # New tensors
    *FROM_NOTHING,
    *("sym_size.int", "clone.default"),  # a plan copies what it returns
)


# Those whose result can be larger than all that they are given, by numbers in their arguments: in a file from somewhere
# else such numbers may be anything. (Broadcasting, matrix products and cat can make large results of small tensors,
# too, a call after the other; so what counts is each value's size, which can be known before anything is computed.)
ENLARGING = (
    *FROM_NOTHING,
    *("conv1d.default", "conv2d.default", "conv3d.default"),  # padding
    *("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input"),
    *("max_unpool2d.default", "affine_grid_generator.default", "im2col.default", "col2im.default", "pad.default"),
    *(f"adaptive_{kind}_pool{n}d.default" for kind in ("avg", "max") for n in (1, 2, 3)),
    *(name for name in ATEN if "upsample" in name),
    *("expand.default", "repeat.default", "tile.default", "repeat_interleave.self_int", "unfold.default"),
    *("one_hot.default", "index.Tensor", "einsum.default"),
)

LARGEST = 2**63


def multiplied(a: int, b: int) -> int:
    """The product of two sizes. Raises OverflowError beyond 2**63: a few dozen products would fill all memory."""
    product = a * b
    if abs(product) > LARGEST:
        raise OverflowError(f"the product of the sizes {a} and {b} is beyond 2**63")
    return product


# Arithmetic on sizes, and the members of a result that is a tuple.
PYTHON: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": multiplied,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "neg": operator.neg,
    "max": max,
    "min": min,
}


def _aten(name: str) -> Callable[..., Any]:
    packet, _, overload = name.rpartition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


OPERATORS: dict[str, Callable[..., Any]] = {
    **{f"cnnfast.{name}": function for name, function in OURS.items()},
    **{f"aten.{name}": _aten(name) for name in ATEN},
    **{f"python.{name}": function for name, function in PYTHON.items()},
}
MAKERS = {_aten(name) for name in FROM_NOTHING}  # they take a device
NAMES: dict[Callable[..., Any], str] = {function: name for name, function in OPERATORS.items()}


class CannotCapture(ValueError):
    """A network that no graph can be made of. Its text says in one sentence what stands in the way."""


def why_not(target: Any) -> str:
    """A sentence that says why no graph may call something that is not in OPERATORS."""
    name = str(target)
    tags = getattr(target, "tags", ())
    namespace, _, operator_name = name.partition(".")
    if torch.Tag.nondeterministic_seeded in tags:
        return f"it calls {name}, which draws random numbers"
    if name in ("aten.item.default", "aten._local_scalar_dense.default", "aten.nonzero.default"):
        return f"it calls {name}, whose result depends on the values in a tensor, not only on its shape"
    if operator_name and namespace != "aten":
        return f"it calls {name}, an operator of {namespace}, of which nothing is known"
    return f"it calls {name}, which is not among the operators that a frozen network may call"
