"""Who serves a convolution inside our operators: a kernel of ours, or the library's convolution (cuDNN's on a GPU).

Nobody shall be slower for having installed cnnfast, so what was not measured on a GPU is the library's there. With
algorithm="auto" the first of these that applies decides, on sizes that are numbers, so that dynamic shapes do not
compile again:

1. A measured row for this GPU (cnnfast_kernels/tables.py): whoever was faster. It serves batches up to twice and half
  its own, the layouts and the epilogue that were measured, and only tensors that its tile can take.
2. Elsewhere than on a GPU, that is in the interpreter: ours.
3. Depthwise convolution in half precision, channels_last, with one filter a channel: ours, since libraries are known to
  be slow at it.
4. Padding that the library does not take, more at one end than at the other ("same" with an even kernel): ours where
  all operands are channels_last; else the library's, on an input that is padded first, as PyTorch does it.
5. Every other convolution: the library's. Statistics, norm, addition and activation are then one pass of ours over its
  output.

Kernels that load one element at a time, as ours do where channels are not adjacent, serve on a GPU only where they were
measured to win. Under backend("kernels"), and with another algorithm than "auto", nothing is asked: ours serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnnfast_kernels import devices, launch, tables
from cnnfast_kernels.choosing import Geometry, Question, ask_dgrad, ask_fprop, ask_wgrad, measured
from cnnfast_kernels.layout import Layout
from cnnfast_kernels.problem import ConvProblem, output_extent

from .. import dispatch

UNMEASURED = "it is unmeasured on this GPU: cnnfast.tune(model, *inputs) measures it"
DEPTHWISE = "depthwise convolution in half precision, channels_last, is ours until measured: cnnfast.tune(model, *inputs) does that"
PADDED = "the library does not take this padding, and the tensors are channels_last"
# The kinds of device on which the library serves what was not measured.
LIBRARY_FIRST = ("cuda",)


class Decision(NamedTuple):
    """Who serves, why, for traces, and the layout of the result. pads: whether the library's input is padded first."""

    library: bool
    reason: str
    result: Layout
    pads: bool


def asked(algorithm: str, x: Tensor) -> bool:
    """Whether a call has to be decided about: where neither a row nor the kind of device can give it to the library,
    nobody waits.
    """
    first = x.device.type in LIBRARY_FIRST or x.is_meta  # whatever a meta tensor stands for
    return algorithm == "auto" and (first or tables.library or bool(dispatch._traces))


def takes(g: ConvProblem) -> bool:
    """Whether the library can compute it as it is: it pads both ends of an axis alike, which may be more than the last
    window needs.
    """
    P = output_extent(g.H, g.R, g.stride_h, g.pad_h, g.pad_h, g.dil_h)
    Q = output_extent(g.W, g.S, g.stride_w, g.pad_w, g.pad_w, g.dil_w)
    return (g.P, g.Q) == (P, Q)


def by_library(q: Question) -> Decision:
    """What the library would do."""
    result = {"fprop": q.y, "dgrad": q.x, "wgrad": q.w}[q.operation]
    return Decision(True, UNMEASURED, result, not takes(q.problem))


def decide(q: Question, library_first: bool) -> Decision:
    """The rule above. library_first: whether the tensors are on a device where the library serves what was not
    measured.
    """
    g, theirs = q.problem, by_library(q)
    ours = theirs._replace(library=False, reason="")
    row = measured(q)
    if row is not None:
        if row.winner == "kernels":
            return ours
        times = {name: f"{time:.1f} us" for name, time in row.microseconds.items()}
        at = f"our best kernel {times.get('kernels')} at batch {row.key.problem.N} when measured on this GPU"
        return theirs._replace(reason=f"it took {times.get('library')}, {at}")
    if not library_first or 0 in (g.N, g.H, g.W):  # libraries refuse some of what is empty
        return ours
    if g.is_depthwise and g.K == g.C and q.precision == "half" and q.channels_last:
        return ours._replace(reason=DEPTHWISE)
    if theirs.pads and q.channels_last:
        return ours._replace(reason=PADDED)
    return theirs


