"""Hooks on a converted model: they see and do what they would have seen and done."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from tests.support.blocks import CONVOLUTIONS
from tests.support.steps import assert_same_steps, converted_and_original, fusions


class Recorder:
    """Hooks that keep what they see."""

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []

    def forward(self, module, inputs, output):
        self.seen += [*inputs, output]

    def pre(self, module, inputs):
        self.seen += inputs

    def backward(self, module, gradients_in, gradients_out):
        self.seen += [*gradients_in, *gradients_out]

    def backward_pre(self, module, gradients_out):
        self.seen += gradients_out


REGISTER = {
    "forward": lambda module, recorder: module.register_forward_hook(recorder.forward),
    "pre": lambda module, recorder: module.register_forward_pre_hook(recorder.pre),
    "backward": lambda module, recorder: module.register_full_backward_hook(recorder.backward),
    "backward_pre": lambda module, recorder: module.register_full_backward_pre_hook(recorder.backward_pre),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize(
    "name", ["stem.0", "stem.1", "stem", "layers.0.conv", "layers.0.bn2", "layers.0.relu", "layers.0", ""]
)
def test_a_hook_sees_pytorchs_tensors(net, x, name, kind, when):
    """On each member of a fusion, on its container, on the whole; registered before conversion or after. Once removed,
    all is fused.
    """
    seen, handles = {}, {}

    def watch(model):
        recorder = Recorder()
        handle = REGISTER[kind](model.get_submodule(name), recorder)
        seen[len(seen)], handles[len(handles)] = recorder.seen, handle

    ours, original = converted_and_original(net, watch, when)
    theirs, mine = seen[0], seen[1]
    traces = assert_same_steps(ours, original, x, modes=("train",))
    assert len(theirs) == len(mine) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    swallowed = name in ("stem.0", "stem.1", "layers.0.conv", "layers.0.bn2", "layers.0.relu")
    assert fusions(traces["train"]) == CONVOLUTIONS - swallowed * (1 if name.startswith("stem") else 2)
    if when == "after":
        for handle in handles.values():
            handle.remove()
        assert_same_steps(ours, original, x, fused=CONVOLUTIONS)


def test_a_hook_that_changes_the_output(net, x):
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    for model in (original, ours):
        model.layers[0].conv.register_forward_hook(lambda module, inputs, output: output * 2)
        model.layers[0].bn2.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    assert_same_steps(ours, original, x)


def test_global_hooks(net, x):
    """As profilers and debuggers register them: they see every module, fused or not."""
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    names = []
    for model in (original, ours):
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, seen=seen: seen.append(type(module).__name__)
        )
        model(x)
        handle.remove()
        names.append(seen)
    assert names[0] == names[1]
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)


def test_hooks_of_tensors(net, x):
    """On a parameter, and what has been accumulated into it."""
    seen: list[Tensor] = []
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    for model in (original, ours):
        model.stem[0].weight.register_hook(lambda grad: grad * 2)
        model.layers[0].bn.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)
    assert len(seen) == 4
    torch.testing.assert_close(seen[1::2], seen[::2], rtol=1e-10, atol=1e-10)
