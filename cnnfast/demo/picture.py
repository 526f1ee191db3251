"""The demo's picture: what was computed, how wrong it is beside PyTorch's own, and where time and memory go. Titles are
findings, made from the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from . import panels
from .digits import Digits
from .findings import short
from .results import Results

DIGITS = 13
MAPS = 5  # in each of two rows
DPI = 100
WIDTH = 13.0  # inches
VIEW_ROWS = 2
GAP = 2  # white pixels around each view


@dataclass
class Images:
    """photograph [3, H, W] in [0, 1]; stem [C, H/2, W/2] and block [C, H/4, W/4] of it; views of it, [N, 3, h, w] in
    [0, 1]; the held-out digits, and what was read in each, [N].
    """

    photograph: Tensor
    stem: Tensor
    block: Tensor
    views: Tensor
    digits: Digits
    read: Tensor


def picture(results: Results, images: Images) -> Figure:
    rows = len(panels.judged(results.proofs))
    heights = [4.1, 2.65, 1.5, 1.4 + 0.26 * max(rows, 2), 4.3] + [5.5] * bool(results.timings)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _maps(parts[0], images, results)
    _views(parts[1], images, results)
    _digits(parts[2], images, results)
    panels.errors(parts[3], results)
    panels.costs(parts[4], results)
    if results.timings:
        panels.times(parts[5], results)
    return figure


def draw(results: Results, images: Images, file: Path) -> None:
    """Writes a PNG."""
    picture(results, images).savefig(file, dpi=DPI)


def _maps(figure, images: Images, results: Results) -> None:
    panels.headline(figure, maps_title(results))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.0))
    axes = left.subplots()
    axes.imshow(images.photograph.permute(1, 2, 0).numpy())
    axes.set_title(f"a photograph, {images.photograph.shape[1]} x {images.photograph.shape[2]} pixels", fontsize=10)
    axes.axis("off")
    rows = right.subfigures(2, 1)
    texts = ("after the stem: 7x7 convolution of stride 2, norm, ReLU", "after a 3x3 max pool and a residual block")
    for row, maps, text in zip(rows, (images.stem, images.block), texts, strict=True):
        liveliest = maps.flatten(1).std(1).argsort(descending=True)[:MAPS]
        for axes, channel in zip(row.subplots(1, MAPS), liveliest, strict=False):
            axes.imshow(maps[channel].numpy(), cmap="cividis")
            axes.set_axis_off()
        row.suptitle(f"{text} ({MAPS} of {len(maps)} maps, {maps.shape[1]} x {maps.shape[2]})", fontsize=10)


def maps_title(results: Results) -> str:
    m = results.maps
    if m is None or not m.launches:
        return "PyTorch computed these feature maps: no kernel ran here"
    ours, theirs = map(short, m.errors)
    errors = f"at most {ours} ulp from float64; PyTorch's own are {theirs}"
    return f"Our kernels computed these feature maps: {errors}" if m.ok else f"These feature maps are WRONG: {errors}"


def _views(figure, images: Images, results: Results) -> None:
    panels.headline(figure, views_title(results))
    columns = -(-len(images.views) // VIEW_ROWS)
    framed = nn.functional.pad(images.views, (GAP,) * 4, value=1.0)
    rows = [torch.cat([*row], 2) for row in framed.split(columns)]
    rows[-1] = nn.functional.pad(rows[-1], (0, rows[0].shape[2] - rows[-1].shape[2]), value=1.0)
    axes = figure.subplots()
    axes.imshow(torch.cat(rows, 1).permute(1, 2, 0).numpy())
    axes.axis("off")


def views_title(results: Results) -> str:
    a = results.augmentation
    if a is None or not a.launches:
        return "PyTorch augmented this photograph: no kernel ran here"
    if not a.ok:
        return f"These views are WRONG: our kernels are {a.apart:.2g} of 255 levels from PyTorch's operators"
    launches = f"our kernels take {len(a.launches)} launches for the batch"
    return f"One photograph, augmented {a.count} times by cnn.Augment: {launches}"


def _digits(figure, images: Images, results: Results) -> None:
    """Some of the held-out digits, those that were misread first."""
    t = results.training
    right = f"{t.held_out - len(t.mistakes)} of {t.held_out} unseen digits are read right ({t.accuracy:.1%})"
    shown = "; those misread come first, framed" if t.mistakes else ", after training on others, moved and turned"
    panels.headline(figure, right + shown)
    correct = images.read == images.digits.labels
    order = correct.int().argsort(stable=True)[:DIGITS]
    for axes, i in zip(np.atleast_1d(figure.subplots(1, DIGITS)), order, strict=False):
        axes.imshow(images.digits.images[i, 0].numpy(), cmap="gray_r")
        axes.set_xticks([])
        axes.set_yticks([])
        read, label = int(images.read[i]), int(images.digits.labels[i])
        if correct[i]:
            axes.spines[:].set_visible(False)
            axes.set_title(f"read {read}", fontsize=10)
        else:
            axes.spines[:].set(color=panels.LIMIT, linewidth=2.5)
            axes.set_title(f"read {read}, is {label}", fontsize=10, color=panels.LIMIT, fontweight="bold")
