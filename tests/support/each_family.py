"""A call of each family of kernels, forward and backward, on small integers: what the GPU ring repeats, captures and
hands to sanitizers.

Run as a program it makes every call once, for compute-sanitizer: `python each_family.py [FAMILY ...]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cnnfast
import cnnfast.functional as F
from cnnfast.functional.pooled import conv_bn_act_pool
from cnnfast_kernels import batchnorm, conv, devices, packing
from cnnfast_kernels.conv import Geometry
from cnnfast_kernels.epilogue import Epilogue
from cnnfast_kernels.questions import Tile
from cnnfast_kernels.tiling import PackedTile, TileConfig
from cnnfast_kernels.tma.tiles import BoxTile
from cnnfast_kernels.tma.views import why_not_on
from tests.support.agreement import integers

LAST, NCHW = torch.channels_last, torch.contiguous_format
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
Function = Callable[..., Tensor]


class Family(NamedTuple):
    """function: of the operands, which `sizes` and `dtype` say. `kernels`: names of those that it is there to launch,
    on sm_90.
    """

    function: Function
    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    kernels: tuple[str, ...]
    fmt: torch.memory_format = LAST

    def operands(self, device: torch.device | str, seed: int = 0) -> list[Tensor]:
        """Leaves that want a gradient, full of small integers."""
        made = []
        for i, size in enumerate(self.sizes):
            t = integers(*size, largest=2 if i == 0 else 1, seed=seed + i).to(device, self.dtype)
            t = t.contiguous(memory_format=self.fmt) if len(size) == 4 else t
            made.append(t.requires_grad_())
        return made

    def __call__(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The result, and the gradients of all operands for a gradient of ones, by our kernels."""
        with cnnfast.backend("kernels"):
            y = self.function(*operands)
            return [y.detach(), *torch.autograd.grad(y, list(operands), torch.ones_like(y))]


class OverRanks(torch.autograd.Function):
    """A norm in training as each of two ranks computes it, which have the same images. There is no process group."""

    how = 1e-5, "relu", 0.0

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        mean, var = batchnorm.batch_moments(x)
        told = torch.cat((mean, var, mean.new_full((1,), x.numel() // x.shape[1])))
        statistics = batchnorm.combine_ranks(torch.stack((told, told)), mean.clone(), var.clone(), 0.1)
        z = batchnorm.normalize(x, *statistics[:2], gamma, beta, None, *OverRanks.how)
        ctx.save_for_backward(x, z, gamma, beta, *statistics)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, z, gamma, beta, *statistics = ctx.saved_tensors
        operands = dz, x, z
        sums = batchnorm.gradient_sums(*operands, *statistics[:2], gamma, beta, None, *OverRanks.how)
        norm = tuple(statistics), gamma, beta, None
        dx, _ = batchnorm.apply_sums(*operands, *norm, 2 * sums, *OverRanks.how, (True, False))
        return dx, sums[1], sums[0]


class Pointers(torch.autograd.Function):
    """The kernels that load by pointers, in half precision, where the default on sm_90 is tensor maps."""

    geometry = Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1)
    tile = TileConfig(32, 32, 16, 4, 2)

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return conv.conv_fprop(x, w, Pointers.geometry, tile=Pointers.tile)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        dx = conv.conv_dgrad(dy, w, x.shape, Pointers.geometry, fmt=LAST, tile=Pointers.tile)
        return dx, conv.conv_wgrad(x, dy, w.shape, Pointers.geometry, fmt=LAST, tile=replace(Pointers.tile, SPLIT_K=2))


class Joined(torch.autograd.Function):
    """relu(conv(x) + residual) of a 1x1 convolution, which keeps words of bits for its gradient."""

    geometry = Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1)

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
        z, words = conv.conv_fprop_words(x, w, Joined.geometry, Epilogue(residual=residual, activation="relu"))
        ctx.save_for_backward(x, w, words)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, w, words = ctx.saved_tensors
        g, _ = batchnorm.activation_backward(dz, None, "relu", 0.0, words)
        assert g is not None
        dx = conv.conv_dgrad(g, w, x.shape, Joined.geometry, fmt=LAST)
        return dx, conv.conv_wgrad(x, g, w.shape, Joined.geometry, fmt=LAST), g


class Stem(torch.autograd.Function):
    """An image of few channels, packed. Those kernels have no dgrad. The second tile is wgrad's."""

    geometry = Geometry((2, 2), (3, 3, 3, 3), (1, 1), 1)
    by_pointers = PackedTile(64, 64, 32, 4, 4), PackedTile(64, 128, 32, 4, 4, SPLIT_K=2)
    by_tensor_maps = BoxTile(1, 8, 8, 64, 32), BoxTile(1, 8, 8, 64, 32, SPLIT_K=2)

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, tiles: tuple[Tile, Tile]) -> Tensor:
        with packing.keeping() as kept:
            y = conv.conv_fprop(x, w, Stem.geometry, tile=tiles[0])
        assert kept.packed is not None
        ctx.save_for_backward(x, w, kept.packed)
        ctx.tile = tiles[1]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w, packed = ctx.saved_tensors
        with packing.given(x, packed):
            dw = conv.conv_wgrad(x, dy, w.shape, Stem.geometry, fmt=LAST, tile=ctx.tile)
        return torch.zeros_like(x), dw, None


