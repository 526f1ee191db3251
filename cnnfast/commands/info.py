"""`cnnfast info`: the layers of a model: shapes, parameters, FLOPs and receptive fields."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from .console import (
    JsonFile,
    Model,
    Shapes,
    module_of,
    printer,
    refuse_unwritable,
    shape_for,
    sizes_of,
    table,
    write_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ..summary import Layer, Summary

STYLES = {"conv": "cyan", "linear": "magenta", "norm": "green", "pool": "yellow", "attention": "blue"}
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def info(model: Model, shapes: Shapes = None, json_file: JsonFile = None) -> None:
    """Show the layers of MODEL: output shape, parameters, FLOPs and receptive field of each, and totals.

    Nothing is computed and no weights are fetched: the model runs in eval mode on tensors that have a shape but no
    memory. FLOPs are the multiplications and additions of convolutions and matrix products, two to a
    multiply-accumulate (MAC). The receptive field is the number of input rows that one output can depend on ("all"
    after global pooling, attention, or a linear layer over positions), and beside it the step, in input rows, from one
    output to the next.
    """
    sizes = sizes_of(shapes)
    refuse_unwritable(json_file)

    import torch
    from rich.text import Text

    from ..summary import summarize

    target, module = module_of(model)
    sizes = sizes or [shape_for(module)]
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    try:
        summary = summarize(module, *(torch.zeros(size, dtype=dtype) for size in sizes))
    except RuntimeError as error:
        raise typer.BadParameter(f"{error}; name a shape that it takes", param_hint="--input") from None

    console = printer(json_file)
    given = ", ".join("x".join(map(str, size)) for size in sizes)
    found = "" if target.name.startswith(target.source) else f" ({target.source})"
    console.print(Text.assemble((target.name, "bold"), found, f", input {given}"))
    console.print(listed(summary.layers, console.width))
    for line in totals(summary):
        console.print(line, highlight=False)
    total = {name: value for name, value in asdict(summary).items() if name != "layers"} | {"macs": summary.macs}
    layers = [asdict(layer) for layer in summary.layers]
    data = {"model": target.name, "source": target.source, "input": sizes, "layers": layers, "total": total}
    write_json(json_file, data)


def listed(layers: list[Layer], width: int) -> Table:
    """One line for each layer. In a narrow window names lose their beginning, because what tells layers apart stands at
    their end.
    """
    from rich import box
    from rich.text import Text

    names = [layer.name or "(model)" for layer in layers]
    columns = {
        "kind": [layer.kind if layer.kind != "other" else layer.class_name for layer in layers],
        "output": ["x".join(map(str, layer.output_shape)) for layer in layers],
        "parameters": [f"{layer.parameters:,}" if layer.parameters else "" for layer in layers],
        "FLOPs": [short(layer.flops).rstrip() if layer.flops else "" for layer in layers],
        "field": ["all" if layer.receptive_field is None else str(layer.receptive_field or "") for layer in layers],
        "step": [f"{layer.jump:g}" if layer.jump is not None else "" for layer in layers],
    }

    def room() -> int:
        return width - sum(max(map(len, [heading, *cells])) + 2 for heading, cells in columns.items())

    if room() < min(24, max(map(len, names), default=0)):
        del columns["step"]
    longest = max(12, room())
    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
    shown = table(("layer", *columns), right=columns.keys() - {"kind", "output"}, no_wrap=True, **style)
    for layer, name, kind, *cells in zip(layers, names, *columns.values(), strict=True):
        name = name if len(name) <= longest else "…" + name[1 - longest :]
        shown.add_row(Text(name), Text(kind, STYLES.get(layer.kind, "")), *cells)
    return shown


def totals(summary: Summary) -> list[str]:
    frozen, unused = summary.parameters - summary.trainable, summary.unused
    notes = [f"{frozen:,} of them frozen"] if frozen else []
    notes += [f"{unused:,} in modules that eval does not use"] if unused else []
    return [
        f"[bold]{summary.parameters:,} parameters[/]" + "".join(f", {note}" for note in notes),
        f"[bold]{short(summary.flops)}FLOPs[/] ({short(summary.macs)}MAC)",
        f"{summary.output_bytes / 2**20:,.1f} MiB of layer outputs in {len(summary.layers):,} calls",
    ]


def short(number: int) -> str:
    """8178368512 as 8.2 G."""
    for size, unit in UNITS:
        if number >= size * 0.9995:
            value = number / size
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{number} "
