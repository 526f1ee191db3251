"""A convolution with its norm, activation and max pool as one operator, and its gradients as one: against PyTorch, what
it saves, what it launches, and PyTorch's world around it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as theirs
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
from cnnfast import ops
from cnnfast.activations import activate
from tests.support.agreement import leaf, normal, saved_for_backward

LAST, NCHW = torch.channels_last, torch.contiguous_format
GEOMETRY = (2, 1), (1, 0, 1, 1), (1, 1), 1, "auto"
WINDOW = (3, 3), (2, 2), (1, 1), False
NAMES = ("x", "w", "bias", "gamma", "beta")
X, W, Y, Z = (2, 3, 9, 7), (8, 3, 2, 3), (2, 8, 5, 7), (2, 8, 3, 4)
SHAPES = (X, W, (8,), (8,), (8,))


def operands(device, dtype=torch.float64, fmt=LAST, wanted=range(5), without=()):
    """x, w, bias, gamma, beta, of which those `wanted` want a gradient, None for those `without`."""
    found = []
    for i, shape in enumerate(SHAPES):
        t = normal(*shape, seed=i).to(device, torch.float32 if i in (3, 4) and dtype.itemsize < 4 else dtype)
        t = t.contiguous(memory_format=fmt) if t.dim() == 4 else t
        found.append(None if i in without else t.requires_grad_(i in wanted))
    return found


def as_one(x, w, bias, gamma, beta, activation, running=(None, None)):
    norm = gamma, beta, 1e-5, activation, 0.1
    return ops.conv_bn_act_pool_training(x, w, bias, *running, 0.1, *norm, *WINDOW, *GEOMETRY)[0]


def apart(x, w, bias, gamma, beta, activation, running=(None, None)):
    norm = gamma, beta, None, 1e-5, activation, 0.1, None
    z = ops.conv_bn_act_training(x, w, bias, *running, True, 0.1, *norm, *GEOMETRY)[0]
    return ops.max_pool(z, False, *WINDOW[:3], (1, 1), WINDOW[3])[0]


def by_pytorch(x, w, bias, gamma, beta, activation):
    y = theirs.conv2d(theirs.pad(x, (1, 1, 1, 0)), w, bias, (2, 1))
    return theirs.max_pool2d(activate(theirs.batch_norm(y, None, None, gamma, beta, True), activation, 0.1), 3, 2, 1)


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


CASES = [
    ("relu", (), LAST, torch.float32),
    ("relu6", (2,), LAST, torch.float16),
    ("leaky_relu", (2, 3, 4), NCHW, torch.float32),
    ("relu", (2, 3), LAST, torch.bfloat16),
]


@pytest.mark.parametrize(("activation", "without", "fmt", "dtype"), CASES, ids=str)
def test_against_separate_operators_and_pytorch(device, activation, without, fmt, dtype):
    """The result to the bit; gradients err no more than twice as PyTorch's, and the rounding of their dtype."""
    running, right_running = ([torch.zeros(8, device=device), torch.ones(8, device=device)] for _ in range(2))
    mine, trace = gradients(as_one, operands(device, dtype, fmt, without=without), activation, running)
    separate, _ = gradients(apart, operands(device, dtype, fmt, without=without), activation, right_running)
    assert_same_bits(mine["z"], separate["z"])
    assert_same_bits(running, right_running)
    assert [t.stride() for t in mine.values()] == [t.stride() for t in separate.values()]
    assert [call.operation for call in trace][:3] == ["conv_stats", "update_running", "normalize_max_pool"]
    plain, _ = gradients(by_pytorch, operands(device, dtype, fmt, without=without), activation)
    exact = [None if t is None else leaf(t.detach().double()) for t in operands(device, dtype, fmt, without=without)]
    right, _ = gradients(by_pytorch, exact, activation)
    for name, t in mine.items():
        off, theirs_off = ((other.double() - right[name]).abs().max() for other in (t, plain[name]))
        assert off <= 2 * theirs_off + 2 * torch.finfo(t.dtype).eps * right[name].abs().max(), name


def test_what_is_asked_for_and_no_more(device):
    """Some of the operands: the bits that all of them together give, and no kernel for any other."""
    complete, _ = gradients(as_one, operands(device, torch.float32), "relu")
    for wanted in (*itertools.combinations(range(5), 1), (), (0, 3), (1, 4), (2, 4), (1, 3, 4)):
        found, trace = gradients(as_one, operands(device, torch.float32, wanted=wanted), "relu")
        assert_same_bits(found, {name: complete[name] for name in found})
        backward = [call.operation for call in trace][2:]
        expected = ["normalize_max_pool_backward"] * bool(wanted)
        expected += ["conv_dgrad"] * (0 in wanted) + ["conv_wgrad"] * (1 in wanted) + ["channel_sum"] * (2 in wanted)
        assert backward == expected
        assert ("normalised_max_pool_backward_kernel" in trace.launches) == bool({0, 1, 2} & {*wanted})


