"""batch_norm and the pools where there is nothing, where an axis has one element, and where numbers are at the end of
their range.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor

import cnnfast.functional as ours
from tests.support.agreement import assert_bits, assert_close, assert_same_strides, exact, integers, normal, run

INF, NAN = float("inf"), float("nan")


def norm(function, *options: Any):
    return lambda x, weight, bias: function.batch_norm(x, options[0], options[1], weight, bias, *options[2:])


def vectors(C: int, given: tuple[bool, ...], device) -> list[Tensor | None]:
    """weight, bias, running_mean, running_var, where they are given."""
    return [normal(C, seed=i).abs().add(0.5).to(device) if give else None for i, give in enumerate(given)]


# ----------------------------------------------------------------------------------------------------------------------
# Nothing

EMPTY = [
    (0,),
    (0, 3),
    (3, 0),
    (0, 0),
    (4, 0, 5),
    (0, 3, 4),
    (2, 3, 0),
    (0, 3, 2, 2),
    (2, 3, 0, 2),
    (2, 0, 3, 3),
    (0, 2, 2, 2, 2),
]


@pytest.mark.parametrize("affine", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_batch_norm_of_nothing(shape, training, affine, device):
    """Results, gradients and errors are PyTorch's, which takes the first channel's weight and bias; nothing is
    updated.
    """
    C = shape[min(1, len(shape) - 1)]
    x = torch.empty(shape, dtype=torch.float64, device=device)
    for running in (True, False):
        weight, bias, *statistics = vectors(C, (*affine, running, running), device)
        before = [None if t is None else t.clone() for t in statistics]
        calls = [norm(f, *statistics, training) for f in (ours, theirs)]
        try:
            expected = run(calls[1], [x, weight, bias])
        except (RuntimeError, IndexError) as error:
            with pytest.raises(type(error)):
                run(calls[0], [x, weight, bias])
            continue
        found = run(calls[0], [x, weight, bias])
        assert_close(found, expected)
        assert_same_strides(found, expected)
        assert all(a is b or torch.equal(a, b) for a, b in zip(statistics, before, strict=True))


@pytest.mark.parametrize(
    "options", [{"eps": -1.0}, {"eps": 0.0}, {"momentum": "x"}, {"eps": "x"}, {"training": 1}], ids=str
)
def test_options_are_checked_where_nothing_is_normalised(options, device):
    x = torch.empty(0, 3, device=device)
    with pytest.raises((TypeError, ValueError)) as expected:
        theirs.batch_norm(x, None, None, **{"training": True, **options})
    with pytest.raises(expected.type):
        ours.batch_norm(x, None, None, **{"training": True, **options})


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    ("shape", "training"), [((1,), True), ((3,), True), ((3,), False), ((), True), ((), False)], ids=str
)
def test_batch_norm_without_channels(shape, training, running, affine, device):
    x = torch.ones(shape, dtype=torch.float64, device=device)
    weight, bias, *statistics = vectors(shape[0] if shape else 1, (affine, affine, running, running), device)
    with pytest.raises((RuntimeError, IndexError, ValueError)) as expected:
        theirs.batch_norm(x, *statistics, weight, bias, training)
    with pytest.raises(expected.type):
        ours.batch_norm(x, *statistics, weight, bias, training)


@pytest.mark.parametrize("size", [0, (0, 3), (3, 0), (1, 0)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 4, 5), (0, 3, 4, 5), (2, 3, 1, 1)], ids=str)
def test_no_gradient_of_an_adaptive_pool_to_nothing(shape, size, device):
    """As in PyTorch there is a result, and no gradient of it."""
    x = normal(*shape).to(device).requires_grad_()
    y = ours.adaptive_avg_pool2d(x, size)
    assert y.shape == theirs.adaptive_avg_pool2d(x, size).shape
    for result in (theirs.adaptive_avg_pool2d(x, size), y):
        with pytest.raises(RuntimeError, match="adaptive_avg_pool2d"):
            result.sum().backward()


def test_no_gradient_of_an_adaptive_pool_of_no_channels(device):
    x = torch.empty(2, 0, 4, 5, device=device, requires_grad=True)
    for f in (theirs, ours):
        with pytest.raises(RuntimeError, match="adaptive_avg_pool2d"):
            f.adaptive_avg_pool2d(x, 3).sum().backward()
        (dx,) = torch.autograd.grad(f.adaptive_avg_pool2d(x, 1).sum(), x)
        assert dx.shape == x.shape


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 0, 0), (3, 0, 5), (0, 4, 5)], ids=str
)
def test_mean_of_empty_planes(shape, device):
    """NaN for each plane without a pixel, as PyTorch's mean, and an empty gradient."""
    x = torch.empty(shape, dtype=torch.float64, device=device)
    for keepdim in (True, False):
        found = run(lambda x, keepdim=keepdim: ours.global_avg_pool2d(x, keepdim), [x])
        assert_close(found, run(lambda x, keepdim=keepdim: x.mean((-2, -1), keepdim), [x]))


