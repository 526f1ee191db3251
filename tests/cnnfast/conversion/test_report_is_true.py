"""What a report says is what a run does: each program's report, in each mode, against a trace of that very model in
that very state.
"""

from __future__ import annotations

import copy
import functools
import io
import random
import types
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import cnnfast
import cnnfast.nn as cnn
from tests.support.blocks import CHANNELS, CONVOLUTIONS, Block, Net, block, build, image
from tests.support.told import assert_report_is_true, assert_reports_are_true

# ----------------------------------------------------------------------------------------------------------------------
# What people and libraries do to a member, or to its container


def do_nothing(*call: Any, **keywords: Any) -> None:
    pass


def add_hook(module: nn.Module, grad: bool = True) -> nn.Module:
    """As accelerate.hooks.add_hook_to_module wraps a forward; its hooks see what goes in and comes out, and may change
    it.
    """
    old_forward = module.forward
    module._old_forward = old_forward
    module._hf_hook = types.SimpleNamespace()

    def new_forward(module, *args, **kwargs):
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old_forward)
    return module


def remove_hook(module: nn.Module) -> None:
    """As accelerate.hooks.remove_hook_from_module: what was the class's forward stays on the instance, bound."""
    delattr(module, "_hf_hook")
    module.forward = module._old_forward
    delattr(module, "_old_forward")


def add_and_remove_hook(module: nn.Module) -> None:
    remove_hook(add_hook(module))


def put_class_on_top(module: nn.Module) -> None:
    """As FSDP, DeepSpeed and parametrize do."""
    module.__class__ = type(f"Wrapped{type(module).__name__}", (type(module),), {})


def patch(module: nn.Module) -> None:
    plain = type(module).forward
    module.forward = types.MethodType(lambda self, x: plain(self, x) * 2, module)


def compute_otherwise(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, x: F.conv2d(x, self.weight, None, 1, 1), module)


# name > (which submodule of a Net, what is done to it, how many of its 5 convolutions are fused if it is done after
# conversion)
CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any], int | None]] = {
    "forward hook of a convolution": ("stem.0", lambda m: m.register_forward_hook(do_nothing), 4),
    "forward hook of an activation": ("layers.0.relu", lambda m: m.register_forward_hook(do_nothing), 3),
    "forward hook of a container": ("layers.0", lambda m: m.register_forward_hook(do_nothing), 5),
    "forward pre-hook of a norm": ("layers.2.bn", lambda m: m.register_forward_pre_hook(do_nothing), 3),
    "hook with keywords": ("stem.1", lambda m: m.register_forward_hook(do_nothing, with_kwargs=True), 4),
    "full backward hook": ("layers.0.conv", lambda m: m.register_full_backward_hook(do_nothing), 3),
    "full backward pre-hook": ("layers.0.conv", lambda m: m.register_full_backward_pre_hook(do_nothing), 3),
    "old backward hook": ("layers.0.bn2", lambda m: m.register_backward_hook(do_nothing), 3),
    "old weight_norm": ("stem.0", torch.nn.utils.weight_norm, 4),
    "old spectral_norm": ("layers.0.conv2", torch.nn.utils.spectral_norm, 3),
    "weight_norm": ("stem.0", parametrizations.weight_norm, None),
    "spectral_norm": ("layers.0.conv2", parametrizations.spectral_norm, None),
    "accelerate on a convolution": ("stem.0", add_hook, 4),
    "accelerate on an activation": ("stem.2", add_hook, 4),
    "accelerate on a container": ("layers.0", add_hook, 5),
    "accelerate on a Sequential": ("stem", functools.partial(add_hook, grad=False), 5),
    "accelerate on all": ("", lambda m: [add_hook(child) for child in m.modules()], 0),
    "accelerate gone from a convolution": ("stem.0", add_and_remove_hook, 5),
    "accelerate gone from a norm": ("stem.1", add_and_remove_hook, 5),
    "accelerate gone from an activation": ("layers.0.relu", add_and_remove_hook, 5),
    "accelerate gone from a container": ("layers.0", add_and_remove_hook, 5),
    "accelerate gone from all": ("", lambda m: [add_and_remove_hook(child) for child in m.modules()], 5),
    "patched convolution": ("layers.0.conv", patch, 3),
    "patched pool": ("pool", patch, 5),
    "foreign forward on a convolution": ("layers.0.conv", compute_otherwise, 3),
    "class on top of a container": ("layers.0", put_class_on_top, 5),
    "class on top of a convolution": ("stem.0", put_class_on_top, 4),
    "frozen norm": ("layers.0.bn", lambda m: m.eval().requires_grad_(False), 5),
    "norm without momentum": ("layers.0.bn", lambda m: setattr(m, "momentum", None), 5),
}


