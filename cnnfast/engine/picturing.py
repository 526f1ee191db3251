"""A profile as a picture: a bar for each of the slowest steps, and how much of the whole they are together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .reporting import short

if TYPE_CHECKING:
    from .profiling import Profile, StepTime

MOST = 40  # bars
COLORS = ("#1f6fb4", "#e08214", "#2f9e77", "#8a63b0", "#c0392b", "#7f7f7f", "#b59a30", "#4aa8c7")


def draw(profile: Profile, path: Path) -> None:
    """Writes the picture; the ending of `path` says in what format."""
    shown = profile.steps[:MOST]
    shares: dict[str, float] = {}
    for step in profile.steps:
        shares[_kind(step)] = shares.get(_kind(step), 0.0) + step.share
    colors = {kind: COLORS[i % len(COLORS)] for i, kind in enumerate(shares)}
    figure = Figure(figsize=(9, 1.6 + 0.2 * max(len(shown), 6)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.barh(range(len(shown)), [step.microseconds for step in shown], color=[colors[_kind(step)] for step in shown])
    axes.set_yticks(range(len(shown)), [step.name for step in shown], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("microseconds")
    rest = len(profile.steps) - len(shown)
    together = sum(step.share for step in shown)
    title = profile.summary if not rest else f"{profile.summary}\nthe {len(shown)} slowest, {together:.0%} of it"
    axes.set_title(title, fontsize=10)
    marks = [Patch(color=color, label=f"{kind}: {shares[kind]:.0%}") for kind, color in colors.items()]
    axes.legend(handles=marks[: len(COLORS)], fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def _kind(step: StepTime) -> str:
    return step.pattern or short(step.operator) or step.name
