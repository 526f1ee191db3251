"""Parametrized tensors in a converted model: registered and removed before the conversion and after it, as PyTorch does
it.
"""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import cnnfast
from tests.support.blocks import CHANNELS, Block, Net, block, build, image
from tests.support.steps import assert_same_steps, converted_and_original, fusions

# ----------------------------------------------------------------------------------------------------------------------
# Which layers, and which parametrizations


class OwnConv1d(nn.Conv1d):
    pass


class OwnConv2d(nn.Conv2d):
    def fan_in(self) -> int:
        return self.weight[0].numel()


class OwnConvTranspose2d(nn.ConvTranspose2d):
    pass


class OwnNorm(nn.BatchNorm2d):
    pass


class OwnForward(nn.Conv2d):
    """Keeps its class when it is converted."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


LAYERS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: lambda kind=kind: kind(CHANNELS) if issubclass(kind, nn.BatchNorm2d) else kind(CHANNELS, CHANNELS, 3)
    for kind in (
        nn.Conv1d,
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.BatchNorm2d,
        OwnConv1d,
        OwnConv2d,
        OwnConvTranspose2d,
        OwnNorm,
        OwnForward,
        nn.Conv3d,  # no class of ours takes its place
    )
}


class Doubled(nn.Module):
    """Counts how often the tensor is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def forward(self, w: Tensor) -> Tensor:
        self.computed += 1
        return w * 2

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


class Positive(nn.Module):
    """Without an inverse: what was the tensor is now what it is computed from."""

    def forward(self, w: Tensor) -> Tensor:
        return F.softplus(w)


REGISTER: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "doubled": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "positive": lambda module: parametrize.register_parametrization(module, "weight", Positive()),
}
CASES = [(layer, kind) for layer in LAYERS for kind in REGISTER if kind != "orthogonal" or "Norm" not in layer]


def example(layer: str) -> Tensor:
    axes = 1 if "1d" in layer else 3 if "3d" in layer else 2
    return torch.randn(2, CHANNELS, *(5,) * axes, dtype=torch.float64)


def seeded(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    """The same random numbers for both models: spectral_norm starts from such."""

    def changed(model: nn.Module) -> None:
        torch.manual_seed(0)
        change(model)

    return changed


def shape(model: nn.Module) -> list[Any]:
    """What a user can ask of the modules without calling them."""
    return [
        (
            name,
            type(m).__name__,
            parametrize.is_parametrized(m),
            sorted(vars(m)),
            list(m._modules),
            re.sub("  # .*", "", repr(m)),
        )
        for name, m in model.named_modules()
    ] + [(name, tuple(t.shape)) for name, t in model.state_dict().items()]


def assert_same(ours: nn.Module, original: nn.Module, x: Tensor, **options: Any) -> None:
    assert shape(ours) == shape(original)
    assert_same_steps(ours, original, x, **options)
    assert loaded(ours, original.state_dict()) == loaded(original, ours.state_dict())


def loaded(model: nn.Module, state: dict[str, Tensor]) -> str:
    """What load_state_dict says. PyTorch's remove_spectral_norm forgets a hook, so that nothing can be loaded
    after it.
    """
    try:
        return str(model.load_state_dict(state))
    except RuntimeError as error:
        return str(error)


def removals(kind: str) -> Iterator[bool]:
    """leave_parametrized; a weight that is computed from two tensors cannot go back."""
    yield True
    if kind != "weight_norm":
        yield False


# ----------------------------------------------------------------------------------------------------------------------
# One layer


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("layer", "kind"), CASES)
def test_registered_and_removed(layer, kind, when, quick):
    """Each of them `before` the conversion or `after` it, then removed in either way, and back in PyTorch's classes."""
    x = example(layer).to(quick)
    for leave in removals(kind):
        model = build(LAYERS[layer], quick)
        ours, original = converted_and_original(model, seeded(REGISTER[kind]), when)
        base = type(model).__mro__[1] if when == "before" else type(model)
        assert isinstance(ours, base)
        assert issubclass(parametrize.type_before_parametrizations(ours), base)
        assert_same(ours, original, x)
        assert_same(copy.deepcopy(ours), copy.deepcopy(original), x)
        assert_same(cnnfast.revert(ours), original, x)
        for m in (ours, original):
            parametrize.remove_parametrizations(m, "weight", leave_parametrized=leave)
        assert_same(ours, original, x)
        assert type(cnnfast.revert(ours)) is type(original) is base
        assert type(ours) is type(cnnfast.convert(original))


