"""At the end of each epoch: whether the state is good, which epoch was the best, and what is saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from .averaging import MovingAverage
from .losses import Diverged
from .runs import BEST, CHECKPOINT, LAST, Epoch, best_of, write_metrics
from .saving import write_weights


class Keeper(Checkpoint):
    """Keeps the history, the best weights and lightning's checkpoint, in a folder or, without one, in memory.

    last.ckpt is written last, and all that resuming needs is in it, the history too: a run that was killed between two
    files trains its epoch again, and writes the same. Being lightning's Checkpoint, this comes after all other
    callbacks. Raises Diverged, and saves nothing, if the state is no good; OSError if it cannot be written.
    """

    def __init__(
        self, folder: Path | None, average: MovingAverage | None, tell: Callable[[Epoch, int], None] | None = None
    ) -> None:
        self.folder, self.average, self.tell = folder, average, tell
        self.history: list[Epoch] = []
        self.finished = False
        self.best_weights: dict[str, Tensor] = {}  # only where there is no folder
        self._began = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch = self._line(trainer)
        self._refuse_bad_state(pl_module, epoch)
        self._refuse_no_steps(trainer)
        self.history.append(epoch)
        self.finished = trainer.should_stop or len(self.history) == trainer.max_epochs
        is_best = best_of(self.history) is epoch
        evaluated: Any = self.average.averaged if self.average else pl_module
        weights = evaluated.model.state_dict()
        if self.folder is not None:
            try:
                self._save(self.folder, trainer, weights, is_best)
            except OSError as error:
                raise self._not_saved(error) from error
        elif is_best:
            self.best_weights = {name: t.detach().cpu().clone() for name, t in weights.items()}
        if self.tell is not None:
            self.tell(epoch, trainer.max_epochs)

    def state_dict(self) -> dict[str, Any]:
        return {"history": [tuple(epoch) for epoch in self.history], "finished": self.finished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [Epoch(*line) for line in state_dict["history"]]
        self.finished = state_dict["finished"]

    def _save(self, folder: Path, trainer: Any, weights: dict[str, Tensor], is_best: bool) -> None:
        if trainer.is_global_zero:
            if is_best:
                write_weights(folder / BEST, weights)
            write_weights(folder / LAST, weights)
            write_metrics(folder, self.history)
        trainer.save_checkpoint(folder / CHECKPOINT, weights_only=False)

    def _line(self, trainer: Any) -> Epoch:
        seen = {name: value.item() for name, value in trainer.callback_metrics.items()}
        return Epoch(
            epoch=trainer.current_epoch + 1,
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            loss=seen["loss"],
            accuracy=seen["accuracy"],
            validation_loss=seen.get("validation_loss"),
            validation_accuracy=seen.get("validation_accuracy"),
            seconds=round(time.perf_counter() - self._began, 3),
        )

    def _refuse_bad_state(self, module: nn.Module, epoch: Epoch) -> None:
        """The loss of the last batch was finite, but the step after it may have spoilt the weights."""
        bad = [name for name, p in module.named_parameters() if not p.isfinite().all()]
        if bad:
            raise Diverged(
                f"after epoch {epoch.epoch} {bad[0].removeprefix('model.')} has NaN or infinity in it, the loss "
                f"being {epoch.loss:g}: take a smaller learning rate, or clip gradients{self._last_good()}"
            )

    def _refuse_no_steps(self, trainer: Any) -> None:
        """With fp16 a step whose gradients are not finite is left out, and the scale of the loss is halved: at the
        beginning some are. If they overflow without any scale too, nothing is learnt any more.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() < 1:
            raise Diverged(
                f"in epoch {trainer.current_epoch + 1} gradients were not finite, though the loss was scaled by "
                f"{scaler.get_scale():g}, and steps were left out: take bf16, or a smaller learning rate"
                f"{self._last_good()}"
            )

    def _not_saved(self, error: OSError) -> OSError:
        what = f"epoch {self.history[-1].epoch} could not be saved: {error.strerror or error}"
        del self.history[-1]
        return OSError(error.errno, what + self._last_good(), str(self.folder))

    def _last_good(self) -> str:
        kept = f"what epoch {self.history[-1].epoch} left is kept" if self.history else "no epoch was saved before"
        return f"; {kept}"
