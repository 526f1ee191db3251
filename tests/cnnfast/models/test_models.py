"""cnnfast.models against torchvision: state, results, and whole networks through the kernels against float64."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast import models
from cnnfast.checking.judge import compare
from cnnfast_kernels import tiling
from tests.support.agreement import assert_served_by_kernels, normal
from tests.support.modules import randomise

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
FACTORIES = {name: getattr(models, name) for name in NAMES}
OPTIONS = {"num_classes": 10, "zero_init_residual": True, "replace_stride_with_dilation": (False, True, True)}


def grouped(channels: int) -> nn.GroupNorm:
    """A norm that starts with other weights than torchvision's ResNet gives it."""
    norm = nn.GroupNorm(2, channels)
    nn.init.constant_(norm.weight, 3)
    return norm


@pytest.fixture
def quick_tiles(monkeypatch, device):
    """In the interpreter, where a step takes the same time whatever the tile, tiles larger than any GPU's: what is
    tested is how networks are composed of kernels; tiles are tested one by one (tests/kernels).
    """
    if device.type == "cpu":
        for precision in tiling.DEFAULT_TILES:
            monkeypatch.setitem(tiling.DEFAULT_TILES, precision, (tiling.TileConfig(256, 256, 256),) * 2)


# ----------------------------------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("name", NAMES)
def test_state_dict(name, options, torchvision):
    """Strictly both ways, with the same members, layouts of convolutions and repr."""
    if name in ("resnet18", "resnet34"):  # their block does not dilate, in torchvision neither
        options = {k: v for k, v in options.items() if k != "replace_stride_with_dilation"}
    with torch.device("meta"):
        ours, theirs = (getattr(library, name)(**options) for library in (models, torchvision.models))
    kinds = [
        [(n, m._get_name(), m.extra_repr()) for n, m in model.named_modules() if not m._modules]
        for model in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert ours.state_dict()._metadata == state._metadata
    assert all(
        a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(ours.state_dict().values(), state.values(), strict=True)
    )
    ours.load_state_dict(state)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet18", {"zero_init_residual": True}),
        ("resnet18", {"zero_init_residual": True, "norm_layer": grouped}),
        ("resnext50_32x4d", OPTIONS),
    ],
)
def test_initialisation_and_pytorchs_path(name, options, torchvision):
    """The same seed draws the same parameters, and where PyTorch serves every bit of the output and the gradients is
    torchvision's.
    """
    results = []
    for library in (models, torchvision.models):
        torch.manual_seed(0)
        model = getattr(library, name)(**options)
        x = normal(2, 3, 33, 33, dtype=torch.float32)
        with cnnfast.backend("torch"):
            y = model(x)
            y.square().mean().backward()
        results.append({"y": y, **model.state_dict(), **{f"grad of {n}": p.grad for n, p in model.named_parameters()}})
        with cnnfast.backend("torch"), torch.no_grad():
            results[-1]["eval"] = model.eval()(x)
    assert results[0].keys() == results[1].keys()
    for key, t in results[0].items():
        assert torch.equal(t, results[1][key]), key


def test_arguments():
    with torch.device("meta"):
        model = models.resnet50(7, in_channels=1)
        assert model.fc.out_features == 7
        assert model.conv1.weight.shape == (64, 1, 7, 7)
        with pytest.raises(ValueError, match=r"replace_stride_with_dilation=\(True,\)"):
            models.resnet50(replace_stride_with_dilation=(True,))
        with pytest.raises(NotImplementedError, match="dilation"):
            models.resnet18(replace_stride_with_dilation=(False, False, True))
        with pytest.raises(ValueError, match="base_width=128"):
            models.resnet34(width_per_group=128)


