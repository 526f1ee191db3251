"""Every argument of every function of cnnfast.functional, branch by branch of PyTorch's documentation, in every dtype.

Inputs are integers for which all results are representable: the result and the gradients are compared bit by bit with
PyTorch in float64, and dtype and memory of the result with PyTorch in the same dtype. How many branches passed for each
argument is told at the end of a run (conftest.py), from the names of the tests: function-argument-branch-dtype.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor

import cnnfast
import cnnfast.functional as ours
from tests.support.agreement import integers

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DEFAULT = object()  # the argument is left out


def whole(*shape: int, largest: int = 2, seed: int = 0) -> Tensor:
    return integers(*shape, largest=largest, seed=seed, dtype=torch.float64)


def shares(*shape: int, seed: int = 0) -> Tensor:
    """Multiples of 36: their means over 1, 2, 3, 4, 6, 9 or 12 pixels are integers."""
    return 36 * whole(*shape, seed=seed)


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def signs(*shape: int) -> Tensor:
    """Of each channel (axis 1) half the values are one less than its mean, an integer, half one more: the variance is
    1.
    """
    C, count = shape[1], torch.Size(shape).numel() // shape[1]
    generator = torch.Generator().manual_seed(0)
    each = torch.stack([torch.randperm(count, generator=generator) % 2 * 2.0 - 1 + c for c in range(C)]).double()
    return each.view(C, shape[0], *shape[2:]).transpose(0, 1).contiguous()


def composition(
    input, weight, running_mean=None, running_var=None, bn_weight=None, bn_bias=None, *, bias=None, residual=None,
    activation="relu", activation_arg=None, training=False, momentum=0.1, eps=1e-5,
    stride=1, padding=0, dilation=1, groups=1, algorithm=None,
):  # fmt: skip
    y = theirs.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = theirs.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return activated(y, residual, activation, activation_arg)


def without_norm(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *,
    residual=None, activation="relu", activation_arg=None,
):  # fmt: skip
    y = theirs.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if y.dim() == 4:
        return activated(y, residual, activation, activation_arg)
    # one slope a filter: PyTorch's prelu takes the second axis for channels
    return activated(y[None], None if residual is None else residual[None], activation, activation_arg)[0]


def without_convolution(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *,
    residual=None, activation="relu", activation_arg=None,
):  # fmt: skip
    y = theirs.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activated(y, residual, activation, activation_arg)


def activated(y, residual, activation, activation_arg):
    y = y if residual is None else y + residual
    match activation:
        case "prelu":
            return theirs.prelu(y, activation_arg)
        case "leaky_relu":
            return theirs.leaky_relu(y, 0.01 if activation_arg is None else activation_arg)
        case "gelu" | "gelu_tanh":
            return theirs.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
        case "hardsigmoid":  # PyTorch's own differentiates by float32's sixth
            return theirs.relu6(y + 3) / 6
        case None:
            return y
        case _:
            return getattr(theirs, activation)(y)


THEIRS: dict[str, Callable[..., Any]] = {
    name: getattr(theirs, name)
    for name in (
        "conv1d",
        "conv2d",
        "conv_transpose2d",
        "batch_norm",
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
    )
}
THEIRS["conv_bn_act"] = composition
THEIRS["conv_act"] = without_norm
THEIRS["bn_act"] = without_convolution
THEIRS["global_avg_pool2d"] = lambda input, keepdim=True: theirs.adaptive_avg_pool2d(input, 1).flatten(-3 + 2 * keepdim)

# ----------------------------------------------------------------------------------------------------------------------
# The branches: function -> argument -> branch -> what differs from the function's usual arguments. Beside arguments
# there may be "tolerance": the results are not representable; "float32": parameters are, whatever input is; "forward":
# only results are compared.

SIZES = {"int": 2, "pair": (2, 1)}
PAIRS = {
    "list": [1, 2],
    "torch.Size": torch.Size([2, 1]),
    "indices": (np.int64(1), np.int32(2)),
    "tensors": (torch.tensor(2), 1),
}
ONES = {"tuple of one": (2,), "list of one": [2]}
INTS = {"index": np.int64(2), "tensor": torch.tensor(2)}


def given(argument: str, *values: dict[str, Any], **more: Any) -> dict[str, dict[str, Any]]:
    """A branch for each of `values`; of the second and later, other spellings, only the results are compared."""
    return {
        name: {argument: value, **more, "forward": i > 0}
        for i, spellings in enumerate(values)
        for name, value in spellings.items()
    }


def sizes(argument: str, **more: Any) -> dict[str, dict[str, Any]]:
    """An argument of one value an axis, in all the ways that PyTorch takes it."""
    return given(argument, SIZES, PAIRS | ONES | INTS, **more)


def size(argument: str, **more: Any) -> dict[str, dict[str, Any]]:
    """The same of the only axis."""
    return given(argument, {"int": 2}, ONES | INTS, **more)


def groups(weight: Tensor) -> dict[str, dict[str, Any]]:
    return given("groups", {"int": 2}, INTS | {"tensor of one": torch.tensor([2])}, weight=weight)


USUAL: dict[str, dict[str, Any]] = {
    "conv2d": {"input": whole(2, 4, 6, 5), "weight": whole(6, 4, 3, 2, seed=1)},
    "conv1d": {"input": whole(2, 4, 7), "weight": whole(6, 4, 3, seed=1)},
    "conv_transpose2d": {"input": whole(2, 4, 3, 4), "weight": whole(4, 6, 3, 2, seed=1)},
    "conv_bn_act": {
        "input": whole(2, 4, 4, 3),
        "weight": whole(2, 4, 2, 2, largest=1, seed=1),
        "running_mean": whole(2),
        "running_var": torch.tensor([13.0, 1.0]).double(),
        "eps": 3.0,
    },
    "conv_act": {"input": whole(2, 4, 4, 3), "weight": whole(2, 4, 2, 2, largest=1, seed=1)},
    "bn_act": {"input": signs(2, 3, 2, 4), "running_mean": None, "running_var": None, "training": True, "eps": 3.0},
    "batch_norm": {"input": signs(2, 3, 2, 4), "running_mean": None, "running_var": None, "training": True, "eps": 3.0},
    "max_pool2d": {"input": whole(2, 3, 6, 5), "kernel_size": 3},
    "avg_pool2d": {"input": shares(2, 3, 6, 5), "kernel_size": 2},
    "adaptive_avg_pool2d": {"input": shares(2, 3, 4, 3), "output_size": 2},
    "global_avg_pool2d": {"input": shares(2, 3, 4, 3)},
}
CONV = {
    "stride": sizes("stride"),
    "padding": {
        **sizes("padding"),
        "same, odd taps": {"padding": "same", "weight": whole(6, 4, 3, 3)},
        "same, even taps: one more zero at the end": {"padding": "same", "weight": whole(6, 4, 2, 4)},
        "same, dilated": {"padding": "same", "dilation": (2, 3)},
        "valid": {"padding": "valid", "stride": 2},
        "larger than the image": {"padding": (3, 2), "input": whole(1, 4, 2, 1)},
    },
    "dilation": {**sizes("dilation"), "with stride and padding": {"dilation": 2, "stride": 2, "padding": (1, 2)}},
    "groups": {
        **groups(whole(6, 2, 3, 2)),
        "depthwise": {"groups": 2, "input": whole(2, 2, 6, 5), "weight": whole(2, 1, 3, 2)},
        "depthwise, two filters a channel": {"groups": 2, "input": whole(2, 2, 6, 5), "weight": whole(4, 1, 3, 2)},
        "with everything": {
            "groups": 2,
            "weight": whole(6, 2, 3, 2),
            "stride": (2, 1),
            "padding": (0, 1),
            "dilation": (2, 1),
        },
    },
    "algorithm": given("algorithm", {name: name for name in ("auto", "direct", "im2col")}),
}
POOL = {
    "kernel_size": sizes("kernel_size"),
    "stride": {
        **sizes("stride"),
        "None": {"stride": None},
        "empty list": {"stride": []},
        "empty tuple": {"stride": ()},
        "windows apart": {"stride": 4},
    },
}
BIAS = whole(6, seed=2)
# activations of which only the results are compared here
ROUNDED = ("leaky_relu", "gelu", "gelu_tanh", "silu", "hardswish", "mish", "hardsigmoid")
SLOPES = torch.tensor([0.5, -2.0, 0.25]).double()
FINISHED = {"bias": whole(2), "residual": whole(2, 2, 3, 2, seed=3)}
STATISTICS = {"running_mean": whole(3), "running_var": torch.tensor([1.0, 13.0, 1.0]).double()}
EVAL = {**STATISTICS, "training": False}
AFFINE = {"weight": torch.tensor([2.0, -4.0, 8.0]).double(), "bias": whole(3, seed=2)}
ACTIVATED = {
    "residual": whole(2, 2, 3, 2),
    "bn_weight": torch.tensor([4.0, -2.0]).double(),
    "bn_bias": whole(2, seed=3),
}
TRAINED = {"training": True, "running_mean": None, "running_var": None}
# of each filter half the products are 1 less than a mean and half 1 more
BALANCED = {"input": signs(2, 2, 2, 4), "weight": torch.eye(2).double().view(2, 2, 1, 1)}

# What several processes compute with one is tested in nn/test_synchronised.py.
ALONE = given("process_group", {"None": None})

BRANCHES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "conv2d": {
        "input": {
            "batch": {},
            "no batch": {"input": whole(4, 6, 5)},
            "channels_last": {"input": last(whole(2, 4, 6, 5))},
            "one pixel": {"input": whole(3, 4, 1, 1), "weight": whole(6, 4, 1, 1)},
            "one channel": {"input": last(whole(2, 1, 6, 5)), "weight": whole(6, 1, 3, 2)},
            "empty batch": {"input": whole(0, 4, 6, 5)},
            "no channels": {"input": whole(2, 0, 6, 5), "weight": whole(6, 0, 3, 2)},
        },
        "weight": {
            "channels_last": {"weight": last(whole(6, 4, 3, 2))},
            "one tap": {"weight": whole(6, 4, 1, 1)},
            "as large as the image": {"weight": whole(6, 4, 6, 5)},
            "one filter": {"weight": whole(1, 4, 3, 2)},
        },
        "bias": {"None": {"bias": None}, "vector": {"bias": BIAS}, "no batch": {"bias": BIAS, "input": whole(4, 6, 5)}},
        **CONV,
    },
    "conv1d": {
        "input": {
            "batch": {},
            "no batch": {"input": whole(4, 7)},
            "channels adjacent": {"input": whole(2, 7, 4).transpose(1, 2)},
            "one pixel": {"input": whole(3, 4, 1), "weight": whole(6, 4, 1)},
            "empty batch": {"input": whole(0, 4, 7)},
            "no channels": {"input": whole(2, 0, 7), "weight": whole(6, 0, 3)},
        },
        "weight": {
            "channels adjacent": {"weight": whole(6, 3, 4).transpose(1, 2)},
            "one tap": {"weight": whole(6, 4, 1)},
            "as long as the row": {"weight": whole(6, 4, 7)},
        },
        "bias": {"None": {"bias": None}, "vector": {"bias": BIAS}, "no batch": {"bias": BIAS, "input": whole(4, 7)}},
        "stride": size("stride"),
        "padding": {
            **size("padding"),
            "same, odd taps": {"padding": "same"},
            "same, even taps: one more zero at the end": {"padding": "same", "weight": whole(6, 4, 4)},
            "same, dilated": {"padding": "same", "dilation": 2},
            "valid": {"padding": "valid", "stride": 2},
        },
        "dilation": {**size("dilation"), "with stride and padding": {"dilation": 2, "stride": 2, "padding": 1}},
        "groups": {
            **groups(whole(6, 2, 3)),
            "depthwise": {"groups": 2, "input": whole(2, 2, 7), "weight": whole(2, 1, 3)},
        },
        "algorithm": CONV["algorithm"],
    },
    "conv_transpose2d": {
        "input": {
            "batch": {},
            "no batch": {"input": whole(4, 3, 4)},
            "channels_last": {"input": last(whole(2, 4, 3, 4))},
            "one pixel": {"input": whole(3, 4, 1, 1)},
            "empty batch": {"input": whole(0, 4, 3, 4)},
        },
        "weight": {"channels_last": {"weight": last(whole(4, 6, 3, 2))}, "one tap": {"weight": whole(4, 6, 1, 1)}},
        "bias": {
            "None": {"bias": None},
            "vector": {"bias": BIAS},
            "where no tap reaches": {"bias": BIAS, "stride": (4, 1)},
        },
        "stride": sizes("stride"),
        "padding": {**sizes("padding"), "zero": {"padding": 0}},
        "output_padding": {
            **sizes("output_padding", dilation=3),
            "with stride": {"output_padding": (2, 0), "stride": (3, 1)},
            "less than dilation, more than stride": {"output_padding": 2, "stride": (1, 2), "dilation": 3},
        },
        "groups": {
            **groups(whole(4, 3, 3, 2)),
            "depthwise": {
                "groups": 2,
                "input": whole(2, 2, 3, 4),
                "weight": whole(2, 1, 3, 2),
                "bias": whole(2),
                "stride": (2, 1),
            },
            "more filters than channels": {"groups": 2, "input": whole(2, 2, 3, 4), "weight": whole(2, 2, 3, 2)},
        },
        "dilation": {**sizes("dilation"), "with stride": {"dilation": (2, 3), "stride": (3, 2), "padding": 1}},
        "algorithm": CONV["algorithm"],
    },
    "conv_bn_act": {
        "input": {
            "batch": {},
            "channels_last": {"input": last(whole(2, 4, 4, 3))},
            "empty batch": {"input": whole(0, 4, 4, 3)},
        },
        "weight": {
            "channels_last": {"weight": last(whole(2, 4, 2, 2, largest=1))},
            "one tap": {"weight": whole(2, 4, 1, 1)},
        },
        "running_mean": {
            "given": {"running_mean": whole(2, seed=4)},
            "None in training": {**TRAINED, **BALANCED},
            "updated in training": {**BALANCED, "training": True, "momentum": 0.5},
        },
        "running_var": {
            "given": {"running_var": torch.tensor([1.0, 61.0]).double()},
            "None in training": {**TRAINED, **BALANCED},
        },
        "bn_weight": {
            "None": {"bn_weight": None},
            "vector": {"bn_weight": ACTIVATED["bn_weight"]},
            "in training": {**TRAINED, **BALANCED, "bn_weight": ACTIVATED["bn_weight"]},
        },
        "bn_bias": {
            "None": {"bn_bias": None},
            "vector": {"bn_bias": whole(2)},
            "in training": {**TRAINED, **BALANCED, "bn_bias": whole(2)},
        },
        "bias": {"None": {"bias": None}, "vector": {"bias": whole(2)}},
        "residual": {
            "None": {"residual": None},
            "with all": ACTIVATED,
            "channels_last": {"residual": last(ACTIVATED["residual"])},
            "in training": {**TRAINED, **BALANCED, "residual": whole(2, 2, 2, 4)},
        },
        "activation": {
            "None": {"activation": None},
            **given("activation", {name: name for name in ("relu", "relu6")}),
            # between its kinks hardswish divides by 6, and most others are transcendental: they are checked elsewhere
            "hardswish": {"activation": "hardswish", "bn_bias": torch.tensor([96.0, -96.0]).double()},
            "leaky_relu": {"activation": "leaky_relu", "tolerance": True},
            "gelu": {"activation": "gelu", "tolerance": True},
            "gelu_tanh": {"activation": "gelu_tanh", "tolerance": True},
            "silu": {"activation": "silu", "tolerance": True},
            "mish": {"activation": "mish", "tolerance": True},
            "hardsigmoid": {"activation": "hardsigmoid", "tolerance": True},
        },
        "activation_arg": {
            "half": {"activation": "leaky_relu", "activation_arg": 0.5},
            "zero": {"activation": "leaky_relu", "activation_arg": 0.0},
            "negative": {"activation": "leaky_relu", "activation_arg": -0.5},
            "prelu's, in evaluation": {"activation": "prelu", "activation_arg": SLOPES[:2], "forward": True},
            "prelu's, with gradients": {"activation": "prelu", "activation_arg": SLOPES[:2], "tolerance": True},
            "prelu's, in training": {
                **TRAINED,
                **BALANCED,
                "activation": "prelu",
                "activation_arg": SLOPES[:1],
                "forward": True,
            },
        },
        "training": {"False": {"training": False}, "True": {**BALANCED, "training": True, "momentum": 0.5}},
        "momentum": {
            "default": {**BALANCED, "training": True},
            "zero": {**BALANCED, "training": True, "momentum": 0.0},
            "one": {**BALANCED, "training": True, "momentum": 1},
        },
        "eps": {"default": {"eps": DEFAULT, "tolerance": True}, "int": {"eps": 3}},
        "stride": given("stride", {"int": 2, "pair": (2, 1)}),
        "padding": given("padding", {"int": 1, "pair": (1, 0), "same": "same", "valid": "valid"}),
        "dilation": given("dilation", {"int": 2, "pair": (2, 1)}),
        "groups": {"two": {"groups": 2, "weight": whole(2, 2, 2, 2, largest=1)}},
        "algorithm": CONV["algorithm"],
        "process_group": ALONE,
    },
    "conv_act": {
        "input": {
            "batch": {},
            "no batch": {"input": whole(4, 4, 3), "residual": whole(2, 3, 2)},
            "channels_last": {"input": last(whole(2, 4, 4, 3)), "residual": last(whole(2, 2, 3, 2))},
            "empty batch": {"input": whole(0, 4, 4, 3)},
            "no channels": {"input": whole(2, 0, 4, 3), "weight": whole(2, 0, 2, 2), "residual": whole(2, 0, 3, 2)},
        },
        "weight": {
            "channels_last": {"weight": last(whole(2, 4, 2, 2, largest=1))},
            "one tap": {"weight": whole(2, 4, 1, 1)},
        },
        "bias": {"None": {"bias": None}, "vector": {"bias": whole(2)}, "with all": FINISHED},
        "residual": {
            "None": {"residual": None},
            "alone": {"residual": whole(2, 2, 3, 2)},
            "without activation": {"residual": whole(2, 2, 3, 2), "activation": None},
            "bias and no activation": {**FINISHED, "activation": None},
            "channels_last": {"residual": last(whole(2, 2, 3, 2)), "bias": whole(2)},
            "before an activation that is computed again": {**FINISHED, "activation": "hardswish", "tolerance": True},
        },
        "activation": {
            "None": {"activation": None},
            **given("activation", {name: name for name in ("relu", "relu6")}),
            **{name: {**FINISHED, "activation": name, "tolerance": True, "forward": True} for name in ROUNDED},
        },
        "activation_arg": {
            "half": {"activation": "leaky_relu", "activation_arg": 0.5, **FINISHED},
            "negative": {"activation": "leaky_relu", "activation_arg": -0.5, **FINISHED},
            "prelu's": {"activation": "prelu", "activation_arg": SLOPES[:2], **FINISHED, "forward": True},
            "prelu's, one": {"activation": "prelu", "activation_arg": SLOPES[:1], "forward": True},
            "prelu's, with gradients": {"activation": "prelu", "activation_arg": SLOPES[:2], **FINISHED},
            "prelu's, no batch": {"activation": "prelu", "activation_arg": SLOPES[:2], "input": whole(4, 4, 3)},
        },
        "stride": given("stride", {"int": 2, "pair": (2, 1)}),
        "padding": given("padding", {"int": 1, "pair": (1, 0), "same": "same", "valid": "valid"}),
        "dilation": given("dilation", {"int": 2, "pair": (2, 1)}),
        "groups": {
            "two": {"groups": 2, "weight": whole(2, 2, 2, 2, largest=1)},
            "depthwise": {
                **FINISHED,
                "groups": 2,
                "input": whole(2, 2, 4, 3),
                "weight": whole(2, 1, 2, 2),
            },
            "depthwise, same with an even kernel": {
                "groups": 2,
                "input": whole(2, 2, 4, 3),
                "weight": whole(2, 1, 2, 2),
                "padding": "same",
            },
        },
        "algorithm": CONV["algorithm"],
    },
    "bn_act": {
        "input": {
            "2-D": {"input": signs(4, 3)},
            "3-D": {"input": signs(2, 3, 4)},
            "4-D": {},
            "5-D": {"input": signs(2, 3, 2, 2, 2)},
            "channels_last": {"input": last(signs(2, 3, 2, 4))},
            "5-D in evaluation": {"input": whole(2, 3, 2, 1, 2), **EVAL, "residual": whole(2, 3, 2, 1, 2)},
            "empty batch": {"input": whole(0, 3, 2, 2)},
            "no pixels": {"input": whole(2, 3, 0, 2), **AFFINE, "residual": whole(2, 3, 0, 2)},
        },
        "running_mean": {"in evaluation": EVAL, "updated": {**STATISTICS, "momentum": 0.5}, "None": {}},
        "running_var": {"in evaluation": EVAL, "updated": STATISTICS},
        "weight": {"None": {"weight": None}, "in evaluation": {**EVAL, "weight": AFFINE["weight"]}},
        "bias": {"None": {"bias": None}, "with weight": AFFINE, "in evaluation": {**EVAL, **AFFINE}},
        "training": {"True": {"training": True, **STATISTICS}, "False": EVAL},
        "momentum": given("momentum", {"zero": 0.0, "half": 0.5}, **STATISTICS),
        "eps": {"default": {"eps": DEFAULT, "tolerance": True}, "int": {"eps": 3}},
        "residual": {
            "None": {"residual": None},
            "in training": {"residual": whole(2, 3, 2, 4)},
            "in evaluation": {**EVAL, "residual": last(whole(2, 3, 2, 4))},
        },
        "activation": {
            "None": {"activation": None},
            **given("activation", {name: name for name in ("relu", "relu6")}, **EVAL),
            **{
                name: {**EVAL, "activation": name, "tolerance": True, "residual": whole(2, 3, 2, 4), "forward": True}
                for name in ROUNDED
            },
        },
        "activation_arg": {
            "half": {"activation": "leaky_relu", "activation_arg": 0.5},
            "prelu's": {"activation": "prelu", "activation_arg": SLOPES, **EVAL, "forward": True},
            "prelu's, one, of rows": {
                "activation": "prelu",
                "activation_arg": SLOPES[:1],
                "input": signs(4, 3),
                "forward": True,
            },
            "prelu's, with gradients": {"activation": "prelu", "activation_arg": SLOPES, **EVAL},
        },
        "process_group": ALONE,
    },
    "batch_norm": {
        "input": {
            "2-D": {"input": signs(4, 3)},
            "3-D": {"input": signs(2, 3, 4)},
            "4-D": {},
            "5-D": {"input": signs(2, 3, 2, 2, 2)},
            "6-D": {"input": signs(2, 3, 2, 1, 2, 2)},
            "channels_last": {"input": last(signs(2, 3, 2, 4))},
            "channels_last_3d": {"input": signs(2, 3, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d)},
            "2-D in evaluation": {"input": whole(4, 3), **EVAL},
            "5-D in evaluation": {"input": whole(2, 3, 2, 1, 2), **EVAL},
            "two values a channel": {"input": signs(2, 3)},
            "empty batch": {"input": whole(0, 3, 2, 2)},
            "empty batch in evaluation": {"input": whole(0, 3, 2, 2), **EVAL, **AFFINE},
            "no pixels": {"input": whole(2, 3, 0, 2), **AFFINE},
            "no channels": {"input": whole(2, 0, 3, 2)},
            "mean much larger than deviation": {"input": signs(2, 3, 2, 4) + 128},
        },
        "running_mean": {"in evaluation": EVAL, "updated": {**STATISTICS, "momentum": 0.5}, "None": {}},
        "running_var": {
            "in evaluation": {**EVAL, "running_var": torch.tensor([1.0, 61.0, 13.0]).double()},
            "updated": STATISTICS,
        },
        "weight": {
            "None": {"weight": None},
            "without bias": {"weight": AFFINE["weight"]},
            "in evaluation": {**EVAL, "weight": AFFINE["weight"]},
            "one row": {"weight": AFFINE["weight"][None], "bias": AFFINE["bias"][None], **EVAL, "forward": True},
            "float32": {**AFFINE, **STATISTICS, "float32": True},
            "float32 in evaluation": {**AFFINE, **EVAL, "float32": True},
            "every second of a vector": {**AFFINE, "weight": AFFINE["weight"].repeat_interleave(2)[::2]},
        },
        "bias": {
            "None": {"bias": None},
            "without weight": {"bias": AFFINE["bias"]},
            "with weight": AFFINE,
            "in evaluation": {**EVAL, **AFFINE},
        },
        "training": {
            "True": {"training": True, **STATISTICS},
            "False": EVAL,
            "left out": {**EVAL, "training": DEFAULT},
        },
        "momentum": {
            **given(
                "momentum",
                {"zero": 0.0, "half": 0.5},
                {"int": 1, "numpy": np.float32(0.5), "tensor": torch.tensor(0.5)},
                **STATISTICS,
            ),
            "default": STATISTICS,
            "not used in evaluation": {"momentum": 7.0, **EVAL},
        },
        "eps": {
            "default": {"eps": DEFAULT, "tolerance": True},
            "default in evaluation": {**EVAL, "eps": DEFAULT, "tolerance": True},
            "zero in evaluation": {**EVAL, "running_var": torch.tensor([4.0, 16.0, 1.0]).double(), "eps": 0.0},
            "int": {"eps": 3},
            "large": {"eps": 15.0},
        },
        "process_group": ALONE,
    },
    "max_pool2d": {
        "input": {
            "batch": {},
            "no batch": {"input": whole(3, 6, 5)},
            "channels_last": {"input": last(whole(2, 3, 6, 5))},
            "empty batch": {"input": whole(0, 3, 6, 5)},
            "all equal": {"input": torch.zeros(2, 3, 6, 5).double()},
            "NaN": {
                "input": whole(2, 3, 6, 5).index_put(
                    (torch.tensor([0, 1]), torch.tensor([1, 2])), torch.tensor(NAN).double()
                )
            },
            "one NaN": {"input": torch.where(torch.arange(30).view(6, 5) % 11 == 5, NAN, whole(2, 3, 6, 5))},
            "infinities": {"input": whole(2, 3, 6, 5) * INF, "padding": 1},  # 0 * inf is NaN
            "-inf": {"input": torch.full((2, 3, 6, 5), -INF).double(), "padding": 1},
        },
        **POOL,
        "padding": {
            **given(
                "padding", {"int": 1, "pair": (1, 0)}, {"list": [0, 1], "tuple of one": (1,), "index": np.int64(1)}
            ),
            "half of an even kernel": {"kernel_size": 4, "padding": 2},
            "windows of padding": {"kernel_size": (2, 3), "padding": 1, "stride": 1},
        },
        "dilation": {
            **sizes("dilation", kernel_size=2),
            "with stride and padding": {"kernel_size": 2, "dilation": (2, 3), "stride": (1, 2), "padding": 1},
        },
        "ceil_mode": {
            "False": {"ceil_mode": False},
            "True": {"ceil_mode": True},
            "the last window starts in the padding": {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
            "dilated": {"kernel_size": 2, "stride": 3, "dilation": 2, "ceil_mode": True},
        },
        "return_indices": {
            "False": {"return_indices": False},
            "True": {"return_indices": True},
            "no batch": {"return_indices": True, "input": whole(3, 6, 5)},
            "channels_last": {"return_indices": True, "input": last(whole(2, 3, 6, 5))},
            "padded and dilated": {"return_indices": True, "padding": 1, "dilation": 2, "stride": 1},
            "of equals": {"return_indices": True, "input": torch.zeros(2, 3, 6, 5).double(), "padding": 1},
            "int": {"return_indices": 1},
        },
    },
    "avg_pool2d": {
        "input": {
            "batch": {},
            "no batch": {"input": shares(3, 6, 5)},
            "channels_last": {"input": last(shares(2, 3, 6, 5))},
            "empty batch": {"input": shares(0, 3, 6, 5)},
            "NaN": {"input": torch.where(torch.arange(30).view(6, 5) % 11 == 5, NAN, shares(2, 3, 6, 5))},
            "infinities": {"input": torch.where(torch.arange(30).view(6, 5) % 11 == 5, -INF, shares(2, 3, 6, 5))},
        },
        **POOL,
        "padding": {
            **given(
                "padding", {"int": 1, "pair": (1, 0)}, {"list": [0, 1], "tuple of one": (1,), "index": np.int64(1)}
            ),
            "half of the kernel": {"kernel_size": 3, "padding": 1, "stride": 1},
        },
        "ceil_mode": {
            "False": {"ceil_mode": False, "stride": 3},
            "True": {"ceil_mode": True},
            "beyond the padding": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
            "without counting": {
                "kernel_size": 3,
                "stride": 2,
                "padding": 1,
                "ceil_mode": True,
                "count_include_pad": False,
            },
        },
        "count_include_pad": {
            "True": {"padding": 1, "count_include_pad": True},
            "False": {"padding": 1, "count_include_pad": False},
            "False with 3x3": {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False},
        },
        "divisor_override": {
            **given("divisor_override", {"None": None, "int": 3, "one": 1, "negative": -2}, INTS),
            "with padding": {"divisor_override": 6, "padding": 1, "count_include_pad": False, "ceil_mode": True},
        },
    },
    "adaptive_avg_pool2d": {
        "input": {
            "batch": {},
            "no batch": {"input": shares(3, 4, 3)},
            "channels_last": {"input": last(shares(2, 3, 4, 3))},
            "empty batch": {"input": shares(0, 3, 4, 3)},
            "no channels": {"input": shares(2, 0, 4, 3), "forward": True},
            "NaN": {"input": torch.where(torch.arange(12).view(4, 3) == 5, NAN, shares(2, 3, 4, 3))},
            "planes of a matrix": {"input": shares(4, 3), "output_size": 1},
            "planes of five axes": {"input": shares(2, 2, 3, 4, 3), "output_size": 1},
            "planes without pixels": {"input": shares(2, 3, 0, 4), "output_size": 1},
            "no planes": {"input": shares(2, 0, 4, 3), "output_size": 1},
        },
        "output_size": {
            **given("output_size", SIZES, PAIRS),
            "int of one": {"output_size": 1},
            "pair of ones": {"output_size": (1, 1)},
            "None and int": {"output_size": (None, 2)},
            "int and None": {"output_size": [2, None]},
            "None and one": {"output_size": (None, 1)},
            "None twice": {"output_size": (None, None)},
            "as input": {"output_size": (4, 3)},
            "larger than input": {"output_size": (7, 5)},
            "larger on one axis": {"output_size": (2, 9)},
            "overlapping windows": {"output_size": 3, "input": shares(2, 3, 5, 4)},
            "tensor of two": {"output_size": torch.tensor([2, 1])},
            "array of two": {"output_size": np.array([2, 1])},
            "zero": {"output_size": 0, "forward": True},
            "zero and two": {"output_size": (0, 2), "forward": True},
        },
    },
    "global_avg_pool2d": {
        "input": {
            "batch": {},
            "no batch": {"input": shares(3, 4, 3)},
            "channels_last": {"input": last(shares(2, 3, 4, 3))},
            "one pixel": {"input": shares(2, 3, 1, 1)},
            "empty batch": {"input": shares(0, 3, 4, 3)},
            "NaN": {"input": torch.where(torch.arange(12).view(4, 3) == 5, NAN, shares(2, 3, 4, 3))},
        },
        "keepdim": {
            "True": {"keepdim": True},
            "False": {"keepdim": False},
            "False, no batch": {"keepdim": False, "input": shares(3, 4, 3)},
        },
    },
}
CASES = [
    (f, argument, branch)
    for f, arguments in BRANCHES.items()
    for argument, branches in arguments.items()
    for branch in branches
]

# ----------------------------------------------------------------------------------------------------------------------

MEANS = [
    f
    for name in ("avg_pool2d", "adaptive_avg_pool2d", "global_avg_pool2d")
    for f in (getattr(ours, name), THEIRS[name])
]
PARAMETERS = ("weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias")
BUFFERS = ("running_mean", "running_var")


def evaluate(
    function: Callable[..., Any], arguments: dict[str, Any], dtype: torch.dtype, parameters: torch.dtype, backward: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """(results, gradients): what the call returns and updates, and the gradients of all its tensors that have one."""

    def argument(name: str, value: Any) -> Any:
        if not is_operand(value):
            return value
        value = value.detach().to(parameters if name in PARAMETERS else dtype)
        return value.clone() if name in BUFFERS else value.requires_grad_(backward)

    bound = {name: argument(name, value) for name, value in arguments.items()}
    out = function(**bound)
    outputs = list(out) if isinstance(out, tuple) else [out]
    y = outputs[0]
    gradients: list[Tensor] = []
    if backward:
        factor = 36 if function in MEANS else 1
        dy = torch.empty_like(y, requires_grad=False).copy_(factor * integers(*y.shape, seed=9))
        gradients = list(torch.autograd.grad(y, [t for t in bound.values() if is_operand(t) and t.requires_grad], dy))
    return [
        t.detach() for t in (*outputs, *(bound[name] for name in BUFFERS if bound.get(name) is not None))
    ], gradients


def is_operand(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


@pytest.mark.filterwarnings("ignore:Using padding='same' with even", "ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("function", "argument", "branch"), CASES)
def test_branch(function, argument, branch, dtype, device):
    arguments = {
        name: value
        for name, value in (USUAL[function] | BRANCHES[function][argument][branch]).items()
        if value is not DEFAULT
    }
    tolerance, float32, forward = (arguments.pop(key, False) for key in ("tolerance", "float32", "forward"))
    parameters = torch.float32 if float32 and dtype != torch.float64 else dtype
    there = {name: value.to(device) if is_operand(value) else value for name, value in arguments.items()}
    with cnnfast.trace() as trace:
        results, gradients = evaluate(getattr(ours, function), there, dtype, parameters, not forward)
    assert {call.served_by for call in trace} <= {"kernels"}
    assert trace.launches or 0 in (results[0].numel(), arguments["input"].numel())

    for of_ours in ("algorithm", "process_group"):
        arguments.pop(of_ours, None)
    exact = evaluate(THEIRS[function], arguments, torch.float64, torch.float64, not forward)
    same = evaluate(THEIRS[function], arguments, dtype, parameters, not forward)
    for mine, its, right in zip(results + gradients, same[0] + same[1], exact[0] + exact[1], strict=True):
        assert mine.dtype == its.dtype
        check(mine, right, tolerance)
    for mine, its in zip(results, same[0], strict=True):
        assert mine.numel() == 0 or mine.stride() == its.stride()


def check(mine: Tensor, exact: Tensor, tolerance: bool) -> None:
    """`mine` is `exact`, rounded; with `tolerance`, or where `exact` is a running statistic that is not representable,
    almost.
    """
    unit = 4 * torch.finfo(mine.dtype).eps if tolerance or mine.dim() == 1 else 0
    torch.testing.assert_close(mine.cpu(), exact.to(mine.dtype), rtol=unit, atol=unit, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------------------


def documented(function: str) -> list[tuple[str, Any]]:
    """Names and defaults of PyTorch's arguments, from the first line of its documentation or from its signature."""
    if function in ("batch_norm", "adaptive_avg_pool2d"):
        return [(p.name, p.default) for p in inspect.signature(getattr(theirs, function)).parameters.values()]
    documentation = getattr(theirs, function).__doc__
    found = re.search(rf"{function}\((.*?)\)", documentation)
    assert found is not None
    arguments = [part.split("=") for part in found[1].split(", ")]
    return [(name, eval(*default) if default else inspect.Parameter.empty) for name, *default in arguments]


@pytest.mark.parametrize("function", [name for name in BRANCHES if hasattr(theirs, name)])
def test_signature(function):
    """Names, order and defaults are PyTorch's; `algorithm` and `process_group` are ours, by name only."""
    mine = inspect.signature(getattr(ours, function)).parameters.values()
    assert [(p.name, p.default) for p in mine if p.kind is not p.KEYWORD_ONLY] == documented(function)
    own = "algorithm" if function.startswith("conv") else "process_group"
    assert [p.name for p in mine if p.kind is p.KEYWORD_ONLY] == [own] * ("conv" in function or "norm" in function)


def test_every_argument_has_branches():
    public = {
        name
        for name, f in vars(ours).items()
        if inspect.isfunction(f) and not name.startswith("_") and hasattr(f, "__wrapped__")
    }
    # What augment takes has tests of its own, in test_augmentation_errors.py: most of it is tensors of numbers.
    assert public == {*BRANCHES, "augment"}
    for name, arguments in BRANCHES.items():
        assert set(inspect.signature(getattr(ours, name)).parameters) == set(arguments)
