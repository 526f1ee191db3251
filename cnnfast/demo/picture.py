"""The demo's picture: the photograph, what the residual block makes of it, digits as they were read, errors, and times
if there are any.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .results import Proof, Results

OURS, THEIRS, WRONG = "#1f6fb4", "#c7c7c7", "#c0392b"
MAPS = (2, 4)
DIGITS = 12


@dataclass
class Images:
    """photograph [3, H, W] in [0, 1]; features [C, P, Q] of it, and who computed them; digits [N, 8, 8], with what they
    are and what was read, each [N].
    """

    photograph: Tensor
    features: Tensor
    features_by: str
    digits: Tensor
    labels: Tensor
    read: Tensor


def draw(results: Results, images: Images, file: Path) -> None:
    """Writes a PNG."""
    heights = [3.6, 1.4, 6.5] + [6.0] * bool(results.timings)
    figure = Figure(figsize=(13, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _photograph(parts[0], images)
    _digits(parts[1], images, results)
    _errors(parts[2], results.proofs)
    if results.timings:
        _times(parts[3], results)
    figure.savefig(file, dpi=110)


def _photograph(figure, images: Images) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2))
    axes = left.subplots()
    axes.imshow(images.photograph.permute(1, 2, 0).numpy())
    axes.set_title(f"photograph, {images.photograph.shape[1]} x {images.photograph.shape[2]}", fontsize=11)
    axes.axis("off")
    shown = f"{MAPS[0] * MAPS[1]} of {len(images.features)} channels (by {images.features_by})"
    right.suptitle(f"after the stem and one residual block: {shown}")
    liveliest = images.features.flatten(1).std(1).argsort(descending=True)
    for axes, channel in zip(right.subplots(*MAPS).flat, liveliest, strict=False):
        axes.imshow(images.features[channel].numpy(), cmap="magma")
        axes.axis("off")


def _digits(figure, images: Images, results: Results) -> None:
    """Some of the held-out digits, those that were misread first."""
    t = results.training
    right = f"{t.held_out - len(t.mistakes)} of {t.held_out} right, {t.accuracy:.1%}"
    figure.suptitle(f"held-out digits as the network reads them: {right}", fontsize=11)
    order = (images.read == images.labels).int().argsort(stable=True)
    for axes, i in zip(figure.subplots(1, DIGITS).flat, order, strict=False):
        axes.imshow(images.digits[i].numpy(), cmap="gray_r")
        right = images.read[i] == images.labels[i]
        axes.set_title(
            f"{images.read[i]}" if right else f"{images.read[i]}, is {images.labels[i]}",
            color="black" if right else WRONG,
        )
        axes.axis("off")


def _errors(figure, proofs: list[Proof]) -> None:
    """Bars of the largest errors against float64, a pair for each call and direction, in the first dtype of a proof."""
    subjects = list({proof.title: proof for proof in reversed(proofs)}.values())[::-1]
    if not subjects:
        figure.suptitle("triton is not installed here: no kernel ran")
        return
    figure.suptitle("largest error against float64, of the tensor nearest to its limit", fontsize=11)
    grid = figure.subplots(1, len(subjects), squeeze=False)[0]
    for axes, proof in zip(grid, subjects, strict=True):
        bars = [
            (f"{row.layer or row.operation}{', backward' if backward else ''}", worst)
            for row in proof.report.rows
            for backward in (False, True)
            if (worst := row.worst(backward))
        ]
        places = np.arange(len(bars))
        axes.barh(places - 0.2, [c.error for _, c in bars], 0.4, color=OURS, label="our kernels")
        axes.barh(places + 0.2, [c.torch_error for _, c in bars], 0.4, color=THEIRS, label="PyTorch")
        axes.plot([c.limit for _, c in bars], places, "|", color=WRONG, markersize=14, label="limit")
        axes.set_yticks(places, [name for name, _ in bars])
        axes.invert_yaxis()
        axes.set_xscale("log")
        for place, (_, worst) in zip(places, bars, strict=True):
            if worst.error == worst.torch_error == 0:  # a logarithmic axis cannot show it
                axes.text(0.01, place, "both exact", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.set_title(textwrap.fill(f"{proof.title}, {proof.dtype}", 34), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(loc="lower right", fontsize=9)


def _times(figure, results: Results) -> None:
    """Bars of milliseconds, a pair for each layer and direction; what was left out is named below."""
    figure.suptitle(textwrap.fill(results.timed, 150), fontsize=9)
    timed = [t for t in results.timings if t.timed]
    places = np.arange(len(timed))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, ours, theirs in (
        (left, "forward", [t.forward for t in timed], [t.torch_forward for t in timed]),
        (right, "backward", [t.backward for t in timed], [t.torch_backward for t in timed]),
    ):
        axes.barh(places - 0.2, [ms or 0 for ms in ours], 0.4, color=OURS, label="our kernels")
        axes.barh(places + 0.2, [ms or 0 for ms in theirs], 0.4, color=THEIRS, label="PyTorch")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks(places, [t.layer for t in timed], fontsize=7)
    left.invert_yaxis()
    right.legend(loc="lower right", fontsize=9)
    if results.left_out:
        figure.supxlabel(textwrap.fill(results.left_out, 190), fontsize=7)
