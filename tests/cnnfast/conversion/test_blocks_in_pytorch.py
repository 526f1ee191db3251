"""Residual blocks in training, of cnnfast.nn and converted, within what PyTorch does with modules: copies, files,
averages, hooks, frozen and wrapped members, compile and export. Each has PyTorch's numbers, and is one operator unless
somebody would miss a member's call.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import cnnfast
import cnnfast.nn as cnn
from tests.support.agreement import normal
from tests.support.model_zoo import randomise
from tests.support.packages import package
from tests.support.residual import IMAGES, converted, joined, of_ours, plain_blocks
from tests.support.steps import assert_same_steps, noise

BOTH, FIRST, SECOND = [3, 2], [3], [2]  # convolutions of the branches that are one operator
MAKERS = {"ours": of_ours, "converted": converted}
Change = Callable[[nn.Module], Any]


@pytest.fixture(params=MAKERS)
def make(request) -> Callable[[nn.Module], nn.Module]:
    return MAKERS[request.param]


@pytest.fixture
def plain(quick) -> nn.Module:
    return plain_blocks(quick)


@pytest.fixture
def x(quick) -> Tensor:
    return normal(*IMAGES, seed=1).to(quick)


def assert_trains(ours: nn.Module, plain: nn.Module, x: Tensor, blocks: list[int], **options: Any) -> None:
    """A step of training leaves what PyTorch's leaves, and these blocks were one operator each."""
    with joined() as seen:
        assert_same_steps(ours, plain, x, modes=("train",), **options)
    assert seen == blocks


def trained(model: nn.Module, x: Tensor, steps: int = 2, after: Callable[[], None] = lambda: None) -> nn.Module:
    """By SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(x * (1 + step)).square().mean().backward()
        optimizer.step()
        after()
    optimizer.zero_grad()
    return model


def assert_same_state(mine: nn.Module, right: nn.Module) -> None:
    torch.testing.assert_close(mine.state_dict(), right.state_dict(), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Copies, files, averages


def test_deepcopy(make, plain, x):
    ours = make(plain)
    twin = copy.deepcopy(ours)
    assert not {id(t) for t in twin.state_dict(keep_vars=True).values()} & {
        id(t) for t in ours.state_dict(keep_vars=True).values()
    }
    trained(twin, x)
    assert_trains(twin, trained(copy.deepcopy(plain), x), x, BOTH)
    assert_trains(ours, plain, x, BOTH)


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickle(make, plain, x, protocol):
    loaded = pickle.loads(pickle.dumps(trained(make(plain), x), protocol))
    assert_trains(loaded, trained(plain, x), x, BOTH)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_go_both_ways(make, plain, x, assign):
    """To a file, to PyTorch's own blocks and back into others of ours, also by other Parameter objects."""
    ours, file = trained(make(plain), x), io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other = randomise(copy.deepcopy(plain))
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    again = make(plain)
    again.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_same_state(again, trained(plain, x))
    assert_trains(again, other, x, BOTH)


def test_an_average(make, plain, x):
    """By torch.optim.swa_utils, of buffers too; the average is evaluated, has its norms renewed, and trains on."""
    averages = []
    for model in (make(plain), plain):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
        with joined() as blocks:
            trained(model, x, 3, after=lambda average=average, model=model: average.update_parameters(model))
        assert blocks == ([] if model is plain else BOTH * 3)
        averages.append(average)
    mine, right = averages
    assert_same_state(mine, right)
    assert_same_steps(mine, right, x, modes=("eval", "no_grad"))
    for average in averages:
        update_bn([x, x * 2], average)
    assert_trains(mine, right, x, BOTH)


def test_reverted_after_training(plain, x):
    """PyTorch's classes, and what they would have learnt."""
    ours = trained(converted(plain), x, 3)
    back = cnnfast.revert(ours)
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]
    trained(plain, x, 3)
    assert_same_state(back, plain)
    assert_trains(back, plain, x, [])
    assert_trains(cnnfast.convert(back), plain, x, BOTH)


# ----------------------------------------------------------------------------------------------------------------------
# Hooks


class Recorder:
    """Hooks that keep what they see."""

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []

    def keep(self, *seen: Any) -> None:
        self.seen += [t if t is None else t.detach().clone() for t in seen]

    def forward(self, module, inputs, keywords, output):
        self.keep(*inputs, *keywords.values(), output)

    def pre(self, module, inputs):
        self.keep(*inputs)

    def backward(self, module, gradients_in, gradients_out):
        self.keep(*gradients_in, *gradients_out)

    def backward_pre(self, module, gradients_out):
        self.keep(*gradients_out)


