"""What a frozen network consists of: each step, what serves it and what was fused into it; as a table, and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .judging import SelfCheck, decibels
from .network import Network
from .plan import Plan
from .planning.planning import plan
from .runtime import PlainRunner, Runners

if TYPE_CHECKING:
    from .runner import Runner

WIDTH = 100  # of str(report)
HEADINGS = ("step", "operator", "served by", "fused with", "pattern", "result")
UNPLANNED = "the converted model"  # the runner's name where there is no plan
OURS = "cnnfast."  # of the names of operators that convolutions and their neighbours were fused into


@dataclass(frozen=True)
class StepRow:
    """One step. operator: its name in operators.py. served_by: who computes it. fused: the calls of the captured model
    that it stands for, by name. pattern: what it belongs to, such as "squeeze-excitation". shape: of its first result,
    at the size of the example.
    """

    name: str
    operator: str
    served_by: str
    fused: tuple[str, ...]
    pattern: str
    shape: tuple[int, ...]

    @property
    def is_pytorchs(self) -> bool:
        """Whether it stayed an operator of PyTorch's: it was fused with nothing, and is part of no pattern."""
        return not self.pattern and not self.operator.startswith(OURS)


@dataclass(frozen=True)
class FrozenReport:
    """str() is a table; rich prints it at the width of its console.

    runner: "onnxruntime", "oneDNN", "PyTorch" or UNPLANNED; why: the reason, where it is not onnxruntime. steps: those
    that compute something, in their order. arena: bytes that the plan has for the values between steps, at the size of
    the example (onnxruntime arranges memory of its own); unshared: what they would be if no memory were used twice.
    sizes: which image sizes the network takes. check: what freezing found; None for a network that was loaded. notes:
    what else a user should know.
    """

    runner: str
    why: str
    steps: tuple[StepRow, ...]
    arena: int
    unshared: int
    sizes: str
    check: SelfCheck | None = None
    notes: tuple[str, ...] = ()

    @property
    def pytorchs(self) -> tuple[StepRow, ...]:
        """The steps that stayed PyTorch's."""
        return tuple(step for step in self.steps if step.is_pytorchs)

    @property
    def summary(self) -> str:
        """A line: who runs it, how many steps, how much memory, how exact, and which image sizes."""
        ran = "runs, without a plan" if self.runner == UNPLANNED else f"runs {len(self.steps)} steps"
        parts = [f"{self.runner} {ran}"]
        if self.unshared:
            parts.append(f"{_mib(self.arena)} MiB planned between them, {_mib(self.unshared)} without reuse")
        if self.check is not None and self.check.sqnr is not None:
            parts.append(f"SQNR {decibels(self.check.sqnr)} against {self.check.against}")
        if self.check is not None and self.check.agreement is not None:
            parts.append(f"top-1 agreement {self.check.agreement:.1%}")
        return "; ".join([*parts, f"image sizes: {self.sizes}"])

    def to_json(self) -> str:
        """An object with summary, runner, why, arena, unshared (bytes), sizes, sqnr (dB, null where nothing differs or
        nothing was checked), agreement, notes, and steps.
        """
        check = self.check
        sqnr = None if check is None or check.sqnr is None or not -1e9 < check.sqnr < 1e9 else check.sqnr
        head = {
            "summary": self.summary,
            "runner": self.runner,
            "why": self.why,
            "arena": self.arena,
            "unshared": self.unshared,
            "sizes": self.sizes,
            "sqnr": sqnr,
            "agreement": check and check.agreement,
            "notes": list(self.notes),
        }
        return json.dumps({**head, "steps": list(map(asdict, self.steps))}, indent=1, allow_nan=False)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [_table([step for step in self.steps if not step.is_pytorchs], "")]
        if self.pytorchs:
            parts.append(
                _table(self.pytorchs, "steps that stayed PyTorch's: fused with nothing, and part of no pattern")
            )
        reason = self.why if self.runner == UNPLANNED else f"not onnxruntime: {self.why}"
        lines = [reason] if self.why and self.runner != "onnxruntime" else []
        return Group(*parts, *(Text(line, "yellow") for line in (*lines, *self.notes)), Text(self.summary, "bold"))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return text.getvalue().rstrip()


def report_on(
    runners: Runners, network: Network, sizes: str, check: SelfCheck | None, notes: Sequence[str]
) -> FrozenReport:
    """The report of a network, at the size of the example."""
    runner: Runner = runners.runner(network.example)
    planned = plan(network.graph, network.example)
    return FrozenReport(
        runner.name,
        runners.why_not_onnxruntime,
        tuple(_steps(network, planned, runner)),
        planned.arena if not isinstance(runner, PlainRunner) else 0,
        sum(buffer.bytes for buffer in planned.buffers.values() if buffer.address is not None),
        sizes,
        check,
        tuple(notes),
    )


def _steps(network: Network, planned: Plan, runner: Runner) -> list[StepRow]:
    served, nodes = runner.served_by(), {node.name: node for node in network.graph.calls.nodes}
    rows = []
    for step in planned.steps:
        if not step.is_view:
            fused = tuple(nodes[step.name].meta.get("fused", ())) if step.name in nodes else ()
            shape = planned.values[step.outputs[0]].shape
            rows.append(StepRow(step.name, step.operator, served.get(step.name, ""), fused, step.pattern, shape))
    return rows


def _table(steps: Sequence[StepRow], title: str) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for step in steps:
        others = " + ".join(_kind(name) for name in step.fused if name != step.name)
        cells = step.name, short(step.operator), step.served_by, others, step.pattern
        table.add_row(*map(Text, cells), "x".join(map(str, step.shape)))
    return table


def _kind(name: str) -> str:
    """What a call does, by its name: "batch_norm_12" and "relu__3" are "batch_norm" and "relu"."""
    return name.rstrip("0123456789").rstrip("_") or name


def short(operator: str) -> str:
    """A name of operators.py without its library and overload: "max_pool2d" of "aten.max_pool2d.default"."""
    return operator.split(".")[1] if "." in operator else operator


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"
