"""What PyTorch refuses, ours refuses with the same kind of error, naming the argument and its value, before anything is
launched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as theirs

import cnnfast
import cnnfast.functional as ours


def tensor(*shape: int) -> torch.Tensor:
    """The size of a tensor: a case names tensors, and `placed` makes them where they are wanted."""
    return torch.empty(shape, device="meta")


def placed(value: Any, device: torch.device | str) -> Any:
    """`value`, a case's arguments or keywords, with ones on `device` for every tensor that a case names."""
    if isinstance(value, torch.Tensor) and value.is_meta:
        return torch.ones_like(value, device=device).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: placed(item, device) for name, item in value.items()}
    return tuple(placed(item, device) for item in value) if type(value) is tuple else value


X, W = tensor(2, 4, 8, 8), tensor(6, 4, 3, 3)
MEAN, VAR = tensor(4), tensor(4)


# name: (arguments, keywords, what the message must hold: the argument's name and the offending value)
CONV = {
    "channels do not fit": ((X, tensor(6, 3, 3, 3)), {}, ("input", "[2, 4, 8, 8]", "groups=1")),
    "channels do not fit groups": ((X, tensor(6, 1, 3, 3)), {"groups": 3}, ("groups=3", "[6, 1, 3, 3]")),
    "groups do not divide the filters": ((X, tensor(6, 1, 3, 3)), {"groups": 4}, ("groups=4", "[6, 1, 3, 3]")),
    "no groups": ((X, W), {"groups": 0}, ("groups=0",)),
    "groups no int": ((X, W), {"groups": 1.5}, ("groups=1.5",)),
    "groups a bool": ((X, W), {"groups": True}, ("groups=True",)),
    "dtypes of input and weight": ((X, W.half()), {}, ("weight", "torch.float16", "torch.float32")),
    "dtype of bias": ((X, W, tensor(6).double()), {}, ("bias", "torch.float64", "torch.float32")),
    "length of bias": ((X, W, tensor(5)), {}, ("bias", "[5]", "[6]")),
    "bias no vector": ((X, W, tensor(6, 1)), {}, ("bias", "[6, 1]")),
    "same with stride": ((X, W), {"stride": 2, "padding": "same"}, ("padding='same'", "stride=(2, 2)")),
    "unknown padding": ((X, W), {"padding": "foo"}, ("padding='foo'",)),
    "negative padding": ((X, W), {"padding": (0, -1)}, ("padding=(0, -1)",)),
    "padding None": ((X, W), {"padding": None}, ("padding=None",)),
    "no stride": ((X, W), {"stride": 0}, ("stride=(0, 0)",)),
    "three strides": ((X, W), {"stride": (1, 2, 3)}, ("stride=[1, 2, 3]",)),
    "empty stride": ((X, W), {"stride": ()}, ("stride=[]",)),
    "stride a string": ((X, W), {"stride": "a"}, ("stride='a'",)),
    "stride a float": ((X, W), {"stride": 1.5}, ("stride=1.5",)),
    "stride a bool": ((X, W), {"stride": True}, ("stride=True",)),
    "negative dilation": ((X, W), {"dilation": (1, -2)}, ("dilation=(1, -2)",)),
    "kernel larger than the padded input": ((X, tensor(6, 4, 11, 3)), {"padding": 1}, ("10 x 10", "11 x 3")),
    "dilated kernel larger than the input": ((X, W), {"dilation": 4}, ("8 x 8", "9 x 9", "dilation=(4, 4)")),
    "input of two dimensions": ((X[0, 0], W), {}, ("input", "[8, 8]")),
    "weight of three dimensions": ((X, W[0]), {}, ("weight", "[4, 3, 3]")),
    "input a list": (([1], W), {}, ("input", "list")),
    "no weight": ((X, None), {}, ("weight", "NoneType")),
    "no filters": ((X, tensor(0, 4, 3, 3)), {}, ("weight", "[0, 4, 3, 3]")),
    "no taps": ((X, tensor(6, 4, 0, 3)), {}, ("weight", "[6, 4, 0, 3]")),
    "no rows": ((tensor(2, 4, 0, 3), W), {"padding": 2}, ("input", "[2, 4, 0, 3]")),
    "negative groups": ((X, W), {"groups": -1}, ("groups=-1",)),
    "more groups than filters": ((X, tensor(2, 1, 3, 3)), {"groups": 4}, ("groups=4", "[2, 1, 3, 3]")),
    "groups of more than 64 bits": ((X, W), {"groups": 2**70}, ("groups=1180591620717411303424",)),
    "stride of more than 64 bits": ((X, W), {"stride": 2**70}, ("stride=1180591620717411303424",)),
    "stride a range": ((X, W), {"stride": range(1, 3)}, ("stride=range(1, 3)",)),
    "stride an array": ((X, W), {"stride": np.array([1, 2])}, ("stride=array([1, 2])",)),
    "stride of floats": ((X, W), {"stride": (1.0, 2)}, ("stride=(1.0, 2)",)),
    "padding an array": ((X, W), {"padding": np.array([1, 2])}, ("padding=array([1, 2])",)),
    "padding of strings": ((X, W), {"padding": ("same", "same")}, ("padding=('same', 'same')",)),
    "dilation None": ((X, W), {"dilation": (None, 1)}, ("dilation=(None, 1)",)),
    "input of five dimensions": ((X[None], W), {}, ("input", "[1, 2, 4, 8, 8]")),
    "weight of five dimensions": ((X, W[None]), {}, ("weight", "[1, 6, 4, 3, 3]")),
    "bias a number": ((X, W, 1.0), {}, ("bias", "float")),
    "bias a scalar": ((X, W, tensor()), {}, ("bias", "[]")),
    "unbatched channels do not fit": ((X[0], tensor(6, 3, 3, 3)), {}, ("[1, 4, 8, 8]", "[6, 3, 3, 3]")),
}
ROW, FILTERS = X[..., 0], W[..., 0]
CONV1D = {
    "channels do not fit": ((ROW, tensor(6, 3, 3)), {}, ("input", "[2, 4, 8]", "groups=1")),
    "groups do not divide the filters": ((ROW, tensor(6, 1, 3)), {"groups": 4}, ("groups=4", "[6, 1, 3]")),
    "two strides": ((ROW, FILTERS), {"stride": (1, 2)}, ("stride=[1, 2]", "1 values")),
    "no stride": ((ROW, FILTERS), {"stride": 0}, ("stride=(0,)",)),
    "stride a float": ((ROW, FILTERS), {"stride": 1.5}, ("stride=1.5",)),
    "stride a bool": ((ROW, FILTERS), {"stride": (True,)}, ("stride=(True,)",)),
    "same with stride": ((ROW, FILTERS), {"stride": 2, "padding": "same"}, ("padding='same'", "stride=(2,)")),
    "unknown padding": ((ROW, FILTERS), {"padding": "reflect"}, ("padding='reflect'",)),
    "two paddings": ((ROW, FILTERS), {"padding": (1, 1)}, ("padding=[1, 1]",)),
    "no padding": ((ROW, FILTERS), {"padding": ()}, ("padding=[]",)),
    "negative padding": ((ROW, FILTERS), {"padding": -1}, ("padding=(-1,)",)),
    "negative dilation": ((ROW, FILTERS), {"dilation": -1}, ("dilation=(-1,)",)),
    "kernel larger than the input": ((ROW, tensor(6, 4, 9)), {}, ("(8)", "(9 with dilation=(1,))")),
    "input of one dimension": ((ROW[0, 0], FILTERS), {}, ("input", "[8]")),
    "input of four dimensions": ((X, FILTERS), {}, ("input", "[2, 4, 8, 8]")),
    "weight of four dimensions": ((ROW, W), {}, ("weight", "[6, 4, 3, 3]")),
    "dtype of weight": ((ROW, FILTERS.double()), {}, ("weight", "torch.float64")),
    "dtype of bias": ((ROW, FILTERS, tensor(6).half()), {}, ("bias", "torch.float16")),
    "length of bias": ((ROW, FILTERS, tensor(4)), {}, ("bias", "[4]", "[6]")),
    "no pixels": ((tensor(2, 4, 0), FILTERS), {"padding": 2}, ("input", "[2, 4, 0]")),
    "no taps": ((ROW, tensor(6, 4, 0)), {}, ("weight", "[6, 4, 0]")),
    "input None": ((None, FILTERS), {}, ("input", "NoneType")),
}
V = W[:4]
TRANSPOSED = {
    "channels do not fit": ((X[:, :3], V), {}, ("input", "[2, 3, 8, 8]", "[4, 4, 3, 3]")),
    "groups do not divide the channels": ((X, V), {"groups": 3}, ("groups=3", "[4, 4, 3, 3]")),
    "more groups than channels": ((X, V), {"groups": 8}, ("groups=8", "[4, 4, 3, 3]")),
    "no groups": ((X, V), {"groups": 0}, ("groups=0",)),
    "groups a float": ((X, V), {"groups": 1.0}, ("groups=1.0",)),
    "groups a bool": ((X, V), {"groups": True}, ("groups=True",)),
    "output_padding as large as stride": (
        (X, V),
        {"output_padding": 1},
        ("output_padding=(1, 1)", "stride=(1, 1)", "dilation=(1, 1)"),
    ),
    "output_padding on one axis": (
        (X, V),
        {"stride": (3, 1), "output_padding": 1},
        ("output_padding=(1, 1)", "stride=(3, 1)"),
    ),
    "negative output_padding": ((X, V), {"stride": 2, "output_padding": -1}, ("output_padding=(-1, -1)",)),
    "output_padding a string": ((X, V), {"output_padding": "a"}, ("output_padding='a'",)),
    "output_padding None": ((X, V), {"output_padding": None}, ("output_padding=None",)),
    "three output_paddings": ((X, V), {"output_padding": (0, 0, 0)}, ("output_padding=[0, 0, 0]",)),
    "padding a string": ((X, V), {"padding": "same"}, ("padding='same'",)),
    "negative padding": ((X, V), {"padding": -1}, ("padding=(-1, -1)",)),
    "padding that leaves less than nothing": ((X, V), {"padding": 6}, ("padding=(6, 6)", "[2, 4, 8, 8]", "-2x-2")),
    "no stride": ((X, V), {"stride": 0}, ("stride=(0, 0)",)),
    "no dilation": ((X, V), {"dilation": 0}, ("dilation=(0, 0)",)),
    "dilation of more than 64 bits": ((X, V), {"dilation": 2**70}, ("dilation=1180591620717411303424",)),
    "length of bias": ((X, V, tensor(5)), {}, ("bias", "[5]", "[4]")),
    "bias no vector": ((X, V, tensor(4, 1)), {}, ("bias", "[4, 1]")),
    "dtype of weight": ((X, V.half()), {}, ("weight", "torch.float16")),
    "dtype of bias": ((X, V, tensor(4).double()), {}, ("bias", "torch.float64")),
    "input of two dimensions": ((X[0, 0], V), {}, ("input", "[8, 8]")),
    "weight of three dimensions": ((X, V[0]), {}, ("weight", "[4, 3, 3]")),
    "no channels": ((X[:, :0], V[:0]), {}, ("weight", "[0, 4, 3, 3]")),
    "no filters": ((X, V[:, :0]), {}, ("weight", "[4, 0, 3, 3]")),
    "no taps": ((X, V[:, :, :0]), {}, ("weight", "[4, 4, 0, 3]")),
    "no rows": ((X[:, :, :0], V), {}, ("input", "[2, 4, 0, 8]")),
    "no weight": ((X, None), {}, ("weight", "NoneType")),
}
MAX_POOL = {
    "no kernel": ((X, 0), {}, ("kernel_size=(0, 0)",)),
    "kernel a float": ((X, 2.0), {}, ("kernel_size=2.0",)),
    "three kernel sizes": ((X, (1, 2, 3)), {}, ("kernel_size=[1, 2, 3]",)),
    "empty kernel size": ((X, ()), {}, ("kernel_size=[]",)),
    "no stride": ((X, 2), {"stride": 0}, ("stride=(0, 0)",)),
    "padding beyond half of the kernel": ((X, 2), {"padding": 2}, ("padding=(2, 2)", "kernel_size=(2, 2)")),
    "negative padding": ((X, 2), {"padding": -1}, ("padding=(-1, -1)",)),
    "no dilation": ((X, 2), {"dilation": 0}, ("dilation=(0, 0)",)),
    "kernel larger than the input": ((X, 20), {}, ("kernel_size=(20, 20)", "[2, 4, 8, 8]")),
    "two dimensions": ((X[0, 0], 2), {}, ("input", "[8, 8]")),
    "no channels": ((X[:, :0], 2), {}, ("input", "[2, 0, 8, 8]")),
    "input a list": (([1], 2), {}, ("input", "list")),
    "padding beyond half of the kernel, dilated": (
        (X, 2),
        {"padding": 2, "dilation": 3},
        ("padding=(2, 2)", "kernel_size=(2, 2)"),
    ),
    "dilated kernel larger than the input": ((X, 5), {"dilation": 2}, ("kernel_size=(5, 5)", "[2, 4, 8, 8]")),
    "ceil_mode an int": ((X, 2), {"ceil_mode": 1}, ("ceil_mode=1",)),
    "ceil_mode None": ((X, 2), {"ceil_mode": None}, ("ceil_mode=None",)),
    "kernel None": ((X, None), {}, ("kernel_size=None",)),
    "kernel of bools": ((X, (True, 2)), {}, ("kernel_size=(True, 2)",)),
    "stride an array": ((X, 2), {"stride": np.array([1, 2])}, ("stride=array([1, 2])",)),
    "stride of more than 32 bits": ((X, 2), {"stride": 2**31}, ("stride=(2147483648, 2147483648)",)),
    "stride of more than 64 bits": ((X, 2), {"stride": 2**70}, ("stride=1180591620717411303424",)),
    "three dilations": ((X, 2), {"dilation": (1, 1, 1)}, ("dilation=[1, 1, 1]",)),
    "dilation a float": ((X, 2), {"dilation": 1.0}, ("dilation=1.0",)),
    "five dimensions": ((X[None], 2), {}, ("input", "[1, 2, 4, 8, 8]")),
    "no columns": ((X[..., :0], 2), {}, ("input", "[2, 4, 8, 0]")),
    "with indices": ((X, 2), {"padding": 3, "return_indices": True}, ("padding=(3, 3)",)),
}
AVERAGE_POOL = {
    "no stride": ((X, 2), {"stride": 0}, ("stride=(0, 0)",)),
    "kernel a string": ((X, "a"), {}, ("kernel_size='a'",)),
    "padding beyond half of the kernel": ((X, 2), {"padding": 2}, ("padding=(2, 2)", "kernel_size=(2, 2)")),
    "no divisor": ((X, 2), {"divisor_override": 0}, ("divisor_override", "zero")),
    "kernel larger than the input": ((X, 20), {}, ("kernel_size=(20, 20)", "[2, 4, 8, 8]")),
    "no channels": ((X[:, :0], 2), {}, ("input", "[2, 0, 8, 8]")),
    "divisor a float": ((X, 2), {"divisor_override": 2.0}, ("divisor_override=2.0",)),
    "divisor a bool": ((X, 2), {"divisor_override": True}, ("divisor_override=True",)),
    "divisor a pair": ((X, 2), {"divisor_override": (2, 2)}, ("divisor_override=(2, 2)",)),
    "ceil_mode an int": ((X, 2), {"ceil_mode": 0}, ("ceil_mode=0",)),
    "count_include_pad an int": ((X, 2), {"count_include_pad": 1}, ("count_include_pad=1",)),
    "padding None": ((X, 2), {"padding": None}, ("padding=None",)),
    "three kernel sizes": ((X, (1, 2, 3)), {}, ("kernel_size=[1, 2, 3]",)),
    "two dimensions": ((X[0, 0], 2), {}, ("input", "[8, 8]")),
    "five dimensions": ((X[None], 2), {}, ("input", "[1, 2, 4, 8, 8]")),
    "input None": ((None, 2), {}, ("input", "NoneType")),
}
ADAPTIVE = {
    "three sizes": ((X, (1, 2, 3)), {}, ("output_size=[1, 2, 3]",)),
    "one size": ((X, [3]), {}, ("output_size=[3]",)),
    "no sizes": ((X, ()), {}, ("output_size=[]",)),
    "more sizes than axes": ((X, (1, 2, 3, 4)), {}, ("output_size=(1, 2, 3, 4)", "[2, 4, 8, 8]")),
    "as many sizes as axes": ((X[0, 0], (2, 2)), {}, ("output_size=(2, 2)", "[8, 8]")),
    "negative": ((X, -1), {}, ("output_size=(-1, -1)",)),
    "one negative": ((X, (2, -3)), {}, ("output_size=(2, -3)",)),
    "a float": ((X, 2.0), {}, ("output_size=2.0",)),
    "floats": ((X, (2.0, 3)), {}, ("output_size=[2.0, 3]",)),
    "a string": ((X, "a"), {}, ("output_size=['a']",)),
    "a bool": ((X, True), {}, ("output_size=True",)),
    "bools": ((X, (True, 1)), {}, ("output_size=[True, 1]",)),
    "None": ((X, None), {}, ("output_size=None",)),
    "a tensor without axes": ((X, torch.tensor(2)), {}, ("output_size=tensor(2)",)),
    "two dimensions": ((X[0, 0], 2), {}, ("input", "[8, 8]")),
    "five dimensions": ((X[None], 2), {}, ("input", "[1, 2, 4, 8, 8]")),
    "no rows": ((X[:, :, :0], 2), {}, ("input", "[2, 4, 0, 8]")),
    "one dimension, to a pixel": ((X[0, 0, 0], 1), {}, ("input", "[8]")),
    "input a list": (([1], 2), {}, ("input", "list")),
}
NORM = {
    "one value a channel": ((X[:1, :, :1, :1], MEAN, VAR), {"training": True}, ("training", "[1, 4, 1, 1]")),
    "no statistics": ((X, None, None), {}, ("running_mean", "evaluation")),
    "mean only": ((X, MEAN, None), {"training": True}, ("running_mean", "running_var")),
    "mean only, in evaluation": ((X, MEAN, None), {}, ("running_var", "evaluation")),
    "length of running_mean": ((X, tensor(3), VAR), {}, ("running_mean", "[3]", "[4]")),
    "length of running_var": ((X, MEAN, tensor(3)), {}, ("running_var", "[3]", "[4]")),
    "length of weight": ((X, MEAN, VAR, tensor(3)), {}, ("weight", "[3]", "[4]")),
    "length of bias": ((X, MEAN, VAR, None, tensor(5)), {}, ("bias", "[5]", "[4]")),
    "running_mean no vector": ((X, tensor(1, 4), VAR), {}, ("running_mean", "[1, 4]")),
    "running_var no vector": ((X, MEAN, tensor(4, 1)), {}, ("running_var", "[4, 1]")),
    "bias narrower than input": (
        (X, MEAN, VAR, None, tensor(4).half()),
        {},
        ("bias", "torch.float16", "torch.float32"),
    ),
    "parameters of two dtypes": (
        (X.half(), MEAN, VAR, tensor(4).half()),
        {},
        ("weight", "torch.float16", "torch.float32"),
    ),
    "training an int": ((X, MEAN, VAR), {"training": 1}, ("training=1",)),
    "training None": ((X, MEAN, VAR), {"training": None}, ("training=None",)),
    "momentum a string": ((X, MEAN, VAR), {"momentum": "a"}, ("momentum='a'",)),
    "momentum a vector": ((X, MEAN, VAR), {"momentum": torch.tensor([0.1])}, ("momentum=tensor([0.1",)),
    "eps None": ((X, MEAN, VAR), {"eps": None}, ("eps=None",)),
    "eps complex": ((X, MEAN, VAR), {"eps": 1j}, ("eps=1j",)),
    "no eps in training": ((X, MEAN, VAR), {"training": True, "eps": 0.0}, ("eps=0.0", "training")),
    "one dimension": ((X[0, 0, 0], MEAN, VAR), {}, ("input", "[8]")),
    "one dimension, in training": ((X[0, 0, 0], None, None), {"training": True}, ("input", "[8]")),
    "no dimension, in training": ((X[0, 0, 0, 0], MEAN, VAR), {"training": True}, ("input", "[]")),
    "one row, in training": ((X[:1, :, 0, 0], MEAN, VAR), {"training": True}, ("training", "[1, 4]")),
    "input a list": (([1], MEAN, VAR), {}, ("input", "list")),
    "input a list, in training": (([1], MEAN, VAR), {"training": True}, ("input", "list")),
    "running_mean a list": ((X, [0.0], VAR), {}, ("running_mean", "list")),
    "weight a number": ((X, MEAN, VAR, 1.0), {}, ("weight", "float")),
    "weight narrower than input": ((X, MEAN, VAR, tensor(4).half()), {}, ("weight", "torch.float16", "torch.float32")),
    "statistics narrower than float64": (
        (X.double(), MEAN, VAR),
        {},
        ("running_mean", "torch.float64,", "torch.float32"),
    ),
    "statistics wider than input": (
        (X, MEAN.double(), VAR.double()),
        {},
        ("running_mean", "torch.float64", "torch.float32"),
    ),
    "negative eps": ((X, MEAN, VAR), {"eps": -1.0}, ("eps=-1.0",)),
    "no momentum": ((X, MEAN, VAR), {"training": True, "momentum": None}, ("momentum=None",)),
    "running_mean wants a gradient": ((X, MEAN.clone().requires_grad_(), VAR), {}, ("running_mean", "gradient")),
    "running_var wants a gradient": (
        (X, MEAN, VAR.clone().requires_grad_()),
        {"training": True},
        ("running_var", "gradient"),
    ),
}
FUNCTIONS = {
    "conv2d": CONV,
    "conv1d": CONV1D,
    "conv_transpose2d": TRANSPOSED,
    "max_pool2d": MAX_POOL,
    "avg_pool2d": AVERAGE_POOL,
    "adaptive_avg_pool2d": ADAPTIVE,
    "batch_norm": NORM,
}