@pytest.mark.parametrize("kind", REGISTER)
def test_removed_after_revert(kind, quick):
    x = example("Conv2d").to(quick)
    ours, original = converted_and_original(build(LAYERS["Conv2d"], quick), seeded(REGISTER[kind]), "before")
    back = cnnfast.revert(cnnfast.convert(cnnfast.revert(ours), inplace=True), inplace=True)
    for m in (back, original):
        parametrize.remove_parametrizations(m, "weight")
    assert type(back) is nn.Conv2d
    assert_same(back, original, x)
    assert parametrize.is_parametrized(ours), "that of the given model stays"
    ours(x)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layer", LAYERS)
def test_several_on_one_module(layer, when, quick):
    """A second one of the same tensor and one of another; they are removed one by one."""
    x = example(layer).to(quick)

    def first(module):
        parametrize.register_parametrization(module, "weight", Doubled())

    def more(module):
        parametrize.register_parametrization(module, "weight", Positive())
        parametrize.register_parametrization(module, "bias", Doubled())

    ours, original = converted_and_original(build(LAYERS[layer], quick), first, when)
    more(ours)
    more(original)
    assert_same(ours, original, x)
    assert_same(cnnfast.convert(ours), original, x)
    for name in ("weight", "bias"):
        for m in (ours, original):
            parametrize.remove_parametrizations(m, name)
        assert_same(ours, original, x)
        assert_same(cnnfast.revert(ours), original, x)
    for m in (ours, original):
        m.weight = nn.Parameter(m.weight.detach() * 3)
    assert_same(ours, original, x)


def test_an_assigned_weight(quick):
    """Goes through right_inverse."""
    x = example("Conv2d").to(quick)
    ours, original = converted_and_original(build(LAYERS["Conv2d"], quick), REGISTER["doubled"], "before")
    weight = original.weight.detach() * 3
    ours.weight = original.weight = weight
    torch.testing.assert_close(ours.weight, weight)
    assert_same(ours, original, x)


def test_errors_are_pytorchs(quick):
    """Of a parametrization that changes the shape, of one that is not there, of what cannot go back, and of
    pickling.
    """
    ours, original = converted_and_original(build(LAYERS["Conv2d"], quick), seeded(REGISTER["weight_norm"]), "before")
    for call in (
        lambda m: parametrize.register_parametrization(m, "bias", nn.Unflatten(0, (2, 2))),
        lambda m: parametrize.register_parametrization(m, "weights", Doubled()),
        lambda m: parametrize.remove_parametrizations(m, "bias"),
        lambda m: parametrize.remove_parametrizations(m, "weight", leave_parametrized=False),
        copy.copy,
    ):
        messages = []
        for m in (ours, original):
            with pytest.raises((ValueError, RuntimeError)) as error:
                call(m)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


class Managed:
    """As FSDP's module, which is put in front of a module's own class."""


@pytest.mark.parametrize("front", [(), (Managed,)], ids=["alone", "in front"])
def test_a_class_on_top_of_the_parametrizations(front, quick):
    """Another library's. It stays where it is, and ours comes on top."""
    model = build(LAYERS["Conv2d"], quick)
    REGISTER["weight_norm"](model)
    model.__class__ = managed = type("ManagedConv2d", (*front, type(model)), {})
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert isinstance(ours, managed)
    assert_same_steps(ours, original, example("Conv2d").to(quick))
    assert type(cnnfast.revert(ours)) is managed


def test_transferred(quick):
    """To a module that is PyTorch's, and to one that is ours."""
    ours, _ = converted_and_original(build(LAYERS["Conv2d"], quick), seeded(REGISTER["doubled"]), "before")
    x = example("Conv2d").to(quick)
    for target in (build(LAYERS["Conv2d"], quick), cnnfast.convert(build(LAYERS["OwnConv2d"], quick))):
        parametrize.transfer_parametrizations_and_params(ours, target)
        assert_same_steps(cnnfast.convert(target), cnnfast.revert(target), x)
        parametrize.remove_parametrizations(target, "weight")
        assert not parametrize.is_parametrized(target)


# ----------------------------------------------------------------------------------------------------------------------
# In a network


def normalise(model: nn.Module) -> None:
    parametrizations.weight_norm(model.stem[0])
    parametrizations.spectral_norm(model.layers[0].conv)
    parametrizations.spectral_norm(model.layers[2].conv2)
    parametrize.register_parametrization(model.layers[2].bn, "weight", Positive())
    parametrizations.orthogonal(model.fc)


