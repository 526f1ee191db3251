"""The command line: `cnnfast`, or `python -m cnnfast`. Commands import torch when they run, so that --help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from . import __version__
from .commands.aot import aot
from .commands.bench import bench
from .commands.check import check
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.info import info
from .commands.tune import tune

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cnnfast {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hand-written Triton kernels for convolutional networks in PyTorch, and the proof that they are right."""


for command in (demo, doctor, check, bench, tune, info, aot):
    app.command()(command)

if __name__ == "__main__":
    app(prog_name="cnnfast")
