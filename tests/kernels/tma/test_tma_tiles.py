"""tma/tiles.py and tma/views.py: which boxes a convolution may get, what they are reckoned to cost, how tensors are
seen through them.
"""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnnfast_kernels.layout import Layout
from cnnfast_kernels.problem import ConvProblem, tap_pairs
from cnnfast_kernels.tiling import cdiv
from cnnfast_kernels.tma.tiles import (
    SHAPES_OF_SIZE,
    SIZES,
    BoxTile,
    box_count,
    box_grid,
    box_phases,
    candidate_boxes,
    possible_boxes,
)
from cnnfast_kernels.tma.views import Phases, flattened, is_mappable, map_column, map_filters, map_image, why_not

OPERATIONS = ("fprop", "dgrad", "wgrad")


@st.composite
def problems(draw):
    channels, filters = (8 * draw(st.sampled_from([1, 3, 8, 25, 64])) for _ in range(2))
    n, size, stride = draw(st.integers(1, 256)), draw(st.integers(1, 64)), draw(st.integers(1, 3))
    taps, dilation = draw(st.sampled_from([1, 2, 3, 7])), draw(st.integers(1, 2))
    pad = dilation * (taps // 2)
    size = max(size, taps)
    return ConvProblem.of(
        (n, channels, size, size), (filters, channels, taps, taps), (stride,) * 2, (pad,) * 4, (dilation,) * 2, 1
    )


@given(problems(), st.sampled_from(OPERATIONS))
def test_what_may_run_is_a_candidate_that_is_not_mostly_empty(problem, operation):
    candidates = list(candidate_boxes(problem, operation))
    stages = {size[:3]: size.num_stages for size in SIZES[operation]}
    rows, columns = box_grid(problem, operation)
    found = possible_boxes(problem, operation)
    for tile in found:
        most = max(stages.values())
        assert any(dataclasses.replace(tile, num_stages=n) in candidates for n in range(tile.num_stages, most + 1))
        assert 2 * problem.N * rows * columns >= box_count(problem, operation, tile) * tile.pixels
        assert tile.SPLIT_K == 1
    shapes = {(t.pixels, t.TILE_K, t.TILE_C, t.TILE_N, t.TILE_H, t.TILE_W) for t in found}
    sizes = collections.Counter(shape[:3] for shape in shapes)
    assert max(sizes.values(), default=0) <= SHAPES_OF_SIZE


@given(problems(), st.sampled_from(OPERATIONS))
def test_phases_hold_whole_images_and_blocks_of_channels(problem, operation):
    for tile in candidate_boxes(problem, operation):
        phases = box_phases(problem, operation, tile)
        assert phases is not None
        phase_h, phase_w = phases
        assert problem.H % phase_h == problem.W % phase_w == 0
        assert phase_h == (problem.stride_h if tile.TILE_H > 1 else 1)
        assert phase_w == (problem.stride_w if tile.TILE_W > 1 else 1)
        if operation != "wgrad" and phase_w > 1:
            assert problem.C % tile.TILE_C == 0


def test_blocks_are_what_copy_engine_and_matrix_unit_take():
    for operation, sizes in SIZES.items():
        assert len(sizes) <= 6
        for size in sizes:
            tile = BoxTile(size.pixels, 1, 1, size.filters, size.channels, size.num_warps, size.num_stages)
            rows, columns, depth = tile.gemm(operation)
            assert max(rows, columns, depth) <= 256  # elements of a box along an axis
            assert max(rows, columns) % 64 == 0
            # with room for the result on its way out
            assert 2 * (rows + columns) * depth * tile.num_stages <= 232448 - 65536


@given(
    outputs=st.integers(1, 20), inputs=st.integers(1, 20), taps=st.integers(1, 7),
    stride=st.integers(1, 4), pad=st.integers(0, 9), dilation=st.integers(1, 4),
)  # fmt: skip
def test_tap_pairs(outputs, inputs, taps, stride, pad, dilation):
    read = [p * stride - pad + r * dilation for p in range(outputs) for r in range(taps)]
    assert tap_pairs(outputs, inputs, taps, stride, pad, dilation) == sum(0 <= h < inputs for h in read)


def resnet_layer(batch, channels, size, filters, window, stride=1):
    pad = window // 2
    return ConvProblem.of(
        (batch, channels, size, size), (filters, channels, window, window), (stride,) * 2, (pad,) * 4, (1, 1), 1
    )


@pytest.mark.parametrize("operation", ["dgrad", "wgrad"])
def test_large_batches_may_take_single_pixels_and_skip_the_padding(operation):
    """At 7x7 with a 3x3 filter 18 % of all taps lie in the padding."""
    tiles = possible_boxes(resnet_layer(256, 512, 7, 512, 3), operation)
    sizes = {(tile.pixels, tile.TILE_K, tile.TILE_C) for tile in tiles}
    single = [tile for tile in tiles if (tile.TILE_H, tile.TILE_W) == (1, 1)]
    assert {(tile.pixels, tile.TILE_K, tile.TILE_C) for tile in single} == sizes


def test_at_eight_warps_no_box_of_a_forward_kernel_skips_taps():
    """ptxas of triton 3.6.0 would wait after every wgmma. A single tap without padding skips nothing."""
    for window in (1, 3):
        tiles = candidate_boxes(resnet_layer(256, 256, 14, 256, window), "fprop")
        wide = [tile for tile in tiles if tile.num_warps == 8]
        assert wide
        assert any(1 in (tile.TILE_H, tile.TILE_W) for tile in wide) == (window == 1)


def test_few_channels_take_half_a_block():
    assert all(tile.TILE_C == 32 for tile in candidate_boxes(resnet_layer(32, 24, 56, 64, 3), "fprop"))
    assert all(tile.TILE_K == 32 for tile in candidate_boxes(resnet_layer(32, 64, 56, 24, 3), "dgrad"))


def test_erf_and_sm_100_leave_out_the_largest_sums():
    layer = resnet_layer(32, 128, 28, 128, 3)
    assert max(t.pixels * t.TILE_K for t in candidate_boxes(layer, "fprop", "relu")) == 256 * 128
    assert max(t.pixels * t.TILE_K for t in candidate_boxes(layer, "fprop", "gelu")) == 128 * 64
    assert max(t.TILE_K * t.TILE_C for t in candidate_boxes(layer, "wgrad")) == 256 * 128
    assert max(t.TILE_K * t.TILE_C for t in candidate_boxes(layer, "wgrad", arch=100)) == 128 * 64
    one_tap = resnet_layer(32, 1024, 14, 256, 1)
    assert max(t.pixels * t.TILE_K for t in candidate_boxes(one_tap, "fprop", "gelu")) == 128 * 64
    warps = {
        arch: {t.num_warps for t in candidate_boxes(one_tap, "fprop", arch=arch) if t.TILE_W == 256}
        for arch in (90, 100)
    }
    assert warps == {90: {4, 8}, 100: {4}}


def test_a_tile_prints_what_a_table_needs():
    assert str(BoxTile(2, 8, 8, 128, 64, 4, 3)) == "2x8x8 pixels k128 c64 w4 s3"
    assert str(BoxTile(64, 1, 1, 128, 64, 4, 3, 8)) == "64x1x1 pixels k128 c64 w4 s3 split 8"


# ----------------------------------------------------------------------------------------------------------------------
# Views


def channels_last(*shape, dtype=torch.float16):
    return (
        torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
        .view(shape)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
    )


def elements(map_, t):
    """The elements of `t` in the order of the map's axes."""
    return torch.as_strided(t, map_.shape, map_.strides)


def test_images_columns_and_filters():
    t = channels_last(3, 8, 4, 6)
    assert torch.equal(elements(map_image(t, (1, 2, 2), 8), t), t.permute(0, 2, 3, 1))
    assert torch.equal(elements(map_column(t, (2, 1, 1), 8), t), t.permute(2, 3, 0, 1))
    assert torch.equal(elements(map_filters(t, 2, 8), t), t.permute(2, 3, 0, 1))
    assert map_image(t, (1, 2, 2), 8).block_shape == [1, 2, 2, 8]
    assert map_column(t, (2, 1, 1), 8).block_shape == [1, 1, 2, 8]
    assert map_filters(t, 2, 8).block_shape == [1, 1, 2, 8]


@pytest.mark.parametrize("gap", [0, 8])
def test_phases(gap):
    """Row h is row h // 2 of phase h % 2; the columns of the last axis are phases, each with its channels."""
    t = channels_last(3, 8 + gap, 4, 6)[:, :8]
    seen = elements(map_image(t, (1, 2, 2), 8, Phases(2, 3, 8 + gap)), t)
    assert seen.shape == (3, 2, 2, 2, 2 * (8 + gap) + 8)
    for h in range(4):
        for w in range(6):
            column = w % 3 * (8 + gap)
            assert torch.equal(seen[:, h // 2, h % 2, w // 3, column : column + 8], t[:, :, h, w])


def test_an_axis_of_one_pixel_may_have_any_stride():
    for t in (
        torch.empty(4, 16, 1, 1),
        torch.empty(4, 1, 1, 16).permute(0, 3, 1, 2),
        torch.empty_strided((1, 16, 1, 1), (3, 1, 5, 7)),
    ):
        assert is_mappable(t.half())


@pytest.mark.parametrize(
    "t",
    [
        torch.empty(2, 16, 4, 4),
        channels_last(2, 12, 4, 4),
        channels_last(2, 20, 4, 4)[:, :16],
        channels_last(2, 32, 4, 4)[:, ::2],
        channels_last(1, 16, 4, 4).expand(2, 16, 4, 4),
        channels_last(2, 16, 4, 4).transpose(2, 3),
    ],
    ids=["NCHW", "12 channels", "gaps of 8 bytes", "every other channel", "one image twice", "columns of rows"],
)
def test_what_no_map_can_see(t):
    assert not is_mappable(t.half())


def test_a_plain_gemm_is_one_row():
    x, y = channels_last(3, 16, 4, 6), channels_last(3, 32, 4, 6)
    problem = ConvProblem.of(tuple(x.shape), (32, 16, 1, 1), (1, 1), (0,) * 4, (1, 1), 1)
    flat, (x_row, y_row) = flattened(problem, x, y)
    assert (flat.N, flat.H, flat.W, flat.P, flat.Q) == (1, 1, 72, 1, 72)
    assert torch.equal(elements(map_image(x_row, (1, 1, 8), 16), x)[0, 0], x.permute(0, 2, 3, 1).reshape(72, 16))
    assert y_row == Layout((1, 32, 1, 72), (72 * 32, 1, 72 * 32, 32), torch.float16)


def test_what_is_no_plain_gemm_stays():
    x, y = channels_last(3, 16, 4, 6), channels_last(3, 32, 4, 6)
    plain = ConvProblem.of(tuple(x.shape), (32, 16, 1, 1), (1, 1), (0,) * 4, (1, 1), 1)
    for change in ({"stride_h": 2, "P": 2}, {"pad_w": 1, "Q": 8}, {"R": 3, "P": 2}):
        problem = dataclasses.replace(plain, **change)
        assert flattened(problem, x, y) == (problem, (x, y))
    wide = channels_last(3, 16, 4, 7)[..., :6]
    assert flattened(plain, wide, y)[0] == plain
    gaps = channels_last(3, 32, 4, 6)[:, :16]  # gaps between pixels do no harm
    assert flattened(plain, gaps, y)[0].W == 72


def test_reasons():
    x, w = channels_last(2, 16, 8, 8), channels_last(16, 16, 3, 3)
    problem = resnet_layer(2, 16, 8, 16, 3)
    assert why_not(problem, "half", 90, True, x, w) == ""
    for arguments, reason in (
        ((problem, "half", 89, True), "sm_89 has no tensor maps"),
        ((problem, "half", 120, True), "sm_120 has too little shared memory"),
        ((problem, "tf32", 90, True), "not in half precision"),
        ((dataclasses.replace(problem, groups=2), "half", 90, True), "there are groups"),
        ((dataclasses.replace(problem, N=0), "half", 90, True), "a tensor is empty"),
        ((problem, "half", 90, False), "does not start at a multiple of 16 bytes"),
    ):
        assert reason in why_not(*arguments, x, w)
    assert "not channels_last" in why_not(problem, "half", 90, True, x, torch.empty(16, 16, 3, 3))


def test_boxes_cover_the_grid():
    problem = resnet_layer(3, 64, 14, 64, 3)
    tile = BoxTile(2, 4, 8, 64, 64)
    assert box_count(problem, "fprop", tile) == 2 * cdiv(14, 4) * cdiv(14, 8)
