"""What convert promises to the owner of a model: the same tensors, modes and numbers, once, twice and back."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import cnnfast
import cnnfast.nn as cnn
from tests.support.blocks import CONVOLUTIONS, Net, build, image
from tests.support.steps import assert_same_steps, converted, converted_and_original, noise, step

# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def test_not_in_place_is_a_new_tree_over_the_same_tensors(net, x):
    types = [type(m) for m in net.modules()]
    tensors = [*net.named_parameters(), *net.named_buffers()]
    original = copy.deepcopy(net)
    ours = cnnfast.convert(net)
    assert not {id(m) for m in ours.modules()} & {id(m) for m in net.modules()}
    for (name, t), (name_before, before) in zip(
        [*ours.named_parameters(), *ours.named_buffers()], tensors, strict=True
    ):
        assert name == name_before
        assert t is before
    assert [type(m) for m in net.modules()] == types
    assert list(ours.state_dict()) == list(original.state_dict())
    with cnnfast.trace() as trace:
        net(x)
    assert len(trace) == 0, "the given model is as it was"
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)


def test_in_place_is_the_same_tree(net, x):
    original, modules = copy.deepcopy(net), list(net.modules())
    tensors = [*net.parameters(), *net.buffers()]
    ours = cnnfast.convert(net, inplace=True)
    assert ours is net
    assert all(a is b for a, b in zip(ours.modules(), modules, strict=True))
    assert all(a is b for a, b in zip([*ours.parameters(), *ours.buffers()], tensors, strict=True))
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)


def test_gradients_are_those_of_the_given_model(net, x):
    """The very same Parameter objects: gradients of both models land in one place."""
    ours = cnnfast.convert(net)
    ours(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_state_dicts_load_both_ways(net, x):
    other = build(Net, x.device)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(noise(p))
    ours = cnnfast.convert(copy.deepcopy(net))
    assert str(ours.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert_same_steps(ours, copy.deepcopy(other), x, fused=CONVOLUTIONS)
    assert str(net.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    assert_same_steps(net, ours, x)


def test_an_optimizer_made_before_trains_the_converted_model(net, x):
    original = copy.deepcopy(net)
    models = {}
    for model in (net, original):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        trained = cnnfast.convert(model) if model is net else model
        for _ in range(3):
            optimizer.zero_grad()
            trained(x).square().mean().backward()
            optimizer.step()
        models[model] = trained
    assert_same_steps(models[net], models[original], x)


@pytest.mark.parametrize("when", ["before", "after"])
def test_requires_grad(net, x, when):
    """Frozen parameters get no gradient, whatever kernel would make one."""

    def freeze(model):
        for name, p in model.named_parameters():
            p.requires_grad_("conv2" in name or "layers.0.bn." in name)

    ours, original = converted_and_original(net, freeze, when)
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)
    assert step(ours, (x,), "train")["gradient of stem.0.weight"] is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_tied_parameters(net, x, when):
    """One tensor in two convolutions has one gradient, the sum."""

    def tie(model):
        model.layers[2].conv.weight = model.layers[0].conv.weight

    ours, original = converted_and_original(net, tie, when)
    assert ours.layers[2].conv.weight is ours.layers[0].conv.weight
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)


def test_shared_modules(x):
    def shared():
        model = Net()
        model.layers[2] = model.layers[0]
        return model

    model = build(shared, x.device)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert ours.layers[2] is ours.layers[0]
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)


def normalise_weights(model):
    parametrizations.weight_norm(model.stem[0])
    parametrizations.spectral_norm(model.layers[0].conv2)


def normalise_weights_by_hooks(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of functions that torch has deprecated, and people use
        nn.utils.weight_norm(model.stem[0])
        nn.utils.spectral_norm(model.layers[0].conv2)


def prune_weights(model):
    prune.l1_unstructured(model.stem[0], "weight", amount=0.5)
    prune.random_structured(model.layers[0].conv2, "weight", amount=1, dim=0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [normalise_weights, normalise_weights_by_hooks, prune_weights])
def test_computed_weights(net, x, change, when):
    """Parametrizations change a module's class, the older functions hook it: weights that are another tensor at every
    call.
    """

    def seeded(model):
        torch.manual_seed(0)
        change(model)

    ours, original = converted_and_original(net, seeded, when)
    assert list(ours.state_dict()) == list(original.state_dict())
    assert_same_steps(ours, original, x)


# ----------------------------------------------------------------------------------------------------------------------
# Norms, modes, randomness


def test_train_and_eval_after_conversion(net, x):
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    for mode in (True, False, True):
        assert ours.train(mode) is ours
        original.train(mode)
        assert {m.training for m in ours.modules()} == {mode}
        torch.testing.assert_close(ours(x), original(x), rtol=1e-12, atol=1e-12)
    assert ours.eval() is ours
    assert not ours.layers[0].bn.training


@pytest.mark.parametrize("which", ["all", "one", "all_but_one"])
def test_frozen_batch_norm(net, x, which):
    """Norms in eval while the model trains, as detectors do: by their flag, without telling anybody."""
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    for model in (original, ours):
        model.train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in {"all": norms, "one": norms[:1], "all_but_one": norms[1:]}[which]:
            norm.eval()
            norm.requires_grad_(False)
        model.train = lambda mode=True, model=model: model  # step() shall not thaw them
    assert_same_steps(ours, original, x)


@pytest.mark.parametrize("when", ["before", "after"])
def test_synchronised_batch_norm(net, x, when):
    """Made by PyTorch's own conversion, which takes no notice of ours; without a process group it is batch norm."""
    original = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    if when == "before":
        ours = cnnfast.convert(nn.SyncBatchNorm.convert_sync_batchnorm(net))
    else:
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(cnnfast.convert(net))
    assert type(ours.stem[1]) is (cnn.SyncBatchNorm if when == "before" else nn.SyncBatchNorm)
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS if when == "before" else None)


