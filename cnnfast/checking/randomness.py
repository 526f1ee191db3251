"""The same random numbers in every run of a model, whatever its dtype and device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..aside import leaving_no_trace

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
FILLS = (Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_)
DRAWS = (torch.rand, torch.randn)
DRAWS_LIKE = (torch.rand_like, torch.randn_like, torch.bernoulli)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeds PyTorch, Python and NumPy, and sets all of them back afterwards. Dropout and the like draw the same numbers
    in every dtype: see `_DrawsAlike`.
    """
    with leaving_no_trace(), _DrawsAlike():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield


class _DrawsAlike(TorchFunctionMode):
    """Draws all floating numbers in float32 on the CPU: generators give other numbers in float64, and on a GPU so does
    dropout.
    """

    sees_no_layer = True  # functional/pooled.py asks: what is one operator in training is judged as one

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return _dropout(func, *args, **kwargs)
        if func in FILLS and args[0].is_floating_point() and not kwargs.get("generator"):
            return args[0].copy_(func(torch.empty(args[0].shape), *args[1:], **kwargs))
        if func in (*DRAWS, *DRAWS_LIKE) and not kwargs.keys() - {"dtype", "device", "size", "p"}:
            return _draw(func, args, dict(kwargs))
        return func(*args, **kwargs)


def _dropout(func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return func(input, p, training, inplace)
    kept = func(torch.ones(input.shape), p).to(input)  # 0 or 1 / (1 - p)
    return input.mul_(kept) if inplace else input * kept


def _draw(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    dtype, device = options.pop("dtype", None), options.pop("device", None)
    if func in DRAWS_LIKE:
        drawn = func(args[0].detach().float().cpu(), *args[1:], **options)
        return drawn.to(device or args[0].device, dtype or args[0].dtype)
    drawn = func(*args, dtype=torch.float32, device="cpu", **options)
    return drawn.to(device or torch.get_default_device(), dtype or torch.get_default_dtype())
