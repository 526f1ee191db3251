"""functional.conv1d and conv_transpose2d against torch.nn.functional's: forward and all gradients, bit for bit, and
their memory.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import cnnfast.functional as ours
from cnnfast import reference
from tests.support.agreement import assert_bits, assert_served_by_kernels, exact, integers, leaf, run, saved_bytes
from tests.support.convolutions import LAYOUTS, arrange
from tests.support.poison import embed

SOME = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
STEP = st.integers(1, 3)

# The axes of [N, C, L], from the one with the largest stride to the one with the least.
ROWS = {"ncl": (0, 1, 2), "nlc": (0, 2, 1), "lcn": (2, 1, 0)}


def arrange_row(t: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy of `t` [N, C, L] in that layout, cut out of a larger tensor of NaN."""
    order = ROWS[layout]
    return embed(t.permute(order).contiguous()).permute([order.index(i) for i in range(3)])


@st.composite
def rows(draw):
    """x's and w's shape, and stride, padding, dilation, groups as conv1d takes them."""
    groups, stride, dilation = draw(st.sampled_from([1, 1, 2, 3])), draw(STEP), draw(STEP)
    x = draw(st.integers(0, 2)), groups * draw(st.integers(1, 4)), draw(st.integers(1, 9))
    w = groups * draw(st.integers(1, 4)), x[1] // groups, draw(st.integers(1, 4))
    padding = draw(st.sampled_from([0, 1, 3, "same", "valid", (2,)]))
    assume(padding != "same" or stride == 1)
    zeros = {"same": dilation * (w[2] - 1), "valid": 0, (2,): 4}.get(
        padding, 2 * padding if isinstance(padding, int) else 0
    )
    assume(x[2] + zeros > dilation * (w[2] - 1))
    return x, w, (stride, padding, dilation, groups)


@SOME
@given(
    case=rows(), dtype=DTYPES, layout=st.sampled_from([*ROWS]), w_layout=st.sampled_from([*ROWS]), bias=st.booleans()
)
def test_any_conv1d(case, dtype, layout, w_layout, bias, device):
    x_shape, w_shape, geometry = case
    x = arrange_row(integers(*x_shape, largest=2, dtype=dtype).to(device), layout)
    w = arrange_row(integers(*w_shape, seed=2, dtype=dtype).to(device), w_layout)
    inputs = [x, w, integers(w_shape[0], seed=3, dtype=dtype).to(device) if bias else None]
    mine = run(lambda x, w, b: ours.conv1d(x, w, b, *geometry), inputs)
    assert_bits(mine, exact(lambda x, w, b: theirs.conv1d(x, w, b, *geometry), inputs))
    assert_served_by_kernels(mine.trace)
    assert mine.operations == ["conv_fprop"] + (["conv_dgrad", "conv_wgrad"] + ["channel_sum"] * bias) * (
        x_shape[0] > 0
    )


@st.composite
def transposed(draw):
    """x's and w's shape, and stride, padding, output_padding, groups, dilation as conv_transpose2d takes them."""
    groups, stride, dilation = (
        draw(st.sampled_from([1, 1, 2, 3])),
        draw(st.tuples(STEP, STEP)),
        draw(st.tuples(STEP, STEP)),
    )
    x = draw(st.integers(0, 2)), groups * draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    w = x[1], draw(st.integers(1, 4)), draw(STEP), draw(STEP)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    sizes = [
        (n - 1) * s - 2 * p + d * (t - 1) + m + 1
        for n, s, p, d, t, m in zip(x[2:], stride, padding, dilation, w[2:], more, strict=True)
    ]
    assume(min(sizes) > 0)
    return x, w, (stride, padding, more, groups, dilation)


