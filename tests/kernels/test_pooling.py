"""Pooling against PyTorch on the CPU: maxima, their indices and exact sums bit for bit, averages against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.poison import embed, poison

pytest.importorskip("triton")

from cnnfast_kernels import pooling
from cnnfast_kernels.layout import result_format
from cnnfast_kernels.problem import PoolProblem

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CL, CONTIGUOUS = torch.channels_last, torch.contiguous_format
INF = float("inf")

# shape, kernel, stride, padding, dilation, ceil_mode
WINDOWS = {
    "resnet stem": ((2, 8, 13, 11), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "halving": ((1, 16, 8, 6), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "ceil runs past the edge": ((2, 3, 10, 7), (3, 2), (2, 2), (0, 1), (1, 1), True),
    "ceil drops a window in the padding": ((1, 2, 5, 5), (2, 2), (3, 3), (1, 1), (1, 1), True),
    "uneven in everything": ((3, 5, 9, 14), (2, 5), (1, 3), (1, 2), (1, 1), False),
    "windows apart": ((1, 12, 11, 9), (2, 1), (4, 3), (0, 0), (1, 1), False),
    "window is the image": ((2, 7, 5, 6), (5, 6), (5, 6), (0, 0), (1, 1), False),
    "1x1": ((2, 4, 3, 3), (1, 1), (1, 1), (0, 0), (1, 1), False),
    "large and overlapping": ((1, 2, 8, 9), (7, 5), (1, 1), (3, 2), (1, 1), False),
}
DILATED = {
    "dilated": ((2, 6, 12, 11), (3, 2), (1, 1), (1, 1), (2, 3), False),
    "dilated, strided, ceil": ((1, 8, 13, 12), (3, 3), (3, 2), (1, 1), (3, 2), True),
    "a window wholly in the padding": ((1, 3, 3, 3), (2, 2), (1, 1), (1, 1), (4, 4), False),
}
LAYOUTS = [
    "nchw",
    "nhwc",
    "cut from nchw",
    "cut from nhwc",
    "transposed",
    "images repeated",
    "channels repeated",
    "every other channel",
]
# every layout in one dtype, the usual two in the others
DTYPES_AND_LAYOUTS = [
    (dtype, layout) for layout in LAYOUTS for dtype in (DTYPES if layout in ("nchw", "nhwc") else [torch.float16])
]


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` (but for repeats) in another layout of memory."""
    match layout:
        case "nchw":
            return x.contiguous()
        case "nhwc":
            return x.contiguous(memory_format=CL)
        case "cut from nchw":
            return embed(x.contiguous(), 1, 2)
        case "cut from nhwc":
            return embed(x.contiguous(memory_format=CL), (0, 0, 1, 1), (1, 3, 2, 1))
        case "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case "images repeated":
            return x[:1].expand_as(x)
        case "channels repeated":
            return x[:, :1].expand_as(x)
        case "every other channel":
            N, C, H, W = x.shape
            wide = poison(torch.empty((N, 2 * C, H, W), dtype=x.dtype, device=x.device, memory_format=CL))
            wide[:, ::2] = x
            return wide[:, ::2]
    raise ValueError(layout)


def integers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """So few values that ties abound, so small that every sum here is exact in every dtype."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_as_good(actual: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice PyTorch's own error, and a rounding of the largest result."""
    assert actual.dtype == torchs.dtype
    ours, theirs = (actual.cpu().double() - exact).abs(), (torchs.double() - exact).abs()
    floor = torch.finfo(actual.dtype).eps * exact.abs().max() / 4
    assert ours.max() <= 2 * theirs.max() + floor
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + floor


