"""explain: the rows of a step, whom each belongs to, and totals that another way of counting finds, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cnnfast
from cnnfast import calls, dispatch
from cnnfast.ops.registry import OPERATORS
from cnnfast_kernels import devices, launch

H200 = devices.Gpu("NVIDIA H200", 90)


class Replaying(TorchDispatchMode):
    """Operators of cnnfast do on meta tensors what they would do on a GPU's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        _, ours, name = func._schema.name.partition("cnnfast::")
        if not ours:
            return func(*args, **(kwargs or {}))
        return OPERATORS[name].implementation(*(tuple(a) if isinstance(a, list) else a for a in args))


def counted(model, x, train):
    """(launches, bytes of their tensors) of a step of the converted model, which lies on meta."""
    moved = []

    def note(kernel, grid, arguments, options):
        tensors = [getattr(argument, "base", argument) for argument in arguments]
        moved.append(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)))

    model = cnnfast.convert(model, memory_format=torch.channels_last).train(train)
    x = x.contiguous(memory_format=torch.channels_last)
    with dispatch.backend("kernels"), calls.standing_for(H200), launch.substituted(note), Replaying():
        with torch.set_grad_enabled(train):
            y = model(x)
        if train:
            y.backward(torch.ones_like(y))
    return len(moved), sum(moved)


@pytest.mark.parametrize("train", [True, False])
def test_resnet50_at_batch_256(train):
    """All of it within seconds, since nothing is computed."""
    with torch.device("meta"):
        model, x = cnnfast.models.resnet50().bfloat16(), torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
    found = cnnfast.explain(model, x, gpu="h200", train=train)
    assert (found.launches, found.bytes) == counted(model, x, train)
    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    convolutions = [row for row in found.rows if row.operation in ("fprop", "dgrad", "wgrad")]
    for operation in ("fprop", "dgrad", "wgrad") if train else ("fprop",):
        missing = {"conv1"} if operation == "dgrad" else set()  # nobody wants the gradient of the image
        assert sorted(r.layer for r in convolutions if r.operation == operation) == sorted(layers - missing)
        assert all(row.backward == (operation != "fprop") for row in convolutions if row.operation == operation)
    assert all(row.modelled_us >= row.roofline_us > 0 for row in convolutions)
    assert sum(total.modelled_us for total in found.totals.values()) == pytest.approx(
        sum(row.modelled_us for row in found.rows)
    )
