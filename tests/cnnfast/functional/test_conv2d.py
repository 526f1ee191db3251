"""functional.conv2d against torch.nn.functional.conv2d: forward and all gradients, bit for bit, for every algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as theirs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cnnfast
import cnnfast.functional as ours
from cnnfast_kernels.gather import im2col
from tests.support.agreement import (
    assert_bits,
    assert_served_by_kernels,
    exact,
    integers,
    leaf,
    normal,
    run,
    saved_bytes,
)
from tests.support.convolutions import LAYOUTS, arrange

ALGORITHMS = ("auto", "direct", "im2col")
DIRECT = {"conv_fprop_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel", "gradient_sums_kernel", "combine_kernel"}
DEPTHWISE = {kernel.replace("conv_", "depthwise_") for kernel in DIRECT}
KERNELS = {"auto": DIRECT, "direct": DIRECT, "im2col": DIRECT | {"im2col_kernel", "col2im_kernel"}}


@dataclass(frozen=True)
class Case:
    """x [N, C, H, W], filters (K, R, S), and the arguments of conv2d from stride on."""

    reason: str
    x: tuple[int, int, int, int]
    filters: tuple[int, int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    def __str__(self) -> str:
        return self.reason

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    def inputs(
        self, dtype: torch.dtype, device: torch.device, layout: str = "nchw", w_layout: str = "nchw", bias: bool = True
    ):
        """x, w and bias: integers for which every sum is representable in any dtype."""
        K, R, S = self.filters
        x = arrange(integers(*self.x, largest=2, dtype=dtype).to(device), layout)
        w = arrange(integers(K, self.x[1] // self.groups, R, S, seed=2, dtype=dtype).to(device), w_layout)
        return [x, w, integers(K, seed=3, dtype=dtype).to(device) if bias else None]


def convolve(case: Case, algorithm: str):
    return lambda x, w, b: ours.conv2d(x, w, b, *case.geometry, algorithm=algorithm)


def reference(case: Case):
    return lambda x, w, b: theirs.conv2d(x, w, b, *case.geometry)


def check(case: Case, algorithm: str, inputs: list) -> None:
    mine = run(convolve(case, algorithm), inputs)
    assert_bits(mine, exact(reference(case), inputs))
    assert_served_by_kernels(mine.trace)
    backward = ["conv_dgrad", "conv_wgrad"] + ["channel_sum"] * (inputs[2] is not None)
    assert mine.operations == ["conv_fprop"] + backward * (inputs[0].shape[0] > 0)
    if case.x[0]:
        depthwise = case.groups == case.x[1] > 1 and algorithm != "im2col"
        expected = (DEPTHWISE if depthwise else KERNELS[algorithm]) - (
            {"gradient_sums_kernel", "combine_kernel"} if inputs[2] is None else set()
        )
        assert set(mine.trace.launches) - {"conv_wgrad_reduce_kernel"} == expected


CASES = [
    Case("3x3", (2, 5, 6, 5), (7, 3, 3), padding=1),
    Case("a stem: 7x7, stride 2, three channels", (1, 3, 9, 8), (8, 7, 7), 2, 3),
    Case("1x1 with a stride: most inputs unseen", (2, 16, 5, 6), (3, 1, 1), (3, 2)),
    Case("everything differs along the axes", (1, 4, 9, 7), (6, 2, 3), (3, 1), (0, 2), (2, 1), 2),
    Case("depthwise", (1, 6, 6, 5), (6, 3, 3), 1, 1, 1, 6),
    Case("depthwise, two filters a channel", (1, 4, 6, 5), (8, 3, 3), 2, 1, 1, 4),
    Case("depthwise, an even kernel that keeps the size", (1, 3, 5, 4), (3, 2, 4), padding="same", groups=3),
    Case("kernel larger than the image", (1, 3, 2, 3), (4, 5, 5), 1, 2),
    Case("padding beyond the kernel: outputs that see only zeros", (1, 2, 2, 2), (3, 1, 2), 1, 3),
    Case("an even kernel keeps the size: one more zero at the end", (1, 3, 5, 4), (4, 2, 4), padding="same"),
    Case("same size with dilation", (1, 3, 5, 4), (4, 2, 3), 1, "same", (3, 1)),
    Case("valid", (1, 3, 5, 4), (4, 2, 3), 2, "valid"),
    Case("one pixel", (3, 4, 1, 1), (2, 1, 1)),
    Case("empty batch", (0, 3, 5, 4), (4, 3, 3), 1, 1),
]


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_geometry(case, algorithm, device):
    check(case, algorithm, case.inputs(torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_dtype(algorithm, dtype, device):
    check(CASES[0], algorithm, CASES[0].inputs(dtype, device, "channels_last"))


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_layout(layout, device):
    """x cut out of NaN, in any order of axes, or one image repeated without a copy."""
    check(
        CASES[3],
        "auto",
        CASES[3].inputs(torch.float32, device, layout, "channels_last" if layout == "expanded" else layout),
    )


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_bias_of_any_stride(case, algorithm, device):
    """Every second element of a larger one, or one number for all filters."""
    x, w, b = case.inputs(torch.float32, device)
    for bias in (torch.stack([b, torch.full_like(b, float("nan"))], 1)[:, 0], b[:1].expand_as(b)):
        check(case, algorithm, [x, w, bias])


AXIS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw) -> Case:
    """Any small convolution with an output."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.sampled_from([1, 1, 2, 5]))
    x = (draw(st.integers(0, 2)), channels, draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    filters = (groups * draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    stride = draw(AXIS)
    padding = draw(st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.just("same")))
    dilation = draw(AXIS)
    assume(padding != "same" or stride == (1, 1))
    if padding != "same":
        assume(
            all(
                size + 2 * pad > d * (taps - 1)
                for size, pad, d, taps in zip(x[2:], padding, dilation, filters[1:], strict=True)
            )
        )
    return Case("drawn", x, filters, stride, padding, dilation, groups)


@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    case=convolutions(),
    algorithm=st.sampled_from(ALGORITHMS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    layout=st.sampled_from([*LAYOUTS, "expanded"]),
    w_layout=st.sampled_from([*LAYOUTS]),
    bias=st.booleans(),
)
def test_any_convolution(case, algorithm, dtype, layout, w_layout, bias, device):
    layout = "nchw" if layout == "expanded" and case.x[0] == 0 else layout
    check(case, algorithm, case.inputs(dtype, device, layout, w_layout, bias))


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_without_a_batch(algorithm, device):
    x, w, b = CASES[0].inputs(torch.float32, device)
    inputs = [x[0], w, b]
    mine = run(convolve(CASES[0], algorithm), inputs)
    assert mine.y.dim() == 3
    assert_bits(mine, exact(reference(CASES[0]), inputs))


def test_gradient_without_memory(device):
    """sum() hands back one number with strides of zero."""
    inputs = [leaf(t) for t in CASES[0].inputs(torch.float32, device)]
    grads = torch.autograd.grad(convolve(CASES[0], "auto")(*inputs).sum(), inputs)
    right = torch.autograd.grad(reference(CASES[0])(*inputs).sum(), inputs)
    for mine, expected in zip(grads, right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_im2col_in_pieces(device, monkeypatch):
    """A workspace too small for one image: rows of the output at a time, and in dgrad channels."""
    inputs = CASES[0].inputs(torch.float32, device, "channels_last")
    whole = run(convolve(CASES[0], "im2col"), inputs)
    monkeypatch.setattr(im2col, "MAX_WORKSPACE", 3000)
    pieces = run(convolve(CASES[0], "im2col"), inputs)
    assert pieces.trace.launches.count("im2col_kernel") > 2
    assert pieces.trace.launches.count("col2im_kernel") > 1
    assert_bits(pieces, exact(reference(CASES[0]), inputs))
    assert_bits(whole, exact(reference(CASES[0]), inputs))


FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_gradients_are_kept_as_pytorch_keeps_them(algorithm, device):
    """.grad lies in memory as in PyTorch: autograd lays it out as its tensor. Of what it is made from, see
    test_convolution_layouts.py.
    """
    for formats in (
        (FORMATS[0], FORMATS[0]),
        (FORMATS[0], FORMATS[1]),
        (FORMATS[1], FORMATS[0]),
        (FORMATS[1], FORMATS[1]),
    ):
        strides = []
        for function in (convolve(CASES[0], algorithm), reference(CASES[0])):
            x, w, b = CASES[0].inputs(torch.float32, device)
            inputs = [
                leaf(x.contiguous(memory_format=formats[0])),
                leaf(w.contiguous(memory_format=formats[1])),
                leaf(b),
            ]
            y = function(*inputs)
            y.sum().backward()
            strides.append([y.stride(), *(t.grad.stride() for t in inputs)])
        assert strides[0] == strides[1]


@pytest.mark.parametrize(
    ("frozen", "operations"),
    [
        ((0,), ["conv_fprop", "conv_wgrad", "channel_sum"]),
        ((1,), ["conv_fprop", "conv_dgrad", "channel_sum"]),
        ((2,), ["conv_fprop", "conv_dgrad", "conv_wgrad"]),
        ((0, 1), ["conv_fprop", "channel_sum"]),
        ((0, 1, 2), ["conv_fprop"]),
    ],
)
def test_frozen_operands_cost_no_gradient(frozen, operations, device):
    inputs = CASES[0].inputs(torch.float32, device)
    mine = run(convolve(CASES[0], "auto"), inputs, frozen)
    assert mine.operations == operations
    assert_bits(mine, exact(reference(CASES[0]), inputs, frozen))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1), (2,)], ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_saved_bytes(algorithm, frozen, device):
    inputs = CASES[0].inputs(torch.float32, device)
    assert saved_bytes(convolve(CASES[0], algorithm), inputs, frozen) <= saved_bytes(
        reference(CASES[0]), inputs, frozen
    )


