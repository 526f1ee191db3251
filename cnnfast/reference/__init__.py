"""Every operation in plain PyTorch, differentiable and in any dtype up to float64: the judge that checking and tests
ask.

Written from the definitions, tap by tap, and not with the functions of torch.nn.functional that it judges beside ours.
Names and arguments are those of cnnfast.functional; arguments are taken to be valid. As there, running statistics are
updated in place.
"""

from .convolution import conv1d, conv2d, conv_transpose2d
from .normalization import ACTIVATIONS, batch_norm, bn_act, conv_act, conv_bn_act
from .pooling import adaptive_avg_pool2d, avg_pool2d, global_avg_pool2d, max_pool2d

__all__ = [
    "ACTIVATIONS",
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "bn_act",
    "conv1d",
    "conv2d",
    "conv_act",
    "conv_bn_act",
    "conv_transpose2d",
    "global_avg_pool2d",
    "max_pool2d",
]
