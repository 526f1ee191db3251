"""1x1 convolutions in training by the Gram matrix of their input: which these are, that their numbers are no worse than
PyTorch's, what they launch and save.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as theirs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
import cnnfast.functional as ours
from cnnfast import ops
from cnnfast.activations import activate
from cnnfast.reference.training_routes import gram_conv_bn_act
from cnnfast_kernels import tables
from cnnfast_kernels.tiling import TileConfig
from tests.support.agreement import leaf, normal, saved_for_backward

LAST = torch.channels_last
NAMES = ("x", "w", "bias", "gamma", "beta", "residual")
FORWARD = ["gram_statistics", "conv_bn_act", "update_running"]


def operands(device, N=3, C=4, H=5, W=6, K=12, stride=(1, 1), dtype=torch.float16, fmt=LAST):
    """x, as an activation leaves it, w, bias, gamma, beta and residual."""
    P, Q = (H - 1) // stride[0] + 1, (W - 1) // stride[1] + 1
    x, w, bias = normal(N, C, H, W).relu(), normal(K, C, 1, 1, seed=1), normal(K, seed=2)
    channels = normal(K, seed=3).abs() + 0.5, normal(K, seed=4)
    images = [t.to(device, dtype).contiguous(memory_format=fmt) for t in (x, w, normal(N, K, P, Q, seed=5))]
    return [*images[:2], bias.to(device, dtype), *(t.to(device).float() for t in channels), images[2]]


def layer(x, w, bias, gamma, beta, residual, running=(None, None), **how):
    return ours.conv_bn_act(x, w, *running, gamma, beta, bias=bias, residual=residual, training=True, **how)


def gradients(function, inputs, wanted=range(6), **how):
    """The result and the gradients of those `wanted`, by name; and the trace of it all."""
    inputs = [t if t is None or i not in wanted else leaf(t) for i, t in enumerate(inputs)]
    with cnnfast.trace() as trace:
        z = function(*inputs, **how)
        leaves = {n: t for n, t in zip(NAMES, inputs, strict=True) if t is not None and t.requires_grad}
        dz = torch.empty_like(z, requires_grad=False).copy_(normal(*z.shape, seed=9))
        if leaves:
            z.backward(dz)
    return {"z": z.detach(), **{name: t.grad for name, t in leaves.items()}}, trace


def assert_same_bits(mine, right):
    torch.testing.assert_close(mine, right, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Which layers


def served_by_gram(inputs, **how):
    running = torch.zeros(inputs[1].shape[0]), torch.ones(inputs[1].shape[0])
    with cnnfast.trace() as trace:
        layer(*inputs, running=[t.to(inputs[0].device) for t in running], **how)
    names = [call.operation for call in trace]
    assert ("gram_statistics" in names) == (names == FORWARD)
    return names == FORWARD


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", None])
def test_serves(device, activation):
    assert served_by_gram(operands(device), activation=activation)
    assert served_by_gram(operands(device, H=9, W=12, stride=(2, 3)), activation=activation, stride=(2, 3))


@pytest.mark.parametrize(
    ("of", "how"),
    [
        ({"dtype": torch.float32}, {}),
        ({"fmt": torch.contiguous_format}, {}),
        ({"C": 12}, {}),
        ({"C": 11, "N": 2}, {}),  # 60 pixels for 11 channels
        ({}, {"activation": "gelu"}),
        ({}, {"activation": "leaky_relu", "activation_arg": -0.1}),
        ({}, {"algorithm": "im2col"}),
    ],
    ids=["float32", "channels apart", "no wider", "few pixels", "gelu", "falling", "im2col"],
)
def test_does_not_serve(device, of, how):
    assert not served_by_gram(operands(device, **of), **how)


@pytest.mark.parametrize(
    ("shape", "how"),
    [((12, 4, 3, 3), {"padding": 1}), ((12, 4, 1, 1), {"padding": 1}), ((12, 2, 1, 1), {"groups": 2})],
    ids=["3x3", "padded", "groups"],
)
def test_serves_no_other_geometry(device, shape, how):
    x, _, *rest = operands(device)
    assert not served_by_gram([x, normal(*shape, seed=1).to(x), *rest[:3], None], **how)


def test_products_that_cost_more_than_they_spare(device):
    """C * C / K of 128 is the most: a wide input needs a much wider result."""
    x = torch.empty(2, 256, 32, 32, dtype=torch.float16, device=device).contiguous(memory_format=LAST)
    how = 2048, "relu", 0.0, ((1, 1), (0, 0, 0, 0), (1, 1), 1), "auto"
    assert [ops.gram_serves(x, x.new_empty(K, 256, 1, 1), *how) for K in (500, 512)] == [False, True]


@pytest.mark.parametrize("winner", ["library", "kernels"])
def test_a_measured_row_decides(gpu, device, monkeypatch, winner):
    def found(key):
        return tables.TableRow(key, TileConfig(32, 32, 16, 4, 2), winner, {"kernels": 9.0, "library": 4.5})

    monkeypatch.setattr(tables, "find", found)
    assert served_by_gram(operands(device)) == (winner == "kernels")
    with cnnfast.backend("kernels"):
        assert served_by_gram(operands(device))


# ----------------------------------------------------------------------------------------------------------------------
# Its numbers

CASES = {
    "relu and residual": ({}, (2,), {}),
    "all of it, a stride": ({"stride": (2, 2), "H": 9, "W": 8}, (), {"stride": 2, "activation": "leaky_relu"}),
    "no activation": ({"stride": (2, 1), "H": 7}, (2, 5), {"stride": (2, 1), "activation": None}),
    "no parameters": ({"C": 16, "K": 64, "N": 5}, (2, 3, 4, 5), {"activation": "relu6"}),
    "many channels": ({"C": 40, "K": 136, "N": 9, "H": 6}, (2,), {}),
}


def by_pytorch(x, w, bias, gamma, beta, residual, stride=1, activation="relu", **how):
    u = theirs.batch_norm(theirs.conv2d(x, w, bias, stride), None, None, gamma, beta, True)
    return activate(u if residual is None else u + residual, activation, 0.01)


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_pytorch(device, case):
    """The error against float64, of the result and of every gradient: at most twice that of PyTorch's own half."""
    of, without, how = CASES[case]
    inputs = [None if i in without else t for i, t in enumerate(operands(device, **of))]
    wide = [None if t is None else t.double() for t in inputs]
    right, _ = gradients(by_pytorch, wide, **how)
    own, _ = gradients(by_pytorch, inputs, **how)
    mine, trace = gradients(layer, inputs, **how)
    assert "gram_gradients" in [call.operation for call in trace]
    assert {call.served_by for call in trace} == {"kernels"}
    for name, exact in right.items():
        if name == "bias":  # a bias has no gradient, for the norm takes it away
            assert not mine[name].any()
            continue
        errors = [(found[name].double() - exact).abs() for found in (mine, own)]
        floor = exact.abs().max() * 2**-12
        assert errors[0].max() <= 2 * errors[1].max() + floor, name
        assert errors[0].square().mean() <= 4 * errors[1].square().mean() + floor**2, name
        assert mine[name].dtype == own[name].dtype, name
        assert mine[name].stride() == own[name].stride(), name


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", ["relu", None])
def test_the_numbers_of_the_reference(device, stride, activation):
    """The plain PyTorch that rounds where the kernels do, of which benchmarks/routes_accuracy.py says how it trains.
    Another order of sums moves a few numbers by a unit in the last place.
    """
    x, w, _, gamma, beta, residual = operands(device, C=8, K=40, N=5, H=10, stride=(stride, stride))
    inputs = [x, w, None, gamma, beta, residual]

    def plain(x, w, bias, gamma, beta, residual):
        return gram_conv_bn_act(x, w, gamma, beta, residual, 1e-5, activation, stride)[0]

    mine, trace = gradients(layer, inputs, stride=stride, activation=activation)
    assert "gram_gradients" in [call.operation for call in trace]
    right, _ = gradients(plain, inputs)
    for name, expected in right.items():
        distance = (mine[name].double() - expected.double()).abs()
        unit = torch.finfo(expected.dtype).eps * float(expected.abs().max())
        largest, mean = (2, 0.02) if expected.dtype == torch.float16 else (64, 16)
        assert float(distance.max()) <= largest * unit, name
        assert float(distance.mean()) <= mean * unit, name