def test_without_gradients_nothing_is_saved(device):
    x, w, b = (leaf(t) for t in CASES[0].inputs(torch.float32, device))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, cnnfast.trace() as trace:
            y = ours.conv2d(x, w, b)
        assert not y.requires_grad
        assert trace.launches == ["conv_fprop_kernel"]


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_same_bits_twice(algorithm, device):
    inputs = [normal(*t.shape, dtype=torch.float32).to(device) for t in CASES[0].inputs(torch.float32, device)]
    first, second = (run(convolve(CASES[0], algorithm), inputs) for _ in range(2))
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(a, b)


def test_nan_reaches_what_it_should(device):
    """One NaN in the input, one in the filters: the same results and gradients are NaN as in PyTorch."""
    x, w, b = CASES[0].inputs(torch.float32, device)
    x, w = x.clone(), w.clone()
    x[1, 2, 0, 3] = w[4, 0, 1, 1] = float("nan")
    mine, right = run(convolve(CASES[0], "auto"), [x, w, b]), exact(reference(CASES[0]), [x, w, b])
    for a, e in zip(mine.tensors, right.tensors, strict=True):
        torch.testing.assert_close(a.cpu(), e.to(a.dtype), rtol=0, atol=0, equal_nan=True)


def test_algorithm_torch(device):
    inputs = CASES[0].inputs(torch.float32, device)
    mine = run(convolve(CASES[0], "torch"), inputs)
    assert [(call.operation, call.served_by, call.reason) for call in mine.trace] == [
        ("conv2d", "torch", 'algorithm="torch"')
    ]
    assert_bits(mine, exact(reference(CASES[0]), inputs))


def test_arguments_as_pytorch_takes_them(device):
    """A single number, a pair, a list of one, anything with __index__."""
    x, w, b = CASES[0].inputs(torch.float32, device)
    for stride in (2, (2, 2), [2], torch.tensor(2)):
        assert torch.equal(ours.conv2d(x, w, b, stride), theirs.conv2d(x, w, b, stride))