def test_dropout_draws_the_same_numbers(quick, x):
    """From the same seed; and in eval, and in the other mode after a change, what it should."""
    net = build(functools.partial(Net, 0.5), quick)
    converted(net, x)
    converted(net.train(), x)


# ----------------------------------------------------------------------------------------------------------------------
# Once, twice, and back


def test_converting_twice_is_converting_once(net, x):
    once = cnnfast.convert(net)
    twice = cnnfast.convert(once)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert [type(m).__mro__ for m in twice.modules()] == [type(m).__mro__ for m in once.modules()]
    assert all(a is b for a, b in zip(twice.parameters(), net.parameters(), strict=True))
    assert cnnfast.report(twice).to_json() == cnnfast.report(once).to_json()
    assert cnnfast.convert(once, inplace=True) is once
    assert_same_steps(once, copy.deepcopy(net), x, fused=CONVOLUTIONS)
    assert_same_steps(twice, copy.deepcopy(net), x, fused=CONVOLUTIONS)


def test_two_conversions_of_one_model(net, x):
    a, b = cnnfast.convert(net), cnnfast.convert(net)
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()], "one class for one kind of container"
    assert_same_steps(a, copy.deepcopy(net), x, fused=CONVOLUTIONS)


def test_a_part_is_converted(net, x):
    """A converted module in a model that is not."""
    original = copy.deepcopy(net)
    net.layers = cnnfast.convert(net.layers)
    assert_same_steps(net, original, x, fused=4)
    assert_same_steps(cnnfast.convert(net), original, x, fused=CONVOLUTIONS)


@pytest.mark.parametrize("inplace", [False, True])
def test_revert(net, x, inplace):
    kinds = [type(m) for m in net.modules()]
    state = [set(vars(m)) for m in net.modules()]
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    back = cnnfast.revert(ours, inplace=inplace)
    assert (back is ours) == inplace
    assert [type(m) for m in back.modules()] == kinds
    assert [set(vars(m)) for m in back.modules()] == state, "nothing of ours is left in an instance"
    assert all(a is b for a, b in zip(back.parameters(), net.parameters(), strict=True))
    with cnnfast.trace() as trace:
        back(x)
    assert len(trace) == 0
    assert_same_steps(back, original, x)
    assert_same_steps(cnnfast.convert(back), original, x, fused=CONVOLUTIONS)
    if not inplace:
        assert_same_steps(ours, original, x, fused=CONVOLUTIONS)


def test_revert_of_what_was_never_converted(net, x):
    assert [type(m) for m in cnnfast.revert(net).modules()] == [type(m) for m in net.modules()]
    assert cnnfast.revert(net, inplace=True) is net
    assert_same_steps(cnnfast.revert(net), copy.deepcopy(net), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cnnfast.convert("resnet50"), "model"),
        (lambda: cnnfast.convert(torch.relu), "model"),
        (lambda: cnnfast.revert(None), "model"),
        (lambda: cnnfast.report([]), "model"),
        (lambda: cnnfast.convert(nn.ReLU(), memory_format="nhwc"), "memory_format"),
        (lambda: cnnfast.convert(nn.ReLU(), memory_format=torch.channels_last_3d), "memory_format"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    "leaf", [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)]
)
def test_a_single_layer(leaf, quick, x):
    leaf = copy.deepcopy(leaf).double().to(quick)
    ours = converted(leaf, x)
    assert isinstance(ours, type(leaf))
    assert type(ours).__name__ == type(leaf).__name__
    assert repr(ours) == repr(leaf)


# ----------------------------------------------------------------------------------------------------------------------
# Memory format, dtype, device


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_no_memory_format_keeps_strides(net, x, fmt):
    """Of the weights, and of the output for either input (assert_same_steps compares strides)."""
    net = net.to(memory_format=fmt)
    strides = [p.stride() for p in net.parameters()]
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    assert [p.stride() for p in ours.parameters()] == strides
    for part, theirs in ((ours, original), (ours.stem, original.stem), (ours.layers[0], original.layers[0])):
        image_ = x if part is not ours.layers[0] else image().to(x.device)
        assert_same_steps(part, theirs, image_, modes=("no_grad",))
        assert_same_steps(part, theirs, image_.contiguous(memory_format=torch.channels_last), modes=("no_grad",))


@pytest.mark.parametrize("inplace", [False, True])
def test_channels_last(net, x, inplace):
    """Weights are converted where they are: the same Parameter objects, for the optimizer's sake."""
    parameters = list(net.parameters())
    original = copy.deepcopy(net).to(memory_format=torch.channels_last)
    ours = cnnfast.convert(net, inplace=inplace, memory_format=torch.channels_last)
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in ours.parameters() if p.dim() == 4)
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)
    assert ours.stem(x).is_contiguous(memory_format=torch.channels_last)
    assert "channels_last" not in str(cnnfast.report(ours))


def test_moves_after_conversion(net, x):
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    assert_same_steps(ours.float(), original.float(), x.float(), tolerance=1e-5)
    ours.load_state_dict(original.state_dict())
    assert_same_steps(ours.double(), original.double(), x, fused=CONVOLUTIONS)
    ours, original = (model.to(memory_format=torch.channels_last) for model in (ours, original))
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)
    assert ours.to("meta")(x.to("meta")).shape == (2, 3)