# of PyTorch, that old weight and spectral norms are old, and of backward hooks without a gradient
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_member_or_a_container_is_changed(name, when, net, x):
    path, change, fused = CHANGES[name]
    if when == "before":
        change(net.get_submodule(path))
    ours = cnnfast.convert(net, inplace=True)
    if when == "after":
        change(ours.get_submodule(path))
        for mode, report in assert_reports_are_true(ours, x).items():
            assert fused in (None, report.count("fused")), mode
    else:
        reports = assert_reports_are_true(ours, x)
        assert "gone" not in name or {report.count("fused") for report in reports.values()} == {5}


def test_what_stands_in_the_way_is_named(net, x):
    ours = cnnfast.convert(net)
    ours.layers[0].relu.register_forward_hook(do_nothing)
    add_hook(ours.stem[1])
    del ours.layers[2]._modules["relu"]
    ours.layers[2]._modules["relu"] = nn.Tanh()
    rows = {row.name: row for row in cnnfast.report(ours, x).rows}
    for name, container, reason in (
        ("layers.0.conv2", "layers.0", "relu (ReLU) has a forward hook"),
        ("layers.0.bn", "layers.0", "relu (ReLU) has a forward hook"),
        ("stem.0", "stem", "1 (BatchNorm2d) has a forward that was replaced on the instance"),
        ("layers.2.conv", "layers.2", "Block has changed since it was fused: convert again"),
    ):
        assert (rows[name].status, rows[name].reason) == ("replaced", f"alone, because {reason}")
        assert (rows[container].status, rows[container].reason) == ("left", f"not fused: {reason}")


KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_all_modules(kind, net, x):
    """They see every call, so nothing is fused; they hear nothing of the report."""
    ours = cnnfast.convert(net)
    heard = []
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *call: heard.append(1))
    try:
        cnnfast.report(ours)
        before = len(heard)
        reports = assert_reports_are_true(ours, x)
    finally:
        handle.remove()
    assert before == 0 or kind.startswith("forward")
    assert {report.count("fused") for report in reports.values()} == {0}
    reasons = {row.reason for report in reports.values() for row in report.rows if row.kind == "Conv2d"}
    assert reasons == {"alone, because hooks of all modules are registered"}
    assert_reports_are_true(ours, x)


# ----------------------------------------------------------------------------------------------------------------------
# How a container is called


class Caller(nn.Module):
    """Calls a block, or its members, in a way of its own."""

    def __init__(
        self, call: Callable[[nn.Module, Tensor], Tensor], kind: Callable[[], nn.Module] = Block, grouped: Any = None
    ):
        super().__init__()
        self.block = kind() if grouped is None else grouped(kind())
        self.call = call
        self.own = nn.Parameter(torch.zeros(()))  # so that it is not fused itself

    def forward(self, x):
        return self.call(self.block, x)


def optional(self, x, residual=None, activation=None):
    y = self.bn(self.conv(x))
    y = y if residual is None else y + residual
    return self.relu(y) if activation is None else activation(y)


def two_optional(self, x, residual=None, factor=None):
    y = self.bn(self.conv(x))
    y = self.relu(y if residual is None else y + residual)
    return y if factor is None else y * factor


def with_number(self, x, scale=1.0):
    y = self.relu(self.bn(self.conv(x)))
    return y if scale is None else y * (scale + 1)


def keyword_only(self, x, *, residual=None):
    return self.relu(self.bn(self.conv(x)))