WINDOWS = {
    "max": lambda f, x: f.max_pool2d(x, 3, 2, 1),
    "average": lambda f, x: f.avg_pool2d(x, 2, 1, 1),
    "adaptive": lambda f, x: f.adaptive_avg_pool2d(x, (7, 9)),  # larger than the image
    "plane": lambda f, x: f.adaptive_avg_pool2d(x, 1),
}


@pytest.mark.parametrize("pool", WINDOWS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 4, 5), (0, 4, 5), (3, 0, 5)], ids=str
)
def test_pools_of_nothing(shape, pool, device):
    x = torch.empty(shape, dtype=torch.float64, device=device)
    try:
        expected = run(lambda x: WINDOWS[pool](theirs, x), [x])
    except RuntimeError:
        with pytest.raises(RuntimeError):
            run(lambda x: WINDOWS[pool](ours, x), [x])
        return
    assert_close(run(lambda x: WINDOWS[pool](ours, x), [x]), expected)


# ----------------------------------------------------------------------------------------------------------------------
# One element


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (1, 1, 4, 5)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_gradient_of_a_permuted_batch(shape, training, device):
    """Of adjacent channels, and pixels in another order: no memory format, so that the gradient is contiguous, as
    PyTorch's is.

    How x lies is read before anything is copied. Axes of one element say nothing of an order: how a result lies then
    differs between PyTorch's own kernels, and ours asks as cuDNN does.
    """
    for order in permutations(range(4)):
        if order[-1] != 1 or order == (0, 2, 3, 1):
            continue
        x = normal(*(shape[i] for i in order)).permute([order.index(i) for i in range(4)]).to(device)
        options = *vectors(shape[1], (True, True), device), training
        mine, its = (run(norm(f, *options), [x, None, None]) for f in (ours, theirs))
        assert_close(mine, run(norm(theirs, *options), [x.contiguous(), None, None]))
        ambiguous = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        assert ambiguous or mine.grads[0].stride() == its.grads[0].stride()
        if 1 not in shape:
            assert_same_strides(mine, its)


@pytest.mark.parametrize("pool", WINDOWS)
def test_pools_of_one_pixel_that_is_not_a_batch(pool, device):
    """[C, 1, 1] of adjacent channels is not channels_last: neither is what comes of it."""
    x = normal(1, 1, 3).permute(2, 0, 1).to(device)
    mine, its = (run(lambda x, f=f: WINDOWS[pool](f, x), [x]) for f in (ours, theirs))
    assert_close(mine, its)
    assert_same_strides(mine, its)


@pytest.mark.parametrize("pool", ["max", "average", "adaptive"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 4, 5), (1, 3, 4, 5), (2, 3, 1, 5), (2, 3, 4, 1), (2, 3, 1, 1), (1, 1, 1, 1), (0, 3, 4, 5)], ids=str
)
def test_strides_of_axes_of_one_element(shape, pool, device):
    for fmt, stride in product((torch.contiguous_format, torch.channels_last), (None, 1, 7)):
        x = torch.empty(shape, dtype=torch.float64, memory_format=fmt).copy_(normal(*shape))
        if stride is not None:
            x = x.as_strided(
                shape, [stride if size == 1 else step for size, step in zip(shape, x.stride(), strict=True)]
            )
        mine, its = (run(lambda x, f=f: WINDOWS[pool](f, x), [x.to(device)]) for f in (ours, theirs))
        assert_close(mine, its)
        assert_same_strides(mine, its)


