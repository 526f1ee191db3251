"""Pooling: maximum, average, adaptive average and the mean of whole planes, forward and backward, and the maximum of
what a norm and an activation make of a tensor. Memory is the limit of all of them.
"""

from .average import adaptive_avg_pool, adaptive_avg_pool_backward, avg_pool, avg_pool_backward
from .maximum import max_pool, max_pool_backward, max_pool_indices, taps_dtype
from .normalised import normalised_max_pool
from .normalised_gradients import normalised_max_pool_backward
from .plane import global_avg_pool

__all__ = [
    "adaptive_avg_pool",
    "adaptive_avg_pool_backward",
    "avg_pool",
    "avg_pool_backward",
    "global_avg_pool",
    "max_pool",
    "max_pool_backward",
    "max_pool_indices",
    "normalised_max_pool",
    "normalised_max_pool_backward",
    "taps_dtype",
]