def test_running_statistics(device):
    x, w, bias, gamma, beta, residual = operands(device)
    running = [torch.full((12,), value, device=device) for value in (0.25, 2.0)]
    layer(x, w, bias, gamma, beta, residual, running, momentum=0.25)
    y = theirs.conv2d(x.double(), w.double(), bias.double()).transpose(0, 1).flatten(1)
    right = 0.75 * 0.25 + 0.25 * y.mean(1), 0.75 * 2.0 + 0.25 * y.var(1)
    torch.testing.assert_close(running, [t.float() for t in right], rtol=1e-5, atol=1e-6)


def test_gradients_that_float16_cannot_hold(device):
    """Of a loss that is the mean of very many numbers: the matrix that float16 takes is scaled."""
    inputs = [None if i in (2, 5) else t for i, t in enumerate(operands(device, C=16, K=64, N=5))]
    small = normal(5, 64, 5, 6, seed=9).mul(2.0**-12).half().to(device)
    results = []
    for f, values in ((layer, inputs), (by_pytorch, [None if t is None else t.double() for t in inputs])):
        x = leaf(values[0])
        z = f(x, *values[1:])
        results.append(torch.autograd.grad(z, x, small.to(z))[0].double())
    error = (results[0] - results[1]).abs().max()
    assert error <= 2e-3 * results[1].abs().max()


