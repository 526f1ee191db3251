"""Operands at a multiple of 16 bytes at one call and not at another, in one process: Triton compiles a kernel for each,
plans keep both.

On a GPU a kernel that was compiled for aligned addresses and is launched with others reads vectors at addresses that do
not allow it: the error would end the process. Tensor maps cannot take such an address at all. In the interpreter the
choices and numbers are the same.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cnnfast.functional as F
from cnnfast_kernels import launch
from tests.support.agreement import integers

LAST = torch.channels_last


def placed(t: Tensor, offset: int) -> Tensor:
    """A copy of `t`, dense and channels_last if it has four axes, that starts `offset` elements behind a multiple of 16
    bytes.
    """
    memory = torch.full((t.numel() + offset + 16,), float("nan"), dtype=t.dtype, device=t.device)
    # the allocators' addresses are multiples of 16 already
    memory = memory[-memory.data_ptr() % 16 // t.element_size() :]
    order = (0, 2, 3, 1) if t.dim() == 4 else tuple(range(t.dim()))
    sizes = [t.shape[axis] for axis in order]
    view = memory[offset : offset + t.numel()].view(sizes)
    view = view.permute([order.index(axis) for axis in range(t.dim())])
    view.copy_(t)
    assert (view.data_ptr() % 16 == 0) == (offset * t.element_size() % 16 == 0)
    return view


def conv2d(x, w):
    return F.conv2d(x, w, padding=1)


def depthwise(x, w):
    return F.conv2d(x, w[:, :1], padding=1, groups=x.shape[1])


def stem(x, w):
    return F.conv2d(x, w, None, 2, 1)


def norm(x, w):
    return F.batch_norm(x, None, None, w[0, :, 0, 0], None, True)


CALLS = {
    "convolution": (conv2d, (2, 16, 6, 8), (16, 16, 3, 3)),
    "1x1": (lambda x, w: F.conv2d(x, w), (2, 16, 6, 8), (16, 16, 1, 1)),
    "im2col": (lambda x, w: F.conv2d(x, w, padding=1, algorithm="im2col"), (1, 16, 6, 8), (16, 16, 3, 3)),
    "depthwise": (depthwise, (2, 16, 6, 8), (16, 2, 3, 3)),
    "stem": (stem, (2, 3, 9, 8), (16, 3, 3, 3)),
    "norm": (norm, (2, 16, 6, 8), (16, 16, 3, 3)),
    "max pool": (lambda x, w: F.max_pool2d(x, 3, 2, 1), (2, 16, 6, 8), (1, 1, 1, 1)),
    "average pool": (lambda x, w: F.avg_pool2d(x, 2), (2, 16, 6, 8), (1, 1, 1, 1)),
    "global average": (lambda x, w: F.global_avg_pool2d(x), (2, 16, 6, 8), (1, 1, 1, 1)),
}
# The offsets in elements of (x, w, dy) of the calls, one after the other.
ORDERS = {
    "aligned first": [(0, 0, 0), (1, 0, 0), (0, 1, 1), (0, 0, 0)],
    "aligned later": [(1, 1, 1), (0, 0, 1), (0, 0, 0), (3, 2, 1)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_addresses_change_between_calls(name, dtype, order, by_kernels, device):
    """Forward, and the gradients of both operands: the same bits wherever they lie."""
    call, x_size, w_size = CALLS[name]
    x, w = integers(*x_size, largest=2).to(device, dtype), integers(*w_size, seed=1).to(device, dtype)
    launch.forget_plans()
    found = []
    for x_offset, w_offset, dy_offset in ORDERS[order]:
        a, b = placed(x, x_offset).requires_grad_(), placed(w, w_offset).requires_grad_()
        y = call(a, b)
        dy = placed(integers(*y.shape, seed=2).to(device, dtype), dy_offset)
        wanted = [t for t in (a, b) if name not in ("max pool", "average pool", "global average") or t is a]
        found.append([y.detach(), *torch.autograd.grad(y, wanted, dy)])
    first = found[0]
    for offsets, results in zip(ORDERS[order][1:], found[1:], strict=True):
        for mine, right in zip(results, first, strict=True):
            if name == "norm":  # its sums may be taken by another tile
                torch.testing.assert_close(
                    mine, right, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
                )
            else:
                assert torch.equal(mine, right), offsets


@pytest.mark.gpu
def test_a_plan_keeps_a_binary_for_each(device):
    """The launches that go around Triton's own: three calls by one plan, of which the first and the last share what was
    compiled.
    """
    from cnnfast_kernels.gather.fprop import plan_fprop
    from cnnfast_kernels.problem import ConvProblem
    from cnnfast_kernels.tiling import TileConfig

    x, w = (
        integers(2, 32, 8, 8, largest=2).to(device, torch.float16),
        integers(32, 32, 1, 1, seed=1).to(device, torch.float16),
    )
    right = torch.nn.functional.conv2d(x.double(), w.double())
    places = [placed(x, offset) for offset in (0, 1, 0)]
    w = w.contiguous(memory_format=LAST)
    y = torch.empty_like(right, dtype=torch.float16, memory_format=LAST)
    problem = ConvProblem.of(x.shape, w.shape, (1, 1), (0,) * 4, (1, 1), 1)
    plan = plan_fprop(problem, TileConfig(64, 32, 32, 4, 2), "half", places[0], w, y)
    kept = []
    for place in places:
        y.fill_(float("nan"))
        plan(place, w, y, *[None] * 7)
        assert torch.equal(y.double(), right)
        kept.append(len(plan.compiled))
    assert kept == [1, 2, 2]
