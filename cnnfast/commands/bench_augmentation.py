"""What `cnnfast bench augment` is to do: the images and recipes, and by whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ..bench import AUGMENT
from ..dtypes import dtype_of
from . import options

if TYPE_CHECKING:
    import torch

    from ..bench.task import Task

RESULT = 224  # height and width of results
SIDE = 256  # of the images
BATCHES = {"cuda": [64], "cpu": [8]}
DTYPES = ("bfloat16", "float16", "float32")

ResultSize = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Height and width of what augment makes of images.",
        metavar="PIXELS",
        show_default=str(RESULT),
        rich_help_panel=options.INPUTS,
    ),
]


def refuse_what_is_not_for(model: str | None, size: int | None, mode: str) -> None:
    """Ends the command if an option was given that means nothing for augment, or for a model."""
    if size and model != AUGMENT:
        raise typer.BadParameter("it is of what augment makes: cnnfast bench augment --size 224", param_hint="--size")
    if mode and model == AUGMENT:
        raise typer.BadParameter("augment has no modes: leave out --mode", param_hint="--mode")


def augmentation_tasks(
    names: Sequence[str],
    batches: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    size: int | None,
    dtype: str,
    device: torch.device,
) -> Iterator[Task]:
    """Each recipe on images of each shape, in each batch size. shapes: none of them for images in either layout. size:
    of results; None for RESULT.
    """
    from ..bench.augmentation import RECIPES, augmentation_task
    from ..bench.augmenters import AUGMENTERS
    from ..bench.providers import EAGER

    if dtype not in DTYPES:
        raise typer.BadParameter(f"augment makes bf16, fp16 or fp32, not {dtype}", param_hint="--dtype")
    for shape in shapes:
        if len(shape) != 4 or 3 not in (shape[1], shape[3]):
            text = "x".join(map(str, shape))
            raise typer.BadParameter(
                f"{text} are no images: write 64x3x256x256, or 64x256x256x3 for channels last", param_hint="--input"
            )
    for name in names:
        if reason := AUGMENTERS[name].cannot_run_on(device):
            raise typer.BadParameter(f"{name} cannot run: {reason}", param_hint="--provider")
    chosen = [AUGMENTERS[name] for name in names or AUGMENTERS]
    if not names and device.type == "cpu":
        slow = "compiles for a minute on a CPU, ask by --provider"
        chosen = [replace(each, skipped="" if each.how == EAGER else slow) for each in chosen]
    standard = [(1, 3, SIDE, SIDE), (1, SIDE, SIDE, 3)]
    for recipe in RECIPES:
        for shape in shapes or standard:
            for batch in batches or ([shape[0]] if shapes else BATCHES[device.type]):
                yield augmentation_task(recipe, (batch, *shape[1:]), size or RESULT, dtype_of(dtype), device, chosen)
