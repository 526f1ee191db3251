"""What launch_survey.py launches: operands and layouts that may be absent, present and mixed, by every launcher.

Memory that nobody touches costs nothing: extents are those of real layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from cnnfast_kernels import batchnorm, pooling
from cnnfast_kernels.aot import cases as aot_cases
from cnnfast_kernels.aot.cases import Case
from cnnfast_kernels.aot.layers import LAST, NCHW
from cnnfast_kernels.augment import Augmenting, ImageNumbers, ImageSource, augment_batch
from cnnfast_kernels.conv import conv_dgrad, conv_fprop, conv_stats, conv_wgrad
from cnnfast_kernels.dtypes import accumulator_dtype
from cnnfast_kernels.epilogue import PLAIN, BatchNorm, Epilogue
from cnnfast_kernels.problem import PoolProblem
from cnnfast_kernels.questions import Geometry

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def empty(*shape: int, dtype: torch.dtype = torch.float32, fmt: torch.memory_format = NCHW) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=fmt)


def cases(capability: int, once: bool) -> Iterator[Case]:
    """Operands and layouts that may be absent, present and mixed; then all that is compiled ahead of time, every tile
    among it.
    """
    everywhere = [(dtype, LAST) for dtype in DTYPES]
    for dtype, fmt in everywhere if once else [*everywhere, (torch.bfloat16, NCHW), (torch.float32, NCHW)]:
        told = f"{str(dtype).removeprefix('torch.')} {'channels_last' if fmt == LAST else 'contiguous'}"
        for i, layer in enumerate(LAYERS if fmt == LAST and not once else LAYERS[:FIRST]):
            if not once or dtype == torch.bfloat16:
                yield Case(f"epilogues {told} {layer}", partial(epilogues, dtype, fmt, i < FIRST, *layer))
            yield Case(f"gradients {told} {layer}", partial(gradients, dtype, fmt, *layer))
        yield Case(f"batch norm {told}", partial(batch_norms, dtype, fmt, once))
        yield Case(f"pools {told}", partial(pools, dtype, fmt))
    for dtype, result in IMAGES[:1] if once else IMAGES:
        yield Case(f"augmentation {dtype} to {result}", partial(augmentations, dtype, result, once))
    yield from reversed(aot_cases.cases(capability))  # the largest tiles, which take longest to compile, come last


# The dtypes of images, and of results.
IMAGES = (
    (torch.uint8, torch.bfloat16),
    (torch.uint8, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
)
# (N, C, size, K, window, stride, padding, dilation, groups). The first of each family, then what makes views, boxes and
# strips differ.
LAYERS = (
    (4, 64, 14, 64, 3, 1, 1, 1, 1),
    (2, 64, 14, 64, 3, 1, 1, 1, 64),
    (2, 3, 32, 16, 7, 2, 3, 1, 1),
    (4, 64, 14, 60, 1, 1, 0, 1, 1),  # filters that are no multiple of 8: the general kernels, whatever the dtype
    (4, 64, 14, 64, 3, 2, 1, 1, 1),
    (4, 64, 14, 128, 1, 1, 0, 1, 1),
    (4, 64, 14, 128, 1, 2, 0, 1, 1),
    (2, 64, 9, 32, 3, 1, 2, 2, 1),
    (2, 64, 8, 64, 3, 1, 1, 1, 2),
    (8, 32, 7, 32, 5, 3, 2, 1, 1),
    (1, 200, 13, 72, 3, 1, 0, 1, 1),
    (2, 96, 11, 192, 5, 2, 2, 1, 96),
    (3, 17, 10, 9, 4, 2, 1, 1, 1),
    (16, 8, 1, 8, 1, 1, 0, 1, 1),
    (2, 4, 64, 24, 3, 2, 1, 1, 1),
)
FIRST = 4


def operands(dtype: torch.dtype, fmt: torch.memory_format, N, C, size, K, window, stride, pad, dilation, groups):
    """(x, w, dy, geometry) of a convolution of square images."""
    geometry = Geometry((stride, stride), (pad,) * 4, (dilation, dilation), groups)
    x, w = empty(N, C, size, size, dtype=dtype, fmt=fmt), empty(K, C // groups, window, window, dtype=dtype, fmt=fmt)
    g = geometry.problem(x.shape, w.shape)
    return x, w, empty(N, K, g.P, g.Q, dtype=dtype, fmt=fmt), geometry


def epilogues(dtype: torch.dtype, fmt: torch.memory_format, every: bool, *layer: int) -> None:
    """Forward with none and with all operands that may be absent; with `every`, with each of them present and
    absent.
    """
    x, w, residual, geometry = operands(dtype, fmt, *layer)
    vector = empty(w.shape[0])
    norms = [BatchNorm(vector, vector, weight, bias) for weight, bias in product((vector, None), repeat=2)]
    chosen = [PLAIN, Epilogue(vector, norms[0], residual, "leaky_relu", 0.2)]
    chosen += every * [
        Epilogue(bias=empty(w.shape[0], dtype=dtype)),
        *(Epilogue(norm=norm, activation="relu") for norm in norms),
        Epilogue(residual=residual),
    ]
    for epilogue in chosen:
        conv_fprop(x, w, geometry, epilogue)
    conv_stats(x, w, geometry)
    if every:
        conv_stats(x, w, geometry, bias=vector)


def gradients(dtype: torch.dtype, fmt: torch.memory_format, *layer: int) -> None:
    """Both gradients, the transposed convolution with its bias, and all of it by im2col."""
    x, w, dy, geometry = operands(dtype, fmt, *layer)
    for algorithm in ("auto", "im2col"):
        conv_dgrad(dy, w, tuple(x.shape), geometry, fmt=fmt, algorithm=algorithm)
        conv_dgrad(dy, w, tuple(x.shape), geometry, bias=empty(x.shape[1], dtype=dtype), fmt=fmt, algorithm=algorithm)
        conv_wgrad(x, dy, tuple(w.shape), geometry, fmt=fmt, algorithm=algorithm)
    conv_fprop(x, w, geometry, Epilogue(empty(w.shape[0])), algorithm="im2col")


def batch_norms(dtype: torch.dtype, fmt: torch.memory_format, once: bool) -> None:
    """Statistics, their running means, the pass and its gradients with each operand that may be absent, present and
    absent.
    """
    y, C = empty(4, 24, 11, 11, dtype=dtype, fmt=fmt), 24
    mean, var = batchnorm.batch_moments(y)
    for running in (torch.float32, dtype):
        batchnorm.update_running(empty(C, dtype=running), empty(C, dtype=running), mean, var, 0.1, 4 * 121)
    batchnorm.channel_sum(y)
    some = [(True, True, True), (False, False, False), (True, False, True), (False, True, False)]
    variants = list(product(some, ("relu", "silu", None), (True, False)))
    # every fifth: each alternative occurs
    for (scaled, shifted, added), activation, training in variants[:: 5 if once else 1]:
        weight, bias = empty(C) if scaled else None, empty(C) if shifted else None
        residual = torch.empty_like(y) if added else None
        z = batchnorm.normalize(y, mean, var, weight, bias, residual, 1e-5, activation, 0.0)
        needs = (True, scaled, shifted, added)
        batchnorm.normalize_backward(
            torch.empty_like(z), y, z, mean, var, weight, bias, residual, 1e-5, activation, 0.0, training, needs
        )
        if training:
            over_ranks(y, z if activation == "relu" else None, weight, bias, residual, activation)


def over_ranks(
    y: torch.Tensor,
    z: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
) -> None:
    """Training on three ranks, with running statistics of the dtypes that they may have, and without them."""
    C = y.shape[1]
    gathered = empty(3, 2 * C + 1, dtype=accumulator_dtype(y.dtype))
    for running in (torch.float32, y.dtype, None):
        buffers = (None, None) if running is None else (empty(C, dtype=running), empty(C, dtype=running))
        statistics = batchnorm.combine_ranks(gathered, *buffers, 0.1)
    operands, how = (weight, bias, residual), (1e-5, activation, 0.0)
    sums = batchnorm.gradient_sums(y, y, z, *statistics[:2], *operands, *how)
    batchnorm.apply_sums(y, y, z, statistics, *operands, sums, *how, (True, residual is not None))


def pools(dtype: torch.dtype, fmt: torch.memory_format) -> None:
    """Windows that overlap, that do not, that are as large as the plane; planes that are cut in parts."""
    x = empty(2, 24, 23, 23, dtype=dtype, fmt=fmt)
    for window, stride, pad in ((3, 2, 1), (2, 2, 0), (20, 3, 0)):
        g = PoolProblem.of(tuple(x.shape), (window, window), (stride, stride), (pad, pad))
        y, taps = pooling.max_pool(g, x, with_taps=True)
        pooling.max_pool(g, x, with_taps=False)
        assert taps is not None
        pooling.max_pool_indices(g, taps)
        pooling.max_pool_backward(g, y, taps, fmt)
        pooling.avg_pool_backward(g, pooling.avg_pool(g, x, True, None), True, None, fmt)
        pooling.avg_pool(g, x, False, None)
        for activation in ("relu", "leaky_relu") if window < 16 else ():
            norm = *batchnorm.batch_moments(x), *((empty(24), empty(24)) if activation == "relu" else (None, None))
            z, taps, at_max = pooling.normalised_max_pool(g, x, *norm, 1e-5, activation, 0.1)
            sums = batchnorm.gradient_sums(z, at_max, None, *norm, None, 1e-5, activation, 0.1)
            pooling.normalised_max_pool_backward(g, z, taps, x, *norm, sums, 1e-5, activation, 0.1)
    pooling.adaptive_avg_pool_backward(pooling.adaptive_avg_pool(x, 3, 3), (2, 24, 23, 23), fmt)
    pooling.global_avg_pool(x)
    pooling.global_avg_pool(empty(1, 8, 224, 224, dtype=dtype, fmt=fmt))


def augmentations(dtype: torch.dtype, result: torch.dtype, once: bool) -> None:
    """A map with each kind of numbers that may be absent, present and absent, of images of one size, in both formats,
    and of different sizes.
    """
    N, three = 4, (0.5, 0.25, 0.125)
    x, flat = empty(N, 3, 24, 24, dtype=dtype), empty(N * 3 * 24 * 24, dtype=dtype)
    sources = [ImageSource(x), ImageSource(x.contiguous(memory_format=LAST))]
    if dtype == torch.uint8:
        sources.append(ImageSource(flat, empty(N, dtype=torch.int64), empty(N, 2, dtype=torch.int32)))
    boxes = [(None, None), (empty(N, 2, 7), None), (empty(N, 2, 4), empty(N, dtype=torch.int64))]
    colours = [(None, False), (empty(N, 5), False), (empty(N, 5), True)]
    variants = list(product(sources, colours, boxes, (None, empty(N, 6)), (False, True)))
    # every seventh: each alternative occurs
    for source, (five, contrast), (corners, seeds), partners, reflect in variants[:: 7 if once else 1]:
        numbers = ImageNumbers(empty(N, 2, 3), five, corners, seeds, partners)
        augment_batch(source, numbers, Augmenting(20, 40, result, three, three, three, reflect), contrast)
