"""gram.py: batch norm behind a 1x1 convolution from the Gram matrix of its input, against PyTorch in float64; and the
gradient of weights in the dtype of its sums, which it takes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs

from cnnfast_kernels import conv, launch, memory
from cnnfast_kernels.gram import gram_gradients, gram_statistics
from cnnfast_kernels.questions import Geometry
from cnnfast_kernels.tiling import PackedTile, TileConfig
from tests.support.agreement import integers, leaf, normal

LAST = torch.channels_last
HALF = torch.float16


@pytest.fixture(autouse=True)
def _poisoned():
    with memory.poisoned():
        yield


def image(t, device, dtype=HALF):
    return t.to(device, dtype).contiguous(memory_format=LAST)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("C", "K", "stride"), [(4, 5, (1, 1)), (24, 40, (2, 1)), (72, 20, (1, 3))], ids=str)
def test_statistics(device, C, K, stride, bias):
    """Channels that fill no block, several blocks of them; filters beyond one program's."""
    x, w = image(normal(3, C, 5, 7).relu(), device), image(normal(K, C, 1, 1, seed=1), device)
    b = normal(K, seed=2, dtype=torch.float32).to(device) if bias else None
    mean, var, mu, products = gram_statistics(x, w, b, stride)
    met = x[:, :, :: stride[0], :: stride[1]].double().transpose(0, 1).flatten(1)
    y = w.double().flatten(1) @ met + (0 if b is None else b.double()[:, None])
    covariance = met.cov(correction=0)
    right = y.mean(1), y.var(1, correction=0), met.mean(1), w.double().flatten(1) @ covariance
    for mine, exact in zip((mean, var, mu, products), right, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=2e-6, atol=2e-6 * float(exact.abs().max()))


def test_exact_sums(device):
    """Of integers whose mean is one too: every number is exact, also the variance of what does not vary, which is 0."""
    x = integers(4, 8, 4, 4, largest=3)
    x = torch.cat([x, 2 - x])  # of each channel the mean is 1
    w = integers(6, 8, 1, 1, seed=1)
    w[2] = 0
    mean, var, mu, products = gram_statistics(image(x, device), image(w, device), None, (1, 1))
    met, filters = x.double().transpose(0, 1).flatten(1), w.double().flatten(1)
    assert torch.equal(mu, torch.ones_like(mu))
    assert torch.equal(mean.cpu().double(), filters.sum(1))
    assert torch.equal(products.cpu().double(), filters @ met.cov(correction=0))
    assert torch.equal(var.cpu().double(), (filters @ (met - 1)).square().mean(1))
    assert float(var[2]) == 0


def exact_gradients(x, w, g, gamma, stride):
    x, w, gamma = leaf(x.double()), leaf(w.double()), leaf(gamma.double())
    z = theirs.batch_norm(theirs.conv2d(x, w, None, stride), None, None, gamma, None, True)
    return torch.autograd.grad(z, (x, w, gamma), g.double())


