"""batchnorm/ and moments.py against PyTorch: exactly where every sum is exact, else in float64, judged by PyTorch's
own error.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F

from cnnfast_kernels import activations, launch
from cnnfast_kernels.batchnorm import (
    apply_sums,
    batch_moments,
    channel_sum,
    combine_moments,
    combine_ranks,
    gradient_sums,
    normalize,
    normalize_backward,
    normalize_mean,
    update_running,
)
from tests.support.child import run_compiled
from tests.support.poison import embed, poisoned_workspaces

EPS = 1e-5
SLOPE = 0.1
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYOUTS = ["channels_last", "contiguous", "channels_last slice", "slice", "channels of a slice"]

SMALL = (3, 10, 5, 4)
SHAPES = {
    "several tiles, ragged": (3, 70, 7, 9),
    "2-D": (37, 5),
    "3-D": (4, 6, 11),
    "5-D": (2, 5, 3, 4, 2),
    "1x1 planes": (6, 20, 1, 1),
    "one channel": (2, 1, 5, 7),
    "few channels of high planes": (2, 3, 20, 15),
}


def arrange(t, layout):
    """A copy of `t` in this layout; slices are cut out of NaN."""
    match layout:
        case "channels_last":
            return t.contiguous(memory_format=LAST.get(t.dim(), torch.contiguous_format))
        case "channels_last slice":
            return embed(arrange(t, "channels_last"))
        case "slice":
            return embed(t)
        case "channels of a slice":
            return embed(arrange(t, "channels_last"), (0, 1, 0, 0), (0, 2, 0, 0))
    return t.contiguous()


def normal(shape, dtype, device, seed, mean=0.0, std=1.0, layout="channels_last"):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return arrange((t * std + mean).to(dtype).to(device), layout)


def integers(shape, dtype, device, seed, layout="channels_last", low=-3, high=4):
    t = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    return arrange(t.to(dtype).to(device), layout)


# prelu has no gradient in kernels: see test_prelu.
ACTIVATIONS = [a for a in activations.ACTIVATIONS if a != "prelu"]


def activate(u, activation, slope=SLOPE):
    match activation:
        case None:
            return u
        case "leaky_relu":
            return F.leaky_relu(u, slope)
        case "gelu_tanh":
            return F.gelu(u, approximate="tanh")
        case "hardsigmoid" if u.dtype == torch.float64:  # whose derivative takes float32's sixth in PyTorch
            return F.relu6(u + 3) / 6
    return getattr(F, activation)(u)


@dataclass
class Operands:
    """Those of act(batch_norm(y) + residual) and of its derivative; mean and var None: those of y."""

    y: torch.Tensor
    dz: torch.Tensor
    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def to(self, dtype):
        return Operands(*(None if t is None else t.to(dtype) for t in (getattr(self, f.name) for f in fields(self))))

    @property
    def training(self):
        return self.mean is None


def operands(
    shape,
    dtype,
    device,
    *,
    training=True,
    affine=True,
    residual=True,
    layout="channels_last",
    mean=0.0,
    std=1.0,
    parameters=None,
):
    C = shape[1]
    own = parameters or (torch.float64 if dtype == torch.float64 else torch.float32)
    o = Operands(normal(shape, dtype, device, 0, mean, std, layout), normal(shape, dtype, device, 1, layout=layout))
    if not training:
        o.mean, o.var = normal((C,), own, device, 2), normal((C,), own, device, 3).abs() + 0.5
    if affine:
        o.gamma, o.beta = normal((C,), own, device, 4), normal((C,), own, device, 5)
    if residual:
        o.residual = normal(shape, dtype, device, 6, layout=layout)
    return o


def theirs(o, activation, slope=SLOPE, eps=EPS):
    """PyTorch's z, dy, dgamma, dbeta, dresidual; None where there is no such operand."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (o.y, o.gamma, o.beta, o.residual)]
    y, gamma, beta, residual = leaves
    u = F.batch_norm(y, o.mean, o.var, gamma, beta, o.training, 0.0, eps)
    z = activate(u if residual is None else u + residual, activation, slope)
    grads = iter(torch.autograd.grad(z, [t for t in leaves if t is not None], o.dz))
    return [z.detach(), *(None if t is None else next(grads) for t in leaves)]


def ours(o, activation, slope=SLOPE, eps=EPS, keep=True, needs=None):
    """The same; `keep`: backward is given z."""
    mean, var = batch_moments(o.y) if o.training else (o.mean, o.var)
    norm = (mean, var, o.gamma, o.beta, o.residual, eps, activation, slope)
    z = normalize(o.y, *norm)
    needs = needs or (True, o.gamma is not None, o.beta is not None, o.residual is not None)
    return [z, *normalize_backward(o.dz, o.y, z if keep else None, *norm, o.training, needs)]


