"""Whether a model fits the data, before training begins: one forward in training on a copy of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..aside import does_not_run, on_a_copy


def takes_channels_last(model: nn.Module, channels: int, size: tuple[int, int], classes: int) -> bool:
    """Whether the model takes images whose channels are adjacent in memory, as augmentation makes them and kernels read
    them; one with a `view` of what its convolutions return does not.

    Raises ValueError if it does not run on images of that size in any layout, or does not return logits [N, classes].
    """
    x = torch.zeros(2, channels, *size)
    last = x.contiguous(memory_format=torch.channels_last)
    try:
        result, taken = on_a_copy(_forward, model, (last,)), True
    except Exception:
        try:
            result, taken = on_a_copy(_forward, model, (x,)), False
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
