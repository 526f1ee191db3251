"""A run as pictures: the roofline, the layers beside their strongest baselines, images per second by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .rows import LAYER, BenchRow, jobs, our_best, speedup, strongest

OURS, THEIRS, REFERENCE = "#1f6fb4", "#e08214", "#b0b0b0"
STYLES = ("-", "--", "-.", ":")


def draw(rows: Sequence[BenchRow], folder: Path) -> list[Path]:
    """Writes the pictures for which there are rows into `folder`, as PNG files, and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.median]
    layers = [group for group in jobs(row for row in timed if row.kind == LAYER) if speedup(group)]
    models = [row for row in timed if row.kind != LAYER]
    pictures = {
        "roofline": (_roofline, [row for row in timed if row.flops]),
        "layers": (_layers, layers),
        "images": (_images, models),
    }
    files = []
    for name, (picture, data) in pictures.items():
        if data:
            figure = picture(data)
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=110)
    return files


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _color(row: BenchRow) -> str:
    return OURS if row.ours else THEIRS if row.baseline else REFERENCE


def _roofline(rows: list[BenchRow]) -> Figure:
    """TFLOP/s over FLOPs a byte; the bytes of each point are those of its own level of fusion."""
    figure, axes = _figure(9, 6)
    peaks = rows[0].peaks
    intensity = [row.flops / row.bytes for row in rows if row.flops and row.bytes]
    axis = np.geomspace(min(intensity) / 2, max(*intensity, peaks.flops / peaks.bytes) * 2, 200)
    axes.loglog(axis, np.minimum(peaks.flops, axis * peaks.bytes) / 1e12, color="black")
    for label, color in (("cnnfast", OURS), ("baselines", THEIRS), ("NCHW", REFERENCE)):
        those = [row for row in rows if _color(row) == color and row.flops and row.bytes]
        x, y = [row.flops / row.bytes for row in those], [row.tflops for row in those]  # pyright: ignore
        axes.scatter(x, y, s=22, alpha=0.8, color=color, label=label)
    axes.set_xlabel("FLOPs a byte that must move")
    axes.set_ylabel("TFLOP/s")
    measured = f"{peaks.flops / 1e12:.3g} TFLOP/s and {peaks.bytes / 1e9:.4g} GB/s, both measured"
    axes.set_title(f"{rows[0].machine.device}: {measured}", fontsize=10)
    axes.legend()
    return figure


def _layers(groups: list[list[BenchRow]]) -> Figure:
    """The speed of each layer against the strongest baseline; below 1 it loses."""
    groups = sorted(groups, key=lambda group: speedup(group) or 0)
    figure, axes = _figure(9, 1.5 + 0.19 * len(groups))
    ratios = [speedup(group) or 0 for group in groups]
    places = np.arange(len(groups))
    axes.barh(places, ratios, color=[OURS if ratio >= 1 else "#c0392b" for ratio in ratios])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, [f"{group[0].subject}, {group[0].mode}" for group in groups], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.005)
    first = groups[0][0]
    axes.set_title(f"speed against the strongest baseline, {first.dtype}, {first.machine.device}", fontsize=10)
    return figure


def _images(rows: list[BenchRow]) -> Figure:
    """Images a second by batch, of the strongest baseline and of our best."""
    figure, axes = _figure(9, 6)
    subjects = list(dict.fromkeys((row.subject, row.mode, row.dtype) for row in rows))
    for i, subject in enumerate(subjects):
        groups = list(jobs(row for row in rows if (row.subject, row.mode, row.dtype) == subject))
        for label, color, pick in (("cnnfast", OURS, our_best), ("strongest baseline", THEIRS, strongest)):
            best = sorted((row for group in groups if (row := pick(group))), key=lambda row: row.batch)
            speeds = [row.images_per_second for row in best]
            axes.semilogx(
                [r.batch for r in best],
                speeds,
                STYLES[i % 4],
                marker="o",
                color=color,
                label=f"{', '.join(subject)}: {label}",
            )
    batches = sorted({row.batch for row in rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch")
    axes.set_ylabel("images a second")
    axes.set_title(rows[0].machine.device, fontsize=10)
    axes.legend(fontsize=8)
    return figure
