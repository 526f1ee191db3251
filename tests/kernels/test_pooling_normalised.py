"""The maximum of what a norm and an activation make of a tensor: the bits of the two passes that it takes the place of,
PyTorch's taps, y at them, and the gradient of y.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support.poison import embed

pytest.importorskip("triton")

from cnnfast.activations import activate
from cnnfast_kernels import batchnorm, memory, pooling
from cnnfast_kernels.layout import result_format
from cnnfast_kernels.problem import PoolProblem

LAST, NCHW = torch.channels_last, torch.contiguous_format
INF, NAN = float("inf"), float("nan")
# shape, kernel, stride, padding, dilation, ceil_mode
WINDOWS = {
    "resnet stem": ((2, 8, 13, 11), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "halving": ((1, 16, 8, 6), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "ceil runs past the edge": ((2, 3, 10, 7), (3, 2), (2, 2), (0, 1), (1, 1), True),
    "uneven in everything": ((3, 5, 9, 14), (2, 5), (1, 3), (1, 2), (1, 1), False),
    "windows apart": ((1, 12, 11, 9), (2, 1), (4, 3), (0, 0), (1, 1), False),
    "all overlap": ((1, 5, 5, 6), (3, 3), (1, 1), (1, 1), (1, 1), False),
    "two tiles of channels": ((1, 70, 5, 4), (3, 2), (2, 1), (1, 1), (1, 1), False),
    "255 taps": ((1, 2, 9, 8), (15, 17), (8, 7), (7, 8), (1, 1), False),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN, or 255 in a tap."""
    empty = memory.empty

    def filled(*arguments, **options):
        t = empty(*arguments, **options)
        return t.fill_(NAN if t.is_floating_point() else 255)

    monkeypatch.setattr(memory, "empty", filled)


def integers(shape, dtype, device, fmt=LAST, seed=0):
    """So few values that ties abound."""
    t = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    return t.to(device, dtype).contiguous(memory_format=fmt)


