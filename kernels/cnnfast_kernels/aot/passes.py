"""The cases that are no convolutions: single passes over a tensor, and the augmentation of a batch.

They yield a case's name and what launches its kernels, on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..augment import Augmenting, ImageNumbers, ImageSource, augment_batch
from ..batchnorm import (
    activation_backward,
    apply_sums,
    batch_moments,
    channel_sum,
    combine_ranks,
    gradient_sums,
    normalize,
    normalize_backward,
    normalize_mean,
    normalize_words,
    pack_words,
    update_running,
)
from ..gram import gram_gradients, gram_statistics
from ..pooling import (
    adaptive_avg_pool,
    adaptive_avg_pool_backward,
    avg_pool,
    avg_pool_backward,
    global_avg_pool,
    max_pool,
    max_pool_backward,
    max_pool_indices,
    normalised_max_pool,
    normalised_max_pool_backward,
)
from ..problem import PoolProblem
from . import layers
from .layers import BATCH, FLOAT32, LAST, NCHW


def batch_norm(dtype: torch.dtype, fmt: torch.memory_format, training: bool, added: bool = True) -> None:
    """Forward and backward of act(batch_norm(y) + residual), all gradients asked for; or without a residual, where
    backward is not given the result.
    """
    C = 64
    y = layers.empty(BATCH, C, 56, 56, dtype=dtype, fmt=fmt)
    residual = torch.empty_like(y) if added else None
    weight, bias = layers.empty(C), layers.empty(C)
    mean, var = batch_moments(y) if training else (layers.empty(C), layers.empty(C))
    if training:
        update_running(layers.empty(C), layers.empty(C), mean, var, 0.1, BATCH * 56 * 56)
    z = normalize(y, mean, var, weight, bias, residual, 1e-5, "relu", 0.0)
    normalize_backward(
        torch.empty_like(z),
        y,
        z if added else None,
        mean,
        var,
        weight,
        bias,
        residual,
        1e-5,
        "relu",
        0.0,
        training,
        (True, True, True, added),
    )
    channel_sum(z)


def batch_norm_over_ranks(dtype: torch.dtype, ranks: int) -> None:
    """What so many ranks compute otherwise than one: the statistics of all, and gradients by sums over all."""
    C = 64
    y = layers.empty(BATCH, C, 56, 56, dtype=dtype, fmt=LAST)
    weight, bias = layers.empty(C), layers.empty(C)
    own, _ = batch_moments(y)
    gathered = layers.empty(ranks, 2 * C + 1, dtype=own.dtype)
    statistics = combine_ranks(gathered, layers.empty(C), layers.empty(C), 0.1)
    norm = weight, bias, y
    sums = gradient_sums(y, y, y, *statistics[:2], *norm, 1e-5, "relu", 0.0)
    apply_sums(y, y, y, statistics, *norm, sums, 1e-5, "relu", 0.0, (True, True))


def bits(dtype: torch.dtype, fmt: torch.memory_format) -> None:
    """Words of bits beside act(batch_norm(y) + residual), those of a tensor, and backward by them; the mean beside
    act(batch_norm(y)).
    """
    C = 64
    y = layers.empty(BATCH, C, 56, 56, dtype=dtype, fmt=fmt)
    vector = layers.empty(C)
    z, words = normalize_words(y, vector, vector, vector, vector, y, 1e-5, "relu", 0.0)
    pack_words(z)
    normalize_mean(y, vector, vector, vector, vector, 1e-5, "relu", 0.0)
    activation_backward(z, None, "relu", 0.0, words)


def gram_matrix(dtype: torch.dtype, C: int, K: int, stride: int) -> None:
    """Statistics and gradients of a 1x1 convolution from C to K channels with its batch norm, all gradients asked for;
    the first without an activation.
    """
    x, w = layers.empty(BATCH, C, 28, 28, dtype=dtype, fmt=LAST), layers.empty(K, C, 1, 1, dtype=dtype)
    g = layers.empty(BATCH, K, 28 // stride, 28 // stride, dtype=dtype, fmt=LAST)
    steps = stride, stride
    _, var, mu, products = gram_statistics(x, w, None, steps)
    _, sums = activation_backward(g, g, "relu" if stride == 1 else None, 0.0)
    gram_gradients(g, sums, x, w, mu, products, var, layers.empty(K), 1e-5, steps, (True, True))


def activation_pass(dtype: torch.dtype, fmt: torch.memory_format, activation: str) -> None:
    """Forward and backward of act(y + bias + residual) after a convolution that the library serves."""
    y = layers.empty(BATCH, 64, 56, 56, dtype=dtype, fmt=fmt)
    bias, residual = layers.empty(64, dtype=dtype), torch.empty_like(y)
    slopes = layers.empty(64, dtype=dtype) if activation == "prelu" else None
    norm = (None, None, None, bias, residual, 0.0, activation, 0.01)
    z = normalize(y, *norm, slopes)
    if activation != "prelu":
        normalize_backward(torch.empty_like(z), y, z, *norm, False, (True, False, True, False))


def pooling(dtype: torch.dtype, fmt: torch.memory_format) -> None:
    x = layers.empty(BATCH, 64, 112, 112, dtype=dtype, fmt=fmt)
    window = PoolProblem.of(tuple(x.shape), (3, 3), (2, 2), (1, 1))
    y, taps = max_pool(window, x, with_taps=True)
    assert taps is not None
    max_pool_indices(window, taps)
    max_pool_backward(window, y, taps, fmt)
    avg_pool(window, x, False, None)
    avg_pool_backward(window, y, False, None, fmt)
    adaptive_avg_pool_backward(adaptive_avg_pool(x, 7, 7), (BATCH, 64, 112, 112), fmt)
    global_avg_pool(layers.empty(BATCH, 512, 7, 7, dtype=dtype, fmt=fmt))


def normalised_pooling(dtype: torch.dtype, fmt: torch.memory_format, activation: str = "relu") -> None:
    """ResNet's stem in training after its convolution: forward and backward of its norm, activation and max pool."""
    C = 64
    y = layers.empty(BATCH, C, 112, 112, dtype=dtype, fmt=fmt)
    window = PoolProblem.of(tuple(y.shape), (3, 3), (2, 2), (1, 1))
    mean, var = batch_moments(y)
    norm = mean, var, layers.empty(C), layers.empty(C)
    how = 1e-5, activation, 0.01
    z, taps, at_max = normalised_max_pool(window, y, *norm, *how)
    sums = gradient_sums(z, at_max, None, *norm, None, *how)
    normalised_max_pool_backward(window, z, taps, y, *norm, sums, *how)


