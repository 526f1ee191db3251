"""functional's pools and batch_norm against torch.nn.functional's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cnnfast.functional as ours
from cnnfast_kernels.batchnorm import gradients, normalising, statistics, sums
from tests.support.agreement import (
    assert_bits,
    assert_close,
    assert_same_strides,
    assert_served_by_kernels,
    exact,
    integers,
    leaf,
    normal,
    run,
    saved_bytes,
)
from tests.support.convolutions import LAYOUTS, arrange

FORMATS = (torch.contiguous_format, torch.channels_last)
FEW = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def pools(draw):
    """x's shape, and kernel_size, stride, padding, dilation, ceil_mode as max_pool2d takes them."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, dilation = draw(pair), draw(pair)
    stride = draw(st.one_of(st.none(), pair, st.just([])))
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    shape = (draw(st.integers(0, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    assume(all(size + 2 * pad >= s for size, pad, s in zip(shape[2:], padding, span, strict=True)))
    return shape, kernel, stride, padding, dilation, draw(st.booleans())


@FEW
@given(
    case=pools(),
    layout=st.sampled_from([*LAYOUTS]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_any_max_pool(case, layout, dtype, device):
    """Few different integers, so that many are equal: the result, which of equals wins, and the gradient that
    it gets.
    """
    shape, *window = case
    x = arrange(integers(*shape, dtype=dtype).to(device), layout)
    mine = run(lambda x: ours.max_pool2d(x, *window), [x])
    assert_bits(mine, exact(lambda x: theirs.max_pool2d(x, *window), [x]))
    assert_served_by_kernels(mine.trace)
    assert mine.trace.launches == ["max_pool_kernel", "max_pool_backward_kernel"] * (shape[0] > 0)
    _, indices = ours.max_pool2d(x, *window, return_indices=True)
    assert torch.equal(indices, theirs.max_pool2d(x, *window, return_indices=True)[1])


@FEW
@given(
    case=pools(),
    layout=st.sampled_from([*LAYOUTS]),
    count_pad=st.booleans(),
    divisor=st.sampled_from([None, None, 3, -2]),
)
def test_any_average_pool(case, layout, count_pad, divisor, device):
    shape, kernel, stride, padding, _, ceil_mode = case
    window = kernel, stride, padding, ceil_mode, count_pad, divisor
    x = arrange(normal(*shape).to(device), layout)
    mine = run(lambda x: ours.avg_pool2d(x, *window), [x])
    assert_close(mine, exact(lambda x: theirs.avg_pool2d(x, *window), [x]), 1e-13)
    assert mine.trace.launches == ["avg_pool_kernel", "avg_pool_backward_kernel"] * (shape[0] > 0)


SIZES = st.one_of(
    st.integers(1, 9),
    st.tuples(*[st.one_of(st.none(), st.integers(1, 9))] * 2),
    st.lists(st.integers(0, 3), min_size=2, max_size=2),
)


@FEW
@given(shape=st.tuples(st.integers(0, 2), *[st.integers(1, 7)] * 3), size=SIZES, layout=st.sampled_from([*LAYOUTS]))
def test_any_adaptive_pool(shape, size, layout, device):
    """To fewer pixels, more, none, or as many as there are; whole planes are the global kernel's."""
    x = arrange(normal(*shape).to(device), layout)
    y = theirs.adaptive_avg_pool2d(x, size)
    if 0 in y.shape[1:]:  # neither has a gradient of no pixels (test_corners.py)
        assert ours.adaptive_avg_pool2d(x, size).shape == y.shape
        return
    mine = run(lambda x: ours.adaptive_avg_pool2d(x, size), [x])
    assert_close(mine, exact(lambda x: theirs.adaptive_avg_pool2d(x, size), [x]), 1e-13)
    assert mine.y.stride() == y.stride()
    assert y.numel() == 0 or mine.trace.launches == [
        "plane_mean_kernel" if y.shape[2:] == (1, 1) else "avg_pool_kernel",
        "avg_pool_backward_kernel",
    ]


POOLS = {
    "max": (lambda x: ours.max_pool2d(x, 3, 2, 1), lambda x: theirs.max_pool2d(x, 3, 2, 1)),
    "average": (
        lambda x: ours.avg_pool2d(x, 2, 1, 1, True, False),
        lambda x: theirs.avg_pool2d(x, 2, 1, 1, True, False),
    ),
    "adaptive": (lambda x: ours.adaptive_avg_pool2d(x, (3, 8)), lambda x: theirs.adaptive_avg_pool2d(x, (3, 8))),
    "global": (ours.global_avg_pool2d, lambda x: theirs.adaptive_avg_pool2d(x, 1)),
}


@pytest.mark.parametrize("pool", POOLS)
def test_half_precision_is_rounded_once(pool, device):
    mine, their = POOLS[pool]
    for dtype in (torch.float16, torch.bfloat16):
        x = integers(2, 3, 5, 6, largest=9, dtype=dtype).to(device)
        torch.testing.assert_close(mine(x), their(x.cpu().double()).to(device, dtype), rtol=0, atol=0)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_pool_memory(pool, fmt, device):
    """Strides as PyTorch's, unbatched input too, and no more saved for backward; the empty batch."""
    mine, their = POOLS[pool]
    x = normal(2, 3, 5, 6).to(device).contiguous(memory_format=fmt)
    outcomes = [run(f, [x]) for f in (mine, their)]
    assert_close(*outcomes)
    if pool == "global":  # its gradient in PyTorch is NCHW, whatever x is; ours is as x
        assert outcomes[0].y.stride() == outcomes[1].y.stride()
    else:
        assert_same_strides(*outcomes)
    assert saved_bytes(mine, [x]) <= saved_bytes(their, [x])
    for other in (x[0].contiguous(), x[:0]):
        outcomes = [run(f, [other]) for f in (mine, their)]
        assert outcomes[0].y.shape == outcomes[1].y.shape
        assert_close(*outcomes)


def test_global_pool_without_keepdim(device):
    x = normal(2, 3, 5, 6).to(device)
    for t in (x, x[0]):
        assert_close(*(run(f, [t]) for f in (lambda x: ours.global_avg_pool2d(x, False), lambda x: x.mean((-2, -1)))))


@pytest.mark.parametrize("pool", POOLS)
def test_pool_nan_and_infinities(pool, device):
    """A NaN wins every maximum; a window of -inf has one of its own pixels as maximum."""
    x = integers(2, 3, 5, 6, dtype=torch.float64).to(device)
    x[0, 0, 2, 2] = x[0, 0, 2, 3] = float("nan")
    x[1, 1] = -float("inf")
    x[1, 2, 4, 5] = float("inf")
    assert_close(*(run(f, [x]) for f in POOLS[pool]))


def test_indices_of_the_unusual(device):
    x = integers(1, 2, 4, 5).to(device)
    x[0, 0, 1, 1] = x[0, 0, 2, 2] = float("nan")
    x[0, 1] = -float("inf")
    for window in ((3, 1, 1), ((2, 3), 2, (1, 1), (2, 1), True)):
        pairs = zip(
            ours.max_pool2d(x, *window, return_indices=True),
            theirs.max_pool2d(x, *window, return_indices=True),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert a.stride() == b.stride()
    unbatched = ours.max_pool2d(x[0], 2, return_indices=True)
    assert unbatched[1].shape == (2, 2, 2)


def test_gradient_through_max_pool_with_indices(device):
    """Indices have no gradient, values do."""
    x = leaf(integers(1, 2, 4, 4, dtype=torch.float64).to(device))
    y, indices = ours.max_pool2d(x, 2, return_indices=True)
    assert not indices.requires_grad
    expected = torch.autograd.grad(theirs.max_pool2d(x, 2).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_a_pool_without_gradient_keeps_nothing(device):
    x = integers(1, 2, 4, 4).to(device)
    assert saved_bytes(lambda x: ours.max_pool2d(x, 2), [x], [0]) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Batch norm

SHAPES = {"2d": (7, 3), "3d": (3, 4, 5), "4d": (2, 5, 3, 4), "5d": (2, 3, 2, 3, 2)}


def stats(
    C: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(C, seed=5, dtype=dtype).to(device), normal(C, seed=6, dtype=dtype).abs().add(0.5).to(device)


def norm(function, running, training: bool, momentum: float = 0.1, eps: float = 1e-5):
    return lambda x, w, b: function(x, *running, w, b, training, momentum, eps)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_norm(shape, training, device):
    inputs = [normal(*shape).to(device), normal(shape[1], seed=1).to(device), normal(shape[1], seed=2).to(device)]
    running, expected = stats(shape[1], device=device), stats(shape[1], device=device)
    mine = run(norm(ours.batch_norm, running, training, 0.3), inputs)
    their = run(norm(theirs.batch_norm, expected, training, 0.3), inputs)
    assert_close(mine, their)
    assert_same_strides(mine, their)
    assert_served_by_kernels(mine.trace)
    torch.testing.assert_close(running, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_batch_norm_layouts(layout, training, device):
    x = arrange(normal(2, 5, 3, 4).to(device), layout)
    inputs = [x, normal(5, seed=1).to(device), None]
    mine = run(norm(ours.batch_norm, stats(5, device=device), training), inputs)
    assert_close(mine, exact(norm(theirs.batch_norm, stats(5), training), inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_batch_norm_in_eval_to_the_bit(dtype, device):
    x = integers(2, 4, 3, 3, largest=3, dtype=dtype).to(device)
    w, b = torch.tensor([1.0, 2.0, -1.0, 0.5], device=device), torch.tensor([0.0, 1.0, -1.0, 0.5], device=device)
    running = torch.tensor([1.0, -1.0, 0.0, 2.0], device=device), torch.tensor([1.0, 4.0, 0.25, 1.0], device=device)
    for parameters in (torch.float32, dtype):
        inputs = [x, w.to(parameters), b.to(parameters)]
        mine = run(norm(ours.batch_norm, [t.to(parameters) for t in running], False, eps=0.0), inputs, (1,))
        assert_bits(
            mine, exact(norm(theirs.batch_norm, [t.double().cpu() for t in running], False, eps=0.0), inputs, (1,))
        )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_batch_norm_memory(fmt, training, device):
    x = normal(2, 5, 3, 4, dtype=torch.float32).to(device).contiguous(memory_format=fmt)
    w, b = normal(5, seed=1, dtype=torch.float32).to(device), normal(5, seed=2, dtype=torch.float32).to(device)
    running = stats(5, torch.float32, device)
    assert_same_strides(*(run(norm(f, running, training), [x, w, b]) for f in (ours.batch_norm, theirs.batch_norm)))
    for given_stats in [running] + [(None, None)] * training:
        for inputs in ([x, w, b], [x, None, None]):
            mine, their = (
                saved_bytes(norm(f, given_stats, training), inputs) for f in (ours.batch_norm, theirs.batch_norm)
            )
            assert mine <= their


def test_batch_norm_launches(device):
    x = normal(2, 5, 3, 4).to(device)
    running = stats(5, device=device)
    assert run(norm(ours.batch_norm, running, False), [x, None, None], [0]).trace.launches == ["normalize_kernel"]
    launches = run(norm(ours.batch_norm, running, True), [x, None, None], [0]).trace.launches
    assert launches == ["batch_moments_kernel", "combine_kernel", "update_running_kernel", "normalize_kernel"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_batch_norm_of_nothing(training, device):
    """An empty batch changes no statistics and gives parameters gradients of zero."""
    inputs = [normal(0, 5, 3, 4).to(device), normal(5).to(device), normal(5).to(device)]
    running = stats(5, device=device)
    mine = run(norm(ours.batch_norm, running, training), inputs)
    assert_close(mine, run(norm(theirs.batch_norm, stats(5, device=device), training), inputs))
    assert all(torch.equal(a, b) for a, b in zip(running, stats(5, device=device), strict=True))


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 3, 1024, 1024), (8, 2, 512, 512), (2, 1, 720, 1280), (256, 2048, 1, 1), (1024, 512, 1, 1)], ids=str
)
def test_batch_norm_fills_a_gpu(shape, dtype, fmt):
    """Two programs for each of 132 multiprocessors in every pass: few channels of large planes, and many of one
    pixel.
    """
    strides = torch.empty(shape, device="meta", memory_format=fmt).stride()
    plans = [
        statistics._plan_moments(shape, strides, dtype)[0],
        normalising._plan_normalize(shape, strides, None, strides, dtype, 1e-5, None, 0.0, False)[0],
        sums.plan_sums(shape, (strides, strides, None, None), dtype, 1e-5, None, 0.0, 2)[0],
        gradients.plan_backward(shape, (strides, strides, None, None), strides, dtype, 1e-5, None, 0.0, True, False)[0],
    ]
    assert min(plan.grid[0] for plan in plans) >= 2 * 132


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_batch_norm_of_nan(training, device):
    x = normal(2, 5, 3, 4).to(device)
    x[0, 1, 1, 1] = float("nan")
    inputs = [x, normal(5, seed=1).to(device), normal(5, seed=2).to(device)]
    running, expected = stats(5, device=device), stats(5, device=device)
    mine, their = (
        run(norm(ours.batch_norm, running, training), inputs),
        run(norm(theirs.batch_norm, expected, training), inputs),
    )
    assert_close(mine, their)
    torch.testing.assert_close(running, expected, equal_nan=True)
