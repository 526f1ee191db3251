"""Whether a run begins, goes on, or is over already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .keeping import Keeper
from .runs import CHECKPOINT, Epoch, difference, read_config
from .saving import read_checkpoint


@dataclass(frozen=True)
class Beginning:
    """What a folder holds of a run: the epochs that are done, where to go on from, and whether none is left."""

    history: tuple[Epoch, ...] = ()
    checkpoint: Path | None = None
    finished: bool = False


def begin(folder: Path | None, config: Mapping[str, Any], resume: bool) -> Beginning:
    """Raises ValueError if the folder holds a run, and it shall not go on, or began with other options: an epoch's
    learning rates follow from how many there are, so not even their number may change.
    """
    if folder is None:
        if resume:
            raise ValueError("resume needs out, the folder of the run that is to go on")
        return Beginning()
    file = folder / CHECKPOINT
    if not file.exists():
        return Beginning()
    if not resume:
        raise ValueError(f"{folder} holds a run already: resume it, or write another folder")
    changed = difference(config, read_config(folder))
    if changed:
        raise ValueError(f"the run in {folder} began with other options, and can go on with its own only: {changed}")
    kept = read_checkpoint(file).get("callbacks", {}).get(Keeper.__qualname__)
    if kept is None:
        raise ValueError(f"{file} was not written by fit: it tells nothing of the epochs that are done")
    return Beginning(tuple(Epoch(*line) for line in kept["history"]), file, kept["finished"])
