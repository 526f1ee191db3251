"""cnnfast.nn's layers against torch.nn's of the same name: results, gradients, buffers, state, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import cnnfast
import cnnfast.nn as cnn
from cnnfast import dispatch
from tests.support.agreement import assert_close, assert_served_by_kernels, integers, normal, run
from tests.support.modules import assert_same_buffers, outcome, randomise

NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
SUBCLASSES = ("Conv2d", "Conv1d", "ConvTranspose2d", *NORMS, "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d")
IMAGE, UNBATCHED, SEQUENCE = (2, 4, 6, 5), (4, 6, 5), (2, 4, 7)
PADDED = ("reflect", "replicate", "circular")

# (class, its arguments, keywords, input's shape)
LAYERS = [
    ("Conv2d", (4, 6, 3), {}, IMAGE),
    (
        "Conv2d",
        (4, 6, (3, 2)),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2, "bias": False},
        IMAGE,
    ),
    ("Conv2d", (4, 6, (2, 3)), {"padding": "same"}, IMAGE),
    ("Conv2d", (4, 6, 3), {"padding": "valid"}, UNBATCHED),
    *[("Conv2d", (4, 6, 3), {"padding": (2, 1), "stride": 2, "padding_mode": mode}, IMAGE) for mode in PADDED],
    *[("Conv2d", (4, 2, (4, 3)), {"padding": "same", "padding_mode": mode}, IMAGE) for mode in PADDED],
    ("Conv2d", (4, 6, 3), {"padding": "valid", "padding_mode": "circular"}, IMAGE),
    ("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, UNBATCHED),
    ("Conv1d", (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, SEQUENCE),
    ("Conv1d", (4, 6, 4), {"padding": "same", "padding_mode": "replicate"}, SEQUENCE),
    ("Conv1d", (4, 6, 3), {"dilation": 2, "bias": False}, SEQUENCE[1:]),
    ("ConvTranspose2d", (4, 6, 3), {"stride": 2, "padding": 1, "output_padding": (1, 0), "groups": 2}, IMAGE),
    ("ConvTranspose2d", (4, 6, (2, 3)), {"dilation": 2, "bias": False}, UNBATCHED),
    ("BatchNorm2d", (4,), {}, IMAGE),
    ("BatchNorm2d", (4,), {"affine": False, "eps": 0.1, "momentum": 0.3}, IMAGE),
    ("BatchNorm2d", (4,), {"track_running_stats": False}, IMAGE),
    ("BatchNorm1d", (4,), {}, (5, 4)),
    ("BatchNorm1d", (4,), {"momentum": None}, SEQUENCE),
    ("BatchNorm3d", (4,), {"eps": 0.1}, (2, 4, 3, 2, 3)),
    ("MaxPool2d", (3,), {"stride": 2, "padding": 1}, IMAGE),
    ("MaxPool2d", ((2, 3),), {"dilation": (2, 1), "ceil_mode": True}, UNBATCHED),
    ("AvgPool2d", (3,), {"stride": 2, "padding": 1, "count_include_pad": False}, IMAGE),
    ("AvgPool2d", (2,), {"ceil_mode": True, "divisor_override": 3}, UNBATCHED),
    *[("AdaptiveAvgPool2d", (size,), {}, IMAGE) for size in (1, (1, 1), (3, None), (2, 7))],
    ("AdaptiveAvgPool2d", (1,), {}, UNBATCHED),
]


def pair(name, args, options, device, dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    """(ours, PyTorch's), with the same parameters: ours is PyTorch's instance, copied, in our class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = getattr(nn, name)(*args, **options)
    theirs = randomise(theirs).to(device, dtype)
    ours = copy.deepcopy(theirs)
    ours.__class__ = getattr(cnn, name)
    return ours, theirs


MODES = [(*case, training) for case in LAYERS for training in ((True, False) if case[0] in NORMS else (True,))]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("name", "args", "options", "shape", "training"), MODES, ids=str)
def test_layers(name, args, options, shape, training, device):
    ours, theirs = (m.train(training) for m in pair(name, args, options, device))
    x = normal(*shape, seed=9).to(device)
    mine = outcome(ours, x)
    assert_close(mine, outcome(theirs, x))
    assert_served_by_kernels(mine.trace)
    assert_same_buffers(ours, theirs)


def test_max_pool_indices(device):
    ours, theirs = pair("MaxPool2d", (2,), {"return_indices": True}, device)
    x = integers(*IMAGE).to(device)
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert torch.equal(a, b)


