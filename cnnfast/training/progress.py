"""What a training tells meanwhile, on standard error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .beginning import Beginning
from .runs import Epoch


class TrainingProgress(Callback):
    """A line for each epoch, and on a terminal two bars: batches of the epoch, and of all, with the time left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bars: Progress | None = None
        self._all = self._epoch = TaskID(0)

    def begins(self, beginning: Beginning, epochs: int, folder: Path) -> None:
        """Where a run that is to go on stands."""
        done = f"{len(beginning.history)} of {epochs} epochs"
        if beginning.finished:
            self._say(f"the run in {folder} is over, after {done}")
        elif beginning.checkpoint:
            self._say(f"the run in {folder} goes on, after {done}")
        else:
            self._say(f"nothing is saved in {folder}: the run begins")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        self._bars = Progress(*columns, *left, console=self.console, disable=not self.console.is_terminal)
        batches, done = trainer.num_training_batches, trainer.current_epoch * trainer.num_training_batches
        self._epoch = self._bars.add_task("epoch", total=batches)
        self._all = self._bars.add_task("all", total=batches * trainer.max_epochs, completed=done)
        self._bars.start()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._bars:
            text = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
            self._bars.reset(self._epoch, description=text)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bars:
            self._bars.advance(self._epoch)
            self._bars.advance(self._all)

    def tell(self, epoch: Epoch, epochs: int) -> None:
        """An epoch is over, and saved."""
        if self._bars:
            held_out = ""
            if epoch.validation_accuracy is not None:
                held_out = f", held out: {epoch.validation_loss:.4f}, {epoch.validation_accuracy:.2%} right"
            trained = f"loss {epoch.loss:.4f}, {epoch.accuracy:.2%} right"
            text = f"epoch {epoch.epoch} of {epochs}: {trained}{held_out}, {epoch.seconds:.1f} s"
            self._say(text)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
