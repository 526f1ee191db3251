"""The names of activations: one list for type checkers and for what is allowed at run time, and which one was meant."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnfast import activations, functional
from cnnfast import nn as cnn

NAMES = (
    "None, 'relu', 'leaky_relu', 'relu6', 'gelu', 'gelu_tanh', 'silu', 'hardswish', 'mish', 'hardsigmoid' or 'prelu'"
)


def test_names_are_listed_once():
    assert set(activations.ACTIVATIONS) == {None, *get_args(activations.ActivationName)}
    assert set(activations.OTHER_ACTIVATION_NAMES.values()) <= set(activations.ACTIVATION_NAMES)
    assert not set(activations.OTHER_ACTIVATION_NAMES) & set(activations.ACTIVATIONS)
    assert not set(activations.NOT_COMPUTED) & {*activations.OTHER_ACTIVATION_NAMES, *activations.ACTIVATIONS}


@pytest.mark.parametrize(
    ("activation", "meant"),
    [
        ("swish", "'silu'"),
        ("SiLU", "'silu'"),
        ("leakyrelu", "'leaky_relu'"),
        ("LeakyReLU", "'leaky_relu'"),
        ("lrelu", "'leaky_relu'"),
        ("hard_swish", "'hardswish'"),
        ("hswish", "'hardswish'"),
        ("hard_sigmoid", "'hardsigmoid'"),
        ("gelu_new", "'gelu_tanh'"),
        ("gelu_pytorch_tanh", "'gelu_tanh'"),
        ("Relu_6", "'relu6'"),
        ("linear", "None"),
        ("identity", "None"),
        ("none", "None"),
        ("", "None"),
        (nn.ReLU, "'relu'"),
        (nn.ReLU(), "'relu'"),
        (torch.relu, "'relu'"),
        (F.hardswish, "'hardswish'"),
        (nn.Mish(), "'mish'"),
        (nn.PReLU(), "'prelu'"),
        (nn.GELU(), "'gelu'"),
        (nn.GELU(approximate="tanh"), "'gelu_tanh'"),
        (nn.Identity(), "None"),
        ("winograd", None),
        (["relu"], None),
        (3, None),
    ],
)
def test_which_name_was_meant(activation, meant):
    says = f"activation must be {NAMES}, but got activation={activation!r}" + (
        f". Did you mean {meant}?" if meant else ""
    )
    x, w, v = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1), torch.ones(2)
    calls = {
        "ConvBNAct": lambda: cnn.ConvBNAct(2, 2, 1, activation=activation),
        "conv_bn_act": lambda: functional.conv_bn_act(x, w, v, v, activation=activation),
        "conv_act": lambda: functional.conv_act(x, w, activation=activation),
        "bn_act": lambda: functional.bn_act(x, v, v, activation=activation),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="activation") as refused:
            call()
        assert str(refused.value) == f"{name}(): {says}"


@pytest.mark.parametrize("activation", ["elu", "Sigmoid", nn.Tanh(), F.softplus, "quick_gelu", "SELU"])
def test_what_no_kernel_computes_is_not_taken_for_what_is_spelt_like_it(activation):
    with pytest.raises(ValueError, match="activation") as refused:
        cnn.ConvBNAct(2, 2, 1, activation=activation)
    assert str(refused.value) == (
        f"ConvBNAct(): activation must be {NAMES}, but got activation={activation!r}, which no kernel computes: "
        "give None, and apply it to the result"
    )
