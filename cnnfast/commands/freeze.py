"""`cnnfast freeze`: a trained model becomes one file that runs fast on any CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..dtypes import CHOICES
from . import options
from .console import STANDARD_OUTPUT, JsonFile, announce, printer, progress, refuse_unwritable, refused_by, write_text

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = (
    "cnnfast freeze resnet50 --weights resnet50.safetensors --out resnet50.cnnfast",
    "cnnfast freeze model.py:Net --input 1x3x64x64 --dtype bf16 --out net.cnnfast",
    "cnnfast freeze timm:resnet18 --weights w.safetensors --classes names.txt --out r.cnnfast",
)
CONTENTS = "What goes into the file"
HALF_OR_SINGLE = ("float32", "bfloat16", "float16")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
HOW_TO_CONVERT = "safetensors.torch.save_model(model, 'model.safetensors') writes what this command reads"


def freeze(
    model: options.Model,
    out: Annotated[
        Path,
        typer.Option(
            help="The file to write, *.cnnfast by convention; one that is there is replaced as a whole.",
            metavar="FILE",
            rich_help_panel=options.OUTPUT,
        ),
    ],
    shapes: options.Shapes = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="The trained weights, a file of safetensors with all of the model's names and no others.",
            metavar="FILE",
            show_default="as the model is built",
            rich_help_panel=CONTENTS,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="What the network computes in: fp32, bf16 or fp16.",
            metavar=options.DTYPE,
            show_default="the model's",
            rich_help_panel=CONTENTS,
        ),
    ] = "",
    classes: Annotated[
        str,
        typer.Option(
            help="Names of the classes: a text file with one in each line, or weights of torchvision by name.",
            metavar="FILE",
            show_default="as the model has them",
            rich_help_panel=CONTENTS,
        ),
    ] = "",
    preprocessing: Annotated[
        str,
        typer.Option(
            help="How images are prepared: weights of torchvision by name, as ResNet50_Weights.IMAGENET1K_V2, "
            "timm:NAME, or a JSON file with size, crop, interpolation, mean and std.",
            metavar="NAME|FILE",
            show_default="as the model has it",
            rich_help_panel=CONTENTS,
        ),
    ] = "",
    json_file: JsonFile = None,
) -> None:
    """Write MODEL, with its weights, as one file that runs fast on any CPU, without the model's code.

    The model is captured, batch norms are folded, steps fused, and the results on a random input compared with the
    model's own in float64. The file takes any batch size and, where the model does, any image size. `cnnfast predict`
    names what is on images by it, and cnnfast.load reads it in Python.

    Ends with exit code 1, and writes nothing, if the results are not close enough.
    """
    sizes = options.sizes_of(shapes)
    if dtype and (name := options.dtype_named(dtype)) not in HALF_OR_SINGLE:
        raise typer.BadParameter(
            f"no runner computes in {name}: use fp32, bf16 or fp16 of {CHOICES}", param_hint="--dtype"
        )
    if out == STANDARD_OUTPUT:
        raise typer.BadParameter("write to a file: a network is no text", param_hint="--out")
    refuse_unwritable(out, "--out")
    refuse_unwritable(json_file)
    if weights is not None:
        _refuse_weights(weights)

    import torch

    from .. import engine
    from ..engine.images.classes import classes_of
    from ..engine.images.preprocessing import Preprocessing
    from ..engine.judging import NotClose
    from ..targets.libraries import SOURCES

    with refused_by("--classes", ValueError):
        names = classes_of(classes) if classes else None
    with refused_by("--preprocessing", ValueError):
        prepared = Preprocessing.of(preprocessing) if preprocessing else None
    torch.manual_seed(0)
    target, module = options.module_of(model)
    if weights is not None:
        with refused_by("--weights", ValueError):
            load_weights(module, weights)
    sizes = sizes or [options.shape_for(module)]
    floating = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    with refused_by("--input", RuntimeError):  # more than there is memory for
        inputs = [torch.randn(size, dtype=floating) for size in sizes]
    try:
        with progress("building") as tell:
            frozen = engine.freeze(
                module, *inputs, dtype=dtype or None, preprocessing=prepared, classes=names, progress=tell
            )
            tell(0, None, "capturing other image sizes, and writing")
            frozen.save(out)
    except NotClose as error:
        printer(json_file).print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except (RuntimeError, ValueError) as error:
        raise typer.BadParameter(str(error).removeprefix("freeze(): "), param_hint="freeze") from None
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None

    report = frozen.report()
    size = out.stat().st_size
    lines = [*report.notes, report.summary, f"{out} is written: {size / 1e6:.1f} MB"]
    if weights is None and target.source in SOURCES:
        lines.append(
            f"Its weights are random, as {target.source} builds {target.name}: --weights FILE gives trained ones."
        )
    lines.append(f"Next: cnnfast predict {out} IMAGE, or in Python: frozen = cnnfast.load({str(out)!r}); y = frozen(x)")
    for line in lines:
        announce(json_file, line)
    write_text(json_file, json.dumps({"file": str(out), "bytes": size, **json.loads(report.to_json())}, indent=1))


def _refuse_weights(file: Path) -> None:
    """Ends the command with exit code 2 if a file cannot be one of safetensors."""
    if file.suffix.lower() in PICKLES:
        why = "is a pickle, which can run any code when it is read"
        raise typer.BadParameter(f"{file} {why}: {HOW_TO_CONVERT}", param_hint="--weights")
    if not file.is_file():
        raise typer.BadParameter(f"there is no file {file}", param_hint="--weights")


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads all weights of a model from a file of safetensors. Raises ValueError, which names what is wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(model, str(file), strict=True)
    except SafetensorError as error:
        raise ValueError(f"{file} is no file of safetensors: {error}. {HOW_TO_CONVERT}") from None
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{file} does not fit {type(model).__name__}: {told[:400]}") from None