@pytest.mark.parametrize("name", NAMES)
def test_factories_list_their_options(name):
    """The names that ResNet has, with its defaults, except for those that the factory's own name says."""
    options = inspect.signature(models.ResNet).parameters
    fixed = {"resnext50_32x4d": {"groups", "width_per_group"}, "wide_resnet50_2": {"width_per_group"}}.get(name, set())
    listed = inspect.signature(getattr(models, name)).parameters
    assert list(listed) == [option for option in options if option not in {"block", "layers", *fixed}]
    assert all(listed[option].default == options[option].default for option in listed)
    assert getattr(models, name).__doc__


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("num_class", "Did you mean 'num_classes'?"),
        ("in_chans", "Did you mean 'in_channels'?"),
        ("zero_init", "Did you mean 'zero_init_residual'?"),
        ("norm", "Did you mean 'norm_layer'?"),
        (
            "pretrained",
            "Its arguments are num_classes, in_channels, zero_init_residual, groups, width_per_group, "
            "replace_stride_with_dilation, norm_layer",
        ),
    ],
)
def test_an_unknown_option(option, says):
    with pytest.raises(TypeError) as refused:
        models.resnet18(**{option: 3})
    assert str(refused.value) == f"resnet18() got an unexpected keyword argument {option!r}. {says}"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("resnet18", "resnet34")])
def test_every_option_reaches_the_network(name):
    """Of the factories of Bottleneck, which takes them all; of BasicBlock's they reach its refusal (test_arguments)."""
    made = []

    def norm(channels: int) -> nn.BatchNorm2d:
        made.append(channels)
        return nn.BatchNorm2d(channels, eps=0.5)

    given = {"groups": 2, "width_per_group": 32}
    given = {
        option: value for option, value in given.items() if option in inspect.signature(FACTORIES[name]).parameters
    }
    with torch.device("meta"):
        plain = FACTORIES[name]()
        model = FACTORIES[name](
            7, 1, zero_init_residual=True, replace_stride_with_dilation=(False, False, True), norm_layer=norm, **given
        )
    assert (model.fc.out_features, model.conv1.in_channels) == (7, 1)
    assert model.layer4[1].conv2.dilation == (2, 2)
    assert [(model.groups, model.base_width)] == [
        (given.get("groups", plain.groups), given.get("width_per_group", plain.base_width))
    ]
    assert len(made) == len([m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)])
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.5}


def test_basic_blocks_take_every_option_too():
    for name in ("resnet18", "resnet34"):
        for option, value in (("groups", 2), ("width_per_group", 32)):
            with torch.device("meta"), pytest.raises(ValueError, match=str(value)):
                FACTORIES[name](**{option: value})
        with torch.device("meta"), pytest.raises(NotImplementedError):
            FACTORIES[name](replace_stride_with_dilation=(True, False, False))
        model = FACTORIES[name](
            3, 1, zero_init_residual=True, norm_layer=lambda channels: nn.BatchNorm2d(channels, 0.5)
        )
        assert (model.fc.out_features, model.conv1.in_channels) == (3, 1)
        assert not model.layer1[0].bn2.weight.any()
        assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.5}


def test_copies():
    model = models.resnet18(num_classes=3).eval()
    x = normal(1, 3, 32, 32, dtype=torch.float32)
    with cnnfast.backend("torch"), torch.no_grad():
        y = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), y)


# ----------------------------------------------------------------------------------------------------------------------
# Through the kernels


