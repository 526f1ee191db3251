"""`cnnfast train`: from a folder of images to a checked and frozen network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import JsonFile, announce, exit_code, refuse_unwritable, refuse_unwritable_folder, refused_by, write_json

if TYPE_CHECKING:
    from ..training import Run
    from ..training.samples import ImageSet
    from ..training.starting import Start

EXAMPLES = (
    "cnnfast train digits --out run",
    "cnnfast train photos --model timm:resnet50 --pretrained --freeze backbone --epochs 10 --out run",
    "cnnfast train photos --model net.py:Net --augment degrees=15 --augment mixup_alpha=0.2 --out run",
    "cnnfast train photos --out run --resume",
)
DIGITS, DIGIT_NET, USUAL = "digits", "cnnfast.demo.digits:DigitNet", "resnet18"
DIGIT_SIZE, SIZE, SMALL = 8, 224, 32  # pixels of a side
GO_ON = "To go on: the same command with --resume"
NETWORK, LEARNING, IMAGES, RUNNING = "Network", "Learning", "Images", "Running"
DATA_HELP = (
    "A folder with a folder of images for each class, a CSV with the columns file and label, or digits: scikit-learn's."
)


def train(
    data: Annotated[str, typer.Argument(help=DATA_HELP, metavar="DATA", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="The folder of the run.", metavar="RUN", rich_help_panel=options.OUTPUT)
    ] = Path("run"),
    model: Annotated[
        str,
        typer.Option(
            help=options.MODEL_HELP,
            metavar="MODEL",
            show_default=f"{USUAL}; for digits {DIGIT_NET}",
            rich_help_panel=NETWORK,
        ),
    ] = "",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the published weights.", rich_help_panel=NETWORK)
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Start from the weights in this file, of safetensors or torch.save; what does not fit is listed.",
            metavar="FILE",
            show_default="random weights",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help="A part that is not trained, such as layer1, or backbone: all but the head. Repeat it for several.",
            metavar="NAME",
            show_default="none",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=LEARNING)] = 40,
    batch: Annotated[
        int, typer.Option(min=1, help="Images of a step, in each process.", metavar="N", rich_help_panel=LEARNING)
    ] = 64,
    lr: Annotated[
        float | None,
        typer.Option(
            help="The largest learning rate.",
            show_default="0.004, for sgd 0.1; a tenth with weights that were trained",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="adamw|adam|sgd", rich_help_panel=LEARNING)] = "adamw",
    schedule: Annotated[str, typer.Option(metavar="one-cycle|cosine", rich_help_panel=LEARNING)] = "one-cycle",
    weight_decay: Annotated[float, typer.Option(min=0, rich_help_panel=LEARNING)] = 0.01,
    label_smoothing: Annotated[float, typer.Option(min=0, max=1, rich_help_panel=LEARNING)] = 0.1,
    balanced: Annotated[
        bool,
        typer.Option("--balanced", help="Classes with few images count as much as others.", rich_help_panel=LEARNING),
    ] = False,
    ema: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Decay of the moving average of the weights; 0: none.", rich_help_panel=LEARNING
        ),
    ] = 0.998,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="End after so many epochs without a better one.",
            metavar="N",
            show_default="train to the end",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    mixed: Annotated[
        str,
        typer.Option(
            help="Mixed precision.", metavar="bf16|fp16", show_default="the model's dtype", rich_help_panel=LEARNING
        ),
    ] = "",
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pixels of each side of what the network sees.",
            show_default=f"{SIZE}; for digits {DIGIT_SIZE}, or {SMALL} for other networks",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    augment: Annotated[
        list[str] | None,
        typer.Option(
            help="An option of cnnfast.nn.Augment, such as degrees=15; repeat it for several. `cnnfast augment` shows "
            "what they do.",
            metavar="NAME=VALUE",
            show_default="random resized crops and flips; for digits small shifts, turns and slants",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    validation: Annotated[
        str,
        typer.Option(
            help="The share of each class that is held out, or other images of the same classes, like DATA.",
            metavar="SHARE|DATA",
            rich_help_panel=IMAGES,
        ),
    ] = "0.2",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read images.", metavar="N", rich_help_panel=RUNNING)
    ] = 0,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs of this machine, or processes on its CPU. Under torchrun all that it starts.",
            metavar="N",
            show_default="one",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="All random numbers follow from it.", rich_help_panel=RUNNING)] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in RUN after its last whole epoch, with the same options; a run that has none "
            "begins.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train a network on images, check it on what was held out, and freeze it into one file.

    RUN gets config.json, metrics.csv, best.safetensors and last.safetensors, last.ckpt for --resume, evaluation.json,
    the pictures curves, confusion, mistakes and augmented (.png), and model.cnnfast for `cnnfast predict`. The network
    is converted, and its heads are replaced by ones of as many classes as DATA has.

    State is saved at the end of each epoch. Ctrl-C and SIGTERM end the training with exit code 130 or 143. After them,
    and after whatever else ended the process, --resume trains the epoch anew, and the run ends with the weights that it
    would have had. A loss that is no number ends it with exit code 1.
    """
    refuse_unwritable(json_file)
    refuse_unwritable_folder(out, "--out")

    with refused_by(None, ModuleNotFoundError):
        from .. import training
    from ..nn import augment_options
    from ..training.optimizing import LEARNING_RATES
    from ..training.ranks import ProcessEnded, is_first

    with refused_by("--augment", ValueError):
        drawn = augment_options(augment or [])
    name = model or (DIGIT_NET if data == DIGITS else USUAL)
    images, held_out = _data(data, validation, name, size)
    started = _start(name, images, pretrained, weights, seed)
    for line in (*images.notes, *([str(started.loading)] if started.loading else [])):
        _announce_once(json_file, line)
    if lr is None and (pretrained or weights) and optimizer in LEARNING_RATES:
        lr = LEARNING_RATES[optimizer] / 10  # what was learnt before shall not be forgotten at once
    try:
        with refused_by(None, ValueError, ModuleNotFoundError):
            run = training.fit(
                started.model, images, out=out, resume=resume, validation=held_out, augment=drawn, epochs=epochs,
                batch=batch, lr=lr, optimizer=optimizer, weight_decay=weight_decay,
                schedule=schedule, label_smoothing=label_smoothing, class_weights="balanced" if balanced else None,
                frozen=freeze or (), ema=ema or None, patience=patience, mixed=mixed or None, seed=seed,
                devices=devices, workers=workers, name=name,
            )  # fmt: skip
    except (training.Diverged, ProcessEnded) as error:
        announce(json_file, f"{error}. {GO_ON}" if isinstance(error, ProcessEnded) else str(error))
        raise typer.Exit(1) from None
    except training.Interrupted as error:
        _announce_once(json_file, f"{error}. {GO_ON}")
        raise typer.Exit(128 + error.number) from None
    except KeyboardInterrupt as error:  # before the first epoch or after the last one
        _announce_once(json_file, f"Interrupted. {GO_ON}")
        raise typer.Exit(exit_code(error)) from None
    except OSError as error:
        announce(json_file, f"{error.strerror or error}. {GO_ON}")
        raise typer.Exit(1) from None
    if is_first():
        _tell(run, out, json_file)