REGISTER: dict[str, Callable[[nn.Module, Recorder], Any]] = {
    "forward": lambda module, recorder: module.register_forward_hook(
        recorder.forward, with_kwargs=True, always_call=True
    ),
    "pre": lambda module, recorder: module.register_forward_pre_hook(recorder.pre),
    "backward": lambda module, recorder: module.register_full_backward_hook(recorder.backward),
    "backward_pre": lambda module, recorder: module.register_full_backward_pre_hook(recorder.backward_pre),
}
MEMBERS = {  # by name, the blocks that are still one
    "0.conv1": SECOND,
    "0.bn3": SECOND,
    "0.relu": SECOND,
    "0.downsample": SECOND,
    "0.downsample.0": SECOND,
    "0.downsample.1": SECOND,
    "1.bn1": FIRST,
    "0": BOTH,
    "": BOTH,
}


def out_of_place(model: nn.Module) -> nn.Module:
    """PyTorch refuses backward hooks of what is changed in place."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


HOOKS = [
    (name, kind)
    for name in MEMBERS
    for kind in REGISTER
    if name != "0.bn3" or not kind.startswith("backward")  # the shortcut is added in place to what this norm gives
]


@pytest.mark.parametrize(("name", "kind"), HOOKS)
def test_a_hook(make, plain, x, name, kind):
    """It sees what it would have seen, as often, registered before conversion or after it. Removed, all is joined."""
    recorders, handles = [], []

    def watch(model: nn.Module) -> nn.Module:
        recorders.append(Recorder())
        handles.append(REGISTER[kind](model.get_submodule(name), recorders[-1]))
        return model

    out_of_place(plain)
    watched = [watch(out_of_place(make(plain)))]
    if make is converted:
        watched.append(cnnfast.convert(watch(copy.deepcopy(plain))))
    for ours, mine in zip(watched, list(recorders), strict=True):
        right = watch(copy.deepcopy(plain))
        assert_trains(ours, right, x, MEMBERS[name])
        assert len(mine.seen) == len(recorders[-1].seen) > 0
        torch.testing.assert_close(mine.seen, recorders[-1].seen, rtol=1e-10, atol=1e-10)
    if name not in ("", "0"):
        for handle in handles:
            handle.remove()
        assert_trains(watched[0], right, x, BOTH)


@pytest.mark.parametrize("name", ["0.conv2", "0.bn1", "0.relu", "0.downsample.1", "1.bn2"])
def test_a_hook_that_changes_something(make, plain, x, name):
    ours = make(plain)
    for model in (ours, plain):
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * 2)
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    assert_trains(ours, plain, x, FIRST if name.startswith("1") else SECOND)


def test_hooks_of_all_modules(make, plain, x):
    """They see every module, in PyTorch's order, and no block is one."""
    ours, names = make(plain), []
    for model in (ours, plain):
        paths = {module: name for name, module in model.named_modules()}
        names.append(seen := [])
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, seen=seen, paths=paths: seen.append(paths[module])
        )
        with joined() as blocks:
            model.train()(x)
        handle.remove()
        assert not blocks
    assert names[0] == names[1]
    assert_trains(ours, plain, x, BOTH)


