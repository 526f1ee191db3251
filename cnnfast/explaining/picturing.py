"""An explanation as a picture: for each operation a bar a layer, its limiter by colour, and the roofline as a line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cnnfast_kernels.costs import Limiter

from .showing import MODEL

if TYPE_CHECKING:
    from .explanation import Explanation

COLORS: dict[str, str] = dict(
    zip(get_args(Limiter), ("#2f9e77", "#c0392b", "#e08214", "#8a63b0", "#1f6fb4", "#7f7f7f"), strict=True)
)


def draw(explanation: Explanation, path: Path) -> None:
    """Writes the picture; the ending of `path` says in what format."""
    e = explanation
    operations = list(e.totals)
    order = dict.fromkeys(row.layer for row in e.rows)  # that of the forward pass
    having = {o: {row.layer for row in e.rows if row.operation == o} for o in operations}
    layers = {o: [layer for layer in order if layer in having[o]] for o in operations}
    most = max(8, *map(len, layers.values()))
    height = 1.8 + 0.16 * most
    figure = Figure(figsize=(4.5 * len(operations), height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, operation in zip(figure.subplots(1, len(operations), squeeze=False)[0], operations, strict=True):
        _panel(axes, e, operation, layers[operation])
        axes.set_ylim(most - 0.5, -0.5)  # bars are as wide in each
    present = {row.limiter for row in e.rows}
    marks: list[Any] = [Patch(color=color, label=limiter) for limiter, color in COLORS.items() if limiter in present]
    marks.append(Line2D([], [], color="black", label="roofline"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=9)
    sizes = ", ".join("x".join(map(str, shape)) for shape in e.shapes)
    figure.suptitle(f"{e.model} on {e.gpu.cuda}, {e.mode}, {e.dtype}, input {sizes}\n{MODEL}", fontsize=10)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, e: Explanation, operation: str, layers: list[str]) -> None:
    """All calls of an operation, those of a layer in one bar."""
    bars: Counter[tuple[str, str]] = Counter()
    roofline: Counter[str] = Counter()
    for row in e.rows:
        if row.operation == operation:
            bars[row.layer, row.limiter] += row.modelled_us  # pyright: ignore[reportArgumentType]
            roofline[row.layer] += row.roofline_us  # pyright: ignore[reportArgumentType]
    places = range(len(layers))
    start = [0.0] * len(layers)
    for limiter, color in COLORS.items():
        lengths = [float(bars[layer, limiter]) for layer in layers]
        axes.barh(places, lengths, left=start, color=color, height=0.8)
        start = [a + b for a, b in zip(start, lengths, strict=True)]
    for place, layer in zip(places, layers, strict=True):
        axes.plot([roofline[layer]] * 2, [place - 0.5, place + 0.5], color="black", linewidth=1.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(places, [layer or "(model)" for layer in layers], fontsize=6)
    axes.set_xlabel("microseconds")
    total = e.totals[operation]
    share = f", {total.roofline_us / total.modelled_us:.0%} of the roofline" if total.modelled_us else ""
    axes.set_title(f"{operation}: {total.modelled_us:,.0f} us{share}", fontsize=10)
