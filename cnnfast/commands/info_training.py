"""What `cnnfast info --training` shows: what a training step moves, launches and keeps for backward, by layer, as
cnnfast serves it, beside PyTorch's eager mode and torch.compile.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..triton_here import why_no_kernels
from . import options
from .console import printer, refused_by, table, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ..bench.step_counts import LayerCount, StepCount
    from ..bench.training_traffic import TrainingTraffic

BATCH, GPU, DTYPE, FORMAT = 32, "h200", "bf16", "channels_last"  # where the options say nothing
UNMEASURED, KERNELS, EAGER, COMPILE = "cnnfast, unmeasured", "cnnfast, kernels", "PyTorch eager", "torch.compile"
NOTES = (
    "Counted from shapes, each tensor of a launch once; nothing is measured. An operator of PyTorch's may launch "
    "several kernels, and moves more then: its bytes are a lower bound. The loss and the optimizer are not counted.",
    f"{UNMEASURED}: as calls are served on a GPU where nothing was measured, most convolutions by PyTorch's library. "
    f'{KERNELS}: by our kernels wherever there is one, as under cnnfast.backend("kernels").',
)
MB, GB = 1e6, 1e9
LEAST_SHARE = 0.001  # of the step, of a layer that has a line of its own


def show(
    model: str,
    sizes: list[tuple[int, ...]],
    batch: int | None,
    dtype: str,
    memory_format: str,
    gpu: str,
    depth: int | None,
    json_file: Path | None,
) -> None:
    """The tables of a step, and the file of --json."""
    name, layout, known = options.dtype_named(dtype), options.format_of(memory_format), options.gpu_of(gpu)

    import torch
    from rich.text import Text

    try:
        from cnnfast_kernels.devices import Gpu

        from ..bench.training_traffic import training_traffic
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"no step can be counted: {why_no_kernels(error)}", param_hint="--training") from None

    target, module = options.module_of(model)
    sizes = sizes or [options.shape_for(module, batch or BATCH)]
    sizes = [(batch or size[0], *size[1:]) for size in sizes]
    inputs = tuple(torch.empty(size, device="meta") for size in sizes)
    how: dict[str, Any] = {"gpu": Gpu(known.cuda, known.arch), "dtype": name}
    with refused_by("MODEL", RuntimeError):
        traffic = training_traffic(module, inputs, **how, memory_format=getattr(torch, layout))

    console, images = printer(json_file), sizes[0][0]
    given = ", ".join("x".join(map(str, size)) for size in sizes)
    console.print(Text.assemble((target.name, "bold"), f" on {known.cuda}, training, {name}, input {given}"))
    console.print(steps(traffic, images))
    console.print(by_layer(traffic, depth))
    for note in (*NOTES, *([f"{COMPILE}: not known, {traffic.reason}"] if traffic.reason else [])):
        console.print(note, highlight=False, markup=False)
    data = {
        "model": target.name,
        "source": target.source,
        "gpu": known.cuda,
        "input": sizes,
        "dtype": name,
        "format": memory_format,
        "depth": depth,
        "steps": {
            "unmeasured": step_data(traffic.unmeasured, depth),
            "kernels": step_data(traffic.kernels, depth),
            "eager": step_data(traffic.eager, depth),
        },
        "compile": {"saved_bytes": traffic.compiled_bytes, "reason": traffic.reason},
    }
    write_json(json_file, data)


def steps(traffic: TrainingTraffic, images: int) -> Table:
    """A line for each who computes the step."""
    headings = (
        "step",
        "our\nkernels",
        "PyTorch's\noperators",
        "forward\nGB",
        "back-\nward GB",
        "GB",
        "saved MB\nan image",
    )
    shown = _table(headings)
    for who, step in ((UNMEASURED, traffic.unmeasured), (KERNELS, traffic.kernels), (EAGER, traffic.eager)):
        moved = (step.forward_bytes, step.backward_bytes, step.moved_bytes)
        counts = (f"{counter.total():,}" for counter in (step.kernels, step.operators))
        shown.add_row(who, *counts, *(short(n / GB) for n in moved), short(step.saved_bytes / images / MB))
    compiled = traffic.compiled_bytes
    shown.add_row(COMPILE, *[""] * 5, "" if compiled is None else short(compiled / images / MB))
    return shown


def by_layer(traffic: TrainingTraffic, depth: int | None) -> Table:
    """A line for each layer: what it moves and what it is the first to keep, unmeasured and by kernels. Those that do
    neither to a thousandth of the step are added up in the last line.
    """
    from rich.text import Text

    both = traffic.unmeasured, traffic.kernels
    whole = [n for step in both for n in (step.moved_bytes, step.saved_bytes)]
    ways = [{layer.layer: layer for layer in to_depth(step.layers, depth)} for step in both]
    shown = _table(("layer", "moved MB", "saved MB", "moved MB,\nkernels", "saved MB,\nkernels"))
    small: list[list[int]] = []
    for name in dict.fromkeys((*ways[0], *ways[1])):
        layers = [way.get(name) for way in ways]
        numbers = [n for layer in layers for n in ((layer.moved_bytes, layer.saved_bytes) if layer else (0, 0))]
        if any(n >= LEAST_SHARE * of for n, of in zip(numbers, whole, strict=True) if of):
            shown.add_row(Text(name or "(model)"), *(short(n / MB) for n in numbers))
        else:
            small.append(numbers)
    if small:
        shown.add_row(f"and {len(small)} more", *(short(sum(n) / MB) for n in zip(*small, strict=True)))
    return shown


def to_depth(layers: Sequence[LayerCount], depth: int | None) -> list[LayerCount]:
    """The same with what is deeper than so many names added up."""
    found: dict[str, LayerCount] = {}
    for layer in layers:
        name = layer.layer if depth is None else ".".join(layer.layer.split(".")[:depth])
        before = found.get(name)
        numbers = layer[1:] if before is None else (a + b for a, b in zip(before[1:], layer[1:], strict=True))
        found[name] = type(layer)(name, *numbers)
    return list(found.values())


def step_data(step: StepCount, depth: int | None) -> dict[str, Any]:
    totals = ("launches", "forward_bytes", "backward_bytes", "moved_bytes", "saved_bytes")
    counts = {"kernels": dict(step.kernels), "operators": dict(step.operators)}
    layers = [layer._asdict() | {"moved_bytes": layer.moved_bytes} for layer in to_depth(step.layers, depth)]
    return {**{name: getattr(step, name) for name in totals}, **counts, "layers": layers}


def short(number: float) -> str:
    if not number:
        return ""
    return f"{number:,.1f}" if number >= 100 else f"{number:.2f}" if number >= 0.1 else f"{number:.1g}"


def _table(headings: Sequence[str]) -> Table:
    from rich import box

    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
    return table(headings, right=headings[1:], **style)
