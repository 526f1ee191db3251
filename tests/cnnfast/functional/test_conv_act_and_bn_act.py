"""functional.conv_act and functional.bn_act, and prelu in all functions that take it, against PyTorch's functions."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import cnnfast
import cnnfast.functional as ours
from tests.support.activations import ACTIVATIONS
from tests.support.agreement import (
    assert_bits,
    assert_close,
    assert_same_strides,
    assert_served_by_kernels,
    exact,
    integers,
    normal,
    run,
    saved_bytes,
)
from tests.support.convolutions import arrange

FROM_OUTPUT = ("relu", "leaky_relu", "relu6")
GEOMETRIES = {
    "groups": ({"stride": (1, 2), "padding": 1, "groups": 2}, (2, 4, 5, 4), (6, 2, 3, 3)),
    "depthwise": ({"padding": "same", "groups": 4}, (2, 4, 5, 4), (8, 1, 2, 3)),
    "dense, same with an even kernel": ({"padding": "same"}, (2, 3, 4, 5), (5, 3, 2, 2)),
}


def operands(geometry="groups", dtype=torch.float64, device="cpu", fmt=torch.contiguous_format, draw=normal):
    """x, w, bias, residual."""
    options, x_shape, w_shape = GEOMETRIES[geometry]
    x, w, bias = draw(*x_shape, dtype=dtype), draw(*w_shape, seed=1, dtype=dtype), draw(w_shape[0], seed=2, dtype=dtype)
    residual = draw(*F.conv2d(x, w, **options).shape, seed=3, dtype=dtype)
    return [
        t.to(device).contiguous(memory_format=fmt) if t.dim() == 4 else t.to(device) for t in (x, w, bias, residual)
    ]


def fused(geometry="groups", **options):
    return lambda x, w, b, r: ours.conv_act(x, w, b, **GEOMETRIES[geometry][0], residual=r, **options)


def composed(geometry="groups", activation="relu", act=None):
    act = act or ACTIVATIONS[activation]

    def call(x, w, b, r):
        y = F.conv2d(x, w, b, **GEOMETRIES[geometry][0])
        return act(y if r is None else y + r)

    return call


# ----------------------------------------------------------------------------------------------------------------------
# conv_act


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_conv_act(activation, geometry, device):
    """The result, all gradients, and what is launched for them."""
    inputs = operands(geometry, device=device)
    mine = run(fused(geometry, activation=activation), inputs)
    assert_close(mine, run(composed(geometry, activation), inputs))
    assert_served_by_kernels(mine.trace)
    one = activation is None or activation in FROM_OUTPUT
    assert mine.operations[:2] == (["conv_act", *mine.operations[1:2]] if one else ["conv_fprop", "normalize"])
    passes = [name for name in mine.trace.launches if name.startswith(("normalize_b", "gradient_sums"))]
    # of dy, dresidual and dbias; without an activation dy and dresidual are dz, and there is a sum left
    assert passes == ["gradient_sums_kernel" if activation is None else "normalize_backward_kernel"]


@pytest.mark.parametrize("absent", [(2,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_without(absent, activation, device):
    inputs = [None if i in absent else t for i, t in enumerate(operands(device=device))]
    assert_close(run(fused(activation=activation), inputs), run(composed(activation=activation), inputs))


def test_neither_activation_nor_residual_is_a_convolution(device):
    x, w, b, _ = operands(device=device)
    mine = run(fused(activation=None), [x, w, b, None])
    assert mine.operations[0] == "conv_fprop"
    assert_close(mine, run(composed(activation=None), [x, w, b, None]))


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2,), (3,), (0, 1, 2), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_frozen(frozen, activation, device):
    inputs = operands(device=device)
    mine = run(fused(activation=activation), inputs, frozen)
    assert_close(mine, run(composed(activation=activation), inputs, frozen))
    assert ("conv_dgrad" in mine.operations) == (0 not in frozen)
    assert ("conv_wgrad" in mine.operations) == (1 not in frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "relu6"], ids=str)
def test_to_the_bit(activation, dtype, device):
    """Integers, also where an activation bends: one kernel, and residual and bias before the activation."""
    inputs = operands(dtype=dtype, device=device, draw=integers)
    slope = {"activation_arg": 0.5} if activation == "leaky_relu" else {}
    act = functools.partial(F.leaky_relu, negative_slope=0.5) if slope else ACTIVATIONS[activation]
    mine = run(fused(activation=activation, **slope), inputs)
    assert_bits(mine, exact(composed(act=act), inputs))
    assert mine.operations[0] == "conv_act"


@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_layouts(activation, device):
    """Operands in any order of axes, cut out of NaN; results and gradients laid out as PyTorch's."""
    x, w, b, r = operands(device=device)
    inputs = [arrange(x, "transposed"), arrange(w, "nchw"), b, arrange(r, "batch_last")]
    for algorithm in ("auto", "im2col"):
        assert_close(
            run(fused(activation=activation, algorithm=algorithm), inputs), run(composed(activation=activation), inputs)
        )
    for fmt in (torch.contiguous_format, torch.channels_last):
        inputs = operands(device=device, fmt=fmt)
        assert_same_strides(run(fused(activation=activation), inputs), run(composed(activation=activation), inputs))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)], ids=str)
