"""An explanation as tables, in which equal operations share a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .rows import BlockServed, ForeignWork, Operation
from .steps import OperatorStep, TrainingStep

if TYPE_CHECKING:
    from .explanation import Explanation

MODEL = "a model's figures: nothing here was measured but what is called measured"
STYLES = {"tensor": "green", "memory": "cyan", "l2": "yellow", "shared": "magenta", "issue": "red", "latency": "blue"}
LEAST_SHARE = 0.003  # of the step: operations that take less, all calls together, have no line of their own
ESTIMATED = "~"  # before registers
KERNEL, PROGRAMS, INTENSITY = "kernel and tile", "pro-\ngrams", "FLOP/\nL2 B"
ROOFLINE, SERVED = "roof-\nline", "served by"
COLUMNS = ("layer", "operation", KERNEL, "regs", PROGRAMS, INTENSITY, "limiter", "us", ROOFLINE, "share", "MB", SERVED)
LEFT = ("layer", "operation", KERNEL, "limiter", SERVED)
# Texts that may take several lines, and the characters that each of these has at least, if it needs them.
WRAPPED = {"layer": 21, "operation": 9, KERNEL: 18}
# Columns that a narrow window leaves out, the most dispensable first.
DISPENSABLE = ("MB", ROOFLINE, INTENSITY, SERVED, "regs", PROGRAMS, "limiter", "share")
MOST_FOREIGN = 5  # of PyTorch's operators that are named


def shown(explanation: Explanation, width: int) -> Group:
    e = explanation
    sizes = ", ".join("x".join(map(str, shape)) for shape in e.shapes)
    head = Text.assemble((e.model, "bold"), f" on {e.gpu.cuda}, {e.mode}, {e.dtype}, input {sizes}: {MODEL}")
    of_training = [] if e.training is None else [Text(), _steps(e.training), *map(Text, _whole_step(e.training))]
    return Group(head, _operations(e, width), Text(), _totals(e), *of_training, *map(Text, _sentences(e)))


def _table(*headings: str, left: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True, overflow="fold")
    return table


def _operations(e: Explanation, width: int) -> Table:
    """What takes longest comes first. In a narrow window columns are left out, and names take several lines."""
    groups: dict[Operation, list[Operation]] = {}
    for row in e.rows:
        groups.setdefault(replace(row, layer=""), []).append(row)
    whole = sum(row.modelled_us for row in e.rows)
    found = sorted(groups.values(), key=lambda rows: -sum(row.modelled_us for row in rows))
    large = [rows for rows in found if sum(row.modelled_us for row in rows) >= LEAST_SHARE * whole]
    small = [row for rows in found[len(large) :] for row in rows]
    lines = [*map(_cells, large), *([_added_up(small)] if small else [])]
    columns = _columns_for(width, lines)
    table = _table(*columns, left=LEFT)
    for i, name in enumerate(columns[: len(WRAPPED)]):
        longest = max((len(line.get(name, "")) for line in lines), default=0)
        table.columns[i].no_wrap, table.columns[i].min_width = False, min(WRAPPED[name], longest)
    for line in lines:
        cells = (line.get(name, "") for name in columns)
        table.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in cells))
    return table


def _columns_for(width: int, lines: Sequence[Mapping[str, str]]) -> list[str]:
    """The columns that fit in so many characters."""
    needed = {}
    for name in COLUMNS:
        parts = [part for text in (name, *(line.get(name, "") for line in lines)) for part in text.split("\n")]
        needed[name] = 1 + min(WRAPPED.get(name, width), max(map(len, parts)))
    columns: list[str] = list(COLUMNS)
    for name in DISPENSABLE:
        if sum(needed[column] for column in columns) > width:
            columns.remove(name)
    return columns


def _cells(rows: Sequence[Operation]) -> dict[str, str]:
    """Of equal operations."""
    row = rows[-1] if rows[0].backward else rows[0]  # the first of the network
    times = f" x{len(rows)}" if len(rows) > 1 else ""
    kernel = row.kernel.removesuffix("_kernel")
    if row.tile:  # the operation is told already
        kernel = f"{kernel.replace(f'_{row.operation}', '')} {row.tile.replace(' pixels', '')}"
    numbers = (PROGRAMS, row.residents), (INTENSITY, row.intensity)
    measured = {"ours": row.measured_us, "library": row.library_us}
    return {
        "layer": f"{row.layer or '(model)'}{times}",
        "operation": row.operation,
        KERNEL: kernel,
        "regs": "" if row.registers is None else f"{'' if row.exact else ESTIMATED}{row.registers}",
        **{name: "" if number is None else f"{number:.0f}" for name, number in numbers},
        "limiter": row.limiter,
        **_sums(rows),
        SERVED: "\n".join([row.served, *(f"{who} {us:,.0f} us" for who, us in measured.items() if us is not None)]),
    }


def _added_up(rows: Sequence[Operation]) -> dict[str, str]:
    return {"layer": f"and {len(rows):,} more", KERNEL: "", **_sums(rows)}


def _sums(rows: Sequence[Operation]) -> dict[str, str]:
    us, roofline, share = _numbers(sum(row.modelled_us for row in rows), sum(row.roofline_us for row in rows))
    return {"us": us, ROOFLINE: roofline, "share": share, "MB": _megabytes(sum(row.bytes for row in rows))}


def _numbers(us: float, roofline: float) -> tuple[str, str, str]:
    return _short(us), _short(roofline), f"{roofline / us:.0%}" if us else ""


def _megabytes(count: int) -> str:
    return _short(count / 1e6)


def _short(number: float) -> str:
    """Without digits that no model knows."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _totals(e: Explanation) -> Table:
    table = _table("all of", "calls", "us", "roofline us", "share", "MB", left=("all of",))
    for operation, total in e.totals.items():
        rows = [row for row in e.rows if row.operation == operation]
        moved = _megabytes(sum(row.bytes for row in rows))
        table.add_row(operation, f"{len(rows):,}", *_numbers(total.modelled_us, total.roofline_us), moved)
    us, roofline = (sum(getattr(row, name) for row in e.rows) for name in ("modelled_us", "roofline_us"))
    table.add_row("our kernels", f"{len(e.rows):,}", *_numbers(us, roofline), _megabytes(e.bytes), style="bold")
    return table


