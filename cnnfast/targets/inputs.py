"""Shapes of inputs: as they are written, and one that a model takes where none is given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .target import TargetError

if TYPE_CHECKING:
    from torch import nn

SIZES = (32, 28, 64, 96, 128, 224, 256, 299, 384, 512)  # of the images that models are made for; the usual ones first
FRAMES = 16  # of a video
# Values of each channel that a batch norm should see. In training, two values become +1 and -1 whatever they are, and
# gradients are nothing but rounding errors.
FEWEST = 8


def parse_shape(text: str) -> tuple[int, ...]:
    """1x3x32x32 as a tuple. Raises TargetError for anything else than positive sizes with x between them."""
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise TargetError(f"{text!r} is no shape: write positive sizes with x between them, as in 1x3x32x32")
    return tuple(map(int, sizes))


def input_shape(model: nn.Module, batch: int, *, small: bool) -> tuple[int, ...]:
    """A shape that the model takes, found by its first convolution or linear layer and by what timm's and transformers'
    models say of themselves.

    small: the first of SIZES on which the model runs and every batch norm sees FEWEST values of each channel, or else
    the first on which it runs. Not small: the size that the model says it is made for, or 224, comes first. Raises
    TargetError for a model in which nothing tells.
    """
    import torch

    from ..summary import attempt

    features = first_features(model)
    if features is None:
        raise TargetError(f"{type(model).__name__} has no layer with a weight that would tell its input: give it")
    in_channels, dims = features
    if dims == 0:
        return (batch, in_channels)
    channels, own = _own_input(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    sizes = [(n, n) for n in SIZES]
    sizes = [*sizes, *own] if small else [*(own or [(224, 224)]), *sizes]
    shapes = [(batch, channels or in_channels, *(FRAMES,) * (dims - 2), *size[:dims]) for size in sizes]
    running: list[tuple[int, ...]] = []
    for shape in shapes:
        summary = attempt(model, torch.empty(shape, dtype=dtype, device="meta"))
        if summary is None:
            continue
        running.append(shape)
        norms = [
            layer.output_shape
            for layer in summary.layers
            if "BatchNorm" in layer.class_name and len(layer.output_shape) > 2
        ]
        if not small or all(math.prod(norm) >= FEWEST * norm[1] for norm in norms):
            return shape
    return (running or shapes)[0]


def first_features(model: nn.Module) -> tuple[int, int] | None:
    """(channels, spatial axes) that the first convolution takes. Without one: those of the first layer whose weight has
    a convolution's shape, else of the first linear layer.
    """
    from torch import nn
    from torch.nn.parameter import is_lazy

    found: list[tuple[int, int]] = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.modules.conv._ConvNd):  # a lazy one takes any number of channels
            return module.in_channels or 3, len(module.kernel_size)
        if weight is not None and not is_lazy(weight) and weight.dim() in (2, 3, 4, 5):
            found.append((weight.shape[1] * getattr(module, "groups", 1), weight.dim() - 2))
    return next((features for features in found if features[1]), found[0] if found else None)


def _own_input(model: nn.Module) -> tuple[int | None, list[tuple[int, int]]]:
    """(channels, [height and width]) as far as the model says: transformers' models are configured for a size, timm's
    were trained at one.
    """
    config: Any = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        return getattr(config, "num_channels", None), [(height, width)]
    trained: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return getattr(config, "num_channels", None), [tuple(trained["input_size"][1:])] if "input_size" in trained else []
