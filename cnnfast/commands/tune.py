"""`cnnfast tune`: the convolutions of a model, and the blocks that it trains, measured on this GPU, and a table that is
used from then on.
"""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..modes import TRAIN
from ..triton_here import why_no_kernels
from . import console, options

EXAMPLES = (
    "cnnfast tune resnet50 --input 64x3x224x224",
    "cnnfast tune model.py:Net --mode infer,train --budget 600",
    "cnnfast tune resnet50 --dry-run --gpu h200",
)

if TYPE_CHECKING:
    from rich.table import Table

    from cnnfast_kernels import devices

    from ..tuning import Measured, MeasuredBlock, Tuning

DRY = "Without a GPU"


def tune(
    model: options.Model,
    shapes: options.Shapes = None,
    dtype: options.Dtype = "bf16",
    mode: Annotated[
        str,
        typer.Option(
            help="infer; train, whose gradients are measured too; or both.",
            metavar=options.MODES,
            rich_help_panel=options.INPUTS,
        ),
    ] = "infer",
    memory_format: options.MemoryFormat = "channels_last",
    budget: options.BudgetSeconds = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help=options.SECONDS_HELP, show_default="0.05", metavar=options.SECONDS, rich_help_panel=options.TIME
        ),
    ] = None,
    json_file: console.JsonFile = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Add the rows to this file too, a table that others can use.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only list what would be measured.", rich_help_panel=DRY),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: the GPU to list for.",
            show_default="the one that is here",
            metavar="h200",
            rich_help_panel=DRY,
        ),
    ] = None,
) -> None:
    """Measure the convolutions of MODEL on this GPU, and let the fastest serve from then on.

    MODEL is converted. Each of its convolutions is tried with about a dozen tiles and with the library's (cuDNN's)
    kernels, on random numbers; a candidate that computes wrong results is excluded. In training each residual block is
    tried as a whole too, and who is faster there serves all its convolutions. The winner is written at once to a
    table in your cache folder, which cnnfast reads in every later run; rows of other models and sizes stay in it. A row
    serves its own sizes, and batches half to twice as large.

    Measure the sizes and the dtype that you will run: PyTorch's convolutions of fp32 on a GPU are tf32 unless you set
    them to IEEE. Ends with exit code 1 if something could not be measured, or anything computed wrong numbers.
    Ctrl-C loses nothing: what was measured is printed and kept, and the exit code is 130, or 143 after SIGTERM.
    """
    sizes = options.sizes_of(shapes)
    name = options.dtype_named(dtype)
    modes = options.modes_of(mode)
    if not modes:
        raise typer.BadParameter("'' is neither infer nor train", param_hint="--mode")
    layout = options.format_of(memory_format)
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
    known = None if gpu is None else options.gpu_of(gpu)
    console.refuse_unwritable(json_file)
    console.refuse_unwritable(table, "--table")

    import torch

    here = torch.cuda.is_available()
    if not dry_run and not here:
        raise typer.BadParameter(
            "there is no GPU here to measure on; --dry-run lists what would be measured", param_hint="tune"
        )
    try:
        from cnnfast_kernels import devices

        from .. import tuning
        from ..measuring.budget import Budget
        from ..tuning.planning import planned
        from ..tuning.report import named
    except (ImportError, AttributeError) as error:
        what = "listed" if dry_run else "measured"
        raise typer.BadParameter(f"nothing can be {what}: {why_no_kernels(error)}", param_hint="tune") from None

    torch.manual_seed(0)
    _, module = options.module_of(model)
    sizes = sizes or [options.shape_for(module)]
    how: dict[str, Any] = {
        "dtype": name,
        "memory_format": getattr(torch, layout),
    }
    trains = tuple(m == TRAIN for m in modes)
    if dry_run:
        listed_for = devices.gpu(torch.device("cuda", torch.cuda.current_device())) if here else None
        if known is not None:
            listed_for = devices.Gpu(known.cuda, known.arch)
        with console.refused_by("--input", RuntimeError):
            found = planned(
                module, tuple(torch.empty(size, device="meta") for size in sizes), trains, gpu=listed_for, **how
            )
        console.printer(json_file).print(listed(found, listed_for))
        data = [{**named(m), "count": m.count, "candidates": list(m.candidates)} for m in found]
        console.write_json(json_file, data)
        return

    time, each = Budget(budget), seconds or tuning.SECONDS
    result: Tuning | None = None
    code, ended = 0, ""
    try:
        with console.interruptible():
            module = module.cuda()
            inputs = [torch.randn(size, device="cuda") for size in sizes]
            result = tuning.begin(module, *inputs, trains=trains, table=table, **how)
            console.announce(json_file, _duration(result, each, budget))
            with console.progress("measuring") as tell:

                def told(done: int, total: int, text: str) -> None:
                    tell(done, total, text)
                    if json_file != console.STANDARD_OUTPUT:
                        console.write_text(json_file, result.to_json())

                where = inputs[0].device
                tuning.proceed(result, where, budget=time, table=table, seconds=each, progress=told)
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


def _duration(tuning: Tuning, seconds: float, budget: float | None) -> str:
    """How long it will take, as far as that is known before a kernel is compiled: in timing, and at most."""
    from ..tuning.report import counted

    candidates = sum(len(m.candidates) for m in tuning.left)
    text = f"{counted(tuning.left)} with {candidates} candidates: {console.about(seconds * candidates)} of"
    end = "compiling and judging them takes several times that"
    if budget is None:
        return f"{text} timing; {end}. --budget SECONDS ends it, and Ctrl-C loses nothing."
    return f"{text} timing; {end}, but --budget ends it after {console.about(budget)}."


def listed(found: list[Measured | MeasuredBlock], gpu: devices.Gpu | None) -> Table:
    """A table of what would be measured."""
    from ..tuning.report import counted

    candidates = sum(len(m.candidates) for m in found)
    on = "any GPU of sm_90" if gpu is None else f"{gpu.name} (sm_{gpu.arch})"
    what = f"{counted(found)} to measure on {on}, with {candidates} candidates in all"
    table = console.table(
        ("calls", "what", "dtype", "x, w, y", "candi-\ndates"),
        right=("calls", "candi-\ndates"),
        title=f"{what}; what costs most comes first",
        title_justify="left",
    )
    for m in found:
        table.add_row(str(m.count), str(m), m.key.dtype, m.key.layout, str(len(m.candidates)))
    return table
