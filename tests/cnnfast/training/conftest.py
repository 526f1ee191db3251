"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import cnnfast


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    """PyTorch computes: the loop is tested here, and an interpreted kernel takes a hundred times as long."""
    with cnnfast.backend("torch"):
        yield
