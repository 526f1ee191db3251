"""How long each step of a frozen network takes; as a table, as JSON, and as a picture."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .operators import NAMES
from .reporting import short
from .runtime import Runners, Shapes

RUNS = 5  # with a clock, after one without; the median counts
WIDTH = 100  # of str(profile)


@dataclass(frozen=True)
class StepTime:
    """microseconds: the median of RUNS runs. share: of all steps' microseconds, from 0 to 1."""

    name: str
    operator: str
    pattern: str
    microseconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """str() is a table; rich prints it at the width of its console.

    runner: who ran the steps. shapes: of the inputs. steps: the slowest first. A clock between steps costs time itself:
    the sum of the steps is larger than the time of a call.
    """

    runner: str
    shapes: Shapes
    steps: tuple[StepTime, ...]

    @property
    def microseconds(self) -> float:
        """Of all steps together."""
        return sum(step.microseconds for step in self.steps)

    @property
    def summary(self) -> str:
        sizes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        return f"{len(self.steps)} steps, {self.microseconds:.0f} us in all, by {self.runner}, for {sizes}"

    def to_json(self) -> str:
        """An object with summary, runner, shapes, microseconds and steps."""
        head = {name: getattr(self, name) for name in ("summary", "runner", "shapes", "microseconds")}
        return json.dumps({**head, "steps": [vars(step) for step in self.steps]}, indent=1, allow_nan=False)

    def picture(self, path: str | Path) -> None:
        """Draws the slowest steps as bars into a file, whose ending says in what format (.png, .svg, .pdf).

        Raises ImportError without matplotlib.
        """
        try:
            from .picturing import draw
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise ImportError(
                "a picture needs matplotlib, which is not installed: pip install '.[demo]' brings it"
            ) from None
        draw(self, Path(path))

    def __rich__(self) -> RenderableType:
        table = Table()
        for heading in ("step", "operator", "pattern", "us", "share"):
            table.add_column(heading, overflow="fold", justify="right" if heading in ("us", "share") else "left")
        for step in self.steps:
            texts = map(Text, (step.name, short(step.operator), step.pattern))
            table.add_row(*texts, f"{step.microseconds:.1f}", f"{step.share:.1%}")
        return Group(table, Text(self.summary, "bold"))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return text.getvalue().rstrip()


def profile_of(runners: Runners, inputs: Sequence[Tensor]) -> Profile:
    """Runs a graph with a clock between its steps."""
    shapes = tuple(tuple(t.shape) for t in inputs)
    runner = runners.runner(shapes)
    runner(inputs)
    runs = [runner.profile(inputs) for _ in range(RUNS)]
    times = {name: 1e6 * statistics.median(run.get(name, 0.0) for run in runs) for name in runs[0]}
    total = sum(times.values()) or 1.0
    nodes = {node.name: node for node in runners.graph.calls.nodes}
    steps = []
    for name, microseconds in sorted(times.items(), key=lambda item: -item[1]):
        node = nodes.get(name)
        operator = NAMES.get(node.target, "") if node is not None else ""  # type: ignore[arg-type]
        pattern = node.meta.get("pattern", "") if node is not None else ""
        steps.append(StepTime(name, operator, pattern, microseconds, microseconds / total))
    return Profile(runner.name, shapes, tuple(steps))