def reference(
    pool: Callable, x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's y and dx on the CPU, computed in `dtype`."""
    leaf = x.detach().cpu().to(dtype, copy=True).requires_grad_()
    y = pool(leaf)
    y.backward(dy.cpu().to(dtype))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def check_max(
    case: tuple, x: torch.Tensor, dy_layout: str = "nchw", dx_format: torch.memory_format | None = None
) -> None:
    """Forward, indices and backward (by default in the format of x); x on the ring's device."""
    _, *window = case
    problem = PoolProblem.of(tuple(x.shape), *window)
    leaf = x.detach().cpu().clone().requires_grad_()
    expected, expected_indices = F.max_pool2d(leaf, *window, return_indices=True)

    y, taps = pooling.max_pool(problem, x, with_taps=True)
    assert taps is not None
    assert taps.dtype == pooling.taps_dtype(problem)
    assert y.is_contiguous(memory_format=result_format(x))
    assert taps.stride() == y.stride()
    assert_same(y, expected.detach())
    assert_same(pooling.max_pool_indices(problem, taps), expected_indices)

    # PyTorch's backward writes out of bounds where a window holds no pixel
    inside = expected_indices.max() < x.shape[2] * x.shape[3]
    if inside:
        dy = lay_out(integers(tuple(y.shape), x.dtype, x.device, seed=1), dy_layout)
        expected.backward(dy.cpu())
        fmt = dx_format or result_format(x)
        dx = pooling.max_pool_backward(problem, dy, taps, fmt)
        assert dx.is_contiguous(memory_format=fmt)
        assert_same(dx, leaf.grad)


@pytest.mark.parametrize("name", [*WINDOWS, *DILATED])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_max_over_windows(name, layout, device):
    case = {**WINDOWS, **DILATED}[name]
    x = lay_out(integers(case[0], torch.float32, device), layout)
    check_max(case, x, dy_layout=layout, dx_format=CL if layout == "nchw" else CONTIGUOUS)


@pytest.mark.parametrize(("dtype", "layout"), DTYPES_AND_LAYOUTS)
def test_max_in_every_dtype_and_layout(dtype, layout, device):
    shape, *window = WINDOWS["resnet stem"]
    x = lay_out(integers(shape, dtype, device), layout)
    check_max((shape, *window), x, dy_layout=layout)
    problem = PoolProblem.of(shape, *window)
    x = lay_out(normal(shape, dtype, device), layout)
    assert_same(pooling.max_pool(problem, x, with_taps=False)[0], F.max_pool2d(x.cpu(), *window))


@pytest.mark.parametrize("dtype", DTYPES)
def test_max_of_nan_and_infinities(dtype, device):
    """The last NaN of a window wins; of -inf alone, and of equal zeros, the first."""
    case = ((2, 6, 7, 7), (3, 3), (2, 2), (1, 1), (1, 1), False)
    x = normal(case[0], dtype, device)
    values = torch.tensor([float("nan"), INF, -INF, 0.0, -0.0], dtype=dtype, device=device)
    chosen = torch.randint(0, 10, x.shape, generator=torch.Generator().manual_seed(2)).to(device)
    x = torch.where(chosen < 5, values[chosen.clamp(max=4)], x)
    x[:, 0] = -INF
    x[:, 1] = float("nan")
    for layout in ("nchw", "nhwc"):
        check_max(case, lay_out(x, layout))


def test_tap_dtypes(device):
    """One byte as long as 255 taps suffice, and an int16 above."""
    small, large = (PoolProblem.of((1, 2, 20, 20), k, (4, 3), (0, 0)) for k in ((15, 17), (17, 16)))
    assert pooling.taps_dtype(small) == torch.uint8
    assert pooling.taps_dtype(large) == torch.int16
    x = normal((1, 2, 20, 20), torch.float16, device)
    taps = pooling.max_pool(large, x, with_taps=True)[1]
    assert_same(pooling.max_pool_indices(large, taps), F.max_pool2d(x.cpu(), (17, 16), (4, 3), return_indices=True)[1])


def check_average(
    case: tuple, x: torch.Tensor, count_include_pad: bool, divisor_override: int | None = None, exact: bool = False
) -> None:
    """Forward and backward. `exact`: x holds small integers, so that only the division rounds, and forward must agree
    bit for bit.
    """
    shape, kernel, stride, padding, _, ceil_mode = case
    arguments = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    problem = PoolProblem.of(shape, kernel, stride, padding, ceil_mode=ceil_mode)
    dy = normal((problem.N, problem.C, problem.P, problem.Q), x.dtype, x.device, seed=1)
    torch_y, torch_dx = reference(lambda leaf: F.avg_pool2d(leaf, *arguments), x, dy, x.dtype)
    true_y, true_dx = reference(lambda leaf: F.avg_pool2d(leaf, *arguments), x, dy, torch.float64)

    y = pooling.avg_pool(problem, x, count_include_pad, divisor_override)
    assert y.is_contiguous(memory_format=result_format(x))
    assert_as_good(y, torch_y, true_y)
    if exact:
        assert_same(y, torch_y)
    fmt = result_format(x)
    dx = pooling.avg_pool_backward(problem, dy.contiguous(memory_format=CL), count_include_pad, divisor_override, fmt)
    assert dx.is_contiguous(memory_format=fmt)
    assert_as_good(dx, torch_dx, true_dx)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(
    ("count_include_pad", "divisor_override"), [(True, None), (False, None), (True, 3), (False, -5)]
)
def test_average_over_windows(name, count_include_pad, divisor_override, device):
    layout = "nhwc" if count_include_pad else "nchw"
    x = lay_out(integers(WINDOWS[name][0], torch.float32, device), layout)
    check_average(WINDOWS[name], x, count_include_pad, divisor_override, exact=True)


@pytest.mark.parametrize(("dtype", "layout"), DTYPES_AND_LAYOUTS)
def test_average_in_every_dtype_and_layout(dtype, layout, device):
    case = WINDOWS["ceil runs past the edge"]
    x = lay_out(normal(case[0], dtype, device), layout)
    check_average(case, x, count_include_pad=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_over_powers_of_two_are_exact(dtype, device):
    x = integers((2, 8, 8, 12), dtype, device)
    problem = PoolProblem.of((2, 8, 8, 12), (2, 4), (1, 2), (0, 0))
    y = pooling.avg_pool(problem, x, True, None)
    assert_same(y, F.avg_pool2d(x.cpu().double(), (2, 4), (1, 2)).to(dtype))
    dx = pooling.avg_pool_backward(problem, y, True, None, CL)
    assert_same(dx, reference(lambda leaf: F.avg_pool2d(leaf, (2, 4), (1, 2)), x, y, torch.float64)[1].to(dtype))


def test_average_passes_nan_and_infinities(device):
    x = normal((1, 4, 6, 6), torch.float32, device)
    x[0, 0, 1, 1], x[0, 1, 2, 3], x[0, 2, 5, 0], x[0, 2, 5, 1] = float("nan"), INF, INF, -INF
    problem = PoolProblem.of((1, 4, 6, 6), (3, 3), (2, 2), (1, 1))
    expected = F.avg_pool2d(x.cpu(), 3, 2, 1)
    torch.testing.assert_close(pooling.avg_pool(problem, x, True, None).cpu(), expected, equal_nan=True)
    torch.testing.assert_close(pooling.global_avg_pool(x).cpu(), x.cpu().mean((2, 3), keepdim=True), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (7, 5), (9, 2)])
def test_adaptive_average(dtype, size, device):
    """Windows that overlap, that are the image or one pixel, and more windows than pixels."""
    x = normal((2, 12, 7, 5), dtype, device)
    dy = normal((2, 12, *size), dtype, device, seed=1)
    torch_y, torch_dx = reference(lambda leaf: F.adaptive_avg_pool2d(leaf, size), x, dy, dtype)
    true_y, true_dx = reference(lambda leaf: F.adaptive_avg_pool2d(leaf, size), x, dy, torch.float64)
    for layout, fmt in (("cut from nhwc", CL), ("nchw", CONTIGUOUS)):
        assert_as_good(pooling.adaptive_avg_pool(lay_out(x, layout), *size), torch_y, true_y)
        dx = pooling.adaptive_avg_pool_backward(lay_out(dy, layout), (2, 12, 7, 5), fmt)
        assert dx.is_contiguous(memory_format=fmt)
        assert_as_good(dx, torch_dx, true_dx)


@pytest.mark.parametrize(("dtype", "layout"), DTYPES_AND_LAYOUTS)
def test_global_average(dtype, layout, device):
    x = lay_out(normal((3, 20, 7, 9), dtype, device), layout)
    y = pooling.global_avg_pool(x)
    assert y.is_contiguous(memory_format=result_format(x))
    assert_as_good(y, x.cpu().mean((2, 3), keepdim=True), x.cpu().double().mean((2, 3), keepdim=True))


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "cut from nhwc"])
def test_global_average_of_few_large_planes_is_split(layout, device, launches):
    x = lay_out(integers((1, 3, 97, 128), torch.float32, device), layout)
    y = pooling.global_avg_pool(x)
    assert [event.kernel for event in launches] == ["plane_mean_kernel"] * 2
    assert_same(y, x.cpu().double().sum((2, 3), keepdim=True).float() / (97 * 128))


