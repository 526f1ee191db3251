"""What PyTorch refuses, ours refuses with the same kind of error, naming the argument and its value, before anything is launched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs

import cnnfast
import cnnfast.functional as ours

X, W = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
MEAN, VAR = torch.zeros(4), torch.ones(4)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


# name: (arguments, keywords, what the message must hold: the argument's name and the offending value)
CONV = {
    "channels do not fit": ((X, zeros(6, 3, 3, 3)), {}, ("input", "[2, 4, 8, 8]", "groups=1")),
    "channels do not fit groups": ((X, zeros(6, 1, 3, 3)), {"groups": 3}, ("groups=3", "[6, 1, 3, 3]")),
    "groups do not divide the filters": ((X, zeros(6, 1, 3, 3)), {"groups": 4}, ("groups=4", "[6, 1, 3, 3]")),
    "no groups": ((X, W), {"groups": 0}, ("groups=0",)),
    "groups no int": ((X, W), {"groups": 1.5}, ("groups=1.5",)),
    "groups a bool": ((X, W), {"groups": True}, ("groups=True",)),
    "dtypes of input and weight": ((X, W.half()), {}, ("weight", "torch.float16", "torch.float32")),
    "dtype of bias": ((X, W, zeros(6).double()), {}, ("bias", "torch.float64", "torch.float32")),
    "length of bias": ((X, W, zeros(5)), {}, ("bias", "[5]", "[6]")),
    "bias no vector": ((X, W, zeros(6, 1)), {}, ("bias", "[6, 1]")),
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
    "kernel larger than the padded input": ((X, zeros(6, 4, 11, 3)), {"padding": 1}, ("10 x 10", "11 x 3")),
    "dilated kernel larger than the input": ((X, W), {"dilation": 4}, ("8 x 8", "9 x 9", "dilation=(4, 4)")),
    "input of two dimensions": ((X[0, 0], W), {}, ("input", "[8, 8]")),
    "weight of three dimensions": ((X, W[0]), {}, ("weight", "[4, 3, 3]")),
    "input a list": (([1], W), {}, ("input", "list")),
    "no weight": ((X, None), {}, ("weight", "NoneType")),
    "no filters": ((X, zeros(0, 4, 3, 3)), {}, ("weight", "[0, 4, 3, 3]")),
    "no taps": ((X, zeros(6, 4, 0, 3)), {}, ("weight", "[6, 4, 0, 3]")),
    "no rows": ((zeros(2, 4, 0, 3), W), {"padding": 2}, ("input", "[2, 4, 0, 3]")),
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
}
AVERAGE_POOL = {
    "no stride": ((X, 2), {"stride": 0}, ("stride=(0, 0)",)),
    "kernel a string": ((X, "a"), {}, ("kernel_size='a'",)),
    "padding beyond half of the kernel": ((X, 2), {"padding": 2}, ("padding=(2, 2)", "kernel_size=(2, 2)")),
    "no divisor": ((X, 2), {"divisor_override": 0}, ("divisor_override", "zero")),
    "kernel larger than the input": ((X, 20), {}, ("kernel_size=(20, 20)", "[2, 4, 8, 8]")),
    "no channels": ((X[:, :0], 2), {}, ("input", "[2, 0, 8, 8]")),
}
NORM = {
    "one value a channel": ((X[:1, :, :1, :1], MEAN, VAR), {"training": True}, ("training", "[1, 4, 1, 1]")),
    "no statistics": ((X, None, None), {}, ("running_mean", "evaluation")),
    "mean only": ((X, MEAN, None), {"training": True}, ("running_mean", "running_var")),
    "mean only, in evaluation": ((X, MEAN, None), {}, ("running_var", "evaluation")),
    "length of running_mean": ((X, zeros(3), VAR), {}, ("running_mean", "[3]", "[4]")),
    "length of running_var": ((X, MEAN, zeros(3)), {}, ("running_var", "[3]", "[4]")),
    "length of weight": ((X, MEAN, VAR, zeros(3)), {}, ("weight", "[3]", "[4]")),
    "length of bias": ((X, MEAN, VAR, None, zeros(5)), {}, ("bias", "[5]", "[4]")),
    "running_mean no vector": ((X, zeros(1, 4), VAR), {}, ("running_mean", "[1, 4]")),
    "weight narrower than input": ((X, MEAN, VAR, zeros(4).half()), {}, ("weight", "torch.float16", "torch.float32")),
    "statistics wider than input": ((X, MEAN.double(), VAR.double()), {}, ("running_mean", "torch.float64", "torch.float32")),
    "negative eps": ((X, MEAN, VAR), {"eps": -1.0}, ("eps=-1.0",)),
    "no momentum": ((X, MEAN, VAR), {"training": True, "momentum": None}, ("momentum=None",)),
}
FUNCTIONS = {"conv2d": CONV, "max_pool2d": MAX_POOL, "avg_pool2d": AVERAGE_POOL, "batch_norm": NORM}


@pytest.mark.parametrize(("function", "case"), [(f, name) for f, cases in FUNCTIONS.items() for name in cases], ids=str)
def test_refused_as_by_pytorch(function, case, launches):
    args, options, words = FUNCTIONS[function][case]
    with pytest.raises(Exception) as refused:  # noqa: PT011 - whatever PyTorch raises
        getattr(theirs, function)(*args, **options)
    with cnnfast.backend("kernels"), pytest.raises(type(refused.value)) as mine:
        getattr(ours, function)(*args, **options)
    assert type(mine.value) is type(refused.value)
    message = str(mine.value)
    assert message.startswith(f"{function}(): ")
    assert not [word for word in words if word not in message], message
    assert launches == []


def composition(input, weight, running_mean, running_var, bn_weight=None, bn_bias=None, training=False, momentum=0.1, eps=1e-5, **geometry):
    y = theirs.conv2d(input, weight, **geometry)
    return theirs.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)


SIX = torch.zeros(6), torch.ones(6)
FUSED = {
    "groups": ((X, W, *SIX), {"groups": 4}, ("groups=4", "[6, 4, 3, 3]")),
    "dtypes": ((X, W.half(), *SIX), {}, ("weight", "torch.float16")),
    "length of running_mean": ((X, W, MEAN, VAR), {}, ("running_mean", "[4]", "[6]")),
    "length of bn_weight": ((X, W, *SIX, zeros(5)), {}, ("bn_weight", "[5]", "[6]")),
    "no statistics": ((X, W, None, None), {}, ("running_mean", "evaluation")),
    "one value a channel": ((X[:1, :, :3, :3], W, *SIX), {"training": True}, ("[1, 6, 1, 1]",)),
    "negative eps": ((X, W, *SIX), {"eps": -1.0}, ("eps=-1.0",)),
    "same with stride": ((X, W, *SIX), {"stride": 2, "padding": "same"}, ("padding='same'", "stride=(2, 2)")),
}


@pytest.mark.parametrize("case", FUSED)
def test_conv_bn_act_refuses_what_its_parts_refuse(case, launches):
    args, options, words = FUSED[case]
    with pytest.raises(Exception) as refused:  # noqa: PT011 - whatever PyTorch raises
        composition(*args, **options)
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
        ({"residual": zeros(2, 6, 1, 1)}, ("residual", "[2, 6, 1, 1]", "[2, 6, 6, 6]")),
        ({"residual": zeros(2, 6, 6, 6).double()}, ("residual", "torch.float64", "torch.float32")),
        ({"algorithm": "winograd"}, ("algorithm='winograd'", "im2col")),
    ],
    ids=str,
)
def test_arguments_that_pytorch_does_not_have(options, words, launches):
    with pytest.raises(ValueError) as mine:  # noqa: PT011 - the words are checked
        ours.conv_bn_act(X, W, *SIX, **options)
    assert not [word for word in words if word not in str(mine.value)], str(mine.value)
    assert launches == []


def test_unknown_algorithm():
    with pytest.raises(ValueError, match="algorithm must be one of auto, direct, im2col, torch, but got algorithm='fft'"):
        ours.conv2d(X, W, algorithm="fft")


@pytest.mark.parametrize("shape", [(8, 8), (2, 4, 0, 8), (1, 2, 4, 8, 8)], ids=str)
def test_global_average_of_no_image(shape):
    with pytest.raises(RuntimeError, match=r"global_avg_pool2d\(\): expected input of size"):
        ours.global_avg_pool2d(zeros(*shape))
