"""`cnnfast check`: a model or function, call by call and converted as a whole, against float64 and beside PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..located import located, own_frame
from ..modes import TRAIN
from ..targets.files import missing_arguments
from . import options
from .console import JsonFile, about, announce, printer, progress, refuse_unwritable, refused_by, write_text

if TYPE_CHECKING:
    import torch

EXAMPLES = (
    "cnnfast check resnet18 --input 2x3x32x32",
    "cnnfast check model.py:Net --mode train --dtype fp64",
    "cnnfast check timm:resnet10t --no-backward --json -",
)


def check(
    model: Annotated[
        str, typer.Argument(help=f"{options.MODEL_HELP} Yours may also be a function of tensors.", metavar="MODEL")
    ],
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help=options.INPUT_HELP,
            metavar=options.SHAPE,
            show_default="two small images",
            rich_help_panel=options.INPUTS,
        ),
    ] = None,
    dtype: options.Dtype = "fp32",
    mode: Annotated[
        str,
        typer.Option(
            help="The mode that the model runs in.",
            metavar=options.MODE,
            show_default="as it is built",
            rich_help_panel=options.INPUTS,
        ),
    ] = "",
    backward: Annotated[bool, typer.Option(help="Check gradients too.", rich_help_panel=options.INPUTS)] = True,
    json_file: JsonFile = None,
) -> None:
    """Judge every convolution, batch norm and pooling of MODEL, and the whole model converted, against float64.

    Each call runs on a random input, forward and backward, by our kernels and by PyTorch; ours may be no worse than
    twice PyTorch's own error. Our kernels serve wherever there is one, also where the library is faster.

    Without a GPU the kernels are interpreted, which takes minutes for a small network, and an hour or more for a
    ResNet-50; the time is estimated first. There, bf16 cannot be checked. fp64 is the sharpest test of a whole model.
    fp32 multiplies as IEEE says, whatever PyTorch's settings are; its default on a GPU is tf32.

    Ends with exit code 0 only if every call launched our kernels and everything holds.
    """
    sizes = options.sizes_of(shapes)
    name = options.dtype_named(dtype)
    modes = options.modes_of(mode)
    if len(modes) > 1:
        raise typer.BadParameter(f"{mode!r}: check one mode at a time, infer or train", param_hint="--mode")
    refuse_unwritable(json_file)

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and name == "bfloat16":
        advice = "Check fp32 or fp16 here, which run the same kernels, or bf16 on a GPU"
        why = "bf16 cannot be checked without a GPU: Triton's interpreter computes bfloat16 wrongly"
        raise typer.BadParameter(f"{why}. {advice}", param_hint="--dtype")

    from .. import dispatch

    if dispatch.launch is None:
        raise typer.BadParameter(f"there are no kernels to check: {dispatch.NO_KERNELS}", param_hint="check")

    from ..checking import check as run_check
    from ..checking.duration import foreseen

    torch.manual_seed(0)  # the same parameters and input every time
    checked = options.target_of(model).value
    if isinstance(checked, torch.nn.Module):
        sizes = sizes or [options.shape_for(checked, 2, small=True)]
        checked = (checked if not modes else checked.train(modes == (TRAIN,))).to(device)
    with refused_by("--input", RuntimeError):  # more than there is memory for
        inputs = [torch.randn(size).to(device) for size in sizes or [(1, 3, 32, 32)]]

    try:
        if device.type == "cpu":
            calls, seconds = foreseen(checked, tuple(inputs), backward=backward, dtype=name)
            announce(json_file, f"{calls} calls to judge, interpreted: {about(seconds)}, by an estimate.")
        with progress("capturing the calls") as tell:
            report = run_check(checked, *inputs, backward=backward, dtype=name, progress=tell)
    except Exception as error:
        if own_frame(error) or isinstance(error, RuntimeError | TypeError | ValueError):
            raise _does_not_run(model, checked, inputs, error) from None
        raise
    printer(json_file).print(report)
    write_text(json_file, report.to_json())
    raise typer.Exit(0 if report.ok else 1)


def _does_not_run(model: str, checked: Any, inputs: list[torch.Tensor], error: Exception) -> typer.BadParameter:
    """Most often the model does not take the input."""
    needs = missing_arguments(checked) if not hasattr(checked, "parameters") else []
    called = f" (called with them as {', '.join(needs)})" if needs else ""
    given = " ".join("x".join(map(str, t.shape)) for t in inputs)
    return typer.BadParameter(f"{model} with inputs {given}{called}: {located(error)}")
