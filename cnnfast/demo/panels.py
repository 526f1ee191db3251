"""The diagrams of the demo's picture: errors, costs and times, each under a title that says what it shows."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np

from cnnfast.checking import CheckRow, Comparison

from .costs import LayerCosts
from .results import Proof, Results, in_units

# Okabe and Ito's colours, which people who see few of them can tell apart (https://jfly.uni-koeln.de/color/).
OURS, THEIRS, LIMIT, QUIET = "#0072B2", "#E69F00", "#D55E00", "#9a9a9a"
ERRORS_AXIS = "largest error, ulp: last places of the tensor's largest value"
SMALLEST = 0.03  # ulp; below it the axis of errors is linear, so that 0 has a place

OPERATIONS = {
    "conv_bn_act": "conv + norm + act",
    "conv_act": "conv + act",
    "bn_act": "norm + act",
    "conv2d": "conv",
    "conv1d": "1-D conv",
    "conv_transpose2d": "transposed conv",
    "batch_norm": "batch norm",
    "max_pool2d": "max pool",
    "avg_pool2d": "average pool",
    "adaptive_avg_pool2d": "adaptive average pool",
    "global_avg_pool2d": "global average pool",
}


def headline(figure, text: str) -> None:
    figure.suptitle(text, fontsize=12.5, fontweight="bold", x=0.01, ha="left")


# ----------------------------------------------------------------------------------------------------------------------
# Errors


@dataclass
class Judged:
    """One call, with the comparison nearest to its limit in each direction, and the dtype that it was made in."""

    subject: str
    label: str
    ok: bool
    worst: dict[bool, tuple[Comparison, str]]


def judged(proofs: list[Proof]) -> list[Judged]:
    """The calls of all proofs: one that was made in several dtypes, or for several sizes, stands here once."""
    found: dict[tuple[str, str], Judged] = {}
    for proof in proofs:
        for row in proof.report.rows:
            label = described(row)
            call = found.setdefault((proof.subject, label), Judged(proof.subject, label, True, {}))
            call.ok &= row.verdict == "ok"
            for backward in (False, True):
                worst = row.worst(backward)
                known = call.worst.get(backward)
                if worst is not None and (known is None or worst.excess > known[0].excess):
                    call.worst[backward] = worst, proof.dtype
    return list(found.values())


def described(row: CheckRow) -> str:
    """The layer and what it computes, as "stem: 7x7 conv + norm + act"."""
    shapes = [shape.split("x") for shape in row.shapes.split()]
    taps = ""
    if row.operation.startswith("conv") and len(shapes) > 1:
        taps = "x".join(shapes[1][2:]) + ("-tap " if row.operation == "conv1d" else " ")
    does = taps + OPERATIONS.get(row.operation, row.operation)
    layer = row.layer.removesuffix(".conv")
    return f"{layer}: {does}" if layer else does


def errors_title(results: Results) -> str:
    if not results.proofs:
        return "Triton is not installed here: no kernel ran, and there are no errors to show"
    held, calls = results.held
    if held < calls:
        return f"{calls - held} of {calls} checks FAIL: the report names them, and why"
    return f"Every error is within its limit, twice PyTorch's own plus rounding: all {calls} checks hold"


def errors(figure, results: Results) -> None:
    """Of each call, in ulp: ours, PyTorch's and the limit, on logarithmic axes, forward and backward."""
    headline(figure, errors_title(results))
    calls = judged(results.proofs)
    if not calls:
        return
    both = figure.subplots(1, 2, sharey=True, sharex=True)
    places = list(range(len(calls)))
    for axes, backward in zip(both, (False, True), strict=True):
        axes.set_xscale("symlog", linthresh=SMALLEST, linscale=0.4)
        for place, call in zip(places, calls, strict=True):
            if backward in call.worst:
                comparison, dtype = call.worst[backward]
                if comparison.limit:
                    _row(axes, place, comparison, dtype)
        axes.set_title("backward: gradients" if backward else "forward: results", fontsize=10, loc="left")
        axes.set_xlabel(ERRORS_AXIS, fontsize=9)
        axes.grid(axis="x", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        for place in places[1:]:
            if calls[place].subject != calls[place - 1].subject:
                axes.axhline(place - 0.5, color=QUIET, linewidth=0.8)
    ticks = [0, 0.1, 1, 10, 100, 1000]
    right = max(both[0].get_xlim()[1], 20.0)
    both[0].set_xlim(-0.006, right)
    both[0].set_xticks([t for t in ticks if t <= right], [f"{t:g}" for t in ticks if t <= right])
    both[0].set_yticks(
        places, [f"{call.subject} · {call.label}" + " FAIL" * (not call.ok) for call in calls], fontsize=9
    )
    for text, call in zip(both[0].get_yticklabels(), calls, strict=True):
        if not call.ok:
            text.set(color=LIMIT, fontweight="bold")
    both[0].set_ylim(len(calls) - 0.5, -0.5)
    handles = [
        both[1].plot([], [], **style, linestyle="none", label=label)[0]
        for style, label in ((_ours(), "our kernels"), (_theirs(), "PyTorch"), (_limit(), "limit for ours"))
    ]
    figure.legend(handles=handles, loc="upper right", ncols=3, fontsize=10, frameon=False)


def _ours():
    return {"marker": "o", "color": OURS, "markersize": 7}


def _theirs():
    return {"marker": "D", "markeredgecolor": "#b37700", "markerfacecolor": "none", "markersize": 7.5, "mew": 1.8}


def _limit():
    return {"marker": "|", "color": LIMIT, "markersize": 12, "mew": 2.5}


def _row(axes, place: int, comparison: Comparison, dtype: str) -> None:
    ours, theirs, limit = (
        in_units(error, comparison.largest, dtype)
        for error in (comparison.error, comparison.torch_error, comparison.limit)
    )
    axes.plot([0, limit], [place, place], color="#dddddd", linewidth=1.2, zorder=1)
    for value, style in ((limit, _limit()), (theirs, _theirs()), (ours, _ours())):
        if np.isfinite(value):
            axes.plot([value], [place], linestyle="none", zorder=3, clip_on=False, **style)


# ----------------------------------------------------------------------------------------------------------------------
# Where time and memory go


def costs_title(results: Results) -> str:
    c = results.costs
    if c is None:
        return "What a network computes and moves was not counted"
    flops, moved = c.pointwise
    return (
        f"{c.name}'s norms, ReLUs and additions are {flops:.1%} of its FLOPs, but {moved:.0%} of its bytes:"
        f" fused, it moves {c.saved:.0%} less"
    )


def costs(figure, results: Results) -> None:
    """Bars along the depth of a network: FLOPs, and bytes with and without fusion."""
    headline(figure, costs_title(results))
    c = results.costs
    if c is None:
        return
    places = np.arange(len(c.layers))
    left, right = figure.subplots(1, 2)
    whole = c.flops
    left.bar(places, [100 * layer.flops / whole for layer in c.layers], 0.8, color=OURS, label="convolutions, fc")
    left.bar(
        places,
        [100 * layer.pointwise_flops / whole for layer in c.layers],
        0.8,
        bottom=[100 * layer.flops / whole for layer in c.layers],
        color=THEIRS,
        label="norms, ReLUs, additions",
    )
    left.set_ylabel("share of all FLOPs, %")
    left.set_title(f"compute: {whole / 1e9:,.0f} GFLOPs a batch", fontsize=10, loc="left")
    whole = c.unfused_bytes
    own = [100 * layer.bytes / whole for layer in c.layers]
    right.bar(places, own, 0.8, color=OURS, label="convolutions, pools, fc")
    more = [100 * layer.pointwise_bytes / whole for layer in c.layers]
    right.bar(places, more, 0.8, bottom=own, color=THEIRS, label="norms, ReLUs, additions, each on its own")
    fused = [100 * layer.fused_bytes / whole for layer in c.layers]
    right.step([*(places - 0.5), places[-1] + 0.5], [*fused, fused[-1]], where="post", color="black", linewidth=1.3,
               label="all of it, each convolution fused with what follows")  # fmt: skip
    right.set_ylabel("share of all bytes, %")
    gib, less = (size / 2**30 for size in (c.unfused_bytes, c.fused_bytes))
    right.set_title(
        f"memory: {gib:.1f} GiB a batch moved by separate operators, {less:.1f} fused", fontsize=10, loc="left"
    )
    starts, names = _stages(c.layers)
    for axes in (left, right):
        axes.set_xlim(-0.7, len(places) - 0.3)
        axes.set_xticks(starts, names, fontsize=9, ha="left")
        axes.set_xlabel(f"layers of {c.name}, from the image to the classes", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.22)  # the legend stands above the bars
        axes.legend(loc="upper right", fontsize=9, frameon=False)
    told = f"Computed from shapes: batch {c.batch}, bfloat16, inference."
    if not results.timings:
        told += " Times are not measured without a GPU: an interpreter's seconds say nothing about one."
    figure.supxlabel(told, fontsize=9.5, x=0.01, ha="left")


def _stages(layers: list[LayerCosts]) -> tuple[list[int], list[str]]:
    """Where the first layer of each stage stands, and the stage's name."""
    first: dict[str, int] = {}
    for place, layer in enumerate(layers):
        name = layer.name.partition(".")[0]
        if name.startswith("layer"):
            first.setdefault(name, place)
    return list(first.values()), list(first)


def times_title(results: Results) -> str:
    timed = [t for t in results.timings if t.forward and t.torch_forward]
    if not timed:
        return "No convolution was timed: the report says why"
    faster = sum((t.forward or 0) < (t.torch_forward or 0) for t in timed)
    return f"Forward, our kernels are faster than PyTorch's in {faster} of {len(timed)} convolutions"


def times(figure, results: Results) -> None:
    """Bars of milliseconds, a pair for each layer and direction; what was left out is named below."""
    headline(figure, times_title(results))
    timed = [t for t in results.timings if t.timed]
    places = np.arange(len(timed))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, ours, theirs in (
        (left, "forward", [t.forward for t in timed], [t.torch_forward for t in timed]),
        (right, "backward", [t.backward for t in timed], [t.torch_backward for t in timed]),
    ):
        axes.barh(places - 0.2, [ms or 0 for ms in ours], 0.4, color=OURS, label="our kernels")
        axes.barh(places + 0.2, [ms or 0 for ms in theirs], 0.4, color=THEIRS, label="PyTorch")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("milliseconds of one call, measured", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks(places, [t.layer for t in timed], fontsize=8)
    left.invert_yaxis()
    right.legend(loc="lower right", fontsize=9, frameon=False)
    told = textwrap.fill(" ".join(filter(None, [results.timed + ".", results.left_out])), 190)
    figure.supxlabel(told, fontsize=8, x=0.01, ha="left")