def test_hooks_of_tensors(make, plain, x):
    """On a parameter, on what was accumulated into it, and on what stands between blocks: these need no member."""
    seen: list[Tensor] = []
    ours = make(plain)
    for model in (ours, plain):
        model[0].conv2.weight.register_hook(lambda grad: grad * 2)
        model[1].bn1.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        model[0].register_forward_hook(
            lambda module, inputs, y: y.register_hook(lambda g: seen.append(g.clone())) and y
        )
    assert_trains(ours, plain, x, BOTH)
    assert len(seen) == 4
    torch.testing.assert_close(seen[2:], seen[:2], rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Members that are frozen, or are others


def without_gradients(*names: str) -> Change:
    def change(model: nn.Module) -> None:
        for name in names:
            model.get_submodule(name).requires_grad_(False)

    return change


class Wrapped(nn.Module):
    """As an adapter that is put around a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(1, dtype=torch.float64) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale.to(x.device)


def wrapped(model: Any) -> None:
    device = model[0].conv2.weight.device
    model[0].conv2 = Wrapped(model[0].conv2).to(device)


def pruned(model: Any) -> None:
    prune.l1_unstructured(model[0].conv2, "weight", 0.5)


def spectral(model: Any) -> None:
    torch.manual_seed(0)
    parametrizations.spectral_norm(model[0].conv2)


def replaced_forward(model: Any) -> None:
    bn = model[0].bn2
    bn.forward = lambda x: nn.BatchNorm2d.forward(bn, x) * 2


def evaluating_norm(model: Any) -> None:
    """train() of the model is as a user's who freezes this norm afterwards."""
    bn = model[0].bn2
    bn.train = lambda mode=True: bn
    bn.training = False


CHANGES: dict[str, tuple[Change, list[int]]] = {
    "a convolution without gradients": (without_gradients("0.conv2", "1.conv1"), BOTH),
    "norms without gradients": (without_gradients("0.bn2", "0.downsample.1", "1.bn2"), BOTH),
    "a block without gradients": (without_gradients("0"), BOTH),
    "a norm in eval": (evaluating_norm, SECOND),
    "a wrapped convolution": (wrapped, SECOND),
    "a pruned convolution": (pruned, SECOND),
    "a parametrized convolution": (spectral, SECOND),
    "a replaced forward": (replaced_forward, SECOND),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_members(make, plain, x, what):
    change, blocks = CHANGES[what]
    ours = make(plain)
    for model in (ours, plain):
        change(model)
    frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
    before = copy.deepcopy(ours.state_dict())
    assert_trains(ours, plain, x, blocks)
    for name in frozen:
        assert ours.get_parameter(name).grad is None
    if what == "a norm in eval":
        after = ours.state_dict()
        kept = [name for name in before if name.startswith("0.bn2.")]
        assert all(torch.equal(before[name], after[name]) for name in kept)
        assert not torch.equal(before["0.bn1.running_mean"], after["0.bn1.running_mean"])


def test_nothing_before_wants_a_gradient(make, plain, x):
    """A frozen block in no gradient's way is no operator of training; its norms learn statistics all the same."""
    ours = make(plain)
    for model in (ours, plain):
        model[0].requires_grad_(False)
        model.train()
    with joined() as blocks:
        results = [model(x) for model in (ours, plain)]
        for y in results:
            y.square().sum().backward()
    assert blocks == SECOND
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[1].conv1.weight.grad, plain[1].conv1.weight.grad, rtol=1e-10, atol=1e-10)
    assert_same_state(ours, plain)


def test_synchronised_norms_of_one_process(make, plain, x):
    """They wait for nobody, so that the blocks are one."""
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(make(plain))
    assert_trains(cnnfast.convert(synchronised), plain, x, BOTH)


def test_what_blocks_share(make, plain, x):
    """A weight of two blocks, a weight of two convolutions of one, and a norm of two blocks."""
    models = [nn.Sequential(plain[1], copy.deepcopy(plain[1]))]
    if make is of_ours:
        blocks = nn.Sequential(cnn.BasicBlock(8, 8), cnn.BasicBlock(8, 8)).double().to(x.device)
        blocks.load_state_dict(models[0].state_dict())
        models.append(blocks)
    else:
        models.append(copy.deepcopy(models[0]))
    for model in models:
        model[1].conv1.weight = model[0].conv1.weight
        model[1].conv2.weight = model[1].conv1.weight
        model[1].bn2 = model[0].bn2
    right, ours = models
    ours = ours if make is of_ours else cnnfast.convert(ours)
    assert_trains(ours, right, normal(3, 8, 6, 5, seed=1).to(x.device), [2, 2])


def test_a_block_that_is_called_twice(make, plain, x):
    """Its gradients add up, and its statistics move twice."""
    ours = make(plain)
    twice = [nn.Sequential(model[0], model[1], model[1]) for model in (ours, plain)]
    assert_trains(*twice, x, [*BOTH, 2])
    assert int(twice[0][1].bn1.num_batches_tracked) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Calls by others


def test_parameters_given_for_a_call(make, plain, x):
    given = {name: p.detach() * 1.5 for name, p in plain.named_parameters()}
    results = []
    with joined() as blocks:
        for model in (make(plain), plain):
            tensors = {name: p.clone().requires_grad_() for name, p in given.items()}
            y = torch.func.functional_call(model.train(), tensors, (x,))
            results.append([y, *torch.autograd.grad(y.square().sum(), list(tensors.values()))])
    assert blocks == BOTH
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


class Watching(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__name__", str(function)))
        return function(*args, **kwargs or {})


def test_a_mode_sees_the_calls_of_layers(make, plain, x):
    ours = make(plain).train()
    with joined() as blocks, Watching() as mode:
        y = ours(x)
    assert not blocks
    assert mode.seen.count("conv_bn_act") == 6
    torch.testing.assert_close(y, plain.train()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("child", ["1", "0.conv2", "0.downsample"])
def test_a_compiled_child(make, plain, x, child):
    """A block is one operator inside of what was compiled, and none if it has a compiled member."""
    torch._dynamo.reset()
    ours = make(plain)
    parent, _, name = child.rpartition(".")
    compiled = torch.compile(ours.get_submodule(child), backend="aot_eager")
    setattr(ours.get_submodule(parent), name, compiled)
    blocks = BOTH if not parent else SECOND if parent == "0" else FIRST
    with joined() as seen:
        y = ours.train()(x)
        y.backward(noise(y))
    assert seen == blocks
    right = plain.train()(x)
    right.backward(noise(right))
    torch.testing.assert_close(y, right, rtol=1e-9, atol=1e-9)
    grads = [[p.grad for p in model.parameters()] for model in (ours, plain)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(list(ours.buffers()), list(plain.buffers()), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("mode", "strict", "operators"),
    [
        ("eval", False, {"conv_bn_act": 6}),
        ("train", False, {"conv_bn_act_training": 6}),  # this exporter watches the calls of functions
        ("train", True, {"bottleneck": 1, "basic_block": 1}),
    ],
)
def test_exported(device, library_first, mode, strict, operators):
    """By torch.export, for any batch, with derivatives: results, gradients and running statistics."""
    plain, x = plain_blocks(device).train(mode == "train"), normal(*IMAGES, seed=1).to(device)
    ours = converted(plain)
    with torch.set_grad_enabled(mode == "train"):
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(ours, (x,), dynamic_shapes=({0: batch},), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert Counter(t.split(".")[1] for t in targets if t.startswith("cnnfast.")) == operators
    module, larger = program.module(), torch.cat([x, x * 2])
    y, right = module(larger), plain(larger)
    torch.testing.assert_close(y, right, rtol=1e-9, atol=1e-9)
    if mode == "train":
        y.backward(noise(y))
        right.backward(noise(right))
        for name, p in plain.named_parameters():
            torch.testing.assert_close(module.get_parameter(name).grad, p.grad, rtol=1e-8, atol=1e-8, msg=name)
    assert_same_state(module, plain)


# ----------------------------------------------------------------------------------------------------------------------
# Networks of torchvision and timm, each of a block and one that adapts its input in the first of two stages

POOLED_SHORTCUT = (
    "layer1.0.conv3 and 1 more is not part of .* what is added is not its branch's input, or a convolution and a norm"
)
NETWORKS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "resnet50": ("torchvision", {}, 3, ""),
    "resnext50_32x4d": ("torchvision", {"groups": 4, "width_per_group": 8}, 3, ""),
    "wide_resnet50_2": ("torchvision", {"width_per_group": 128}, 3, ""),
    "timm's resnet50": ("timm", {}, 3, ""),
    "timm's resnext50_32x4d": ("timm", {"cardinality": 4, "base_width": 8}, 3, ""),
    "timm's wide_resnet50_2": ("timm", {"base_width": 128}, 3, ""),
    "timm's resnet50d": ("timm", {"avg_down": True, "stem_type": "deep"}, 1, POOLED_SHORTCUT),
    "timm's seresnet50": (
        "timm",
        {"block_args": {"attn_layer": "se"}},
        0,
        "layer1.0.se and 2 more is not .* se stands",
    ),
    "timm's ecaresnet50": (
        "timm",
        {"block_args": {"attn_layer": "eca"}},
        0,
        "layer1.0.se and 2 more is not .* se stands",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(quick, name):
    """A report says how many blocks are one operator, which are not, and why; so many are, with PyTorch's numbers."""
    library, options, count, apart = NETWORKS[name]
    resnet = package(library).models.resnet
    if library == "torchvision":
        model = resnet.ResNet(resnet.Bottleneck, (2, 1, 0, 0), num_classes=3, **options)
        model.fc = nn.Identity()
    else:
        model = resnet.ResNet(resnet.Bottleneck, (2, 1), channels=(8, 16), num_classes=3, **options)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model, x = randomise(model).double().to(quick), normal(2, 3, 32, 32, seed=1).to(quick)
    ours = cnnfast.convert(copy.deepcopy(model))
    told = [note for note in cnnfast.report(ours, x).notes if "residual block" in note]
    trains = f"{count} residual blocks train as one operator each."
    trains = "1 residual block trains as one operator." if count == 1 else trains
    assert told[: bool(count)] == [trains] * bool(count)
    assert [bool(re.search(apart, note)) for note in told[bool(count) :]] == [True] * bool(apart), told
    assert_trains(ours, model, x, [3] * count, tolerance=1e-9)
