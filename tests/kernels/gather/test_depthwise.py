"""gather/depthwise against PyTorch in float64: the three kernels, their tiles and moments, and that conv.py chooses
them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import cnnfast.functional as F
from cnnfast_kernels import memory
from cnnfast_kernels.conv import Geometry, conv_dgrad, conv_fprop, conv_stats, conv_wgrad
from cnnfast_kernels.dtypes import accumulator_dtype
from cnnfast_kernels.epilogue import BatchNorm, Epilogue
from cnnfast_kernels.gather.depthwise.dgrad import depthwise_dgrad
from cnnfast_kernels.gather.depthwise.filters import vector_length
from cnnfast_kernels.gather.depthwise.fprop import depthwise_fprop, moments_rows, plan_depthwise_fprop
from cnnfast_kernels.gather.depthwise.tiles import (
    CACHED_BYTES,
    STRIP_ROWS,
    StripTile,
    choose_strip_tile,
    strip_rows,
    strip_tiles,
    taps_at_once,
)
from cnnfast_kernels.gather.depthwise.wgrad import depthwise_wgrad
from cnnfast_kernels.moments import combine
from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.tiling import ELEMENT_BYTES, VECTOR_BYTES, cdiv
from tests.support.convolutions import (
    DTYPES,
    LAYOUTS,
    OTHER_DTYPES,
    SEEDED,
    Case,
    arrange,
    assert_exact,
    dense_output,
    input_gradient,
    operands,
    output,
    positive_operands,
    reference,
    with_special_values,
)

OPERATIONS = ("fprop", "dgrad", "wgrad")


def vectors(precision: str) -> list[int]:
    return [v for v in (1, 2, 4, 8) if v * ELEMENT_BYTES[precision] <= VECTOR_BYTES]


def widest(precision: str) -> int:
    return vectors(precision)[-1]


def depthwise(
    reason: str, x: tuple[int, int, int, int], window: tuple[int, int], *geometry, multiplier: int = 1
) -> Case:
    """`geometry`: stride, padding and dilation, as far as they are not the usual ones."""
    return Case(reason, x, (x[1] * multiplier, *window), *geometry, groups=x[1])


def run(
    operation: str, case: Case, tile: StripTile, tensors: tuple[torch.Tensor, ...], layout: str = "channels_last"
) -> torch.Tensor:
    """The result of one kernel, in memory full of NaN. `tensors`: x, w, dy."""
    x, w, dy = tensors
    shape = {"fprop": case.y, "dgrad": case.x, "wgrad": case.w}[operation]
    make = dense_output if operation == "fprop" else output
    result = make(shape, x.dtype, x.device, layout)
    match operation:
        case "fprop":
            depthwise_fprop(case.problem, tile, x, w, result)
        case "dgrad":
            depthwise_dgrad(case.problem, tile, dy, w, result)
        case "wgrad":
            depthwise_wgrad(case.problem, tile, x, dy, result)
    return result


def check(operation, case, device, tile=None, dtype=torch.float32, precision="ieee", layout="channels_last"):
    """Bit equality; the tile is the one that conv.py would choose for aligned tensors, unless given."""
    tensors = operands(case, dtype, device, layout)
    tile = tile or choose_strip_tile(
        case.problem, operation, precision, widest(precision) if layout == "channels_last" else 0
    )
    result = run(operation, case, tile, tensors, "channels_last" if layout == "expanded" else layout)
    assert_exact(result, reference(case, *tensors)[OPERATIONS.index(operation)])


PLAIN = depthwise("3x3", (2, 3, 6, 5), (3, 3), (1, 1), (1, 1, 1, 1))
STRIDED = depthwise("3x3, stride 2, odd image", (1, 5, 9, 7), (3, 3), (2, 2), (1, 1, 1, 1))
DOUBLE = depthwise("3x3, two filters a channel", (1, 3, 5, 6), (3, 3), (1, 1), (1, 1, 1, 1), multiplier=2)
TALL = depthwise(
    "more rows of taps than registers hold, by parts: 7 and 2", (1, 2, 11, 4), (9, 2), (1, 1), (4, 4, 0, 1)
)
TILED = depthwise("several tiles of strips", (5, 3, 8, 9), (3, 3), (1, 1), (1, 1, 1, 1))

CASES = [
    PLAIN,
    STRIDED,
    DOUBLE,
    TALL,
    TILED,
    depthwise("one channel", (2, 1, 5, 4), (3, 3), (1, 1), (1, 1, 1, 1)),
    depthwise("17 channels: a tile and one more", (1, 17, 4, 5), (3, 3), (1, 1), (1, 1, 1, 1)),
    depthwise("40 channels: a tile and a part of one", (1, 40, 4, 4), (3, 3), (1, 1), (1, 1, 1, 1)),
    depthwise("100 channels", (1, 100, 2, 3), (3, 3), (1, 1), (1, 1, 1, 1)),
    depthwise("5x5, by columns", (1, 4, 8, 7), (5, 5), (1, 1), (2, 2, 2, 2)),
    depthwise("5x5, stride 2", (1, 4, 9, 8), (5, 5), (2, 2), (2, 2, 2, 2)),
    depthwise("7x7", (1, 4, 8, 9), (7, 7), (1, 1), (3, 3, 3, 3)),
    depthwise("7x7, stride 2", (1, 3, 11, 8), (7, 7), (2, 2), (3, 3, 3, 3)),
    depthwise("parts of a column that strides divide: 6 and 5", (1, 2, 12, 4), (11, 2), (2, 2), (5, 5, 0, 1)),
    depthwise("a stride beyond the taps held at once", (1, 2, 18, 3), (9, 2), (8, 1), (4, 4, 0, 1)),
    depthwise("a row of taps", (1, 3, 4, 12), (1, 9), (1, 1), (0, 0, 4, 4)),
    depthwise("a column of taps", (1, 3, 12, 4), (7, 1), (1, 1), (3, 3, 0, 0)),
    depthwise("1x1", (1, 5, 3, 4), (1, 1)),
    depthwise("1x1, stride 2: three of four inputs unseen", (1, 5, 4, 5), (1, 1), (2, 2)),
    depthwise("stride 3, two filters a channel", (1, 3, 10, 8), (3, 3), (3, 3), (1, 1, 1, 1), multiplier=2),
    depthwise("strides differ, three filters a channel", (1, 2, 9, 7), (3, 2), (3, 2), (1, 0, 0, 1), multiplier=3),
    depthwise("stride larger than the kernel: inputs that no output sees", (1, 3, 7, 8), (2, 2), (3, 3)),
    depthwise("the last rows and columns fill no window", (1, 3, 8, 8), (3, 3), (3, 3)),
    depthwise("dilation", (1, 4, 9, 8), (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    depthwise("a dilation that no other tap of a strip shares", (1, 2, 12, 6), (3, 3), (1, 1), (9, 9, 3, 3), (9, 3)),
    depthwise("stride and dilation equal: odd inputs unseen", (1, 3, 9, 8), (3, 3), (2, 2), (2, 2, 2, 2), (2, 2)),
    depthwise("stride and dilation share a factor", (1, 3, 13, 11), (4, 3), (4, 2), (3, 3, 2, 2), (2, 4)),
    depthwise("stride and dilation without a common factor", (1, 3, 13, 11), (4, 3), (2, 3), (3, 3, 2, 2), (3, 2)),
    depthwise("even kernel, padded to the same size: more at one end", (1, 4, 5, 6), (2, 4), (1, 1), (0, 1, 1, 2)),
    depthwise("padding no multiple of the stride", (1, 3, 8, 7), (4, 4), (3, 3), (2, 1, 1, 2)),
    depthwise("padding wider than the kernel: outputs that see only zeros", (1, 3, 3, 3), (2, 2), (1, 1), (4, 3, 3, 4)),
    depthwise("kernel larger than the image", (1, 3, 2, 3), (5, 5), (1, 1), (2, 2, 2, 2)),
    depthwise("an image of one pixel", (3, 4, 1, 1), (3, 3), (1, 1), (1, 1, 1, 1)),
    depthwise("one row", (1, 3, 1, 9), (1, 3), (1, 1), (0, 0, 1, 1)),
    depthwise("one column", (1, 3, 9, 1), (3, 1), (1, 1), (1, 1, 0, 0)),
    depthwise("empty batch", (0, 3, 4, 4), (3, 3)),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_geometry(case, operation, device):
    check(operation, case, device)


@pytest.mark.parametrize("dy_too", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if min(case.y) > 0], ids=str)
def test_special_weights_reach_what_their_taps_reach(case, dy_too, device):
    x, w, dy = operands(case, torch.float32, device)
    with_special_values(w, dy if dy_too else None)
    tile = choose_strip_tile(case.problem, "dgrad", "ieee", widest("ieee"))
    assert_exact(run("dgrad", case, tile, (x, w, dy)), input_gradient(case, w, dy).to(device))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("case", [PLAIN, STRIDED, DOUBLE], ids=str)
def test_layout(case, layout, operation, device):
    check(operation, case, device, layout=layout)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("dtype", "precision"), OTHER_DTYPES)
@pytest.mark.parametrize("case", [PLAIN, STRIDED, DOUBLE], ids=str)
def test_dtype(case, dtype, precision, operation, device):
    check(operation, case, device, dtype=dtype, precision=precision)


NARROW = depthwise("few channels", (1, 12, 5, 4), (3, 3), (1, 1), (1, 1, 1, 1))
WIDE = depthwise("more channels than a tile has", (1, 40, 5, 4), (3, 3), (1, 1), (1, 1, 1, 1))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", [NARROW, WIDE], ids=str)
@pytest.mark.parametrize(("precision", "vector"), [(p, v) for p in ("half", "ieee", "fp64") for v in vectors(p)])
def test_every_block(precision, vector, case, operation, device):
    tile = strip_tiles(case.problem, operation, precision, vector)[0]
    check(operation, case, device, tile, DTYPES[precision], precision)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("vector", [0, 4])
@pytest.mark.parametrize("rows", STRIP_ROWS)
@pytest.mark.parametrize("case", [PLAIN, STRIDED], ids=str)
def test_every_number_of_rows(case, rows, vector, operation, device):
    """Whether or not they divide the image; in dgrad a multiple of the stride."""
    unit = case.problem.stride_h if operation == "dgrad" else 1
    tile = replace(strip_tiles(case.problem, operation, "ieee", vector)[0], ROWS=cdiv(rows, unit) * unit)
    check(operation, case, device, tile)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small depthwise convolution with at least one output."""
    axis = st.tuples(st.integers(1, 3), st.integers(1, 3))
    x = (draw(st.integers(1, 2)), draw(st.integers(1, 18)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    window, padding = (draw(st.integers(1, 9)), draw(st.integers(1, 4))), draw(st.tuples(*[st.integers(0, 3)] * 4))
    case = depthwise("drawn", x, window, draw(axis), padding, draw(axis), multiplier=draw(st.integers(1, 3)))
    assume(min(case.y) > 0)
    return case


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(SEEDED, max_examples=12)
@given(case=cases())
def test_any_geometry(operation, case, device):
    check(operation, case, device)


def test_mixed_layouts(device):
    """Each tensor brings its own strides, and weights are copied or read where they lie: filters adjacent, or apart."""
    x, w, dy = operands(STRIDED, torch.float32, device, "nchw")
    exact = reference(STRIDED, x, w, dy)
    adjacent = w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    served = ((1, w, True, "nchw"), (1, adjacent, False, "channels_last"), (0, w, False, "channels_last"))
    for vector, weights, copies, fmt in served:
        tile = choose_strip_tile(STRIDED.problem, "fprop", "ieee", vector)
        y = dense_output(STRIDED.y, torch.float32, device, fmt)
        assert plan_depthwise_fprop(STRIDED.problem, tile, x, weights, y).copies == copies
        depthwise_fprop(STRIDED.problem, tile, x, weights, y)
        assert_exact(y, exact[0])
        dx = output(STRIDED.x, torch.float32, device, "batch_last")
        depthwise_dgrad(STRIDED.problem, replace(tile, ROWS=4), arrange(dy, "channels_last"), weights, dx)
        assert_exact(dx, exact[1])
    dw = output(STRIDED.w, torch.float32, device, "transposed")
    depthwise_wgrad(STRIDED.problem, replace(tile, SPLIT_K=3), x, arrange(dy, "channels_last"), dw)
    assert_exact(dw, exact[2])


@pytest.mark.parametrize("layout", ["transposed", "batch_last"])
def test_a_result_that_is_not_dense_is_refused(layout, device):
    x, w, _ = operands(STRIDED, torch.float32, device)
    y = output(STRIDED.y, torch.float32, device, layout)
    with pytest.raises(ValueError, match=r"a result of shape \(1, 5, 5, 4\) must be dense, but has strides"):
        depthwise_fprop(STRIDED.problem, StripTile(16, 4, 2), x, w, y)


def test_vector_length():
    def image(channels: int, dtype: torch.dtype, fmt: torch.memory_format = torch.channels_last) -> torch.Tensor:
        return torch.empty(2, channels, 3, 3, device="meta", dtype=dtype, memory_format=fmt)

    assert [vector_length(image(C, torch.bfloat16)) for C in (96, 100, 58, 17)] == [8, 4, 2, 1]
    assert [vector_length(image(96, dtype)) for dtype in (torch.float32, torch.float64)] == [4, 2]
    assert vector_length(image(96, torch.float16), image(96, torch.float16)[:, :64]) == 8
    assert vector_length(image(96, torch.float16), image(100, torch.float16)[:, :96]) == 4
    assert vector_length(image(96, torch.float16), image(96, torch.float16, torch.contiguous_format)) == 0


# ----------------------------------------------------------------------------------------------------------------------
# What follows the sums, and what must not change them


@pytest.mark.parametrize("case", [DOUBLE, STRIDED, TILED], ids=str)
def test_epilogue(case, device):
    """act(batch_norm(conv + bias) + residual), and the mean and variance of what was stored."""
    x, w, dy = operands(case, torch.float32, device)
    g = case.problem
    bias, mean, weight, beta = (
        torch.arange(i, i + g.K, dtype=torch.float32, device=device) % (i + 2) - 1 for i in range(4)
    )
    norm = BatchNorm(mean, 4.0 ** (bias + 1), weight, beta, eps=0.0)  # standard deviations are powers of two: exact
    residual = arrange(dy, "nchw")
    tile = choose_strip_tile(g, "fprop", "ieee", 4)
    rows = moments_rows(g, tile)
    y = dense_output(case.y, torch.float32, device)
    moments = memory.empty((cdiv(rows.tiles, tile.BLOCK_M), 2, g.K), x)
    depthwise_fprop(g, tile, x, w, y, Epilogue(bias, norm, residual, "relu"), moments)

    column = [t.double()[:, None, None] for t in (bias, mean, norm.var, weight, beta)]
    exact = (reference(case, x, w, dy)[0] + column[0] - column[1]) / column[2].sqrt() * column[3] + column[4]
    exact = torch.relu(exact + residual.double())
    assert_exact(y, exact)
    found = combine(moments, rows)
    for ours, theirs in zip(found, (exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", STRIP_ROWS)
@pytest.mark.parametrize("P", [1, 3, 8])
def test_moments_are_of_the_pixels_of_their_tile(P, rows, device):
    """Strips that end with the image, and tiles that span images and end with the batch: each mean has a weight of its
    own.
    """
    case = depthwise("1x1", (3, 2, P, 5), (1, 1))
    x, w, _ = operands(case, torch.float64, device)
    x.add_(1000)
    tile = StripTile(4, 2, rows)
    layout = moments_rows(case.problem, tile)
    moments = memory.empty((cdiv(layout.tiles, tile.BLOCK_M), 2, 2), x)
    y = dense_output(case.y, torch.float64, device)
    depthwise_fprop(case.problem, tile, x, w.fill_(1), y, moments=moments)
    strips = cdiv(P, rows)
    ordered = [x[n, :, i * rows : (i + 1) * rows, q] for n in range(3) for i in range(strips) for q in range(5)]
    for t, found in enumerate(moments):
        pixels = torch.cat(ordered[t * 4 : t * 4 + 4], 1)
        expected = torch.stack([pixels.mean(1), pixels.var(1, correction=0)])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    mean, var = combine(moments, layout)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-14, atol=0)
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0), rtol=1e-12, atol=1e-12)


def test_bias_of_a_transposed_convolution(device):
    x, w, dy = operands(STRIDED, torch.float32, device)
    bias = torch.arange(STRIDED.problem.C, dtype=torch.float32, device=device)
    dx = output(STRIDED.x, torch.float32, device)
    depthwise_dgrad(STRIDED.problem, choose_strip_tile(STRIDED.problem, "dgrad", "ieee", 4), dy, w, dx, bias)
    assert_exact(dx, reference(STRIDED, x, w, dy)[1] + bias.double()[:, None, None])


@pytest.mark.parametrize(
    ("split", "dtype"),
    [(2, torch.float32), (2, torch.float16), (2, torch.bfloat16), (2, torch.float64), (70, torch.float16)],
)
def test_split(split, dtype, device, monkeypatch):
    """Parts without strips add nothing; partial sums are kept in the accumulator's dtype, and only the total is
    rounded.
    """
    made = []
    allocate = memory.empty
    monkeypatch.setattr(memory, "empty", lambda *args, **kwargs: made.append(allocate(*args, **kwargs)) or made[-1])
    precision = {torch.float32: "ieee", torch.float64: "fp64"}.get(dtype, "half")
    check("wgrad", PLAIN, device, StripTile(16, 4, 2, SPLIT_K=split), dtype, precision, "transposed")
    assert [(tuple(t.shape), t.dtype) for t in made] == [((split, 3, 3, 3), accumulator_dtype(dtype))]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_twice(operation, device):
    case = depthwise("a long sum", (2, 3, 20, 9), (3, 3), (1, 1), (1, 1, 1, 1))
    tensors = positive_operands(case, device)
    tile = replace(choose_strip_tile(case.problem, operation, "ieee", 4), SPLIT_K=3)
    first, second = (run(operation, case, tile, tensors) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", [PLAIN, STRIDED, TALL], ids=str)
@pytest.mark.parametrize("rows", STRIP_ROWS)
def test_nan_goes_where_it_must_and_nowhere_else(rows, case, device):
    """NaN in x reaches the outputs whose windows hold it, NaN in dy the inputs that it depends on; what no window holds
    reaches no dw.
    """
    x, w, dy = operands(case, torch.float32, device)
    tile = choose_strip_tile(case.problem, "fprop", "ieee", 4)
    broken = x.clone()
    broken[0, 1, 2, 2] = float("nan")
    y = run("fprop", case, replace(tile, ROWS=rows), (broken, w, dy))
    torch.testing.assert_close(y, reference(case, broken, w, dy)[0].float(), rtol=0, atol=0, equal_nan=True)
    broken = dy.clone()
    broken[0, 1, 1, 1] = float("nan")
    dx = run("dgrad", case, replace(tile, ROWS=rows * case.problem.stride_h), (x, w, broken))
    torch.testing.assert_close(dx, reference(case, x, w, broken)[1].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", STRIP_ROWS)
def test_what_lies_below_the_last_window_is_in_no_gradient(rows, device):
    """Strips run past the last row of dy, where windows would hold rows of x that no window holds, and rows that other
    taps meet.
    """
    case = depthwise("the last row fills no window", (1, 3, 8, 5), (3, 3), (2, 2), (0, 0, 1, 1))
    x, w, dy = operands(case, torch.float32, device)
    x[:, :, 7] = float("nan")
    x[:, :, 6] = float("inf")  # met by the taps of the last row alone
    dy.fill_(1)
    dw = run("wgrad", case, StripTile(16, 4, rows), (x, w, dy))
    assert dw[:, :, :2].isfinite().all()
    assert (dw[:, :, 2] == float("inf")).all()


def test_nothing_to_differentiate(device):
    """Without outputs the gradients are zero, and written."""
    case = depthwise("kernel larger than the padded image", (1, 3, 3, 2), (4, 2), (2, 1))
    assert case.problem.P == 0
    tensors = operands(case, torch.float32, device)
    for operation in ("dgrad", "wgrad"):
        result = run(operation, case, choose_strip_tile(case.problem, operation, "ieee", 4), tensors)
        assert_exact(result, torch.zeros(result.shape, dtype=torch.float64, device=device))


def test_a_strip_of_dgrad_starts_with_a_stride(device):
    x, w, dy = operands(STRIDED, torch.float32, device)
    with pytest.raises(ValueError, match=r"tile\.ROWS=7 must be a multiple of stride_h=2"):
        depthwise_dgrad(STRIDED.problem, StripTile(16, 4, 7), dy, w, x)


# ----------------------------------------------------------------------------------------------------------------------
# The choice


@st.composite
def layers(draw: st.DrawFn) -> ConvProblem:
    C, multiplier = draw(st.sampled_from([1, 3, 16, 32, 96, 960])), draw(st.sampled_from([1, 1, 2]))
    n, size, stride, dilation = (
        draw(st.integers(1, 256)),
        draw(st.integers(1, 224)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 4)),
    )
    window, pad = draw(st.sampled_from([1, 2, 3, 5, 7, 9, 31])), draw(st.integers(0, 15))
    assume(size + 2 * pad > dilation * (window - 1))
    return ConvProblem.of(
        (n, C, size, size), (C * multiplier, 1, window, window), (stride,) * 2, (pad,) * 4, (dilation,) * 2, C
    )


@given(layers(), st.sampled_from(OPERATIONS), st.sampled_from(["half", "tf32", "ieee", "fp64"]), st.data())
def test_the_tile_is_a_candidate(problem, operation, precision, data):
    vector = data.draw(st.sampled_from([0, *vectors(precision)]))
    tile = choose_strip_tile(problem, operation, precision, vector)
    assert replace(tile, SPLIT_K=1) in strip_tiles(
        problem, operation, precision, vector if problem.group_filters == 1 else min(vector, 1)
    )
    assert tile.BLOCK_M * tile.BLOCK_C == 32 * tile.num_warps * (max(vector, 1) if problem.group_filters == 1 else 1)
    if operation == "dgrad":
        assert tile.ROWS % problem.stride_h == 0
    if operation == "wgrad":
        assert 1 <= tile.SPLIT_K <= max(1, cdiv(problem.N * cdiv(problem.P, tile.ROWS) * problem.Q, tile.BLOCK_M))
    else:
        assert tile.SPLIT_K == 1


@given(st.integers(1, 60), st.integers(1, 12))
def test_taps_at_once(R, step):
    """Parts of a column start where dgrad's rows of dy are whole."""
    taps = taps_at_once(R, step)
    assert taps == R or taps % step == 0
    assert taps <= max(7, step)


# (image, channels, window, stride) of MobileNetV2 and ConvNeXt
REAL = [
    (112, 32, 3, 1),
    (112, 96, 3, 2),
    (56, 144, 3, 1),
    (28, 192, 3, 1),
    (14, 576, 3, 1),
    (14, 576, 3, 2),
    (7, 960, 3, 1),
]
REAL += [(56, 96, 7, 1), (28, 192, 7, 1), (14, 384, 7, 1), (7, 768, 7, 1)]


@pytest.mark.parametrize("layer", REAL, ids=str)
def test_real_layers_fill_a_gpu(layer):
    size, C, window, stride = layer
    pad = window // 2
    problem = ConvProblem.of((32, C, size, size), (C, 1, window, window), (stride,) * 2, (pad,) * 4, (1, 1), C)
    for operation in OPERATIONS:
        tile = choose_strip_tile(problem, operation, "half", 8)
        rows, columns = (problem.H, problem.W) if operation == "dgrad" else (problem.P, problem.Q)
        tiles = cdiv(problem.N * cdiv(rows, tile.ROWS) * columns, tile.BLOCK_M)
        programs = (tile.SPLIT_K if operation == "wgrad" else tiles) * cdiv(C, tile.BLOCK_C)
        assert programs >= 132


def test_columns_of_a_large_filter_find_their_pixels_in_the_cache():
    problem = ConvProblem.of((256, 96, 56, 56), (96, 1, 7, 7), (1, 1), (3, 3, 3, 3), (1, 1), 96)
    tile = choose_strip_tile(problem, "wgrad", "half", 8)
    tiles = cdiv(256 * cdiv(56, tile.ROWS) * 56, tile.BLOCK_M)
    pixels = cdiv(tiles, tile.SPLIT_K) * tile.BLOCK_M * tile.ROWS
    assert 2 * pixels * tile.BLOCK_C * 2 <= CACHED_BYTES  # of x and dy


def test_rows_of_a_strip():
    """The most that are not wasted and whose loads fit registers."""

    def rows(operation, size, window, stride=1, dilation=1):
        x, w, pad = (8, 64, size, size), (64, 1, window, window), window // 2 * dilation
        return strip_rows(ConvProblem.of(x, w, (stride,) * 2, (pad,) * 4, (dilation,) * 2, 64), operation)

    assert [rows("fprop", size, 3)[0] for size in (112, 56, 28, 14, 7)] == [7] * 5
    assert [rows("fprop", size, 7)[0] for size in (16, 8, 4, 2)] == [4, 4, 4, 2]
    assert [rows("dgrad", 112, 3, stride)[0] for stride in (1, 2, 3, 9)] == [7, 8, 9, 9]
    assert rows("wgrad", 56, 3) == (4, 2)  # the gradients of nine taps leave no room for more
    assert rows("wgrad", 56, 7)[0] == 7
    assert rows("fprop", 64, 31, 1, 4) == (2,)


def kernels(launches) -> list[str]:
    return [event.kernel for event in launches]


def test_convolution_chooses_the_family(device, launches):
    geometry = Geometry((1, 1), (1, 1, 1, 1), (1, 1), 3)
    x, w, dy = operands(PLAIN, torch.float32, device)
    exact = reference(PLAIN, x, w, dy)
    y = conv_fprop(x, w, geometry)
    stats = conv_stats(x, w, geometry)
    dx = conv_dgrad(dy, w, x.shape, geometry)
    dw = conv_wgrad(x, dy, w.shape, geometry)
    for found, expected in zip((y, stats[0], dx, dw), (exact[0], exact[0], exact[1], exact[2]), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0)
    torch.testing.assert_close(stats[1].double(), exact[0].mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats[2].double(), exact[0].var((0, 2, 3), correction=0), rtol=1e-6, atol=1e-6)
    assert kernels(launches) == [
        "depthwise_fprop_kernel",
        "depthwise_fprop_kernel",
        "combine_kernel",
        "depthwise_dgrad_kernel",
        "depthwise_wgrad_kernel",
    ] + ["conv_wgrad_reduce_kernel"] * (kernels(launches).count("conv_wgrad_reduce_kernel"))
    assert all(isinstance(event.tile, StripTile) for event in launches if event.kernel.startswith("depthwise"))

    launches.clear()
    torch.testing.assert_close(conv_fprop(x, w, geometry, algorithm="im2col").double(), exact[0], rtol=0, atol=0)
    assert set(kernels(launches)) == {"im2col_kernel", "conv_fprop_kernel"}
    launches.clear()
    conv_fprop(x.new_zeros(1, 1, 4, 4), x.new_zeros(8, 1, 3, 3), Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1))
    assert kernels(launches) == ["conv_fprop_kernel"]  # one channel, one group: an ordinary convolution


@pytest.mark.parametrize(
    ("multiplier", "stride", "fmt"),
    [(1, 1, torch.contiguous_format), (2, 2, torch.channels_last)],
    ids=["NCHW", "NHWC"],
)
def test_gradients(multiplier, stride, fmt, device):
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(1, 2, 4, 3, generator=generator, dtype=torch.float64)
        .to(device)
        .contiguous(memory_format=fmt)
        .requires_grad_()
    )
    w = torch.randn(2 * multiplier, 1, 3, 2, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    b = torch.randn(2 * multiplier, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    assert gradcheck(lambda *inputs: F.conv2d(*inputs, stride=stride, padding=1, groups=2), (x, w, b), fast_mode=True)