# of the gradient, and of the filters: V goes with the inverse square of the latter, their product with V's factors too
@pytest.mark.parametrize("scale", [(1, 1), (2**-6, 2**9), (2**6, 2**-4)], ids=["1", "small", "large"])
@pytest.mark.parametrize(("C", "K", "stride"), [(4, 5, (1, 1)), (24, 40, (2, 1)), (72, 20, (1, 3))], ids=str)
def test_gradients(device, C, K, stride, scale):
    """Also where float16 holds V only as it is scaled. Pixels that no output meets get 0."""
    x, w = image(normal(3, C, 5, 7).relu(), device), image(normal(K, C, 1, 1, seed=1).mul(scale[1]), device)
    gamma = normal(K, seed=3, dtype=torch.float32).to(device)
    _, var, mu, products = gram_statistics(x, w, None, stride)
    g = image(normal(3, K, *x[:, :, :: stride[0], :: stride[1]].shape[2:], seed=4).mul(scale[0]), device)
    sums = g.float().sum((0, 2, 3))
    dx, dw, dgamma = gram_gradients(g, sums, x, w, mu, products, var, gamma, 1e-5, stride, (True, True))
    for mine, exact, tolerance in zip(
        (dx, dw, dgamma), exact_gradients(x, w, g, gamma, stride), (3e-3, 1e-3, 1e-5), strict=True
    ):
        assert (mine.double() - exact).abs().max() <= tolerance * exact.abs().max()
    assert dx.is_contiguous(memory_format=LAST)
    # what batch norm takes away: the mean of each channel's gradient
    assert dx.double().sum((0, 2, 3)).abs().max() <= 2e-3 * dx.double().abs().sum((0, 2, 3)).max()
    alone, nothing, _ = gram_gradients(g, sums, x, w, mu, products, var, gamma, 1e-5, stride, (True, False))
    assert nothing is None
    assert torch.equal(alone, dx)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_input_enters_its_gradient_in_one_launch(device, dtype):
    """Where tensor maps serve: what it adds is rounded with the gradient, once, and is no tensor of its own. x in
    PyTorch's own format is a forward pass and a residual. Both are within what rounding the operands costs.
    """
    x, w = image(normal(3, 24, 5, 7).relu(), device, dtype), image(normal(40, 24, 1, 1, seed=1), device, dtype)
    g = image(normal(3, 40, 5, 7, seed=4), device, dtype)
    _, var, mu, products = gram_statistics(x, w, None, (1, 1))
    gamma = normal(40, seed=3, dtype=torch.float32).to(device)
    how = w, mu, products, var, gamma, 1e-5, (1, 1), (True, False)
    exact, *_ = exact_gradients(x, w, g, gamma, (1, 1))
    tolerance = 3e-3 if dtype == HALF else 2e-2
    apart = ["conv_fprop_kernel", "conv_dgrad_kernel"]
    for of_x, expected in ((x, ["tma_dgrad_kernel"]), (x.contiguous(), apart)):
        kernels: list[str] = []
        with launch.observe(lambda event, kernels=kernels: kernels.append(event.kernel)):
            dx, *_ = gram_gradients(g, g.float().sum((0, 2, 3)), of_x, *how)
        assert (dx.double() - exact).abs().max() <= tolerance * exact.abs().max()
        products_of_dx = [name for name in kernels if "fprop" in name or "dgrad" in name]
        if launch.INTERPRETED:  # which runs what sm_90 would
            assert products_of_dx == expected


def test_gradients_without_gamma_and_with_channels_apart(device):
    """g and w in PyTorch's own format, x in channels_last."""
    x, w = image(normal(3, 8, 4, 5).relu(), device), normal(24, 8, 1, 1, seed=1).to(device, HALF)
    g = normal(3, 24, 4, 5, seed=4).to(device, HALF)
    _, var, mu, products = gram_statistics(x, w, None, (1, 1))
    how = mu, products, var, None, 1e-5, (1, 1), (True, True)
    dx, dw, _ = gram_gradients(g, g.float().sum((0, 2, 3)), x, w, *how)
    right = exact_gradients(x, w, g, torch.ones(24, device=device), (1, 1))
    for mine, exact in zip((dx, dw), right, strict=False):
        assert (mine.double() - exact).abs().max() <= 3e-3 * exact.abs().max()
    assert dx.is_contiguous(memory_format=LAST)
    assert dw.is_contiguous(memory_format=LAST)


POINT, SAME = Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1), Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1)
WIDE = {
    "pointers": ((2, 32, 8, 8), (16, 32, 1, 1), POINT, {"tile": TileConfig(32, 32, 32, 4, 2)}),
    "pointers, slots": ((2, 32, 8, 8), (16, 32, 1, 1), POINT, {"tile": TileConfig(32, 32, 32, 4, 2, SPLIT_K=3)}),
    "a packed image": ((2, 3, 8, 8), (16, 3, 3, 3), SAME, {"tile": PackedTile(64, 32, 32, 4, 2, SPLIT_K=2)}),
    "im2col": ((2, 16, 8, 8), (16, 16, 3, 3), SAME, {"algorithm": "im2col"}),
    "depthwise": ((2, 16, 8, 8), (16, 1, 3, 3), SAME._replace(groups=16), {}),
}


@pytest.mark.parametrize("case", WIDE)
def test_gradients_of_weights_in_the_dtype_of_their_sums(device, case):
    """Sums beyond 4096, which float16 rounds: exact, whoever serves."""
    x_shape, w_shape, geometry, how = WIDE[case]
    x, dy = integers(*x_shape, largest=15) + 10, integers(x_shape[0], w_shape[0], *x_shape[2:], largest=15, seed=1) + 10
    wide = conv.conv_wgrad(image(x, device), image(dy, device), w_shape, geometry, fmt=LAST, wide=True, **how)
    w = torch.zeros(w_shape, dtype=torch.float64, requires_grad=True)
    y = theirs.conv2d(x.double(), w, None, 1, geometry.padding[0], 1, geometry.groups)
    (right,) = torch.autograd.grad(y, w, dy.double())
    assert wide.dtype == torch.float32
    assert float(right.abs().max()) > 4096
    assert torch.equal(wide.cpu().double(), right)
