"""The choice of a tile: always one that exists, and a split of wgrad's reduction within its bounds."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnfast_kernels import tiling
from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.tiling import (
    DEFAULT_TILES,
    TileConfig,
    candidate_tiles,
    cdiv,
    choose_tile,
    gemm_extents,
    precision_class,
    register_limit,
)


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 1, 2, 32]))
    channels, filters = (groups * draw(st.sampled_from([1, 3, 16, 64, 512])) for _ in range(2))
    n, size, stride = draw(st.integers(1, 256)), draw(st.integers(7, 224)), draw(st.integers(1, 3))
    taps = draw(st.sampled_from([1, 3, 7]))
    x, w = (n, channels, size, size), (filters, channels // groups, taps, taps)
    return ConvProblem.of(x, w, (stride,) * 2, (taps // 2,) * 4, (1, 1), groups)


@given(problems(), st.sampled_from(["fprop", "dgrad", "wgrad"]), st.sampled_from(list(DEFAULT_TILES)))
def test_the_tile_is_in_the_list(problem, operation, precision):
    tile = choose_tile(problem, operation, precision)
    assert dataclasses.replace(tile, SPLIT_K=1) in DEFAULT_TILES[precision]
    if operation == "wgrad":
        steps = cdiv(gemm_extents(problem, operation)[2], tile.BLOCK_K)
        assert 1 <= tile.SPLIT_K <= tiling.MAX_SPLIT
        assert tile.SPLIT_K == 1 or steps // tile.SPLIT_K >= tiling.MIN_STEPS_PER_SPLIT
    else:
        assert tile.SPLIT_K == 1


@given(problems())
def test_gemm_extents_agree_with_the_operations(problem):
    for operation in ("fprop", "wgrad"):
        GEMM_M, GEMM_N, GEMM_K = gemm_extents(problem, operation)
        assert 2 * GEMM_M * GEMM_N * GEMM_K * problem.groups == problem.flops
    assert gemm_extents(problem, "dgrad")[:2] == (problem.N * problem.H * problem.W, problem.group_channels)


@pytest.mark.parametrize(("dtype", "tf32", "expected"), [
    ("float16", False, "half"), ("bfloat16", True, "half"), ("float64", True, "fp64"),
    ("float32", False, "ieee"), ("float32", True, "tf32"),
])  # fmt: skip
def test_precision_class(dtype, tf32, expected):
    assert precision_class(dtype, tf32) == expected


def test_a_dtype_without_kernel_is_named():
    with pytest.raises(ValueError, match="dtype=int8 has no kernel: use float16"):
        precision_class("int8")


def test_tiles_suit_tensor_cores_and_small_gpus():
    bytes_of = {"half": 2, "tf32": 4, "ieee": 4, "fp64": 8}
    for precision, tiles in DEFAULT_TILES.items():
        assert len(set(tiles)) == len(tiles) <= 4
        assert list(tiles) == sorted(tiles, key=lambda t: -t.BLOCK_M * t.BLOCK_N)
        for t in tiles:
            assert all(block & (block - 1) == 0 and block >= 16 for block in (t.BLOCK_M, t.BLOCK_N, t.BLOCK_K))
            assert (t.BLOCK_M + t.BLOCK_N) * t.BLOCK_K * bytes_of[precision] * t.num_stages <= 99 * 1024


def test_a_tile_prints_what_a_table_needs():
    assert str(TileConfig(128, 64, 32, 4, 3)) == "128x64x32 w4 s3"
    assert str(TileConfig(128, 64, 32, 4, 3, 8)) == "128x64x32 w4 s3 split 8"


@pytest.mark.parametrize("precision", DEFAULT_TILES)
def test_registers_are_limited_where_the_compiler_would_spill(precision):
    """For the largest tile of dgrad in half precision, and for the smallest of fprop in float32 unless a k-step spans
    taps. A tile with twice as many sums gets all registers. In half precision for wgrad's largest tile of strided
    windows, and for the next where a block of columns spans taps; in float64 for its larger tile.
    """
    many, few = (ConvProblem(1, C, 8, 8, C, 3, 3, 8, 8, pad_h=1, pad_w=1) for C in (64, 8))
    largest, *_, smallest = DEFAULT_TILES[precision]
    assert register_limit(many, "dgrad", precision, largest) == (168 if precision == "half" else None)
    assert register_limit(many, "dgrad", precision, TileConfig(128, 128, 32, 4)) == 255
    assert register_limit(many, "fprop", precision, largest) is None
    assert register_limit(many, "fprop", precision, smallest) == (128 if precision == "ieee" else None)
    assert register_limit(few, "fprop", precision, smallest) is None
    assert (register_limit(many, "wgrad", precision, DEFAULT_TILES[precision][0]) == 128) == (precision == "fp64")
    assert register_limit(many, "wgrad", precision, smallest) is None
    half = precision == "half"
    strided, uneven = dataclasses.replace(many, stride_h=2, P=4), dataclasses.replace(many, C=48)
    shortcut = dataclasses.replace(strided, R=1, S=1)
    largest, square = TileConfig(128, 64, 32, 4, 4), TileConfig(64, 64, 32, 4, 4)
    assert register_limit(strided, "wgrad", precision, largest) == (168 if half else None)
    assert register_limit(uneven, "wgrad", precision, square) == (96 if half else None)
    narrow = dataclasses.replace(many, C=3)
    without = (
        (many, largest),
        (shortcut, largest),
        (uneven, largest),
        (many, square),
        (strided, square),
        (narrow, square),
    )
    for problem, tile in without:
        assert register_limit(problem, "wgrad", precision, tile) is None


def test_of_few_channels_a_weight_gradient_gets_the_smallest_tile_on_sm_100():
    """Larger ones spill there. Another GPU, another operation and many channels do not."""
    few, many = (ConvProblem(1, C, 8, 8, 64, 3, 3, 8, 8, pad_h=1, pad_w=1) for C in (3, 64))
    tiles = DEFAULT_TILES["half"]
    assert candidate_tiles(few, "wgrad", "half", arch=100) == tiles[-1:]
    others = candidate_tiles(few, "wgrad", "half", arch=90), candidate_tiles(few, "fprop", "half", arch=100)
    assert {*others, candidate_tiles(many, "wgrad", "half", arch=100)} == {tiles[1:]}