@SOME
@given(
    case=transposed(),
    algorithm=st.sampled_from(["auto", "direct", "im2col"]),
    dtype=DTYPES,
    layout=st.sampled_from([*LAYOUTS]),
    w_layout=st.sampled_from([*LAYOUTS]),
    bias=st.booleans(),
)
def test_any_transposed_convolution(case, algorithm, dtype, layout, w_layout, bias, device):
    x_shape, w_shape, geometry = case
    x = arrange(integers(*x_shape, largest=2, dtype=dtype).to(device), layout)
    w = arrange(integers(*w_shape, seed=2, dtype=dtype).to(device), w_layout)
    inputs = [x, w, integers(w_shape[1] * geometry[3], seed=3, dtype=dtype).to(device) if bias else None]
    mine = run(lambda x, w, b: ours.conv_transpose2d(x, w, b, *geometry, algorithm=algorithm), inputs)
    assert_bits(mine, exact(lambda x, w, b: theirs.conv_transpose2d(x, w, b, *geometry), inputs))
    assert_served_by_kernels(mine.trace)
    assert mine.operations == ["conv_dgrad"] + (["conv_fprop", "conv_wgrad"] + ["channel_sum"] * bias) * (
        x_shape[0] > 0
    )


X, W, B = integers(2, 4, 5, 3, largest=2), integers(4, 2, 3, 2, seed=2), integers(4, seed=3)
CALLS = {  # of ours or PyTorch's functions f
    "conv1d": (lambda f: lambda x, w, b: f.conv1d(x, w, b, 2, 1, 1, 2), [X[..., 0], W[..., 0], B]),
    "conv_transpose2d": (lambda f: lambda x, w, b: f.conv_transpose2d(x, w, b, 2, 1, 1, 2), [X, W, B]),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_a_batch(name, device):
    call, (x, w, b) = CALLS[name]
    inputs = [t.to(device) for t in (x[0], w, b)]
    mine = run(call(ours), inputs)
    assert mine.y.dim() == x.dim() - 1
    assert_bits(mine, exact(call(theirs), inputs))


@pytest.mark.parametrize("name", CALLS)
def test_bias_of_any_stride(name, device):
    call, (x, w, b) = CALLS[name]
    for bias in (torch.stack([b, torch.full_like(b, float("nan"))], 1)[:, 0], b[:1].expand_as(b)):
        inputs = [t.to(device) for t in (x, w, bias)]
        assert_bits(run(call(ours), inputs), exact(call(theirs), inputs))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,)], ids=str)
def test_saved_bytes(name, frozen, device):
    call, inputs = CALLS[name]
    inputs = [t.contiguous().to(device) for t in inputs]
    assert saved_bytes(call(ours), inputs, frozen) <= saved_bytes(call(theirs), inputs, frozen)


def kept_strides(function, *inputs) -> list[tuple[int, ...]]:
    """Of the result, and of .grad of all inputs, which autograd keeps as its tensor lies. Axes of one element have no
    stride there.
    """
    inputs = [leaf(t) for t in inputs]
    y = function(*inputs)
    y.sum().backward()
    return [y.stride(), *(tuple(s for s, n in zip(t.grad.stride(), t.shape, strict=True) if n > 1) for t in inputs)]


FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("w_format", FORMATS, ids=["nchw_w", "nhwc_w"])
@pytest.mark.parametrize("x_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "x_shape", [(2, 4, 5, 3), (2, 4, 1, 1), (1, 1, 4, 3)], ids=["usual", "one pixel", "one channel"]
)
def test_strides_of_the_transposed(x_shape, x_format, w_format, device):
    x = integers(*x_shape).to(device).contiguous(memory_format=x_format)
    w = integers(x_shape[1], 6, 3, 2).to(device).contiguous(memory_format=w_format)
    assert kept_strides(ours.conv_transpose2d, x, w) == kept_strides(theirs.conv_transpose2d, x, w)


