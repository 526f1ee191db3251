"""Processes that train, and kill themselves at a moment: as `kill -9` would, without a chance to tidy up.

    python -m tests.support.killed_run FOLDER

For each of MOMENTS a run begins in a folder of that name. Fails if one of them is not ended by SIGKILL.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from cnnfast.training import Module, saving
from tests.support.trainable import small_fit


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KilledInTraining(Module):
    """In the fourth batch of the second epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if (self.current_epoch, batch_idx) == (1, 3):
            die()
        return super().training_step(batch, batch_idx)


class KilledInValidation(Module):
    """In the second batch of the second epoch's validation, whose weights are then averages."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == (1, 1):
            die()
        super().validation_step(batch, batch_idx)


class KilledInSaving(Module):
    """When all files of the second epoch are written but the last one, of which there is half."""

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        whole = saving.write

        def write(file: Path, content: bytes) -> None:
            if self.current_epoch == 1 and file.name == "last.ckpt":
                file.with_name(file.name + saving.ASIDE).write_bytes(content[: len(content) // 2])
                die()
            whole(file, content)

        saving.write = write


MOMENTS = {"training": KilledInTraining, "validation": KilledInValidation, "saving": KilledInSaving}

if __name__ == "__main__":
    torch.set_num_threads(1)
    # What is imported by now need not be imported by each.
    processes = multiprocessing.get_context("fork")
    for name, module in MOMENTS.items():
        options = {"out": Path(sys.argv[1]) / name, "module": module, "patience": 9, "batch": 8}
        child = processes.Process(target=small_fit, kwargs=options)
        child.start()
        child.join()
        if child.exitcode != -signal.SIGKILL:
            sys.exit(f"the run that was to be killed in {name} ended with {child.exitcode}")
