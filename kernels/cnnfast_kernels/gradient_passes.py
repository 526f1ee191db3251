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
    """The sums [C] of g, and of g * xhat, or of g * y without a norm, if the epilogue has y."""
    g, y = mergeable(g), mergeable(e.y)
    mean, var = contiguous(e.norm.mean, e.norm.var)
    if y is not None and var is None:
        mean, var = y.new_zeros(y.shape[1]), y.new_ones(y.shape[1])  # by which nothing is changed
    of = strides(g, y, None, None)
    run, layout = plan_sums(g.shape, of, g.dtype, e.norm.eps, None, 0.0, 1 if y is None else 2)
    slots = memory.empty(layout, g)
    run(GradientSumsOperands(g, y, None, None, mean, var, None, None, slots))
    return combine_slots(slots, var, e.norm.eps)
