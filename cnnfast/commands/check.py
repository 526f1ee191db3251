"""`cnnfast check`: a model or function, call by call and converted as a whole, against float64 and beside PyTorch."""

from __future__ import annotations

from typing import Annotated

import typer

from ..targets.files import missing_arguments
from .console import (
    INPUT_HELP,
    MODEL_HELP,
    Dtype,
    JsonFile,
    dtype_named,
    printer,
    progress,
    refuse_unwritable,
    shape_for,
    sizes_of,
    target_of,
    write_text,
)


def check(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} Your own may also be a function of tensors.")],
    shapes: Annotated[
        list[str] | None, typer.Option("--input", help=INPUT_HELP, show_default="two small images")
    ] = None,
    dtype: Dtype = "fp32",
    backward: Annotated[bool, typer.Option(help="Check gradients too.")] = True,
    train: Annotated[
        bool | None, typer.Option("--train/--eval", help="Mode that the model runs in.", show_default="as it is built")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check every convolution, batch norm and pooling of MODEL on a random input, and the whole model converted,
    forward and backward.

    A class, or a function that can be called without arguments, is called to build the model; no weights are fetched.
    Without a GPU the kernels are interpreted, which takes minutes for a small network, and an hour or more for a
    ResNet-50. float64 is the sharpest test of a whole model. float32 is judged with IEEE products, whatever PyTorch's
    settings are; its default on a GPU, rounding to TF32, is --dtype tf32. Our kernels serve wherever there is one, also
    convolutions that the library otherwise serves because it is faster.

    Ends with exit code 0 only if every covered call launched our kernels and everything holds.
    """
    sizes = sizes_of(shapes)
    name = dtype_named(dtype)
    refuse_unwritable(json_file)

    import torch

    from ..checking import check as run_check

    torch.manual_seed(0)  # the same parameters and input every time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checked = target_of(model).value
    if isinstance(checked, torch.nn.Module):
        sizes = sizes or [shape_for(checked, 2, small=True)]
        checked = (checked if train is None else checked.train(train)).to(device)
    inputs = [torch.randn(size).to(device) for size in sizes or [(1, 3, 32, 32)]]

    with progress("capturing the calls") as tell:
        try:
            report = run_check(checked, *inputs, backward=backward, dtype=name, progress=tell)
        except (RuntimeError, TypeError, ValueError) as error:  # most often the model does not take the input
            needs = [] if isinstance(checked, torch.nn.Module) else missing_arguments(checked)
            called = f" (called with them as {', '.join(needs)})" if needs else ""
            given = " ".join("x".join(map(str, t.shape)) for t in inputs)
            raise typer.BadParameter(f"{model} with inputs {given}{called}: {type(error).__name__}: {error}") from None
    printer(json_file).print(report)
    write_text(json_file, report.to_json())
    raise typer.Exit(0 if report.ok else 1)
