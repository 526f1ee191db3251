"""What a training tells meanwhile, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

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

BAR = 24  # columns: what stands beside it has room on a line of 80, and so has the ^C that a terminal writes
RECENT = 300.0  # seconds, of which the time left is estimated


class AsFarAs(Protocol):
    """Tells how far a piece of work is: `done` of `total`, or None; and, if it is not empty, what comes next."""

    def __call__(self, done: int, total: int | None, text: str = "") -> None: ...


class TrainingProgress(Callback):
    """A line for each epoch, and on a terminal two bars meanwhile: batches of the epoch, and of all, those of the
    validation too, with the time left. Nothing if it is not wanted.
    """

    def __init__(self, wanted: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.wanted = wanted
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

    @contextmanager
    def bar(self, text: str) -> Iterator[AsFarAs]:
        """A bar for what comes before or after the epochs, while the context lasts."""
        with self._made() as bars:
            task = bars.add_task(text, total=None)

            def step(done: int, total: int | None, text: str = "") -> None:
                nonlocal task
                if total is None:  # which rich takes for no change
                    bars.remove_task(task)
                    task = bars.add_task(text, total=None)
                bars.update(task, completed=done, total=total, description=text or None)

            yield step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        batches = trainer.num_training_batches + sum(trainer.num_val_batches)
        self._bars = self._made()
        self._epoch = self._bars.add_task("epoch", total=batches)
        done = batches * trainer.current_epoch
        self._all = self._bars.add_task("all epochs", total=batches * trainer.max_epochs, completed=done)
        self._bars.start()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._bars:
            text = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
            self._bars.reset(self._epoch, description=text)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._advance()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._advance()

    def tell(self, epoch: Epoch, epochs: int) -> None:
        """An epoch is over, and saved."""
        held_out = ""
        if epoch.validation_accuracy is not None:
            held_out = f", held out: {epoch.validation_loss:.4f}, {epoch.validation_accuracy:.2%} right"
        trained = f"loss {epoch.loss:.4f}, {epoch.accuracy:.2%} right"
        self._say(f"epoch {epoch.epoch} of {epochs}: {trained}{held_out}, {epoch.seconds:.1f} s")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _made(self) -> Progress:
        """Bars that leave nothing on the screen."""
        return Progress(
            *(TextColumn("{task.description}"), BarColumn(BAR), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("left"), TimeRemainingColumn()),
            console=self.console,
            transient=True,
            speed_estimate_period=RECENT,
            disable=not (self.wanted and self.console.is_terminal),
        )

    def _advance(self) -> None:
        if self._bars:
            self._bars.advance(self._epoch)
            self._bars.advance(self._all)

    def _stop(self) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None

    def _say(self, text: str) -> None:
        if self.wanted:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
