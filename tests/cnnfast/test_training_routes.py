"""Both routes of a layer's training against PyTorch: exact where nothing is rounded, and rounded where they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnnfast.reference.training_routes import gram_conv_bn_act, ordinary_conv_bn_act, scaled_for
from tests.support.agreement import normal

EPS = 1e-3
NAMES = ("x", "w", "gamma", "beta", "residual")


def operands(x, w, z, residual, dtype=torch.float64):
    """x, w, gamma, beta and residual, or None, whose means are not zero; parameters of channels at least float32."""
    of_channels = torch.promote_types(dtype, torch.float32)
    given = [normal(*x, seed=1) + 0.7, normal(*w, seed=2), normal(w[0], seed=3), normal(w[0], seed=4), None]
    if residual:
        given[4] = normal(*z, seed=5)
    return [None if t is None else t.to(of_channels if t.dim() == 1 else dtype).requires_grad_() for t in given]


def by_pytorch(x, w, gamma, beta, residual, eps, activation, *geometry):
    y = F.conv2d(x, w, None, *geometry)
    u = F.batch_norm(y, None, None, gamma, beta, True, eps=eps)
    u = u if residual is None else u + residual
    return u.relu() if activation else u, y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)


def outcome(route, given, activation, *geometry):
    """(z, mean, var) and the gradients of what was given, from a dz that every dtype holds."""
    z, mean, var = route(*given, EPS, activation, *geometry)
    dz = (normal(*z.shape, seed=6) * 16).round() / 16
    grads = torch.autograd.grad(z, [t for t in given if t is not None], dz.to(z.dtype))
    names = [name for name, t in zip(NAMES, given, strict=True) if t is not None]
    return {"z": z.detach(), "mean": mean.detach(), "var": var.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize(
    ("route", "x", "w", "geometry"),
    [
        (gram_conv_bn_act, (3, 4, 5, 6), (7, 4, 1, 1), (1,)),
        (gram_conv_bn_act, (2, 3, 7, 6), (5, 3, 1, 1), ((2, 3),)),
        (ordinary_conv_bn_act, (3, 4, 5, 6), (7, 4, 1, 1), (1,)),
        (ordinary_conv_bn_act, (2, 4, 7, 6), (6, 2, 3, 3), (2, 1, 1, 2)),
        (ordinary_conv_bn_act, (2, 3, 7, 8), (5, 3, 3, 2), ((1, 2), (2, 0), (2, 1))),
    ],
    ids=["gram", "gram strided", "ordinary 1x1", "ordinary grouped", "ordinary dilated"],
)
def test_without_rounding_they_are_pytorchs_derivatives(route, x, w, geometry, activation, residual):
    shape = F.conv2d(torch.empty(x, device="meta"), torch.empty(w, device="meta"), None, *geometry).shape
    given = operands(x, w, shape, residual)
    mine, right = (outcome(function, given, activation, *geometry) for function in (route, by_pytorch))
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_where_they_round(dtype):
    """Images are of the dtype and what is a channel's of the accumulators'. The ordinary route's statistics, and sums
    for gamma and w, are those of rounded tensors; the Gram route's are not. There is no ReLU, whose kink would let
    pixels jump.
    """
    given = operands((8, 16, 12, 12), (64, 16, 1, 1), (8, 64, 12, 12), True, dtype)
    given[1] = given[1].detach().float().requires_grad_()  # as it is kept where weights are rounded for products only
    exact = [t.detach().double().requires_grad_() for t in given]
    right = outcome(by_pytorch, exact, None, 1)
    found = {route: outcome(route, given, None, 1) for route in (ordinary_conv_bn_act, gram_conv_bn_act)}
    ordinary, gram = (
        {name: float((t.double() - right[name]).norm() / right[name].norm()) for name, t in tensors.items()}
        for tensors in found.values()
    )
    unit = torch.finfo(dtype).eps
    for tensors in found.values():
        assert {tensors[name].dtype for name in ("z", "x", "residual")} == {dtype}
        assert {tensors[name].dtype for name in ("mean", "var", "w", "gamma", "beta")} == {torch.float32}
    for off in (ordinary, gram):
        assert unit / 16 < off["z"] < unit / 2
        assert unit / 16 < off["x"] < unit
        assert off["residual"] == 0
        assert off["beta"] < 1e-6
    assert max(gram[name] for name in ("mean", "var", "gamma", "w")) < 1e-5
    assert min(ordinary[name] for name in ("var", "gamma", "w")) > unit / 100
    rounded = F.conv2d(given[0].float(), given[1]).to(dtype).float().mean((0, 2, 3))
    torch.testing.assert_close(found[ordinary_conv_bn_act]["mean"], rounded, rtol=1e-5, atol=1e-6)


def test_what_float16_could_not_hold_is_scaled():
    v = torch.tensor([[3e-9, 0.0, -5e4], [-1e-9, 0.0, 7e4]])
    scaled, powers = scaled_for(torch.float16, v)
    assert scaled.dtype == torch.float16
    assert scaled.abs().amax(0).tolist() == pytest.approx([3e-9 * 2**28, 0.0, 7e4 / 2**17], rel=1e-3)
    assert powers.tolist() == [2.0**-28, 1.0, 2.0**17]
    torch.testing.assert_close(scaled * powers, v, rtol=1e-3, atol=0.0)


def test_the_gram_route_in_float16_keeps_what_is_of_the_size_of_one_pixel_of_many():
    """V is of the size of 1 / M: unscaled it would be zero here, and with it dx's part that makes the norm's two sums
    vanish.
    """
    given = operands((4, 2, 64, 64), (3, 2, 1, 1), (4, 3, 64, 64), False, torch.float16)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    small = 2.0**-8  # of dz
    grads = []
    for route, inputs in ((gram_conv_bn_act, given), (by_pytorch, exact)):
        z = route(*inputs, EPS, None, 1)[0]
        dz = (small * (1 + normal(*z.shape, seed=7) + z.detach().double())).to(torch.float16).to(z.dtype)
        grads.append(torch.autograd.grad(z, inputs[0], dz)[0].double())
    mine, right = grads
    assert float((mine - right).norm() / right.norm()) < 2 * torch.finfo(torch.float16).eps
