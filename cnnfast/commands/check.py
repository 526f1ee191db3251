"""`cnnfast check`: a model or function, call by call, and a model as a whole once converted, against float64 and beside PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .target import INPUT_HELP, MODEL_HELP, input_shape, parse_shape, resolve

DTYPES = ("float16", "bfloat16", "float32", "float64")


def check(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} A class, a factory, a model or a function.")],
    shapes: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP, show_default="a small one that it takes")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    backward: Annotated[bool, typer.Option(help="Check gradients too.")] = True,
    train: Annotated[bool | None, typer.Option("--train/--eval", help="Mode of the model.", show_default="as it is built")] = None,
    whole: Annotated[bool, typer.Option(help="Convert the model and check it as a whole too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Check every convolution, batch norm and pooling of MODEL on a random input, forward and backward; then the whole, converted.

    The whole: state_dict, output in eval and in training, gradients of all parameters, statistics. Without a GPU the kernels are
    interpreted, which takes its time. Ends with exit code 0 only if every covered call launched our kernels and everything holds.
    """
    sizes = [parse_shape(shape) for shape in shapes or []]
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..checking import Report, check_conversion
    from ..checking import check as run_check

    torch.manual_seed(0)  # the same parameters and input every time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = resolve(model).value
    if isinstance(target, torch.nn.Module):
        target = (target if train is None else target.train(train)).to(device)
        sizes = sizes or [input_shape(target, 1 if not target.training else 2, small=True)] if list(target.parameters()) else sizes
    inputs = [torch.randn(size).to(device) for size in sizes or [(1, 3, 32, 32)]]

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task("capturing the calls", total=None)
        try:
            report = run_check(
                target, *inputs, backward=backward, dtype=dtype,
                progress=lambda done, total, name: bars.update(bar, completed=done, total=total, description=name),
            )  # fmt: skip
        except (RuntimeError, TypeError, ValueError) as error:  # above all: an input that the model does not take
            given = " ".join("x".join(map(str, x.shape)) for x in inputs)
            raise typer.BadParameter(f"{model} with inputs {given}: {type(error).__name__}: {error}", param_hint="--input") from None
        conversion = Report([])
        if whole and isinstance(target, torch.nn.Module) and report.rows:
            bars.add_task("the whole model, converted", total=None)
            conversion = check_conversion(target, *inputs, backward=backward, dtype=dtype)
    console = Console()
    console.print(report)
    if conversion.rows:
        console.print("\nthe whole model: cnnfast.convert(model) beside the original")
        console.print(conversion)
    report = Report([*report.rows, *conversion.rows])
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n")
    raise typer.Exit(0 if report.ok else 1)
