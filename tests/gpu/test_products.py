"""float32 on a GPU: TF32 and IEEE products differ, each is as near to float64 as it must be, and PyTorch's settings are
followed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor

import cnnfast.functional as F
from cnnfast.precision import UNIT, float32_products
from tests.support.child import run_compiled

CASES = {
    "3x3": ((2, 64, 16, 16), (64, 64, 3, 3), {"padding": 1}),
    "1x1": ((2, 128, 8, 8), (64, 128, 1, 1), {}),
    "few channels": ((2, 3, 24, 24), (32, 3, 7, 7), {"stride": 2, "padding": 3}),
    "im2col": ((2, 32, 8, 8), (32, 32, 3, 3), {"padding": 1, "algorithm": "im2col"}),
}
SMALL = ((1, 4, 6, 6), (8, 4, 3, 3), {"padding": 1})


def results(x: Tensor, w: Tensor, functions=F, **options) -> list[Tensor]:
    a, b = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = functions.conv2d(a, b, **options)
    dy = torch.empty_like(y, requires_grad=False).copy_(
        torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
    )
    return [y.detach(), *torch.autograd.grad(y, (a, b), dy)]


def check_products(case, device: torch.device) -> None:
    """IEEE within the roundings of a long sum in float32, TF32 within those of its factors besides, and far from it on
    the whole.
    """
    x_size, w_size, options = case
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(size, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
        for size in (x_size, w_size)
    )
    plain = {name: value for name, value in options.items() if name != "algorithm"}
    right = results(x.cpu().double(), w.cpu().double(), theirs, **plain)
    # Both factors of a product are off by UNIT / 2 at most, relative to themselves: the error is one UNIT of the sum of
    # their sizes.
    sizes = sums_of_sizes(x, w, plain)
    found = {}
    for products in ("ieee", "tf32"):
        with float32_products(products):
            found[products] = results(x, w, **options)
    for ieee, tf32, exact, size in zip(found["ieee"], found["tf32"], right, sizes, strict=True):
        assert not torch.equal(ieee, tf32)
        errors = {name: (t.cpu().double() - exact).abs() for name, t in (("ieee", ieee), ("tf32", tf32))}
        assert (errors["tf32"] <= UNIT * 1.01 * size + 1e-5).all()
        assert (errors["ieee"] <= 64 * 2.0**-24 * size + 1e-6).all()
        rms = {name: error.square().mean().sqrt().item() for name, error in errors.items()}
        assert rms["ieee"] < rms["tf32"] / 20


def sums_of_sizes(x: Tensor, w: Tensor, options: dict) -> list[Tensor]:
    """What `results` would be if every factor were positive."""
    a, b = x.cpu().double().abs().requires_grad_(), w.cpu().double().abs().requires_grad_()
    y = theirs.conv2d(a, b, **options)
    dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).abs()
    return [y.detach(), *torch.autograd.grad(y, (a, b), dy)]


@pytest.mark.gpu
@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("name", CASES)
def test_both_kinds_of_products(name, device):
    check_products(CASES[name], device)


@pytest.mark.usefixtures("by_kernels")
def test_both_kinds_of_products_of_a_small_convolution(device):
    check_products(SMALL, device)


def settings(older):
    """Results of one convolution with TF32 allowed or not, of convolutions and of matrix products: which of them are
    the same.
    """
    import torch

    import cnnfast
    import cnnfast.functional as F

    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    x, w = torch.randn(2, 32, 8, 8, device=device), torch.randn(32, 32, 3, 3, device=device)
    backends, seen = torch.backends, {}
    for convolutions in (False, True):
        for products in (False, True):
            if older:
                backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = convolutions, products
            else:
                backends.cudnn.conv.fp32_precision = "tf32" if convolutions else "ieee"
                backends.cuda.matmul.fp32_precision = "tf32" if products else "ieee"
            with cnnfast.backend("kernels"):
                seen[convolutions, products] = F.conv2d(x, w)
    pairs = (((False, False), (False, True)), ((True, False), (True, True)), ((False, False), (True, True)))
    return [torch.equal(seen[a], seen[b]) for a, b in pairs]


@pytest.mark.gpu
@pytest.mark.parametrize("older", [True, False], ids=["allow_tf32", "fp32_precision"])
def test_pytorchs_settings_are_followed(older):
    """Convolutions follow cudnn's setting, not that of matrix products, whichever way it is written: each in a process
    of its own, because PyTorch lets a process use one of the two.
    """
    assert run_compiled(settings, older) == [True, True, False]
