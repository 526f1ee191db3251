"""functional.conv_bn_act against the same composition of PyTorch's functions."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import cnnfast.functional as ours
from cnnfast_kernels.gather import im2col
from tests.support.activations import ACTIVATIONS
from tests.support.agreement import (
    Outcome,
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

GEOMETRY = {"stride": (1, 2), "padding": 1, "groups": 2}
K = 6
X, W, Y = (2, 4, 5, 4), (K, 2, 3, 3), (2, K, 5, 2)


def parameters(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """x, w, bn_weight, bn_bias, bias, residual."""
    shapes = (X, W, (K,), (K,), (K,), Y)
    return [normal(*shape, seed=i, dtype=dtype).to(device) for i, shape in enumerate(shapes)]


def running(
    dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(K, seed=10, dtype=dtype).to(device), normal(K, seed=11, dtype=dtype).abs().add(0.5).to(device)


def fused(stats=(None, None), geometry=GEOMETRY, **options):
    """A function of x, w, bn_weight, bn_bias, bias, residual."""

    def call(x, w, bn_weight, bn_bias, bias, residual):
        return ours.conv_bn_act(x, w, *stats, bn_weight, bn_bias, bias=bias, residual=residual, **geometry, **options)

    return call


def composed(
    stats=(None, None), geometry=GEOMETRY, activation="relu", training=False, momentum=0.1, eps=1e-5, act=None
):
    act = act or ACTIVATIONS[activation]

    def call(x, w, bn_weight, bn_bias, bias, residual):
        y = F.batch_norm(F.conv2d(x, w, bias, **geometry), *stats, bn_weight, bn_bias, training, momentum, eps)
        return act(y if residual is None else y + residual)

    return call


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation, training, device):
    """With a residual, all gradients, and the running statistics, which take the unbiased variance."""
    inputs = parameters(device=device)
    stats, expected = running(device=device), running(device=device)
    mine = run(fused(stats, activation=activation, training=training), inputs)
    assert_close(mine, run(composed(expected, activation=activation, training=training), inputs))
    assert_served_by_kernels(mine.trace)
    for a, b, before in zip(stats, expected, running(device=device), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert torch.equal(a, before) != training


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("slope", [0.3, 0.0, -0.5])
def test_negative_slope(slope, training, device):
    """From 0 down the sign of the output no longer tells that of its argument."""
    inputs = parameters(device=device)
    act = functools.partial(F.leaky_relu, negative_slope=slope)
    for frozen in ((), (2,)):  # in eval with bn_weight frozen one kernel would do, if the sign could be told
        mine = run(
            fused(running(device=device), activation="leaky_relu", activation_arg=slope, training=training),
            inputs,
            frozen,
        )
        assert_close(mine, run(composed(running(device=device), act=act, training=training), inputs, frozen))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("absent", [(2, 4), (3, 5), (2, 3, 4, 5)], ids=str)
def test_without(absent, training, device):
    """Any of bn_weight, bn_bias, bias and residual may be missing; in training running statistics too."""
    inputs = [None if i in absent else t for i, t in enumerate(parameters(device=device))]
    stats = (None, None) if training else running(device=device)
    assert_close(run(fused(stats, training=training), inputs), run(composed(stats, training=training), inputs))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_layouts(algorithm, training, device):
    """Operands in any order of axes, cut out of NaN; results and gradients laid out as PyTorch's."""
    x, w, *vectors, residual = parameters(device=device)
    inputs = [arrange(x, "transposed"), arrange(w, "nchw"), *vectors, arrange(residual, "batch_last")]
    for frozen in ((), (2,)):  # in eval two kernels, and one
        mine = run(fused(running(device=device), training=training, algorithm=algorithm), inputs, frozen)
        assert_close(mine, run(composed(running(device=device), training=training), inputs, frozen))
    for fmt in (torch.contiguous_format, torch.channels_last):
        inputs = [t.contiguous(memory_format=fmt) if t.dim() == 4 else t for t in (x, w, *vectors, residual)]
        mine = run(fused(running(device=device), training=training, algorithm=algorithm), inputs)
        assert_same_strides(mine, run(composed(running(device=device), training=training), inputs))


