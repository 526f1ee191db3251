"""Batch normalisation: statistics, normalise-activate(-add), its derivatives, running statistics; the same of a batch
whose parts lie on several ranks; and the sum over all axes but channels.

    z = act((y - mean) * scale + beta + residual),  scale = gamma * invstd,  invstd = 1 / sqrt(var + eps)

Sums over rows take two stages: every program reduces its tile of rows, and moments.py combines what the tiles leave.
Everything is computed in float32, or float64 for float64 tensors.
"""

from ..planes import contiguous
from .gradients import activation_backward, normalize_backward
from .masked import masked_gradient
from .normalising import normalize, normalize_leaving, normalize_mean, normalize_words, pack_words
from .ranks import apply_sums, combine_ranks, gradient_sums
from .running import update_running
from .statistics import batch_moments, combine_moments
from .sums import channel_sum

__all__ = [
    "activation_backward",
    "apply_sums",
    "batch_moments",
    "channel_sum",
    "combine_moments",
    "combine_ranks",
    "contiguous",
    "gradient_sums",
    "masked_gradient",
    "normalize",
    "normalize_backward",
    "normalize_leaving",
    "normalize_mean",
    "normalize_words",
    "pack_words",
    "update_running",
]