def test_a_filter_without_variance_and_one_of_nan(device):
    """A filter of zeros has the variance 0, which is no error; NaN stays in the channels that meet it."""
    inputs = operands(device)
    inputs[1][3] = 0
    inputs[1][5] = float("nan")
    found, _ = gradients(layer, inputs, wanted=(1, 3))
    bad = found["z"].isnan().flatten(2).any(2).any(0)
    assert bad.nonzero().flatten().tolist() == [5]
    assert found["gamma"].isnan().nonzero().flatten().tolist() == [5]
    assert float(found["gamma"][3]) == 0


def test_the_same_bits_every_time(device):
    first, second = (gradients(layer, operands(device))[0] for _ in range(2))
    assert_same_bits(first, second)
    inputs = operands(device)
    with torch.no_grad():  # a model that is run in training mode for its statistics
        assert_same_bits(layer(*inputs), first["z"])


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for, and what is kept


def test_what_is_asked_for_and_no_more(device):
    inputs = operands(device)
    complete, _ = gradients(layer, inputs)
    for wanted in (subset for k in range(7) for subset in itertools.combinations(range(6), k)):
        found, trace = gradients(layer, inputs, wanted=wanted)
        assert_same_bits(found, {name: complete[name] for name in found})
        products = bool({0, 1, 3} & {*wanted})
        expected = ["gram_statistics", "conv_bn_act"] + ["activation_backward"] * bool(wanted)
        assert [call.operation for call in trace] == expected + ["gram_gradients"] * products
        assert ("gram_own_kernel" in trace.launches) == (0 in wanted)


@pytest.mark.parametrize("wanted", [(0, 1, 3, 4, 5), (5,), (4,), (1,)], ids=str)
def test_what_is_saved(device, wanted):
    inputs = [t if i not in wanted else leaf(t) for i, t in enumerate(operands(device))]
    with saved_for_backward() as saved:
        z = layer(*inputs)
    addresses = {t.untyped_storage().data_ptr() for t in (*inputs, z)}
    own = sum(n for address, n in saved.items() if address not in addresses)
    assert own == 4 * (2 * 12 + 4 + 12 * 4)  # mean, variance, mean of x and the products of w with the covariance
    operands_saved = bool({0, 1, 3} & {*wanted})
    assert [t.untyped_storage().data_ptr() in saved for t in inputs[:2]] == [operands_saved] * 2
    assert z.untyped_storage().data_ptr() in saved


