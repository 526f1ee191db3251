"""The cases of fuzz.py whose results take a batch norm: its statistics and scale are chosen so that nothing is
rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as theirs
from hypothesis import strategies as st
from torch import Tensor

import cnnfast.functional as ours
from cnnfast.activations import activate
from tests.support.agreement import integers
from tests.support.fuzz import (
    ALGORITHMS,
    BATCHES,
    CAPACITY,
    DTYPES,
    Case,
    Compared,
    axes,
    channels,
    compare,
    few_taps,
    frozen_inputs,
    geometry_branches,
    per_axis,
)
from tests.support.views import views

# (eps, spread): spread ** 2 + eps, the variance of neighbours that lie `spread` around their mean, is a power of four.
SPREADS = [(3.0, 1.0), (0.75, 0.5), (1.75, 1.5), (1.0, 0.0), (0.25, 0.0)]
# The same of given variances: 4 ** k - eps.
EPS = [0.0, 0.25]
SLOPES = [0.5, 2.0, 0.0, -0.5]


def variances(channels: int, eps: float) -> Tensor:
    return 4.0 ** integers(channels, seed=21, dtype=torch.float64) - eps


def around_a_mean(shape: tuple[int, ...], spread: float) -> Tensor:
    """A small whole mean for each channel, and neighbours, along the last axis or if there are only channels along the
    first, `spread` above it and below: any even number of them has the mean and the variance of all.
    """
    along = len(shape) - 1 if len(shape) > 2 else 0
    pairs = list(shape)
    pairs[along] //= 2
    sign = 2 * integers(*pairs, seed=31, dtype=torch.float64).clamp(min=0) - 1
    deviation = torch.stack([sign, -sign], along + 1).flatten(along, along + 1)
    mean = integers(shape[1], largest=2, seed=32, dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return mean + spread * deviation


def norm_dtypes(dtype: torch.dtype) -> st.SearchStrategy[torch.dtype]:
    """The dtype of the parameters and statistics of a norm."""
    return st.just(dtype) if dtype == torch.float64 else st.sampled_from([dtype, torch.float32])


@st.composite
def batch_norms(draw: st.DrawFn) -> Case:
    """x, weight, bias, running_mean, running_var."""
    training, dimensions, C = draw(st.booleans()), draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 5, 8, 33]))
    if training:
        spatial = [draw(st.sampled_from([1, 2, 4])) for _ in range(dimensions - 1)] + [
            draw(st.sampled_from([2, 4, 8, 16]))
        ] * (dimensions > 0)
        N = draw(st.sampled_from([1, 2, 4] if dimensions else [2, 4, 16, 64]))
    else:
        spatial, N = [draw(st.integers(1, 9)) for _ in range(dimensions)], draw(st.integers(0, 3))
    shape = (N, C, *spatial)
    eps, spread = draw(st.sampled_from(SPREADS)) if training else (draw(st.sampled_from(EPS)), 0.0)
    running = not training or draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    parameters = draw(norm_dtypes(dtype))
    shapes = (shape, *((C,) if draw(st.booleans()) else None for _ in range(2)), *[(C,) if running else None] * 2)
    of = [draw(views(len(shape), repeated=not training)), draw(views(1)), draw(views(1))]
    if training and dimensions == 0:  # neighbours are not repeated
        of[0] = replace(of[0], repeated=(False, False))
    of += [draw(views(1, repeated=not training)) for _ in range(2)] + [draw(views(len(shape)))]
    options = {
        "training": training,
        "momentum": draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        "eps": eps,
        "spread": spread,
    }
    branches = ("training" if training else "eval", f"{dimensions} spatial axes")
    branches += ("affine",) * (shapes[1] is not None) + ("empty batch",) * (N == 0)
    frozen = (*draw(frozen_inputs(3)), 3, 4)
    return Case(shapes, tuple(of), dtype, options, (dtype, *[parameters] * 4), frozen, branches=branches)


def check_batch_norm(case: Case, device: torch.device) -> Compared:
    options = dict(case.options)
    spread, training = options.pop("spread"), options["training"]
    shape, *vectors = case.shapes
    assert shape is not None
    x = around_a_mean(shape, spread) if training else integers(*shape, largest=3, dtype=torch.float64)
    C = shape[1]
    of_channels = (
        2 * integers(C, seed=1, dtype=torch.float64) + 1,
        integers(C, seed=2, dtype=torch.float64),
        integers(C, seed=3, dtype=torch.float64),
        variances(C, options["eps"]) if not training else torch.ones(C, dtype=torch.float64),
    )
    values = [x, *(v if size is not None else None for v, size in zip(of_channels, vectors, strict=True))]

    def call(function: Any, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any) -> Tensor:
        return function(x, mean, var, weight, bias, **options)

    compared = compare(case, values, partial(call, ours.batch_norm), partial(call, theirs.batch_norm), device)
    if training and vectors[-1] is not None:
        assert_running(compared, 3)
    return compared


def assert_running(compared: Compared, first: int) -> None:
    """The running mean is exact; the running variance takes an unbiased one, which is rounded."""
    for i, ulps in ((first, 0), (first + 1, 2)):
        mine, right = compared.inputs[i], compared.exact[i]
        assert mine is not None
        assert right is not None
        tolerance = ulps * torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine.cpu().double(), right, rtol=tolerance, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Convolution with batch norm, residual and activation

ACTIVATIONS = [None, "relu", "leaky_relu", "relu6", "prelu"]


@st.composite
def fused_convolutions(draw: st.DrawFn, normed: bool = True) -> Case:
    """x, w, bias, bn_weight, bn_bias, residual, running_mean, running_var, slopes.

    Not normed: of conv_act, whose norm's operands are absent. slopes: prelu's, for which nobody wants a gradient, so
    that a kernel of ours applies it.

    In training every filter is one tap that takes one channel as it is, or negated: the statistics of the result are
    then known.
    """
    training, dtype = normed and draw(st.booleans()), draw(st.sampled_from(DTYPES))
    kind, C, K, groups = draw(channels())
    along = few_taps(draw(st.tuples(axes(), axes())), 9)
    N = draw(BATCHES.filter(bool))[0]
    if training:
        sizes = draw(st.sampled_from([2, 4])), draw(st.sampled_from([2, 4, 8]))
        along = tuple(replace(a, size=size, taps=1, stride=1, pad=0) for a, size in zip(along, sizes, strict=True))
        N = draw(st.sampled_from([1, 2]))
    extents = [(a.size + 2 * a.pad - a.dilation * (a.taps - 1) - 1) // a.stride + 1 for a in along]
    shapes = [
        (N, C, *per_axis(along, "size")),
        (K, C // groups, *per_axis(along, "taps")),
        *[(K,)] * 3,
        (N, K, *extents),
        (K,),
        (K,),
    ]
    for i in (2, 3, 4, 5):
        shapes[i] = shapes[i] if draw(st.booleans()) else None
    running = normed and (not training or draw(st.booleans()))
    shapes[6:] = shapes[6:] if running else [None, None]
    shapes[3:5] = shapes[3:5] if normed else [None, None]
    # what is stored between two kernels is exact
    if training or 2 * along[0].taps * along[1].taps * C // groups + 2 > CAPACITY[dtype]:
        dtype = draw(st.sampled_from(DTYPES[2:]))
    eps, spread = draw(st.sampled_from(SPREADS)) if training else (draw(st.sampled_from(EPS)), 0.0)
    activation = draw(st.sampled_from(ACTIVATIONS))
    shapes.append((draw(st.sampled_from([1, K])),) if activation == "prelu" else None)
    options = {
        "normed": normed,
        "activation": activation,
        "activation_arg": draw(st.sampled_from(SLOPES)) if activation == "leaky_relu" else None,
        "training": training,
        "momentum": 0.5,
        "eps": eps,
        "spread": spread,
        "stride": per_axis(along, "stride"),
        "padding": per_axis(along, "pad"),
        "dilation": per_axis(along, "dilation"),
        "groups": groups,
        "algorithm": draw(st.sampled_from(ALGORITHMS)),
    }
    of = [draw(views(4, repeated=not training)), draw(views(4, repeated=not training))]
    of[1] = replace(of[1], repeated=(False,) * 4) if training else of[1]
    of += [draw(views(len(shape or (1,)), repeated=not training or i < 4)) for i, shape in enumerate(shapes[2:])]
    of.append(draw(views(4)))
    branches = tuple(fused_branches(kind, shapes[5] is not None, options, geometry_branches(along))) + (
        "empty batch",
    ) * (N == 0)
    norm = draw(norm_dtypes(dtype))
    dtypes = (dtype, dtype, dtype, norm, norm, dtype, norm, norm, dtype)
    frozen = (*draw(frozen_inputs(6)), 6, 7, 8) if activation != "prelu" else tuple(range(9))
    return Case(tuple(shapes), tuple(of), dtype, options, dtypes, frozen, branches=branches)


def fused_branches(kind: str, residual: bool, options: dict[str, Any], geometry: Iterator[str]) -> Iterator[str]:
    yield from (kind, "training" if options["training"] else "eval", f"algorithm: {options['algorithm']}", *geometry)
    slope = options["activation_arg"]
    yield "norm" if options["normed"] else "no norm"
    yield f"activation: {options['activation']}" + ("" if slope is None or slope > 0 else ", slope not positive")
    if residual:
        yield "residual"


def check_fused_convolution(case: Case, device: torch.device) -> Compared:
    options = dict(case.options)
    spread, normed, training, eps = options.pop("spread"), options.pop("normed"), options["training"], options["eps"]
    geometry = {name: options[name] for name in ("stride", "padding", "dilation", "groups")}
    values: list[Tensor | None] = [
        None if shape is None else integers(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(case.shapes)
    ]
    x_shape, w_shape = case.shapes[:2]
    assert x_shape is not None
    assert w_shape is not None
    if training:
        values[0] = around_a_mean(x_shape, spread)
        taken = torch.arange(w_shape[0]) % w_shape[1]
        sign = 2 * integers(w_shape[0], seed=41, dtype=torch.float64).clamp(min=0) - 1
        values[1] = torch.zeros(w_shape, dtype=torch.float64)
        values[1][torch.arange(w_shape[0]), taken, 0, 0] = sign
    if values[8] is not None:  # powers of two
        values[8] = 2.0 ** values[8]
    if case.shapes[7] is not None:
        values[7] = torch.ones(w_shape[0], dtype=torch.float64) if training else variances(w_shape[0], eps)

    def mine(
        x: Tensor, w: Tensor, bias: Any, bn_weight: Any, bn_bias: Any, residual: Any, mean: Any, var: Any, slopes: Any
    ) -> Tensor:
        arg = options["activation_arg"] if slopes is None else slopes
        if not normed:
            how = {"activation": options["activation"], "activation_arg": arg, "algorithm": options["algorithm"]}
            return ours.conv_act(x, w, bias, **geometry, residual=residual, **how)
        given = options | {"activation_arg": arg, "bias": bias, "residual": residual}
        return ours.conv_bn_act(x, w, mean, var, bn_weight, bn_bias, **given)

    def right(
        x: Tensor, w: Tensor, bias: Any, bn_weight: Any, bn_bias: Any, residual: Any, mean: Any, var: Any, slopes: Any
    ) -> Tensor:
        u = theirs.conv2d(x, w, bias, **geometry)
        if normed:
            u = theirs.batch_norm(u, mean, var, bn_weight, bn_bias, training, options["momentum"], eps)
        arg = options["activation_arg"] if slopes is None else slopes
        slope = 0.01 if arg is None else arg
        return activate(u if residual is None else u + residual, options["activation"], slope)

    compared = compare(case, values, mine, right, device)
    if training and case.shapes[7] is not None:
        assert_running(compared, 6)
    return compared