@pytest.mark.parametrize("w_layout", ROWS)
@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("x_shape", [(2, 4, 5), (2, 4, 1), (2, 1, 5), (1, 1, 5), (2, 1, 1)], ids=str)
def test_strides_of_conv1d(x_shape, layout, w_layout, device):
    """Of operands in any order of axes; one tap, and two where x is as long."""
    order, w_order = ROWS[layout], ROWS[w_layout]
    x = integers(*(x_shape[i] for i in order)).permute([order.index(i) for i in range(3)]).to(device)
    for taps in {1, min(2, x_shape[2])}:
        w_shape = 6, x_shape[1], taps
        w = integers(*(w_shape[i] for i in w_order)).permute([w_order.index(i) for i in range(3)]).to(device)
        assert kept_strides(ours.conv1d, x, w) == kept_strides(theirs.conv1d, x, w)


class _Operators(TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_conv1d_copies_nothing(device):
    """One kernel and views, whatever the order of the axes."""
    x, w = integers(2, 6, 4).to(device).transpose(1, 2), integers(3, 2, 4).to(device).transpose(1, 2)
    with _Operators() as called:
        ours.conv1d(x, w)
    assert set(called.names) == {"aten::unsqueeze", "aten::transpose.int", "cnnfast::conv_fprop", "aten::squeeze.dim"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_autocast(name, dtype, device):
    call, inputs = CALLS[name]
    inputs = [t.to(device) for t in inputs]
    with torch.autocast(device.type, dtype):
        mine = run(call(ours), inputs)
        assert call(ours)(*(t.double() for t in inputs)).dtype == torch.float64
    assert mine.y.dtype == dtype
    assert [g.dtype for g in mine.grads] == [torch.float32] * 3
    assert_bits(mine, exact(call(theirs), inputs))


@pytest.mark.parametrize("name", CALLS)
def test_compiled_for_any_size(name, device):
    torch._dynamo.reset()
    call, (x, w, b) = CALLS[name]
    compiled = torch.compile(call(ours), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3):
        inputs = [x.repeat(n, 1, n, *[1] * (x.dim() - 3)).to(device), w.to(device), b.to(device)]
        assert_bits(run(compiled, inputs), exact(call(theirs), inputs))


SPECIAL = {"inf": float("inf"), "-inf": -float("inf"), "nan": float("nan")}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("algorithm", ["direct", "im2col"])
@pytest.mark.parametrize(
    ("groups", "geometry"),
    [(1, (1, 1, 0)), (2, (2, 1, 1)), (4, (1, 1, 0)), (4, (2, 0, 1))],
    ids=["usual", "groups, stride", "depthwise", "depthwise, stride"],
)
def test_a_special_weight_reaches_what_its_tap_reaches(groups, geometry, algorithm, name, device):
    """Of a transposed convolution's result, and of the gradient of a convolution's input; the judge multiplies where a
    tap lies alone.
    """
    x, w = integers(2, 4, 5, 4, largest=2).to(device), integers(4, 4 // groups, 3, 3, seed=2).to(device)
    for k, r, s in ((0, 0, 0), (3, 2, 1)):
        w[k, 0, r, s] = SPECIAL[name]
    y = ours.conv_transpose2d(x, w, None, *geometry, groups, algorithm=algorithm)
    exact_y = reference.conv_transpose2d(x.double(), w.double(), None, *geometry, groups)
    assert exact_y.isfinite().any()
    assert not exact_y.isfinite().all()
    torch.testing.assert_close(y.double(), exact_y, rtol=0, atol=0, equal_nan=True)

    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    ys = [
        ours.conv2d(leaves[0], w, None, *geometry[:2], groups=groups, algorithm=algorithm),
        reference.conv2d(leaves[1], w.double(), None, *geometry[:2], groups=groups),
    ]
    dy = integers(*ys[0].shape, seed=3).to(device)
    mine, judge = (torch.autograd.grad(y, leaf, dy.to(y.dtype))[0] for y, leaf in zip(ys, leaves, strict=True))
    assert not judge.isfinite().all()
    torch.testing.assert_close(mine.double(), judge, rtol=0, atol=0, equal_nan=True)