def assert_as_good(mine, torchs, exact):
    """Largest and root mean square error at most twice PyTorch's, plus a few units in the last place of the largest
    value.

    In float64 the judge is no better than PyTorch: there the few are more.
    """
    assert mine.shape == exact.shape
    assert mine.dtype == torchs.dtype
    unit = (32 if mine.dtype == torch.float64 else 4) * torch.finfo(mine.dtype).eps
    mine, torchs = mine.double(), torchs.double()
    assert torch.equal(mine.isnan(), exact.isnan())
    assert torch.equal(mine.isinf(), exact.isinf())
    finite = exact.isfinite()
    if finite.any():
        error, allowed = (mine - exact)[finite].abs(), (torchs - exact)[finite].abs()
        floor = unit * float(exact[finite].abs().max())
        assert error.max() <= 2 * allowed.max() + floor
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + floor / 2


def check(o, activation=None, slope=SLOPE, eps=EPS, keep=True):
    found, torchs, exact = (
        ours(o, activation, slope, eps, keep),
        theirs(o, activation, slope, eps),
        theirs(o.to(torch.float64), activation, slope, eps),
    )
    for mine, other, judge in zip(found, torchs, exact, strict=True):
        if judge is None:
            assert mine is None
        else:
            assert_as_good(mine, other, judge)
    for mine, like in zip(found[:2], torchs[:2], strict=True):
        assert mine.stride() == like.stride()
    return found


# --- statistics -------------------------------------------------------------------------------------------------------


LAYOUTS_AND_DTYPES = [
    *((layout, torch.float32) for layout in LAYOUTS),
    *(("channels_last", d) for d in DTYPES if d != torch.float32),
]


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS_AND_DTYPES)
def test_moments_are_exact(layout, dtype, device):
    """Small integers, a power of two of them in every tile and plane: nothing is rounded."""
    y = integers((4, 10, 4, 4), dtype, device, 0, layout)
    mean, var = batch_moments(y)
    assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = y.double().transpose(0, 1).flatten(1)  # var() itself rounds, even where it need not
    assert torch.equal(mean.double(), wide.mean(1))
    assert torch.equal(var.double(), (wide - wide.mean(1, True)).square().mean(1))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(
    ("dtype", "mean", "std"), [(torch.float32, 30, 0.1), (torch.float32, 300, 1e-2), (torch.float16, 30, 0.1)]
)
def test_large_mean(dtype, mean, std, layout, device):
    check(operands((5, 6, 17, 11), dtype, device, mean=mean, std=std, layout=layout), "relu")


@pytest.mark.parametrize(
    ("T", "C", "rows", "short"),
    [(1, 5, 7, 3), (2, 40, 64, 64), (128, 40, 16, 1), (129, 5, 128, 5), (128 * 128 + 3, 2, 2, 1)],
)
def test_combined_moments(T, C, rows, short, device):
    """One to three levels; the last tile stands for fewer rows."""
    counts = torch.full((T, 1), float(rows), dtype=torch.float64)
    counts[-1] = short
    mean, var = (
        normal((T, C), torch.float32, "cpu", 0, 100.0, 0.1).double(),
        normal((T, C), torch.float32, "cpu", 1).abs().double(),
    )
    total = (T - 1) * rows + short
    exact_mean = (mean * counts).sum(0) / total
    exact_var = ((var + (mean - exact_mean) ** 2) * counts).sum(0) / total
    found = combine_moments(torch.stack((mean, var), 1).float().to(device), rows, total)
    torch.testing.assert_close(found[0].double().cpu(), exact_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(found[1].double().cpu(), exact_var, rtol=2e-6, atol=0)


def test_planes_of_several_tiles(device):
    """NCHW: the last tile of every plane is shorter, not only the last of all; more tiles than one level combines."""
    y = integers((65, 3, 20, 15), torch.float32, device, 0, "contiguous")
    mean, var = batch_moments(y)
    torch.testing.assert_close(mean.double(), y.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.double(), y.double().var((0, 2, 3), correction=0), rtol=4e-6, atol=0)
    assert torch.equal(channel_sum(y).double(), y.double().sum((0, 2, 3)))


def test_tiles_that_do_not_fit_the_rows(device):
    with pytest.raises(ValueError, match="3 tiles of 16 rows do not make 49 rows"):
        combine_moments(torch.zeros(3, 2, 8, device=device), 16, 49)


def test_one_row(device):
    y = normal((1, 12, 1, 1), torch.float32, device, 0)
    mean, var = batch_moments(y)
    assert torch.equal(mean, y.flatten())
    assert torch.equal(var, torch.zeros_like(var))


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3), (0, 5)])
def test_no_rows(shape, device):
    """Callers refuse to train on no rows, as PyTorch does; what a kernel says is NaN for a mean and 0 for a sum."""
    y = torch.empty(shape, device=device)
    mean, var = batch_moments(y)
    assert mean.isnan().all()
    assert var.isnan().all()
    assert torch.equal(channel_sum(y), torch.zeros(5, device=device))
    ones = torch.ones(5, device=device)
    assert normalize(y, ones, ones, ones, ones, None, EPS, "relu", 0.0).shape == shape
    dy, dgamma, dbeta, _ = normalize_backward(
        y, y, y, ones, ones, ones, ones, None, EPS, "relu", 0.0, True, (True, True, True, False)
    )
    assert dy.shape == shape
    assert torch.equal(dgamma, ones * 0)
    assert torch.equal(dbeta, ones * 0)


