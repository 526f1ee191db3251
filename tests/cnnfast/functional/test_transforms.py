"""torch.func's transforms, forward-mode AD and batched gradients give PyTorch's numbers, around a call and around its
backward alone.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as theirs
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import cnnfast
import cnnfast.functional as ours
import cnnfast.nn as cnn
from tests.support.agreement import leaf, normal

SERVED = {("torch", "a functorch transform or forward-mode AD is active")}


@functools.cache
def on(device: torch.device) -> SimpleNamespace:
    """What the calls below are given besides their input, on its device."""
    X, W, V = normal(2, 4, 5, 4), normal(6, 2, 3, 2, seed=1), normal(4, 2, 3, 2, seed=2)
    tensors = {"X": X, "W": W, "V": V, "GAIN": normal(4, seed=3).abs(), "SHIFT": normal(4, seed=4)}
    return SimpleNamespace(**{name: t.to(device) for name, t in tensors.items()})


def composition(x, w, mean, var, g=None, b=None, *, residual=None, activation="relu", training=False, **geometry):
    y = theirs.batch_norm(theirs.conv2d(x, w, **geometry), mean, var, g, b, training)
    return getattr(theirs, activation)(y if residual is None else y + residual)


PYTORCH = SimpleNamespace(
    **vars(theirs) | {"conv_bn_act": composition, "global_avg_pool2d": lambda x: x.mean((2, 3), keepdim=True)}
)
FUSED = {"stride": (2, 1), "padding": (1, 0), "groups": 2}
# Of one input x each, and of t, which on() makes; f is ours or PyTorch's.
OPERATIONS = {
    "conv2d": lambda f, x, t: f.conv2d(x, t.W, None, (2, 1), "valid", (1, 2), 2),
    "conv2d same": lambda f, x, t: f.conv2d(x, t.W, t.SHIFT.repeat(2)[:6], 1, "same", 1, 2),
    "conv2d's weight": lambda f, x, t: f.conv2d(t.X, x.reshape(4, 4, 5, 2), None, 1, 1),
    "conv1d": lambda f, x, t: f.conv1d(x[..., 0], t.W[..., 0], None, 2, 1, 1, 2),
    "conv_transpose2d": lambda f, x, t: f.conv_transpose2d(x, t.V, t.SHIFT, 2, 1, (1, 0), 2),
    "conv_transpose2d's bias": lambda f, x, t: f.conv_transpose2d(t.X, t.V, x.flatten()[:4], 2, 1, (1, 0), 2),
    "conv_bn_act training": lambda f, x, t: f.conv_bn_act(
        x, t.W, None, None, activation="gelu", training=True, **FUSED
    ),
    "conv_bn_act training relu": lambda f, x, t: f.conv_bn_act(
        x, t.V, None, None, t.GAIN, t.SHIFT, training=True, padding=(1, 0), groups=2
    ),
    "conv_bn_act eval": lambda f, x, t: f.conv_bn_act(
        x, t.V, t.SHIFT, t.GAIN, t.GAIN, t.SHIFT, activation="relu6", groups=2
    ),
    "conv_bn_act residual": lambda f, x, t: f.conv_bn_act(
        x[..., :1], t.V[..., :1, :1], t.SHIFT, t.GAIN, residual=x[..., :1], groups=2
    ),
    "batch_norm training": lambda f, x, t: f.batch_norm(x, None, None, t.GAIN, t.SHIFT, True),
    "batch_norm weight": lambda f, x, t: f.batch_norm(t.X, None, None, x.flatten()[:4], x.flatten()[4:8], True),
    "batch_norm eval": lambda f, x, t: f.batch_norm(x, t.SHIFT, t.GAIN, t.GAIN, t.SHIFT),
    "max_pool2d": lambda f, x, t: f.max_pool2d(x, (3, 2), (2, 1), 1, 1, True),
    "avg_pool2d": lambda f, x, t: f.avg_pool2d(x, 3, 2, 1, True, False),
    "adaptive_avg_pool2d": lambda f, x, t: f.adaptive_avg_pool2d(x, (3, 6)),
    "global_avg_pool2d": lambda f, x, t: f.global_avg_pool2d(x),
}


CALLS = {
    name: functools.partial(lambda call, f, x: call(f, x, on(x.device)), call) for name, call in OPERATIONS.items()
}


def around_the_call(f, x):
    """Each transform, of a function that calls f."""
    v = normal(*x.shape, seed=9).to(x)

    def loss(x):
        return f(x).pow(3).sum()

    yield grad(loss)(x)
    yield vmap(f)(torch.stack([x, v]))
    yield from jvp(f, (x,), (v,))
    y, pull = vjp(f, x)
    yield pull(torch.ones_like(y))[0]
    yield jvp(grad(loss), (x,), (v,))[1]
    yield vmap(grad(loss))(torch.stack([x, v]))
    with forward_ad.dual_level():
        yield forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


@pytest.mark.parametrize("name", CALLS)
def test_around_the_call(name, device):
    """PyTorch serves the call, with its own bits."""
    x = on(device).X
    with cnnfast.trace() as trace:
        mine = list(around_the_call(lambda x: CALLS[name](ours, x), x))
    torch.testing.assert_close(
        mine, list(around_the_call(lambda x: CALLS[name](PYTORCH, x), x)), rtol=1e-12, atol=1e-12
    )
    assert {(call.served_by, call.reason) for call in trace} == SERVED


def around_the_backward(f, x):
    """Transforms of a backward whose forward ran before them."""
    x = leaf(x)
    y = f(x)
    dys = normal(2, *y.shape, seed=9).to(y)

    def pull(dy, create_graph=False):
        return torch.autograd.grad(y, x, dy, retain_graph=True, create_graph=create_graph)[0]

    yield vmap(pull)(dys)
    yield jvp(pull, (dys[0],), (dys[1],))[1]
    yield vjp(lambda dy: pull(dy, True), dys[0])[1](x.detach())[0]
    yield jvp(grad(lambda dy: pull(dy, True).square().sum()), (dys[0],), (dys[1],))[1]
    with forward_ad.dual_level():
        yield forward_ad.unpack_dual(pull(forward_ad.make_dual(dys[0], dys[1]))).tangent


@pytest.mark.parametrize("name", CALLS)
def test_around_the_backward(name, device):
    """What our operators recorded is differentiated by PyTorch's, and the trace says so."""
    x = on(device).X
    with cnnfast.trace() as trace:
        mine = list(around_the_backward(lambda x: CALLS[name](ours, x), x))
    right = list(around_the_backward(lambda x: CALLS[name](PYTORCH, x), x))
    torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)
    assert trace.calls[0].served_by == "kernels"
    assert {(call.served_by, call.reason) for call in trace} <= {("kernels", ""), *SERVED}


