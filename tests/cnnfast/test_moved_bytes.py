"""The bytes that a call moves: each tensor once, by its own elements."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cnnfast.moved_bytes import by_launch, by_operator


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = by_operator(func, args, kwargs or {}, result)
        self.bytes.append(moved and moved.bytes)
        return result


def seen(call, *operands):
    with Seen() as found:
        call(*operands)
    return found.bytes


@pytest.mark.parametrize(
    ("call", "right"),
    [
        (lambda x: x + 1, [2 * 96]),
        (lambda x: torch.add(x, x), [2 * 96]),  # which is one tensor
        (lambda x: torch.add(x, x.t().contiguous().t()), [None, 2 * 96, None, 3 * 96]),
        (lambda x: x[:, :3] * 2, [None, 2 * 48]),  # a view has its own elements
        (lambda x: torch.add(x, x[:1].expand(4, 6)), [None, None, 2 * 96 + 24]),  # and an expanded one those in memory
        (lambda x: x.clone().add_(x), [2 * 96, 3 * 96]),
        (lambda x: torch.empty_like(x).copy_(x), [None, 2 * 96]),
        (lambda x: torch.empty_like(x).zero_(), [None, 96]),
        (lambda x: torch.sum(x, 0, out=torch.empty(6)), [None, 96 + 24]),
        (lambda x: torch.ops.aten._foreach_add_.Scalar([x.clone()], 1.0), [2 * 96, 2 * 96]),  # which returns nothing
        (lambda x: x.view(-1)[2:].reshape(2, 11), [None] * 3),
    ],
)  # fmt: skip
def test_an_operator_moves_what_it_reads_and_what_it_writes(call, right):
    assert seen(call, torch.zeros(4, 6)) == right  # 96 bytes


def test_a_norm_writes_its_running_statistics():
    x, of_channels = torch.zeros(2, 3, 4, 4), [torch.ones(3) for _ in range(4)]
    found = seen(lambda: torch.ops.aten._native_batch_norm_legit(x, *of_channels, True, 0.1, 1e-5))
    assert found == [2 * x.nbytes + (4 + 2 + 2) * 12]  # read are 4, written 2 and the batch's own


def test_a_launch_moves_each_of_its_tensors_once():
    """Whether it is a pointer or in a tensor map, and however often it is an argument."""
    x, part = torch.zeros(4, 6), torch.zeros(8, 6)
    mapped = SimpleNamespace(base=x)
    assert by_launch([x]) == by_launch([x, 3, None, x]) == by_launch([mapped]) == by_launch([mapped, x]) == 96
    assert by_launch([x, part[:3], part[3:6], 2.0]) == 96 + 2 * 3 * 24