@pytest.mark.parametrize(("function", "case"), [(f, name) for f, cases in FUNCTIONS.items() for name in cases], ids=str)
def test_refused_as_by_pytorch(function, case, device, launches):
    """PyTorch is asked on the CPU: what its libraries for GPUs refuse differs with their versions."""
    *given, words = FUNCTIONS[function][case]
    args, options = placed(tuple(given), "cpu")
    with pytest.raises(Exception) as refused:  # noqa: PT011 - whatever PyTorch raises
        getattr(theirs, function)(*args, **options)
    args, options = placed(tuple(given), device)
    with cnnfast.backend("kernels"), pytest.raises(type(refused.value)) as mine:
        getattr(ours, function)(*args, **options)
    assert type(mine.value) is type(refused.value)
    message = str(mine.value)
    assert message.startswith(f"{function}(): ")
    assert not [word for word in words if word not in message], message
    assert launches == []


def composition(
    input,
    weight,
    running_mean,
    running_var,
    bn_weight=None,
    bn_bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    **geometry,
):
    y = theirs.conv2d(input, weight, **geometry)
    return theirs.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)


SIX = tensor(6), tensor(6)
FUSED = {
    "groups": ((X, W, *SIX), {"groups": 4}, ("groups=4", "[6, 4, 3, 3]")),
    "dtypes": ((X, W.half(), *SIX), {}, ("weight", "torch.float16")),
    "length of running_mean": ((X, W, MEAN, VAR), {}, ("running_mean", "[4]", "[6]")),
    "length of bn_weight": ((X, W, *SIX, tensor(5)), {}, ("bn_weight", "[5]", "[6]")),
    "no statistics": ((X, W, None, None), {}, ("running_mean", "evaluation")),
    "one value a channel": ((X[:1, :, :3, :3], W, *SIX), {"training": True}, ("[1, 6, 1, 1]",)),
    "negative eps": ((X, W, *SIX), {"eps": -1.0}, ("eps=-1.0",)),
    "same with stride": ((X, W, *SIX), {"stride": 2, "padding": "same"}, ("padding='same'", "stride=(2, 2)")),
}