def test_backend_kernels_refuses_a_transformed_backward(device):
    x = leaf(on(device).X)
    with cnnfast.backend("kernels"):
        y = ours.avg_pool2d(x, 2)
        with pytest.raises(RuntimeError, match="functorch transform"):
            vmap(lambda dy: torch.autograd.grad(y, x, dy))(torch.ones(1, *y.shape).to(y))


@pytest.mark.parametrize("name", CALLS)
def test_batched_gradients(name, device):
    """is_grads_batched, one gradient after the other by our kernels."""
    results = []
    for f in (ours, PYTORCH):
        x = leaf(on(device).X)
        y = CALLS[name](f, x)
        with cnnfast.trace() as trace:
            results.append(torch.autograd.grad(y, x, normal(3, *y.shape, seed=9).to(y), is_grads_batched=True)[0])
        assert {call.served_by for call in trace} == ({"kernels"} if f is ours else set())
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jacobians_and_hessians(device):
    x, w = on(device).X[:1, :2, :3, :2], on(device).W[:2, :, :2, :1]
    results = []
    for f in (ours, PYTORCH):

        def call(w, f=f):
            return f.max_pool2d(f.conv2d(x, w) ** 3, (2, 1))

        def loss(w, call=call):
            return call(w).sum()

        results.append([jacrev(call)(w), jacfwd(call)(w), hessian(loss)(w)])
        results[-1] += [
            jacobian(call, w),
            jacobian(call, w, vectorize=True),
            torch.autograd.functional.hessian(loss, w, vectorize=True),
        ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_functional_call(device):
    """An ensemble of a module's parameters, by vmap; and gradients for each sample."""
    model = (
        torch.nn.Sequential(cnn.Conv2d(4, 3, 2), cnn.BatchNorm2d(3), cnn.AvgPool2d(2)).to(device, torch.float64).eval()
    )
    state = {name: torch.stack([t, 2 * t]) for name, t in (*model.named_parameters(), *model.named_buffers())}
    x = on(device).X
    mine = vmap(lambda state: functional_call(model, state, x))(state)
    for i in (0, 1):
        torch.testing.assert_close(
            mine[i], functional_call(model, {name: t[i] for name, t in state.items()}, x), rtol=1e-12, atol=1e-12
        )
    parameters = dict(model.named_parameters())
    each = vmap(grad(lambda p, x: functional_call(model, p, x[None]).square().sum()), (None, 0))(parameters, x)
    for i in range(len(x)):
        one = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(parameters.values()))
        torch.testing.assert_close([g[i] for g in each.values()], list(one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv2d", "conv_bn_act training", "max_pool2d"])
def test_compiled(name, device):
    """The transform inside what is compiled."""
    torch._dynamo.reset()
    t, call = on(device), OPERATIONS[name]
    results = []
    for f in (ours, PYTORCH):

        def both(x, f=f):
            return grad(lambda x: call(f, x, t).square().sum())(x), vmap(lambda x: call(f, x, t))(x[None])

        results.append(torch.compile(both, fullgraph=True, backend="aot_eager")(t.X))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
