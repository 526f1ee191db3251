"""The geometry against PyTorch's own shapes and counts, on meta tensors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cnnfast_kernels.problem import ConvProblem, PoolProblem, tap_step, taps_miss

extent = st.integers(1, 40)
window = st.integers(1, 7)
step = st.integers(1, 5)


def pairs(values):
    return st.tuples(values, values)


@given(
    pairs(extent),
    pairs(window),
    pairs(step),
    st.tuples(*[st.integers(0, 6)] * 4),
    pairs(step),
    st.sampled_from([1, 2, 4]),
)
def test_convolution_extents(size, taps, stride, padding, dilation, groups):
    top, bottom, left, right = padding
    padded_h, padded_w = size[0] + top + bottom, size[1] + left + right
    assume(padded_h > dilation[0] * (taps[0] - 1) and padded_w > dilation[1] * (taps[1] - 1))
    x = torch.empty(2, 4, *size, device="meta")
    w = torch.empty(8, 4 // groups, *taps, device="meta")
    problem = ConvProblem.of(x.shape, w.shape, stride, padding, dilation, groups)
    with FlopCounterMode(display=False) as counter:
        y = F.conv2d(F.pad(x, (left, right, top, bottom)), w, None, stride, 0, dilation, groups)
    assert y.shape == (problem.N, problem.K, problem.P, problem.Q)
    assert size == (problem.H, problem.W)
    assert taps == (problem.R, problem.S)
    assert (problem.group_channels, problem.group_filters) == (4 // groups, 8 // groups)
    assert (problem.pad_h, problem.pad_w, problem.dil_h, problem.dil_w) == (top, left, *dilation)
    assert problem.flops == counter.get_total_flops()
    assert problem.is_depthwise == (groups == 4)


@given(pairs(extent), pairs(window), pairs(step), pairs(st.integers(0, 3)), pairs(step), st.booleans())
def test_pooling_extents(size, taps, stride, padding, dilation, ceil_mode):
    assume(all(2 * p <= r for p, r in zip(padding, taps, strict=True)))
    assume(all(s + 2 * p > d * (r - 1) for s, p, d, r in zip(size, padding, dilation, taps, strict=True)))
    x = torch.empty(2, 3, *size, device="meta")
    problem = PoolProblem.of(x.shape, taps, stride, padding, dilation, ceil_mode)
    y = F.max_pool2d(x, taps, stride, padding, dilation, ceil_mode)
    assert y.shape == (problem.N, problem.C, problem.P, problem.Q)
    # Every window has a tap inside the input or it could not have a maximum.
    for count, s, r, pad, dil, length in zip(y.shape[2:], stride, taps, padding, dilation, size, strict=True):
        last = (count - 1) * s - pad
        assert dil > 1 or any(0 <= last + i * dil < length for i in range(r))


def test_the_last_window_of_ceil_mode_starts_inside():
    assert PoolProblem.of((1, 1, 3, 3), (2, 2), (2, 2), (0, 0), ceil_mode=True).P == 2
    assert PoolProblem.of((1, 1, 3, 3), (2, 2), (2, 2), (1, 1), ceil_mode=True).P == 2
    assert PoolProblem.of((1, 1, 5, 5), (1, 1), (4, 4), (0, 0), ceil_mode=True).P == 2
    assert PoolProblem.of((1, 1, 5, 5), (1, 1), (5, 5), (0, 0), ceil_mode=True).P == 1


@given(stride=step, dilation=step, pad=st.integers(0, 4))
def test_pixels_of_a_parity_see_the_same_taps(stride, dilation, pad):
    """dgrad's decomposition: the taps that reach input row h depend on (h + pad) mod stride alone, and lie tap_step
    apart.
    """
    taps_of = {}
    for h in range(4 * stride):
        taps = [r for r in range(24) if (h + pad - r * dilation) % stride == 0]
        assert taps_of.setdefault((h + pad) % stride, taps) == taps
        assert all(b - a == tap_step(stride, dilation) for a, b in pairwise(taps))
    assert len(taps_of) == stride
    problem = ConvProblem.of((1, 1, 99, 99), (1, 1, 3, 3), (stride, 3), (pad,) * 4, (dilation, 1), 1)
    assert problem.parities == stride * 3


@pytest.mark.parametrize(("channels", "filters", "groups"), [(6, 8, 4), (8, 6, 4), (4, 4, 0)])
def test_groups_must_divide_channels_and_filters(channels, filters, groups):
    with pytest.raises(ValueError, match=rf"groups={groups} must divide .* C={channels} .* K={filters}"):
        ConvProblem.of((1, channels, 8, 8), (filters, 2, 3, 3), (1, 1), (0,) * 4, (1, 1), groups)


def test_pixels_are_counted_in_32_bits():
    ConvProblem.of((2**15, 1, 2**8, 2**8 - 1), (1, 1, 1, 1), (1, 1), (0,) * 4, (1, 1), 1)
    with pytest.raises(RuntimeError, match=r"N\*H\*W=2147483648"):
        ConvProblem.of((2**15, 1, 2**8, 2**8), (1, 1, 1, 1), (1, 1), (0,) * 4, (1, 1), 1)
    with pytest.raises(RuntimeError, match=r"N\*P\*Q=21.* pixels"):
        ConvProblem.of((2**15, 1, 2**8, 2**8 - 1), (1, 1, 1, 1), (1, 1), (0, 0, 1, 0), (1, 1), 1)
    with pytest.raises(RuntimeError, match=r"N\*H\*W=2147483648"):
        PoolProblem.of((2**15, 1, 2**8, 2**8), (2, 2), (2, 2), (0, 0))
    with pytest.raises(RuntimeError, match=r"kernel_size=\(65536, 65536\) must not have more than"):
        PoolProblem.of((1, 1, 8, 8), (2**16, 2**16), (1, 1), (2**15, 2**15))


@given(st.integers(0, 12), st.integers(1, 12), st.integers(1, 5), step, st.integers(0, 9), step)
def test_taps_that_miss(inputs, outputs, taps, stride, pad, dilation):
    """Tried one by one. dy is of any extent: a transposed convolution's result may be larger than its inputs reach."""
    places = [h + pad - r * dilation for h in range(inputs) for r in range(taps)]
    missing = [place for place in places if place % stride == 0 and not 0 <= place // stride < outputs]
    assert taps_miss(inputs, outputs, taps, stride, pad, dilation) == bool(missing)


def test_layers_without_taps_that_miss():
    """Nothing is compiled for them: pointwise convolutions, patches, and full padding."""
    for window, stride, pad, misses in (
        (1, 1, 0, False),
        (1, 2, 0, False),
        (2, 2, 0, False),
        (3, 1, 2, False),
        (3, 1, 1, True),
        (3, 1, 0, True),
    ):
        problem = ConvProblem.of((1, 8, 8, 8), (8, 8, window, window), (stride, stride), (pad,) * 4, (1, 1), 1)
        assert (problem.taps_miss_h, problem.taps_miss_w) == (misses, misses), (window, stride, pad)
    assert ConvProblem.of((1, 8, 9, 8), (8, 8, 2, 2), (2, 2), (0, 0, 0, 0), (1, 1), 1).taps_miss_h, (
        "a row that no window covers"
    )
