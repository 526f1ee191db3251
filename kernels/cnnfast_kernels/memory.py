"""Where outputs and workspaces are allocated, so that tests can fill them with NaN first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .layout import Layout


def empty(
    shape: Sequence[int] | Layout,
    like: torch.Tensor,
    fmt: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Every output and workspace of this package is allocated here, so that tests can fill them with NaN first.

    A layout says it all, and takes half as long.
    """
    if isinstance(shape, Layout):
        extents, strides, dtype = shape
        return like.new_empty_strided(extents, strides, dtype=dtype)
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=fmt)


@contextmanager
def poisoned() -> Iterator[None]:
    """What `empty` returns is full of NaN while the context lasts, for the whole process: an element that no kernel
    writes shows, where memory of a former call might have held the right number.
    """
    global empty
    allocate = empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = allocate(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    empty = filled
    try:
        yield
    finally:
        empty = allocate