def results(model: nn.Module, x: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Output, gradients and statistics of a copy of `model` after one step, channels_last."""
    model = copy.deepcopy(model).to(device, dtype).to(memory_format=torch.channels_last)
    x = x.to(device, dtype).to(memory_format=torch.channels_last).requires_grad_()
    y = model(x)
    y.backward(normal(*y.shape, seed=3).to(y))
    found = {
        "output": y.detach(),
        "grad of input": x.grad,
        **{f"grad of {n}": p.grad for n, p in model.named_parameters()},
    }
    found |= {n: t for n, t in model.named_buffers() if t.is_floating_point()}
    return {n: t.cpu() for n, t in found.items()}


def judge(ours: nn.Module, theirs: nn.Module, x: Tensor, device: torch.device) -> cnnfast.recording.Trace:
    """The error of everything is at most twice that of torchvision's network in float32, by PyTorch's fastest
    convolutions and by its plain ones (on one machine either may be lucky), plus a unit in the last place.

    That says little where rounding moves an argument of a ReLU across zero, since gradients jump there, whoever
    computes them: x has to be one for which PyTorch's do not.
    """
    ours.load_state_dict(theirs.state_dict())
    with cnnfast.trace() as trace:
        mine = results(ours, x, torch.float32, device)
    assert_served_by_kernels(trace)
    their, right = results(theirs, x, torch.float32, device), results(theirs, x, torch.float64)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = results(theirs, x, torch.float32)
    assert mine.keys() == right.keys()
    dx = right["grad of input"]
    assert (their["grad of input"] - dx).abs().max() < 1e-3 * dx.abs().max(), "PyTorch's gradients jump: take another x"
    judged = [compare(n, t, their[n], plain[n], right[n], precision="float32") for n, t in mine.items()]
    assert not [str(c) for c in judged if not c.ok]
    return trace


def network(torchvision, name: str, x: Tensor) -> nn.Module:
    """torchvision's, initialised by it, with random norms whose statistics are about those of x, so that the signal
    keeps its size.
    """
    torch.manual_seed(1)
    model = getattr(torchvision.models, name)(num_classes=10).double()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for i, m in enumerate(norms):
        randomise(m, seed=i).momentum = 0.9
    with torch.no_grad():
        model(x)
    for m in norms:
        m.momentum = 0.1
    return model.float()


def test_resnet18(torchvision, device, quick_tiles):
    """Training, forward and backward: of statistics, all parameters and the input."""
    x = normal(2, 3, 33, 33)
    trace = judge(models.resnet18(num_classes=10), network(torchvision, "resnet18", x), x, device)
    operations = [call.operation for call in trace]
    gradients = "conv_dgrad", "conv_dgrad_below", "conv_wgrad"
    assert [operations.count(n) for n in ("conv_stats", "conv_fprop", *gradients)] == [20, 0, 4, 16, 20]


def test_resnet18_in_eval(torchvision, device, quick_tiles):
    """One kernel a convolution."""
    x = normal(2, 3, 32, 32)
    theirs = network(torchvision, "resnet18", x).eval()
    ours = models.resnet18(num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad(), cnnfast.trace() as trace:
        y = ours.to(device)(x.float().to(device)).cpu()
    assert trace.launches == ["conv_fprop_kernel", "max_pool_kernel", *["conv_fprop_kernel"] * 19, "plane_mean_kernel"]
    with torch.no_grad():
        their, right = theirs(x.float()), theirs.double()(x)
    assert (judged := compare("output", y, their, right, right, precision="float32")).ok, str(judged)


@pytest.mark.parametrize(("name", "stage"), [*(("resnet50", stage) for stage in (1, 2, 3, 4)), ("resnext50_32x4d", 2)])
def test_first_blocks(name, stage, torchvision, device, quick_tiles):
    """The first block of a stage, with its shortcut, at full width."""
    with torch.device("meta"):
        blocks = [getattr(library, name)().get_submodule(f"layer{stage}.0") for library in (models, torchvision.models)]
    ours, theirs = (randomise(block.to_empty(device="cpu")) for block in blocks)
    judge(ours, theirs, normal(2, theirs.conv1.in_channels, 3, 3), device)


@pytest.mark.slow
@pytest.mark.parametrize(("training", "seed"), [(True, 3), (False, 1)], ids=["training", "eval"])
def test_resnet50(training, seed, torchvision, device, quick_tiles):
    """The whole of it, forward and backward."""
    x = normal(2, 3, 33, 33, seed=seed)
    trace = judge(
        models.resnet50(num_classes=10).train(training), network(torchvision, "resnet50", x).train(training), x, device
    )
    operations = [call.operation for call in trace]
    assert operations.count("conv_stats" if training else "conv_fprop") == operations.count("conv_wgrad") == 53