@pytest.mark.parametrize("fmt", [CL, CONTIGUOUS])
def test_global_average_backward(fmt, device):
    dy = normal((2, 12, 1, 1), torch.float32, device)
    dx = pooling.adaptive_avg_pool_backward(dy, (2, 12, 5, 7), fmt)
    assert dx.is_contiguous(memory_format=fmt)
    assert_same(dx, (dy.cpu() / 35).expand(2, 12, 5, 7).contiguous())


def test_empty_batch_launches_nothing(device, launches):
    x = torch.empty(0, 4, 8, 8, device=device)
    problem = PoolProblem.of((0, 4, 8, 8), (3, 3), (2, 2), (1, 1))
    y, taps = pooling.max_pool(problem, x, with_taps=True)
    assert y.shape == taps.shape == pooling.max_pool_indices(problem, taps).shape == (0, 4, 4, 4)
    assert pooling.avg_pool(problem, x, True, None).shape == (0, 4, 4, 4)
    assert pooling.max_pool_backward(problem, y, taps, CL).shape == x.shape
    assert pooling.avg_pool_backward(problem, y, True, None, CL).shape == x.shape
    assert pooling.global_avg_pool(x).shape == (0, 4, 1, 1)
    assert not launches


def test_offsets_beyond_31_bits(device):
    """The second image lies 2^31 elements behind the first: memory reserved, but never touched in between."""
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x = memory.as_strided((2, 4, 4, 4), (2**31, 1, 16, 4))
    x.copy_(integers((2, 4, 4, 4), torch.float16, device))
    problem = PoolProblem.of((2, 4, 4, 4), (2, 2), (2, 2), (0, 0))
    assert_same(pooling.max_pool(problem, x, with_taps=False)[0], F.max_pool2d(x.cpu(), 2))
    assert_same(pooling.avg_pool(problem, x, True, None), F.avg_pool2d(x.cpu(), 2))
    assert_same(pooling.global_avg_pool(x), x.cpu().mean((2, 3), keepdim=True))