# --- running statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "batch"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
    ],
)
@pytest.mark.parametrize(("C", "momentum", "count"), [(5, 0.1, 2), (130, 0.3, 50), (5, 1.0, 7), (5, 0.0, 7)])
def test_running_statistics(C, momentum, count, running, batch, device):
    mean, var = normal((C,), batch, device, 0), normal((C,), batch, device, 1).abs()
    running_mean, running_var = (embed(normal((C,), running, device, seed, 1.0)) for seed in (2, 3))
    exact = [
        (1 - momentum) * old.double() + momentum * new.double()
        for old, new in ((running_mean, mean), (running_var, var * (count / (count - 1))))
    ]
    update_running(running_mean, running_var, mean, var, momentum, count)
    tolerance = 4 * max(torch.finfo(running).eps, torch.finfo(batch).eps if running != torch.float32 else 0)
    for found, judge in zip((running_mean, running_var), exact, strict=True):
        torch.testing.assert_close(found.double(), judge, rtol=tolerance, atol=tolerance)


def test_running_statistics_of_strided_buffers(device):
    buffers = torch.zeros(6, 2, device=device)
    one = torch.ones(6, device=device)
    update_running(buffers[:, 0], buffers[:, 1], one, one * 3, 0.5, 4)
    assert torch.equal(buffers.cpu(), torch.tensor([[0.5, 2.0]]).expand(6, 2))


def test_one_value_has_no_unbiased_variance(device):
    one = torch.ones(2, device=device)
    with pytest.raises(ValueError, match="at least 2 values"):
        update_running(one, one, one, one, 0.1, 1)


# --- forward and backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, layout, device):
    check(operands(shape, torch.float32, device, layout=layout), "relu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_dtypes(training, dtype, device):
    check(operands(SMALL, dtype, device, training=training), "relu")


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16])
def test_parameters_of_half_precision(parameters, device):
    check(operands(SMALL, parameters, device, training=False, parameters=parameters), "silu")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, training, device):
    check(operands(SMALL, torch.float32, device, training=training), activation)


@pytest.mark.parametrize("activation", ["leaky_relu", "gelu", "gelu_tanh", "silu", "hardswish", "mish", "hardsigmoid"])
def test_constants_have_the_digits_of_float64(activation, device):
    check(operands(SMALL, torch.float64, device), activation)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("residual", [True, False])
def test_backward_without_the_result(residual, activation, device):
    """As PyTorch's, and to the bits that it has with the result."""
    o = operands(SMALL, torch.float16, device, residual=residual)
    for mine, expected in zip(check(o, activation, keep=False), ours(o, activation), strict=True):
        assert mine is expected is None or torch.equal(mine, expected)


