"""The model that was frozen, as long as something may still be asked of it: its results, and its other image sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..aside import leaving_no_trace
from . import judging
from .capture import Captured, capture, capture_within
from .judging import SelfCheck
from .structures import Structure

SECONDS = 60.0  # that a capture with free image sizes may take


@dataclass(frozen=True)
class Original:
    """model: a private copy in eval mode. inputs: the example. dtype: that it is frozen in."""

    model: nn.Module
    inputs: tuple[Any, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def captured(self, *, sizes: bool) -> Captured:
        """With any batch size and, if `sizes`, any image size, for which at most SECONDS are taken. Raises
        CannotCapture.
        """
        with leaving_no_trace():
            if sizes:
                return capture_within(self.model, self.inputs, seconds=SECONDS)
            return capture(self.model, self.inputs, sizes=False)

    def results(self) -> tuple[Tensor, ...]:
        """On the example, in the dtypes that it gives."""
        with leaving_no_trace(), torch.no_grad():
            return tuple(Structure.flatten(self.model(*self.inputs))[0])

    def check(
        self, run: Callable[..., Sequence[Tensor]], result: Structure, inputs: tuple[Any, ...] | None = None
    ) -> SelfCheck:
        """How far the results of `run` are from the model's, on the example or on other inputs."""
        inputs = self.inputs if inputs is None else inputs
        right = judging.reference(self.model, inputs)
        return judging.judge(
            run(*inputs), right, result, self.dtype, lambda: judging.computed(self.model, inputs, self.dtype)
        )
