"""The model that was frozen, as long as something may still be asked of it: its results, and its other image sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..aside import leaving_no_trace
from ..dispatch import CPU_REASON, backend, in_this_thread
from . import judging
from .capturing.capture import CannotCapture, CapturedNetwork, capture, capture_within
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

    def captured(self) -> CapturedNetwork:
        """With any batch size, and the image sizes of the example. Raises CannotCapture."""
        with leaving_no_trace(), backend("torch"):
            return capture(self.model, self.inputs, sizes=False)

    def captured_with_any_size(self) -> CapturedNetwork:
        """With any batch size and any image size. Raises CannotCapture, also after SECONDS. This may be in the midst of
        a server's work: nothing is held meanwhile that other threads would notice, but where kernels are interpreted,
        which would else be captured.
        """
        with nullcontext() if CPU_REASON else backend("torch"):
            captured = capture_within(self.model, self.inputs, SECONDS)
        if isinstance(captured, str):
            raise CannotCapture(captured)
        return captured

    def run(self) -> Any:
        """The model's own result on the example."""
        with leaving_no_trace(), in_this_thread("torch"), torch.no_grad():
            return self.model(*self.inputs)

    def check(
        self, run: Callable[..., Sequence[Tensor]], result: Structure, inputs: tuple[Any, ...] | None = None
    ) -> SelfCheck:
        """How far the results of `run` are from the model's, on the example or on other inputs."""
        inputs = self.inputs if inputs is None else inputs
        right = judging.reference(self.model, inputs)
        return judging.judge(
            run(*inputs), right, result, self.dtype, lambda: judging.computed(self.model, inputs, self.dtype)
        )
