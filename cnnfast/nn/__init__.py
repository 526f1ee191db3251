"""torch.nn's layers on cnnfast's kernels: the same constructors, state_dict, repr and numbers; and blocks whose members
are fused.

`layers` are subclasses of torch.nn's classes of the same name. `fused` computes convolution, batch norm, residual and
activation of existing modules in one step, or those of them that there are; `blocks` are built on it. `Augment` goes
before a network: it augments and normalises its batches.
"""

from .augment import Augment, Draws
from .blocks import BasicBlock, Bottleneck, ConvBNAct
from .fused import bn_act, conv_act, conv_bn_act, fusable
from .layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Conv1d,
    Conv2d,
    ConvTranspose2d,
    GlobalAvgPool2d,
    MaxPool2d,
    SyncBatchNorm,
)
from .option_words import augment_options

__all__ = [
    "AdaptiveAvgPool2d",
    "Augment",
    "AvgPool2d",
    "BasicBlock",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Bottleneck",
    "Conv1d",
    "Conv2d",
    "ConvBNAct",
    "ConvTranspose2d",
    "Draws",
    "GlobalAvgPool2d",
    "MaxPool2d",
    "SyncBatchNorm",
    "augment_options",
    "bn_act",
    "conv_act",
    "conv_bn_act",
    "fusable",
]