def test_saved_bytes(frozen, activation, device):
    inputs = operands(dtype=torch.float32, device=device)
    for residual in (None, inputs[3]):
        given = [*inputs[:3], residual]
        mine = saved_bytes(fused(activation=activation), given, frozen)
        theirs = saved_bytes(composed(activation=activation), given, frozen)
        # what gelu was applied to is computed again from the convolution's result, residual and bias, which live anyway
        more = 0 if activation == "relu" else inputs[2].nbytes + (0 if residual is None else residual.nbytes)
        assert mine <= theirs + more


def test_number_of_launches(device):
    with torch.no_grad():
        for activation in ("relu", "gelu", "mish"):
            mine = run(fused(activation=activation), operands(device=device), range(4))
            assert mine.trace.launches == ["conv_fprop_kernel"]
            assert mine.operations == ["conv_act"]


def test_gradients_of_hardsigmoid_differ_from_pytorchs_by_float32s_sixth(device):
    u = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=device, requires_grad=True)
    y = ours.bn_act(u, torch.zeros(1).to(u), torch.ones(1).to(u), eps=0.0, activation="hardsigmoid")
    (mine,) = torch.autograd.grad(y, u)
    assert mine.item() == 1 / 6


# ----------------------------------------------------------------------------------------------------------------------
# bn_act

SHAPES = [(6, 5), (2, 5, 6), (2, 5, 3, 4), (2, 5, 2, 3, 2)]


def norm_operands(shape, dtype=torch.float64, device="cpu"):
    """x, weight, bias, residual."""
    C = shape[1]
    drawn = (normal(*size, seed=i, dtype=dtype) for i, size in enumerate((shape, (C,), (C,), shape)))
    return [t.to(device) for t in drawn]


def statistics(C, dtype=torch.float64, device="cpu"):
    return normal(C, seed=5, dtype=dtype).to(device), normal(C, seed=6, dtype=dtype).abs().add(0.5).to(device)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "mish", "hardsigmoid"], ids=str)
