"""A convolution with its norm, addition and activation as one operator, and its gradients as one: the same as by the
separate operators, what it saves, what it launches, what bytes whole networks save.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as theirs
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
import cnnfast.functional as ours
import cnnfast.nn as cnn
from cnnfast import ops
from cnnfast.activations import activate
from cnnfast.bench.step_counts import count_step
from cnnfast.tuning.capture import capture
from cnnfast_kernels import devices, tables
from cnnfast_kernels.tiling import TileConfig
from tests.support.agreement import leaf, normal, saved_for_backward

LAST, NCHW = torch.channels_last, torch.contiguous_format
GEOMETRY = (1, 2), (1, 0, 1, 1), (1, 1), 2
NAMES = ("x", "w", "bias", "gamma", "beta", "residual")
X, W, Y = (2, 4, 5, 4), (6, 2, 2, 3), (2, 6, 5, 2)
SHAPES = (X, W, (6,), (6,), (6,), Y)


def row_for_the_library(key):
    return tables.TableRow(key, TileConfig(32, 32, 16, 4, 2), "library", {"kernels": 9.0, "library": 4.5})


@pytest.fixture(params=["kernels", "library"])
def server(request, gpu, monkeypatch):
    """Our kernels, or the library where rows say that it is faster."""
    if request.param == "library":
        monkeypatch.setattr(tables, "find", row_for_the_library)
    return request.param


def operands(device, dtype=torch.float64, fmt=LAST, wanted=range(6), without=()):
    """x, w, bias, gamma, beta, residual, of which those `wanted` want a gradient, None for those `without`."""
    found = []
    for i, shape in enumerate(SHAPES):
        t = normal(*shape, seed=i).to(device, torch.float32 if i in (3, 4) and dtype.itemsize < 4 else dtype)
        t = t.contiguous(memory_format=fmt) if t.dim() == 4 else t
        found.append(None if i in without else t.requires_grad_(i in wanted))
    return found


def as_one(x, w, bias, gamma, beta, residual, activation, statistics=(None, None), geometry=(*GEOMETRY, "auto")):
    end = gamma, beta, residual, 1e-5, activation, 0.1, None
    return ops.conv_bn_act_training(x, w, bias, *statistics, statistics[0] is None, 0.1, *end, *geometry)[0]


def apart(x, w, bias, gamma, beta, residual, activation, statistics=(None, None), geometry=(*GEOMETRY, "auto")):
    training = statistics[0] is None
    if training:
        y, *statistics = ops.conv_stats(x, w, bias, *geometry)
    else:
        y = ops.conv_fprop(x, w, bias, *geometry)
    return ops.normalize(y, *statistics, gamma, beta, residual, 1e-5, activation, 0.1, None, training)


def gradients(layer, inputs, *how):
    """(the result and the gradients of what wants one, by name, the trace of it all)."""
    with cnnfast.trace() as trace:
        z = layer(*inputs, *how)
        wanted = {n: t for n, t in zip(NAMES, inputs, strict=True) if t is not None and t.requires_grad}
        dz = torch.empty_like(z, requires_grad=False).copy_(normal(*z.shape, seed=9))
        found = torch.autograd.grad(z, list(wanted.values()), dz) if wanted else ()
    return {"z": z.detach(), **dict(zip(wanted, found, strict=True))}, trace


def assert_same_bits(mine, right):
    torch.testing.assert_close(mine, right, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# One operator and two give the same


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize(
    ("activation", "without", "fmt", "dtype"),
    [
        ("relu", (), LAST, torch.float32),
        ("relu", (2, 5), LAST, torch.float16),
        ("leaky_relu", (3, 4), NCHW, torch.float32),
        ("silu", (2,), LAST, torch.float16),
        ("gelu", (5,), NCHW, torch.float64),
        (None, (), LAST, torch.float32),
        (None, (3, 5), NCHW, torch.float64),
    ],
)
def test_the_bits_of_separate_operators(server, device, activation, without, fmt, dtype, frozen):
    statistics = (normal(6, seed=7).to(device).float(), normal(6, seed=8).to(device).float().abs() + 0.5)
    if dtype == torch.float64:
        statistics = tuple(t.double() for t in statistics)
    how = activation, statistics if frozen else (None, None)
    (mine, trace), (right, separate) = (
        gradients(layer, operands(device, dtype, fmt, without=without), *how) for layer in (as_one, apart)
    )
    assert_same_bits(mine, right)
    assert [t.stride() for t in mine.values()] == [t.stride() for t in right.values()]
    told, right_told = ([(c.operation, c.servers) for c in calls] for calls in (trace, separate))
    assert told == right_told
    assert {c.served_by for c in trace if c.operation.startswith("conv")} == {server}


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_what_is_asked_for_and_no_more(gpu, monkeypatch, device, residual):
    """Every subset of the operands: the bits that all of them together give, and no kernel for any other. The library
    serves the convolution, which takes less time here.
    """
    monkeypatch.setattr(tables, "find", row_for_the_library)
    without, count = ((), 6) if residual else ((5,), 5)
    complete, _ = gradients(as_one, operands(device, torch.float32, without=without), "relu")
    for wanted in (subset for k in range(count + 1) for subset in itertools.combinations(range(count), k)):
        found, trace = gradients(as_one, operands(device, torch.float32, wanted=wanted, without=without), "relu")
        assert_same_bits(found, {name: complete[name] for name in found})
        forward, backward = [call.operation for call in trace][:2], [call.operation for call in trace][2:]
        expected = ["normalize_backward"] * bool(wanted)
        expected += ["conv_dgrad"] * (0 in wanted) + ["conv_wgrad"] * (1 in wanted) + ["channel_sum"] * (2 in wanted)
        assert (forward, backward) == (["conv_stats", "normalize"], expected)
        passes = "normalize_backward_kernel" in trace.launches  # which computes dy and dresidual
        assert passes == bool({0, 1, 2, 5} & {*wanted})


@pytest.mark.parametrize("order", ["of x", "of w", "of gamma", "of all"])
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_second_derivatives_are_pytorchs(device, order, frozen):
    """Also where an operand was not saved, since the other one wants no gradient."""
    wanted = {"of x": (0,), "of w": (1,), "of gamma": (3,), "of all": range(6)}[order]
    statistics = (normal(6, seed=7).to(device), normal(6, seed=8).to(device).abs() + 0.5) if frozen else (None, None)

    def by_pytorch(x, w, bias, gamma, beta, residual):
        y = theirs.conv2d(theirs.pad(x, (1, 1, 1, 0)), w, bias, (1, 2), groups=2)
        return activate(theirs.batch_norm(y, *statistics, gamma, beta, not frozen) + residual, "gelu", 0.0)

    results = []
    for layer in (lambda *inputs: as_one(*inputs, "gelu", statistics), by_pytorch):
        inputs = operands(device, wanted=wanted)
        z = layer(*inputs)
        leaves = [t for t in inputs if t.requires_grad]
        first = torch.autograd.grad(z.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
        results.append([*first, *second])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_gradients_err_no_more_than_twice_as_pytorchs(server, device, activation, dtype):
    def by_pytorch(x, w, bias, gamma, beta, residual):
        y = theirs.conv2d(theirs.pad(x, (1, 1, 1, 0)), w, bias, (1, 2), groups=2)
        return activate(theirs.batch_norm(y, None, None, gamma, beta, True) + residual, activation, 0.0)

    inputs = operands(device, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    dz = normal(*Y, seed=9).to(device, dtype)

    def outcome(layer, inputs):
        z = layer(*inputs)
        return [z, *torch.autograd.grad(z, inputs, dz.to(z.dtype))]

    mine, right = outcome(lambda *given: as_one(*given, activation), inputs), outcome(by_pytorch, exact)
    for name, t, plain, reference in zip(("z", *NAMES), mine, outcome(by_pytorch, inputs), right, strict=True):
        scale = reference.abs().max()
        ours_off, theirs_off = ((other.double() - reference).abs().max() for other in (t, plain))
        assert ours_off <= 2 * theirs_off + 2 * torch.finfo(t.dtype).eps * scale, name


# ----------------------------------------------------------------------------------------------------------------------
# What is saved


def storage(t):
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("wanted", [(0, 1, 3, 4), (0,), (1,), (4,), ()], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_what_is_saved(device, activation, wanted, residual):
    """Bytes of images: x for dw, y for the norm, z where there is a residual and it tells the derivative, once each."""
    inputs = operands(device, torch.float32, wanted=wanted, without=(2,) if residual else (2, 5))
    own = {storage(t) for i, t in enumerate(inputs) if t is not None and i}
    with saved_for_backward() as saved:
        z = as_one(*inputs, activation)
    images = {
        "x": 0 if 1 not in wanted else inputs[0].numel(),
        "y": z.numel() if {0, 1, 3} & {*wanted} or (wanted and activation and not (residual and z_tells(activation)))
        else 0,
        "z": z.numel() if wanted and residual and z_tells(activation) else 0,
    }  # fmt: skip
    statistics = 2 * 6 if wanted else 0
    assert sum(n for address, n in saved.items() if address not in own) == 4 * (sum(images.values()) + statistics)
    assert (storage(inputs[0]) in saved) == (1 in wanted)
    assert (storage(inputs[1]) in saved) == (0 in wanted)
    assert (storage(z) in saved) == bool(images["z"])


def z_tells(activation):
    return activation == "relu"


@pytest.mark.parametrize(
    ("name", "backend", "memory", "most"),
    [
        ("resnet18", "auto", "fast", 9.1),
        ("resnet18", "kernels", "fast", 9.1),
        ("resnet18", "auto", "less", 7.6),
        ("resnet50", "auto", "fast", 35.0),
        ("resnet50", "kernels", "fast", 28.2),
        ("resnet50", "auto", "less", 21.6),
    ],
)
def test_bytes_that_a_network_saves(torchvision, gpu, monkeypatch, name, backend, memory, most):
    """In bfloat16 at 224 pixels, an image more: eager PyTorch saves 11.6 and 43.5 MB. The library serves by rows, or
    our kernels since they are asked for, which need no result of 1x1 convolutions from few channels to many.
    """
    pytest.importorskip("triton")
    monkeypatch.setattr(tables, "find", row_for_the_library)
    monkeypatch.setattr(tables, "find_block", lambda key: tables.BlockRow(key, "library", {}))
    model = getattr(torchvision.models, name)().to(torch.bfloat16, memory_format=LAST)
    model = cnnfast.convert(model, memory=memory)
    counts = [
        count_step(
            model,
            torch.empty(n, 3, 224, 224, dtype=torch.bfloat16, device="meta").to(memory_format=LAST),
            backend=backend,
        )
        for n in (256, 512)
    ]
    ours = [kernel for kernel in counts[0].kernels if "fprop" in kernel]
    assert bool(ours) == (backend == "kernels" or memory == "less")
    of_the_image = 3 * 224 * 224 * 2  # which is there anyway
    assert (counts[1].saved_bytes - counts[0].saved_bytes) / 256 - of_the_image <= most * 1e6


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's world around it


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(device, dynamic):
    """One graph forward, one backward, the layer one operator in each."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        # that an operator updates running statistics is told by one around it
        graphs.append([op for n in graph.graph.nodes for op in (n.target, *n.args[:1]) if "cnnfast" in str(op)])
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, i: make_boxed_func(keep(g, i)))

    def layer(x, w, gamma, beta, residual):
        running = torch.zeros_like(beta), torch.ones_like(beta)
        z = ours.conv_bn_act(x, w, *running, gamma, beta, residual=residual, training=True, activation="silu")
        return z, *running

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (3, 5) if dynamic else (3,):
        shapes = (n, 4, 5, 6), (7, 4, 1, 1), (7,), (7,), (n, 7, 5, 6)
        given = [normal(*shape, seed=i).to(device) for i, shape in enumerate(shapes)]
        results = []
        for call in (compiled, layer):
            inputs = [leaf(t) for t in given]
            z, *running = call(*inputs)
            results.append([z, *running, *torch.autograd.grad(z.square().sum(), inputs)])
        assert_same_bits(*results)
    operators = torch.ops.cnnfast
    assert graphs == [[operators.conv_bn_act_training.default], [operators.conv_bn_act_backward.default]]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointed_layers_update_as_pytorchs_do(device, momentum):
    """A recomputation updates the running statistics, and how many batches they are of, a second time; it may stop as
    soon as it has what backward needs, which is not before. Copies train apart.
    """
    layer = cnn.ConvBNAct(3, 4, 3).to(device)
    layer.bn.momentum = momentum
    x = normal(2, 3, 5, 5, dtype=torch.float32).to(device)
    checkpointed, plain, untouched = (copy.deepcopy(layer) for _ in range(3))
    layer(x).square().sum().backward()
    checkpoint(checkpointed, leaf(x), use_reentrant=False).square().sum().backward()
    for _ in range(2):
        plain(x)
    assert int(checkpointed.bn.num_batches_tracked) == int(plain.bn.num_batches_tracked) == 2
    assert_same_bits(checkpointed.bn.running_var, plain.bn.running_var)
    assert not torch.equal(plain.bn.running_var, untouched.bn.running_var)
    assert_same_bits([p.grad for p in checkpointed.parameters()], [p.grad for p in layer.parameters()])
    assert (int(untouched.bn.num_batches_tracked), untouched.conv.weight.grad) == (0, None)


