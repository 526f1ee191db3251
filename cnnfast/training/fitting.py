"""`fit`: a network is trained on images, and what it has learnt is kept in a folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import inf
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

import cnnfast

from ..conversion import convert
from ..spelling import did_you_mean
from .alone import alone_in
from .averaging import MovingAverage
from .batches import loader
from .beginning import Beginning, begin
from .epochs import EpochSeeds, random_numbers_kept
from .finishing import FROZEN, finish
from .interrupts import Interrupted, InterruptWatch
from .keeping import Keeper
from .module import Module
from .optimizing import LEARNING_RATES, OPTIMIZERS
from .preparing import Data, Selection, TrainingData, named, prepare, weights_of_classes
from .progress import TrainingProgress
from .ranks import end_launched, is_first
from .runs import Run, load_best, write_config
from .schedule import SCHEDULES
from .trainers import few_threads, make_trainer, quiet, settings_kept
from .trying import takes_channels_last
from .unreadable import refuse_unreadable

# Which options the result depends on: a run goes on with the same ones only.
OPTIONS = (
    "epochs", "batch", "lr", "optimizer", "weight_decay", "schedule", "label_smoothing", "class_weights", "frozen",
    "ema", "patience", "clip", "mixed", "validation", "seed", "sync_batch_norm", "deterministic",
)  # fmt: skip


def fit(
    model: nn.Module,
    data: Data,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    validation: float | Data = 0.2,
    size: int | tuple[int, int] | None = None,
    augment: Mapping[str, Any] | None = None,
    epochs: int = 40,
    batch: int = 64,
    lr: float | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    schedule: str = "one-cycle",
    label_smoothing: float = 0.1,
    class_weights: Sequence[float] | str | None = None,
    frozen: Sequence[str] = (),
    ema: float | None = 0.998,
    patience: int | None = None,
    clip: float | None = None,
    mixed: str | None = None,
    seed: int = 0,
    sync_batch_norm: bool = False,
    deterministic: bool = False,
    devices: int | None = None,
    nodes: int = 1,
    workers: int = 0,
    module: type[Module] = Module,
    name: str | None = None,
    progress: bool = True,
) -> Run:
    """Trains `model`, a network that makes logits [N, K] of images, and returns a Run, with the weights that validated
    best. The model is converted (cnnfast.convert) and trained in place.

    data: a folder with a folder of images for each class, a CSV with columns file and label, "digits", or an ImageSet.
    validation: the share of each class that is held out, or other data of the same classes. size, augment:
    cnn.Augment's size and options. optimizer, lr, weight_decay, schedule, label_smoothing, frozen: Module's.
    class_weights: a number for each class, or "balanced". ema: the decay of the moving average of the weights, which is
    what is validated and kept; None: the weights themselves. patience: training ends when the accuracy has not risen
    for so many epochs. lr: None: 4e-3, or for sgd 0.1, which suit random weights; published ones want a tenth. clip:
    the largest norm of a gradient. mixed: "bf16" or "fp16".

    out: the run's folder (Run says what is in it). resume: go on with the run in `out` after the last epoch that it has
    saved, if there is one, with the same options: it ends with the same weights, to the bit, as one that was never
    stopped, on the same machine with as many threads and processes. A run that is over is returned as it is.

    seed: all random numbers follow from it, but for the model's own weights. devices: GPUs, or processes on a CPU, of
    each of `nodes` machines; under torchrun all that it started. sync_batch_norm: batch norms see the whole batch of
    all processes. batch: images of one process. deterministic: PyTorch's deterministic algorithms. workers: processes
    that read images ahead. module: a subclass of Module to train with. name: what the config calls the model. progress:
    tell of it on standard error.

    Raises ValueError for data and options that do not fit, where another process trains in `out`, and, before it
    begins, for images whose headers tell that they cannot be read; Diverged when a loss is NaN or infinite, Interrupted
    after Ctrl-C or SIGTERM, OSError where the state cannot be saved: each leaves the state of the last whole epoch in
    `out`.
    """
    given = dict(locals())
    _refuse(given)
    lr = given["lr"] = LEARNING_RATES[optimizer] if lr is None else lr
    prepared = prepare(data, validation, size, augment, seed)
    images, classes = prepared.training.images, prepared.classes
    channels_last = takes_channels_last(model, images.channels, prepared.augment.size, len(classes))
    if sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = convert(model, inplace=True, memory_format=torch.channels_last if channels_last else None)
    trained = module(
        model,
        classes=classes,
        augment=prepared.augment,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule,
        label_smoothing=label_smoothing,
        class_weights=weights_of_classes(class_weights, prepared.labels, classes),
        frozen=frozen,
        channels_last=channels_last,
    )
    trained.watch.name_of = images.name
    folder = None if out is None else Path(out)
    shown = TrainingProgress(progress and is_first())
    average = None if ema is None else MovingAverage(ema)
    keeper = Keeper(folder, average, shown.tell)
    stopping = EarlyStopping("validation_accuracy", mode="max", patience=patience) if patience else None
    callbacks = [EpochSeeds(seed), *filter(None, (average, stopping)), shown, keeper]
    with quiet(), settings_kept(), random_numbers_kept(), few_threads(prepared.augment.size):
        trainer = make_trainer(
            epochs=epochs,
            mixed=mixed,
            devices=devices,
            nodes=nodes,
            clip=clip,
            deterministic=deterministic,
            callbacks=callbacks,
        )
        config = _config(given, prepared, trainer)
        beginning = begin(folder, config, resume)
        # The frozen network is the last file that finishing writes.
        over = beginning.finished and (folder is None or (folder / FROZEN).exists())
        own = folder if trainer.is_global_zero and not over else None  # what this process writes into
        with alone_in(own) if own else nullcontext():
            if own:
                beginning = begin(own, config, resume)  # another training may just have ended
            keeper.history = [*beginning.history]
            if folder and resume:
                shown.begins(beginning, epochs, folder)
            if not beginning.finished:
                with shown.bar("looking at images") as step:
                    for part in filter(None, (prepared.training, prepared.held_out)):
                        refuse_unreadable(part.images, part.indices, workers, step)
                if own and beginning.checkpoint is None:
                    write_config(own, config)
                loaders = [_loader(part, given, trainer) for part in (prepared.training, prepared.held_out) if part]
                # lightning asks the sampler for a first batch before it tells the epoch.
                loaders[0].batch_sampler.set_epoch(len(beginning.history))
                _train(trainer, trained, loaders, beginning, keeper)
            if folder is None:
                model.load_state_dict(keeper.best_weights)
            else:
                load_best(model, folder)
            run = Run(model.eval(), classes, tuple(keeper.history), folder)
            if folder is not None and not over:
                with shown.bar("evaluating") as step:
                    finish(run, prepared, batch=batch, workers=workers, step=step)
    return run


def _train(trainer: Any, module: Module, loaders: list[Any], beginning: Beginning, keeper: Keeper) -> None:
    """Raises Interrupted where somebody has ended the training."""
    watch = InterruptWatch()
    trainer.callbacks.insert(0, watch)
    try:
        trainer.fit(module, *loaders, ckpt_path=beginning.checkpoint)
    except BaseException as error:
        end_launched(trainer, error)
        if watch.number is None:
            raise
        done = len(keeper.history)
        kept = "nothing is saved" if keeper.folder is None or not done else f"{keeper.folder} keeps the epochs before"
        text = f"training was ended in epoch {done + 1} of {trainer.max_epochs}; {kept}"
        raise Interrupted(text, watch.number) from error


def _loader(part: Selection, given: Mapping[str, Any], trainer: Trainer) -> Any:
    training = part.images.evaluation is None
    pin = trainer.strategy.root_device.type == "cuda"
    options = {"batch": given["batch"], "seed": given["seed"], "workers": given["workers"], "pin": pin}
    return loader(part.images, part.indices, shuffle=training, **options)


def _config(given: Mapping[str, Any], prepared: TrainingData, trainer: Trainer) -> dict[str, Any]:
    options = {name: given[name] for name in OPTIONS}
    options |= {"validation": named(given["validation"]), "processes": trainer.world_size}
    versions = {"cnnfast": cnnfast.__version__, "torch": torch.__version__, "lightning": lightning.__version__}
    machine = {"python": platform.python_version(), "threads": torch.get_num_threads(), "workers": given["workers"]}
    model = given["name"] or type(given["model"]).__name__
    config = {"options": {"model": model, **options}, "data": prepared.config()}
    # As JSON has it: tuples become lists, and what is no JSON its text.
    return json.loads(json.dumps({**config, "versions": versions, "machine": machine}, default=str))


def _refuse(given: Mapping[str, Any]) -> None:
    """What nothing else would refuse, or not in words of these options."""
    for name, least in (("epochs", 1), ("batch", 1), ("nodes", 1), ("workers", 0), ("patience", 1), ("devices", 1)):
        value = given[name]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} is {value!r}, and must be a whole number of {least} or more")
    for name, most in (("lr", inf), ("clip", inf), ("weight_decay", inf), ("label_smoothing", 1.0), ("ema", 1.0)):
        value, positive = given[name], name in ("lr", "clip")
        if value is not None and not (0 <= value < most and (value or not positive)):
            bounds = "above 0" if positive else "0 or more" if most == inf else f"0 or more, and below {most:g}"
            raise ValueError(f"{name} is {value!r}, and must be {bounds}")
    for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if given[name] not in known:
            raise ValueError(f"{name} {given[name]!r} is none of {', '.join(known)}{did_you_mean(given[name], known)}")
    if given["patience"] is not None and given["validation"] == 0:
        raise ValueError("patience needs images that are held out: validation is 0")