@pytest.mark.parametrize("case", FUSED)
def test_conv_bn_act_refuses_what_its_parts_refuse(case, device, launches):
    *given, words = FUSED[case]
    args, options = placed(tuple(given), "cpu")
    with pytest.raises(Exception) as refused:  # noqa: PT011 - whatever PyTorch raises
        composition(*args, **options)
    args, options = placed(tuple(given), device)
    with pytest.raises(type(refused.value)) as mine:
        ours.conv_bn_act(*args, **options)
    message = str(mine.value)
    assert message.startswith("conv_bn_act(): ")
    assert not [word for word in words if word not in message], message
    assert launches == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "tanh"}, ("activation='tanh'", "relu6")),
        ({"activation": "relu", "activation_arg": 0.1}, ("activation_arg=0.1", "relu")),
        ({"residual": tensor(2, 6, 1, 1)}, ("residual", "[2, 6, 1, 1]", "[2, 6, 6, 6]")),
        ({"residual": tensor(2, 6, 6, 6).double()}, ("residual", "torch.float64", "torch.float32")),
        ({"algorithm": "winograd"}, ("algorithm='winograd'", "im2col")),
    ],
    ids=str,
)
def test_arguments_that_pytorch_does_not_have(options, words, device, launches):
    """Whoever would serve the call."""
    args, options = placed((X, W, *SIX), device), placed(options, device)
    for backend in ("kernels", "torch"):
        with cnnfast.backend(backend), pytest.raises(ValueError) as mine:  # noqa: PT011 - the words are checked
            ours.conv_bn_act(*args, **options)
        assert not [word for word in words if word not in str(mine.value)], str(mine.value)
    assert launches == []


