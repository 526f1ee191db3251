"""The operations by the names and arguments of torch.nn.functional, plus `algorithm` and the fused `conv_bn_act`,
`conv_act` and `bn_act`; and `augment`, for batches of images, with `pack_images`.

Every function decides by `dispatch.why_torch` who serves the call. On the kernels' path arguments are checked here,
before anything is launched, and bad ones raise what PyTorch raises, naming the argument, its value and the rule.
"""

from .augmentation import augment, pack_images
from .convolution import conv1d, conv2d, conv_transpose2d
from .fused import bn_act, conv_act, conv_bn_act
from .normalization import batch_norm
from .pooling import adaptive_avg_pool2d, avg_pool2d, global_avg_pool2d, max_pool2d

__all__ = [
    "adaptive_avg_pool2d",
    "augment",
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
    "pack_images",
]
