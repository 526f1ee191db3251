"""`cnnfast bench --compare`: two files of rows side by side."""

from __future__ import annotations

from pathlib import Path

import typer

from .console import printer, refused_by, write_json


def compared(before: Path, after: Path, json_file: Path | None) -> int:
    """Prints the comparison and writes it as JSON; returns the exit code."""
    for file in (before, after):
        if not file.is_file():
            raise typer.BadParameter(f"there is no file {file}", param_hint="--compare")

    from ..bench.compare import compare, comparison, regressed
    from ..bench.rows import read

    with refused_by("--compare", OSError, ValueError):
        runs = [read(file) for file in (before, after)]
    changes = compare(*runs)
    if not changes:
        raise typer.BadParameter(f"{before} and {after} have no provider and job in common", param_hint="--compare")
    printer(json_file).print(comparison(changes))
    write_json(json_file, [change.to_dict() for change in changes])
    return 1 if regressed(changes) else 0
