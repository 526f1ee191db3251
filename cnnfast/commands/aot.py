"""`cnnfast aot`: every kernel compiled for GPUs that need not be there, and what its machine code holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .console import JsonFile, printer, progress, refuse_unwritable, refused_by, table, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from cnnfast_kernels.aot import KernelRow


def aot(
    arch: Annotated[
        list[str] | None, typer.Option(help="GPU architecture to compile for; may be repeated.", show_default="sm_90")
    ] = None,
    json_file: JsonFile = None,
    only: Annotated[
        str, typer.Option(help="Only cases whose name contains this: fprop, wgrad, float64, pooling, ...")
    ] = "",
    record: Annotated[
        bool, typer.Option("--record", help="Write down the lengths of main loops: later runs are compared with them.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile.", show_default="one a core")] = None,
) -> None:
    """Compile every kernel for a GPU, without needing one: registers, spills, shared memory, tensor cores.

    Ends with exit code 1 if a kernel does not compile, spills registers, needs more shared memory than there is,
    multiplies half precision without tensor cores, waits after every wgmma, or has a main loop 15 % longer than on
    record; or if a kernel that can be chosen on an architecture is not among its cases.
    """
    from rich.markup import escape

    try:
        from cnnfast_kernels import aot as compiler
        from cnnfast_kernels.aot import record as loops
    except ImportError as error:
        raise typer.BadParameter(f"ahead-of-time compilation needs triton: {error}") from None

    if record and only:
        raise typer.BadParameter("the record is of all cases: leave --only out", param_hint="--record")
    refuse_unwritable(json_file)
    with refused_by("--arch", RuntimeError, ValueError):
        archs = [f"sm_{compiler.capability_of(name)}" for name in arch or ["sm_90"]]
    with refused_by("--only", RuntimeError, ValueError):
        compiler.selected(archs, only)
    with refused_by(None, RuntimeError):
        compiler.require_compiled_kernels()
    with progress(f"compiling for {', '.join(archs)}") as tell:
        rows = compiler.compile_all(archs, only, jobs, tell)
    write_json(json_file, [asdict(row) for row in rows])

    if record:
        loops.write(rows)
    found = compiler.problems(rows) + loops.risen(rows)
    if not only:
        found += compiler.uncovered(rows)
    console = printer(json_file)
    for line in found:
        console.print(f"[bold red]problem[/] {escape(line)}", highlight=False, soft_wrap=True)
    console.print(summary(rows))
    console.print(f"{len(rows)} kernels compiled, {len(found)} problems")
    raise typer.Exit(1 if found else 0)


def summary(rows: list[KernelRow]) -> Table:
    """One line for each kernel and architecture: the worst of its rows."""
    figures = ("variants", "registers", "spills", "shared memory", "tensor cores", "loop", "seconds")
    title = "the worst of all variants and tiles of each kernel"
    shown = table(("kernel", "arch", *figures), right=figures, title=title)
    groups: dict[tuple[str, str], list[KernelRow]] = {}
    for row in rows:
        if row.error is None:
            groups.setdefault((row.kernel, row.arch), []).append(row)
    for (kernel, arch), group in sorted(groups.items()):
        loops = [row.loop_instructions for row in group if row.loop_instructions is not None]
        shown.add_row(
            kernel,
            arch,
            str(len(group)),
            str(max(row.registers or 0 for row in group)),
            str(max(row.spill_bytes or 0 for row in group)),
            str(max(row.shared_bytes or 0 for row in group)),
            " ".join(sorted({row.tensor_core for row in group if row.tensor_core})),
            f"{min(loops)}-{max(loops)}" if loops else "",
            f"{sum(row.seconds for row in group):.1f}",
        )
    return shown
