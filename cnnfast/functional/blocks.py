"""A residual block in training as one call. It is none of the public names: blocks and converted models call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from cnnfast_kernels.layout import Laid, Layout, convolution_format

from ..dispatch import why_torch
from .arguments import Size, autocast, autocasts
from .convolution import conv_output_size
from .entrance import captured
from .fused import wants_gradient
from .normalization import check_norm
from .operators import ops
from .pooled import seen_by_others


class NormedConv(NamedTuple):
    """A convolution without a bias, and the batch norm of what it gives, as conv_bn_act takes them."""

    weight: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    momentum: float
    eps: float
    stride: Size
    padding: Size
    dilation: Size
    groups: int

    @property
    def geometry(self) -> tuple[Any, ...]:
        """(stride, (top, bottom, left, right), dilation, groups)."""
        high, wide = _pair(self.padding)
        return _pair(self.stride), (high, high, wide, wide), _pair(self.dilation), self.groups

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]


class Link(NamedTuple):
    """What a residual block hands to the next, whose input is this one's result and is seen by nobody else: words of
    bits of the result, and the mean of its last layer, in whose gradient's place the next one hands back sums.
    """

    words: Tensor
    mean: Tensor


def block_serves(input: Tensor, layers: Sequence[NormedConv], projection: NormedConv | None) -> bool:
    """Whether residual_block computes this: relu(branch(input) + shortcut(input)), where the branch is `layers`, each
    but the last with a ReLU, and the shortcut is `projection`, or input itself.

    It does in training where a gradient is wanted, kernels serve, nobody watches the calls of functions and all sizes
    fit. Whoever asks calls the layers one by one where it does not, which raise their errors.
    """
    parts = [*layers, *([] if projection is None else [projection])]
    tensors = [t for layer in parts for t in layer.tensors]
    if (
        captured()
        or input.dim() != 4
        or 0 in input.shape
        or not wants_gradient(input, *tensors)
        or (has_torch_function((input, *tensors)) and seen_by_others((input, *tensors)))
        or why_torch(input, *tensors)
    ):
        return False
    if autocasts(input):
        fits = autocast(input.new_empty(0))[0].dtype == input.dtype  # else the shortcut has a dtype of its own
    else:
        fits = all(part.weight.dtype == input.dtype for part in parts)
    image: Laid | None = input if fits else None
    for layer in layers:
        image = None if image is None else _after(image, layer)
    shortcut = input if projection is None else _after(input, projection)
    return image is not None and shortcut is not None and tuple(image.shape) == tuple(shortcut.shape)


def _after(image: Laid, layer: NormedConv) -> Layout | None:
    """How a layer's result lies; None if the layer does not take the image, or leaves one value a channel."""
    w = layer.weight
    if w.dim() != 4 or w.shape[1] * layer.groups != image.shape[1]:
        return None
    N, C, H, W = size = conv_output_size(image, w, layer.geometry)
    if min(H, W) < 1 or N * H * W == 1:
        return None
    last = convolution_format(image, w) == torch.channels_last
    return Layout(size, (H * W * C, 1, W * C, C) if last else (C * H * W, H * W, W, 1), image.dtype)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def residual_block(
    input: Tensor,
    layers: Sequence[NormedConv],
    projection: NormedConv | None,
    less_memory: bool = False,
    below: Link | None = None,
    hands_over: bool = False,
) -> tuple[Tensor, Link | None]:
    """(relu(branch(input) + shortcut(input)), if it `hands_over` what the next block may take as its `below`), as one
    operator, where `block_serves`.

    input [N, C, H, W]; layers: two or three. Running statistics are updated. Where our kernels are asked for, or
    `less_memory` is, all convolutions are theirs; else each is served as everywhere, and what the inner activations
    gave is computed again in backward. less_memory: that it is by our kernels too. below: of the block whose result
    `input` is, if nobody but this one sees that; then the gradient that goes there is masked and summed for it already.
    Raises what conv_bn_act raises for a norm that does not fit.
    """
    parts = [*layers, *([] if projection is None else [projection])]
    x, *weights = autocast(input, *(layer.weight for layer in parts))
    images: list[Any] = [x]
    for layer in layers:
        images.append(_after(images[-1], layer))
    images[-1] = x  # the last is the block's result, in whose place stands what the shortcut's layer takes
    of = [(image, w, layer.geometry) for image, w, layer in zip(images, weights, parts, strict=False)]
    ours = ops.kernels_serve_block(x, of, len(layers), less_memory)
    algorithm = "direct" if ours else "auto"
    tensors: list[Any] = []
    momenta, eps, geometries, by_gram = [], [], [], []
    for i, ((image, w, geometry), layer) in enumerate(zip(of, parts, strict=True)):
        running, of_norm = (layer.running_mean, layer.running_var), (layer.bn_weight, layer.bn_bias)
        norm = check_norm("conv_bn_act", w.shape[0], x.dtype, *running, *of_norm, True, layer.momentum, layer.eps)
        gamma, beta, momentum, e = norm
        tensors += [w, gamma, beta, *running]
        momenta.append(momentum)
        eps.append(e)
        geometries += ops.flat_geometry(geometry)
        N, _, P, Q = conv_output_size(image, w, geometry)
        activation = "relu" if i < len(layers) else None
        ends = i >= len(layers) - 1  # the branch, or the shortcut
        by_gram.append(ends and ops.gram_serves(image, w, N * P * Q, activation, 0.0, geometry, algorithm))
    if projection is None:
        tensors += [None] * 5
        by_gram.append(False)
    bits = convolution_format(images[-2], weights[len(layers) - 1]) == torch.channels_last
    how = ours, ours and not less_memory, bits, bits and hands_over, *by_gram[-2:]
    link = below if below is not None and ours and x is input else (None, None)
    operator = ops.bottleneck if len(layers) == 3 else ops.basic_block
    numbers = tuple(momenta), tuple(eps), tuple(geometries)
    z, words, *records = operator(x, *link, *tensors, *numbers, how, algorithm)
    return z, Link(words, records[ops.mean_of_last(len(layers))]) if bits and hands_over else None