def test_same_inputs_same_bits(device):
    x = normal((2, 6, 9, 9), torch.float32, device)
    problem = PoolProblem.of((2, 6, 9, 9), (3, 3), (1, 1), (1, 1))

    def results() -> list[torch.Tensor]:
        y, taps = pooling.max_pool(problem, x, with_taps=True)
        z = pooling.avg_pool(problem, x, False, None)
        backward = (
            pooling.max_pool_backward(problem, z, taps, CL),
            pooling.avg_pool_backward(problem, y, False, None, CL),
        )
        return [y, taps, z, *backward, pooling.global_avg_pool(x)]

    for first, second in zip(results(), results(), strict=True):
        assert_same(first, second)


@st.composite
def cases(draw) -> tuple:
    """Anything PyTorch accepts, on an image that the window fits."""
    axes = []
    for _ in range(2):
        kernel, stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        padding = draw(st.integers(0, kernel // 2))
        smallest = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
        axes.append((draw(st.integers(smallest, smallest + 8)), kernel, stride, padding, dilation))
    sizes, *window = zip(*axes, strict=True)
    return (draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8, 12])), *sizes), *window, draw(st.booleans())


@settings(max_examples=25, derandomize=True, deadline=None)
@given(case=cases(), layout=st.sampled_from(["nchw", "nhwc", "cut from nhwc"]), count_include_pad=st.booleans())
def test_any_window(device, case, layout, count_include_pad):
    x = lay_out(integers(case[0], torch.float32, device), layout)
    check_max(case, x, layout)
    shape, kernel, stride, padding, _, ceil_mode = case
    check_average((shape, kernel, stride, padding, (1, 1), ceil_mode), x, count_include_pad, exact=True)