@launch.planned
def _decide_fprop(
    x_shape,
    x_strides,
    w_shape,
    w_strides,
    residual_strides,
    dtype,
    geometry: Geometry,
    kind,
    activation,
    tf32,
    gpu,
    aligned,
    library_first,
) -> Decision:
    x, w = Layout(x_shape, x_strides, dtype), Layout(w_shape, w_strides, dtype)
    return decide(ask_fprop(x, w, residual_strides, geometry, kind, activation, tf32, gpu, aligned), library_first)


@launch.planned
def _decide_dgrad(
    dy_shape, dy_strides, w_shape, w_strides, dtype, x_shape, fmt, geometry: Geometry, tf32, gpu, aligned, library_first
) -> Decision:
    dy, w = Layout(dy_shape, dy_strides, dtype), Layout(w_shape, w_strides, dtype)
    return decide(ask_dgrad(dy, w, x_shape, fmt, geometry, tf32, gpu, aligned), library_first)


@launch.planned
def _decide_wgrad(
    x_shape, x_strides, dy_shape, dy_strides, dtype, w_shape, fmt, geometry: Geometry, tf32, gpu, aligned, library_first
) -> Decision:
    x, dy = Layout(x_shape, x_strides, dtype), Layout(dy_shape, dy_strides, dtype)
    return decide(ask_wgrad(x, dy, w_shape, fmt, geometry, tf32, gpu, aligned), library_first)


def fprop(
    x: Tensor,
    w: Tensor,
    geometry: Geometry,
    tf32: bool,
    kind: str = "",
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Decision | None:
    """What the library is to do, or None if our kernels serve. `kind` as in choosing.Question."""
    addresses = x.data_ptr() | w.data_ptr() | (0 if residual is None else residual.data_ptr())
    strides = None if residual is None else residual.stride()
    where, device = (
        (x.shape, x.stride(), w.shape, w.stride(), strides, x.dtype, geometry, kind, activation, tf32),
        x.device,
    )
    return _told(
        _decide_fprop(*where, devices.gpu(device), addresses % 16 == 0, devices.type_of(device) in LIBRARY_FIRST)
    )


def dgrad(
    dy: Tensor, w: Tensor, x_shape: Sequence[int], fmt: torch.memory_format, geometry: Geometry, tf32: bool
) -> Decision | None:
    """As `fprop`, of the gradient of a convolution's input."""
    where, device = (
        (dy.shape, dy.stride(), w.shape, w.stride(), dy.dtype, tuple(x_shape), fmt, geometry, tf32),
        dy.device,
    )
    aligned = (dy.data_ptr() | w.data_ptr()) % 16 == 0
    return _told(_decide_dgrad(*where, devices.gpu(device), aligned, devices.type_of(device) in LIBRARY_FIRST))


def wgrad(
    x: Tensor, dy: Tensor, w_shape: Sequence[int], fmt: torch.memory_format, geometry: Geometry, tf32: bool
) -> Decision | None:
    """As `fprop`, of the gradient of a convolution's weights."""
    where, device = (x.shape, x.stride(), dy.shape, dy.stride(), x.dtype, tuple(w_shape), fmt, geometry, tf32), x.device
    aligned = (x.data_ptr() | dy.data_ptr()) % 16 == 0
    return _told(_decide_wgrad(*where, devices.gpu(device), aligned, devices.type_of(device) in LIBRARY_FIRST))


def _told(decision: Decision) -> Decision | None:
    """The decision, if the library serves by it. Traces learn the reason."""
    library = decision.library and dispatch.library_allowed()
    reason = decision.reason if library or not decision.library else "the library may not serve: kernels were asked for"
    if reason:
        dispatch.note("library" if library else "kernels", reason)
    return decision if library else None
