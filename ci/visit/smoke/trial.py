"""A call of kernels whose numbers are known: what it is made of.

Operands are small integers, so that every sum is exact in any order and every result fits the dtype: ours must equal
PyTorch's float64 to the bit. Where a mean is taken that is not of a power of two, the trial says how far off it may be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
LAST, NCHW = torch.channels_last, torch.contiguous_format
HALF, SINGLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class SmokeTrial:
    """One call: `ours` of the operands on the GPU, `exact` of the same in float64 on the CPU. Results may differ by
    `tolerance`, relative to the largest of them.
    """

    name: str
    operands: Callable[[torch.device], Tensors]
    ours: Callable[..., Tensors]
    exact: Callable[..., Tensors]
    tolerance: float = 0.0


def integers(
    shape: tuple[int, ...], most: int, device: torch.device, dtype: torch.dtype, fmt: torch.memory_format = NCHW
) -> Tensor:
    """Integers from -most to most, the same for a shape in every run."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device, memory_format=fmt)
    numbers = torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return numbers.to(device, dtype).contiguous(memory_format=fmt)
