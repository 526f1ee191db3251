"""choosing.py: which tile runs where nothing was measured, by the model of costs, and what measuring tries first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnfast_kernels import choosing, devices
from cnnfast_kernels.choosing_costs import cost_of
from cnnfast_kernels.gpus import named
from cnnfast_kernels.layout import dense
from cnnfast_kernels.questions import Geometry, Question, dgrad_question, fprop_question, wgrad_question
from cnnfast_kernels.resource_keys import resource_key
from cnnfast_kernels.resources import resources_of
from cnnfast_kernels.tiling import SQUARE_TILE, TileConfig, default_split, steps_of_loop
from cnnfast_kernels.tma.tiles import BoxTile, box_count, box_phases

LAST = torch.channels_last
OPERATIONS = ("fprop", "dgrad", "wgrad")


def on(name: str) -> devices.Gpu:
    gpu = named(name)
    return devices.Gpu(gpu.cuda, gpu.arch)


def question(
    operation: str, gpu: str, batch: int, channels: int, size: int, filters: int, taps: int = 1, stride: int = 1, **how
) -> Question:
    pad = taps // 2
    geometry, out = Geometry((stride, stride), (pad,) * 4, (1, 1), 1), (size + 2 * pad - taps) // stride + 1
    shapes = (batch, channels, size, size), (filters, channels, taps, taps), (batch, filters, out, out)
    x, w, y = (dense(shape, torch.bfloat16, LAST) for shape in shapes)
    if operation == "fprop":
        residual = y.stride() if how.pop("residual", False) else None
        return fprop_question(x, w, geometry, on(gpu), residual_strides=residual, **how)
    if operation == "dgrad":
        return dgrad_question(y, w, x.shape, LAST, geometry, on(gpu))
    return wgrad_question(x, y, w.shape, LAST, geometry, on(gpu))


@st.composite
def questions(draw) -> Question:
    return question(
        draw(st.sampled_from(OPERATIONS)),
        draw(st.sampled_from(["h200", "a100", "l40s", "b200", "rtx-3090"])),
        draw(st.integers(1, 256)),
        draw(st.sampled_from([3, 8, 24, 64, 200, 512])),
        draw(st.integers(7, 64)),
        draw(st.sampled_from([8, 24, 64, 200, 512])),
        draw(st.sampled_from([1, 2, 3, 7])),
        draw(st.integers(1, 3)),
    )


@settings(max_examples=60, deadline=None)
@given(questions())
def test_the_default_costs_least_of_all_that_may_run(q):
    gpu = choosing.stand_in(*q.gpu)
    tile, found = choosing.default_tile(q), choosing.possible(q, gpu)
    assert tile in found
    assert cost_of(q, tile, gpu).seconds == min(cost_of(q, other, gpu).seconds for other in found)
    for other in found:
        assert isinstance(other, TileConfig) or not q.why_no_boxes
        assert other.SPLIT_K == 1 or q.operation == "wgrad"
        if isinstance(other, BoxTile):
            assert box_phases(q.boxed, q.operation, other) is not None
            assert other.SPLIT_K <= box_count(q.boxed, q.operation, other)
        elif type(other) is TileConfig:
            assert other.num_stages >= min(2, steps_of_loop(q.problem, q.operation, other))


@settings(max_examples=40, deadline=None)
@given(questions())
def test_nothing_that_may_run_is_on_record_as_spilling(q):
    for tile in choosing.possible(q, choosing.stand_in(*q.gpu)):
        row = resources_of(resource_key(q, tile))
        assert not (row.exact and row.spill_bytes), tile


@pytest.mark.parametrize("operation", OPERATIONS)
def test_before_sm_90_large_layers_take_the_square_tile(operation):
    """Of as many filters and channels as it is wide, where a k-step stays within a tap."""

    def tile(channels: int = 256, filters: int = 256, taps: int = 3, gpu: str = "a100", **how):
        return replace(
            choosing.default_tile(question(operation, gpu, 256, channels, 14, filters, taps, **how)), SPLIT_K=1
        )

    assert tile() == tile(channels=512, filters=512, taps=1) == SQUARE_TILE
    assert tile(filters=64, channels=64) != SQUARE_TILE
    assert tile(channels=200, filters=200) != SQUARE_TILE
    assert tile(gpu="h200") != SQUARE_TILE


def test_an_epilogue_that_takes_many_registers_leaves_none_for_the_square_tile():
    def tile(**how):
        return choosing.default_tile(question("fprop", "a100", 256, 256, 14, 256, **how))

    assert tile(statistics="stats") == tile(activation="relu") == tile() == SQUARE_TILE
    assert tile(statistics="norm", residual=True) != SQUARE_TILE
    assert tile(residual=True, activation="relu") != SQUARE_TILE  # on record is the heaviest of such epilogues
    assert tile(activation="gelu") != SQUARE_TILE


def test_a_short_loop_takes_no_stages_that_keep_programs_away():
    """A single k-step of 64 channels needs one stage: three programs then live on a multiprocessor in place of one."""
    q = question("fprop", "h200", 256, 64, 56, 64)
    tile = choosing.default_tile(q)
    assert isinstance(tile, BoxTile)
    assert tile.num_stages == 1
    gpu = named("h200")
    assert cost_of(q, tile, gpu).residents >= 3
    assert cost_of(q, replace(tile, num_stages=4), gpu).residents == 1
    assert choosing.default_tile(question("fprop", "a100", 256, 64, 56, 64)).num_stages == 2
    assert choosing.default_tile(question("wgrad", "a100", 256, 64, 56, 64)).num_stages == 4, "for any image"


def test_what_a_rule_chose_before_is_compared():
    """All stages of the tile, and sums cut as the rule of a family cuts them; so nothing costs more by the model."""
    short = question("fprop", "a100", 1, 64, 56, 64)
    assert choosing.default_tile(short).num_stages == 4, "no program is kept away"
    for q in (question("wgrad", "h200", 32, 128, 28, 512), question("wgrad", "a100", 8, 128, 56, 128, 3, 2)):
        found = choosing.possible(q, choosing.stand_in(*q.gpu))
        for tile in {replace(tile, SPLIT_K=1) for tile in found}:
            splits = {other.SPLIT_K for other in found if replace(other, SPLIT_K=1) == tile}
            boxes = isinstance(tile, BoxTile)
            usual = {1, 2, 4} if boxes else {default_split(q.problem, tile)}
            assert usual <= splits


@pytest.mark.parametrize("operation", OPERATIONS)
def test_large_layers_take_boxes_of_eight_warps_by_tensor_maps(operation):
    tile = choosing.default_tile(question(operation, "h200", 256, 256, 14, 256, 3))
    assert isinstance(tile, BoxTile)
    assert tile.num_warps == 8
    assert sorted(tile.gemm(operation)[:2]) == [128, 256]


def test_a_single_image_takes_boxes_of_its_rows():
    tile = choosing.default_tile(question("fprop", "h200", 1, 64, 56, 64, 3))
    assert isinstance(tile, BoxTile)
    assert tile.TILE_N == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_odd_image_is_strided_over_by_single_pixels_or_by_pointers(operation):
    small, large = (question(operation, "h200", batch, 64, 57, 64, 3, 2) for batch in (1, 256))
    assert all(type(tile) is TileConfig for tile in choosing.possible(small, named("h200")))
    tiles = [tile for tile in choosing.possible(large, named("h200")) if isinstance(tile, BoxTile)]
    assert tiles
    assert {(tile.TILE_H, tile.TILE_W) for tile in tiles} == {(1, 1)}


def test_a_sum_is_cut_so_that_programs_fill_the_gpu_some_times_over():
    """As many as live on a multiprocessor at once: more parts would only be written and read again."""
    for gpu in ("h200", "a100"):
        q = question("wgrad", gpu, 256, 256, 14, 256, 3)
        tile = choosing.default_tile(q)
        cost = cost_of(q, tile, named(gpu))
        assert tile.SPLIT_K > 1
        assert cost.waves <= max(choosing.WAVES)
        assert cost.tail < 0.5


def test_measuring_tries_first_what_the_model_takes_to_be_fastest():
    q = question("fprop", "h200", 256, 256, 14, 256, 3)
    found, gpu = choosing.candidates(q), named("h200")
    assert found[0] == choosing.default_tile(q)
    boxes = [tile for tile in found if isinstance(tile, BoxTile)]
    sizes = [(tile.pixels, tile.TILE_K, tile.TILE_C) for tile in boxes]
    first = {size: boxes[sizes.index(size)] for size in sizes}  # the best of each size
    seconds = [cost_of(q, tile, gpu).seconds for tile in first.values()]
    assert len(first) >= 4
    assert seconds == sorted(seconds)