def test_transposed_output_size(device):
    """output_size picks the output_padding, as in PyTorch, whose error it also gives."""
    ours, theirs = pair("ConvTranspose2d", (4, 6, 3), {"stride": 2, "padding": 1}, device)
    x = normal(*IMAGE).to(device)
    for size in ([11, 10], [12, 9], [2, 6, 12, 10]):
        torch.testing.assert_close(ours(x, size), theirs(x, size), rtol=1e-12, atol=1e-12)
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="output size"):
            module(x, [20, 20])


@pytest.mark.parametrize("keepdim", [True, False])
def test_global_avg_pool(keepdim, device):
    module = cnn.GlobalAvgPool2d(keepdim)
    for shape in (IMAGE, UNBATCHED):
        x = normal(*shape).to(device)
        mine = run(module, [x])
        assert_close(mine, run(lambda x: x.mean((-2, -1), keepdim=keepdim), [x]))
        assert_served_by_kernels(mine.trace)
    assert repr(module) == f"GlobalAvgPool2d(keepdim={keepdim})"


# ----------------------------------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses(name):
    """The same constructor draws the same parameters; repr, state_dict, pickle and copies are PyTorch's; the class may
    be swapped.
    """
    args, options = next((args, options) for kind, args, options, _ in LAYERS if kind == name)
    modules = []
    for namespace in (cnn, nn):
        torch.manual_seed(0)
        modules.append(getattr(namespace, name)(*args, **options))
    ours, theirs = modules
    assert isinstance(ours, getattr(nn, name))
    assert type(ours).__mro__[1] is getattr(nn, name)
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert type(twin) is type(ours)
        assert repr(twin) == repr(ours)
        assert all(
            torch.equal(a, b) for a, b in zip(twin.state_dict().values(), ours.state_dict().values(), strict=True)
        )
    ours.__class__ = type(theirs)
    assert type(pickle.loads(pickle.dumps(ours))) is type(theirs)


# ----------------------------------------------------------------------------------------------------------------------
# Batch norm's rules


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.0},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "momentum": None},
    ],
    ids=str,
)
def test_batch_norm_over_batches(options, device):
    """Buffers after each of three batches, then in eval, then with statistics frozen within training."""
    ours, theirs = pair("BatchNorm2d", (4,), options, device)
    for step, training in enumerate((True, True, True, False, True)):
        x = normal(*IMAGE, seed=step).to(device)
        y = [m.train(training)(x) for m in (ours, theirs)]
        torch.testing.assert_close(*y, rtol=1e-11, atol=1e-11)
        assert_same_buffers(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("missing", [("num_batches_tracked",), ("running_mean", "running_var"), ("bias",)], ids=str)
def test_batch_norm_without(missing, training, device):
    """Buffers taken away from a norm that tracks: without statistics it normalises by the batch's own, in eval too."""
    modules = [m.train(training) for m in pair("BatchNorm2d", (4,), {}, device)]
    for m in modules:
        for name in missing:
            setattr(m, name, None)
    ours, theirs = modules
    x = normal(*IMAGE).to(device)
    mine = outcome(ours, x)
    assert_close(mine, outcome(theirs, x))
    assert_served_by_kernels(mine.trace)
    assert_same_buffers(ours, theirs)


# ----------------------------------------------------------------------------------------------------------------------
# Errors


WRONG = [
    ("Conv2d", (4, 6, 3), {}, (2, 3, 6, 5)),
    ("Conv2d", (4, 6, 3), {}, (6, 5)),
    ("Conv2d", (4, 6, 9), {}, IMAGE),
    ("Conv2d", (4, 6, 15), {"padding": 7, "padding_mode": "reflect"}, IMAGE),
    ("Conv1d", (4, 6, 3), {}, (2, 3, 7)),
    ("ConvTranspose2d", (4, 6, 3), {}, (2, 3, 6, 5)),
    ("ConvTranspose2d", (4, 6, 3), {}, (6, 5)),
    ("BatchNorm2d", (4,), {}, UNBATCHED),
    ("BatchNorm2d", (4,), {}, (2, 5, 6, 5)),
    ("BatchNorm2d", (4,), {}, (1, 4, 1, 1)),
    ("MaxPool2d", (7,), {}, IMAGE),
    ("AvgPool2d", (2,), {"padding": 2}, IMAGE),
    ("AdaptiveAvgPool2d", (2,), {}, (6, 5)),
    *[(name, next(args for kind, args, *_ in LAYERS if kind == name), {}, None) for name in SUBCLASSES],
]


@pytest.mark.parametrize(("name", "args", "options", "shape"), WRONG, ids=str)
def test_errors(name, args, options, shape, device):
    """What PyTorch's layer refuses ours refuses by the same type, and no buffer of either has changed but the count of
    batches.
    """
    x = [1.0] if shape is None else normal(*shape).to(device)
    modules, kinds = pair(name, args, options, device), []
    for module in modules:
        with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)) as raised:
            module(x)
        kinds.append(raised.type)
    assert kinds[0] is kinds[1]
    assert_same_buffers(*modules)


