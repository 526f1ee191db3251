"""`cnnfast evaluate`: how many labelled images a trained network recognises, and which it takes for which."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..spelling import did_you_mean
from . import options
from .console import (
    JsonFile,
    announce,
    exit_code,
    interruptible,
    printer,
    progress,
    refuse_unwritable,
    refused_by,
    table,
    write_json,
)
from .train import DATA_HELP

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..training.evaluating import Evaluation
    from ..training.samples import ImageSet

EXAMPLES = (
    "cnnfast evaluate run photos/test",
    "cnnfast evaluate model.cnnfast photos/test --picture confusion.png --json -",
)
LOOKING, EVALUATING = "looking at images", "evaluating"  # the headers of files come first
MOST_LINES = 40  # of classes in the table, those that are recognised least


def evaluate(
    network: Annotated[
        Path,
        typer.Argument(
            help="The folder of a run, or a file that `cnnfast freeze` or a run has written.",
            metavar="RUN|FILE",
            show_default=False,
        ),
    ],
    data: Annotated[str, typer.Argument(help=DATA_HELP, metavar="DATA", show_default=False)],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.", metavar="N", rich_help_panel="Images")] = 64,
    workers: Annotated[
        int,
        typer.Option(min=0, help="Processes that read images for a run.", metavar="N", rich_help_panel="Images"),
    ] = 0,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw which class is taken for which, as a PNG.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Count how many of the labelled images in DATA a trained network recognises.

    Tells the share of images whose most probable class is theirs, the share with theirs among the five most probable,
    and for each class how many were recognised, and how many of those taken for it are of it. The classes of DATA are
    the network's, by their names; it need not have all of them. A run's network runs on the GPU where there is one, and
    under torchrun each process takes its share of the images.
    """
    refuse_unwritable(picture, "--picture")
    refuse_unwritable(json_file)
    if not network.exists():
        near = did_you_mean(str(network), map(str, network.parent.glob("*")))
        raise typer.BadParameter(f"there is no file or folder {network}{near}", param_hint="RUN|FILE")

    with refused_by(None, ModuleNotFoundError):
        importlib.import_module("cnnfast.training.runs")
    try:
        with interruptible():
            found = _of_run(network, data, batch, workers) if network.is_dir() else _of_file(network, data, batch)
    except KeyboardInterrupt as interrupt:
        announce(json_file, "Interrupted: nothing is told of a part of the images.")
        raise typer.Exit(exit_code(interrupt)) from None
    if found is None:  # another process tells
        return
    _show(found, printer(json_file))
    if picture is not None:
        from ..training import pictures
        from ..training.saving import write

        with refused_by("--picture", OSError):
            write(picture, pictures.confusion(found))
        announce(json_file, f"{picture} is written")
    write_json(json_file, found.to_json())


def _of_run(folder: Path, data: str, batch: int, workers: int) -> Evaluation | None:
    import torch

    from ..training.evaluating import evaluate as judge
    from ..training.ranks import connected, is_first
    from ..training.trained import read_run
    from ..training.unreadable import refuse_unreadable

    with refused_by("RUN|FILE", ValueError, OSError):
        trained = read_run(folder)
    images = _images(data, trained.augment.size, trained.classes, trained.channels)
    with connected() as device, progress(LOOKING, is_first()) as tell, refused_by("DATA", ValueError):
        refuse_unreadable(images.resized(trained.augment.centre.resize), torch.arange(len(images)), workers, tell)
        tell(0, len(images), EVALUATING)
        model: nn.Module = trained.model.to(device)
        found = judge(model, trained.augment, images, batch=batch, workers=workers, tell=tell)
        return found if is_first() else None


def _of_file(file: Path, data: str, batch: int) -> Evaluation | None:
    """By the first process alone."""
    import torch

    from .. import engine
    from ..training.evaluating import evaluate_frozen
    from ..training.ranks import is_first
    from ..training.unreadable import refuse_unreadable

    if not is_first():
        return None
    with refused_by("RUN|FILE", ValueError, OSError):
        network = engine.load(file)
        how = network.preprocessing
        if how is None or network.classes is None:
            lacks = "how images are prepared" if how is None else "the names of its classes"
            raise ValueError(f"{file} does not say {lacks}: freeze it with --preprocessing and --classes")
        how.check_sizes(network.network)
    images = _images(data, how.output_size or 1, network.classes, len(how.mean))
    with progress(LOOKING) as tell, refused_by("DATA", ValueError):
        refuse_unreadable(replace(images, evaluation=how), torch.arange(len(images)), tell=tell)
        tell(0, len(images), EVALUATING)
        return evaluate_frozen(network, how, images, batch=batch, tell=tell)


def _images(data: str, size: int | tuple[int, int], classes: tuple[str, ...], channels: int) -> ImageSet:
    from ..training.samples import open_images

    with refused_by("DATA", ValueError, OSError, ModuleNotFoundError):
        return open_images(data, size, classes=classes, channels=channels)


def _show(found: Evaluation, console: Console) -> None:
    from ..training.evaluating import TOP, most_confused
    from .predict import printable

    scores = [score for score in found.scores if score.images]
    shown = sorted(scores, key=lambda score: (score.recall or 0.0, score.name))[:MOST_LINES]
    lines = table(("class", "images", "recognised", "of those taken for it"), right={"images", "recognised"})
    for score in shown:
        precision = "" if score.precision is None else f"{score.precision:.1%}"
        lines.add_row(printable(score.name), f"{score.images:,}", f"{score.recall:.1%}", precision)
    console.print(lines)
    if len(shown) < len(scores):
        console.print(f"The {MOST_LINES} classes that are recognised least; --json FILE has all.", highlight=False)
    for name, other, count in most_confused(found, 3):
        console.print(f"{count:,} of {name} were taken for {other}", markup=False, highlight=False, soft_wrap=True)
    share = f"{found.right:,} of {found.images:,} right: {found.accuracy:.2%}"
    in_top = f"; {found.top:.2%} among the {TOP} most probable classes" if len(found.classes) > TOP else ""
    console.print(share + in_top, highlight=False)