@pytest.mark.parametrize("backend", ["kernels", "torch"])
def test_conv_bn_act_takes_a_batch(backend, device):
    with (
        cnnfast.backend(backend),
        pytest.raises(RuntimeError, match=r"conv_bn_act\(\): input must be of size \[N, C, H, W\]"),
    ):
        ours.conv_bn_act(*placed((X[0], W, *SIX), device))


@pytest.mark.parametrize(
    ("algorithm", "meant"),
    [
        ("im2cols", "'im2col'"),
        ("Direct", "'direct'"),
        ("implicit_gemm", "'direct'"),
        ("cuDNN", "'torch'"),
        (None, "'auto'"),
        ("fft", None),
        (3, None),
    ],
)
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv_transpose2d", "conv_bn_act"])
def test_unknown_algorithm(name, algorithm, meant, device):
    with pytest.raises(ValueError, match=f"^{name}") as refused:
        getattr(ours, name)(*placed((X, W), device), algorithm=algorithm)
    assert str(refused.value) == (
        f"{name}(): algorithm must be 'auto', 'direct', 'im2col' or 'torch', but got algorithm={algorithm!r}"
        + (f". Did you mean {meant}?" if meant else "")
    )


@pytest.mark.parametrize(
    ("name", "keyword", "says"),
    [
        ("conv2d", {"algoritm": "auto"}, "Did you mean 'algorithm'?"),
        ("conv2d", {"strides": 2}, "Did you mean 'stride'?"),
        ("conv_bn_act", {"act": "relu"}, "Did you mean 'activation'?"),
        ("conv_bn_act", {"negative_slope": 0.1}, "Did you mean 'activation_arg'?"),
        ("max_pool2d", {"ceil": True, "kernel_size": 2}, "Did you mean 'ceil_mode'?"),
        ("batch_norm", {"epsilon": 1.0}, "Did you mean 'eps'?"),
        ("adaptive_avg_pool2d", {"size": 1}, "Its arguments are input, output_size"),
        ("global_avg_pool2d", {"keep_dim": True}, "Did you mean 'keepdim'?"),
    ],
)
def test_an_unknown_keyword_is_told_which_one_is_near(name, keyword, says, device):
    (first, *_) = keyword
    with pytest.raises(TypeError) as refused:
        getattr(ours, name)(*placed((X, W)[: 1 + ("conv" in name)], device), **keyword)
    assert str(refused.value) == f"{name}() got an unexpected keyword argument {first!r}. {says}"


@pytest.mark.parametrize("shape", [(8, 8), (), (1, 2, 4, 8, 8)], ids=str)
def test_global_average_of_no_image(shape, device):
    with pytest.raises(RuntimeError, match=r"global_avg_pool2d\(\): expected input of size"):
        ours.global_avg_pool2d(placed(tensor(*shape), device))