def joined(self, features):
    features = torch.cat(features, 1) if isinstance(features, list) else features
    return self.relu(self.bn(self.conv(features)))


# name > (how it is called, its forward, how many convolutions are fused then)
CALLS: dict[str, tuple[Callable[[Any, Tensor], Any], Any, int]] = {
    "by position": (lambda block, x: block(x), Block.forward, 2),
    "by keyword": (lambda block, x: block(x=x), Block.forward, 2),
    "second by keyword": (lambda block, x: block(x, residual=x), optional, 1),
    "all by keyword, in another order": (lambda block, x: block(residual=x, x=x), optional, 1),
    "None by keyword": (lambda block, x: block(x, residual=None), optional, 1),
    "None by position": (lambda block, x: block(x, None, None), optional, 1),
    "a function for a tensor": (lambda block, x: block(x, None, torch.sigmoid), optional, 0),
    "a function, and a gap": (lambda block, x: block(x, activation=torch.sigmoid), optional, 0),
    "a gap": (lambda block, x: block(x, factor=x), two_optional, 0),
    "None for a number": (lambda block, x: block(x, None), with_number, 0),
    "a number by default": (lambda block, x: block(x), with_number, 1),
    "a number": (lambda block, x: block(x, 2.0), with_number, 0),
    "keyword only": (lambda block, x: block(x, residual=x), keyword_only, 0),
    "a tensor for a list": (lambda block, x: block(x), joined, 1),
    "a list": (lambda block, x: block([x[:, :2], x[:, 2:]]), joined, 1),
    "without a batch": (lambda block, x: F.relu(block.conv(x[0])), Block.forward, 0),
    "its forward": (lambda block, x: block.forward(x), Block.forward, 2),
    "its members": (lambda block, x: block.relu(block.bn(block.conv(x))), Block.forward, 0),
    "whole and its members": (lambda block, x: block.relu(block.bn(block.conv(block(x)))), Block.forward, 1),
    "whole twice": (lambda block, x: block(block(x)), Block.forward, 2),
    "not at all": (lambda block, x: F.relu(x), Block.forward, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_how_a_container_is_called(name, quick):
    call, forward, fused = CALLS[name]
    model, x = build(lambda: Caller(call, block(forward)), quick), image().to(quick)
    original = copy.deepcopy(model)
    ours = cnnfast.convert(model)
    for mode, report in assert_reports_are_true(ours, x).items():
        assert report.count("fused") == fused, mode
    torch.testing.assert_close(ours(x), original(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "grouped", [lambda kind: nn.ModuleList([kind]), nn.Sequential], ids=["ModuleList", "Sequential"]
)
def test_a_container_in_a_list_of_which_only_parts_are_called(grouped, quick):
    def call(blocks, x):
        return blocks[0].relu(blocks[0].bn(blocks[0].conv(x)))

    ours = cnnfast.convert(build(lambda: Caller(call, grouped=grouped), quick))
    rows = {row.name: row.reason for row in assert_reports_are_true(ours, image().to(quick))["train"].rows}
    assert rows["block.0.conv"] == "alone, because block.0 was not called, but its members"
    assert rows["block.0.conv2"] == "no call of it was seen"


def test_a_sequential_without_a_batch(quick):
    """[C, H, W]: convolutions take it, and batch norms do not."""
    model = build(
        lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.Identity(), nn.BatchNorm2d(CHANNELS)), quick
    )

    def call(block, x):
        return block[0](x[0]) + block(x)[0]

    model = Caller(call, lambda: model).eval()
    rows = {row.name: row for row in assert_reports_are_true(cnnfast.convert(model), image().to(quick))["eval"].rows}
    assert rows["block.0"].reason.startswith(
        "1 of its 2 calls fused into Conv2d + BatchNorm2d; the others alone, because"
    )
    assert rows["block.2"].status == "fused"


# ----------------------------------------------------------------------------------------------------------------------
# Programs


def in_place_between(self, x):
    y = self.bn(self.conv(x))
    y = y + x
    x.mul_(0.5)
    return self.relu(y)


def in_place_before(self, x):
    y = self.conv(x)
    x.add_(1)
    return self.relu(self.bn(y))


def shared_norm(self, x):
    return self.bn(self.conv2(self.relu(self.bn(self.conv(x)))))


def shared_convolution(self, x):
    return self.relu(self.bn(self.conv(self.conv(x)))) + self.bn2(self.conv2(x))


def keyword_members(self, x):
    return self.relu(self.bn(input=self.conv(x))) + self.bn2(self.conv2(x))


def norm_first(self, x):
    return self.conv2(self.relu(self.bn(self.conv(self.bn2(x)))))


def used_twice(self, x):
    y = self.conv(x)
    return self.relu(self.bn(y)) + y


def no_norm(self, x):
    return self.relu(self.conv2(self.relu(self.conv(x))))


def by_forward(self, x):
    return self.relu(self.bn.forward(self.conv(x)))


def by_hand(self, x):
    return cnn.conv_bn_act(self.conv, self.bn, x, x, "relu")


def trains_otherwise(self, x):
    return self.relu(self.bn(self.conv(x))) if self.training else self.bn2(self.conv2(x))


def asks_for_values(self, x):
    return self.relu(self.bn(self.conv(x))) if x.sum() > -1e9 else x


class Decides(nn.Module):
    """Cannot run without numbers; its block can."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Block(), Block()

    def forward(self, x):
        return self.block(x) if x.sum() > -1e9 else self.other(x)


class Auxiliary(nn.Module):
    """A second head, in training only, as GoogLeNet and segmentation networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Block()
        self.head = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU())

    def forward(self, x):
        y = self.body(x)
        return (y, self.head(y)) if self.training else y


class Tied(nn.Module):
    """One module under two names, and one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = self.first
        self.third = Block()
        self.third.conv.weight = self.first.conv.weight

    def forward(self, x):
        return self.third(self.second(self.first(x)))


class Collector:
    """As timm's FeatureHooks: bound methods and partials of an object that holds what it was told."""

    def __init__(self) -> None:
        self.outputs: dict[str, Any] = {}

    def collect(self, name, module, inputs, output):
        self.outputs[name] = output


class Featured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.collector = Net(), Collector()
        for name in ("stem.2", "layers.0"):
            self.net.get_submodule(name).register_forward_hook(functools.partial(self.collector.collect, name))

    def forward(self, x):
        self.net(x)
        return list(self.collector.outputs.values())


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    **{
        forward.__name__: block(forward)
        for forward in (
            in_place_between,
            in_place_before,
            shared_norm,
            shared_convolution,
            keyword_members,
            norm_first,
            used_twice,
            no_norm,
            trains_otherwise,
            asks_for_values,
        )
    },
    "Decides": Decides,
    "Auxiliary": Auxiliary,
    "Tied": Tied,
    "ConvBNAct": lambda: cnn.ConvBNAct(CHANNELS, CHANNELS, 3, activation="silu"),
    "BasicBlock": lambda: cnn.BasicBlock(CHANNELS, CHANNELS),
    "strided BasicBlock": lambda: cnn.BasicBlock(
        CHANNELS, 6, 2, nn.Sequential(nn.Conv2d(CHANNELS, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    ),
    "Bottleneck": lambda: cnn.Bottleneck(CHANNELS, 1),
    "sync": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Block()),
    "other layers": lambda: nn.Sequential(
        nn.ConvTranspose2d(CHANNELS, 3, 2, 2),
        nn.BatchNorm2d(3),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 5, 1),
        nn.AdaptiveAvgPool2d((2, 3)),
        cnn.GlobalAvgPool2d(keepdim=False),
    ),
    "one dimension": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(CHANNELS, 3, 5, padding="same"), nn.BatchNorm1d(3), nn.ConvTranspose1d(3, 2, 2)
    ),
    "padding": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, 3, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(3), nn.GELU()
    ),
    "dropout": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, 3, 3), nn.Dropout2d(0.5), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU()
    ),
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(CHANNELS, 3, 3)), nn.BatchNorm2d(3)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program(name, quick):
    assert_reports_are_true(cnnfast.convert(build(PROGRAMS[name], quick)), image().to(quick))


