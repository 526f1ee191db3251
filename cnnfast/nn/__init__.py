"""torch.nn's layers on cnnfast's kernels: the same constructors, state_dict, repr and numbers; and blocks whose members
are fused.

`layers` are subclasses of torch.nn's classes of the same name. `fused` computes convolution, batch norm, residual and
activation of existing modules in one step; `blocks` are built on it.
"""

from .blocks import BasicBlock, Bottleneck, ConvBNAct
from .fused import conv_bn_act, fusable
from .layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv1d,
    Conv2d,
    ConvTranspose2d,
    GlobalAvgPool2d,
    MaxPool2d,
    SyncBatchNorm,
)

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BasicBlock",
    "BatchNorm2d",
    "Bottleneck",
    "Conv1d",
    "Conv2d",
    "ConvBNAct",
    "ConvTranspose2d",
    "GlobalAvgPool2d",
    "MaxPool2d",
    "SyncBatchNorm",
    "conv_bn_act",
    "fusable",
]
