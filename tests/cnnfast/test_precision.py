"""Which dtype a result has, under autocast and of mixed operands, and how exact it is where numbers are large, tiny or
not finite.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as theirs

import cnnfast.functional as ours
import cnnfast.nn as cnn
from tests.support.agreement import exact, integers, normal, run

LOW = (torch.float16, torch.bfloat16)


def composition(x, w, mean, var, g=None, b=None, *, bias=None, residual=None, training=False):
    y = theirs.batch_norm(theirs.conv2d(x, w, bias), mean, var, g, b, training)
    return theirs.relu(y if residual is None else y + residual)


PYTORCH = SimpleNamespace(
    **vars(theirs) | {"conv_bn_act": composition, "global_avg_pool2d": lambda x: x.mean((2, 3), keepdim=True)}
)
X, W, V = (integers(*shape, largest=2) for shape in ((2, 4, 4, 3), (6, 4, 2, 2), (4, 6, 2, 2)))
MEAN, VAR, GAIN, BIAS = integers(4), torch.ones(4), 2 * torch.ones(4), integers(4, seed=3)
SIX = integers(6, seed=4), torch.ones(6), 2 * torch.ones(6), integers(6, seed=5)

# What a function f is called with; `c` casts, what it does not touch is float32.
CALLS = {
    "conv2d": lambda f, c: f.conv2d(c(X), c(W), c(SIX[0])),
    "conv2d, float32 weight": lambda f, c: f.conv2d(c(X), W, c(SIX[0])),
    "conv2d, float32 input": lambda f, c: f.conv2d(X, c(W), c(SIX[0])),
    "conv2d, float32 bias": lambda f, c: f.conv2d(c(X), c(W), SIX[0]),
    "conv1d": lambda f, c: f.conv1d(c(X[..., 0]), c(W[..., 0])),
    "conv1d, float32 weight": lambda f, c: f.conv1d(c(X[..., 0]), W[..., 0]),
    "conv_transpose2d": lambda f, c: f.conv_transpose2d(c(X), c(V), c(SIX[0])),
    "conv_transpose2d, float32 weight": lambda f, c: f.conv_transpose2d(c(X), V, SIX[0]),
    "conv_bn_act": lambda f, c: f.conv_bn_act(c(X), c(W), *SIX),
    "conv_bn_act, training": lambda f, c: f.conv_bn_act(c(X), c(W), None, None, *SIX[2:], training=True),
    "conv_bn_act, float32 weight": lambda f, c: f.conv_bn_act(c(X), W, *SIX, bias=c(SIX[3])),
    "batch_norm": lambda f, c: f.batch_norm(c(X), c(MEAN), c(VAR), c(GAIN), c(BIAS)),
    "batch_norm, training": lambda f, c: f.batch_norm(c(X), c(MEAN), c(VAR), c(GAIN), c(BIAS), True),
    "batch_norm, float32 parameters": lambda f, c: f.batch_norm(c(X), MEAN, VAR, GAIN, BIAS),
    "batch_norm, float32 parameters, training": lambda f, c: f.batch_norm(
        c(X), MEAN.clone(), VAR.clone(), GAIN, BIAS, True
    ),
    "batch_norm, float32 input": lambda f, c: f.batch_norm(X, c(MEAN), c(VAR), c(GAIN), c(BIAS)),
    "batch_norm, float32 statistics": lambda f, c: f.batch_norm(c(X), MEAN, VAR, c(GAIN), c(BIAS)),
    "batch_norm, float32 weight": lambda f, c: f.batch_norm(c(X), c(MEAN), c(VAR), GAIN, c(BIAS)),
    "max_pool2d": lambda f, c: f.max_pool2d(c(X), 2),
    "avg_pool2d": lambda f, c: f.avg_pool2d(c(X), 2),
    "adaptive_avg_pool2d": lambda f, c: f.adaptive_avg_pool2d(c(X), 2),
    "global_avg_pool2d": lambda f, c: f.global_avg_pool2d(c(X)),
}


def outcome(call, f, device, dtype, *contexts):
    """The result, or the type of the error."""

    def cast(t):
        return t.to(device, dtype)

    with ExitStack() as stack, torch.device(device):
        for context in contexts:
            stack.enter_context(context())
        try:
            return call(f, cast)
        except RuntimeError as error:
            return type(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_dtypes(name, dtype, device):
    """With and without autocast to either dtype, and where it is switched off inside: PyTorch's dtype, PyTorch's
    numbers, or its error.
    """

    def off():
        return torch.autocast(device.type, enabled=False)

    inside = [(lambda low=low: torch.autocast(device.type, low),) for low in LOW]
    for contexts in ((), *inside, (*inside[0], off)):
        mine, right = (outcome(CALLS[name], f, device, dtype, *contexts) for f in (ours, PYTORCH))
        if isinstance(right, type):
            assert mine is right
            continue
        assert mine.dtype == right.dtype
        unit = 4 * torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine, right, rtol=unit, atol=unit)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_modules_under_autocast(dtype, device):
    """Convolutions in the lower precision, norms and pools in that of their input, parameters and their gradients in
    float32.
    """
    seen = []
    for namespace in (cnn, torch.nn):
        torch.manual_seed(0)
        layers = [
            namespace.Conv2d(4, 3, 2),
            namespace.BatchNorm2d(3),
            namespace.MaxPool2d(2, 1),
            namespace.ConvTranspose2d(3, 2, 2),
        ]
        layers += [
            namespace.AvgPool2d(2, 1),
            namespace.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(2),
            namespace.Conv1d(2, 2, 1),
        ]
        model, results = torch.nn.Sequential(*layers).to(device), [X.to(device)]
        with torch.autocast(device.type, dtype):
            for layer in model:
                results.append(layer(results[-1]))
        results[-1].float().sum().backward()
        seen.append(results + [p.grad for p in model.parameters()] + list(model.buffers()))
    assert [t.dtype for t in seen[0]] == [t.dtype for t in seen[1]]
    torch.testing.assert_close(*seen, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compiled_under_autocast(where, device):
    torch._dynamo.reset()
    x, w = X.to(device), W.to(device)

    def low(function):
        def call(*inputs):
            with torch.autocast(device.type, torch.bfloat16):
                return function(*inputs)

        return call

    def block(x, w):
        return ours.max_pool2d(ours.conv_bn_act(x, w, None, None, training=True), 2)

    compiled = (
        torch.compile(low(block), fullgraph=True, backend="aot_eager")
        if where == "inside"
        else low(torch.compile(block, fullgraph=True, backend="aot_eager"))
    )
    mine, right = (run(f, [x, w]) for f in (compiled, low(block)))
    assert mine.y.dtype == torch.bfloat16
    torch.testing.assert_close(mine.tensors, right.tensors, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Large, tiny, not finite


@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1e-2), (1e3, 0.1), (0.0, 1e-20), (-3e15, 1e14)])
@pytest.mark.parametrize("shape", [(3, 4, 20), (64, 5)], ids=str)
def test_batch_norm_is_as_exact_as_pytorchs(shape, mean, deviation, device):
    """float32: the root mean square of the error over several draws is at most twice that of PyTorch's kernel."""
    errors = torch.zeros(2, 4, dtype=torch.float64)
    scale = torch.zeros(4, dtype=torch.float64)
    vectors = [normal(shape[1], seed=seed, dtype=torch.float32).to(device) for seed in (1, 2)]
    for seed in range(3):
        inputs = [(mean + deviation * normal(*shape, seed=seed)).float().to(device), *vectors]
        right = exact(lambda x, w, b: theirs.batch_norm(x, None, None, w, b, True), inputs)
        scale += torch.stack([e.square().mean() for e in right.tensors])
        for i, f in enumerate((ours, theirs)):
            found = run(lambda x, w, b, f=f: f.batch_norm(x, None, None, w, b, True), inputs)
            errors[i] += torch.stack(
                [(t.cpu().double() - e).square().mean() for t, e in zip(found.tensors, right.tensors, strict=True)]
            )
    mine, allowed = errors.sqrt()
    assert (mine <= 2 * allowed + torch.finfo(torch.float32).eps * scale.sqrt()).all(), (mine, allowed)


