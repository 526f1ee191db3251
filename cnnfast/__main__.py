"""The command line: `cnnfast`, or `python -m cnnfast`. Commands import torch when they run, so that --help is quick."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from . import __version__
from .commands import aot, augment, bench, check, demo, doctor, evaluate, explain, freeze, info, predict, train, tune

EXIT_CODES = "**Exit codes:** 0 done, and everything holds; 1 judged, and something failed; 2 wrong input."


def _in_plain_words(params: list[Any]) -> list[Any]:
    """Arguments and options whose help speaks of what people type, and not of Python's types: what stands for a value
    is what the command calls it, or else the option's name, and a range is told when it is left.
    """
    for param in params:
        param._get_number_range_help_str = lambda: None
        if param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: ""
        elif param.metavar is None:
            param.metavar = "" if param.is_flag else param.name.upper()
    return params


class PlainCommand(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        *params, helping = _in_plain_words(super().get_params(ctx))
        helping.rich_help_panel = "Other"  # it stands last
        return [*params, helping]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


class PlainGroup(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _in_plain_words(super().get_params(ctx))


app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)


def examples(*lines: str) -> str:
    """The end of a help text: lines that can be typed, and what the exit codes mean."""
    return "\n".join(["**Examples:**", *(f"- `{line}`" for line in lines), "", EXIT_CODES])


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cnnfast {__version__}")
        raise typer.Exit()


@app.callback(epilog=examples("cnnfast doctor", "cnnfast check resnet18 --help"))
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Hand-written Triton kernels for convolutional networks in PyTorch, and the proof that they are right."""


# By purpose, in the order in which a new user meets them: one line for `cnnfast --help`, and what can be typed.
COMMANDS = {
    "Start here": {
        doctor.doctor: ("What this machine has, what is broken, what to do next.", doctor.EXAMPLES),
        demo.demo: ("The whole story on this machine: train, check, draw.", demo.EXAMPLES),
        info.info: ("The layers of a model: shapes, parameters, FLOPs.", info.EXAMPLES),
    },
    "Train": {
        train.train: ("From a folder of images to a checked and frozen network.", train.EXAMPLES),
        evaluate.evaluate: ("What a trained network recognises, class by class.", evaluate.EXAMPLES),
        augment.augment: ("A sheet of a photograph, augmented many times.", augment.EXAMPLES),
    },
    "Trust": {
        check.check: ("Judge every layer of a model against float64.", check.EXAMPLES),
        aot.aot: ("Compile every kernel for a GPU that need not be here.", aot.EXAMPLES),
    },
    "Speed": {
        explain.explain: ("Where a model's time goes on a GPU, by a model.", explain.EXAMPLES),
        tune.tune: ("Measure a model's convolutions on this GPU, once.", tune.EXAMPLES),
        bench.bench: ("Time a model against the strongest baselines.", bench.EXAMPLES),
    },
    "Deploy": {
        freeze.freeze: ("Write a trained model as one file for any CPU.", freeze.EXAMPLES),
        predict.predict: ("Name what is in images, by a frozen network.", predict.EXAMPLES),
    },
}

for panel, commands in COMMANDS.items():
    for command, (line, typed) in commands.items():
        app.command(cls=PlainCommand, rich_help_panel=panel, short_help=line, epilog=examples(*typed))(command)

if __name__ == "__main__":
    app(prog_name="cnnfast")