def test_bn_act(activation, shape, training, device):
    """The result, all gradients and the running statistics; one pass over memory after the statistics'."""
    inputs, stats, expected = norm_operands(shape, device=device), *(statistics(5, device=device) for _ in range(2))

    def call(x, w, b, r):
        return ours.bn_act(x, *stats, w, b, training, residual=r, activation=activation)

    def right(x, w, b, r):
        return ACTIVATIONS[activation](F.batch_norm(x, *expected, w, b, training) + r)

    mine = run(call, inputs)
    assert_close(mine, run(right, inputs))
    torch.testing.assert_close(stats, expected, rtol=1e-12, atol=1e-12)
    assert_served_by_kernels(mine.trace)
    forward = ["batch_moments", "update_running", "normalize"] if training else ["normalize"]
    assert mine.operations[: len(forward)] == forward
    with torch.no_grad():
        launches = run(call, inputs, range(4)).trace.launches
    assert launches.count("normalize_kernel") == 1
    assert len(launches) == (4 if training else 1)


def test_frozen_norm_takes_one_pass_back(device):
    """Without dgamma, dbeta comes from the pass that computes the other gradients."""
    inputs, stats = norm_operands((2, 5, 3, 4), device=device), statistics(5, device=device)
    for activation in ("relu", "silu"):
        mine = run(
            lambda x, w, b, r, a=activation: ours.bn_act(x, *stats, w, b, residual=r, activation=a), inputs, (1,)
        )
        act = ACTIVATIONS[activation]
        assert_close(mine, run(lambda x, w, b, r, act=act: act(F.batch_norm(x, *stats, w, b) + r), inputs, (1,)))
        assert mine.trace.launches == ["normalize_kernel", "normalize_backward_kernel", "combine_kernel"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "hardswish"], ids=str)
def test_a_norm_keeps_its_input(activation, training, device):
    """And of the result nothing, unless there is a residual, without which it is computed again."""
    x, w, b, r = norm_operands((2, 5, 30, 4), torch.float32, device)
    stats = statistics(5, torch.float32, device)

    def call(x, w, b, r):
        return ours.bn_act(x, *stats, w, b, training, residual=r, activation=activation)

    channels = (3 if activation is None else 4) * w.nbytes  # mean, var, weight, and what u is made of
    assert saved_bytes(call, [x, w, b, None]) == x.nbytes + channels
    if activation in FROM_OUTPUT:  # read off the result
        assert saved_bytes(call, [x, w, b, r]) == 2 * x.nbytes + 3 * w.nbytes


@pytest.mark.parametrize("activation", FROM_OUTPUT)
def test_what_may_change_before_backward(activation, device):
    """Without a residual the result may, which is computed again; the bias, of which it is, may not."""
    inputs = [t.requires_grad_() for t in norm_operands((2, 5, 3, 4), device=device)[:3]]

    def call(x, w, b):
        return ours.bn_act(x, None, None, w, b * 1.0, True, activation=activation)

    right = torch.autograd.grad(call(*inputs).sum(), inputs)
    z = call(*inputs)
    loss = z.sum()
    with torch.no_grad():
        z.zero_()
    for mine, its in zip(torch.autograd.grad(loss, inputs), right, strict=True):
        assert torch.equal(mine, its)
    bias = inputs[2] * 1.0
    loss = ours.bn_act(*inputs[:1], None, None, inputs[1], bias, True, activation=activation).sum()
    with torch.no_grad():
        bias.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ----------------------------------------------------------------------------------------------------------------------
# prelu


def ours_with_prelu(name, stats, training, x, w, r, slopes):
    how = {"residual": r, "activation": "prelu", "activation_arg": slopes}
    if name == "bn_act":
        return ours.bn_act(x, *stats, w, None, training, **how)
    if name == "conv_act":
        return ours.conv_act(x, w, None, **GEOMETRIES["groups"][0], **how)
    return ours.conv_bn_act(x, w, *stats, training=training, **GEOMETRIES["groups"][0], **how)


def theirs_with_prelu(name, stats, training, x, w, r, slopes):
    y = x if name == "bn_act" else F.conv2d(x, w, None, **GEOMETRIES["groups"][0])
    if name != "conv_act":
        y = F.batch_norm(y, *stats, w if name == "bn_act" else None, None, training)
    return F.prelu(y + r, slopes)


