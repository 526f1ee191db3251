"""Memory in which a missing write, and a read beyond an edge, shows in the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch

# Conspicuous, and no index into anything small.
GARBAGE = {torch.uint8: 255, torch.bool: True}


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fills `t` with NaN (floating and complex) or garbage (integers: -1, uint8: 255), in place. Meta and fake tensors
    stay as they are.
    """
    if t.is_meta or type(t) is not torch.Tensor:
        return t
    return t.fill_(float("nan") if t.is_floating_point() or t.is_complex() else GARBAGE.get(t.dtype, -1))


def embed(t: torch.Tensor, before: Sequence[int] | int = 1, after: Sequence[int] | int = 1) -> torch.Tensor:
    """A copy of `t` cut out of a larger, poisoned tensor of the same memory format: `before` and `after` elements on
    each axis.

    Strides are those of a slice; a read around the copy, or a write, is out of bounds or meets NaN.
    """
    before = [before] * t.dim() if isinstance(before, int) else before
    after = [after] * t.dim() if isinstance(after, int) else after
    sizes = [b + size + a for b, size, a in zip(before, t.shape, after, strict=True)]
    channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    whole = poison(torch.empty(sizes, dtype=t.dtype, device=t.device, memory_format=fmt))
    view = whole[tuple(slice(b, b + size) for b, size in zip(before, t.shape, strict=True))]
    with torch.no_grad():
        view.copy_(t)
    return view


@contextmanager
def poisoned_workspaces() -> Iterator[None]:
    """What memory.empty hands out meanwhile is full of NaN, or of a conspicuous integer: an element never written
    shows.
    """
    from cnnfast_kernels import memory

    allocate = memory.empty
    with mock.patch.object(memory, "empty", lambda *args, **kwargs: poison(allocate(*args, **kwargs))):
        yield
