"""Tensor maps as the driver encodes them: cuTensorMapEncodeTiled takes every kind, and boxes hold what they should.

A map that the driver refuses raises, and one that it takes and understands otherwise gives wrong numbers: all are exact
integers. Two kinds go beyond what its documentation shows: strides that do not decrease from axis to axis (filters as
[R, S, K, C], columns of pixels of several images), and neighbours that overlap along the innermost axis but one, or
along rows of phases (a stem's image, strided ones).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as theirs

from cnnfast.bench.shapes import resnet50_convolutions
from cnnfast_kernels import conv, devices, launch
from cnnfast_kernels.conv import Geometry
from cnnfast_kernels.keys import DgradKey, FpropKey, WgradKey
from cnnfast_kernels.layout import layout_of
from cnnfast_kernels.tma.stem import boxed_problem, is_packed
from cnnfast_kernels.tma.tiles import BoxTile, candidate_boxes
from tests.support.convolutions import Case, draw, needs_tensor_maps
from tests.support.each_family import LAST

pytestmark = needs_tensor_maps

BATCH = 2
RESNET50 = [
    Case(
        f"{C} x {size} x {size}, {R}x{R}/{stride} > {K}",
        (BATCH, C, size, size),
        (K, R, R),
        (stride, stride),
        (R // 2,) * 4,
    )
    for C, size, K, R, stride, _ in resnet50_convolutions()
]
SMALL = [
    Case("3x3", (2, 16, 6, 8), (16, 3, 3), padding=(1, 1, 1, 1)),
    Case("3x3 stride 2", (2, 64, 12, 20), (64, 3, 3), (2, 2), (1, 1, 1, 1)),
    Case("1x1 stride 2", (2, 64, 8, 6), (24, 1, 1), (2, 2)),
    Case("one pixel of many images", (32, 16, 1, 1), (16, 1, 1)),
    Case("a stem", (2, 3, 24, 20), (64, 7, 7), (2, 2), (3, 3, 3, 3)),
]
OPERATIONS = ("fprop", "dgrad", "wgrad")


def kinds(map_) -> set[str]:
    """What is unusual about a map: "permuted" strides, "overlapping" neighbours, or nothing."""
    strides = [stride for stride, size in zip(map_.strides, map_.shape, strict=True) if size > 1]
    found = {"permuted"} if strides != sorted(strides, reverse=True) else set()
    axes = sorted(zip(map_.strides, map_.shape, strict=True))
    reach = 1
    for stride, size in axes:
        if size > 1 and stride < reach:
            found.add("overlapping")
        reach = max(reach, (size - 1) * stride + reach)
    return found or {"usual"}


@pytest.fixture
def encoded(monkeypatch) -> Counter:
    """How many maps of each kind have been made for plans since."""
    seen: Counter = Counter()
    make = launch.tensor_map  # views.py calls it through the module

    def tensor_map(*arguments):
        made = make(*arguments)
        seen.update(kinds(made))
        return made

    monkeypatch.setattr(launch, "tensor_map", tensor_map)
    launch.forget_plans()
    return seen


def tiles(case: Case, operation: str, most: int) -> list[BoxTile]:
    """Of each shape of box the smallest, at most `most` of them; of few channels those of the packed image."""
    packed = is_packed(case.problem)
    if packed and operation == "dgrad":
        return []
    problem = boxed_problem(case.problem) if packed else case.problem
    if not packed and (case.x[1] % 8 or case.filters[0] % 8):
        return []
    shapes = {(t.TILE_N, t.TILE_H, t.TILE_W): t for t in candidate_boxes(problem, operation)}
    return [*shapes.values()][:most]


def check(case: Case, operation: str, tile: BoxTile, device: torch.device) -> None:
    x, w, dy = (t.contiguous(memory_format=LAST) for t in draw(case, torch.float16, device))
    geometry = Geometry(case.stride, case.padding, case.dilation, 1)
    a, b = x.double().contiguous().requires_grad_(), w.double().contiguous().requires_grad_()
    y = theirs.conv2d(a, b, None, case.stride, case.padding[::2])
    match operation:
        case "fprop":
            mine, right = conv.conv_fprop(x, w, geometry, tile=tile), y.detach()
        case "dgrad":
            mine = conv.conv_dgrad(dy, w, case.x, geometry, fmt=LAST, tile=tile)
            right = torch.autograd.grad(y, a, dy.double())[0]
        case _:
            mine = conv.conv_wgrad(x, dy, case.w, geometry, fmt=LAST, tile=replace(tile, SPLIT_K=2))
            right = torch.autograd.grad(y, b, dy.double())[0]
    assert right.abs().max() <= 2048, "the test asks for numbers that float16 cannot hold"
    torch.testing.assert_close(mine.double(), right, rtol=0, atol=0)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_kind_of_map(case, device, encoded):
    for operation in OPERATIONS:
        for tile in tiles(case, operation, 1):
            check(case, operation, tile, device)
    assert encoded.total() > 0


def test_the_cases_have_every_kind(device, encoded):
    """By planning alone."""
    for case in SMALL:
        for operation in OPERATIONS:
            for tile in tiles(case, operation, 99):
                x, w, dy = (
                    torch.empty(size, dtype=torch.float16, device="meta", memory_format=LAST)
                    for size in (case.x, case.w, case.y)
                )
                geometry = Geometry(case.stride, case.padding, case.dilation, 1)
                gpu = devices.gpu(device)
                how = {"tf32": False, "tile": tile, "gpu": gpu, "aligned": True}
                x, w, dy = (layout_of(t) for t in (x, w, dy))
                match operation:
                    case "fprop":
                        key = FpropKey(*x[:2], *w[:2], None, x.dtype, geometry, "", 0.0, None, 0.0, False, **how)
                        assert conv.fprop_plan(key).prepared
                    case "dgrad":
                        assert conv.dgrad_plan(
                            DgradKey(*dy[:2], *w[:2], dy.dtype, case.x, LAST, geometry, **how)
                        ).prepared
                    case _:
                        assert conv.wgrad_plan(
                            WgradKey(*x[:2], *dy[:2], x.dtype, case.w, LAST, geometry, **how)
                        ).prepared
    assert set(encoded) == {"usual", "permuted", "overlapping"}


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_layers_of_a_resnet50(case, operation, device, encoded):
    """In two of the shapes of box that tuning would try."""
    found = tiles(case, operation, 2)
    if not found:
        assert case.x[1] == 3
        assert operation == "dgrad"
        pytest.skip("GPU ring: the gradient of an image of few channels has no kernel by tensor maps")
    for tile in found:
        check(case, operation, tile, device)
    assert encoded.total() > 0