# ----------------------------------------------------------------------------------------------------------------------
# The end of the range


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [2, 1500])
def test_gradient_of_a_weight_whose_variance_and_eps_are_zero(rows, dtype, device):
    """sum(dz * (y - mean)) / 0, as PyTorch has it: infinite, and NaN only where the sum is 0. 1,500 rows are several
    tiles.
    """
    x = torch.tensor([[1.0, 2, 3, 1, 5], [2.0, -2, 0, -1, NAN]], dtype=dtype, device=device).repeat(rows // 2, 1)
    mean = torch.tensor([0.0, 1, 1, 0, 0], dtype=dtype, device=device)
    weight, bias = (
        torch.tensor([1.0, 2, -1, 1, 1], dtype=dtype, device=device),
        torch.ones(5, dtype=dtype, device=device),
    )
    zero = torch.zeros(5, dtype=dtype, device=device)
    # PyTorch multiplies out (y - mean) * scale if x is contiguous, hence the stride.
    wide = torch.empty(rows, 10, dtype=dtype, device=device)[:, ::2].copy_(x)
    mine, its = (
        run(norm(f, mean, zero, False, 0.1, 0.0), [wide, weight, bias], dy=lambda y: torch.ones_like(y).contiguous())
        for f in (ours, theirs)
    )
    for a, b in zip(mine.tensors, its.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert its.grads[1].isinf().sum() == 3
    assert mine.grads[1].isnan().tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("eps", [1e-300, 1e-38, 1e-5, 1e38])
def test_constant_channels_are_their_bias(eps, device):
    x = torch.tensor([1.0, -2, 0, 3e5], dtype=torch.float64, device=device).view(1, 4, 1, 1).repeat(2, 1, 3, 3)
    weight, bias = vectors(4, (True, True), device)
    mine = run(norm(ours, None, None, True, 0.1, eps), [x, weight, bias])
    assert torch.equal(mine.y, bias.view(1, 4, 1, 1).expand_as(x))
    assert not mine.grads[1].any()


def largest(shape: tuple[int, ...], kind: str, value: float, dtype: torch.dtype) -> Tensor:
    match kind:
        case "constant":
            return torch.full(shape, value, dtype=dtype)
        case "signs":
            return value * (2 * integers(*shape, dtype=dtype).clamp(min=0) - 1)
        case "halves":  # every tile sums to the end of the range
            x = torch.full(shape, value, dtype=dtype)
            x[: shape[0] // 2] *= -1
            return x
    x = normal(*shape, dtype=dtype)
    x[0, 0] = value
    return x


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, 1e38), (torch.float32, 3.4e38), (torch.float64, 1.7e308)], ids=str
)
@pytest.mark.parametrize("kind", ["constant", "signs", "halves", "one"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "rows"])
def test_statistics_of_the_largest_numbers(layout, kind, dtype, value, device):
    """The mean is finite, whatever the sum is; the variance is PyTorch's, which is infinite where its type has no such
    number.
    """
    shape = (300, 3) if layout == "rows" else (4, 3, 8, 9)
    x = largest(shape, kind, value, dtype).to(device)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    running = [torch.zeros(3, dtype=dtype, device=device), torch.ones(3, dtype=dtype, device=device)]
    y = ours.batch_norm(x, *running, training=True, momentum=1.0)
    scaled = x.double().transpose(0, 1).flatten(1) / 2**12
    mean, deviation = scaled.mean(1), scaled.std(1)
    torch.testing.assert_close(running[0].double() / 2**12, mean, rtol=1e-6, atol=1e-7 * value / 2**12)
    huge = deviation * 2**12 > torch.finfo(dtype).max ** 0.5
    assert running[1].isinf().tolist() == huge.tolist()
    finite = ~huge
    torch.testing.assert_close(running[1][finite].double(), (deviation[finite] * 2**12) ** 2, rtol=1e-5, atol=0)
    if kind == "constant":
        assert not y.any()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_mean_of_infinity(layout, device):
    x = normal(2, 4, 5, 6, dtype=torch.float32).to(device)
    x[0, 0, 0, 0], x[0, 1, 2, 2], x[1, 2, 1, 1], x[0, 2, 0, 0], x[1, 3, 4, 5] = INF, -INF, INF, -INF, NAN
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    buffers = [[torch.zeros(4, device=device), torch.ones(4, device=device)] for _ in range(2)]
    ours.batch_norm(x, *buffers[0], training=True)
    theirs.batch_norm(x, *buffers[1], training=True)
    assert buffers[0][0].tolist()[:2] == [INF, -INF]
    for a, b in zip(*buffers, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(("groups", "algorithm"), [(1, "direct"), (1, "im2col"), (4, "direct")])
def test_fused_statistics_of_the_largest_numbers(groups, algorithm, device):
    """The sums of a convolution's tiles: a constant image of 2e38, which leaves bias and residual."""
    x = torch.full((2, 4, 9, 10), 1e38, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(4, 4 // groups, 1, 1, device=device)
    weight[torch.arange(4), torch.arange(4) % weight.shape[1]] = 2.0
    running = torch.zeros(4, device=device), torch.ones(4, device=device)
    residual = normal(2, 4, 9, 10, dtype=torch.float32).to(device)
    bias = torch.arange(4.0, device=device)
    y = ours.conv_bn_act(
        x,
        weight,
        *running,
        None,
        bias,
        residual=residual,
        training=True,
        momentum=1.0,
        groups=groups,
        algorithm=algorithm,
        activation=None,
    )
    assert torch.equal(running[0], torch.full((4,), 2e38, device=device))
    assert not running[1].any()
    torch.testing.assert_close(y, bias.view(1, 4, 1, 1) + residual)


def test_exact_is_unchanged(device):
    """Ordinary numbers: what is exact stays exact."""
    x = integers(4, 4, 8, 8, largest=2, dtype=torch.float32).to(device)
    running = [torch.zeros(4, device=device), torch.ones(4, device=device)]
    ours.batch_norm(x, *running, training=True, momentum=1.0)
    assert torch.equal(running[0].double(), x.double().mean((0, 2, 3)))
    weights = [torch.ones(4, device=device), torch.zeros(4, device=device)]
    mine = run(norm(ours, *[t.to(device) for t in (torch.zeros(4), torch.ones(4))], False, 0.1, 0.0), [x, *weights])
    assert_bits(
        mine, exact(norm(theirs, torch.zeros(4).double(), torch.ones(4).double(), False, 0.1, 0.0), [x, *weights])
    )
