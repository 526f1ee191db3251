"""Fixtures of the tests of what faces PyTorch."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from cnnfast.functional import blocks, convolution, fused, normalization, pooled, pooling
from tests.support.blocks import Net, build, image
from tests.support.plain_operators import plain_operators


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """The device; every call there is served on the kernels' path, but computed by PyTorch's own operators."""
    pytest.importorskip("triton")
    plain = plain_operators()
    for functions in (blocks, convolution, fused, normalization, pooled, pooling):
        monkeypatch.setattr(functions, "ops", plain)
    return device


@pytest.fixture
def net(quick: torch.device) -> torch.nn.Module:
    """A small network, in eval, and for it:"""
    return build(Net, quick)


@pytest.fixture
def x(quick: torch.device) -> torch.Tensor:
    return image(3, 9).to(quick)


@pytest.fixture
def quick_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too tune takes few sets of operands, and starts no processes that compile."""
    pytest.importorskip("triton")
    from cnnfast.tuning import ahead, racing
    from cnnfast.workers import Warming

    monkeypatch.setattr(racing, "copies_for", lambda size, device: racing.FEWEST_SETS)
    monkeypatch.setattr(ahead, "_beside_measuring", lambda gpu: nullcontext(lambda lines, progress=None: Warming()))
