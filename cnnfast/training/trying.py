"""Whether a model fits the data, before training begins: one forward in training on a copy of it, with real
tensors, since on meta tensors a convolution's result has another layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..aside import does_not_run, real_copy, run_aside


def takes_channels_last(model: nn.Module, channels: int, size: tuple[int, int], classes: int) -> bool:
    """Whether the model takes images whose channels are adjacent in memory, as augmentation makes them and kernels read
    them; one with a `view` of what its convolutions return does not.

    Raises ValueError if it does not run on images of that size in any layout, or does not return logits [N, classes].
    """
    device = next((p.device for p in model.parameters()), None)
    x = torch.zeros(2, channels, *size, device=device)
    # Not by contiguous(), which changes nothing where there is a single channel.
    last = torch.zeros(2, *size, channels, device=device).permute(0, 3, 1, 2)
    try:
        result, taken = run_aside(_forward, real_copy(model), (last,)), True
    except Exception:
        try:
            result, taken = run_aside(_forward, real_copy(model), (x,)), False
        except Exception as error:
            raise ValueError(str(does_not_run(model, (x,), error))) from error
    name = type(model).__name__
    if not isinstance(result, Tensor) or result.dim() != 2:
        what = f"a tensor {[*result.shape]}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{name} returns {what} in training, where logits [N, {classes}] are wanted")
    if result.shape[1] != classes:
        wanted = f"{classes} classes: give it a last layer of {classes}"
        raise ValueError(f"{name} tells {result.shape[1]} classes apart, and the data has {wanted}")
    return taken


def _forward(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return model.train()(*inputs)
