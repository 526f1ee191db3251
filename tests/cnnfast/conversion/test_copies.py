"""What convert(inplace=False) makes of a model's hooks, and of what they hold: as deepcopy does, but over the same
tensors.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.conversion.tree import share
from tests.support.blocks import CONVOLUTIONS, Block, Net, build, image
from tests.support.packages import package
from tests.support.steps import assert_same_steps

# ----------------------------------------------------------------------------------------------------------------------
# Hooks that hold something of the model


class Collecting(Block):
    """Its hooks write into `features`."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Any] = {}

    def collect(self, *seen: Any) -> None:
        self.collect_as("conv", *seen)

    def collect_as(self, name: str, *seen: Any, **more: Any) -> None:
        self.features[name] = seen[-1]


class Helper:
    """As timm's FeatureHooks: belongs to a model, and is none."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self.handles: list[Any] = []

    def collect(self, name: str, *seen: Any) -> None:
        self.results[name] = seen[-1]


class OfAModule:
    """Called itself."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *seen: Any) -> None:
        self.module.features["conv"] = seen[-1]


class OfADict:
    __slots__ = ("results",)

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results

    def __call__(self, *seen: Any) -> None:
        self.results["conv"] = seen[-1]


class Locked(OfADict):
    """With something that cannot be copied, and need not be."""

    __slots__ = ("lock",)

    def __init__(self, results: dict[str, Any]) -> None:
        super().__init__(results)
        self.lock = threading.Lock()

    def __call__(self, *seen: Any) -> None:
        with self.lock:
            super().__call__(*seen)


def put(places: list[Any], *seen: Any) -> None:
    places[0]["nested"][0]["conv"] = seen[-1]


def helped(model: Any) -> Callable[..., Any]:
    model.helper = Helper()
    model.features = model.helper.results
    return functools.partial(model.helper.collect, "conv")


def with_handles(model: Any) -> Callable[..., Any]:
    hook = helped(model)
    model.helper.handles.append(model.relu.register_forward_hook(functools.partial(model.helper.collect, "relu")))
    return hook


def of_a_child(model: Any) -> Callable[..., Any]:
    model.conv.features = model.features
    return OfAModule(model.conv)


HOLDING: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "method": lambda model: model.collect,
    "partial of a method": lambda model: functools.partial(model.collect_as, "conv"),
    "partial of a partial": lambda model: functools.partial(functools.partial(Collecting.collect_as, model), "conv"),
    "partial of a function": lambda model: functools.partial(put, [{"nested": (model.features,)}]),
    "method of a helper": helped,
    "helper with handles": with_handles,
    "callable with the model": OfAModule,
    "callable with a child": of_a_child,
    "callable with a dict": lambda model: OfADict(model.features),
    "method of a callable": lambda model: OfADict(model.features).__call__,
    "callable with a lock": lambda model: Locked(model.features),
}


@pytest.mark.parametrize(
    "convert", [cnnfast.convert, lambda model: cnnfast.revert(cnnfast.convert(model, inplace=True))]
)
@pytest.mark.parametrize("kind", HOLDING)
def test_what_hooks_hold_of_the_model_is_the_copys(kind, convert, quick):
    """Each model collects its own features; a hook of two modules is one hook in the copy too."""
    model: Any = build(Collecting, quick)
    hook = HOLDING[kind](model)
    model.conv.register_forward_hook(hook)
    model.conv2.register_forward_hook(hook)
    ours, x = convert(model), image().to(quick)
    ours(x)
    assert ours.features is not model.features
    assert model.features == {}
    torch.testing.assert_close(ours.features["conv"], ours.conv2(ours.relu(ours.bn(ours.conv(x)))))
    collected = dict(ours.features)
    model(x * 2)
    assert model.features.keys() == ours.features.keys()
    assert all(ours.features[name] is t for name, t in collected.items())
    first, second = ours.conv._forward_hooks.values(), ours.conv2._forward_hooks.values()
    assert all(a is b for a, b in zip(first, second, strict=True))


REGISTER: dict[str, Callable[[Any, Callable[..., Any]], Any]] = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "forward with keywords": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
    "forward, always": lambda module, hook: module.register_forward_hook(hook, always_call=True),
    "pre": lambda module, hook: module.register_forward_pre_hook(hook),
    "pre with keywords": lambda module, hook: module.register_forward_pre_hook(hook, with_kwargs=True),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "backward pre": lambda module, hook: module.register_full_backward_pre_hook(hook),
    "state_dict": lambda module, hook: module.register_state_dict_post_hook(hook),
    "state_dict, the older": lambda module, hook: module._register_state_dict_hook(hook),
    "state_dict pre": lambda module, hook: module.register_state_dict_pre_hook(hook),
    "load pre": lambda module, hook: module.register_load_state_dict_pre_hook(hook),
    "load pre, the older": lambda module, hook: module._register_load_state_dict_pre_hook(hook, with_module=True),
    "load": lambda module, hook: module.register_load_state_dict_post_hook(hook),
}


