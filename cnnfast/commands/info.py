"""`cnnfast info`: the layers of a model: shapes, parameters, FLOPs and receptive fields; or its training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import info_training, options
from .console import JsonFile, printer, refuse_unwritable, refused_by, table, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from ..summary import KindTotal, Layer, Summary

EXAMPLES = (
    "cnnfast info resnet50",
    "cnnfast info torchvision:efficientnet_b0 --depth 1",
    "cnnfast info model.py:Net --input 1x3x64x64 --json net.json",
    "cnnfast info resnet50 --training --batch 256 --depth 2",
)
STYLES = {"conv": "cyan", "linear": "magenta", "norm": "green", "pool": "yellow", "attention": "blue"}
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MIB = 2**20
STEP = "Training step"  # the panel of what decides it
# Columns that a narrow window leaves out, the most dispensable first, until so many characters are left for names.
DISPENSABLE, NAMES = ("step", "field"), 20


def info(
    model: options.Model,
    shapes: options.Shapes = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Add up what is deeper than so many names: 1 is a line for each part of the model, 0 one for all.",
            metavar="N",
            show_default="every layer",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Show what a training step moves, launches and keeps for backward instead.",
            rich_help_panel=STEP,
        ),
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images a step.",
            metavar="N",
            show_default=str(info_training.BATCH),
            rich_help_panel=STEP,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=options.DTYPE_HELP, metavar=options.DTYPE, show_default=info_training.DTYPE, rich_help_panel=STEP
        ),
    ] = None,
    memory_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=options.FORMAT_HELP,
            metavar="LAYOUT",
            show_default=info_training.FORMAT,
            rich_help_panel=STEP,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help=options.GPU_HELP, metavar="NAME", show_default=info_training.GPU, rich_help_panel=STEP),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Show the layers of MODEL: output shape, parameters, FLOPs and receptive field of each, and totals by kind.

    Nothing is computed and no weights are fetched: the model runs in infer mode on tensors that have a shape but no
    memory. FLOPs are the multiplications and additions of convolutions and matrix products, two to a
    multiply-accumulate (MAC). The field is the number of input rows that one output can depend on ("all" after global
    pooling, attention, or a linear layer over positions), and the step that from one output to the next.

    With --training: bytes that a step reads and writes, launches of our kernels, calls of PyTorch's operators, and
    bytes kept for backward, of all and by layer, as cnnfast serves it, beside PyTorch's eager mode; and what
    torch.compile keeps, by its partitioner. All are counted from shapes, for a GPU that need not be here.
    """
    sizes = options.sizes_of(shapes)
    of_a_step = {"--batch": batch, "--dtype": dtype, "--format": memory_format, "--gpu": gpu}
    if not training:
        for option, given in of_a_step.items():
            if given is not None:
                raise typer.BadParameter("it is of a training step: add --training", param_hint=option)
    refuse_unwritable(json_file)
    if training:
        how = dtype or info_training.DTYPE, memory_format or info_training.FORMAT, gpu or info_training.GPU
        info_training.show(model, sizes, batch, *how, depth, json_file)
        return

    import torch
    from rich.text import Text

    from ..summary import by_kind, summarize, to_depth

    target, module = options.module_of(model)
    sizes = sizes or [options.shape_for(module)]
    parameters = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    with refused_by("--input", RuntimeError):
        summary = summarize(module, *(torch.empty(size, dtype=parameters, device="meta") for size in sizes))

    console = printer(json_file)
    given = ", ".join("x".join(map(str, size)) for size in sizes)
    found = "" if target.name.startswith(target.source) else f" ({target.source})"
    console.print(Text.assemble((target.name, "bold"), found, f", input {given}"))
    layers = summary.layers if depth is None else to_depth(summary.layers, summary.classes, depth)
    kinds = by_kind(summary.layers)
    console.print(listed(layers, console.width))
    console.print(subtotals(kinds, summary))
    for line in totals(summary):
        console.print(line, highlight=False)
    total: dict[str, Any] = {name: value for name, value in vars(summary).items() if name not in ("layers", "classes")}
    data = {
        "model": target.name,
        "source": target.source,
        "input": sizes,
        "depth": depth,
        "layers": [asdict(layer) for layer in layers],
        "kinds": [asdict(kind) for kind in kinds],
        "total": total | {"macs": summary.macs},
    }
    write_json(json_file, data)


