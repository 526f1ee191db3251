"""Parts that are not trained: no gradient, no statistics, nothing kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnnfast
import cnnfast.nn as cnn
from cnnfast.bench.step_counts import StepCount, count_step
from cnnfast.training import Module
from tests.support.trainable import small_fit, small_net


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of tensors that a forward keeps for backward, parameters and buffers aside; memory that two share counts once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(t)  # so that no other tensor gets its memory meanwhile
        return t

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum().backward()
    return sum(kept.values())


def module(model: nn.Module, frozen: Any, size: int = 8) -> Module:
    converted = cnnfast.convert(model, inplace=True)
    return Module(converted, classes=10, augment=cnn.Augment(size, mean=0.5, std=0.5), frozen=frozen)


@pytest.mark.parametrize("backend", ["torch", "kernels"])
def test_a_frozen_backbone_keeps_nothing_for_backward(backend, device):
    with cnnfast.backend(backend):
        x = torch.randn(3, 1, 8, 8, device=device)
        whole, part = (module(small_net(), frozen).to(device) for frozen in ((), ("backbone",)))
        all_bytes, kept = saved_bytes(whole, x), saved_bytes(part, x)
    # The linear layer keeps its input, [3, 32] float32, and dropout before it which numbers it has dropped.
    assert kept <= 3 * 32 * (4 + 1) < all_bytes
    assert {name for name, p in part.named_parameters() if p.grad is not None} == {"model.fc.weight", "model.fc.bias"}


def test_a_frozen_resnet50_keeps_a_fiftieth(torchvision, device):
    x = torch.randn(2, 3, 64, 64, device=device)
    whole, part = (module(torchvision.models.resnet50(), frozen, 64).to(device) for frozen in ((), ("backbone",)))
    assert saved_bytes(part, x) * 50 <= saved_bytes(whole, x)


def launched(build: Any, frozen: Any) -> StepCount:
    x = torch.empty(2, 3, 64, 64, device="meta").to(memory_format=torch.channels_last)
    return count_step(module(build(num_classes=10), frozen, 64), x, backend="kernels")


def test_a_frozen_resnet50_runs_its_forward_alone(torchvision):
    """No kernel of backward but the head's, which is PyTorch's, and none of statistics."""
    pytest.importorskip("triton")
    whole, part = (launched(torchvision.models.resnet50, frozen) for frozen in ((), ("backbone",)))
    assert part.kernels == {"conv_fprop_kernel": 53, "max_pool_kernel": 1, "plane_mean_kernel": 1}
    assert part.operators == {"addmm": 1, "mm": 1, "sum": 2, "ones_like": 1}
    assert whole.operators["mm"] == 2  # the gradients of the head's weights, and of its input
    for name in ("conv_wgrad_kernel", "update_running_kernel"):
        assert whole.kernels[name] == 53
    # those of the 32 inner layers of blocks come from the gradients of the convolutions above
    assert whole.kernels["gradient_sums_kernel"] == 53 - 32
    assert (whole.kernels["normalize_kernel"], whole.kernels["normalised_max_pool_kernel"]) == (52, 1)
    assert part.saved_bytes * 50 <= whole.saved_bytes


def test_backward_ends_where_the_frozen_part_begins(torchvision):
    """Of ResNet-18's 20 convolutions 15 are trained, in layer2 to layer4; two of these have a frozen input."""
    pytest.importorskip("triton")
    found = launched(torchvision.models.resnet18, ("conv1", "bn1", "layer1")).kernels
    assert (found["conv_fprop_kernel"], found["conv_wgrad_kernel"], found["conv_dgrad_kernel"]) == (20, 15, 13)
    assert found["update_running_kernel"] == 15
    assert found["gradient_sums_kernel"] == 15 - 6  # a block's inner layer needs none
    assert "max_pool_backward_kernel" not in found


def test_frozen_batch_norms_stay_as_they_are():
    model = small_net()
    with torch.no_grad():
        model.stem[1].running_mean.fill_(0.5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small_fit(model, frozen=("stem",), epochs=2)
    after = model.state_dict()
    changed = {name for name, t in after.items() if not torch.equal(t, before[name])}
    assert changed == {name for name in after if not name.startswith("stem.")}
    assert after["bn.num_batches_tracked"] == 2 * 5


def test_train_leaves_frozen_parts_in_eval():
    trained = module(small_net(), ("stem", "bn"))
    for mode in (True, False, True):
        trained.train(mode)
        assert trained.training == mode
        assert not any(m.training for m in (*trained.model.stem.modules(), trained.model.bn))
        assert trained.model.fc.training == mode


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc"), ("squeezenet1_1", "classifier.1")])
def test_all_but_the_head_is_frozen(torchvision, name, head):
    trained = module(getattr(torchvision.models, name)(), ("backbone",), 64)
    assert {name for name, p in trained.model.named_parameters() if p.requires_grad} == {
        f"{head}.{p}" for p in ("weight", "bias")
    }
    assert [name for name, m in trained.model.named_modules() if m.training and not [*m.children()]] == [head]


def test_wrong_names_are_told():
    with pytest.raises(ValueError, match=r"frozen names no part 'stemm': .*stem, conv, bn.*Did you mean 'stem'"):
        module(small_net(), ("stemm",))
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        small_fit(frozen=("backbone", "fc"))
