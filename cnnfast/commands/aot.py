"""`cnnfast aot`: every kernel compiled for GPUs that need not be there, and what its machine code holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..dtypes import SHORT
from ..measuring.load import cores_for, usable_cores
from ..triton_here import why_no_kernels
from . import options
from .console import JsonFile, about, announce, printer, progress, refuse_unwritable, refused_by, table, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from cnnfast_kernels.aot import KernelRow

EXAMPLES = ("cnnfast aot --only pool", "cnnfast aot --arch sm_90 --arch sm_80 --json kernels.json")
WHICH = "Which kernels"
# Of one core, for a case that Triton has not in its cache: what 633 kernels for sm_80 and sm_90 took, on two cores.
SECONDS_EACH = 1.1


def aot(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="Architecture of a GPU; repeat it for several.",
            metavar="sm_90",
            show_default="sm_90",
            rich_help_panel=WHICH,
        ),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Only cases whose name contains this, such as infer, train, wgrad, fp64 or pool.",
            metavar="WORDS",
            show_default="all",
            rich_help_panel=WHICH,
        ),
    ] = "",
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that compile.", metavar="N", show_default="one a core", rich_help_panel=options.TIME
        ),
    ] = None,
    json_file: JsonFile = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Compile what the model of tiles reads of kernels, and write it down; later runs are compared.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
) -> None:
    """Compile every kernel for a GPU, without needing one: registers, spills, shared memory, tensor cores.

    Ends with exit code 1 if a kernel does not compile, spills registers, needs more shared memory than there is,
    multiplies half precision without tensor cores, waits after every wgmma, or is not within 15 % of what is on
    record of it; or if a kernel that can be chosen on an architecture is not among its cases.
    """
    from rich.markup import escape

    from cnnfast_kernels.gpus import capability_of

    if record and only:
        raise typer.BadParameter("the record is of cases of its own: leave --only out", param_hint="--record")
    refuse_unwritable(json_file)
    with refused_by("--arch", ValueError):
        archs = [f"sm_{capability}" for capability in dict.fromkeys(map(capability_of, arch or ["sm_90"]))]

    try:
        from cnnfast_kernels import aot as compiler
        from cnnfast_kernels.aot import records
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"nothing can be compiled: {why_no_kernels(error)}", param_hint="aot") from None

    only = " ".join(SHORT.get(word, word) for word in only.split(" "))  # case names have PyTorch's names of dtypes
    with refused_by("--only", RuntimeError, ValueError):
        count = len(records.all_due(archs) if record else compiler.selected(archs, only))
    with refused_by("aot", RuntimeError):
        compiler.require_compiled_kernels()
    processes = min(jobs or usable_cores(), count)
    time = about(SECONDS_EACH * count / cores_for(processes))
    cases, by = f"{count} case{'s' * (count > 1)}", f"{processes} process{'es' * (processes > 1)}"
    text = f"{cases} for {', '.join(archs)}, compiled by {by}: {time}, by an estimate"
    announce(json_file, f"{text}; what Triton has in its cache takes no time.")
    with progress(f"compiling for {', '.join(archs)}") as tell:
        rows = records.compile_due(archs, jobs, tell) if record else compiler.compile_all(archs, only, jobs, tell)
    write_json(json_file, [asdict(row) for row in rows])

    console = printer(json_file)
    if record:
        found = [f"{row.arch} {row.variant}: does not compile: {row.error}" for row in rows if row.error is not None]
        for file in records.write(rows):
            console.print(f"written to {escape(str(file))}", highlight=False, soft_wrap=True)
    else:
        found = compiler.problems(rows) + records.departures(rows) + ([] if only else compiler.uncovered(rows))
    console.print(summary(rows))
    for line in found:
        console.print(f"[bold red]problem[/] {escape(line)}", highlight=False, soft_wrap=True)
    console.print(f"{len(rows)} kernels compiled, {len(found)} problems")
    raise typer.Exit(1 if found else 0)


def summary(rows: list[KernelRow]) -> Table:
    """One line for each kernel and architecture: the worst of its rows. It fits into 80 columns."""
    from rich import box

    title = "The worst of all variants and tiles of each kernel; loop: instructions of the innermost main loop"
    headings = {
        "kernel": "left",
        "arch": "left",
        "vari-\nants": "right",
        "regis-\nters": "right",
        "spills\n(B)": "right",
        "shared\n(KiB)": "right",
        "tensor\ncores": "left",
        "loop\n(instr.)": "right",
        "time\n(s)": "right",
    }
    shown = table(
        tuple(headings),
        right=[name for name, side in headings.items() if side == "right"],
        no_wrap=True,
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    groups: dict[tuple[str, str], list[KernelRow]] = {}
    for row in rows:
        if row.error is None:
            groups.setdefault((row.kernel, row.arch), []).append(row)
    for (kernel, arch), group in sorted(groups.items()):
        loops = [row.loop_instructions for row in group if row.loop_instructions is not None]
        shown.add_row(
            kernel.removesuffix("_kernel"),
            arch,
            str(len(group)),
            str(max(row.registers or 0 for row in group)),
            str(max(row.spill_bytes or 0 for row in group)),
            f"{max(row.shared_bytes or 0 for row in group) / 1024:.0f}",
            " ".join(sorted({row.tensor_core for row in group if row.tensor_core})),
            f"{min(loops)}-{max(loops)}" if loops else "",
            f"{sum(row.seconds for row in group):.1f}",
        )
    return shown
