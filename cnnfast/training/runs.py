"""The folder of a run, and what a training has left."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import nn

from .saving import write

CONFIG, METRICS, BEST, LAST, CHECKPOINT = (
    "config.json",
    "metrics.csv",
    "best.safetensors",
    "last.safetensors",
    "last.ckpt",
)


class Epoch(NamedTuple):
    """A line of metrics.csv. `epoch` counts from 1; `lr` is the learning rate of its last batch; the validation's
    numbers are None without one; `seconds` are the epoch's own, validation included.
    """

    epoch: int
    lr: float
    loss: float
    accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float

    @property
    def worth(self) -> tuple[float, ...]:
        """What is compared: the accuracy of the validation, then its loss. Without one, the last epoch is the best."""
        if self.validation_accuracy is None or self.validation_loss is None:
            return (float(self.epoch),)
        return (self.validation_accuracy, -self.validation_loss)


def best_of(history: Sequence[Epoch]) -> Epoch:
    """The first of the best epochs."""
    return max(history, key=lambda epoch: epoch.worth)


@dataclass(frozen=True)
class Run:
    """What a training has left: the model, in eval, with the weights of the best epoch; the names of its classes; a
    line for each epoch; and the folder, if it has one.

    The folder: config.json (options, classes, versions), metrics.csv (the history), best.safetensors (the weights that
    validated best), last.safetensors (those that were validated last), last.ckpt (lightning's checkpoint, which
    resuming needs). Weights have the names of the original model's state_dict.
    """

    model: nn.Module
    classes: tuple[str, ...]
    history: tuple[Epoch, ...]
    folder: Path | None

    @property
    def best(self) -> Epoch:
        return best_of(self.history)

    @property
    def accuracy(self) -> float | None:
        """Of the best epoch in the validation."""
        return self.best.validation_accuracy

    @property
    def seconds(self) -> float:
        """All epochs together, whatever the number of starts."""
        return sum(epoch.seconds for epoch in self.history)

    def __str__(self) -> str:
        where = "" if self.folder is None else f", in {self.folder}"
        held_out = f"{self.accuracy:.2%} of held-out images right" if self.accuracy is not None else "nothing held out"
        return f"{held_out}, best in epoch {self.best.epoch} of {len(self.history)}, {self.seconds:.0f} s{where}"


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    write(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def read_config(folder: Path) -> dict[str, Any]:
    """Raises ValueError if the folder is no run's."""
    file = folder / CONFIG
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no folder of a run: there is no {CONFIG} in it") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def write_metrics(folder: Path, history: Sequence[Epoch]) -> None:
    """All lines anew, so that an epoch that is trained again does not have two."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(Epoch._fields)
    lines.writerows(history)
    write(folder / METRICS, text.getvalue().encode())


def load_best(model: nn.Module, folder: Path) -> None:
    model.load_state_dict(load_file(folder / BEST))


def difference(now: Mapping[str, Any], before: Mapping[str, Any]) -> str | None:
    """What differs in two configs' options and data, as one clause; None if nothing does."""
    pairs = [
        (name, old.get(name), new.get(name))
        for part in ("options", "data")
        for old, new in [(before.get(part, {}), now.get(part, {}))]
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]
    return ", ".join(f"{name} was {_short(old)} and is {_short(new)} now" for name, old, new in pairs) or None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