def prelu_operands(name, slopes):
    """x, w, residual and slopes."""
    x, w, _, r = norm_operands((2, 6, 3, 4)) if name == "bn_act" else operands()
    return [x, w, r, slopes]


SLOPES = {"one": normal(1, seed=8), "each": normal(6, seed=9)}


@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", ["conv_bn_act", "conv_act", "bn_act"])
def test_prelu(name, training, slopes, device):
    """One kernel or pass where no gradient is wanted; where one is, if only of the slopes, PyTorch's prelu follows."""
    inputs = [t.to(device) for t in prelu_operands(name, SLOPES[slopes])]
    for frozen in ((), (0, 1, 2), (3,), range(4)):
        mine, right = (
            run(functools.partial(function, name, statistics(6, device=device), training), inputs, frozen)
            for function in (ours_with_prelu, theirs_with_prelu)
        )
        assert_close(mine, right)
        assert_served_by_kernels(mine.trace)
    *before, last = mine.trace.launches
    one = name == "conv_act" or (name, training) == ("conv_bn_act", False)
    assert last == ("conv_fprop_kernel" if one else "normalize_kernel")
    assert "normalize_kernel" not in before


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
def test_prelus_slopes_of_any_stride(geometry, algorithm, device):
    """Every second of a larger tensor, of NaN otherwise."""
    inputs = operands(geometry, device=device)
    K = inputs[1].shape[0]
    slopes = torch.stack([normal(K, seed=4), torch.full((K,), float("nan")).double()], 1)[:, 0].to(device)
    with torch.no_grad():
        mine = fused(geometry, activation="prelu", activation_arg=slopes, algorithm=algorithm)(*inputs)
        right = composed(geometry, act=lambda u: F.prelu(u, slopes))(*inputs)
    torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv_bn_act", "conv_act", "bn_act"])
def test_prelu_under_autocast(name, device):
    """The result has the dtype of autocast, as PyTorch's prelu has it, also after a batch norm, which is not cast."""
    x, w, r, slopes = (t.to(device, torch.float32) for t in prelu_operands(name, SLOPES["each"]))
    stats = statistics(6, torch.float32, device)
    with torch.no_grad(), torch.autocast(device.type, torch.float16):
        r = r if name == "bn_act" else r.half()
        mine = ours_with_prelu(name, stats, False, x, w, r, slopes)
        right = theirs_with_prelu(name, stats, False, x, w, r, slopes)
    assert mine.dtype == right.dtype == torch.float16
    torch.testing.assert_close(mine, right, rtol=4e-3, atol=4e-3)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, and who else serves

X, W, R = (normal(*size, dtype=torch.float32) for size in ((2, 4, 5, 5), (6, 4, 3, 3), (2, 6, 3, 3)))
STATS = torch.zeros(4), torch.ones(4)
S = torch.ones(6)


def conv_act(**options):
    return lambda place: ours.conv_act(place(X), place(W), **{k: place(v) for k, v in options.items()})


def bn_act(**options):
    return lambda place: ours.bn_act(place(X), *map(place, STATS), **{k: place(v) for k, v in options.items()})


