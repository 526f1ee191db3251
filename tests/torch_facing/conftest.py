"""Fixtures of the tests of what faces PyTorch."""

from __future__ import annotations

import pytest
import torch

from blocks import Net, build, image
from cnnfast.functional import convolution, fused, normalization, pooling
from plain_operators import plain_operators


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """The device; every call there is served on the kernels' path, but computed by PyTorch's own operators."""
    pytest.importorskip("triton")
    plain = plain_operators()
    for functions in (convolution, fused, normalization, pooling):
        monkeypatch.setattr(functions, "ops", plain)
    return device


@pytest.fixture
def net(quick: torch.device) -> torch.nn.Module:
    """A small network, in eval, and for it:"""
    return build(Net, quick)


@pytest.fixture
def x(quick: torch.device) -> torch.Tensor:
    return image(3, 9).to(quick)
