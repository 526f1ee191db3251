"""One infinity or NaN in an operand of a convolution, or of its weights' gradient: which results it reaches. The judge
goes tap by tap.

Of a sum over taps two readings differ where a tap lies in the padding: its zero is multiplied (infinity * 0 is NaN), as
PyTorch's kernels that multiply an explicit im2col do, which are those of float64; or it is no pixel and adds nothing,
as in oneDNN's. The kernels that load by pointers follow the first reading, which is also cnnfast.reference's. Those
that load boxes by tensor maps skip taps that see nothing but padding, so that each of their sums is one reading's or
the other's. An input's gradient has no padding: see test_dgrad.py and the like.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnnfast_kernels import conv
from cnnfast_kernels.questions import Geometry
from cnnfast_kernels.tma.tiles import BoxTile, box_steps, candidate_boxes
from tests.support.convolutions import CASES, GROUPED, RAGGED, STRIDED, Case, draw, needs_tensor_maps

INF = float("inf")
FACTORS = {"fprop": ("x", "w"), "wgrad": ("x", "dy")}
OPERAND_OF = [(operation, operand) for operation, operands in FACTORS.items() for operand in operands]


def by_taps(
    case: Case, operation: str, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, padding_counts: bool
) -> torch.Tensor:
    """y or dw in float64 by its definition, every product taken; those of the padding's zeros only if
    padding_counts.
    """
    x, w, dy = (t.double().cpu() for t in (x, w, dy))
    top, bottom, left, right = case.padding
    P, Q = case.y[2:]
    seen = F.pad(x, (left, right, top, bottom)).unflatten(1, (case.groups, -1))
    inside = F.pad(torch.ones(x.shape[2:], dtype=torch.bool), (left, right, top, bottom))
    filters, dy = w.unflatten(0, (case.groups, -1)), dy.unflatten(1, (case.groups, -1))
    y, dw = torch.zeros_like(dy), torch.zeros_like(filters)
    for r in range(w.shape[2]):
        for s in range(w.shape[3]):
            h, q = r * case.dilation[0], s * case.dilation[1]
            rows = slice(h, h + (P - 1) * case.stride[0] + 1, case.stride[0])
            columns = slice(q, q + (Q - 1) * case.stride[1] + 1, case.stride[1])
            counts = inside[rows, columns] | padding_counts
            tap = seen[..., rows, columns]
            if operation == "fprop":
                y += torch.where(counts, (filters[None, ..., r, s, None, None] * tap[:, :, None]).sum(3), 0.0)
            else:
                dw[..., r, s] = torch.where(counts, dy[:, :, :, None] * tap[:, :, None], 0.0).sum((0, 4, 5))
    return y.flatten(1, 2) if operation == "fprop" else dw.flatten(0, 1)


def operands(
    case: Case, operand: str, value: float, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Small integers, with that value at the first and a middle element of one of them: at a corner, where most taps
    miss, and within.
    """
    tensors = dict(zip(("x", "w", "dy"), draw(case, dtype, torch.device("cpu")), strict=True))
    flat = tensors[operand].view(-1)
    flat[0] = value
    flat[flat.numel() // 2] = value
    return {name: t.to(device).contiguous(memory_format=torch.channels_last) for name, t in tensors.items()}


def computed(case: Case, operation: str, x, w, dy, **how) -> torch.Tensor:
    geometry = Geometry(case.stride, case.padding, case.dilation, case.groups)
    if operation == "fprop":
        return conv.conv_fprop(x, w, geometry, **how).double().cpu()
    return conv.conv_wgrad(x, dy, w.shape, geometry, **how).double().cpu()


def check(case: Case, operation: str, operand: str, algorithm: conv.Algorithm, device: torch.device) -> None:
    for value in (INF, float("nan")):
        tensors = operands(case, operand, value, torch.float32, device)
        exact = by_taps(case, operation, **tensors, padding_counts=True)
        torch.testing.assert_close(
            computed(case, operation, **tensors, algorithm=algorithm), exact, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize(("operation", "operand"), OPERAND_OF)
@pytest.mark.parametrize("case", [case for case in CASES if min(case.y) > 0], ids=str)
def test_kernels_that_load_by_pointers(case, operation, operand, device):
    """The ordinary ones, and those of depthwise convolution."""
    check(case, operation, operand, "direct", device)


@pytest.mark.parametrize(("operation", "operand"), OPERAND_OF)
@pytest.mark.parametrize("case", [RAGGED, STRIDED, GROUPED], ids=str)
def test_im2col(case, operation, operand, device):
    check(case, operation, operand, "im2col", device)


BOXED = [
    Case("3x3", (2, 8, 6, 5), (16, 3, 3), padding=(1, 1, 1, 1)),
    Case("stride 2, whole phases", (2, 8, 8, 8), (8, 3, 3), (2, 2), (1, 1, 1, 1)),
    Case("dilation", (1, 16, 7, 7), (8, 3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Case("the last rows fill no window", (2, 8, 9, 6), (8, 2, 2), (3, 1)),
]


def boxes(operation: str) -> list[tuple[Case, BoxTile]]:
    """Each case with one tile of each shape of box."""
    found = []
    for case in BOXED:
        tiles = {(t.TILE_H, t.TILE_W): t for t in candidate_boxes(case.problem, operation)}
        found += [(case, tile) for tile in tiles.values() if box_steps(case.problem, operation, tile) <= 40]
    return found


def overhangs(case: Case, tile: BoxTile) -> bool:
    """Whether the last box of dy reaches beyond its end where x goes on: see the module docstring of tma/wgrad.py."""
    g = case.problem
    ends = ((g.P, tile.TILE_H, g.stride_h, g.pad_h, g.H), (g.Q, tile.TILE_W, g.stride_w, g.pad_w, g.W))
    return any(outputs % size and outputs * stride - pad < inputs for outputs, size, stride, pad, inputs in ends)


BOX_CASES = [(operation, operand, case, tile) for operation, operand in OPERAND_OF for case, tile in boxes(operation)]


@needs_tensor_maps
@pytest.mark.parametrize(("operation", "operand", "case", "tile"), BOX_CASES, ids=str)
def test_kernels_that_load_boxes(operation, operand, case, tile, device):
    """Where a box of dy overhangs, weights that the value does not reach may be NaN too. None that it reaches is
    finite.
    """
    tensors = operands(case, operand, INF, torch.float16, device)
    found = computed(case, operation, **tensors, tile=tile)
    without, counting = (by_taps(case, operation, **tensors, padding_counts=counts) for counts in (False, True))
    right = (found == without) | (found == counting) | (found.isnan() & (without.isnan() | counting.isnan()))
    if (operation, operand) == ("wgrad", "x") and overhangs(case, tile):
        right |= found.isnan()
    assert right.all()
