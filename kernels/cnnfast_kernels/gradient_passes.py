"""What gradient_epilogue.py describes, by passes of their own: for dgrads whose kernels have no epilogue, which are
depthwise ones and those by im2col.

dz has been rounded once more than in an epilogue, and so has its sum with the residual.
"""

from __future__ import annotations

import torch

from . import memory
from .batchnorm import contiguous, masked_gradient, normalize, normalize_backward
from .batchnorm.sums import GradientSumsOperands, plan_sums, strides
from .epilogue import NO_NORM
from .gradient_epilogue import GradientEpilogue
from .moments import combine_slots
from .planes import mergeable


def apply_epilogue(dz: torch.Tensor, e: GradientEpilogue) -> torch.Tensor:
    """(dz + residual) * act'(u)."""
    if e.residual is not None:
        dz = normalize(dz, None, None, None, None, e.residual, 0.0, None, 0.0)
    if e.activation is None:
        return dz
    if e.words is not None:
        return masked_gradient(dz, e.words, e.activation, e.slope, sums=False)[0]
    y, z, norm = e.y, e.z, e.norm
    if z is not None:
        y, norm = None, NO_NORM
    needs = False, False, False, True
    g = normalize_backward(
        dz, y, z, norm.mean, norm.var, norm.gamma, norm.beta, None, norm.eps, e.activation, e.slope, False, needs
    )[3]
    assert g is not None
    return g


def sum_gradient(g: torch.Tensor, e: GradientEpilogue) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sums [C] of g, and of g * (y - mean) if the epilogue has y."""
    y, mean, one = e.y, e.norm.mean, None
    if y is not None:
        mean = y.new_zeros(y.shape[1]) if mean is None else mean
        one = torch.ones_like(mean)  # a variance by which nothing is divided
    g, y = mergeable(g), mergeable(y)
    mean, one = contiguous(mean, one)
    run, layout = plan_sums(g.shape, strides(g, y, None, None), g.dtype, 0.0, None, 0.0, 1 if y is None else 2)
    slots = memory.empty(layout, g)
    run(GradientSumsOperands(g, y, None, None, mean, one, None, None, slots))
    return combine_slots(slots)