def test_a_network_that_collects_features(quick):
    ours = cnnfast.convert(build(Featured, quick), inplace=True)
    assert_reports_are_true(ours, image(3, 9).to(quick))


def test_members_that_are_not_called(quick):
    """A forward that is called past its module is not seen; a step that somebody else fuses is."""
    x = image().to(quick)
    rows = {row.name: row for row in cnnfast.report(cnnfast.convert(build(block(by_forward), quick)), x).rows}
    assert (rows["bn"].status, rows["bn"].reason) == ("replaced", "no call of it was seen")
    rows = {row.name: row for row in cnnfast.report(cnnfast.convert(build(block(by_hand), quick)), x).rows}
    assert [(rows[name].status, rows[name].reason) for name in ("conv", "bn")] == [
        ("fused", "conv + bn + residual + relu")
    ] * 2
    assert "" not in rows, "it is fused, though not by conversion"


def test_blocks_of_cnnfast_are_fused(quick):
    """By a forward of their own, which conversion did not write."""
    ours = build(lambda: cnnfast.models.resnet18(num_classes=3), quick)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64, device=quick)
    for module in (ours, cnnfast.convert(ours)):
        for report in assert_reports_are_true(module, x, modes=("no_grad", "train")).values():
            assert [report.count(status) for status in ("fused", "replaced", "left")] == [20, 0, 0]
            assert "not fused" not in str(report)
    rows = {row.name: row.reason for row in report.rows}
    assert rows["layer1.0.conv2"] == "conv2 + bn2 + residual + relu"