def test_second_derivatives(device):
    """A gradient that may be differentiated again is that of the separate operators, which float32 takes too."""
    results = []
    for function, dtype in ((layer, torch.float16), (by_pytorch, torch.float16), (by_pytorch, torch.float64)):
        inputs = [
            leaf(t if t.dtype == torch.float32 and dtype != torch.float64 else t.to(dtype)) for t in operands(device)
        ]
        z = function(*inputs)
        once = torch.autograd.grad(z, inputs, torch.ones_like(z) / 8, create_graph=True)
        penalty = sum(g.double().square().sum() for g in once[:2])
        results.append([*once, *torch.autograd.grad(penalty, [inputs[i] for i in (0, 1, 3)])])
    for mine, own, exact in zip(*results, strict=True):
        errors = [float((found.detach().double() - exact).abs().max()) for found in (mine, own)]
        assert errors[0] <= 2 * errors[1] + 2**-12 * float(exact.detach().abs().max())


@pytest.mark.parametrize("wanted", [(5,), (4,), (0,), (3,)], ids=str)
def test_a_gradient_to_be_differentiated_of_one_operand(device, wanted):
    """Where x and w were not kept too: about what the fused backward gives."""
    once, _ = gradients(layer, operands(device), wanted=wanted)
    inputs = [t if i not in wanted else leaf(t) for i, t in enumerate(operands(device))]
    z = layer(*inputs)
    dz = torch.empty_like(z, requires_grad=False).copy_(normal(*z.shape, seed=9))
    (again,) = torch.autograd.grad(z, [t for t in inputs if t.requires_grad], dz, create_graph=True)
    expected = once[NAMES[wanted[0]]]
    torch.testing.assert_close(again, expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))


def test_a_batch_of_gradients(device):
    """Under a transform that reaches into backward, PyTorch's operators serve."""
    x, *rest = operands(device)
    x = leaf(x)
    z = layer(x, *rest)
    batch = torch.stack([normal(*z.shape, seed=i) for i in (9, 10)]).to(z)
    (found,) = torch.autograd.grad(z, x, batch, is_grads_batched=True, retain_graph=True)
    for mine, dz in zip(found, batch, strict=True):
        (right,) = torch.autograd.grad(z, x, dz, retain_graph=True)
        torch.testing.assert_close(mine, right, rtol=1e-2, atol=2e-3 * float(right.abs().max()))


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's world around it


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(device, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, w, gamma, beta, residual):
        running = torch.zeros_like(beta), torch.ones_like(beta)
        return layer(x, w, None, gamma, beta, residual, running), *running

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=dynamic)
    compilations = []
    for n in (3, 5) if dynamic else (3,):
        x, w, _, *rest = operands(device, N=n)
        results = []
        for call in (compiled, step):
            inputs = [leaf(t) for t in (x, w, *rest)]
            with cnnfast.trace() as trace:
                z, *running = call(*inputs)
                results.append([z, *running, *torch.autograd.grad(z.square().sum(), inputs)])
            assert "gram_gradients" in [call.operation for call in trace]
        assert_same_bits(*results)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * len(compilations)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(device, reentrant):
    inputs = operands(device)
    plain, _ = gradients(layer, inputs)
    again, _ = gradients(lambda *given: checkpoint(layer, *given, use_reentrant=reentrant), inputs)
    assert_same_bits(again, plain)


def test_autocast_and_the_scaler(device):
    """Parameters in float32 get gradients in float32, also scaled; an overflow is found, and the step left out."""
    x, w, _, gamma, beta, residual = operands(device)
    parameters = [leaf(t.float()) for t in (w, gamma, beta)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler(x.device.type, init_scale=2.0**10)
    for overflow in (False, True):
        before = [p.detach().clone() for p in parameters]
        with torch.autocast(x.device.type, torch.float16), cnnfast.trace() as trace:
            z = layer(x, parameters[0], None, *parameters[1:], residual)
        assert [call.operation for call in trace] == FORWARD[:2]
        loss = z.float().mean() * (float("inf") if overflow else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
        scaler.step(optimizer)
        scaler.update()
        assert any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True)) == overflow


def test_flops_are_pytorchs(device):
    inputs = [None if i in (2, 5) else leaf(t) for i, t in enumerate(operands(device, stride=(2, 2)))]
    counts = []
    for f in (layer, by_pytorch):
        with FlopCounterMode(display=False) as counter:
            f(*inputs, stride=2).float().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