def normalised(net: nn.Module, when: str) -> tuple[nn.Module, nn.Module]:
    return converted_and_original(net, seeded(normalise), when)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_network(net, x, when):
    """All its convolutions are fused, and the report says so."""
    ours, original = normalised(net, when)
    assert_same(ours, original, x, fused=5)
    assert cnnfast.report(ours).count("fused") == 5
    assert_same(cnnfast.convert(ours), original, x, fused=5)
    for m in (ours, original):
        for module in [m for m in m.modules() if parametrize.is_parametrized(m)]:
            parametrize.remove_parametrizations(module, "weight")
    assert_same(ours, original, x, fused=5)
    assert [type(m) for m in cnnfast.revert(ours).modules()] == [type(m) for m in original.modules()]


@pytest.mark.parametrize("when", ["before", "after"])
def test_cached(net, x, when):
    """parametrize.cached(): computed once, however many calls there are."""
    ours, original = normalised(net, when)
    assert_same_steps(ours, original, x, fused=5, within=parametrize.cached)
    assert_same_steps(
        nn.Sequential(ours.layers, ours.layers), nn.Sequential(original.layers, original.layers), image().to(x.device)
    )
    for m in (ours, original):
        with parametrize.cached():
            assert m.stem[0].weight is m.stem[0].weight


def test_trees_over_the_same_tensors_remove_apart(net, x):
    """PyTorch's deepcopy shares the class that a removal changes; our trees do not, in whatever order they come
    to be.
    """
    seeded(normalise)(net)
    once = cnnfast.convert(net)
    trees = [net, once, cnnfast.convert(once), cnnfast.revert(once), cnnfast.revert(net)]
    modules = [m for tree in trees for m in tree.modules() if parametrize.is_parametrized(m)]
    assert len({type(m) for m in modules}) == len(modules) == 5 * len(trees)
    for tree in trees:
        for path in ("stem.0", "layers.0.conv", "fc"):
            parametrize.remove_parametrizations(tree.get_submodule(path), "weight")
        for other in trees:
            other(x)


def test_converting_a_copy_in_place(net, x):
    """Leaves the classes of what it is a copy of alone."""
    seeded(normalise)(net)
    state = net.state_dict()
    twin = copy.deepcopy(net)
    ours = cnnfast.convert(twin, inplace=True)
    assert ours is twin
    for path in ("stem.0", "layers.0.conv", "layers.2.bn"):
        parametrize.remove_parametrizations(ours.get_submodule(path), "weight")
    net(x)
    assert list(net.state_dict()) == list(state)


def test_how_often_a_weight_is_computed(quick):
    """As often as the original computes it: once a call, also where the convolution is fused, and never by convert,
    revert or report.
    """

    def count(model):
        parametrize.register_parametrization(model.conv, "weight", Doubled())
        parametrize.register_parametrization(model.bn2, "bias", Doubled())

    def computed(model):
        return [model.conv.parametrizations.weight[0].computed, model.bn2.parametrizations.bias[0].computed]

    model = build(Block, quick)
    ours, original = converted_and_original(model, count, "before")
    before = computed(ours)
    assert before == computed(original)
    for fmt in (None, torch.channels_last):
        for tree in (cnnfast.convert(copy.deepcopy(ours), memory_format=fmt), cnnfast.revert(ours)):
            cnnfast.report(tree.train())
            assert computed(tree) == before
    assert_same_steps(ours, original, image().to(quick), fused=2)
    assert computed(ours) == computed(original) == [n + 3 for n in before]


def test_nothing_outlives_a_parametrized_network(quick):
    """Classes of the modules' own are not kept, nor what they refer to."""

    def make() -> weakref.ref:
        model = build(Block, quick)
        parametrizations.weight_norm(model.conv)
        cnnfast.convert(model)(image().to(quick))
        return weakref.ref(model.conv.parametrizations.weight.original1)

    kept = make()
    gc.collect()
    assert kept() is None


def test_containers_of_one_kind_share_a_class(quick):
    """Parametrized or not."""
    model = build(lambda: nn.Sequential(Block(), Block(), Block()), quick)
    parametrizations.weight_norm(model[0].conv)
    parametrizations.spectral_norm(model[1].conv)
    assert len({type(m) for m in cnnfast.convert(model)}) == 1


