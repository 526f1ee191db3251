"""Measured rows decide on the GPU that they name: a kernel's row and the library's both serve, and cuDNN runs as
PyTorch's settings say.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs

import cnnfast
import cnnfast.functional as F
from cnnfast_kernels import devices, launch, questions, tables
from cnnfast_kernels.conv import Geometry
from cnnfast_kernels.layout import layout_of
from cnnfast_kernels.tiling import TileConfig
from tests.support.agreement import integers

LAST = torch.channels_last
TILE = TileConfig(32, 32, 32, 4, 2)
TIMES = {"kernels": 9.0, "library": 4.5}


def operands(device: torch.device, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = integers(4, 32, 8, 8, largest=2).to(device, dtype), integers(32, 32, 3, 3, seed=1).to(device, dtype)
    return x.contiguous(memory_format=LAST), w.contiguous(memory_format=LAST)


def row(x: torch.Tensor, w: torch.Tensor, gpu: devices.Gpu, winner: str) -> tables.TableRow:
    """Of the convolution of these tensors, as tuning would write it."""
    geometry = Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1)
    q = questions.fprop_question(layout_of(x), layout_of(w), geometry, gpu)
    return tables.TableRow(q.key, TILE, winner, TIMES)


def written(gpu: devices.Gpu, *rows: tables.TableRow) -> None:
    tables.write(gpu.name, gpu.arch, rows, {"driver": "this test"})
    launch.forget_plans()


@pytest.mark.parametrize("winner", ["kernels", "library"])
def test_a_row_serves(winner, gpu, library_first, device):
    x, w = operands(device)
    with cnnfast.trace() as before:
        F.conv2d(x, w, padding=1)
    assert [call.served_by for call in before] == ["library"]
    assert "unmeasured" in next(iter(before)).reason
    written(gpu, row(x, w, gpu, winner))
    with cnnfast.trace() as after:
        y = F.conv2d(x, w, padding=1)
    assert [call.served_by for call in after] == [winner]
    assert [event.tile for event in next(iter(after)).launches] == ([TILE] if winner == "kernels" else [])
    right = theirs.conv2d(x.double().cpu(), w.double().cpu(), padding=1)
    assert torch.equal(y.double().cpu(), right)


def test_rows_of_another_gpu_do_not(gpu, library_first, device):
    x, w = operands(device)
    other = gpu._replace(name="Another GPU")
    written(other, row(x, w, other, "kernels"))
    with cnnfast.trace() as trace:
        F.conv2d(x, w, padding=1)
    assert [call.served_by for call in trace] == ["library"]


def library_conv(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
    """Forward and both gradients, each by the library."""
    a, b = x.detach().requires_grad_(), w.detach().requires_grad_()
    with cnnfast.trace() as trace:
        y = F.conv2d(a, b, padding=1)
        grads = torch.autograd.grad(y, (a, b), torch.ones_like(y))
    assert {call.served_by for call in trace} == {"library"}
    return [y.detach(), *grads]


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("benchmark", [False, True])
def test_cudnns_settings_reach_the_library(benchmark, deterministic, library_first, device):
    """The library does inside our operators what it does for PyTorch; where it is deterministic, bit for bit, and again
    and again.

    Gradients may be asked for by another of its functions than PyTorch's, so that they are only near.
    """
    x, w = operands(device, torch.float32)
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, deterministic=deterministic, allow_tf32=False):
        mine = library_conv(x, w)
        a, b = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = theirs.conv2d(a, b, padding=1)
        right = [y.detach(), *torch.autograd.grad(y, (a, b), torch.ones_like(y))]
        again = library_conv(x, w)
    if deterministic:
        assert torch.equal(mine[0], right[0])
    for ours, pytorchs, repeated in zip(mine, right, again, strict=True):
        assert ours.stride() == pytorchs.stride()
        assert not deterministic or torch.equal(ours, repeated)
        torch.testing.assert_close(ours, pytorchs, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_deterministic_algorithms_can_be_asked_for(library_first, device):
    """Neither our kernels nor the library raise, and both repeat themselves."""
    x, w = operands(device, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = library_conv(x, w), library_conv(x, w)
        with cnnfast.backend("kernels"):
            ours, repeated = F.max_pool2d(F.conv2d(x, w), 2), F.max_pool2d(F.conv2d(x, w), 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(ours, repeated)
