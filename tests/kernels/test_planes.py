"""planes.py: which element a plane's strides reach, what vectors may be loaded, which tile runs. Pure Python."""

from __future__ import annotations

import pytest
import torch

from cnnfast_kernels.planes import choose_plane_tile, common_planes, dense_format, mergeable
from cnnfast_kernels.tiling import BUSY_PROGRAMS, cdiv
from tests.support.poison import embed

SHAPES = [
    (6, 5),
    (1, 7),
    (3, 1),
    (2, 3, 4),
    (2, 8, 4, 6),
    (2, 3, 1, 1),
    (1, 4, 3, 5),
    (2, 1, 3, 4),
    (2, 3, 2, 4, 2),
    (0, 3, 2, 2),
]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layouts(shape):
    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    yield "contiguous", t
    if len(shape) in LAST:
        yield "channels_last", t.contiguous(memory_format=LAST[len(shape)])
    if len(shape) == 4:
        yield "slice", embed(t)
        yield "channels of a slice", embed(t.contiguous(memory_format=torch.channels_last), (0, 1, 0, 0), (0, 2, 0, 0))
        yield "images turned", t.transpose(2, 3).contiguous().transpose(2, 3)
        yield "expanded", t[:1, :, :1, :1].expand(shape)


CASES = [pytest.param(t, id=f"{'x'.join(map(str, shape))} {name}") for shape in SHAPES for name, t in layouts(shape)]


def rows(t, planes, strides):
    """The tensor [N, L, C] that a kernel reads."""
    n, l, c = (1 if s is None else s * planes.ALIGN for s in strides)
    return t.as_strided((planes.N, planes.L, planes.C), (n, l, c), t.storage_offset())


def as_planes(*tensors):
    """The common planes of what the launchers hand to a kernel, and that: the tensors, or copies that are planes."""
    operands = [mergeable(t) for t in tensors]
    strides = tuple(None if t is None else t.stride() for t in operands)
    return common_planes(tuple(operands[0].shape), strides, operands[0].dtype), operands


@pytest.mark.parametrize("t", CASES)
def test_strides_reach_every_element(t):
    planes, (operand,) = as_planes(t)
    expected = t.flatten(2).transpose(1, 2) if t.dim() > 2 else t[:, None]
    assert torch.equal(rows(operand, planes, planes.strides[0]).reshape(-1, planes.C), expected.reshape(-1, planes.C))


@pytest.mark.parametrize("a", CASES)
def test_operands_of_several_layouts_have_planes_in_common(a):
    for _, b in layouts(tuple(a.shape)):
        planes, operands = as_planes(a, None, b)
        assert planes.strides[1] == (None, None, None)
        for t, operand, strides in ((a, operands[0], planes.strides[0]), (b, operands[2], planes.strides[2])):
            expected = t.flatten(2).transpose(1, 2) if t.dim() > 2 else t[:, None]
            assert torch.equal(rows(operand, planes, strides).reshape(-1, planes.C), expected.reshape(-1, planes.C))


def test_channels_last_is_one_plane_of_adjacent_channels():
    planes, _ = as_planes(torch.empty(4, 16, 3, 5).contiguous(memory_format=torch.channels_last))
    assert (planes.N, planes.L, planes.C) == (1, 60, 16)
    assert planes.strides[0] == (0, 2, None)
    assert (planes.ALIGN, planes.L_ALIGN) == (8, 1)


def test_nchw_is_planes_of_adjacent_rows():
    planes, _ = as_planes(torch.empty(4, 16, 4, 6))
    assert (planes.N, planes.L, planes.C) == (4, 24, 16)
    assert planes.strides[0] == (48, None, 3)
    assert (planes.ALIGN, planes.L_ALIGN, planes.units) == (8, 8, 3)


def test_another_batch_or_image_of_a_size_class_is_the_same_kernel():
    """Whatever is constexpr depends on channels, layout and the two size classes alone."""
    large = [
        as_planes(torch.empty(n, 64, h, w).contiguous(memory_format=torch.channels_last))[0]
        for n, h, w in ((64, 56, 56), (33, 41, 57))
    ]
    assert large[0].constants == large[1].constants
    assert large[0].tile == choose_plane_tile(1, 64 * 56 * 56, 64, False, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("rows_adjacent", [False, True])
@pytest.mark.parametrize(
    ("N", "L", "C"), [(1, 50176, 64), (256, 1, 2048), (1, 256, 2048), (8, 49, 512), (1, 1 << 20, 3), (1, 1 << 16, 1)]
)
def test_enough_programs(N, L, C, rows_adjacent, dtype):
    """Multiprocessors idle only where programs are as small as they get: 8 elements a thread."""
    tile = choose_plane_tile(N, L, C, rows_adjacent, dtype)
    programs = N * cdiv(L, tile.BLOCK_L) * cdiv(C, tile.BLOCK_C)
    assert programs >= 2 * BUSY_PROGRAMS or tile.BLOCK_L * tile.BLOCK_C <= 1024


@pytest.mark.parametrize("t", [case for case in CASES if case.values[0].numel()])
def test_result_has_the_format_that_batch_norm_gives(t):
    C = t.shape[1]
    z = torch.nn.functional.batch_norm(t, torch.zeros(C, dtype=t.dtype), torch.ones(C, dtype=t.dtype))
    assert torch.empty(t.shape, memory_format=dense_format(t)).stride() == z.stride()
