"""A run as text: what is lost, what is won, and everything that was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .augmenters import AUGMENTERS
from .providers import PROVIDERS
from .rows import (
    AUGMENTATION,
    BLOCK,
    EVEN,
    FAILED,
    LAYER,
    LEFT_OUT,
    LOSES,
    MODEL,
    UNAVAILABLE,
    WINS,
    WRONG,
    BenchRow,
    jobs,
    our_best,
    speedup,
    strongest,
    verdict,
)

LOST, MEAN = "bold red", "mean"
ALONE = " ~"  # behind a time that is not of the rounds in which all take turns
# Columns that may be left out of a narrow table, the most dispensable first.
DISPENSABLE = ("peak MiB", "saved MiB", "kernels", "of net", "GB/s", "images/s", "TFLOP/s", "first s")
CEILINGS = (
    "of ceiling: of what the machine allows a step whose operators are fused so far: each its own kernel, pointwise"
    " operators fused, one kernel a conv(olution)."
)
AUGMENTATIONS = (
    "of ceiling, and the bytes of GB/s: one pass, which reads each image once and writes each result once.",
    "launches, moved: of one step, on a GPU. Those of cnnfast's kernels are found by replaying a call on meta tensors."
    " Those of PyTorch's operators are counted, and are fewer than there are: one for each operator that is no view and"
    " takes or makes a tensor as large as a result. moved: all operands and results of these, read and written once."
    " kernels: what the profiler saw.",
    "All draw new numbers for each image at every step, but for what the names above say. torchvision and kornia work"
    " step by step, and resample a turned crop twice; torchvision rounds to uint8 between, and samples without"
    " antialiasing here, as cnnfast does. Colours change in a drawn order there, in a fixed one by cnnfast.",
    "Judged before they are timed: the resize, the flip, and each colour and the rotation by themselves, at fixed"
    " numbers, against float64; of cnnfast also a batch with drawn numbers, erased boxes included.",
)
SERVED = "No GPU here: times are those of one thread, and PyTorch serves cnnfast's calls too, so that its rows show"
COSTS = f"{SERVED} what conversion costs. What a launch costs the host: pytest benchmarks/test_host_cost.py"
NO_GPU = {
    MODEL: COSTS,
    LAYER: COSTS,
    BLOCK: COSTS,
    AUGMENTATION: f"{SERVED} what cnnfast.nn.Augment costs a CPU; its launches are those of a GPU.",
}
STYLES = {LOSES: LOST, EVEN: "", WINS: "green", MEAN: ""}


def report(rows: Sequence[BenchRow], width: int) -> Group:
    """Losses first, then a table for each model, then the layers. Columns that do not fit into `width` are left out;
    the JSON has them.
    """
    parts: list[RenderableType] = [*_conditions(rows), Text(), *verdicts(rows)]
    done = [group for group in jobs(rows) if {row.status for row in group} != {LEFT_OUT}]
    for group in done:
        if group[0].kind != LAYER:
            parts += [Text(), model_table(group, width), *_not_run(group)]
    layers = [row for group in done for row in group if row.kind == LAYER]
    if layers:
        wrong = [row for row in layers if row.status in (WRONG, FAILED)]
        parts += [
            Text(),
            layer_table(layers, width),
            *(Text(f"{title(row)}, {row.provider}: {row.reason}", LOST) for row in wrong),
        ]
    return Group(*parts, *_left_out(rows), Text(), *_legend(rows))


def _conditions(rows: Sequence[BenchRow]) -> Iterator[Text]:
    """The machine, its software, its clocks, and what was measured on it."""
    row = rows[0]
    m = row.machine
    versions = (("driver", m.driver), ("cuDNN", m.cudnn), ("torch", m.torch), ("triton", m.triton))
    software = [f"{name} {value}" for name, value in versions if value]
    yield Text(", ".join([m.device, *software, *([f"cnnfast at {m.commit}"] if m.commit else [])]))
    if m.clocks:
        yield Text(f"clocks of SMs and memory, each with its limit: {m.clocks}")
    flops, bytes_moved = f"{row.peaks.flops / 1e12:.3g} TFLOP/s", f"{row.peaks.bytes / 1e9:.4g} GB/s"
    yield Text(f"measured on it: {flops} (product of matrices), {bytes_moved} (copy)")


def verdicts(rows: Iterable[BenchRow]) -> Iterator[Text]:
    """A line for each job of a model, and one for all layers in each mode; the worst first."""
    found: list[tuple[float, str, str]] = []
    silent: list[str] = []
    for group in jobs(row for row in rows if row.kind != LAYER):
        theirs, ours = strongest(group), our_best(group)
        if {row.status for row in group} == {LEFT_OUT}:
            continue
        if theirs is None or ours is None:
            missing = "a baseline" if theirs is None else "cnnfast"
            silent.append(f"nothing to compare: {title(group[0])}: no right result of {missing}")
        else:
            times = " against ".join(
                f"{milliseconds(row)} ms ({row.provider}{ALONE * row.alone})" for row in (ours, theirs)
            )
            found.append((speedup(group) or 0, verdict(group), f"{title(group[0])}: {times}"))
    by_mode: dict[tuple[str, str, int], list[list[BenchRow]]] = {}
    for group in jobs(row for row in rows if row.kind == LAYER):
        if speedup(group):
            by_mode.setdefault((group[0].mode, group[0].dtype, group[0].batch), []).append(group)
    for (mode, dtype, batch), groups in by_mode.items():
        mean = math.exp(sum(math.log(speedup(group) or 1) for group in groups) / len(groups))
        counts = [
            f"{count} {word}"
            for word in (LOSES, EVEN, WINS)
            if (count := sum(verdict(group) == word for group in groups))
        ]
        found.append(
            (mean, MEAN, f"geometric mean of {len(groups)} layers, {mode}, batch {batch}, {dtype}: {', '.join(counts)}")
        )
    for ratio, word, text in sorted(found):
        yield Text(f"{word:5}  {ratio:.2f}x  {text}", LOST if ratio < 1 and word == MEAN else STYLES[word])
    yield from (Text(text, LOST) for text in silent)


def title(row: BenchRow) -> str:
    """The job of a row, in words."""
    if row.kind == AUGMENTATION:
        return f"{row.mode}: {row.subject}, batch {row.batch}, {row.input}, {row.dtype}"
    return f"{row.subject}, {row.mode}, batch {row.batch}, {row.input}, {row.dtype}"


def milliseconds(row: BenchRow) -> str:
    return _short(row.median * 1000) if row.median else ""


def model_table(rows: Sequence[BenchRow], width: int) -> Table:
    """The providers of one job, the fastest first."""
    best = strongest(rows)
    columns = {
        "provider": lambda r: r.provider + " *" * (r is best) + ALONE * r.alone,
        "ms": lambda r: f"{milliseconds(r)} ({_short(r.low * 1000)}-{_short(r.high * 1000)})",
        "speed": lambda r: f"{best.median / r.median:.2f}x" if best else "",
        "images/s": lambda r: f"{r.images_per_second:,.0f}",
        "TFLOP/s": lambda r: _short(r.tflops) if r.tflops else "",
        "GB/s": lambda r: _short(r.gbps) if r.gbps else "",
        "of ceiling": lambda r: f"{r.fraction:.0%} {r.level}" if r.fraction else "",
        "launches": lambda r: "" if r.launches is None else f"{r.launches:,.0f}",
        "moved MiB": lambda r: _mib(r.moved_bytes),
        "first s": lambda r: f"{r.first:.1f}" if r.first else "",
        "kernels": lambda r: "" if r.kernels is None else str(r.kernels),
        "peak MiB": lambda r: _mib(r.peak_bytes),
        "saved MiB": lambda r: _mib(r.saved_bytes),
    }
    order = sorted((r for r in rows if r.median), key=lambda r: r.median or 0)
    cells = {name: [write(r) for r in order] for name, write in columns.items()}
    return _table(title(rows[0]), cells, width, ["bold" if row.ours else "" for row in order])


def _not_run(rows: Sequence[BenchRow]) -> Iterator[Text]:
    """Each provider without a time, and why it has none: wrong numbers first."""
    width = max(len(row.provider) for row in rows)
    harmless = {UNAVAILABLE: "yellow", LEFT_OUT: "yellow"}
    for row in sorted((row for row in rows if not row.median), key=lambda row: row.status in harmless):
        yield Text(f"{row.provider:{width}}  {row.status}: {row.reason}", harmless.get(row.status, LOST))


def _left_out(rows: Sequence[BenchRow]) -> Iterator[Text]:
    """The jobs of which nothing was begun, with those of one reason together. Of layers also the jobs that only some
    providers missed.
    """
    found: dict[str, dict[str, dict[str, None]]] = {}  # reason > subject > modes
    for group in jobs(rows):
        missed = [row for row in group if row.status == LEFT_OUT]
        whole = len(missed) == len(group)
        for row in missed if whole or group[0].kind == LAYER else ():
            subjects = found.setdefault(row.reason, {})
            subjects.setdefault(f"{row.subject}, batch {row.batch}", {})[
                row.mode + f" by {row.provider}" * (not whole)
            ] = None
    for reason, subjects in found.items():
        named = "; ".join(f"{subject} ({', '.join(modes)})" for subject, modes in subjects.items())
        yield from (Text(), Text(f"left out: {reason}", "bold yellow"), Text(named, "yellow"))


def layer_table(rows: Sequence[BenchRow], width: int) -> Table:
    """A line for each layer and mode, with the strongest baseline and our best; the worst first."""
    groups = sorted(jobs(rows), key=lambda group: speedup(group) or 0)
    bests = [(strongest(group), our_best(group)) for group in groups]
    cells = {
        "layer": [group[0].subject for group in groups],
        "mode": [group[0].mode for group in groups],
        "of net": [f"{group[0].count}x" for group in groups],
        "theirs us": [_short(theirs.median * 1e6) if theirs and theirs.median else "" for theirs, _ in bests],
        "ours us": [_short(ours.median * 1e6) if ours and ours.median else "" for _, ours in bests],
        "speed": [f"{ratio:.2f}x" if (ratio := speedup(group)) else "" for group in groups],
        "TFLOP/s": [_short(ours.tflops) if ours and ours.tflops else "" for _, ours in bests],
        "GB/s": [_short(ours.gbps) if ours and ours.gbps else "" for _, ours in bests],
        "ceiling": [f"{ours.fraction:.0%}" if ours and ours.fraction else "" for _, ours in bests],
    }
    conditions = ", ".join(sorted({f"batch {row.batch}, {row.dtype}" for row in rows}))
    return _table(f"layers, {conditions}", cells, width, [STYLES[verdict(group)] for group in groups])


def _table(title: str, cells: dict[str, list[str]], width: int, styles: list[str]) -> Table:
    """A table of the columns `cells`, a line for each of `styles`. Empty columns are left out, and of the dispensable
    ones those that do not fit into `width`.
    """
    shown = {name: values for name, values in cells.items() if any(values)}
    for name in DISPENSABLE:
        if sum(max(map(len, [name, *values])) + 2 for name, values in shown.items()) > width:
            shown.pop(name, None)
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for name in shown:
        table.add_column(name, no_wrap=True, justify="left" if name in ("provider", "layer", "mode") else "right")
    for line, style in zip(zip(*shown.values(), strict=True), styles, strict=True):
        table.add_row(*line, style=style)
    return table


def _legend(rows: Sequence[BenchRow]) -> Iterator[Text]:
    """What the names of providers and columns mean."""
    for known, kind in ((PROVIDERS, MODEL), (AUGMENTERS, AUGMENTATION)):
        used = {r.provider: r.package for r in rows if r.kind == kind and r.median and r.provider in known}
        for name, package in used.items():
            yield Text(f"{name}: {known[name].text}{f' ({package})' * bool(package)}", "dim")
    yield Text(
        "ms, us: median of one step (what 20 and 80 % of the samples stay below). speed: against"
        " the strongest baseline (*). GB/s: of the bytes that must move. first: setup and compilation.",
        "dim",
    )
    kinds = {row.kind for row in rows}
    if kinds - {AUGMENTATION}:
        yield Text(CEILINGS, "dim")
    if AUGMENTATION in kinds:
        yield from (Text(text, "dim") for text in AUGMENTATIONS)
    if any(row.alone for row in rows):
        yield Text(
            "~: timed alone, right after its first result: the run did not reach the rounds in which all take turns.",
            "yellow",
        )
    if not rows[0].machine.driver:
        yield from (Text(text, "dim") for text in dict.fromkeys(NO_GPU[kind] for kind in NO_GPU if kind in kinds))


def _short(value: float) -> str:
    """The number with three digits."""
    digits = next((digits for digits, least in enumerate((99.95, 9.995, 0.9995)) if value >= least), 3)
    return f"{value:,.{digits}f}"


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"
