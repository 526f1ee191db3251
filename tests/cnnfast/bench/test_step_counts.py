"""What a training step moves and keeps, by hand for one layer, and by layer for networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.explained import H200, LAST, Net, image

pytest.importorskip("triton")
from cnnfast.bench.step_counts import LayerCount, count_step
from cnnfast.bench.training_traffic import saved_when_compiled, training_traffic
from cnnfast.ops.registry import OPERATORS

# Bytes of a layer of 4 images of 8 x 8 in bfloat16: its input and filters, all of its image, a float32 and a bfloat16 a
# channel, and the sums of four tiles.
X, W, Y, SUM, PARAMETER, SLOTS = 4 * 64 * 32 * 2, 16 * 32 * 2, 4 * 64 * 16 * 2, 16 * 4, 16 * 2, 4 * 2 * 16 * 4
BATCHES = 2 * 8  # how many batches a norm has seen, read and written


def layer(relu: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16), relu)
        x = torch.empty(4, 32, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    return model.to(torch.bfloat16, memory_format=LAST), x


def test_the_bytes_of_a_layer_by_our_kernels():
    found = count_step(*layer(nn.ReLU()), None, "kernels", gpu=H200)
    of_channels = 2 * SUM + 2 * PARAMETER  # mean, variance, gamma and beta
    combined = SLOTS + 2 * SUM
    assert found.kernels == {
        "tma_fprop_kernel": 1, "combine_kernel": 2, "update_running_kernel": 1, "normalize_kernel": 1,
        "gradient_sums_kernel": 1, "normalize_backward_kernel": 1, "tma_wgrad_kernel": 1,
    }  # fmt: skip
    assert found.operators == {"add_": 1, "to": 2}  # the gradients of gamma and beta are summed in float32
    forward = (2 * SUM + 2 * PARAMETER) + (2 * Y + of_channels)
    backward = (2 * Y + of_channels + SLOTS) + combined + (3 * Y + of_channels + 2 * SUM) + 2 * (SUM + PARAMETER)
    assert found.layers == (
        LayerCount("", 1, BATCHES, 0, 0),
        LayerCount("0", 3, (X + W + Y + SLOTS) + combined, X + Y + W, X + Y + 2 * SUM),
        LayerCount("1", 7, forward, backward, 0),
    )


def test_the_bytes_of_a_layer_by_pytorch():
    found = count_step(*layer(nn.ReLU()), None, "torch", converted=False, gpu=H200)
    # A norm reads running statistics, does not say that it writes them, and writes its own, which its gradients read.
    norm = 2 * Y + 4 * PARAMETER + 2 * SUM
    gradients = 3 * Y + (3 + 2) * PARAMETER + 2 * SUM
    assert found.layers == (
        LayerCount("0", 2, X + W + Y, Y + X + W + W, X),
        LayerCount("1", 3, norm + BATCHES, gradients, Y + 2 * SUM),
        LayerCount("2", 2, 2 * Y, 3 * Y, Y),
    )
    assert not found.kernels


@pytest.mark.parametrize("backend", ["auto", "prefer kernels"])
def test_layers_of_a_network_add_up_to_its_step(backend):
    with torch.device("meta"):
        model: Any = Net().bfloat16()
        model = model.to(memory_format=LAST)
    found = count_step(model, image().contiguous(memory_format=LAST), None, backend, gpu=H200)
    layers = {row.layer: row for row in found.layers}
    assert len(layers) == len(found.layers)
    assert sum(row.launches for row in found.layers) == found.launches
    assert sum(row.moved_bytes for row in found.layers) == found.moved_bytes
    assert found.forward_bytes + found.backward_bytes == found.moved_bytes
    # Every layer with parameters moves something in both passes, whichever operator it is a part of.
    names = {name for name, module in model.named_modules() if module._parameters and not list(module.children())}
    assert all(layers[name].forward_bytes and layers[name].backward_bytes for name in names)


def test_a_step_is_counted_once_whoever_composes_its_operators(torchvision):
    """By launches, which a network has one by one: parts of a layer's operator are not counted with it again."""
    with torch.device("meta"):
        model = torchvision.models.resnet18().bfloat16().to(memory_format=LAST)
        x = torch.empty(2, 3, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    found = count_step(model, x, None, "kernels", gpu=H200)
    gradients = {name: n for name, n in found.kernels.items() if name.endswith("wgrad_kernel")}
    assert found.kernels["update_running_kernel"] == sum(gradients.values()) == 20
    rows = {row.layer: row for row in found.layers}
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert all(rows[name].backward_bytes > 0 for name in convolutions)


def test_a_gradient_is_its_operators_whatever_its_first_part_is_of(monkeypatch):
    """Here the norm's statistics are updated before the convolution runs."""
    model, x = layer(nn.ReLU())
    right = {row.layer: row.backward_bytes for row in count_step(model, x, None, "kernels", gpu=H200).layers}
    operator = OPERATORS["conv_bn_act_training"]

    def norm_first(x, w, bias, mean, var, *rest):
        own = torch.empty(16, dtype=torch.float32, device="meta")
        torch.ops.cnnfast.update_running(mean, var, own, own, 0.1, 4)
        return operator.implementation(x, w, bias, mean, var, *rest)

    monkeypatch.setitem(OPERATORS, "conv_bn_act_training", operator._replace(implementation=norm_first))
    found = count_step(model, x, None, "kernels", gpu=H200)
    assert found.kernels["update_running_kernel"] == 2
    assert {row.layer: row.backward_bytes for row in found.layers} == right


def test_inputs_may_be_several_and_what_is_trained_must_be_something():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x, y):
            return self.conv(x) + y

    model = Sum()
    found = count_step(model, (torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4)), None, "torch", converted=False)
    assert found.operators["add"] == 1
    with pytest.raises(RuntimeError, match="Sum has nothing to train: no parameter of it wants a gradient"):
        count_step(model.requires_grad_(False), (torch.zeros(1, 8, 4, 4),) * 2, None)
    with pytest.raises(RuntimeError, match="Sum has nothing to train"):
        training_traffic(model, (torch.zeros(1, 8, 4, 4),) * 2, gpu=H200)


def test_what_a_compiled_layer_keeps():
    """Its input, the convolution's result, statistics, and no more than a byte a value of the activation: the norm is
    computed again.
    """
    model, x = layer(nn.ReLU())
    saved = saved_when_compiled(model, (x,))
    assert X + Y <= saved <= X + Y + Y // 2 + 6 * SUM
    assert count_step(model, x, None, "torch", converted=False).saved_bytes == X + 2 * Y + 2 * SUM


def test_a_model_stays_as_it_is_and_what_cannot_be_traced_is_told():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            if type(x) is not torch.Tensor:
                raise ValueError("no tracing\nhere")
            return self.conv(x)

    model = Branching().eval()
    x = torch.zeros(2, 8, 4, 4)
    traffic = training_traffic(model, (x,), gpu=H200, dtype="bf16")
    assert model.conv.weight.dtype == torch.float32
    assert not model.training
    assert model.conv.weight.grad is None
    assert traffic.eager.saved_bytes == x.numel() * 2
    assert (traffic.compiled_bytes, traffic.reason) == (None, "ValueError: no tracing")