def trained(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Convolution with statistics, which it updates, and one pass for the rest; in training, with an addend."""
    mean, var = torch.zeros_like(gamma, requires_grad=False), torch.ones_like(gamma, requires_grad=False)
    return F.conv_bn_act(x, w, mean, var, gamma, beta, residual=x, training=True, padding=1)


def widened(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
    """A 1x1 convolution to more channels, in training by the Gram matrix of its input."""
    return F.conv_bn_act(x, w, None, None, gamma, beta, residual=residual, training=True)


def pooled(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """A convolution with statistics, and one pass that normalises, activates and pools."""
    return conv_bn_act_pool(x, w, None, None, gamma, beta, (3, 2, 1, 1, False), training=True, padding=1)


def folded(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    mean, var = torch.zeros_like(gamma, requires_grad=False), torch.ones_like(gamma, requires_grad=False)
    return F.conv_bn_act(x, w, mean, var, gamma, beta, residual=x, padding=1)


def without_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """An epilogue without a norm, whose derivative is told by its result; and one whose slopes are operands."""
    with torch.no_grad():
        slopes = torch.tensor([0.5], dtype=x.dtype, device=x.device)
        z = F.conv_act(x, w, b, padding=1, residual=x, activation="prelu", activation_arg=slopes)
    return F.conv_act(x, w, b, padding=1, residual=z)


def max_pool(x: Tensor) -> Tensor:
    y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    return y + (indices * 0).to(y.dtype)


IMAGE, FILTERS = (2, 16, 8, 8), (16, 16, 3, 3)
PHOTO, TAPS = (2, 3, 24, 20), (64, 3, 7, 7)
CONV = ("conv_fprop_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel")
TMA = ("tma_fprop_kernel", "tma_dgrad_kernel", "tma_wgrad_kernel")
DEPTHWISE = ("depthwise_fprop_kernel", "depthwise_dgrad_kernel", "depthwise_wgrad_kernel")
NORM = ("normalize_kernel", "gradient_sums_kernel", "normalize_backward_kernel")
FAMILIES: dict[str, Family] = {
    "pointers, half": Family(Pointers.apply, (IMAGE, FILTERS), HALF, (*CONV, "conv_wgrad_reduce_kernel")),
    "pointers, float32": Family(lambda x, w: F.conv2d(x, w, None, 2, 1), (IMAGE, FILTERS), SINGLE, CONV),
    "pointers, float64, NCHW": Family(
        lambda x, w: F.conv2d(x, w, padding=1, groups=2), ((1, 6, 6, 5), (4, 3, 3, 3)), DOUBLE, CONV, NCHW
    ),
    "tensor maps": Family(lambda x, w: F.conv2d(x, w, padding=1), ((2, 64, 8, 16), (64, 64, 3, 3)), HALF, TMA),
    "tensor maps, stride 2": Family(
        lambda x, w: F.conv2d(x, w, None, 2, 1), ((2, 64, 16, 16), (64, 64, 3, 3)), HALF, TMA
    ),
    "tensor maps, 1x1": Family(lambda x, w: F.conv2d(x, w), ((2, 64, 8, 16), (64, 64, 1, 1)), torch.bfloat16, TMA),
    "pointers, a stem": Family(
        lambda x, w: Stem.apply(x, w, Stem.by_pointers), (PHOTO, TAPS), HALF, ("pack_pixels_kernel", CONV[0], CONV[2])
    ),
    "tensor maps, a stem": Family(
        lambda x, w: Stem.apply(x, w, Stem.by_tensor_maps), (PHOTO, TAPS), HALF, ("pack_pixels_kernel", TMA[0], TMA[2])
    ),
    "im2col": Family(
        lambda x, w: F.conv2d(x, w, padding=1, algorithm="im2col"),
        (IMAGE, FILTERS),
        SINGLE,
        ("im2col_kernel", "col2im_kernel"),
    ),
    "depthwise": Family(lambda x, w: F.conv2d(x, w, padding=1, groups=16), (IMAGE, (16, 1, 3, 3)), HALF, DEPTHWISE),
    "depthwise, stride 2, float32": Family(
        lambda x, w: F.conv2d(x, w, None, 2, 1, groups=16), (IMAGE, (16, 1, 3, 3)), SINGLE, DEPTHWISE, NCHW
    ),
    "transposed": Family(lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1), (IMAGE, FILTERS), SINGLE, CONV),
    "convolution and norm, training": Family(
        trained,
        (IMAGE, FILTERS, (16,), (16,)),
        SINGLE,
        ("conv_fprop_kernel", "combine_kernel", "update_running_kernel", *NORM),
    ),
    "convolution and norm, eval": Family(
        folded, (IMAGE, FILTERS, (16,), (16,)), SINGLE, ("conv_fprop_kernel", "normalize_backward_kernel")
    ),
    "convolution and activation": Family(
        without_norm,
        (IMAGE, FILTERS, (16,)),
        SINGLE,
        ("conv_fprop_kernel", "normalize_backward_kernel"),
    ),
    "tensor maps, convolution and activation": Family(
        lambda x, w, b: F.conv_act(x, w, b, padding=1, activation="relu6"),
        ((2, 64, 8, 16), (64, 64, 3, 3), (64,)),
        HALF,
        (TMA[0], "normalize_backward_kernel"),
    ),
    "norm and activation": Family(
        lambda x, g, b: F.bn_act(x, None, None, g, b, True, residual=x),
        (IMAGE, (16,), (16,)),
        SINGLE,
        ("batch_moments_kernel", *NORM),
    ),
    "norm, NHWC": Family(
        lambda x, g, b: F.batch_norm(x, None, None, g, b, True),
        (IMAGE, (16,), (16,)),
        SINGLE,
        ("batch_moments_kernel", *NORM),
    ),
    "norm, NCHW": Family(
        lambda x, g, b: F.batch_norm(x, None, None, g, b, True),
        (IMAGE, (16,), (16,)),
        SINGLE,
        ("batch_moments_kernel", *NORM),
        NCHW,
    ),
    "norm, over ranks": Family(OverRanks.apply, (IMAGE, (16,), (16,)), SINGLE, ("combine_ranks_kernel", *NORM)),
    "1x1 by the Gram matrix": Family(
        widened,
        ((2, 16, 9, 9), (40, 16, 1, 1), (40,), (40,), (2, 40, 9, 9)),
        HALF,
        ("gram_statistics_kernel", "gram_weight_gradient_kernel", "gram_own_kernel", "normalize_backward_kernel"),
    ),
    "max pool": Family(
        max_pool, (IMAGE,), SINGLE, ("max_pool_kernel", "max_pool_indices_kernel", "max_pool_backward_kernel")
    ),
    "max pool of a norm": Family(
        pooled,
        (IMAGE, (16, 16, 3, 3), (16,), (16,)),
        HALF,
        ("normalised_max_pool_kernel", "normalised_max_pool_backward_kernel"),
    ),
    "words of bits": Family(Joined.apply, (IMAGE, (24, 16, 1, 1), (2, 24, 8, 8)), HALF, ("masked_gradient_kernel",)),
    "average pool": Family(
        lambda x: F.avg_pool2d(x, 3, 2, 1), (IMAGE,), HALF, ("avg_pool_kernel", "avg_pool_backward_kernel")
    ),
    "average of a plane": Family(lambda x: F.global_avg_pool2d(x), (IMAGE,), SINGLE, ("plane_mean_kernel",)),
    "average to a size": Family(lambda x: F.adaptive_avg_pool2d(x, (3, 5)), (IMAGE,), SINGLE, (), NCHW),
}


def families(device: torch.device) -> dict[str, Family]:
    """The families that run on `device`: without tensor maps where a GPU has none."""
    missing = why_not_on(devices.architecture(device))
    return {name: family for name, family in FAMILIES.items() if not (missing and name.startswith("tensor maps"))}


def main(names: Sequence[str]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for name in names or families(device):
        family = FAMILIES[name]
        results = family(family.operands(device))
        torch.cuda.synchronize()
        print(f"{name}: {len(results)} results", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
