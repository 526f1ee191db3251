"""`cnnfast tune`: the convolutions of a model measured on this GPU, and a table that is used from then on."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console

if TYPE_CHECKING:
    from rich.table import Table

    from cnnfast_kernels import devices

    from ..tuning import Measured, Tuning

FORMATS = ("channels_last", "contiguous")


def tune(
    model: console.Model,
    shapes: console.Shapes = None,
    dtype: console.Dtype = "bf16",
    mode: Annotated[str, typer.Option(help="infer; train: gradients too; or infer,train.")] = "infer",
    memory_format: Annotated[
        str, typer.Option("--format", help="Layout of images and weights in memory: channels_last or contiguous.")
    ] = FORMATS[0],
    budget: console.BudgetSeconds = None,
    seconds: Annotated[float | None, typer.Option(help=console.SECONDS_HELP, show_default="0.05")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Add the rows to this file too, a table that others can use.")
    ] = None,
    json_file: console.JsonFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be measured; this needs no GPU.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="With --dry-run: the GPU to list for.", show_default="the one that is here")
    ] = None,
) -> None:
    """Measure the convolutions of MODEL on this GPU, and let the fastest serve from then on.

    MODEL is converted. Each of its convolutions is tried with about a dozen tiles and with the library's (cuDNN's)
    kernels, on random numbers; a candidate that computes wrong results is excluded. The winner is written at once to a
    table in your cache folder, which cnnfast reads in every later run; rows of other models and sizes stay in it. A row
    serves its own sizes, and batches half to twice as large.

    Measure the sizes and the dtype that you will run: PyTorch's convolutions of float32 on a GPU are tf32 unless you
    set them to IEEE. Ends with exit code 1 if a convolution could not be measured, or anything computed wrong numbers.
    Ctrl-C loses nothing: what was measured is printed and kept, and the exit code is 130, or 143 after SIGTERM.
    """
    sizes = console.sizes_of(shapes)
    name = console.dtype_named(dtype)
    modes = console.modes_of(mode)
    if memory_format not in FORMATS:
        raise typer.BadParameter(f"{memory_format!r} is neither {' nor '.join(FORMATS)}", param_hint="--format")
    console.refuse_no_time(budget)
    if seconds is not None and not 0 < seconds < inf:
        raise typer.BadParameter(
            f"{seconds:g} is no time to measure for: write seconds above 0, as in --seconds 0.05",
            param_hint="--seconds",
        )
    measuring = {"--budget": budget, "--seconds": seconds, "--table": table}
    if dry_run and (given := [option for option, value in measuring.items() if value is not None]):
        raise typer.BadParameter("nothing is measured with --dry-run: leave it out", param_hint=given[0])
    if gpu is not None and not dry_run:
        raise typer.BadParameter(
            "measuring is done on the GPU that is here: add --dry-run to list for another", param_hint="--gpu"
        )
    known = None if gpu is None else _known(gpu)
    console.refuse_unwritable(json_file)
    console.refuse_unwritable(table, "--table")

    import torch

    try:
        from cnnfast_kernels import devices

        from .. import tuning
        from ..measuring.budget import Budget
        from ..tuning.planning import planned
    except ImportError as error:
        raise typer.BadParameter(f"measuring needs triton: {error}") from None
    here = torch.cuda.is_available()
    if not dry_run and not here:
        raise typer.BadParameter(
            "there is no GPU here to measure on; --dry-run lists what would be measured", param_hint="tune"
        )

    torch.manual_seed(0)
    _, module = console.module_of(model)
    sizes = sizes or [console.shape_for(module)]
    how: dict[str, Any] = {
        "dtype": name,
        "memory_format": getattr(torch, {"contiguous": "contiguous_format"}.get(memory_format, memory_format)),
    }
    trains = tuple(m == "train" for m in modes)
    if dry_run:
        known = known or (devices.gpu(torch.device("cuda", torch.cuda.current_device())) if here else None)
        with console.refused_by("tune", RuntimeError):
            found = planned(module, tuple(torch.empty(size, device="meta") for size in sizes), trains, gpu=known, **how)
        console.printer(json_file).print(listed(found, known))
        data = [{"convolution": str(m), "count": m.count, "candidates": list(m.candidates)} for m in found]
        console.write_json(json_file, data)
        return

    time = Budget(budget)
    result: Tuning | None = None
    code, ended = 0, ""
    try:
        with console.interruptible(), console.progress("finding the convolutions") as tell:
            module = module.cuda()
            inputs = [torch.randn(size, device="cuda") for size in sizes]
            result = tuning.begin(module, *inputs, trains=trains, table=table, **how)

            def told(done: int, total: int, text: str) -> None:
                tell(done, total, text)
                if json_file != console.STANDARD_OUTPUT:
                    console.write_text(json_file, result.to_json())

            where = inputs[0].device
            tuning.proceed(result, where, budget=time, table=table, seconds=seconds or tuning.SECONDS, progress=told)
    except KeyboardInterrupt as interrupt:
        code, ended = console.exit_code(interrupt), "The run was interrupted."
    except (RuntimeError, OSError, ValueError) as error:
        if result is None:  # nothing was measured yet
            raise typer.BadParameter(str(error), param_hint="tune") from None
        code, ended = 1, f"The run ended early: {error}"
    if result is None:
        console.printer(json_file).print("Interrupted before anything was measured.")
        raise typer.Exit(code)
    result.notes += [ended] if ended else []
    console.printer(json_file).print(result)
    console.write_text(json_file, result.to_json())
    raise typer.Exit(code or (0 if result.ok else 1))


def _known(text: str) -> devices.Gpu:
    from cnnfast_kernels import devices, gpus

    with console.refused_by("--gpu", ValueError):
        return devices.Gpu(*gpus.named(text)[1:])


def listed(found: list[Measured], gpu: devices.Gpu | None) -> Table:
    """A table of what would be measured."""
    candidates = sum(len(m.candidates) for m in found)
    on = "any GPU of sm_90" if gpu is None else f"{gpu.name} (sm_{gpu.arch})"
    what = f"{len(found)} convolutions to measure on {on}, with {candidates} candidates in all"
    table = console.table(
        ("calls", "convolution", "dtype", "x, w, y", "candidates"),
        right=("calls", "candidates"),
        title=f"{what}; what costs most comes first",
        title_justify="left",
    )
    for m in found:
        table.add_row(str(m.count), str(m), m.key.dtype, m.key.layout, str(len(m.candidates)))
    return table