def channels(C, dtype, device, gamma=True, beta=True):
    """(mean, var, gamma, beta) that make small integers of small integers where eps is 0: var is 1 or a quarter."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    c = torch.arange(C, device=device)
    mean, var = (c % 3 - 1).to(wide), (0.25 ** (c % 2)).to(wide)
    scales, shifts = (1 - c % 4).to(wide), (c % 5 - 2).to(wide)
    return mean, var, scales if gamma else None, shifts if beta else None


def check(case, y, norm, activation="relu", slope=0.0):
    """Forward to the bit, and the gradient of y, against PyTorch in float64, which computes small integers exactly."""
    _, *window = case
    problem = PoolProblem.of(tuple(y.shape), *window)
    how = 0.0, activation, slope
    z, taps, at_max = pooling.normalised_max_pool(problem, y, *norm, *how)
    exact = y.cpu().double()
    mean, var, gamma, beta = (None if t is None else t.cpu().double().view(-1, 1, 1) for t in norm)
    invstd = 1 / var.sqrt()
    xhat, scale = (exact - mean) * invstd, invstd if gamma is None else gamma * invstd
    u = (exact - mean) * scale + (0.0 if beta is None else beta)
    pooled, winners = F.max_pool2d(activate(u, activation, slope), *window, return_indices=True)
    same(z, pooled.to(z.dtype))
    same(pooling.max_pool_indices(problem, taps), winners)
    same(at_max, y.cpu().flatten(2).gather(2, winners.flatten(2)).view(winners.shape))
    for t in (z, taps, at_max):
        assert t.is_contiguous(memory_format=result_format(y))

    dz = integers(tuple(z.shape), y.dtype, y.device, NCHW if y.is_contiguous(memory_format=LAST) else LAST, seed=1)
    g = torch.zeros_like(exact).flatten(2).scatter_add(2, winners.flatten(2), dz.cpu().double().flatten(2)).view_as(u)
    if activation is not None:
        g = torch.where(u > 0, g, slope * g if activation == "leaky_relu" else 0.0)
    if activation == "relu6":
        g = torch.where(u < 6, g, 0.0)
    sums = torch.stack([g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))])
    same(batchnorm.gradient_sums(dz, at_max, None, *norm, None, *how), sums.to(norm[0].dtype))
    dy = pooling.normalised_max_pool_backward(problem, dz, taps, y, *norm, sums.to(norm[0]), *how)
    assert dy.is_contiguous(memory_format=result_format(y))
    of_g, of_gx = sums.view(2, -1, 1, 1) / (y.numel() / y.shape[1])
    right = scale * (g - of_g - xhat * of_gx)
    torch.testing.assert_close(
        dy.cpu().double(), right, rtol=torch.finfo(y.dtype).eps, atol=8 * torch.finfo(sums.to(norm[0]).dtype).eps
    )


def same(actual, expected):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "fmt"),
    [*((name, LAST) for name in WINDOWS), *((name, NCHW) for name in ("resnet stem", "uneven in everything"))],
    ids=str,
)
def test_windows(name, fmt, device):
    case = WINDOWS[name]
    y = integers(case[0], torch.float32, device, fmt)
    check(case, y, channels(case[0][1], y.dtype, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", None])
def test_dtypes_and_activations(dtype, activation, device):
    case = WINDOWS["resnet stem"]
    y = integers(case[0], dtype, device)
    check(
        case,
        y,
        channels(8, dtype, device, gamma=activation != "relu6", beta=activation != "leaky_relu"),
        activation,
        0.5,
    )


@pytest.mark.parametrize("layout", ["cut from nhwc", "transposed", "channels repeated"])
def test_layouts(layout, device):
    case = WINDOWS["resnet stem"]
    y = integers(case[0], torch.float16, device)
    if layout == "cut from nhwc":
        y = embed(y, (0, 0, 1, 1), (1, 3, 2, 1))
    elif layout == "transposed":
        y = y.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        y = y[:, :1].expand_as(y)
    check(case, y, channels(8, y.dtype, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ties_are_those_of_what_would_have_been_stored(dtype, device):
    """Two numbers that differ before they are rounded, and not afterwards: the first of them wins, though the second
    is larger.
    """
    y = torch.zeros(1, 8, 2, 2, dtype=dtype, device=device).to(memory_format=LAST)
    y[..., 0, 1], y[..., 1, 0] = 1.0, 1.0 + 2 * torch.finfo(dtype).eps
    norm = (torch.zeros(8), torch.ones(8), torch.full((8,), 0.25), torch.full((8,), 4.0))
    norm = tuple(t.to(device) for t in norm)
    problem = PoolProblem.of((1, 8, 2, 2), (2, 2), (2, 2), (0, 0))
    z, taps, at_max = pooling.normalised_max_pool(problem, y, *norm, 0.0, "relu", 0.0)
    same(taps, torch.ones_like(taps))
    same(at_max, torch.ones_like(at_max))
    assert (z == 4.25).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["relu", None])
def test_nan_and_infinities(dtype, activation, device):
    """The last NaN of a window wins; of -inf alone, and of equal zeros, the first."""
    case = ((2, 6, 7, 7), (3, 3), (2, 2), (1, 1), (1, 1), False)
    y = integers(case[0], dtype, device)
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0], dtype=dtype, device=device)
    chosen = torch.randint(0, 10, y.shape, generator=torch.Generator().manual_seed(2)).to(device)
    y = torch.where(chosen < 5, values[chosen.clamp(max=4)], y).contiguous(memory_format=LAST)
    y[:, 0], y[:, 1] = -INF, NAN
    problem = PoolProblem.of(case[0], *case[1:])
    mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)
    z, taps, at_max = pooling.normalised_max_pool(problem, y, mean, var, None, None, 0.0, activation, 0.0)
    stored = y if activation is None else torch.where(y < 0, 0.0, y)
    expected, winners = F.max_pool2d(stored.cpu(), *case[1:], return_indices=True)
    same(z, expected)
    same(pooling.max_pool_indices(problem, taps), winners)
    same(at_max, y.cpu().flatten(2).gather(2, winners.flatten(2)).view(winners.shape))


def test_an_empty_batch_launches_nothing(device, launches):
    y = torch.empty(0, 4, 8, 8, device=device)
    problem = PoolProblem.of((0, 4, 8, 8), (3, 3), (2, 2), (1, 1))
    norm = channels(4, y.dtype, device)
    z, taps, at_max = pooling.normalised_max_pool(problem, y, *norm, 0.0, "relu", 0.0)
    assert z.shape == taps.shape == at_max.shape == (0, 4, 4, 4)
    sums = torch.zeros(2, 4, device=device)
    assert pooling.normalised_max_pool_backward(problem, z, taps, y, *norm, sums, 0.0, "relu", 0.0).shape == y.shape
    assert not launches


def test_gradients_of_random_numbers(device):
    """Not of integers: against PyTorch in float64, an error no larger than twice that of PyTorch in float32."""
    shape, *window = WINDOWS["all overlap"]
    generator = torch.Generator().manual_seed(3)
    y, dz = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def by_pytorch(y, dz):
        leaf = y.clone().requires_grad_()
        normed = F.batch_norm(leaf, None, None, training=True)
        z = F.max_pool2d(torch.relu(normed), *window)
        return torch.autograd.grad(z, leaf, dz)[0]

    exact, theirs = by_pytorch(y.double(), dz.double()), by_pytorch(y, dz)
    y, dz = (t.to(device, memory_format=LAST) for t in (y, dz))
    problem = PoolProblem.of(shape, *window)
    how = *batchnorm.batch_moments(y), None, None
    _, taps, at_max = pooling.normalised_max_pool(problem, y, *how, 1e-5, "relu", 0.0)
    sums = batchnorm.gradient_sums(dz, at_max, None, *how, None, 1e-5, "relu", 0.0)
    dy = pooling.normalised_max_pool_backward(problem, dz, taps, y, *how, sums, 1e-5, "relu", 0.0)
    assert (dy.cpu() - exact).abs().max() <= 2 * (theirs - exact).abs().max()