def augmentation(images: torch.dtype, dtype: torch.dtype, everything: bool, C: int = 3, noise: bool = False) -> None:
    """A map alone, or everything that can be done to images, of one size in NCHW or of different sizes."""
    x = layers.empty(BATCH, C, 256, 256, dtype=images)
    source = ImageSource(x)
    if images == torch.uint8:
        offsets, sizes = layers.empty(BATCH, dtype=torch.int64), layers.empty(BATCH, 2, dtype=torch.int32)
        source = ImageSource(x.view(-1), offsets, sizes)
    numbers = ImageNumbers(layers.empty(BATCH, 2, 3))
    if everything:
        boxes, seeds = layers.empty(BATCH, 1, 4 + C), None
        if noise:
            boxes, seeds = layers.empty(BATCH, 1, 4), layers.empty(BATCH, dtype=torch.int64)
        numbers = ImageNumbers(numbers.maps, layers.empty(BATCH, 5), boxes, seeds, layers.empty(BATCH, 6))
    augmenting = Augmenting(224, 224, dtype, (0.0,) * C, (0.5,) * C, (0.25,) * C, reflect=everything)
    augment_batch(source, numbers, augmenting)


def passes() -> Iterator[tuple[str, Callable[[], None]]]:
    yield ("batch norm bfloat16", partial(batch_norm, torch.bfloat16, LAST, True))
    yield ("batch norm bfloat16, no residual", partial(batch_norm, torch.bfloat16, LAST, True, False))
    yield ("batch norm bfloat16, given statistics", partial(batch_norm, torch.bfloat16, LAST, False))
    yield ("batch norm float32 NCHW", partial(batch_norm, FLOAT32, NCHW, True))
    yield ("batch norm float64", partial(batch_norm, torch.float64, LAST, True))
    # 8 ranks are those of one machine; 2048 make the highest block, of one channel, with float64's registers.
    yield ("batch norm over 8 ranks bfloat16", partial(batch_norm_over_ranks, torch.bfloat16, 8))
    yield ("batch norm over 2048 ranks float64", partial(batch_norm_over_ranks, torch.float64, 2048))
    # the third convolution of bottlenecks, a projection, one of MobileNetV2, whose channels are no power of two
    for C, K, stride in ((64, 256, 1), (512, 2048, 1), (256, 512, 2), (24, 144, 1)):
        yield (f"gram matrix {C} to {K} stride {stride} bfloat16", partial(gram_matrix, torch.bfloat16, C, K, stride))
    yield ("gram matrix 64 to 256 stride 1 float16", partial(gram_matrix, torch.float16, 64, 256, 1))
    yield ("words of bits bfloat16", partial(bits, torch.bfloat16, LAST))
    yield ("words of bits float16 NCHW", partial(bits, torch.float16, NCHW))
    yield ("words of bits float64", partial(bits, torch.float64, LAST))
    # read off the result, computed again, and one whose slopes are operands
    for activation in ("relu", "mish", "prelu"):
        yield (f"bias and {activation} bfloat16", partial(activation_pass, torch.bfloat16, LAST, activation))
    yield ("bias and mish float32 NCHW", partial(activation_pass, FLOAT32, NCHW, "mish"))
    yield ("pooling bfloat16", partial(pooling, torch.bfloat16, LAST))
    yield ("pooling float32 NCHW", partial(pooling, FLOAT32, NCHW))
    yield ("a stem's norm and pooling bfloat16", partial(normalised_pooling, torch.bfloat16, LAST))
    yield ("a stem's norm and pooling float16", partial(normalised_pooling, torch.float16, LAST, "leaky_relu"))
    yield ("a stem's norm and pooling float32 NCHW", partial(normalised_pooling, FLOAT32, NCHW, "relu6"))
    yield ("a stem's norm and pooling float64", partial(normalised_pooling, torch.float64, LAST))
    yield ("augmentation uint8 to bfloat16, a map", partial(augmentation, torch.uint8, torch.bfloat16, False))
    yield ("augmentation uint8 to bfloat16", partial(augmentation, torch.uint8, torch.bfloat16, True))
    yield ("augmentation uint8 to float16, noise", partial(augmentation, torch.uint8, torch.float16, True, 3, True))
    yield ("augmentation float32", partial(augmentation, FLOAT32, FLOAT32, True))
    yield ("augmentation float16, grey", partial(augmentation, torch.float16, torch.float16, True, 1))