EXACT_GEOMETRY = {"padding": 1}
EXACT_STATS = torch.tensor([1.0, -2.0, 0.0, 3.0, 1.0, -1.0]), 4.0 ** torch.tensor([0.0, 1.0, -1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "relu6"], ids=str)
def test_eval_to_the_bit(activation, dtype, device):
    """Integers and variances that are powers of four: exact, also where an activation bends. Frozen statistics and
    weight: one kernel.
    """
    inputs = [
        integers(2, 3, 4, 4, largest=2, dtype=dtype),
        integers(K, 3, 3, 3, seed=1, dtype=dtype),
        2 * integers(K, seed=2, dtype=dtype) + 1,
        integers(K, seed=3, dtype=dtype),
        integers(K, seed=4, dtype=dtype),
        integers(2, K, 4, 4, seed=5, dtype=dtype),
    ]
    inputs = [t.to(device) for t in inputs]
    stats = tuple(t.to(device) for t in EXACT_STATS)
    options = {"activation": activation, "eps": 0.0} | ({"activation_arg": 0.5} if activation == "leaky_relu" else {})
    act = functools.partial(F.leaky_relu, negative_slope=0.5) if activation == "leaky_relu" else ACTIVATIONS[activation]
    frozen = (2, 4)
    mine = run(fused(stats, EXACT_GEOMETRY, **options), inputs, frozen)
    right = exact(composed(tuple(t.double().cpu() for t in stats), EXACT_GEOMETRY, act=act, eps=0.0), inputs, frozen)
    assert_bits(mine, right)
    assert mine.trace.launches[:2] != ["conv_fprop_kernel", "normalize_kernel"]
    assert mine.operations[0] == "conv_bn_act"