def _data(data: str, validation: str, name: str, size: int | None) -> tuple[ImageSet, Any]:
    """The images to train with, and the share of them, or the other images, that are held out."""
    from ..targets.target import TargetError
    from ..training.samples import open_images
    from ..training.starting import channels_of

    with refused_by("--model", TargetError):
        channels = channels_of(name)
    pixels = size or (SIZE if data != DIGITS else DIGIT_SIZE if name == DIGIT_NET else SMALL)
    with refused_by("DATA", ValueError, OSError, ModuleNotFoundError):
        images = open_images(data, pixels, channels=channels)
    try:
        share = float(validation)
    except ValueError:
        share = math.nan
    if not math.isnan(share):
        if not 0 <= share < 1:
            raise typer.BadParameter(f"a share is from 0 to below 1, not {validation}", param_hint="--validation")
        return images, share
    with refused_by("--validation", ValueError, OSError, ModuleNotFoundError):
        return images, open_images(validation, pixels, classes=images.classes, channels=channels)


def _start(name: str, images: ImageSet, published: bool, weights: Path | None, seed: int) -> Start:
    from ..targets.target import TargetError
    from ..training.heads import NoHead
    from ..training.starting import start

    with refused_by("--model", TargetError, NoHead), refused_by("--weights", ValueError):
        size = (images.size, images.size)
        return start(
            name,
            len(images.classes),
            size,
            channels=images.channels,
            published=published,
            weights=weights,
            seed=seed,
        )


def _announce_once(json_file: Path | None, text: str) -> None:
    """What all processes that train together have to say, said by the first."""
    from ..training.ranks import is_first

    if is_first():
        announce(json_file, text)


def _tell(run: Run, out: Path, json_file: Path | None) -> None:
    announce(json_file, str(run))
    announce(json_file, f"Next: cnnfast predict {out} IMAGE, or cnnfast evaluate {out} DATA")
    epochs = [epoch._asdict() for epoch in run.history]
    found = {"accuracy": run.accuracy, "seconds": run.seconds, "classes": list(run.classes), "folder": str(out)}
    write_json(json_file, {**found, "best": run.best.epoch, "epochs": epochs})