def surgery_in_the_dictionary(model: nn.Module) -> None:
    model.layers[0]._modules["bn"] = nn.Identity()
    model.stem._modules["2"] = nn.Tanh()


def new_member(model: nn.Module) -> None:
    model.layers[0].relu = nn.SiLU()
    model.stem[0] = nn.Conv2d(3, CHANNELS, 3).to(model.fc.weight)


def forwards_outlive_their_class(model: nn.Module) -> None:
    """accelerate's, put back on a container that has been fused anew since."""
    add_hook(model.layers[0])
    model.layers[0].relu = nn.SiLU()
    remove_hook(model.layers[0])


STATES: dict[str, Callable[[nn.Module], nn.Module | None]] = {
    "copied": copy.deepcopy,
    "pickled": lambda model: torch.load(_pickled(model), weights_only=False),
    "converted twice": cnnfast.convert,
    "reverted": cnnfast.revert,
    "reverted and converted": lambda model: cnnfast.convert(cnnfast.revert(model)),
    "surgery in the dictionary": surgery_in_the_dictionary,
    "new member": new_member,
    "forwards outlive their class": forwards_outlive_their_class,
    "shared": lambda model: setattr(model.layers[0], "bn2", model.layers[0].bn),
    "moved": lambda model: setattr(model, "layers", nn.Sequential(model.layers[2], model.layers[0])),
}