# ----------------------------------------------------------------------------------------------------------------------
# Weights that are computed


@pytest.mark.parametrize(("name", "shape"), [("Conv2d", IMAGE), ("Conv1d", SEQUENCE), ("ConvTranspose2d", IMAGE)])
def test_parametrized(name, shape, device):
    """Weight norm on an instance whose class was swapped; the weight is computed once a call."""
    ours, theirs = (parametrizations.weight_norm(m) for m in pair(name, (4, 6, 3), {}, device))
    assert isinstance(ours, getattr(cnn, name))
    x = normal(*shape, seed=9).to(device)
    mine = outcome(ours, x)
    assert_close(mine, outcome(theirs, x))
    assert_served_by_kernels(mine.trace)
    seen = []
    ours.parametrizations.weight[0].register_forward_hook(lambda *call: seen.append(call))
    for served_by in ("auto", "torch"):
        with cnnfast.backend(served_by), cnnfast.trace():
            ours(x)
    assert len(seen) == 2
    parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is getattr(cnn, name)


class Standardized(cnn.Conv2d):
    """A layer that hands the convolution a weight of its own."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_subclass_with_a_weight_of_its_own(device):
    module = Standardized(4, 6, 3, padding=1, padding_mode="reflect").to(device, torch.float64)
    x = normal(*IMAGE).to(device)
    mine = outcome(module, x)
    with cnnfast.backend("torch"):
        assert_close(mine, outcome(module, x))
    assert_served_by_kernels(mine.trace)


# ----------------------------------------------------------------------------------------------------------------------
# Where PyTorch serves


@pytest.mark.parametrize(("name", "args", "options", "shape"), LAYERS, ids=str)
def test_pytorchs_path(name, args, options, shape, device, monkeypatch):
    """One decision a call, on record, and PyTorch's bits."""
    decisions = []
    decide = dispatch._torch
    monkeypatch.setattr(dispatch, "_torch", lambda reason: decisions.append(reason) or decide(reason))
    ours, theirs = pair(name, args, options, device, torch.float32)
    x = normal(*shape, dtype=torch.float32).to(device)
    with cnnfast.backend("torch"), cnnfast.trace() as trace:
        y = ours(x)
    assert torch.equal(y, theirs(x))
    assert len(decisions) == 1
    assert [(c.served_by, c.reason) for c in trace] == [("torch", 'backend("torch")')]
    assert trace.calls[0].shapes[0] == shape
    with cnnfast.backend("kernels"), pytest.raises(RuntimeError, match=r'backend\("kernels"\)'):
        ours(x.to(torch.complex64))


def test_transforms(device):
    """functorch's go to PyTorch, through the layer."""
    ours, theirs = pair("Conv2d", (4, 6, 3), {}, device)
    x = normal(3, *IMAGE).to(device)
    torch.testing.assert_close(torch.func.vmap(ours)(x), torch.func.vmap(theirs)(x))


def test_compile(device):
    """All layers in one graph, forward and backward."""
    torch._dynamo.reset()

    def net():
        torch.manual_seed(0)
        layers = [
            cnn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            cnn.BatchNorm2d(4),
            cnn.MaxPool2d(2),
            cnn.ConvTranspose2d(4, 3, 2),
            cnn.AvgPool2d(2),
            cnn.AdaptiveAvgPool2d(2),
            nn.Flatten(2),
            cnn.Conv1d(3, 2, 3),
        ]
        return nn.Sequential(*layers).to(device, torch.float64)

    results = []
    for compiled in (True, False):
        model = net()
        function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        x = normal(2, 3, 8, 7).to(device)
        with cnnfast.trace() as trace:
            y = function(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters())), *model.buffers()])
        assert_served_by_kernels(trace)
    torch.testing.assert_close(*results)