def test_the_operators_through_the_dispatcher(device):
    """Gradients come without a graph, as functions of tensors; what was not asked for is empty."""
    x, w, _, gamma, beta, _ = operands(device)
    z, y, mean, var = torch.ops.cnnfast.conv_bn_act_training(
        x, w, None, None, None, True, 0.1, gamma, beta, None, 1e-5, "relu", 0.0, None, *GEOMETRY, "auto"
    )
    assert (z.requires_grad, mean.requires_grad, var.requires_grad) == (True, False, False)
    needs = [False, True, False, True, False, False]
    norm = y, None, mean, var, gamma, beta, None, 1e-5, "relu", 0.0, True
    found = torch.ops.cnnfast.conv_bn_act_backward(
        torch.ones_like(z), *norm, x, None, None, X, W, True, needs, *GEOMETRY, "auto"
    )
    assert [t.numel() > 0 for t in found] == needs
    assert len({type(t.grad_fn) for t in found}) == 1  # what PyTorch gives those that have no derivative of their own
    right = torch.autograd.grad(z.sum(), (w, gamma))
    assert_same_bits([found[1], found[3]], list(right))


def test_its_products_are_counted(device):
    x, w, *rest = operands(device)
    flops = 2 * normal(*Y).numel() * w[0].numel()
    for wanted, times in (((0, 1), 3), ((1,), 2), ((3,), 1)):
        given = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, w, *rest))]
        with FlopCounterMode(display=False) as counter:
            as_one(*given, "relu").sum().backward()
        assert counter.get_total_flops() == times * flops


def test_tuning_sees_its_convolutions(gpu):
    """Recorders of calls are told of what the operators are composed of."""
    seen, _ = capture(
        cnn.ConvBNAct(8, 16, 3).train(), (torch.empty(2, 8, 8, 8, requires_grad=True),), gpu=devices.NO_GPU,
        device_type="cuda", train=True,
    )  # fmt: skip
    assert sorted(call.operator for call in seen) == ["conv_dgrad", "conv_stats", "conv_wgrad"]
