"""Who misspells a name is told which one is near, and nobody is told a wrong one."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnfast import spelling

NAMES = ["auto", "direct", "im2col", "torch"]
ACTIVATIONS = ["relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish"]


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("im2cols", NAMES, ["im2col"]),
        ("IM2COL", NAMES, ["im2col"]),
        ("direkt", NAMES, ["direct"]),
        ("pytorch", NAMES, ["torch"]),
        ("winograd", NAMES, []),
        ("", NAMES, []),
        ("SiLU", ACTIVATIONS, ["silu"]),
        ("leakyrelu", ACTIVATIONS, ["leaky_relu"]),
        ("LeakyReLU", ACTIVATIONS, ["leaky_relu"]),
        ("hard_swish", ACTIVATIONS, ["hardswish"]),
        ("gelu-tanh", ACTIVATIONS, ["gelu_tanh"]),
        ("act", ["activation", "activation_arg"], ["activation"]),
        ("in_ch", ["in_channels", "out_channels"], ["in_channels"]),
        ("ac", ["activation"], []),  # two letters abbreviate nothing
    ],
)
def test_near(word, known, found):
    assert spelling.near(word, known) == found


def test_the_nearest_comes_first_and_no_more_than_asked_for():
    assert spelling.near("resnet5", ["resnet18", "resnet50", "vgg16", "resnet"], most=2) == ["resnet50", "resnet"]


def test_a_synonym_comes_before_a_word_that_is_near():
    assert spelling.did_you_mean("Swish", ACTIVATIONS, {"swish": "silu"}) == ". Did you mean 'silu'?"
    assert spelling.did_you_mean("identity", ACTIVATIONS, {"identity": None}) == ". Did you mean None?"
    assert spelling.did_you_mean("relu_6", ACTIVATIONS, {"swish": "silu"}) == ". Did you mean 'relu6'?"
    assert spelling.did_you_mean("fft", NAMES) == ""


def test_values_are_written_as_in_a_call():
    assert spelling.quoted((None, "relu", "silu")) == "None, 'relu' or 'silu'"
    assert spelling.quoted(["relu"]) == "'relu'"


@spelling.keywords_explained
def layer(in_channels: int, out_channels: int = 8, *, activation: str = "relu", eps: float = 0.1) -> int:
    """A layer."""
    if eps < 0:
        raise TypeError("another error")
    return in_channels


class Layer:
    @spelling.keywords_explained
    def __init__(self, kernel_size: int) -> None:
        self.kernel_size = kernel_size


@spelling.keywords_explained
def forwarding(**options: int) -> int:
    return layer(1, **options)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: layer(1, act="relu"), "layer() got an unexpected keyword argument 'act'. Did you mean 'activation'?"),
        (lambda: layer(1, epsilon=1), "layer() got an unexpected keyword argument 'epsilon'. Did you mean 'eps'?"),
        (lambda: layer(1, activation="relu", in_ch=1), "'in_ch'. Did you mean 'in_channels'?"),
        (
            lambda: layer(1, norm_layer=int),
            "'norm_layer'. Its arguments are in_channels, out_channels, activation, eps",
        ),
        (lambda: Layer(kernel=3), "Layer() got an unexpected keyword argument 'kernel'. Did you mean 'kernel_size'?"),
        # "slope" stands for an argument that this function does not have
        (lambda: Layer(slope=3), "Layer() got an unexpected keyword argument 'slope'. Its arguments are kernel_size"),
        (lambda: forwarding(act=1), "layer() got an unexpected keyword argument 'act'. Did you mean 'activation'?"),
        (lambda: layer(1, eps=-1), "another error"),
        (lambda: layer(), "layer() missing 1 required positional argument: 'in_channels'"),
        (lambda: layer(1, 2, 3), "layer() takes from 1 to 2 positional arguments but 3 were given"),
    ],
)
def test_an_unknown_keyword_is_explained_and_other_errors_stay(call, says):
    with pytest.raises(TypeError) as refused:
        call()
    assert str(refused.value).endswith(says)


def test_what_is_decorated_keeps_its_name_its_signature_and_its_results():
    assert (layer.__name__, layer.__doc__) == ("layer", "A layer.")
    assert list(inspect.signature(layer).parameters) == ["in_channels", "out_channels", "activation", "eps"]
    assert list(inspect.signature(Layer).parameters) == ["kernel_size"]
    assert (layer(3, eps=1.0), Layer(5).kernel_size) == (3, 5)


@pytest.mark.parametrize(
    ("value", "word"),
    [(nn.SiLU, "SiLU"), (nn.SiLU(), "SiLU"), (torch.relu, "relu"), (F.silu, "silu"), ("x", "x"), (None, "None")],
)
def test_a_class_an_object_and_a_function_stand_for_their_names(value, word):
    assert spelling.word_for(value) == word
