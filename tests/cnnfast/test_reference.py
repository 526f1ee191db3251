"""The reference against PyTorch in float64, forward and backward: two judges that were written apart must agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnnfast import reference
from cnnfast.activations import ACTIVATIONS


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def agree(ours, theirs, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
    dy = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(0))
    for mine, its in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((2, 4, 7, 6), (6, 4, 3, 3), {"padding": 1}),
        ((1, 4, 9, 7), (6, 2, 3, 2), {"stride": (2, 3), "padding": (2, 0), "dilation": (1, 2), "groups": 2}),
        ((2, 3, 5, 6), (3, 1, 5, 3), {"padding": "same", "groups": 3}),
        pytest.param(
            (2, 3, 5, 6),
            (3, 3, 2, 4),
            {"padding": "same"},
            marks=pytest.mark.filterwarnings("ignore:Using padding='same' with even"),
        ),
        ((3, 5, 5), (2, 3, 3, 3), {"padding": "valid"}),
        ((1, 2, 8, 8), (2, 2, 3, 3), {"stride": 3}),
        ((1, 2, 2, 3), (2, 2, 5, 5), {"padding": 2}),
    ],
)
def test_conv2d(x, w, options):
    x, w, b = draw(*x), draw(*w), draw(w[0])
    agree(reference.conv2d(x, w, b, **options), F.conv2d(x, w, b, **options), x, w, b)


@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((2, 4, 9), (6, 2, 3), {"stride": 2, "padding": (2,), "dilation": 2, "groups": 2}),
        ((3, 5), (2, 3, 3), {"padding": "same"}),
    ],
)
def test_conv1d(x, w, options):
    x, w, b = draw(*x), draw(*w), draw(w[0])
    agree(reference.conv1d(x, w, b, **options), F.conv1d(x, w, b, **options), x, w, b)


@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((2, 4, 3, 4), (4, 3, 3, 2), {}),
        ((2, 4, 3, 4), (4, 3, 3, 2), {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "groups": 2}),
        ((4, 3, 4), (4, 1, 3, 3), {"stride": 2, "dilation": 3, "output_padding": 2, "groups": 4}),
        ((1, 4, 3, 3), (4, 2, 2, 2), {"padding": 1}),
    ],
)
def test_conv_transpose2d(x, w, options):
    x, w, b = draw(*x), draw(*w), draw(w[1] * options.get("groups", 1))
    agree(reference.conv_transpose2d(x, w, b, **options), F.conv_transpose2d(x, w, b, **options), x, w, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 5)])
def test_batch_norm(shape, training):
    x, weight, bias = draw(*shape), draw(3), draw(3)
    running = [torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5]
    ours, theirs = ([t.clone() for t in running] for _ in range(2))
    y = reference.batch_norm(x, *ours, weight, bias, training, 0.3, 1e-3)
    agree(y, F.batch_norm(x, *theirs, weight, bias, training, 0.3, 1e-3), x, weight, bias)
    torch.testing.assert_close(ours, theirs)


# PyTorch's hardsigmoid takes float32's sixth for its derivative, in float64 too.
THEIRS = {"hardsigmoid": lambda u, slope: F.relu6(u + 3) / 6}


def test_activations():
    kinks = torch.tensor([-0.0, 0.0, 6.0, -3.5, 3.5, 40.0, -40.0], dtype=torch.float64)
    for name, activation in reference.ACTIVATIONS.items():
        u = torch.cat([kinks, draw(50).detach() * 3]).requires_grad_()
        slope = torch.tensor([0.1], dtype=torch.float64) if name == "prelu" else 0.1
        agree(activation(u, slope), THEIRS.get(name, ACTIVATIONS[name])(u, slope), u)
        assert activation(torch.tensor([float("nan")]), slope).isnan()
    assert reference.ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("training", [True, False])
def test_conv_bn_act(training):
    x, w, b, z, weight, bias = draw(2, 3, 5, 5), draw(4, 3, 3, 3), draw(4), draw(2, 4, 3, 3), draw(4), draw(4)
    running = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    y = reference.conv_bn_act(
        x, w, *running, weight, bias, bias=b, residual=z, activation="leaky_relu", activation_arg=0.2, training=training
    )
    running = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    u = F.batch_norm(F.conv2d(x, w, b), *running, weight, bias, training)
    agree(y, F.leaky_relu(u + z, 0.2), x, w, b, z, weight, bias)


def test_without_norm_and_without_convolution():
    x, w, b, z, slopes = draw(2, 3, 5, 5), draw(4, 3, 3, 3), draw(4), draw(2, 4, 3, 3), draw(4)
    y = reference.conv_act(x, w, b, residual=z, activation="prelu", activation_arg=slopes)
    agree(y, F.prelu(F.conv2d(x, w, b) + z, slopes), x, w, b, z, slopes)
    norm = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = reference.bn_act(x, *norm, residual=x, activation="silu")
    agree(y, F.silu(F.batch_norm(x, *norm) + x), x)


WINDOWS = [
    ((2, 3, 7, 6), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((2, 3, 7, 6), {"kernel_size": 2}),
    ((1, 2, 6, 8), {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "ceil_mode": True}),
    ((1, 1, 5, 5), {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True}),
    ((3, 5, 5), {"kernel_size": 2, "stride": 1, "padding": 1}),
]


@pytest.mark.parametrize(
    ("shape", "window"), [*WINDOWS, ((1, 2, 9, 9), {"kernel_size": 3, "dilation": 2, "padding": 1, "ceil_mode": True})]
)
def test_max_pool2d(shape, window):
    x = draw(*shape)
    with torch.no_grad():
        x.mul_(2).round_()  # many ties
        x[..., 0, 0], x[..., -1, :] = float("nan"), float("-inf")
    ours, theirs = (f(x, **window, return_indices=True) for f in (reference.max_pool2d, F.max_pool2d))
    agree(ours[0], theirs[0], x)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(reference.max_pool2d(x, **window), theirs[0], equal_nan=True)


@pytest.mark.parametrize(("shape", "window"), WINDOWS)
@pytest.mark.parametrize("options", [{}, {"count_include_pad": False}, {"divisor_override": 5}])
def test_avg_pool2d(shape, window, options):
    x = draw(*shape)
    agree(reference.avg_pool2d(x, **window, **options), F.avg_pool2d(x, **window, **options), x)


@pytest.mark.parametrize("size", [1, 3, (2, 9), (None, 2), (None, None)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 6, 7)])
def test_adaptive_avg_pool2d(shape, size):
    x = draw(*shape)
    agree(reference.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x, size), x)


def test_global_avg_pool2d():
    x = draw(2, 3, 4, 5)
    agree(reference.global_avg_pool2d(x), F.adaptive_avg_pool2d(x, 1), x)
    agree(reference.global_avg_pool2d(x, keepdim=False), x.mean((2, 3)), x)