def _sentences(e: Explanation) -> list[str]:
    """What tables cannot say."""
    lines = [f"Kernels launched in a step: {e.launches:,}, which read and write {_short(e.bytes / 1e9)} GB."]
    if e.foreign:
        lines.append(_besides(e.foreign))
    if any(row.exact is False for row in e.rows):
        lines.append(f"{ESTIMATED}: estimated from the nearest kernel that was compiled ahead of time.")
    convolutions = [row for row in e.rows if row.tile is not None]
    theirs = sum(row.served == "library" for row in convolutions)
    if theirs:
        lines.append(
            f"Convolutions that PyTorch's library serves by default on this GPU: {theirs} of {len(convolutions)}, for "
            "which no table says that ours are faster there. The figures are of our kernels, as under "
            'cnnfast.backend("kernels").'
        )
    lines += _blocks(e.blocks)
    if e.train:
        lines.append("Beside PyTorch's, layer by layer: cnnfast info MODEL --training.")
        lines.append("The loss and the optimizer are not counted.")
    return lines


def _blocks(blocks: Sequence[BlockServed]) -> list[str]:
    """Who serves residual blocks: a line for all that are served alike."""
    if not blocks:
        return []
    groups: dict[BlockServed, list[str]] = {}
    for block in blocks:
        groups.setdefault(replace(block, layer="", shape=""), []).append(block.layer or "(model)")
    who = "Who serves a block serves its convolutions, whatever is said of them above."
    lines = [f"Residual blocks that train as one operator: {len(blocks)}. {who}"]
    for block, layers in groups.items():
        who = "our kernels" if block.served == "kernels" else "PyTorch's library"
        why = {
            "measured row": "by a measured row of the block",
            "unmeasured": "unmeasured: cnnfast.tune(model, *inputs, train=True) measures them",
            "less memory": 'asked for by convert(memory="less")',
        }[block.by]
        measured = {"ours": block.measured_us, "the library": block.library_us}
        times = ", ".join(f"{name} {us:,.0f} us" for name, us in measured.items() if us is not None)
        lines.append(f"  {who} ({why}{times and f'; {times}'}): {', '.join(layers)}")
    return lines


def _steps(training: TrainingStep) -> Table:
    """What trains as one operator, equal ones in a line, and what each keeps for backward."""
    found: dict[str, dict[bool, OperatorStep]] = {}
    for step in training.operators:
        found.setdefault(step.layer, {})[step.backward] = step
    groups: dict[tuple[Any, ...], list[str]] = {}
    for layer, of in found.items():
        forward, backward = of.get(False), of.get(True)
        operator = forward.operator if forward else backward.operator if backward else ""
        numbers = [
            *(_short(step.modelled_us) if step else "" for step in (forward, backward)),
            _megabytes(sum(step.bytes for step in of.values())),
            _megabytes(training.saved.get(layer, 0)),
        ]
        groups.setdefault((operator, *numbers), []).append(layer)
    table = _table(
        "layer", "one operator", "forward us", "backward us", "MB", "kept MB", left=("layer", "one operator")
    )
    for (operator, *numbers), layers in groups.items():
        table.add_row(f"{layers[0] or '(model)'}{f' x{len(layers)}' if len(layers) > 1 else ''}", operator, *numbers)
    others = sum(count for layer, count in training.saved.items() if layer not in found)
    table.add_row("all others", "", "", "", "", _megabytes(others))
    return table


def _whole_step(training: TrainingStep) -> list[str]:
    told = []
    for who, step in (("A step by our kernels", training.ours), ("PyTorch's eager mode", training.eager)):
        kept, moved = (f"{count / 1e9:.3g} GB" for count in (step.saved_bytes, step.bytes))
        told.append(f"{who} moves {moved}, keeps {kept} for backward, and takes {step.us / 1e3:.3g} ms")
    return [f"{told[0]}; {told[1]}: at the highest rates of this GPU, which nothing reaches."]


def _besides(foreign: Sequence[ForeignWork]) -> str:
    calls: dict[str, int] = {}
    times: dict[str, float] = {}
    for work in foreign:
        calls[work.operator] = calls.get(work.operator, 0) + work.calls
        times[work.operator] = times.get(work.operator, 0.0) + work.roofline_us
    named = sorted(times, key=lambda operator: -times[operator])[:MOST_FOREIGN]
    others = sum(calls.values()) - sum(calls[operator] for operator in named)
    names = ", ".join([*(f"{calls[operator]} {operator}" for operator in named), *[f"{others} others"] * bool(others)])
    moved = sum(work.bytes for work in foreign)
    us, gigabytes = _short(sum(times.values())), _short(moved / 1e9)
    return f"PyTorch's own operators besides ({names}) take at least {us} us and move {gigabytes} GB."
