"""ci/gpu.sh: the visit's command line. Bad input is refused, with the choices, before anything is begun."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from cnnfast.commands.console import JSON_HELP, printer, refuse_unwritable, write_text

from . import machine, visiting
from .parts import KEPT, MOST_SECONDS, PARTS, ROOT, chosen
from .results import check

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
RESULTS = ROOT / "benchmarks" / "results"
PLANNED = KEPT / "plan.json"
DEFAULT_GPU = "h200"


def costs() -> dict[str, str]:
    """What each part was counted to take, in words, by the plan that is kept: to count it again would cost the visit a
    minute.
    """
    if not PLANNED.exists():
        return {}
    return {part["part"]: f"; counted beforehand: {part['told']}" for part in json.loads(PLANNED.read_text())["parts"]}


HELP = f"""Everything worth doing while a GPU is at hand for fifteen minutes.

Parts, in this order, all unless some are named: {", ".join(PARTS)}. Each says what it will take, writes as it goes, is
ended at its limit, and leaves its files before the next begins; Ctrl-C and SIGTERM end the part that runs and leave
what there is. The folder then holds summary.md, visit.tar.gz with all logs, and the measured rows: eight files at most.
Parts that another visit has left there stay. Exit code 0, 1 if anything failed, 2 if nothing could be begun, 130 if
interrupted.
"""
RECORDED_HELP = (
    "As far as a machine without a GPU goes: kernels are compiled and launched over a driver that records, "
    "and nothing is judged; small models are measured on the CPU."
)


@app.command(name="ci/gpu.sh", help=HELP)
def main(
    parts: Annotated[
        list[str] | None, typer.Argument(metavar="PART", help=f"Of {', '.join(PARTS)}.", show_default="all")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only print the parts with limits and counted costs. Needs no GPU.")
    ] = False,
    recorded: Annotated[bool, typer.Option("--recorded", help=RECORDED_HELP)] = False,
    out: Annotated[
        Path | None, typer.Option(help="The folder of results.", show_default="benchmarks/results/<gpu>")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds of all parts together.")] = MOST_SECONDS,
    gpu: Annotated[
        str | None, typer.Option(help="With --plan or --recorded: the GPU that is meant.", show_default=DEFAULT_GPU)
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help=f"With --plan. {JSON_HELP}")] = None,
) -> None:
    if wrong := [part for part in parts or [] if part not in PARTS]:
        raise typer.BadParameter(f"{wrong[0]!r} is none of {', '.join(PARTS)}", param_hint="PART")
    if not (isfinite(budget) and budget > 0):
        raise typer.BadParameter(f"{budget} is no duration: give a positive number of seconds", param_hint="--budget")
    if plan and recorded:
        raise typer.BadParameter("--plan runs nothing: give one of the two", param_hint="--recorded")
    if gpu is not None and not (plan or recorded):
        raise typer.BadParameter(
            "a visit is of the GPU that is here: add --plan or --recorded to mean another", param_hint="--gpu"
        )
    if json_file is not None and not plan:
        raise typer.BadParameter("it is of --plan; a visit's results go to --out", param_hint="--json")
    if out is not None and out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file: name a folder", param_hint="--out")
    refuse_unwritable(json_file)

    from cnnfast_kernels import gpus

    try:
        meant = gpus.named(gpu or DEFAULT_GPU)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu") from None
    names = parts or []
    if plan:
        print_plan(names, meant.cuda, meant.arch, json_file)
        return
    if recorded:
        here = {"device": f"no GPU: the recording driver, sm_{meant.arch}", "python": sys.version.split()[0]}
        folder = out or Path(tempfile.mkdtemp(prefix="cnnfast-recorded-"))
    else:
        try:
            here = machine.ask(visiting.environment())
        except RuntimeError as error:
            raise typer.BadParameter(str(error), param_hint="GPU") from None
        if not here:
            raise typer.BadParameter(
                "there is none here; --plan says what a visit would take, --recorded runs it as far as it goes without",
                param_hint="GPU",
            )
        folder = out or RESULTS / re.sub("[^a-z0-9]+", "-", here["device"].lower()).strip("-")
    try:
        check(folder)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    code = visiting.visit(
        lambda work: chosen(names, work, meant if recorded else None),
        folder,
        here,
        {} if recorded else costs(),
        budget=budget,
    )
    raise typer.Exit(code)


def print_plan(names: list[str], name: str, arch: int, json_file: Path | None) -> None:
    """A table on standard output, or standard error where that is to hold the JSON."""
    import torch
    from rich.table import Table

    from cnnfast.measuring.machine import this_machine
    from cnnfast_kernels import devices

    from .plan import COSTS, plain_json

    folder = Path("FOLDER")
    wanted, gpu = chosen(names, folder), devices.Gpu(name, arch)
    costs = [COSTS[part.name](part, gpu) for part in wanted]
    table = Table(title=f"a visit of {name} (sm_{arch})", title_justify="left", box=None, pad_edge=False)
    for head in ("part", "limit s", "kernels", "launchers", "numbers", "timing s", "modelled s"):
        table.add_column(head, justify="left" if head == "part" else "right")
    for cost in costs:
        counts = (f"{cost.binaries:,}", f"{cost.launchers:,}", f"{cost.numbers / 1e6:,.0f}e6" if cost.numbers else "")
        table.add_row(
            cost.part, f"{cost.limit:.0f}", *counts, f"{cost.timing:.0f}" if cost.timing else "", f"{cost.seconds:.0f}"
        )
    table.add_row("all", f"{sum(c.limit for c in costs):.0f}", *[""] * 4, f"{sum(c.seconds for c in costs):.0f}")
    console = printer(json_file)
    console.print(table, markup=False, highlight=False)
    notes = [f"{cost.part}: {cost.note}" for cost in costs if cost.note]
    notes.append(
        "Kernels, launchers (triton 3.6 builds them) and numbers are counted. "
        "Seconds are modelled: no GPU has confirmed them."
    )
    console.print("\n".join(notes), markup=False, highlight=False, soft_wrap=True)
    write_text(json_file, plain_json(costs, wanted, folder, gpu, this_machine(torch.device("cpu")).commit))


if __name__ == "__main__":
    app(prog_name="ci/gpu.sh")
