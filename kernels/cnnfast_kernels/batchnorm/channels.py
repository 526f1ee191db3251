"""What the passes forward and backward both make of a channel's variance and gamma."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ..planes import load_vector
from ..rounding import round_quotient, round_root


@triton.jit
@no_type_check
def load_scale(of_channels, at, e: tl.constexpr):
    """(invstd, gamma * invstd) of a tile's channels; of_channels: epilogue.Channels."""
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    invstd = round_quotient(1.0, round_root(load_vector(of_channels.var, at.c, at.c_ok, ACC) + e.eps))
    scale = invstd
    if of_channels.gamma is not None:
        scale = load_vector(of_channels.gamma, at.c, at.c_ok, ACC) * invstd
    return invstd, scale