def test_im2col_in_pieces(device, monkeypatch):
    """A workspace too small for one image: every piece takes its own rows of the residual."""
    monkeypatch.setattr(im2col, "MAX_WORKSPACE", 1000)
    inputs = parameters(device=device)
    mine = run(fused(running(device=device), algorithm="im2col"), inputs, range(6))
    assert mine.trace.launches.count("im2col_kernel") > 2
    assert_close(mine, run(composed(running(device=device)), inputs, range(6)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_vectors_of_any_stride(algorithm, training, device):
    """Of bias, batch norm's parameters and statistics every second element of a larger one, or one number for all
    filters.
    """
    inputs, stats = parameters(device=device), running(device=device)
    right = run(composed(tuple(t.clone() for t in stats), training=training), inputs, (2,))
    apart = [torch.stack([t, torch.full_like(t, float("nan"))], 1)[:, 0] for t in (*inputs[2:5], *stats)]
    mine = run(
        fused(tuple(apart[3:]), training=training, algorithm=algorithm), [*inputs[:2], *apart[:3], inputs[5]], (2,)
    )
    assert_close(mine, right)
    one = [t[:1].expand(K) for t in inputs[2:5]]
    given = [*inputs[:2], *one, inputs[5]]
    mine = run(fused(running(device=device), training=training, algorithm=algorithm), given, (2,))
    assert_close(mine, run(composed(running(device=device), training=training), given, (2,)))


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid"])
def test_bends(activation, device):
    """Where two lines meet the derivative is PyTorch's choice: 1x1 identity filters hand integers to the activation."""
    x = torch.arange(-8.0, 8.0, dtype=torch.float64, device=device).view(1, 1, 4, 4)
    one, zero = (
        torch.ones(1, 1, 1, 1, dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.float64, device=device),
    )
    stats = zero, zero + 1
    for frozen in ((1,), (1, 2, 3)):  # the first takes the path that keeps the convolution's output
        inputs = [x, one, zero + 1, zero, None, None]
        mine = run(fused(stats, {}, activation=activation, eps=0.0), inputs, frozen)
        assert_close(mine, run(composed(stats, {}, activation, eps=0.0), inputs, frozen), 1e-15)


def test_number_of_launches(device):
    inputs = parameters(torch.float32, device)
    stats = running(torch.float32, device)
    with torch.no_grad():
        assert run(fused(stats), inputs, range(6)).trace.launches == ["conv_fprop_kernel"]
        training = run(fused(stats, training=True), inputs, range(6))
    assert training.trace.launches == [
        "conv_fprop_kernel",
        "combine_kernel",
        "update_running_kernel",
        "normalize_kernel",
    ]
    assert training.operations == ["conv_stats", "update_running", "normalize"]


@pytest.mark.parametrize(
    ("activation", "frozen"),
    [("relu", f) for f in ((2, 3), (0, 2, 3), (1, 2), (3,), (0, 1), (0, 1, 2, 4, 5))]
    + [("silu", f) for f in ((2, 3), (0, 1, 5))],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_frozen(training, activation, frozen, device):
    """Among them frozen batch norm within a network that trains: statistics fixed, its weight and bias without
    gradients.
    """
    inputs = parameters(device=device)
    stats = running(device=device)
    mine = run(fused(stats, activation=activation, training=training), inputs, frozen)
    assert_close(mine, run(composed(running(device=device), activation=activation, training=training), inputs, frozen))
    assert ("conv_dgrad" in mine.operations) == (0 not in frozen)
    assert ("conv_wgrad" in mine.operations) == (1 not in frozen)
    if not training and 2 in frozen and activation == "relu":
        assert mine.operations[0] == "conv_bn_act"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu"], ids=str)
@pytest.mark.parametrize("frozen", [(), (2, 3), (0,), (1,)], ids=str)
def test_saved_bytes(frozen, activation, training, device):
    inputs = parameters(torch.float32, device)
    for residual in (None, inputs[5]):
        given = [*inputs[:5], residual]
        mine = saved_bytes(
            fused(running(torch.float32, device), activation=activation, training=training), given, frozen
        )
        theirs = saved_bytes(
            composed(running(torch.float32, device), activation=activation, training=training), given, frozen
        )
        # its argument is computed again, from bn_bias too, which lives anyway
        if activation == "gelu" and not training:
            theirs += inputs[3].nbytes
        # and so is the result, which PyTorch keeps
        if activation in ("relu", "leaky_relu") and training and residual is None:
            theirs += inputs[3].nbytes - inputs[5].nbytes
        assert mine <= theirs


@pytest.mark.parametrize(
    ("momentum", "dtype", "stats_dtype"),
    [(0.0, torch.float32, torch.float32), (0.3, torch.float16, torch.float32), (1.0, torch.float16, torch.float16)],
)
def test_momentum(momentum, dtype, stats_dtype, device):
    given = [t.to(dtype) for t in parameters(torch.float32, device)]
    stats, expected = running(stats_dtype, device), running(torch.float64)
    run(fused(stats, training=True, momentum=momentum), given, range(6))
    exact(composed(expected, training=True, momentum=momentum), given, range(6))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3  # the convolution's output is rounded to its dtype
    for a, b in zip(stats, expected, strict=True):
        assert a.dtype == stats_dtype
        torch.testing.assert_close(a.double().cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_empty_batch(training, device):
    """No values: running statistics stay, gradients of parameters are zero."""
    inputs = [t[:0] if i in (0, 5) else t for i, t in enumerate(parameters(torch.float32, device))]
    stats = running(torch.float32, device)
    mine = run(fused(stats, training=training), inputs)
    right = run(composed(running(torch.float32, device), training=training), inputs)
    assert_close(mine, right)
    for a, before in zip(stats, running(torch.float32, device), strict=True):
        assert torch.equal(a, before)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan(activation, training, device):
    inputs = parameters(device=device)
    inputs[5][0, 1, 2, 1] = float("nan")
    if not training:
        inputs[0][1, 0, 2, 2] = float("nan")
    mine = run(fused(running(device=device), activation=activation, training=training), inputs)
    right = run(composed(running(device=device), activation=activation, training=training), inputs)
    assert mine.y.isnan().any()
    assert not mine.y.isnan().all()
    # PyTorch's CPU and CUDA kernels differ in the gradient at NaN; ours is CUDA's
    if activation in ("relu6", "hardswish"):
        mine, right = (Outcome(outcome.y, (), outcome.trace) for outcome in (mine, right))
    assert_close(mine, right)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding(dtype, training, device):
    """Random numbers: at most twice the error of PyTorch's own composition in the same dtype."""
    inputs = [t.to(torch.float32 if i in (2, 3) else dtype) for i, t in enumerate(parameters(device=device))]
    options = {"training": training, "activation": "gelu"}
    right = exact(composed(running(), **options), inputs)
    mine = run(fused(running(torch.float32, device), **options), inputs)
    their = run(composed(running(torch.float32, device), **options), inputs)
    for a, b, e in zip(mine.tensors, their.tensors, right.tensors, strict=True):
        error, allowed = ((t.cpu().double() - e).abs().max().item() for t in (a, b))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * max(1.0, e.abs().max().item())


def test_same_bits_twice(device):
    inputs = parameters(torch.float32, device)
    first, second = (run(fused(training=True, activation="silu"), inputs) for _ in range(2))
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(a, b)
