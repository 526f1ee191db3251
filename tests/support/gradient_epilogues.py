"""What a gradient's epilogue reads, of small integers, and the judge of what it makes, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnfast_kernels.epilogue import NO_NORM, BatchNorm
from cnnfast_kernels.gradient_epilogue import GradientEpilogue


def pack_words(z: Tensor, beyond: int = 1) -> Tensor:
    """[ceil(N * pixels / 32), C] int32 of z [N, C, *spatial]: bit i of a row says whether not z <= 0 of pixel i of its
    32. Bits of pixels that do not exist are `beyond`: readers must not mind them.
    """
    C = z.shape[1]
    passes = (~(z <= 0)).movedim(1, -1).reshape(-1, C)
    rows = -(-len(passes) // 32)
    bits = torch.full((rows * 32, C), beyond, dtype=torch.int64, device=z.device)
    bits[: len(passes)] = passes.long()
    words = (bits.view(rows, 32, C) << torch.arange(32, device=z.device)[None, :, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


class Judged(NamedTuple):
    """An epilogue, and of what it makes of dz, in float64: the gradient, and the sums of g and of g * xhat,
    xhat = (y - mean) / sqrt(var)."""

    epilogue: GradientEpilogue
    judge: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def drawn(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    arrange: Callable[[Tensor], Tensor],
    mask: str,
    *,
    residual: bool = True,
    also_y: bool = False,
    activation: str | None = "relu",
    slope: float = 0.0,
) -> Judged:
    """mask: "y", "z" or "words" tells the activation's derivative; also_y: for the sums alone, beside the others; ""
    and no activation: there is none. arrange: how the tensors shall lie.

    Standard deviations are powers of two, so that all is exact; a third of the arguments of the activation is 0.
    """
    generator = torch.Generator().manual_seed(1)
    C = shape[1]

    def integers(most: int, *size: int) -> Tensor:
        return torch.randint(-most, most + 1, size, generator=generator).to(device, dtype)

    y, added = integers(2, *shape), integers(3, *shape)
    mean, gamma, beta = (integers(1, C).float() for _ in range(3))
    var = 4.0 ** integers(1, C).float()
    norm = BatchNorm(mean, var, gamma, beta, 0.0)
    column: Any = [t.double()[:, None, None] for t in norm[:4]]
    xhat = (y.double() - column[0]) / column[1].sqrt()
    u = xhat * column[2] + column[3]
    z = torch.where(u > 0, u, u * slope) if activation == "leaky_relu" else torch.relu(u)
    if activation == "relu6":
        z = z.clamp(max=6)
    with_y = mask == "y" or also_y
    epilogue = GradientEpilogue(
        arrange(added) if residual else None,
        arrange(y) if with_y else None,
        arrange(z.to(dtype)) if mask == "z" else None,
        pack_words(z) if mask == "words" else None,
        norm if with_y else NO_NORM,
        activation,
        slope,
    )

    def judge(dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = dz + added.double() if residual else dz
        if activation is not None:
            passes = (u > 0) & (u < 6 if activation == "relu6" else True)
            g = torch.where(passes, g, g * slope if activation == "leaky_relu" else 0.0)
        return g, g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))

    return Judged(epilogue, judge)


def assert_sums(ours: Sequence[Tensor | None], exact: Sequence[Tensor]) -> None:
    """Bit equality, where NaN is NaN; None was not asked for."""
    assert ours[0] is not None
    for found, expected in zip(ours, exact, strict=True):
        if found is not None:
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=0, equal_nan=True)
