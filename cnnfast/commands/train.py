"""`cnnfast train`: from a folder of images to a checked and frozen network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import train_options
from .console import JsonFile, announce, exit_code, refuse_unwritable, refuse_unwritable_folder, refused_by, write_json
from .train_options import DIGIT_NET, DIGIT_SIZE, DIGITS, SIZE, SMALL, USUAL

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
GO_ON = "To go on: the same command with --resume"


def train(
    data: train_options.Data,
    out: train_options.Out = Path("run"),
    model: train_options.ModelName = "",
    pretrained: train_options.Pretrained = False,
    weights: train_options.Weights = None,
    freeze: train_options.Freeze = None,
    epochs: train_options.Epochs = 40,
    batch: train_options.Batch = 64,
    lr: train_options.LearningRate = None,
    optimizer: train_options.OptimizerName = "adamw",
    schedule: train_options.Schedule = "one-cycle",
    weight_decay: train_options.WeightDecay = 0.01,
    label_smoothing: train_options.LabelSmoothing = 0.1,
    clip: train_options.Clip = None,
    balanced: train_options.Balanced = False,
    ema: train_options.Decay = 0.998,
    patience: train_options.Patience = None,
    mixed: train_options.Mixed = "",
    size: train_options.Pixels = None,
    augment: train_options.Augmentation = None,
    validation: train_options.Validation = "0.2",
    workers: train_options.Workers = 0,
    devices: train_options.Devices = None,
    seed: train_options.Seed = 0,
    resume: train_options.Resume = False,
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
        with refused_by(None, ValueError, ModuleNotFoundError), _unreadable_told():
            run = training.fit(
                started.model, images, out=out, resume=resume, validation=held_out, augment=drawn, epochs=epochs,
                batch=batch, lr=lr, optimizer=optimizer, weight_decay=weight_decay,
                schedule=schedule, label_smoothing=label_smoothing, class_weights="balanced" if balanced else None,
                frozen=freeze or (), ema=ema or None, patience=patience, clip=clip, mixed=mixed or None, seed=seed,
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

    # Of a name there is a model by now: what cannot be had are its weights.
    with refused_by("--weights", ValueError), refused_by("--pretrained", TargetError), refused_by("--model", NoHead):
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


@contextmanager
def _unreadable_told() -> Iterator[None]:
    """An image whose pixels are broken ends the command with what helps: its header was found in order."""
    from ..training.samples import UnreadableSample

    try:
        yield
    except UnreadableSample as error:
        advice = "put a whole image in its place and go on by --resume, or take it out and begin anew"
        raise typer.BadParameter(f"{error}: {advice}", param_hint="DATA") from None


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
