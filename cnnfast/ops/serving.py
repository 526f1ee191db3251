"""Who serves a convolution inside our operators: a kernel of ours, or the library's convolution (cuDNN's on a GPU).

Nobody shall be slower for having installed cnnfast, so on a GPU the library serves what was not measured there. With
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
measured to win. Under backend("kernels"), and with another algorithm than "auto", ours serve whatever these rules say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cnnfast_kernels import devices, launch
from cnnfast_kernels.conv import ConvolutionPlan
from cnnfast_kernels.layout import Layout
from cnnfast_kernels.problem import ConvProblem, output_extent
from cnnfast_kernels.questions import Question
from cnnfast_kernels.tables import TableRow

from .. import dispatch, recording

UNMEASURED = "it is unmeasured on this GPU: cnnfast.tune(model, *inputs) measures it"
DEPTHWISE = (
    "depthwise convolution in half precision, channels_last, is ours until measured: "
    "cnnfast.tune(model, *inputs) does that"
)
PADDED = "the library does not take this padding, and the tensors are channels_last"
# The kinds of device on which the library serves what was not measured.
LIBRARY_FIRST = ("cuda",)


class Decision(NamedTuple):
    """Who serves, the reason that traces show, and the layout of the result. pads: whether the library's input has to
    be padded first.
    """

    library: bool
    reason: str
    result: Layout
    pads: bool


def takes(g: ConvProblem) -> bool:
    """Whether the library takes this padding: it pads both ends of an axis alike, which may be more than the last
    window needs.
    """
    P = output_extent(g.H, g.R, g.stride_h, g.pad_h, g.pad_h, g.dil_h)
    Q = output_extent(g.W, g.S, g.stride_w, g.pad_w, g.pad_w, g.dil_w)
    return (g.P, g.Q) == (P, Q)


def by_library(q: Question) -> Decision:
    """The decision for the library, of a convolution that was not measured."""
    return Decision(True, UNMEASURED, q.result, not takes(q.problem))


def decide(q: Question, row: TableRow | None, library_first: bool) -> Decision:
    """The rules above. row: the measured one, if there is one (choosing.measured). library_first: whether the tensors
    are on a device where the library serves what was not measured.
    """
    g, theirs = q.problem, by_library(q)
    ours = theirs._replace(library=False, reason="")
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
def _decision(plan: ConvolutionPlan, library_first: bool) -> Decision:
    return decide(plan.question, plan.row, library_first)


def library_comes_first(device: torch.device) -> bool:
    """Whether the library serves what was not measured there."""
    kind = device.type
    return (devices.type_of(device) if kind == "meta" else kind) in LIBRARY_FIRST


def kernels_serve(plan: ConvolutionPlan, device: torch.device) -> bool:
    """Whether our kernels would serve by the plan, of which no trace is told."""
    return not (dispatch.library_allowed() and _decision(plan, library_comes_first(device)).library)


def library_serves(plan: ConvolutionPlan, device: torch.device) -> Decision | None:
    """What the library is to do for tensors on `device`, or None if our kernels serve by the plan. Traces learn why."""
    kind = device.type  # asked here, as in every call, without entering a function more
    decision: Decision = _decision(plan, library_comes_first(device) if kind == "meta" else kind in LIBRARY_FIRST)
    if not decision.reason:
        return None
    library = decision.library and dispatch.library_allowed()
    reason = decision.reason if library or not decision.library else "the library may not serve: kernels were asked for"
    recording.note("library" if library else "kernels", reason)
    return decision if library else None
