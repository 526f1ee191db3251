"""The exponential moving average of the weights, which is what is evaluated and kept as best."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(WeightAveraging):
    """lightning's EMAWeightAveraging, but for two things. The average of few steps follows the weights more closely, as
    in TensorFlow's ExponentialMovingAverage: after n steps it keeps min(decay, (1 + n) / (10 + n)) of itself, so that
    it has forgotten the first, random weights early in a short training. And integers, the counters of batch norms, are
    copied: they would be rounded down to what they were each time.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self._steps = 0

    @property
    def averaged(self) -> nn.Module:
        """The module with averaged weights, in training; of a process that trains."""
        assert isinstance(self._average_model, AveragedModel)
        return self._average_model.module

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._steps = trainer.global_step  # on the host, where the average's own counter is on the device
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @torch.no_grad()
    def _average(self, averages: list[Tensor], current: list[Tensor], count: Any) -> None:
        kept = min(self.decay, (1 + self._steps) / (10 + self._steps))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, current, 1 - kept)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_copy_(averages, current)  # pyright: ignore[reportPrivateImportUsage]
