"""memory.py: where outputs and workspaces are allocated."""

from __future__ import annotations

import pytest
import torch

from cnnfast_kernels import memory
from cnnfast_kernels.layout import dense


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_what_is_asked_for_in_either_way(fmt, device):
    like = torch.zeros(1, device=device, dtype=torch.float16)
    by_shape, by_layout = (
        memory.empty(shape, like, fmt) for shape in ((2, 3, 4, 5), dense((2, 3, 4, 5), torch.float16, fmt))
    )
    for t in (by_shape, by_layout):
        assert t.shape == (2, 3, 4, 5)
        assert t.dtype == torch.float16
        assert t.device == like.device
        assert t.is_contiguous(memory_format=fmt)


def zeros(shape, like, dtype=None):
    """Stands in for memory.empty, which the tests' own fixture has filled with NaN already."""
    return torch.zeros(shape, dtype=dtype or like.dtype, device=like.device)


def test_poisoned_memory_is_nan_while_the_context_lasts(device, monkeypatch):
    like = torch.zeros(1, device=device)
    monkeypatch.setattr(memory, "empty", zeros)
    with memory.poisoned():
        assert memory.empty((2, 3), like).isnan().all()
        assert memory.empty((2, 3), like, dtype=torch.int32).eq(0).all()
    assert memory.empty is zeros