# Where the choice at a kink depends on how u was rounded: half the smallest number, and half a unit below 6, ties.
BOUNDS = {
    torch.float16: (2.0**-25, 6 - 2.0**-9),
    torch.bfloat16: (2.0**-134, 6 - 2.0**-6),
    torch.float32: (2.0**-149, 6 - 2.0**-21),
    torch.float64: (5e-324, 6 - 2.0**-50),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_the_same_bits_without_the_result(activation, dtype, device):
    """u at each bound, one number of the accumulator below it and one above, from 0 and from 6, in kernels of one
    process and of a rank: z is not needed, and nor is u rounded.
    """
    own = torch.float64 if dtype == torch.float64 else torch.float32
    far = torch.tensor([-float("inf"), float("inf")], dtype=own)[:, None]
    bounds = torch.tensor([0.0, *BOUNDS[dtype], 6.0], dtype=own)
    beta = torch.cat([bounds[None], *(torch.nextafter(bounds, to.expand(4))[None] for to in far)]).flatten().to(device)
    C = len(beta)
    y = integers((5, C, 3, 2), dtype, device, 0, low=-8, high=8)
    y[:2] = 0  # in half precision u is beta, which no y can be
    mean, var = torch.zeros_like(beta), torch.ones_like(beta)
    dz = normal(y.shape, dtype, device, 1)
    norm = (mean, var, None, beta, None, 0.0, activation, SLOPE)
    z = normalize(y, *norm)
    if dtype in (torch.float16, torch.bfloat16):  # rounding decides otherwise than u
        stored = z[0, :, 0, 0]
        assert ((stored == 0) & (beta > 0)).sum() == 3
        assert ((stored == 6) & (beta < 6)).sum() == 3
    for training in (True, False):
        found, expected = (
            normalize_backward(dz, y, given, *norm, training, (True, True, True, False)) for given in (None, z)
        )
        for mine, its in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(mine, its)
    of_ranks = []
    for given in (None, z):
        sums = gradient_sums(dz, y, given, *norm)
        statistics = mean, var, torch.full((1,), 30.0, dtype=own, device=device)
        dy, _ = apply_sums(dz, y, given, statistics, *norm[2:5], sums, *norm[5:], (True, False))
        of_ranks += [sums, dy]
    assert torch.equal(of_ranks[0], of_ranks[2])
    assert torch.equal(of_ranks[1], of_ranks[3])


@pytest.mark.parametrize("slope", [-0.5, 0.0])
def test_slope_that_hides_the_sign(slope, device):
    """leaky_relu(u) does not tell the sign of u: it is computed again, although z is given."""
    check(operands(SMALL, torch.float32, device), "leaky_relu", slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("one", [False, True], ids=["each", "one"])
@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
def test_prelu(normed, one, layout, dtype, device):
    """Powers of two for slopes, of which one tile of channels does not see all: to the bit, NaN and infinities too."""
    shape = (2, 70, 3, 4)
    y, residual = (integers(shape, dtype, device, seed, layout) for seed in (0, 1))
    y[0, 1, 2, 3], y[1, 69, 0, 0], y[0, 5, 0, 0] = float("nan"), -float("inf"), -0.0
    slopes = 2.0 ** torch.arange(70, device=device).remainder(7).sub(3).to(dtype) * (-1) ** torch.arange(70).to(device)
    slopes = slopes[3:4] if one else slopes
    ones = torch.ones(70, dtype=dtype, device=device)
    norm = (ones, 4 * ones, ones, ones) if normed else (None, None, None, ones)
    z = normalize(y, *norm, residual, 0.0, "prelu", 0.0, slopes)
    u = (y.double() - 1) / 2 + 1 if normed else y.double() + 1
    assert torch.equal(z.nan_to_num(1e4), F.prelu(u + residual.double(), slopes.double()).to(dtype).nan_to_num(1e4))
    assert z.isnan().sum() == 1
    with pytest.raises(ValueError, match=r"normalize_backward\(\): prelu has no gradient here"):
        normalize_backward(y, y, None, *norm, residual, 0.0, "prelu", 0.0, False, (True, False, False, False))


def test_slopes_of_any_stride(device):
    y = integers(SMALL, torch.float32, device, 0)
    slopes = torch.stack([torch.arange(SMALL[1]) - 1.0, torch.full((SMALL[1],), float("nan"))], 1)[:, 0].to(device)
    z = normalize(y, None, None, None, None, None, 0.0, "prelu", 0.0, slopes)
    assert torch.equal(z, F.prelu(y, slopes.contiguous()))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardsigmoid", "mish"])
def test_without_statistics(activation, layout, keep, device):
    """act(y + beta + residual): what is exact, to the bit; one pass gives dy, dresidual and dbeta."""
    shape, dtype = (2, 7, 3, 5), torch.float64
    y, residual, dz = (integers(shape, dtype, device, seed, layout) for seed in range(3))
    beta = integers((7,), dtype, device, 3)
    z = normalize(y, None, None, None, beta, residual, 0.0, activation, 0.5)
    leaves = [t.clone().requires_grad_() for t in (y, beta, residual)]
    expected = activate(leaves[0] + leaves[1].view(7, 1, 1) + leaves[2], activation, 0.5)
    launched = []
    with launch.observe(lambda event: launched.append(event.kernel)):
        found = normalize_backward(
            dz, y, z if keep else None, None, None, None, beta, residual, 0.0, activation, 0.5, False,
            (True, False, True, True),
        )  # fmt: skip
    assert launched == ["normalize_backward_kernel", "combine_kernel"]
    assert found[1] is None
    right = torch.autograd.grad(expected, leaves, dz)
    for mine, its in zip((z, found[0], found[2], found[3]), (expected.detach(), right[0], *right[1:]), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-14, atol=1e-14 if activation[-1] in "hd" else 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("affine", "residual"), [(False, False), (False, True), (True, False)])
def test_optional_operands(affine, residual, training, device):
    check(operands(SMALL, torch.float32, device, training=training, affine=affine, residual=residual), "gelu")


SPECIAL = [
    -float("inf"),
    -1e6,
    -100,
    -6,
    -3.0000002,
    -3,
    -1,
    -1e-30,
    -0.0,
    0.0,
    1e-30,
    1,
    2.9999998,
    3,
    6,
    6.0000005,
    100,
    1e6,
]
SPECIAL += [float("inf"), float("nan")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_beside_a_norm(layout, dtype, device, launches):
    """That of what is stored: in half precision that of 1 + 2 ** -12 is 1."""
    shape = (3, 70, 7, 9)
    y = integers(shape, dtype, device, 0, layout)
    mean, beta = (integers((70,), torch.float32, device, seed) for seed in (1, 2))
    var, gamma = torch.full((70,), 0.25, device=device), torch.ones(70, device=device)
    beta[0], y[:, 0], mean[0] = 1 + 2.0**-12, 0, 0
    how = mean, var, gamma, beta
    expected = normalize(y, *how, None, 0.0, "leaky_relu", 0.5)
    launches.clear()
    with poisoned_workspaces():
        z, found = normalize_mean(y, *how, 0.0, "leaky_relu", 0.5)
    assert torch.equal(z, expected)
    assert z.stride() == expected.stride()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    close = 8 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), z.double().mean((0, 2, 3)), rtol=close, atol=close)
    assert {launched.kernel for launched in launches} == {"normalize_kernel", "combine_kernel"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["mish", "hardsigmoid"])
def test_every_digit_from_end_to_end(activation, dtype, device):
    """Where mish and its derivative vanish, where they are straight, and where e^u overflows or is no normal number."""
    y = torch.cat([torch.linspace(-120, 120, 961), torch.tensor([-1e30, 1e30])]).to(device, dtype)[:, None]
    zero, one = torch.zeros_like(y[0]), torch.ones_like(y[0])
    norm = (zero, one, None, None, None, 0.0, activation, 0.0)
    z = normalize(y, *norm)
    dy, *_ = normalize_backward(one.expand_as(y), y, None, *norm, False, (True, *[False] * 3))
    leaf = y.double().requires_grad_()
    expected = F.mish(leaf) if activation == "mish" else F.relu6(leaf + 3) / 6
    (derivative,) = torch.autograd.grad(expected.sum(), leaf)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # The exponential's own error grows with |u|, by which it is multiplied.
    torch.testing.assert_close(z.double(), expected.detach(), rtol=256 * eps, atol=256 * tiny)
    near_the_minimum = (leaf + 1.19).abs() < 0.5  # where two terms cancel
    torch.testing.assert_close(
        dy.double()[~near_the_minimum], derivative[~near_the_minimum], rtol=256 * eps, atol=256 * tiny
    )
    torch.testing.assert_close(dy.double(), derivative, rtol=256 * eps, atol=8 * eps)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kinks_and_special_values(activation, keep, device):
    """Mean 0, variance 1 and eps 0 make u = y: PyTorch's derivative at every kink, its NaN and its infinities."""
    y = torch.tensor(SPECIAL, device=device)[:, None].repeat(1, 3)
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    z = normalize(y, zero, one, None, None, None, 0.0, activation, SLOPE)
    dy, *_ = normalize_backward(
        one.expand_as(y),
        y,
        z if keep else None,
        zero,
        one,
        None,
        None,
        None,
        0.0,
        activation,
        SLOPE,
        False,
        (True, *[False] * 3),
    )
    leaf = y.double().requires_grad_()
    expected = activate(leaf, activation) if activation != "hardsigmoid" else F.hardsigmoid(leaf)
    (derivative,) = torch.autograd.grad(expected, leaf, torch.ones_like(leaf))
    torch.testing.assert_close(z.double(), expected.detach(), rtol=1e-5, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(dy.double(), derivative, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_channel_that_is_not_finite_stays_alone(layout, value, device):
    o = operands(SMALL, torch.float32, device, residual=False, layout=layout)
    o.y[1, 3, 2, 1] = value
    mean, var = batch_moments(o.y)
    assert not mean[3].isfinite()
    assert var[3].isnan()
    found, torchs = ours(o, "relu"), theirs(o, "relu")
    for mine, other in zip(found[:4], torchs[:4], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    check(operands(SMALL, torch.float32, device, layout=layout), "silu")


@pytest.mark.parametrize("dz", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("y", ["channels_last", "contiguous"])
def test_operands_of_different_layouts(y, dz, device):
    """Results have y's format, whatever the others' strides are."""
    o = operands(SMALL, torch.float32, device, layout=y)
    expected = ours(o, "gelu")
    o.dz = o.dz[:, :, :1, :1].expand(SMALL) if dz == "expanded" else arrange(o.dz, dz)
    o.residual = arrange(o.residual, "slice" if y == "channels_last" else "channels_last")
    if dz == "expanded":
        expected = theirs(o, "gelu")
    found = check(o, "gelu")
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", [torch.channels_last, torch.contiguous_format])
def test_format_of_the_result_can_be_named(fmt, device):
    y, one = normal(SMALL, torch.float32, device, 0), torch.ones(10, device=device)
    z = normalize(
        y, one, one, one, one, None, EPS, "relu", 0.0, out_like=torch.empty(SMALL, device=device, memory_format=fmt)
    )
    assert z.is_contiguous(memory_format=fmt)
    torch.testing.assert_close(z, F.relu((y - 1) / (1 + EPS) ** 0.5 + 1))


@pytest.mark.parametrize(
    ("activation", "training"), [(None, True), ("relu", True), ("silu", True), (None, False), ("relu", False)]
)
def test_each_gradient_alone_is_that_of_all(activation, training, device, launches):
    """Every mask: the same bits, and no pass over memory that nothing asks for."""
    o = operands((2, 5, 3, 2), torch.float32, device, training=training)
    everything = ours(o, activation)[1:]
    for needs in itertools.product([False, True], repeat=4):
        before = len(launches)
        found = ours(o, activation, needs=needs)[1:]
        kernels = [event.kernel for event in launches[before:]]
        for mine, expected, need in zip(found, everything, needs, strict=True):
            assert (mine is not None) == need
            assert mine is None or torch.equal(mine, expected)
        dy, dgamma, dbeta, dresidual = needs
        passes = dy or (dresidual and activation is not None)  # without an activation dresidual is dz itself
        alone = dbeta and not passes  # otherwise the pass that computes dy or dresidual adds up dbeta
        assert ("gradient_sums_kernel" in kernels) == (dgamma or alone or (dy and training))
        assert ("normalize_backward_kernel" in kernels) == (dy or (dresidual and activation is not None))
    if activation is None:
        assert everything[3] is o.dz


def test_frozen_backward_needs_no_y(device):
    """What the fused convolution of inference keeps: its result, not the argument of batch norm."""
    o = operands(SMALL, torch.float32, device, training=False)
    z, dy, _, dbeta, dresidual = ours(o, "relu")
    norm = (o.mean, o.var, o.gamma, o.beta, None, EPS, "relu", 0.0)
    found = normalize_backward(o.dz, None, z, *norm, False, (True, False, True, True))
    for mine, expected in zip(found, (dy, None, dbeta, dresidual), strict=True):
        assert mine is expected is None or torch.equal(mine, expected)


@pytest.mark.parametrize(("layout", "dtype"), [*LAYOUTS_AND_DTYPES, ("expanded", torch.float32)])
def test_channel_sum_is_exact(layout, dtype, device):
    dy = integers(SMALL, dtype, device, 0, "contiguous" if layout == "expanded" else layout)
    dy = dy[:1, :, :1, :1].expand(SMALL) if layout == "expanded" else dy
    found = channel_sum(dy)
    assert found.dtype == dtype
    assert torch.equal(found.double(), dy.double().sum((0, 2, 3)))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_same_inputs_same_bits(layout, device):
    o = operands((3, 20, 5, 4), torch.float32, device, layout=layout)
    for a, b in zip(ours(o, "gelu"), ours(o, "gelu"), strict=True):
        assert torch.equal(a, b)


# --- a batch in parts, one a rank -------------------------------------------------------------------------------------


def told(parts):
    """What ranks with these parts of a batch tell one another: means, variances and count of each."""
    rows = [(*batch_moments(y), torch.full((1,), y.numel() / y.shape[1], device=y.device)) for y in parts]
    return torch.stack([torch.cat([t.to(mean) for t in (mean, var, count)]) for mean, var, count in rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("counts", [(16,), (0, 4, 8, 4), (8, 0, 8), (1, 1, 2, 4, 8)], ids=str)
def test_ranks_are_combined_exactly(counts, dtype, device):
    """Small integers, of which there are powers of two: nothing is rounded. The mean of a rank without rows is NaN."""
    parts = [integers((n, 5, 2, 2), dtype, device, seed) for seed, n in enumerate(counts)]
    running_mean, running_var = (embed(torch.full((5,), 4.0, dtype=parts[0].dtype, device=device)) for _ in "mv")
    mean, var, count = combine_ranks(told(parts), running_mean, running_var, 0.5)
    wide = torch.cat(parts).double().transpose(0, 1).flatten(1)
    exact = wide.mean(1), (wide - wide.mean(1, True)).square().mean(1)
    assert count.item() == 64
    assert torch.equal(mean.double(), exact[0])
    assert torch.equal(var.double(), exact[1])
    tolerance = 4 * torch.finfo(running_mean.dtype).eps
    torch.testing.assert_close(running_mean.double(), 2 + exact[0] / 2, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(running_var.double(), 2 + exact[1] / 2 * 64 / 63, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("ranks", "C"), [(2, 1), (3, 130), (129, 5)])
@pytest.mark.parametrize("empty_first", [False, True])
def test_ranks_whose_means_are_far_from_zero(ranks, C, empty_first, device):
    """A spread that float32 hardly holds beside the mean, counts that differ: relative to zero it would be lost."""
    counts = (torch.arange(ranks, dtype=torch.float64)[:, None] + (not empty_first)) * 3
    mean = normal((ranks, C), torch.float32, "cpu", 0, 3e4, 0.1).double()
    var = normal((ranks, C), torch.float32, "cpu", 1).abs().double() * 1e-4
    exact_mean = (mean * counts).sum(0) / counts.sum()
    exact_var = ((var + (mean - exact_mean) ** 2) * counts).sum(0) / counts.sum()
    gathered = torch.cat((mean, var, counts), 1).float()
    if empty_first:
        gathered[0, :-1] = float("nan")
    found_mean, found_var, count = combine_ranks(gathered.to(device), None, None, 0.1)
    torch.testing.assert_close(found_mean.double().cpu(), exact_mean, rtol=2e-7, atol=0)
    error = (found_mean.double().cpu() - exact_mean).abs()  # of a mean that float32 rounds
    assert ((found_var.double().cpu() - exact_var).abs() <= 4e-6 * exact_var + error**2).all()
    assert count.item() == counts.sum()


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 1, 0)], ids=str)
def test_running_statistics_outlast_a_batch_without_a_variance(counts, device):
    """None has a row, or one has one: no unbiased variance, which would be NaN for good."""
    parts = [normal((n, 3), torch.float32, device, 0) for n in counts]
    running = [torch.ones(3, device=device) for _ in "mv"]
    mean, var, count = combine_ranks(told(parts), *running, 0.1)
    assert count.item() == sum(counts)
    for t in running:
        assert torch.equal(t, torch.ones_like(t))
    if sum(counts):
        assert torch.equal(mean, torch.cat(parts)[0])
        assert torch.equal(var, torch.zeros_like(var))
    else:
        assert mean.isnan().all()
        assert var.isnan().all()


def test_running_statistics_of_ranks_are_strided(device):
    buffers = torch.zeros(6, 2, device=device)
    gathered = torch.tensor([[1.0] * 6 + [3.0] * 6 + [4.0]], device=device)
    combine_ranks(gathered, buffers[:, 0], buffers[:, 1], 0.5)
    assert torch.equal(buffers.cpu(), torch.tensor([[0.5, 2.0]]).expand(6, 2))


def parts_of(o, counts):
    """The operands of ranks with so many images each."""
    names = [name for name in ("y", "dz", "residual") if getattr(o, name) is not None]
    split = {name: getattr(o, name).split(list(counts)) for name in names}
    return [replace(o, **{name: split[name][rank] for name in names}) for rank in range(len(counts))]


def in_parts(o, counts, activation, keep=True, needs=(True, True)):
    """`ours`, by ranks with so many images each: z, dy and dresidual put together again, dgamma and dbeta summed."""
    parts = parts_of(o, counts)
    mean, var, count = combine_ranks(told([p.y for p in parts]), None, None, 0.1)
    how = EPS, activation, SLOPE
    z = [normalize(p.y, mean, var, p.gamma, p.beta, p.residual, *how) for p in parts]
    kept = z if keep and activation is not None else [None] * len(parts)
    operands = [(p.dz, p.y, k) for p, k in zip(parts, kept, strict=True)]
    sums = sum(
        gradient_sums(*t, mean, var, p.gamma, p.beta, p.residual, *how) for t, p in zip(operands, parts, strict=True)
    )
    grads = [
        apply_sums(*t, (mean, var, count), p.gamma, p.beta, p.residual, sums, *how, needs)
        for t, p in zip(operands, parts, strict=True)
    ]
    dy, dresidual = (torch.cat(each) if each[0] is not None else None for each in zip(*grads, strict=True))
    return [torch.cat(z), dy, sums[1], sums[0], dresidual]


@pytest.mark.parametrize("layout", ["channels_last", "channels_last slice", "contiguous"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_one_rank_computes_what_a_process_without_ranks_does(activation, layout, device):
    """The same bits, dresidual without an activation aside, which is dz itself."""
    o = operands(SMALL, torch.float32, device, layout=layout)
    keep = activation == "relu"
    for mine, expected in zip(in_parts(o, (3,), activation, keep), ours(o, activation, keep=keep), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("counts", [(1, 4), (0, 5), (2, 0, 3)], ids=str)
@pytest.mark.parametrize(("activation", "keep"), [(None, False), ("relu", True), ("silu", False)])
def test_ranks_compute_what_one_process_does(activation, keep, counts, dtype, device):
    o = operands((5, 10, 3, 4), dtype, device)
    found, torchs = in_parts(o, counts, activation, keep), theirs(o, activation)
    for mine, other, judge in zip(found, torchs, theirs(o.to(torch.float64), activation), strict=True):
        assert_as_good(mine.to(other.dtype), other, judge)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_a_rank_is_asked_for_some_gradients(needs, device):
    o = operands(SMALL, torch.float32, device)
    everything = in_parts(o, (1, 2), "silu", False)
    found = in_parts(o, (1, 2), "silu", False, needs)
    for mine, expected, need in zip(found[1::3], everything[1::3], needs, strict=True):
        assert (mine is not None) == need
        assert mine is None or torch.equal(mine, expected)


# --- compiled ---------------------------------------------------------------------------------------------------------


def compile_for_two_images() -> list:
    """[kernels of one image size, further ones of another], loads and stores of normalize in half precision, and
    [fused multiply-adds a thread of normalize, of both passes of its gradient without its result].
    """
    import re

    import torch

    from cnnfast_kernels.aot.stub_driver import stub_driver
    from cnnfast_kernels.batchnorm import batch_moments, normalize, normalize_backward

    counts = []
    with stub_driver(arch=90) as gpu:
        for n, h, w in ((64, 56, 56), (33, 61, 83)):
            y = torch.empty(n, 64, h, w, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
            mean, var = batch_moments(y)
            normalize(y, mean, var, None, None, y, 1e-5, "relu", 0.0)
            counts.append(gpu.compiles)
        # without gamma, invstd makes both the activation's argument and xhat, whose product is no sum's
        norm = mean, var, None, mean, None, 1e-5, "relu", 0.0
        normalize(y, *norm)
        normalize_backward(y, y, None, *norm, True, (True, False, True, False))
    sources = [k.asm["ptx"] for k in gpu.compiled[counts[-1] :]]
    passes = [
        s
        for name in ("normalize_kernel", "gradient_sums", "normalize_backward")
        for s in sources
        if f".entry {name}" in s
    ]
    fused = [len(re.findall(r"fma\.rn\.f32", source)) for source in passes]
    ptx = next(k.asm["ptx"] for k in gpu.compiled if "normalize_kernel" in k.asm["ptx"])
    wide = re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", ptx)
    narrow = re.findall(r"(?:ld|st)\.global\S*\.b16", ptx)
    return [counts[0], counts[1] - counts[0], len(wide) > 0, len(narrow), fused]


@pytest.mark.compiled
def test_vector_loads_and_no_recompilation():
    first, further, wide, narrow, fused = run_compiled(compile_for_two_images)
    assert first == 3  # one tile's moments, a level that combines them, normalize
    assert further == 0
    assert wide
    assert narrow == 0
    # the argument of the activation is rounded once after the product, in all three passes: 32 elements a thread
    assert fused == [32, 32, 64]
