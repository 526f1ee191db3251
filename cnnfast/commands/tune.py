"""`cnnfast tune`: the convolutions of a model measured on this GPU, and a table that is used from then on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .target import DTYPE_HELP, INPUT_HELP, MODEL_HELP, input_shape, parse_dtype, parse_shape, resolve_module

if TYPE_CHECKING:
    from rich.table import Table

    from ..tuning import Measured

MODES = ("infer", "train")


def tune(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    shapes: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP, show_default="what the model is made for, or 224")] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "bf16",
    mode: Annotated[str, typer.Option(help="infer, or train: gradients too.")] = "infer",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all that was measured to this file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be measured. Needs no GPU.")] = False,
) -> None:
    """Measure the convolutions of MODEL on this GPU, and let the fastest serve from then on.

    MODEL is converted, in channels_last. Each of its convolutions is tried with many tiles and with the library's (cuDNN's) kernels, on
    random numbers; whoever computes wrong ones is out. What wins is written to a table in your cache folder, which cnnfast reads in every
    later run; rows of other models and sizes stay in it. A row serves its own sizes, and batches half to twice as large.

    Measure the sizes that you will run, and the dtype: PyTorch's convolutions of float32 on a GPU are tf32 unless you set them to IEEE.
    Ends with exit code 1 if a convolution could not be measured, or anything computed wrong numbers.
    """
    sizes = [parse_shape(shape) for shape in shapes or []]
    name = parse_dtype(dtype)
    if mode not in MODES:
        raise typer.BadParameter(f"{mode!r} is neither infer nor train", param_hint="--mode")

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    try:
        from .. import tuning
    except ImportError as error:
        raise typer.BadParameter(f"measuring needs triton: {error}") from None
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here to measure on; --dry-run lists what would be measured", param_hint="tune")

    torch.manual_seed(0)
    _, module = resolve_module(model)
    sizes = sizes or [input_shape(module, 1, small=False)]
    how: dict[str, Any] = {"training": mode == "train", "dtype": name}
    console = Console()
    try:
        if dry_run:
            found = tuning.plan(module, *(torch.empty(size, device="meta") for size in sizes), **how)
            console.print(listed(found))
            if json_file is not None:
                data = [{"convolution": str(m), "count": m.count, "candidates": list(m.candidates)} for m in found]
                json_file.write_text(json.dumps(data, indent=1) + "\n")
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True)) as bars:
            bar = bars.add_task("finding the convolutions", total=None)
            result = tuning.tune(
                module.cuda(), *(torch.randn(size, device="cuda") for size in sizes), **how,
                progress=lambda done, total, text: bars.update(bar, completed=done, total=total, description=text),
            )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="tune") from None
    console.print(result)
    if json_file is not None:
        json_file.write_text(result.to_json() + "\n")
    raise typer.Exit(0 if result.ok else 1)


def listed(found: list[Measured]) -> Table:
    """What would be measured."""
    from rich.table import Table

    candidates = sum(len(m.candidates) for m in found)
    title = f"{len(found)} convolutions to measure, with {candidates} candidates in all"
    table = Table(title=title, title_justify="left")
    for heading in ("calls", "convolution", "dtype", "x, w, y", "candidates"):
        table.add_column(heading, justify="right" if heading in ("calls", "candidates") else "left", overflow="fold")
    for m in found:
        table.add_row(str(m.count), str(m), m.key.dtype, m.key.layout, str(len(m.candidates)))
    return table