def exercise(model: nn.Module, x: Tensor) -> None:
    model.train()(x.clone().requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_of_all_kinds(kind, quick):
    """Called with the modules of their own tree; a handle removes from the tree that it was made for."""
    model: Any = build(Collecting, quick)
    model.called = []
    hook = functools.partial(lambda called, *seen: called.append(seen[0]), model.called)
    handle = REGISTER[kind](model.conv, hook)
    model.handle = REGISTER[kind](model.conv, hook)
    ours, twin, x = cnnfast.convert(model), copy.deepcopy(model), image().to(quick)
    for tree in (ours, twin):
        exercise(tree, x)
        assert len(tree.called) == 2
        assert model.called == []
        assert all(m is tree.conv for m in tree.called if isinstance(m, nn.Module))
    assert vars(ours.conv).keys() == vars(twin.conv).keys()
    for name, hooks in vars(model.conv).items():
        if "hook" in name and isinstance(hooks, dict):
            assert list(getattr(ours.conv, name)) == list(hooks), name
    if handle is None:  # the older function for hooks of state_dict returns none
        return
    handle.remove()
    exercise(ours, x)
    exercise(model, x)
    assert (len(ours.called), len(model.called)) == (4, 1)
    ours.handle.remove()
    exercise(ours, x)
    exercise(model, x)
    assert (len(ours.called), len(model.called)) == (5, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Hooks that belong to others


class Recorder:
    """A user's, outside of the model."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.lock = threading.Lock()

    def record(self, *seen: Any) -> None:
        with self.lock:
            self.seen.append(seen[-1])

    __call__ = record


def closure(recorder: Recorder) -> Callable[..., Any]:
    def hook(*seen: Any) -> None:
        recorder.record(*seen)

    return hook


FOREIGN: dict[str, Callable[[Recorder], Callable[..., Any]]] = {
    "method": lambda recorder: recorder.record,
    "callable": lambda recorder: recorder,
    "partial": lambda recorder: functools.partial(Recorder.record, recorder),
    "closure": closure,
    "tensor": lambda recorder: functools.partial(
        lambda tensor, r, *seen: r.record(*seen), torch.ones(1).requires_grad_() * 2, recorder
    ),
    "generator": lambda recorder: functools.partial(
        lambda numbers, *seen: recorder.record(next(numbers)), (n for n in range(9))
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_hooks_of_others_are_shared(kind, quick):
    """A user who watches a model watches the converted one, too: a copy of the recorder could be read by nobody."""
    model, recorder = build(Block, quick), Recorder()
    model.conv.register_forward_hook(FOREIGN[kind](recorder))
    ours, x = cnnfast.convert(model), image().to(quick)
    ours(x)
    assert len(recorder.seen) == 1
    model(x)
    cnnfast.revert(ours)(x)
    assert len(recorder.seen) == 3


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_of_all_kinds_of_others(kind, quick):
    """The recorder has a lock, which no deepcopy copies."""
    model, recorder = build(Block, quick), Recorder()
    REGISTER[kind](model.conv, functools.partial(recorder.record))
    exercise(cnnfast.convert(model), image().to(quick))
    assert len(recorder.seen) == 1


def test_what_a_hook_holds_besides_the_model_is_shared(quick):
    """As a recorder that the hook passes the features on to."""
    model: Any = build(Collecting, quick)
    recorder = Recorder()

    class Passing:
        def __init__(self, model: Any, recorder: Recorder) -> None:
            self.model, self.options = model, {"recorder": recorder}

        def hook(self, *seen: Any) -> None:
            self.model.collect(*seen)
            self.options["recorder"].record(*seen)

    passing = Passing(model, recorder)
    model.conv.register_forward_hook(passing.hook)
    ours = cnnfast.convert(model)
    ours(image().to(quick))
    assert list(ours.features) == ["conv"]
    assert model.features == {}
    assert len(recorder.seen) == 1
    assert passing.model is model


def test_a_recorder_that_the_model_has_too(quick):
    """Then it is the model's, and is copied, as deepcopy copies it."""

    class Plain(Recorder):
        def __init__(self) -> None:
            self.seen = []

        def record(self, *seen: Any) -> None:
            self.seen.append(seen[-1])

    model: Any = build(Block, quick)
    model.recorder = Plain()
    model.conv.register_forward_hook(model.recorder.record)
    for twin in (cnnfast.convert(model), copy.deepcopy(model)):
        twin(image().to(quick))
        assert (len(twin.recorder.seen), len(model.recorder.seen)) == (1, 0)


def test_other_attributes_that_are_called_hooks(quick):
    """Lists of a GraphModule's, a dict of the model's own: copied as any attribute is."""
    model: Any = build(Collecting, quick)
    model.own_hooks = {"conv": Helper()}
    graph: Any = torch.fx.symbolic_trace(model)
    graph.features = {}
    graph.conv.register_forward_hook(
        functools.partial(lambda features, *seen: features.update(conv=seen[-1]), graph.features)
    )
    assert cnnfast.convert(model).own_hooks["conv"] is not model.own_hooks["conv"]
    for twin in (share(graph, "convert"), copy.deepcopy(graph)):
        twin.conv(image().to(quick))
        assert [len(hooks) for hooks in (twin.conv._forward_hooks, graph.features)] == [1, 0]
        assert twin._replace_hooks == graph._replace_hooks == []


def test_hooks_that_know_their_module(quick):
    """By a weak reference, as PyTorch's own around a function that is called with the module."""
    model: Any = build(Block, quick)
    told: list[nn.Module] = []
    model.conv._register_load_state_dict_pre_hook(lambda module, *_: told.append(module), with_module=True)
    ours = cnnfast.convert(model)
    ours.load_state_dict(model.state_dict())
    model.load_state_dict(ours.state_dict())
    assert told[0] is ours.conv
    assert told[1] is model.conv


def test_weak_references(quick):
    """Kept as they are, as deepcopy keeps them; a dead one is nobody's."""
    model: Any = build(Collecting, quick)
    gone = Helper()
    proxy, reference = weakref.proxy(gone), weakref.ref(gone)
    del gone
    model.conv.register_forward_hook(
        functools.partial(lambda p, r, m, *seen: m.collect(*seen), proxy, reference, model)
    )
    ours = cnnfast.convert(model)
    ours(image().to(quick))
    assert list(ours.features) == ["conv"]
    assert model.features == {}


# ----------------------------------------------------------------------------------------------------------------------
# Tensors, and what cannot be copied


def test_tensors_wherever_they_are(quick):
    """Parameters of a list, which an optimizer may have; the results of the last call; those of a module that is no
    child.
    """
    model: Any = build(Block, quick)
    hidden = nn.Linear(2, 2)
    model.temperatures = [nn.Parameter(torch.ones(1))]
    model.last = {"features": [model.temperatures[0] * 2]}
    model.teacher = (hidden,)
    ours = cnnfast.convert(model)
    assert ours.temperatures is not model.temperatures
    assert ours.temperatures[0] is model.temperatures[0]
    assert ours.last["features"][0] is model.last["features"][0]
    assert ours.teacher[0] is not hidden
    assert ours.teacher[0].weight is hidden.weight


class Uncopyable:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("it is one of a kind")

    def __call__(self, *seen: Any) -> None:
        self.model.collect(*seen)


class CopiesItself(Block):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self)().double().to(self.bn.bias.device)
        new.load_state_dict(self.state_dict())
        return new.train(self.training)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", [cnnfast.convert, cnnfast.revert])
def test_what_cannot_be_copied_is_said(call, quick):
    """A hook or an attribute that belongs to the model and refuses, and parts that make tensors of their own. In place
    there is no need.
    """
    hooked, owning = build(Collecting, quick), build(Collecting, quick)
    hooked.conv.register_forward_hook(Uncopyable(hooked))
    owning.extra = Uncopyable(owning)  # pyright: ignore[reportAttributeAccessIssue]
    for model, message in (
        (hooked, "one of a kind"),
        (owning, "one of a kind"),
        (build(CopiesItself, quick), "conv.weight"),
        (nn.Sequential(torch.jit.script(build(Block, quick)), build(Block, quick)), "0.conv.weight"),
    ):
        with pytest.raises(TypeError, match=rf"{call.__name__}\(\): .*{message}.*: use inplace=True"):
            call(model)
        x = image().to(quick)
        y = model(x)
        torch.testing.assert_close(call(model, inplace=True)(x), y)
    assert list(hooked.features) == ["conv"]  # pyright: ignore[reportArgumentType]


# ----------------------------------------------------------------------------------------------------------------------
# timm


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_timms_features_by_hooks(name, quick):
    """timm.create_model(..., features_only=True, feature_cls="hook"), converted, back, and again."""
    timm = package("timm")
    model = timm.create_model(name, features_only=True, feature_cls="hook", out_indices=(0, 1, 3)).double().to(quick)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64).to(quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    for tree in (ours, cnnfast.revert(ours), cnnfast.convert(ours)):
        assert len(tree.eval()(x)) == 3
        assert_same_steps(tree, original, x, modes=("no_grad", "train"), tolerance=1e-9)
        assert not model.hooks._feature_outputs[x.device]


def test_a_network_with_hooks_is_fused_but_for_its_members(net, x):
    """A hook of the model's own on a block costs no fusion within it."""
    model: Any = net
    model.features = {}
    model.layers[0].register_forward_hook(
        functools.partial(lambda features, *seen: features.update(block=seen[-1]), model.features)
    )
    ours: Any = cnnfast.convert(model)
    assert isinstance(ours, Net)
    assert_same_steps(ours, copy.deepcopy(net), x, fused=CONVOLUTIONS)
    assert list(ours.features) == ["block"]
    assert net.features == {}