def test_compiled_without_a_graph_break(quick, x):
    net = build(Net, quick)
    seeded(normalise)(net)
    original, ours = copy.deepcopy(net).train(), cnnfast.convert(net).train()
    torch._dynamo.reset()
    for model in (ours, original):
        torch.compile(model, fullgraph=True, backend="eager")(x).square().sum().backward()
    for (name, mine), theirs in zip(ours.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)
    for mine, theirs in zip(ours.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Containers with parametrized tensors of their own


def scaled(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn(self.conv(x))) * self.scale


def make_scaled() -> nn.Module:
    model = block(scaled)()
    model.scale = nn.Parameter(torch.tensor(0.5))
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("leave", [False, True])
def test_a_tensor_of_a_container(when, leave, quick):
    x = image().to(quick)

    def register(model):
        parametrize.register_parametrization(model, "scale", Doubled())

    ours, original = converted_and_original(build(make_scaled, quick), register, when)
    assert_same(ours, original, x)
    assert_same_steps(ours, original, x, within=parametrize.cached)
    assert_same(cnnfast.convert(ours), original, x)
    for m in (ours, original):
        parametrize.remove_parametrizations(m, "scale", leave_parametrized=leave)
    assert_same(ours, original, x)
    assert type(cnnfast.revert(ours)) is type(original)


def test_a_tensor_that_a_fused_container_gets_later(quick):
    """By register_parameter and register_buffer: nothing tells the container."""
    x = image().to(quick)

    def register(model):
        model.register_parameter("temperature", nn.Parameter(torch.ones(2, dtype=torch.float64, device=quick)))
        model.register_buffer("steps", torch.ones(2, dtype=torch.float64, device=quick))
        parametrize.register_parametrization(model, "temperature", Doubled())
        parametrize.register_parametrization(model, "steps", Positive())

    ours, original = converted_and_original(build(Block, quick), register, "after")
    assert_same_steps(ours, original, x)
    assert type(cnnfast.revert(ours)).__bases__ == type(original).__bases__
    for m in (ours, original):
        for name in ("temperature", "steps"):
            parametrize.remove_parametrizations(m, name)
    assert_same_steps(ours, original, x)
    back = cnnfast.revert(ours)
    assert type(back) is Block
    assert sorted(vars(back)) == sorted(vars(original))
    assert_same_steps(cnnfast.convert(ours), original, x)


# ----------------------------------------------------------------------------------------------------------------------
# The older ways: hooks that write the weight before each call


def by_hooks(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of functions that torch has deprecated, and people use
        nn.utils.weight_norm(model.stem[0])
        nn.utils.spectral_norm(model.layers[0].conv)
        nn.utils.weight_norm(model.fc)


def without_hooks(model: nn.Module) -> None:
    nn.utils.remove_weight_norm(model.stem[0])
    nn.utils.remove_spectral_norm(model.layers[0].conv)
    nn.utils.remove_weight_norm(model.fc)


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model.stem[0], "weight", amount=0.5)
    prune.random_structured(model.layers[0].conv, "weight", amount=1, dim=0)
    prune.l1_unstructured(model.layers[0].conv, "weight", amount=0.2)
    prune.random_unstructured(model.layers[0].bn, "bias", amount=1)


def made_permanent(model: nn.Module) -> None:
    prune.remove(model.stem[0], "weight")
    prune.remove(model.layers[0].conv, "weight")
    prune.remove(model.layers[0].bn, "bias")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("add", "remove"), [(by_hooks, without_hooks), (pruned, made_permanent)])
def test_weights_written_by_hooks(net, x, add, remove, when):
    """Registered, copied, removed; then all is fused again."""
    ours, original = converted_and_original(net, seeded(add), when)
    assert_same(ours, original, x)
    assert_same(cnnfast.revert(ours), original, x)
    if when == "before":
        net(x)  # it has hooks of its own
    remove(ours)
    remove(original)
    assert_same(ours, original, x, fused=5)
    assert_same(cnnfast.revert(ours), original, x)


@pytest.mark.parametrize("layer", ["Conv1d", "Conv2d", "ConvTranspose2d", "OwnConv2d"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_layer_whose_weight_hooks_write(layer, when, quick):
    x = example(layer).to(quick)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for add, remove in (
            (nn.utils.weight_norm, nn.utils.remove_weight_norm),
            (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        ):
            ours, original = converted_and_original(build(LAYERS[layer], quick), seeded(add), when)
            assert_same(ours, original, x)
            remove(ours)
            remove(original)
            assert_same(ours, original, x)
            assert type(cnnfast.revert(ours)) is type(original)


def test_a_network_that_mixes_them(quick, x):
    """Also on one module: pruned, then parametrized."""

    def change(model):
        pruned(model)
        made_permanent(model)
        seeded(normalise)(model)
        prune.random_unstructured(model.layers[0].conv2, "weight", amount=0.5)

    ours, original = converted_and_original(build(Net, quick), seeded(change), "before")
    traces = assert_same_steps(ours, original, x)
    assert fusions(traces["no_grad"]) == 3, "the container whose member is hooked calls all its members"
