"""`cnnfast explain`: where the time of a model's step goes on a named GPU, by a model, without that GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from ..modes import INFER, TRAIN
from ..triton_here import why_no_kernels
from . import options
from .console import JsonFile, printer, refuse_unwritable, refused_by, write_text

EXAMPLES = (
    "cnnfast explain resnet50 --gpu h200 --batch 256 --mode train --dtype bf16",
    "cnnfast explain torchvision:efficientnet_b0 --gpu rtx-4090 --picture efficientnet.png",
    "cnnfast explain model.py:Net --input 64x3x64x64 --json net.json",
)
ENDINGS, ENDINGS_SAID = (".png", ".svg", ".pdf"), ".png, .svg or .pdf"  # of pictures
BATCH = 32  # where neither --batch nor --input says one


def explain(
    model: options.Model,
    gpu: Annotated[
        str,
        typer.Option(help=options.GPU_HELP, metavar="NAME", rich_help_panel=options.INPUTS),
    ] = "h200",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images a step.", metavar="N", show_default="32", rich_help_panel=options.INPUTS),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help=f"{options.INPUT_HELP} --batch replaces its first size.",
            metavar=options.SHAPE,
            show_default=options.INPUT_DEFAULT,
            rich_help_panel=options.INPUTS,
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="infer; or train, with the backward pass.", metavar=options.MODE, rich_help_panel=options.INPUTS
        ),
    ] = INFER,
    dtype: options.Dtype = "bf16",
    memory_format: options.MemoryFormat = "channels_last",
    json_file: JsonFile = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help=f"Draw a bar for each layer into this file: {ENDINGS_SAID}.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
) -> None:
    """Show where the time of a step of MODEL goes on a GPU: a model's figures, nothing is measured.

    MODEL is converted and run on tensors that have a shape but no memory, and its kernels are chosen as under
    cnnfast.backend("kernels"), and not launched. For each operation stand the kernel and its tile, registers of a
    thread, programs that live on a multiprocessor at once, FLOPs for each byte from the second-level cache, what limits
    it, and its modelled microseconds beside those of the roofline: if it only multiplied, or only moved each of its
    tensors once, at the GPU's full rate. "Served by" says who would serve the call on that GPU today.

    Equal operations share a line, and what takes longest comes first; the file of --json has every operation in its
    order. What a table has measured on that GPU stands beside the model's figures. The loss and the optimizer are not
    counted.
    """
    sizes = options.sizes_of(shapes)
    name = options.dtype_named(dtype)
    modes = options.modes_of(mode)
    if len(modes) != 1:
        raise typer.BadParameter(f"{mode!r}: explain one mode at a time, {INFER} or {TRAIN}", param_hint="--mode")
    layout = options.format_of(memory_format)
    known = options.gpu_of(gpu)
    refuse_unwritable(json_file)
    refuse_unwritable(picture, "--picture")
    if picture is not None and picture.suffix.lower() not in ENDINGS:
        raise typer.BadParameter(
            f"{picture} is no name of a picture: let it end with {ENDINGS_SAID}", param_hint="--picture"
        )
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter('a picture needs matplotlib: pip install ".[demo]"', param_hint="--picture")

    from dataclasses import replace

    import torch

    try:
        from ..explaining import explain as explained
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"nothing can be explained: {why_no_kernels(error)}", param_hint="explain") from None

    target, module = options.module_of(model)
    sizes = sizes or [options.shape_for(module, batch or BATCH)]
    sizes = [(batch or size[0], *size[1:]) for size in sizes]
    how: dict[str, Any] = {"dtype": name, "memory_format": getattr(torch, layout)}
    inputs = [torch.empty(size, device="meta") for size in sizes]
    with refused_by("MODEL", RuntimeError):
        explanation = explained(module, *inputs, gpu=known.name, train=modes == (TRAIN,), **how)
    explanation = replace(explanation, model=target.name)
    if picture is not None:
        explanation.picture(picture)
    printer(json_file).print(explanation)
    write_text(json_file, explanation.to_json())
