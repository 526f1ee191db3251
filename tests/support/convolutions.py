"""Convolutions to test with: geometries, each with its reason, operands in any memory layout, and the judge in float64.

Operands are small integers, so that every sum is exact in any order and every result representable: results are
compared bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from cnnfast_kernels import devices, launch
from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.tiling import DEFAULT_TILES, SQUARE_TILE, TileConfig
from tests.support.poison import embed, poison


@dataclass(frozen=True)
class Case:
    """x [N, C, H, W]; filters (K, R, S); padding (top, bottom, left, right)."""

    reason: str
    x: tuple[int, int, int, int]
    filters: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        return self.reason

    @property
    def w(self) -> tuple[int, int, int, int]:
        K, R, S = self.filters
        return K, self.x[1] // self.groups, R, S

    @property
    def problem(self) -> ConvProblem:
        return ConvProblem.of(self.x, self.w, self.stride, self.padding, self.dilation, self.groups)

    @property
    def y(self) -> tuple[int, int, int, int]:
        g = self.problem
        return g.N, g.K, g.P, g.Q


needs_tensor_maps = pytest.mark.skipif(
    not launch.INTERPRETED and not 90 <= devices.architecture(torch.device("cuda", 0)) < 120,
    reason="GPU ring: this GPU has no wgmma or tcgen05 to feed by tensor maps",
)

SMALL = TileConfig(32, 32, 16, 4, 2)
DTYPES = {"half": torch.float16, "tf32": torch.float32, "ieee": torch.float32, "fp64": torch.float64}
# (dtype, precision) beside float32's
OTHER_DTYPES = [(torch.float16, "half"), (torch.bfloat16, "half"), (torch.float64, "fp64")]
# (precision, tile)
TILES = [("half", SQUARE_TILE), *((precision, tile) for precision, tiles in DEFAULT_TILES.items() for tile in tiles)]
SEEDED = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# Of SMALL's blocks, whose k-steps 16 and 32 channels fill.
EVEN = Case("3x3 of whole k-steps: one int holds the taps", (1, 16, 6, 5), (32, 3, 3), padding=(1, 1, 1, 1))
RAGGED = Case("no extent a multiple of its block", (1, 20, 5, 5), (18, 3, 3), padding=(1, 1, 1, 1))
STRIDED = Case("stride 2, odd image", (2, 16, 7, 5), (16, 3, 3), (2, 2), (1, 1, 1, 1))
FLAT = Case("few channels: one k-step spans taps", (2, 3, 7, 6), (5, 3, 3), padding=(1, 1, 1, 1))
GROUPED = Case("groups", (2, 12, 5, 5), (8, 3, 3), groups=4)
TILED = Case("several tiles along each axis of the GEMM", (2, 40, 6, 7), (72, 1, 1))

CASES = [
    EVEN,
    RAGGED,
    STRIDED,
    FLAT,
    GROUPED,
    TILED,
    Case("1x1: a plain GEMM", (2, 16, 5, 6), (16, 1, 1)),
    Case("49 taps of whole k-steps: more than an int has bits", (1, 16, 4, 4), (16, 7, 7), padding=(3, 3, 3, 3)),
    Case("49 taps, at most 16 for any one input pixel", (1, 16, 5, 5), (16, 7, 7), (2, 2), (3, 3, 3, 3)),
    Case("a stem: 7x7 stride 2 of three channels", (1, 3, 11, 10), (8, 7, 7), (2, 2), (3, 3, 3, 3)),
    Case("stride 2, even image", (1, 16, 6, 8), (16, 3, 3), (2, 2), (1, 1, 1, 1)),
    Case("strides differ", (1, 8, 9, 7), (8, 3, 2), (3, 2), (1, 0, 0, 1)),
    Case("stride larger than the kernel: inputs that no output sees", (1, 16, 7, 8), (16, 2, 2), (3, 3)),
    Case("1x1 stride 2: three of four inputs unseen", (1, 16, 6, 5), (16, 1, 1), (2, 2)),
    Case("the last rows and columns fill no window", (1, 16, 8, 8), (16, 3, 3), (3, 3)),
    Case("dilation", (1, 16, 7, 7), (16, 3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Case("stride and dilation equal: odd inputs unseen", (1, 16, 8, 7), (16, 3, 3), (2, 2), (2, 2, 2, 2), (2, 2)),
    Case("stride and dilation share a factor", (1, 8, 13, 11), (8, 4, 3), (4, 2), (3, 3, 2, 2), (2, 4)),
    Case("stride and dilation without a common factor", (1, 8, 13, 11), (8, 4, 3), (2, 3), (3, 3, 2, 2), (3, 2)),
    Case("even kernel, padded to the same size: more at one end", (1, 16, 5, 6), (16, 2, 4), padding=(0, 1, 1, 2)),
    Case("padding wider than the kernel: outputs that see only zeros", (1, 8, 3, 3), (8, 2, 2), padding=(4, 3, 3, 4)),
    Case("kernel larger than the image", (1, 16, 2, 3), (16, 5, 5), padding=(2, 2, 2, 2)),
    Case("groups of whole k-steps", (1, 32, 4, 4), (32, 3, 3), groups=2),
    Case("depthwise", (1, 6, 6, 5), (6, 3, 3), padding=(1, 1, 1, 1), groups=6),
    Case("depthwise, stride 2, two filters a channel", (1, 4, 6, 6), (8, 3, 3), (2, 2), (1, 1, 1, 1), groups=4),
    Case("one of everything", (1, 1, 1, 1), (1, 1, 1)),
    Case("one row", (2, 16, 1, 17), (16, 1, 3), padding=(0, 0, 1, 1)),
    Case("empty batch", (0, 16, 4, 4), (16, 3, 3)),
]

WHOLE_TILE = Case("whole k-steps, ragged rows and columns", (1, 32, 9, 8), (40, 3, 3), padding=(1, 1, 1, 1))
POSITIVE = Case("a long sum", (1, 32, 6, 6), (32, 3, 3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small convolution with at least one output."""
    axis = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    x = (draw(st.integers(1, 2)), groups * draw(st.integers(1, 17)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    filters = (groups * draw(st.integers(1, 17)), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    case = Case("drawn", x, filters, draw(axis), padding, draw(axis), groups)
    assume(min(case.y) > 0)
    return case


# Axes from the one with the largest stride to the one with the least.
LAYOUTS = {"nchw": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "transposed": (0, 1, 3, 2), "batch_last": (2, 1, 3, 0)}


def arrange(t: torch.Tensor, layout: str = "channels_last") -> torch.Tensor:
    """A copy of `t` in that layout, cut out of a larger tensor of NaN. "expanded" repeats the first item of the batch
    without a copy; "packed" is channels_last without a gap, between NaN.
    """
    if layout == "expanded":
        return arrange(t[:1]).expand_as(t)
    if layout == "packed":
        return dense_output(tuple(t.shape), t.dtype, t.device).copy_(t)
    order = LAYOUTS[layout]
    return embed(t.permute(order).contiguous()).permute([order.index(i) for i in range(4)])


def draw(case: Case, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """x, w and dy of small integers, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((case.x, 2), (case.w, 1), (case.y, 1))
    return [torch.randint(-most, most + 1, shape, generator=generator).to(device, dtype) for shape, most in sizes]


def operands(
    case: Case, dtype: torch.dtype, device: torch.device, layout: str = "channels_last"
) -> tuple[torch.Tensor, ...]:
    """x, w and dy as hypothesis drew them, cut out of memory that is full of NaN."""
    x, w, dy = draw(case, dtype, device)
    return arrange(x, layout), arrange(w, "channels_last" if layout == "expanded" else layout), arrange(dy, layout)


def positive_operands(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x, w and dy, in float32, from [0.5, 1)."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (
        arrange(torch.rand(shape, generator=generator).to(device) / 2 + 0.5) for shape in (case.x, case.w, case.y)
    )
    return x, w, dy


def output(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "channels_last"
) -> torch.Tensor:
    return arrange(poison(torch.empty(shape, dtype=dtype, device=device)), layout)


def dense_output(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "channels_last"
) -> torch.Tensor:
    """For kernels that write dense tensors: channels_last beside operands that are, contiguous beside all others."""
    last = layout in ("channels_last", "expanded")
    dense = torch.empty(shape, device="meta", memory_format=torch.channels_last if last else torch.contiguous_format)
    around = 16  # elements on either side: what is written there shows
    whole = poison(torch.empty(dense.numel() + 2 * around, dtype=dtype, device=device))
    return whole.as_strided(shape, dense.stride(), around)


def reference(
    case: Case, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, dx, dw) in float64."""
    x, w = x.double().contiguous().requires_grad_(), w.double().contiguous().requires_grad_()
    top, bottom, left, right = case.padding
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), w, None, case.stride, 0, case.dilation, case.groups)
    dx, dw = torch.autograd.grad(y, (x, w), dy.double().contiguous())
    return y.detach(), dx, dw


def with_special_values(w: torch.Tensor, dy: torch.Tensor | None = None) -> None:
    """Puts infinities of both signs and NaN into weights [K, C, R, S], at the corners of the window; and into dy [N, K,
    P, Q], if given.
    """
    K, C, R, S = w.shape
    w[0, 0, 0, 0] = float("inf")
    w[K // 2, 0, R - 1, S - 1] = -float("inf")
    w[K - 1, C // 2, R - 1, 0] = float("nan")
    w[K // 2, C - 1, 0, S - 1] = -float("inf")
    if dy is not None:
        dy[0, 0, 0, 0] = float("nan")
        dy[-1, -1, -1, -1] = float("inf")


def input_gradient(case: Case, w: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """dx in float64 by its definition: dy[n, k, p, q] * w[k, c, r, s] is added where that tap lies, and multiplied
    nowhere else.
    """
    N, C, H, W = case.x
    top, bottom, left, right = case.padding
    dx = torch.zeros(N, C, H + top + bottom, W + left + right, dtype=torch.float64)
    dy, w = (t.double().cpu().unflatten(axis, (case.groups, -1)) for t, axis in ((dy, 1), (w, 0)))
    P, Q = dy.shape[-2:]
    for r in range(w.shape[-2]):
        for s in range(w.shape[-1]):
            # of [N, groups, K, C, P, Q]
            products = (dy[:, :, :, None] * w[None, ..., r, s, None, None]).sum(2).flatten(1, 2)
            h, q = r * case.dilation[0], s * case.dilation[1]
            dx[
                :,
                :,
                h : h + (P - 1) * case.stride[0] + 1 : case.stride[0],
                q : q + (Q - 1) * case.stride[1] + 1 : case.stride[1],
            ] += products
    return dx[:, :, top : top + H, left : left + W]


def assert_exact(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Bit equality with `exact` (float64), and not a byte written around `ours`, which is from output()
    or dense_output().
    """
    rounded = exact.to(ours.dtype)
    assert torch.equal(rounded.double().nan_to_num(nan=0.0), exact.nan_to_num(nan=0.0)), (
        "the test asks for numbers that the dtype cannot hold"
    )
    torch.testing.assert_close(ours, rounded, rtol=0, atol=0, equal_nan=True)
    assert ours._base is not None
    assert int(ours._base.isnan().sum()) == ours._base.numel() - ours.numel() + int(exact.isnan().sum())


def assert_rounded_not_truncated(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """For positive_operands: the errors of rounding to tf32 have both signs and cancel, those of truncation do not."""
    error = ours.double() / exact - 1
    assert error.abs().max() > 2**-17, "operands were not rounded at all"
    assert error.mean().abs() < 2**-14
    assert error.abs().max() < 2**-11