REFUSED = {
    "a residual of another size": (conv_act(residual=R[:1]), ValueError, r"conv_act\(\): residual .*\[2, 6, 3, 3\]"),
    "a residual of another dtype": (conv_act(residual=R.double()), ValueError, r"conv_act\(\): residual .* torch.fl"),
    "bn_act, a residual of another size": (bn_act(residual=R), ValueError, r"bn_act\(\): residual .*\[2, 4, 5, 5\]"),
    "no activation": (conv_act(activation="swoosh"), ValueError, r"conv_act\(\): activation must be None, .*mish"),
    "bn_act, no activation": (bn_act(activation="swoosh"), ValueError, r"bn_act\(\): activation must .*prelu"),
    "no algorithm": (conv_act(algorithm="fast"), ValueError, r"conv_act\(\): algorithm"),
    "no slope for prelu": (conv_act(activation="prelu"), TypeError, r"activation_arg must be prelu's slope, a tensor"),
    "a number for prelu": (bn_act(activation="prelu", activation_arg=0.1), TypeError, r"activation_arg .*0.1"),
    "slopes of another size": (
        conv_act(activation="prelu", activation_arg=S[:4]), ValueError, r"\[1\], or one for each, of size \[6\], .*4"
    ),
    "bn_act, slopes of another size": (
        bn_act(activation="prelu", activation_arg=S), ValueError, r"bn_act\(\): .* of size \[4\], but got \[6\]"
    ),
    "slopes without an axis": (
        conv_act(activation="prelu", activation_arg=torch.tensor(0.1)), ValueError, r"but got \[\]"
    ),
    "slopes of another dtype": (
        conv_act(activation="prelu", activation_arg=S.double()), ValueError, r"result's dtype torch.float32, .*float64"
    ),
    "a tensor for leaky_relu": (
        conv_act(activation="leaky_relu", activation_arg=S), TypeError, r"leaky_relu's slope, a number \(a tensor of"
    ),
    "a slope for relu": (conv_act(activation="relu", activation_arg=0.1), ValueError, r"activation_arg=0.1 for 'relu'"),
    "no tensor": (
        lambda place: ours.conv_act([1.0], place(W)), TypeError, r"conv_act\(\): input must be a Tensor, not list"
    ),
    "no weight": (
        lambda place: ours.conv_act(place(X), 3, activation="leaky_relu", activation_arg=0.5),
        TypeError, r"conv_act\(\): weight must be a Tensor, not int",
    ),
    "training without eps": (bn_act(training=True, eps=0.0), ValueError, r"bn_act\(\): eps must be positive"),
    "no statistics": (
        lambda place: ours.bn_act(place(X), None, None), RuntimeError, r"bn_act\(\): running_mean and running_var must"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, device, launches):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value)
    assert launches == []


@pytest.mark.parametrize(
    "name", ["a residual of another size", "slopes of another size", "bn_act, a residual of another size"]
)
def test_what_is_refused_where_pytorch_serves(name):
    call, error, message = REFUSED[name]
    with cnnfast.backend("torch"), pytest.raises(error, match=message):
        call(lambda value: value)


@pytest.mark.parametrize(
    "call", [conv_act(residual=R, activation="mish"), bn_act(residual=X, activation="prelu", activation_arg=S[:4])]
)
def test_pytorchs_path(call, device):
    def place(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    with torch.no_grad():
        mine = call(place)
        with cnnfast.backend("torch"), cnnfast.trace() as trace:
            right = call(place)
    torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    assert [(c.operation, c.served_by) for c in trace] in ([("conv_act", "torch")], [("bn_act", "torch")])


def test_meta_tensors_have_the_results_sizes():
    x, w, r = (t.to("meta", memory_format=torch.channels_last) for t in (X, W, R))
    z = ours.conv_act(x, w, residual=r)
    assert (z.shape, z.is_meta) == (R.shape, True)
    assert ours.bn_act(x, *(t.to("meta") for t in STATS), training=True).stride() == x.stride()


def test_under_transforms_pytorch_serves(device):
    """vmap and forward-mode AD: PyTorch's numbers."""
    x, w, r = (t.to(device) for t in (X, W, R))
    batched = torch.func.vmap(lambda x, r: ours.conv_act(x[None], w, residual=r[None], activation="mish"))(x, r)
    torch.testing.assert_close(batched[:, 0], F.mish(F.conv2d(x, w) + r), rtol=1e-5, atol=1e-5)
    _, tangent = torch.func.jvp(lambda x: ours.bn_act(x, *(t.to(device) for t in STATS), eps=0.0), (x,), (x,))
    torch.testing.assert_close(tangent, torch.where(x > 0, x, 0.0))