def listed(layers: list[Layer], width: int) -> Table:
    """One line for each layer. In a narrow window columns are left out, and long names take several lines: what tells
    layers apart is never cut away.
    """
    from rich.text import Text

    names = [layer.name or "(model)" for layer in layers]
    fields = ["all" if layer.receptive_field is None else str(layer.receptive_field or "") for layer in layers]
    columns = {
        "kind": [layer.kind if layer.kind != "other" else layer.class_name for layer in layers],
        "output\nshape": ["x".join(map(str, layer.output_shape)) for layer in layers],
        "parameters": [f"{layer.parameters:,}" if layer.parameters else "" for layer in layers],
        "FLOPs": [short(layer.flops).rstrip() if layer.flops else "" for layer in layers],
        "field\n(rows)": fields,
        "step\n(rows)": [f"{layer.jump:g}" if layer.jump is not None else "" for layer in layers],
    }
    needed = min(NAMES, max(map(len, names), default=0))
    room = _room(columns, width)
    for name in DISPENSABLE:
        if room < needed:
            del columns[f"{name}\n(rows)"]
            room = _room(columns, width)
    if room < needed:
        of_each = [short(layer.parameters).rstrip() if layer.parameters else "" for layer in layers]
        columns = {("param-\neters" if name == "parameters" else name): cells for name, cells in columns.items()}
        columns["param-\neters"] = of_each
        room = _room(columns, width)
    shown = _table(("layer", *columns), columns.keys() - {"kind", "output\nshape"})
    for layer, name, kind, *cells in zip(layers, names, *columns.values(), strict=True):
        shown.add_row(Text("\n".join(broken(name, max(8, room)))), Text(kind, STYLES.get(layer.kind, "")), *cells)
    return shown


def _room(columns: Mapping[str, Sequence[str]], width: int) -> int:
    """The characters that the columns leave for names."""
    return width - sum(max(map(len, [*heading.split("\n"), *cells])) + 2 for heading, cells in columns.items())


def _table(headings: Sequence[str], right: Any) -> Table:
    from rich import box

    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
    return table(headings, right=right, no_wrap=True, **style)


def broken(name: str, width: int) -> list[str]:
    """A name in lines of at most so many characters, broken behind its dots where it can be."""
    lines = [""]
    for part in name.replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append(" ")
        lines[-1] += part
    return [line[i : i + width] for line in lines for i in range(0, max(1, len(line)), width)]


def subtotals(kinds: Sequence[KindTotal], summary: Summary) -> Table:
    """A line for each kind of layer."""
    shown = _table(("kind", "calls", "parameters", "FLOPs", "of all"), {"calls", "parameters", "FLOPs", "of all"})
    for kind in kinds:
        share = f"{kind.flops / summary.flops:.1%}" if summary.flops else ""
        flops = short(kind.flops).rstrip() if kind.flops else ""
        shown.add_row(kind.kind, f"{kind.calls:,}", f"{kind.parameters:,}", flops, share if kind.flops else "")
    return shown


def totals(summary: Summary) -> list[str]:
    frozen, unused = summary.parameters - summary.trainable, summary.unused
    notes = [f"{unused:,} are of modules that infer mode does not use"] if unused else []
    return [
        f"[bold]{summary.parameters:,} parameters[/]: {summary.trainable:,} trainable, {frozen:,} frozen"
        + "".join(f"; {note}" for note in notes),
        f"[bold]{short(summary.flops)}FLOPs[/] ({short(summary.macs)}MAC)",
        f"{summary.parameter_bytes / MIB:,.2f} MiB of parameters, {summary.buffer_bytes / MIB:,.2f} MiB of buffers",
        f"{summary.output_bytes / MIB:,.2f} MiB of layer outputs in {len(summary.layers):,} calls",
    ]


def short(number: int) -> str:
    """8178368512 as 8.2 G."""
    for size, unit in UNITS:
        if number >= size * 0.9995:
            value = number / size
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{number} "