def _pickled(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", STATES)
def test_a_state_after_conversion(name, net, x):
    ours = cnnfast.convert(net)
    assert_reports_are_true(STATES[name](ours) or ours, x)


def test_partly_in_eval(net, x):
    """The model's own flags count, and not those that it would have as a whole: a norm that synchronises is fused in
    both.
    """
    ours = cnnfast.convert(nn.SyncBatchNorm.convert_sync_batchnorm(net)).train()
    ours.layers[0].eval()
    assert assert_report_is_true(ours, x).count("fused") == CONVOLUTIONS


def test_a_forward_on_a_container_does_not_make_it_keep_what_its_own_has_read(net, x):
    """accelerate holds the fused forward of a class that the container does not have any more: it must not serve."""

    def scaled(self, x):
        return self.relu(self.bn(self.conv(x))) * self.scale

    model = build(block(scaled, scale=2.0), x.device)
    original, ours, x = copy.deepcopy(model), cnnfast.convert(model), image().to(x.device)
    add_hook(ours)
    ours.scale = original.scale = 3.0
    torch.testing.assert_close(ours(x), original(x), rtol=1e-10, atol=1e-10)
    remove_hook(ours)
    ours.scale = original.scale = 5.0
    torch.testing.assert_close(ours(x), original(x), rtol=1e-10, atol=1e-10)
    assert_reports_are_true(ours, x)


# ----------------------------------------------------------------------------------------------------------------------
# Where nothing can be seen


def test_a_report_that_could_not_look_says_so(quick):
    """A block that needs two images is planned, and the default input does not run."""
    model = cnnfast.convert(build(block(lambda self, x, y: self.relu(self.bn(self.conv(x)) + y)), quick))
    report = cnnfast.report(model)
    assert report.count("fused") == 1
    assert report.notes[0].startswith(
        "What is fused was planned, and not seen in a run: the model does not take 1x4x224x224: RuntimeError"
    )
    add_hook(model.conv)
    report = cnnfast.report(model)
    assert report.count("fused") == 0
    assert {row.name: row.status for row in report.rows}["conv"] == "left"


def test_a_container_that_is_wrapped_and_not_looked_at(quick):
    """Whether a forward on the instance calls the class's is not known, and not claimed."""
    ours = cnnfast.convert(build(block(lambda self, x, y: self.relu(self.bn(self.conv(x)) + y)), quick))
    add_hook(ours)
    report = cnnfast.report(ours)
    assert report.count("fused") == 0
    assert "was replaced on the instance" in {row.name: row.reason for row in report.rows}["conv"]
    x = image().to(quick)
    assert assert_report_is_true(ours, x, x).count("fused") == 1


def test_a_model_that_does_not_run_as_it_is(quick):
    """One value a channel: an error in training, where the norm cannot tell how they vary."""
    model = build(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, 3, 1), nn.BatchNorm2d(3)), quick)
    ours, x = cnnfast.convert(model), image().to(quick)[:1]
    assert cnnfast.report(ours, x).notes[:1] == [n for n in cnnfast.report(ours, x).notes[:1] if "not seen" not in n]
    report = cnnfast.report(ours.train(), x)
    assert report.notes[0].startswith(
        "What is fused was planned, and not seen in a run: "
        "in its present modes it raises ValueError: Expected more than 1 value"
    )


class Drops(nn.Module):
    """Skips its block at random, by whichever generator."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        kept = random.random() + numpy.random.random() + torch.rand(()).to(x) > -1
        return self.block(x) if not self.training or x.is_meta or kept else x


def test_a_look_is_not_noticed(net, x):
    """Functions that hook, and numbers that are drawn, are the user's."""
    heard = []
    ours = cnnfast.convert(Drops(net)).train()
    numbers = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    cnnfast.report(ours, x)
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == numbers
    for module in ours.modules():
        module.register_forward_hook(lambda *call: heard.append(1))
        module.register_forward_pre_hook(functools.partial(lambda name, *call: heard.append(name), "before"))
    attributes = [dict(vars(m)) for m in ours.modules()]
    cnnfast.report(ours, x)
    assert not heard
    assert [dict(vars(m)) for m in ours.modules()] == attributes


def test_nobody_is_waited_for(quick, monkeypatch: pytest.MonkeyPatch):
    """Where several processes train, what runs on real tensors may wait for the others: only meta tensors are tried."""
    calls = []

    def asks(self, x):
        calls.append(x.is_meta)
        return self.relu(self.bn(self.conv(x))) if x.sum() > -1e9 else x

    class Asks(Block):
        forward = asks

    ours, x = (
        cnnfast.convert(nn.Sequential(build(Asks, quick), nn.Conv2d(CHANNELS, 3, 1).double().to(quick))),
        image().to(quick),
    )
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    calls.clear()
    cnnfast.report(ours.train(), x)
    assert calls == [True, True, False], "a look, and the layers' sizes, in eval"


def test_the_comparison_can_fail(net, x, monkeypatch: pytest.MonkeyPatch):
    """A report of another state is not taken for true."""
    ours = cnnfast.convert(net)
    told = cnnfast.report(ours, x)
    ours.stem[0].register_forward_hook(do_nothing)
    monkeypatch.setattr(cnnfast, "report", lambda *_: told)
    with pytest.raises(AssertionError):
        assert_report_is_true(ours, x)
