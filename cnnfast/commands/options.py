"""Options and arguments that commands share, in one vocabulary, and the values that their texts stand for.

What has a default of its own in a command is declared there, with the texts that stand here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..dtypes import full_name
from ..modes import modes_named
from ..spelling import did_you_mean
from ..targets.inputs import input_shape, parse_shape
from ..targets.naming import resolve, resolve_module
from ..targets.target import Target, TargetError
from .console import refused_by

if TYPE_CHECKING:
    from torch import nn

    from cnnfast_kernels.gpus import KnownGpu

# Panels of --help.
INPUTS, TIME, OUTPUT = "Model and inputs", "Time", "Results"

MODEL_HELP = (
    "A name such as resnet50, SOURCE:NAME of cnnfast, torchvision, timm or transformers, or your own: file.py:NAME, "
    "package.module:NAME."
)
INPUT_HELP = "Shape of an input; repeat it for several inputs."
INPUT_DEFAULT = "what the model is made for, or 224"
DTYPE_HELP = (
    "bf16, fp16, fp32, tf32 or fp64, or PyTorch's names, such as bfloat16 or torch.half. fp32 multiplies as IEEE says; "
    "tf32 is float32 whose products are rounded to TF32."
)
FORMAT_HELP = "Layout of images and weights in memory: channels_last or contiguous."
GPU_HELP = "The GPU, which need not be here: b200, h200, h100, a100, l40s, rtx-4090 or rtx-3090."
SECONDS_HELP = "How long one timing takes."

SHAPE, DTYPE, MODE, MODES, SECONDS = "1x3x224x224", "DTYPE", "infer|train", "infer,train", "SECONDS"

Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--input", help=INPUT_HELP, metavar=SHAPE, show_default=INPUT_DEFAULT, rich_help_panel=INPUTS),
]
Dtype = Annotated[str, typer.Option(help=DTYPE_HELP, metavar=DTYPE, rich_help_panel=INPUTS)]
MemoryFormat = Annotated[
    str,
    typer.Option(
        "--format",
        help=FORMAT_HELP,
        metavar="LAYOUT",
        rich_help_panel=INPUTS,
    ),
]
BudgetSeconds = Annotated[
    float | None,
    typer.Option(
        help="How long all of it may take. What costs most is measured first, and what no longer fits is named.",
        show_default="no limit",
        metavar=SECONDS,
        rich_help_panel=TIME,
    ),
]

# Names of --format, as PyTorch has them, and what else somebody may call them.
FORMATS = {"channels_last": "channels_last", "contiguous": "contiguous_format"}
OTHER_FORMATS: dict[str, str | None] = {"nhwc": "channels_last", "nchw": "contiguous", "contiguousformat": "contiguous"}


def format_of(text: str) -> str:
    """The name that PyTorch has for --format."""
    if text not in FORMATS:
        advice = did_you_mean(text, FORMATS, OTHER_FORMATS)
        raise typer.BadParameter(f"{text!r} is neither {' nor '.join(FORMATS)}{advice}", param_hint="--format")
    return FORMATS[text]


def gpu_of(text: str) -> KnownGpu:
    """The GPU that --gpu names. Imports neither torch nor triton."""
    from cnnfast_kernels import gpus

    with refused_by("--gpu", ValueError):
        try:
            return gpus.named(text)
        except ValueError as error:
            raise ValueError(f"{error}{did_you_mean(text, [gpu.name for gpu in gpus.KNOWN])}") from None


def sizes_of(shapes: list[str] | None) -> list[tuple[int, ...]]:
    """The shapes of --input as tuples."""
    with refused_by("--input", TargetError):
        return [parse_shape(shape) for shape in shapes or []]


def dtype_named(text: str) -> str:
    """The full name of --dtype: bf16 as "bfloat16"; "tf32" stays."""
    with refused_by("--dtype", ValueError):
        return full_name(text)


def modes_of(text: str) -> tuple[str, ...]:
    """The modes of --mode, each once; none of them if it is empty."""
    with refused_by("--mode", ValueError):
        return modes_named(text)


def target_of(text: str) -> Target:
    """The module or function that MODEL names."""
    with refused_by("MODEL", TargetError):
        return resolve(text)


def module_of(text: str) -> tuple[Target, nn.Module]:
    """The torch.nn.Module that MODEL names."""
    with refused_by("MODEL", TargetError):
        return resolve_module(text)


def shape_for(model: nn.Module, batch: int = 1, *, small: bool = False) -> tuple[int, ...]:
    """A shape that the model takes, where --input gives none."""
    with refused_by("--input", TargetError):
        return input_shape(model, batch, small=small)
