"""What the model of costs says that kernels do is what they do in the interpreter: programs, products, and every byte
of every load and store.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cnnfast_kernels import launch
from cnnfast_kernels.choosing_costs import work_of
from cnnfast_kernels.conv import conv_dgrad, conv_fprop, conv_stats, conv_wgrad, dgrad_plan
from cnnfast_kernels.costs import TileWork
from cnnfast_kernels.epilogue import NO_NORM, PLAIN, BatchNorm, Epilogue
from cnnfast_kernels.gather import work as gathering
from cnnfast_kernels.gather.depthwise.tiles import StripTile
from cnnfast_kernels.keys import dgrad_key, fprop_key, wgrad_key
from cnnfast_kernels.moments import TileRows, plan_combine
from cnnfast_kernels.questions import Geometry, Question, Tile
from cnnfast_kernels.second_product import SecondProduct
from cnnfast_kernels.tiling import Operation, TileConfig, cdiv
from cnnfast_kernels.tma.tiles import BoxTile, box_steps, candidate_boxes
from cnnfast_kernels.traffic import COMBINED, levels
from tests.support.convolutions import CASES, FLAT, GROUPED, SMALL, STRIDED, TILED, Case
from tests.support.counted_bytes import Counted, counted_bytes

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="GPU ring: bytes are counted in the interpreter")

OPERATIONS: tuple[Operation, ...] = ("fprop", "dgrad", "wgrad")
LAST = torch.channels_last
MAIN = ("conv", "tma", "depthwise")
# Whole and ragged blocks, several tiles, classes, taps that miss, k-steps that span taps, groups.
POINTERS = [
    *(TILED, STRIDED, FLAT, GROUPED),
    Case("stride 2, few filters", (1, 8, 7, 5), (5, 3, 3), (2, 2), (1, 1, 1, 1)),
    *(case for case in CASES if case.reason in ("strides differ", "stride and dilation share a factor")),
]
TENSOR_MAPS = [
    Case("no extent a multiple of a box's", (3, 24, 5, 9), (72, 3, 2), padding=(1, 1, 1, 0)),
    Case("stride 2, whole phases, channels that no block divides", (2, 40, 4, 6), (24, 3, 3), (2, 2), (1, 1, 1, 1)),
    Case("stride 2, whole phases", (2, 64, 4, 6), (24, 2, 2), (2, 2), (1, 1, 1, 1)),
    Case("stride 2, odd image", (3, 24, 5, 3), (16, 3, 3), (2, 2), (1, 1, 1, 1)),
    Case("1x1: a plain GEMM", (2, 72, 7, 9), (136, 1, 1)),
    Case("1x1 stride 2", (2, 64, 4, 6), (24, 1, 1), (2, 2)),
    Case("stride and dilation share a factor", (1, 64, 8, 4), (16, 3, 2), (4, 2), (3, 3, 2, 2), (2, 4)),
    Case("padding wider than the kernel", (1, 8, 3, 3), (8, 2, 2), padding=(3, 2, 2, 3)),
]
MOST_PRODUCTS = 20  # of a test, which takes some milliseconds for each


def tensor(shape, dtype=torch.float16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype).contiguous(memory_format=LAST)


def ran(
    operation: Operation, case: Case, tile: Tile, epilogue: Epilogue = PLAIN, stats: bool = False, dtype=torch.float16
) -> tuple[Question, dict[str, Counted]]:
    """The question that the call asks, and what its kernels did."""
    x, w, y = tensor(case.x, dtype), tensor(case.w, dtype), tensor(case.y, dtype)
    g = Geometry(case.stride, case.padding, case.dilation, case.groups)
    with counted_bytes() as counted:
        if operation == "fprop":
            key = fprop_key(x, w, g, epilogue, stats, False, tile)
            if stats:
                conv_stats(x, w, g, tile=tile)
            else:
                conv_fprop(x, w, g, epilogue, tile=tile)
        elif operation == "dgrad":
            key = dgrad_key(y, w, case.x, LAST, g, False, tile)
            conv_dgrad(y, w, case.x, g, fmt=LAST, tile=tile)
        else:
            key = wgrad_key(x, y, case.w, LAST, g, False, tile)
            conv_wgrad(x, y, case.w, g, fmt=LAST, tile=tile)
    return key.question, counted


def main_of(counted: dict[str, Counted]) -> Counted:
    (main,) = (c for name, c in counted.items() if name.startswith(MAIN) and "reduce" not in name)
    return main


def check(work: TileWork, counted: dict[str, Counted]) -> None:
    """The main launch, byte by byte."""
    main = main_of(counted)
    assert main.launches == 1
    assert work.programs == main.programs
    assert work.loaded + work.outside == main.loaded + main.stored
    assert sum(c.launches for c in counted.values()) == 1 + work.launches


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", POINTERS, ids=str)
def test_pointers(case, operation):
    tile = replace(SMALL, SPLIT_K=3) if operation == "wgrad" else SMALL
    q, counted = ran(operation, case, tile)
    work = work_of(q, tile)
    check(work, counted)
    main = main_of(counted)
    assert (work.loaded, work.outside, work.steps) == (main.loaded, main.stored, main.products)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_pointers_in_other_precisions(operation):
    for dtype in (torch.float32, torch.float64):
        q, counted = ran(operation, STRIDED, replace(SMALL, SPLIT_K=1), dtype=dtype)
        check(work_of(q, SMALL), counted)


@pytest.mark.parametrize(
    ("operation", "channels", "window", "precision", "adjacent", "stages"),
    [
        ("fprop", 64, 3, "half", True, 4),
        ("fprop", 3, 7, "half", True, 1),  # a k-step spans taps, and each element is loaded alone
        ("fprop", 4, 7, "half", True, 4),
        ("fprop", 3, 7, "ieee", True, 4),  # of 4 bytes
        ("fprop", 3, 1, "half", True, 4),
        ("fprop", 64, 3, "half", False, 1),
        ("fprop", 64, 3, "tf32", False, 4),
        ("dgrad", 3, 7, "half", True, 4),  # its k-steps go through filters
        ("wgrad", 3, 7, "half", True, 1),
        ("wgrad", 64, 3, "half", True, 4),
        ("wgrad", 48, 3, "half", True, 4),
    ],
)
def test_copies_of_less_than_four_bytes_wait_in_registers(operation, channels, window, precision, adjacent, stages):
    g = Case("", (1, channels, 9, 9), (64, window, window)).problem
    work = gathering.work(g, operation, precision, TileConfig(64, 64, 32, 4, 4), adjacent=adjacent)
    assert work.stages == stages
    assert (work.cached > 0) == (stages == 1)


def test_taps_of_a_row_meet_the_pixels_of_their_neighbours():
    """Of what is loaded element by element, of a stem's image 133 pixels for 448 times that they are met."""
    g = Case("", (1, 3, 64, 64), (64, 7, 7), (2, 2)).problem
    work = gathering.work(g, "fprop", "half", TileConfig(64, 64, 32, 4, 4))
    image = 29 * 29 * 147 * 2
    assert work.cached == image - cdiv(image // 2 * 133, 448) * 2
    wider = gathering.work(g, "wgrad", "half", TileConfig(64, 8, 32, 4, 4))  # three taps of a row
    assert wider.cached == image - cdiv(image // 2 * 65, 96) * 2


def boxes() -> list:
    """Each case with a box of one pixel's column, or else of one row, and one of several axes, as far as there are."""
    found = []
    for operation in OPERATIONS:
        for case in TENSOR_MAPS:
            tiles = {}
            for tile in candidate_boxes(case.problem, operation):
                if box_steps(case.problem, operation, tile) <= MOST_PRODUCTS:
                    tiles[min(tile.TILE_H, tile.TILE_W) > 1] = tile
            for tile in tiles.values():
                split = replace(tile, SPLIT_K=2) if operation == "wgrad" else tile
                found.append(pytest.param(operation, case, split, id=f"{operation} {case}, {tile}"))
    return found


@pytest.mark.parametrize(("operation", "case", "tile"), boxes())
def test_boxes(operation, case, tile):
    q, counted = ran(operation, case, tile)
    work = work_of(q, tile)
    check(work, counted)
    main = main_of(counted)
    assert (work.loaded, work.outside, work.steps) == (main.loaded, main.stored, main.products)


@pytest.mark.parametrize("tile", [BoxTile(1, 1, 64, 64, 64), BoxTile(1, 1, 128, 32, 128, 4, 3)], ids=str)
def test_a_gradient_that_begins_with_a_second_product(tile):
    case = Case("1x1: a plain GEMM", (2, 72, 7, 9), (136, 1, 1))
    x, w, y = tensor(case.x), tensor(case.w), tensor(case.y)
    second = SecondProduct(x, torch.ones(72, 72, 1, 1, dtype=x.dtype), *torch.ones(2, 72).unbind())
    g = Geometry(case.stride, case.padding, case.dilation, case.groups)
    plan = dgrad_plan(dgrad_key(y, w, case.x, LAST, g, False, tile, second=second))
    with counted_bytes() as counted:
        plan.run(y, w, None, second=second)
    work, main = work_of(plan.question, tile), main_of(counted)
    check(work, counted)
    vectors = work.programs // cdiv(72, tile.TILE_C) * 2 * 72 * 4  # scale and shift
    assert (work.loaded, work.outside, work.steps) == (main.loaded - vectors, main.stored + vectors, main.products)


@pytest.mark.parametrize("tile", [SMALL, BoxTile(1, 4, 8, 32, 32)], ids=str)
@pytest.mark.parametrize("epilogue", ["moments", "norm", "residual", "norm and residual"])
def test_what_follows_the_sums(epilogue, tile):
    case = Case("two tiles of pixels and of filters", (2, 16, 6, 8), (40, 1, 1))
    vector = torch.ones(40)
    norm = BatchNorm(vector, vector, vector, vector) if "norm" in epilogue else NO_NORM
    residual = tensor(case.y) if "residual" in epilogue else None
    q, counted = ran("fprop", case, tile, Epilogue(None, norm, residual), epilogue == "moments")
    work = work_of(q, tile)
    check(work, counted)
    plain = work_of(q._replace(statistics="", residual=None), tile)
    assert work.outside > plain.outside
    assert (work.loaded, work.steps, work.flops) == (plain.loaded, plain.steps, plain.flops)


STRIPS = [
    Case("3x3, ragged strips and channels", (2, 20, 9, 7), (20, 3, 3), padding=(1, 1, 1, 1), groups=20),
    Case("3x3 stride 2", (1, 16, 9, 8), (16, 3, 3), (2, 2), (1, 1, 1, 1), groups=16),
    Case("9x1: a column in parts", (1, 16, 10, 3), (16, 9, 1), padding=(3, 1, 0, 0), groups=16),
    Case("5x3 stride 2", (1, 16, 9, 9), (16, 5, 3), (2, 2), (2, 2, 1, 1), groups=16),
    Case("two filters a channel", (1, 16, 6, 6), (32, 3, 3), padding=(1, 1, 1, 1), groups=16),
    Case("dilation", (1, 16, 8, 8), (16, 3, 3), padding=(2, 2, 2, 2), dilation=(2, 2), groups=16),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", STRIPS, ids=str)
def test_strips(case, operation):
    """Of columns without gaps, since the interpreter loads the rows that the compiler drops."""
    tile = StripTile(16, 16, 2, SPLIT_K=2 if operation == "wgrad" else 1)
    q, counted = ran(operation, case, tile)
    work, main = work_of(q, tile), main_of(counted)
    check(work._replace(launches=work.launches - (operation != "wgrad")), counted)  # the copy of the filters is torch's
    assert (work.loaded, work.outside) == (main.loaded, main.stored)
    assert 0 < work.cached < work.loaded


@pytest.mark.parametrize("operation", ["fprop", "wgrad"])
def test_strips_leave_out_the_rows_that_no_pixel_meets(operation):
    case = Case("stride 3, one row of taps", (1, 16, 9, 6), (16, 1, 2), (3, 1), groups=16)
    q, counted = ran(operation, case, StripTile(16, 16, 3))
    pixels = 3 * 5 * 2 * 16 * 2  # three rows of the image, in which two taps meet five pixels each
    beside = 3 * 5 * 16 * 2 if operation == "wgrad" else 16 * 16 * 2 * 2
    assert work_of(q, StripTile(16, 16, 3)).loaded == pixels + beside < main_of(counted).loaded


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("tile", [SMALL, BoxTile(8, 2, 4, 64, 64), StripTile(16, 16, 2)], ids=str)
def test_slots_are_read_once_and_their_sum_written(tile, split):
    groups = 16 if isinstance(tile, StripTile) else 1
    case = Case("", (2, 16, 6, 8), (16, 3, 3), padding=(1, 1, 1, 1), groups=groups)
    q, counted = ran("wgrad", case, replace(tile, SPLIT_K=split))
    work, added = work_of(q, replace(tile, SPLIT_K=split)), counted["conv_wgrad_reduce_kernel"]
    assert (work.launches, work.further) == (added.launches, added.loaded + added.stored)
    assert work.moved - work.memory == (0 if split == 1 else added.loaded - added.stored)


@pytest.mark.parametrize("operation", ["fprop", "wgrad"])
@pytest.mark.parametrize("split", [1, 2])
def test_a_packed_image(operation, split):
    case = Case("a stem", (1, 3, 9, 12), (16, 3, 3), (2, 2), (1, 1, 1, 1))
    tile = BoxTile(1, 4, 8, 64, 32, SPLIT_K=split)
    q, counted = ran(operation, case, tile)
    work = work_of(q, tile)
    check(work, counted)
    others = [c for name, c in counted.items() if c is not main_of(counted)]
    assert work.further == sum(c.loaded + c.stored for c in others)
    assert work.memory == sum(t.numel() * 2 for t in map(tensor, (case.x, case.w, case.y)))
    assert work.flops == case.problem.flops


@pytest.mark.parametrize("tiles", [1, COMBINED, COMBINED + 1, 3 * COMBINED**2])
def test_moments_are_combined_by_as_many_launches(tiles):
    plan = plan_combine(tiles, 2, 8, torch.float32, TileRows(1, max(tiles, 1), 1))
    assert levels(tiles) == [level.scalars[0] for level, _ in plan]