SPECIAL = {
    "conv2d": lambda f, x: f.conv2d(x, W.to(x), None, 2, 1),
    "conv2d depthwise": lambda f, x: f.conv2d(x, W[:4, :1].to(x), None, 1, 1, 1, 4),
    "conv1d": lambda f, x: f.conv1d(x[..., 0], W[..., 0].to(x)),
    "conv_transpose2d": lambda f, x: f.conv_transpose2d(x, V.to(x), None, 2, 1),
    "conv_bn_act": lambda f, x: f.conv_bn_act(x, W.to(x), *(t.to(x) for t in SIX)),
    "batch_norm": lambda f, x: f.batch_norm(x, MEAN.to(x), VAR.to(x), GAIN.to(x), BIAS.to(x)),
    "batch_norm, training": lambda f, x: f.batch_norm(x, None, None, GAIN.to(x), BIAS.to(x), True),
    "max_pool2d": lambda f, x: f.max_pool2d(x, 3, 2, 1),
    "avg_pool2d": lambda f, x: f.avg_pool2d(x, 3, 2, 1),
    "adaptive_avg_pool2d": lambda f, x: f.adaptive_avg_pool2d(x, (3, 2)),
    "global_avg_pool2d": lambda f, x: f.global_avg_pool2d(x),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_not_finite(name, value, device):
    """In two pixels: the results and the gradients that are NaN or infinite are PyTorch's."""
    for dtype in (torch.float32, torch.float16):
        x = X.to(device, dtype, copy=True)
        x[0, 1, 2, 2] = x[1, 2, 0, 0] = value
        mine, right = (run(lambda x, f=f: SPECIAL[name](f, x), [x]) for f in (ours, PYTORCH))
        torch.testing.assert_close(mine.tensors, right.tensors, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_float16_overflows_to_infinity(device):
    """Where the result is too large, and not where only a sum on the way to it is."""
    x = torch.full((1, 64, 4, 4), 60.0, dtype=torch.float16, device=device)
    y = ours.conv2d(x, torch.full((8, 64, 3, 3), 60.0, dtype=torch.float16, device=device))
    assert torch.equal(y, torch.full_like(y, float("inf")))
    large = torch.full((2, 3, 6, 6), 6e4, dtype=torch.float16, device=device)
    for mean in (ours.avg_pool2d(large, 3), ours.adaptive_avg_pool2d(large, 4), ours.global_avg_pool2d(large)):
        assert torch.equal(mean, torch.full_like(mean, 6e4))
    assert ours.avg_pool2d(large, 2, divisor_override=1).isinf().all()


def test_subnormal_numbers_are_kept(device):
    """Of float32, in every pass of a convolution and a pool, where the smallest number is 1.4e-45."""
    x, w = 1e-42 * X.to(device), W.to(device)
    for name in ("conv2d", "max_pool2d", "avg_pool2d"):
        mine, right = (run(lambda x, f=f: SPECIAL[name](f, x), [x]) for f in (ours, PYTORCH))  # noqa: B023
        torch.testing.assert_close(mine.y, right.y, rtol=0, atol=4e-45)
        assert mine.y.any()
    assert torch.equal(ours.conv2d(w, x[:, :, :2, :2]), theirs.conv2d(w, x[:, :, :2, :2]))