@pytest.mark.parametrize("wanted", [(0, 1, 3, 4), (0,), (1,), (4,), ()], ids=str)
def test_what_is_saved(device, wanted):
    """y and a byte for each tap where a pixel's gradient is wanted, y at the maxima, x for dw, w for dx."""
    inputs = operands(device, torch.float32, wanted=wanted, without=(2,))
    own = {t.untyped_storage().data_ptr() for i, t in enumerate(inputs) if t is not None and i}
    with saved_for_backward() as saved:
        z = as_one(*inputs, "relu")
    y = 2 * 8 * 5 * 7
    images = 4 * inputs[0].numel() * (1 in wanted)
    images += (4 * y + z.numel()) * bool({0, 1} & {*wanted}) + 4 * z.numel() * bool(wanted)
    statistics = 4 * 2 * 8 * bool(wanted)
    assert sum(n for address, n in saved.items() if address not in own) == images + statistics
    assert z.untyped_storage().data_ptr() not in saved


@pytest.mark.parametrize("order", ["of x", "of w", "of gamma", "of beta", "of all"])
def test_second_derivatives_are_pytorchs(device, order):
    wanted = {"of x": (0,), "of w": (1,), "of gamma": (3,), "of beta": (4,), "of all": range(5)}[order]
    results = []
    for layer in (as_one, by_pytorch):
        inputs = operands(device, wanted=wanted)
        z = layer(*inputs, "leaky_relu")
        leaves = [t for t in inputs if t.requires_grad]
        first = torch.autograd.grad(z.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
        results.append([*first, *second])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_gradient_under_a_transform_is_pytorchs(device):
    """A batch of gradients of a result that was there before the transform."""
    results = []
    for layer in (as_one, by_pytorch):
        inputs = operands(device)
        z = layer(*inputs, "relu")
        vectors = normal(3, *Z, seed=4).to(device)
        results.append(torch.func.vmap(lambda v, z=z, inputs=inputs: torch.autograd.grad(z, inputs, v))(vectors))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_raw_result_is_differentiated_too(device):
    """y is a result of the operator, from which second derivatives go back."""
    inputs = operands(device)
    z, y, *_ = ops.conv_bn_act_pool_training(
        *inputs[:3], None, None, 0.1, *inputs[3:], 1e-5, "relu", 0.0, *WINDOW, *GEOMETRY
    )
    x, w, bias, gamma, beta = inputs
    right_y = theirs.conv2d(theirs.pad(x, (1, 1, 1, 0)), w, bias, (2, 1))
    right = theirs.max_pool2d(torch.relu(theirs.batch_norm(right_y, None, None, gamma, beta, True)), 3, 2, 1)
    found, expected = (
        torch.autograd.grad(a.square().sum() + b.pow(3).sum(), inputs) for a, b in ((z, y), (right, right_y))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_empty_batch_has_gradients_of_zero(device):
    inputs = operands(device, torch.float32)
    inputs[0] = leaf(inputs[0].detach()[:0])
    running = [torch.zeros(8, device=device), torch.ones(8, device=device)]
    z = as_one(*inputs, "relu", running)
    assert z.shape == (0, *Z[1:])
    for t, grad in zip(inputs, torch.autograd.grad(z.sum(), inputs), strict=True):
        assert grad.shape == t.shape
        assert not grad.any()
    assert_same_bits(running, [torch.zeros(8, device=device), torch.ones(8, device=device)])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(device, dynamic):
    """One graph forward, one backward, the layer one operator in each."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append([op for n in graph.graph.nodes for op in (n.target, *n.args[:1]) if "cnnfast" in str(op)])
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, i: make_boxed_func(keep(g, i)))

    def layer(x, w, gamma, beta):
        running = torch.zeros_like(beta), torch.ones_like(beta)
        return as_one(x, w, None, gamma, beta, "relu", running), *running

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (4, 6) if dynamic else (4,):
        given = [normal(*shape, seed=i).to(device) for i, shape in enumerate(((n, *X[1:]), W, (8,), (8,)))]
        results = []
        for call in (compiled, layer):
            inputs = [leaf(t) for t in given]
            z, *running = call(*inputs)
            results.append([z, *running, *torch.autograd.grad(z.square().sum(), inputs)])
        assert_same_bits(*results)
    operators = torch.ops.cnnfast
    assert graphs == [[operators.conv_bn_act_pool_training.default], [operators.conv_bn_act_pool_backward.default]]


def test_checkpointed(device):
    inputs = operands(device)
    results = [
        torch.autograd.grad(z.square().sum(), inputs)
        for z in (as_one(*inputs, "relu"), checkpoint(as_one, *inputs, "relu", use_reentrant=False))
    ]
    assert_same_bits(*results)


def test_its_products_are_counted(device):
    flops = 2 * normal(*Y).numel() * normal(*W)[0].numel()
    for wanted, times in (((0, 1), 3), ((1,), 2), ((3,), 1)):
        with FlopCounterMode(display=False) as counter:
            as_one(*operands(device, wanted=wanted), "relu").sum().backward()
        assert counter.get_total_flops() == times * flops
