"""The operators of torch.ops.cnnfast: what autograd, torch.compile and torch.export see of the kernels.

Each has a schema, an implementation that launches kernels (CUDA; CPU while Triton interprets), a fake that gives
shapes, and, where it can be differentiated, a torch.autograd.Function registered under the Autograd key: a third of the
host cost of torch.library.register_autograd.
"""

from . import flops as _flops  # noqa: F401 - registers its formulas
from .augmentation import augment
from .batchnorm import batch_moments, channel_sum, normalize, update_running
from .block import basic_block, bottleneck
from .block_positions import flat_geometry, mean_of_last
from .block_serving import kernels_serve_block
from .conv import conv_dgrad, conv_fprop, conv_stats
from .conv_norm import conv_act, conv_bn_act, conv_bn_act_training
from .conv_norm_pool import conv_bn_act_pool_training
from .gram import conv_bn_act_by_gram, gram_serves
from .pooling import adaptive_avg_pool, avg_pool, global_avg_pool, max_pool, max_pool_indices
from .synchronising import normalize_over_ranks

__all__ = [
    "adaptive_avg_pool",
    "augment",
    "avg_pool",
    "basic_block",
    "batch_moments",
    "bottleneck",
    "channel_sum",
    "conv_act",
    "conv_bn_act",
    "conv_bn_act_by_gram",
    "conv_bn_act_pool_training",
    "conv_bn_act_training",
    "conv_dgrad",
    "conv_fprop",
    "conv_stats",
    "flat_geometry",
    "global_avg_pool",
    "gram_serves",
    "kernels_serve_block",
    "max_pool",
    "max_pool_indices",
    "mean_of_last",
    "normalize",
    "normalize_over_ranks",
    "update_running",
]
