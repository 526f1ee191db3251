"""The operators as citizens of PyTorch: opcheck, gradients of first and second order, compile, export, transforms,
autocast.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
import cnnfast.functional as ours
from cnnfast.ops.registry import LIBRARY
from tests.support.agreement import integers, leaf, normal
from tests.support.convolutions import arrange

GEOMETRY = ([1, 2], [1, 0, 1, 1], [1, 1], 2, "auto")
IM2COL = (*GEOMETRY[:4], "im2col")
LAYOUT = ([2, 4, 5, 4], [6, 2, 2, 3], True)  # of x and w, and of their gradients
WINDOW = ([3, 2], [2, 2], [1, 1], [1, 1], True)
AVERAGE = ([3, 2], [2, 2], [1, 1], True, False, None)

X = normal(2, 4, 5, 4)
NHWC = X.contiguous(memory_format=torch.channels_last)
W = normal(6, 2, 2, 3, seed=1)
Y = normal(2, 6, 5, 2, seed=2)
MEAN, VAR, WEIGHT, BIAS = (normal(6, seed=i).abs() + 0.5 for i in range(3, 7))
TOLD = torch.cat([torch.stack([MEAN, VAR]).flatten().repeat(3, 1), torch.tensor([[4.0], [0.0], [2.0]])], 1)
COUNT, SUMS = torch.tensor([30.0], dtype=torch.float64), torch.stack([MEAN, VAR])
TAPS = torch.tensor([3, 3, 2], dtype=torch.uint8).expand(2, 4, 3, 3).contiguous()  # taps that lie in the image
# of a 1x1 convolution in half precision, of stride (2, 1)
HALF, WIDE = (t.half().contiguous(memory_format=torch.channels_last) for t in (X, normal(6, 4, 1, 1, seed=1)))
HALF_Y = normal(2, 6, 3, 4, seed=2).half().contiguous(memory_format=torch.channels_last)
STRIDED = ([2, 1], [0, 0, 0, 0], [1, 1], 1, "auto")
MATRICES = MEAN[:4].float(), normal(6, 4, seed=3, dtype=torch.float32), VAR.float()
POOL = ([3, 2], [2, 2], [1, 1], False)  # of y
POOLED = normal(2, 6, 3, 2, seed=8)
TAPS_OF_Y = torch.tensor([3, 2], dtype=torch.uint8).expand(2, 6, 3, 2).contiguous()
PICTURES = integers(2, 3, 5, 6, largest=127).add(127).to(torch.uint8)
OFFSETS, SIZES = torch.tensor([0, 90]), torch.tensor([[5, 6], [6, 5]])
NUMBERS = (
    normal(2, 2, 3, dtype=torch.float32),
    torch.tensor([[0.5, 1.5, 0.7, 0.1, 0.0], [1.0, 1.0, 1.0, 0.0, 1.0]]),
    torch.tensor([[[1.0, 2.0, 3.0, 4.0]]] * 2),
    torch.tensor([1, 2**40]),
    torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0, 3.0, 4.0]]),
)
AUGMENTED = ([4, 5], [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], [0.0, 0.5, 1.0], True, torch.float16)


def wants(*arguments):
    """The same, every floating tensor wanting a gradient."""
    return tuple(leaf(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)


# Of a residual block: a layer of 1x1, in forward, and with what forward left of it; TALL_Y is of stride 1.
LAYER = (*wants(normal(4, 4, 1, 1, seed=1), WEIGHT[:4], BIAS[:4]), MEAN[:4].clone(), VAR[:4].clone())
LEFT = (*(t.detach() for t in LAYER[:3]), normal(2, 4, 5, 4, seed=7), X.relu(), MEAN[:4], VAR[:4], None, None)
NO_LAYER, NO_LEFT = (None,) * 5, (None,) * 9
WORDS = torch.arange(-4, 4, dtype=torch.int32).view(2, 4)  # of X
UNLINKED = None, None
FUSED_SOME = [True, True, False, False, False, False], [True] * 7 + [False] * 3  # how, and which gradients are needed
TALL_Y = normal(2, 6, 5, 4, seed=2).half().contiguous(memory_format=torch.channels_last)
BELOW = tuple(t[:4].float() for t in (MEAN, VAR, WEIGHT, BIAS))


def numbers_of(layers):
    """Momenta, eps and geometries."""
    return [0.1] * layers, [1e-5] * layers, [1, 1, 0, 0, 0, 0, 1, 1, 1] * layers


SAMPLES = {
    "conv_fprop": [
        wants(X, W, BIAS, *GEOMETRY),
        (NHWC, W, None, *GEOMETRY),
        wants(NHWC, W, None, *IM2COL),
        wants(X[:0], W, BIAS, *GEOMETRY),
        wants(NHWC[:0], W.contiguous(memory_format=torch.channels_last), BIAS, *GEOMETRY),
        wants(X[:, :0], W[:, :0], BIAS, *GEOMETRY),
    ],
    "conv_dgrad": [
        wants(Y, W, BIAS[:4], X.shape, False, *GEOMETRY),
        (Y, W, None, X.shape, True, *IM2COL),
        wants(Y[:0], W, BIAS[:4], X[:0].shape, False, *GEOMETRY),
        wants(Y[:, :, :1, :1], W, BIAS[:4], (2, 4, 0, 0), True, (1, 1), (1, 1, 2, 1), (1, 1), 2, "auto"),
    ],
    "conv_dgrad_below": [
        (Y, W, X, X, None, MEAN[:4], VAR[:4], WEIGHT[:4], BIAS[:4], 1e-5, "relu", 0.0, X.shape, True, *GEOMETRY),
        (Y, W, X, None, WORDS, None, None, None, None, 0.0, "relu", 0.0, X.shape, True, *GEOMETRY),
        (Y, W, X, None, None, None, None, None, None, 0.0, None, 0.0, X.shape, False, *IM2COL),
    ],
    "basic_block": [
        (leaf(X), *UNLINKED, *LAYER, *LAYER, *NO_LAYER, *numbers_of(2), [True, True, *[False] * 4], "auto"),
        (leaf(X), *UNLINKED, *LAYER, *LAYER, *LAYER, *numbers_of(3), [False] * 6, "auto"),
        (
            leaf(X),
            WORDS,
            MEAN[:4],
            *LAYER[:1],
            *[None] * 4,
            *LAYER,
            *NO_LAYER,
            *numbers_of(2),
            [True, False, True, False, False, False],
            "direct",
        ),
    ],
    "bottleneck": [
        (X, WORDS, MEAN[:4], *LAYER, *LAYER, *LAYER, *NO_LAYER, *numbers_of(3), [True] * 4 + [False] * 2, "auto"),
        (leaf(X), *UNLINKED, *LAYER, *LAYER, *LAYER, *NO_LAYER, *numbers_of(3), [True] * 3 + [False] * 3, "auto"),
    ],
    "basic_block_backward": [
        (X, None, X, None, X, None, *LEFT, *LEFT, *NO_LEFT, *numbers_of(2)[1:], *FUSED_SOME, "auto"),
        (
            X,
            None,
            X,
            WORDS,
            None,
            WORDS,
            *LEFT,
            *LEFT,
            *LEFT,
            *numbers_of(3)[1:],
            [False] * 6,
            [False, True] * 5,
            "auto",
        ),
    ],
    "bottleneck_backward": [
        (
            X,
            BIAS[:4],
            X,
            WORDS,
            None,
            WORDS,
            *LEFT,
            *LEFT,
            *LEFT,
            *NO_LEFT,
            *numbers_of(3)[1:],
            [True] * 3 + [False] * 3,
        )
        + ([True] * 3 + [False] * 10, "auto")
    ],
    "conv_wgrad": [wants(X, Y, W.shape, False, *GEOMETRY), (NHWC, Y, W.shape, True, *IM2COL)],
    "conv_stats": [wants(X, W, BIAS, *GEOMETRY), (NHWC, W, None, *GEOMETRY), (NHWC, W, None, *IM2COL)],
    "conv_bn_act": [
        (*wants(X, W, BIAS), MEAN, VAR, WEIGHT, *wants(BIAS, Y), 1e-5, "relu", 0.0, None, *GEOMETRY),
        (NHWC, W, None, MEAN, VAR, None, None, None, 1e-5, "gelu", 0.0, None, *GEOMETRY),
        (NHWC, W, None, MEAN, VAR, None, None, None, 1e-5, "prelu", 0.0, BIAS, *GEOMETRY),
    ],
    "conv_bn_act_words": [
        (NHWC, W, BIAS, MEAN, VAR, WEIGHT, BIAS, Y, 1e-5, "relu", 0.0, None, *GEOMETRY),
        (NHWC, W, None, MEAN, VAR, None, None, None, 1e-5, "relu", 0.0, None, *IM2COL),
    ],
    "conv_bn_act_training": [
        (*wants(X, W, BIAS), None, None, True, 0.0, *wants(WEIGHT, BIAS, Y), 1e-5, "relu", 0.0, None, *GEOMETRY),
        (
            *wants(NHWC, W),
            None,
            MEAN.clone(),
            VAR.clone(),
            True,
            0.1,
            None,
            leaf(BIAS),
            None,
            1e-5,
            "silu",
            0.0,
            None,
            *GEOMETRY,
        ),
        (*wants(X, W), None, MEAN, VAR, False, 0.0, leaf(WEIGHT), None, None, 1e-5, None, 0.0, None, *IM2COL),
        (NHWC, W, BIAS, None, None, True, 0.0, WEIGHT, None, Y, 1e-5, "prelu", 0.0, BIAS, *GEOMETRY),
    ],
    "conv_bn_act_backward": [
        (Y, Y, None, MEAN, VAR, WEIGHT, BIAS, None, 1e-5, "relu", 0.0, True, X, W, None, *LAYOUT, [True] * 5 + [False])
        + GEOMETRY,
        (Y, None, Y, MEAN, VAR, None, None, None, 1e-5, "relu", 0.0, False, NHWC, None, None, *LAYOUT)
        + ([False, True, False, False, True, True], *GEOMETRY),
        (Y, None, None, None, None, None, None, None, 0.0, None, 0.0, False, None, W, None, *LAYOUT)
        + ([True, False, False, False, True, False], *IM2COL),
    ],
    "conv_bn_act_by_gram": [
        (*wants(HALF, WIDE, BIAS), MEAN.clone(), VAR.clone(), 0.1, *wants(WEIGHT, BIAS, HALF_Y), 1e-5, "relu", 0.0)
        + STRIDED,
        (*wants(HALF, WIDE), None, None, None, 0.1, None, None, None, 1e-5, None, 0.0, *STRIDED),
        (HALF, WIDE, None, None, None, 0.1, WEIGHT, BIAS, HALF_Y, 1e-5, "leaky_relu", 0.1, *STRIDED),
    ],
    "conv_bn_act_by_gram_backward": [
        (HALF_Y, HALF_Y, BIAS, "relu", 0.0, HALF, WIDE, *MATRICES, WEIGHT, 1e-5, [2, 1], [True] * 6),
        (HALF_Y, None, None, None, 0.0, HALF, WIDE, *MATRICES, None, 1e-5, [2, 1], [False, True] + [False] * 4),
    ],
    "gram_statistics": [(HALF, WIDE, BIAS, [2, 1], None), (HALF, WIDE, None, [1, 1], MEAN[:4].float())],
    "gram_gradients": [
        (HALF_Y, MEAN.float(), HALF, WIDE, *MATRICES, WEIGHT, 1e-5, [2, 1], [True, True]),
        (HALF_Y, MEAN.float(), HALF, WIDE, *MATRICES, None, 1e-5, [2, 1], [False, True]),
    ],
    "gram_gradients_below": [
        (TALL_Y, MEAN.float(), HALF, WIDE, *MATRICES, WEIGHT.float(), 1e-5, [1, 1], HALF, *BELOW, 1e-5, need)
        for need in (True, False)
    ],
    "apply_gradient_sums": [(Y, Y, MEAN, VAR, WEIGHT, 1e-5, MEAN, VAR), (Y, Y, MEAN, VAR, None, 1e-5, MEAN, VAR)],
    "activation_backward": [
        *((Y, Y, None, "relu", 0.0), (HALF_Y, HALF_Y, None, "leaky_relu", 0.1), (Y, None, None, None, 0.0)),
        (X, None, WORDS, "relu", 0.0),
    ],
    "conv_bn_act_pool_training": [
        (*wants(X, W, BIAS), None, None, 0.0, *wants(WEIGHT, BIAS), 1e-5, "relu", 0.0, *POOL, *GEOMETRY),
        (*wants(NHWC, W), None, MEAN.clone(), VAR.clone(), 0.1, None, leaf(BIAS), 1e-5, "leaky_relu", 0.1)
        + (*POOL, *GEOMETRY),
        (NHWC, W, BIAS, None, None, 0.0, leaf(WEIGHT), None, 1e-5, None, 0.0, *POOL, *IM2COL),
    ],
    "conv_bn_act_pool_backward": [
        (POOLED, TAPS_OF_Y, POOLED, Y, MEAN, VAR, WEIGHT, BIAS, 1e-5, "relu", 0.0, *POOL, X, W, *LAYOUT)
        + ([True] * 5, *GEOMETRY),
        (POOLED, None, POOLED, None, MEAN, VAR, None, BIAS, 1e-5, "relu6", 0.0, *POOL, None, None, *LAYOUT)
        + ([False, False, False, False, True], *GEOMETRY),
    ],
    "normalize_max_pool": [
        (Y, MEAN, VAR, WEIGHT, BIAS, 1e-5, "relu", 0.0, *POOL),
        (NHWC, MEAN[:4], VAR[:4], None, None, 1e-5, None, 0.0, *POOL),
        (arrange(Y, "transposed"), MEAN, VAR, None, BIAS, 1e-5, "leaky_relu", 0.1, *POOL),
    ],
    "normalize_max_pool_backward": [
        (POOLED, TAPS_OF_Y, POOLED, Y, MEAN, VAR, WEIGHT, BIAS, 1e-5, "relu", 0.0, *POOL, [True, True, True]),
        (POOLED, TAPS_OF_Y, POOLED, arrange(Y, "transposed"), MEAN, VAR, None, None, 1e-5, "relu", 0.0, *POOL)
        + ([True, False, False],),
        (POOLED, None, POOLED, None, MEAN, VAR, WEIGHT, BIAS, 1e-5, None, 0.0, *POOL, [False, True, True]),
    ],
    "conv_act": [
        (*wants(X, W, BIAS, Y), "relu", 0.0, None, *GEOMETRY),
        (*wants(X, W), None, leaf(Y), None, 0.0, None, *GEOMETRY),
        (NHWC, W, BIAS, None, "mish", 0.0, None, *IM2COL),
        (NHWC, W, None, Y, "prelu", 0.0, BIAS[:1], *GEOMETRY),
        (*wants(X[:0], W, BIAS, Y[:0]), "relu", 0.0, None, *GEOMETRY),
    ],
    "normalize_words": [
        (Y, MEAN, VAR, WEIGHT, BIAS, Y, 1e-5, "relu", 0.0, None, True),
        (NHWC, MEAN[:4], VAR[:4], None, None, None, 1e-5, "relu", 0.0, None, True),
    ],
    "normalize_mean": [
        (arrange(Y, "transposed"), MEAN, VAR, WEIGHT, BIAS, 1e-5, "relu", 0.0),
        (HALF, MEAN[:4].float(), VAR[:4].float(), None, None, 1e-5, "silu", 0.0),
    ],
    "normalize": [
        (leaf(Y), MEAN, VAR, *wants(WEIGHT, BIAS, Y), 1e-5, "silu", 0.0, None, True),
        (leaf(Y), MEAN, VAR, *wants(WEIGHT, BIAS), None, 1e-5, "relu", 0.0, None, False),
        (leaf(Y), MEAN, VAR, *wants(WEIGHT, BIAS), None, 1e-5, "leaky_relu", 0.1, None, True),
        (arrange(Y, "transposed"), MEAN, VAR, None, None, None, 1e-5, None, 0.0, None, False),
        (normal(3, 6), MEAN, VAR, None, None, None, 1e-5, None, 0.0, None, True),
        (NHWC, MEAN[:4], VAR[:4], None, None, None, 1e-5, "prelu", 0.0, BIAS[:4], False),
        (leaf(Y), None, None, None, *wants(BIAS, Y), 0.0, "gelu", 0.0, None, False),
        (leaf(NHWC), None, None, None, None, None, 0.0, "relu", 0.0, None, False),
    ],
    "normalize_backward": [
        (Y, Y, None, MEAN, VAR, WEIGHT, BIAS, Y, 1e-5, "gelu", 0.0, True, [True, True, True, True]),
        (Y, None, Y, MEAN, VAR, None, None, None, 1e-5, "relu", 0.0, False, [True, False, True, True]),
        (Y, None, Y, None, None, None, None, None, 0.0, "relu", 0.0, False, [True, False, True, True]),
        (Y, Y, None, None, None, None, BIAS, Y, 0.0, "mish", 0.0, False, [True, False, True, False]),
        (Y, Y, None, MEAN, VAR, WEIGHT, BIAS, None, 1e-5, "relu6", 0.0, True, [True, True, True, False]),
        (
            Y,
            arrange(Y, "transposed"),
            Y,
            MEAN,
            VAR,
            WEIGHT,
            None,
            None,
            1e-5,
            "relu",
            0.0,
            True,
            [True, True, True, True],
        ),
    ],
    "channel_sum": [wants(Y), (normal(3, 6),)],
    "batch_moments": [(Y,), (Y.float(),)],
    "update_running": [(MEAN.clone(), VAR.clone(), MEAN, VAR, 0.1, 20)],
    "combine_ranks": [(TOLD, MEAN.clone(), VAR.clone(), 0.1), (TOLD.float(), None, None, 0.1)],
    "gradient_sums": [
        (Y, Y, None, MEAN, VAR, WEIGHT, BIAS, Y, 1e-5, "gelu", 0.0),
        (arrange(Y, "transposed"), Y, Y, MEAN, VAR, None, None, None, 1e-5, "relu", 0.0),
    ],
    "apply_sums": [
        (Y, Y, None, MEAN, VAR, COUNT, WEIGHT, BIAS, Y, SUMS, 1e-5, "gelu", 0.0, [True, True]),
        (Y, arrange(Y, "transposed"), Y, MEAN, VAR, COUNT, None, None, None, SUMS, 1e-5, "relu", 0.0, [True, False]),
    ],
    "augment": [
        (PICTURES, None, None, None, None, None, None, None, *AUGMENTED),
        (PICTURES.permute(0, 3, 1, 2), None, None, *NUMBERS, *AUGMENTED),
        (PICTURES.flatten(), OFFSETS, SIZES, *NUMBERS, *AUGMENTED),
    ],
    "max_pool": [wants(X, True, *WINDOW), (NHWC, False, *WINDOW), wants(NHWC, False, *WINDOW)],
    "max_pool_indices": [(TAPS, X.shape, *WINDOW)],
    "max_pool_backward": [wants(normal(2, 4, 3, 3), TAPS, X.shape, True, *WINDOW)],
    "avg_pool": [wants(X, *AVERAGE), (NHWC, *AVERAGE)],
    "avg_pool_backward": [wants(normal(2, 4, 3, 3), X.shape, True, *AVERAGE)],
    "global_avg_pool": [wants(X), (NHWC,)],
    "adaptive_avg_pool": [wants(X, [3, 2]), (NHWC, [7, 1])],
    "adaptive_avg_pool_backward": [wants(normal(2, 4, 3, 6), X.shape, True), wants(normal(2, 4, 1, 1), X.shape, False)],
}


def test_every_operator_has_samples():
    assert {name.split("::")[1].split(".")[0] for name in LIBRARY._op_defs} == set(SAMPLES)


@pytest.mark.parametrize(("name", "sample"), [(n, i) for n, samples in SAMPLES.items() for i in range(len(samples))])
def test_opcheck(name, sample, device):
    """Schema, fake, autograd registration, and tracing with dynamic shapes."""
    arguments = [
        a.to(device).detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
        for a in SAMPLES[name][sample]
    ]
    torch.library.opcheck(getattr(torch.ops.cnnfast, name), tuple(arguments))


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values well apart: no maximum changes within gradcheck's step."""
    n = torch.Size(shape).numel()
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).double().view(shape).div(n).sub(0.4)


SMALL = image(2, 2, 4, 3)
STATS, ONE = (MEAN[:2].clone(), VAR[:2].clone()), image(2, 2, 1, 1, seed=1)
DIFFERENTIABLE = {
    "conv2d": (lambda x, w, b: ours.conv2d(x, w, b, 1, (1, 0), groups=2), [SMALL, image(2, 1, 3, 2, seed=1), BIAS[:2]]),
    "conv2d im2col": (
        lambda x, w: ours.conv2d(x, w, None, 1, (0, 1), algorithm="im2col"),
        [SMALL, image(2, 2, 2, 2, seed=1)],
    ),
    "conv2d same": (lambda x, w: ours.conv2d(x, w, None, 1, "same", (2, 1)), [SMALL, image(1, 2, 2, 2, seed=1)]),
    "conv1d": (
        lambda x, w, b: ours.conv1d(x, w, b, 2, 1, groups=2),
        [SMALL.flatten(2), image(2, 1, 3, seed=1), BIAS[:2]],
    ),
    "conv1d channels apart": (lambda x, w: ours.conv1d(x.transpose(1, 2), w), [image(2, 4, 3), image(2, 3, 2, seed=1)]),
    "conv_transpose2d": (
        lambda x, w, b: ours.conv_transpose2d(x, w, b, 2, 1, 1, groups=2),
        [SMALL, image(2, 2, 3, 2, seed=1), BIAS[:4]],
    ),
    "conv_bn_act training relu": (
        lambda x, w, g: ours.conv_bn_act(x, w, None, None, g, BIAS[:2].to(x), training=True),
        [SMALL, image(2, 2, 1, 1, seed=1), WEIGHT[:2]],
    ),
    "conv_bn_act training gelu": (
        # a bias without a weight: PyTorch's own batch_norm has a wrong second derivative here
        lambda x, b, r: ours.conv_bn_act(
            x, ONE.to(x), None, None, None, b, residual=r, training=True, activation="gelu"
        ),
        [SMALL, BIAS[:2], image(2, 2, 4, 3, seed=2)],
    ),
    "conv_bn_act eval": (
        lambda x, w, g: ours.conv_bn_act(x, w, *(t.to(x) for t in STATS), g, BIAS[:2].to(x), activation="leaky_relu"),
        [SMALL, image(2, 2, 1, 1, seed=1), WEIGHT[:2]],
    ),
    "conv_bn_act frozen": (
        # 15: below zero, between and above six
        lambda x, w, b, r: ours.conv_bn_act(
            x, w, *(t.to(x) for t in STATS), WEIGHT[:2].to(x), b, residual=15 * r, activation="relu6"
        ),
        [SMALL, image(2, 2, 1, 1, seed=1), BIAS[:2], image(2, 2, 4, 3, seed=2)],
    ),
    "conv_act": (
        lambda x, w, b, r: ours.conv_act(x, w, b, 1, (0, 1), residual=9 * r, activation="relu6"),
        [SMALL, image(2, 2, 1, 3, seed=1), BIAS[:2], image(2, 2, 4, 3, seed=2)],
    ),
    "conv_act without activation": (
        lambda x, w, b, r: ours.conv_act(x, w, b, residual=r, activation=None),
        [SMALL, image(2, 2, 1, 1, seed=1), BIAS[:2], image(2, 2, 4, 3, seed=2)],
    ),
    "conv_act mish": (
        lambda x, w, b, r: ours.conv_act(x, w, b, groups=2, residual=r, activation="mish"),
        [SMALL, image(2, 1, 1, 1, seed=1), BIAS[:2], image(2, 2, 4, 3, seed=2)],
    ),
    "conv_act prelu": (
        lambda x, w, s: ours.conv_act(x, w, activation="prelu", activation_arg=s),
        [SMALL, image(2, 2, 1, 1, seed=1), BIAS[:1]],
    ),
    "bn_act training": (
        lambda x, w, b, r: ours.bn_act(x, None, None, w, b, True, residual=r, activation="silu"),
        [SMALL, WEIGHT[:2], BIAS[:2], image(2, 2, 4, 3, seed=2)],
    ),
    "bn_act eval": (
        lambda x, w, b: ours.bn_act(x, *(t.to(x) for t in STATS), w, b, activation="leaky_relu"),
        [SMALL, WEIGHT[:2], BIAS[:2]],
    ),
    "batch_norm training": (lambda x, w, b: ours.batch_norm(x, None, None, w, b, True), [SMALL, WEIGHT[:2], BIAS[:2]]),
    "batch_norm eval": (
        lambda x, w, b: ours.batch_norm(x, *(t.to(x) for t in STATS), w, b),
        [SMALL, WEIGHT[:2], BIAS[:2]],
    ),
    "max_pool2d": (lambda x: ours.max_pool2d(x, 2, 1, 1), [SMALL]),
    "avg_pool2d": (lambda x: ours.avg_pool2d(x, 2, 1, 1, count_include_pad=False), [SMALL]),
    "global_avg_pool2d": (ours.global_avg_pool2d, [SMALL]),
    "adaptive_avg_pool2d": (lambda x: ours.adaptive_avg_pool2d(x, (3, 5)), [SMALL]),
    "adaptive_avg_pool2d of planes": (lambda x: ours.adaptive_avg_pool2d(x, 1), [SMALL]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_both_orders(name, device):
    function, inputs = DIFFERENTIABLE[name]
    inputs = [leaf(t.to(device)) for t in inputs]
    with cnnfast.backend("kernels"):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_to_be_differentiated_again_is_the_same(name, device):
    """It may be computed by other code, of which gradgradcheck only asks that its derivative be its own."""
    function, inputs = DIFFERENTIABLE[name]
    inputs = [leaf(t.to(device)) for t in inputs]
    y = function(*inputs)
    dy = normal(*y.shape, seed=9).to(y)
    once, again = (torch.autograd.grad(y, inputs, dy, retain_graph=True, create_graph=more) for more in (False, True))
    torch.testing.assert_close(again, once, rtol=1e-12, atol=1e-12)


THIRD = {
    "conv2d": lambda f, x, w: f.conv2d(x, w, None, (2, 1), 1, (1, 2)),
    "conv2d depthwise": lambda f, x, w: f.conv2d(x, w[:2, :1], None, 1, 1, 1, 2),
    "conv1d": lambda f, x, w: f.conv1d(x[..., 0], w[..., 0], None, 2, 1),
    "conv_transpose2d": lambda f, x, w: f.conv_transpose2d(x, w, None, 1, (1, 0)),
}


@pytest.mark.parametrize("name", THIRD)
def test_third_derivatives(name, device):
    """Of convolutions, by our kernels: PyTorch's numbers."""
    results = []
    for f in (ours, theirs):
        x, w = leaf(image(2, 2, 4, 3).to(device)), leaf(image(2, 2, 3, 2, seed=1).to(device))
        with cnnfast.trace() as trace:
            found = [THIRD[name](f, x, w).pow(3).sum()]
            for order in (1, 2, 3):
                found += torch.autograd.grad(found[-1], (x, w), create_graph=order < 3)
                found.append(found[-1].pow(2).sum() + found[-2].pow(2).sum())
        results.append(found)
        assert {call.served_by for call in trace} == ({"kernels"} if f is ours else set())
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def net(f, x, w, v, running, g, b):
    """Every operation once; `f` is cnnfast.functional or the same in PyTorch."""
    z = f.conv_act(block(f, x, w, running, g, b), v, None, padding=1, activation="relu")
    y = f.conv_act(z, v[:, :1].repeat(1, 5, 1, 1), b[:1].expand(5), padding=1, residual=z, activation="mish")
    y = f.conv2d(f.bn_act(y, None, None, residual=z, training=True, activation="silu"), v[:, :1], None, 1, 1, 1, 5)
    y = f.batch_norm(f.avg_pool2d(y, 2), None, None, None, None, True)
    return f.global_avg_pool2d(y * y * y)


def block(f, x, w, running, g, b):
    y = f.conv_bn_act(x, w, *running, g, b, activation="relu", training=True, padding=1)
    return f.max_pool2d(y, 3, 2, 1)


class PyTorch:
    """What cnnfast.functional adds to torch.nn.functional, in its terms."""

    conv1d, conv2d, conv_transpose2d = theirs.conv1d, theirs.conv2d, theirs.conv_transpose2d
    max_pool2d, avg_pool2d, adaptive_avg_pool2d = theirs.max_pool2d, theirs.avg_pool2d, theirs.adaptive_avg_pool2d
    batch_norm = theirs.batch_norm

    @staticmethod
    def conv_bn_act(x, w, mean=None, var=None, g=None, b=None, activation="relu", training=False, **geometry):
        y = theirs.batch_norm(theirs.conv2d(x, w, **geometry), mean, var, g, b, training)
        return theirs.relu(y)

    @staticmethod
    def conv_act(x, w, bias=None, residual=None, activation="relu", **geometry):
        y = theirs.conv2d(x, w, bias, **geometry)
        return getattr(theirs, activation)(y if residual is None else y + residual)

    @staticmethod
    def bn_act(x, mean, var, residual=None, activation="relu", **options):
        y = theirs.batch_norm(x, mean, var, **options)
        return getattr(theirs, activation)(y if residual is None else y + residual)

    @staticmethod
    def global_avg_pool2d(x):
        return x.mean((2, 3), keepdim=True)


def net_inputs(device, n=2, size=8, dtype=torch.float64):
    """Channels, filters and sizes differ: torch.compile takes equal ones for the same thing."""
    shapes = (n, 3, size, size + 1), (4, 3, 3, 3), (5, 4, 3, 3)
    x, w, v = (normal(*shape, seed=i, dtype=dtype).to(device) for i, shape in enumerate(shapes))
    running = [torch.zeros(4, dtype=dtype, device=device), torch.ones(4, dtype=dtype, device=device)]
    return leaf(x), leaf(w), leaf(v), running, leaf(MEAN[:4].to(device, dtype)), leaf(VAR[:4].to(device, dtype))


def outcome(function, inputs):
    y = function(*inputs)
    return [y, *torch.autograd.grad(y.square().sum(), [t for t in inputs if isinstance(t, torch.Tensor)]), *inputs[3]]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, device):
    """One graph, forward and backward; with dynamic shapes one compilation serves all sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = (lambda f, x, w, v, *rest: block(f, x, w, *rest) * v.sum()) if dynamic else net
    compiled = torch.compile(lambda *inputs: run(ours, *inputs), fullgraph=True, backend=counter, dynamic=dynamic)
    compilations = []
    for n, size in ((2, 8), (6, 10), (7, 5)) if dynamic else ((2, 8),):
        with cnnfast.trace() as trace:
            mine = outcome(compiled, net_inputs(device, n, size))
        torch.testing.assert_close(mine, outcome(lambda *i: run(PyTorch, *i), net_inputs(device, n, size)))
        assert {call.served_by for call in trace} == {"kernels"}
        assert {"conv_dgrad", "conv_wgrad", "normalize_backward", "max_pool_backward"} <= {
            call.operation for call in trace
        }
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * len(compilations)


FILTERS = normal(5, 4, 1, 2, dtype=torch.float32)


def sized(f, x):
    """Arguments that are sizes, and outputs whose sizes follow."""
    H, W = x.shape[2:]
    yield f.conv2d(x, FILTERS.to(x), None, 1, (H % 6, 1))
    yield f.batch_norm(x, None, None, MEAN[:4].to(x), VAR[:4].to(x), True)
    yield f.avg_pool2d(x, 2, 1)
    yield from (f.adaptive_avg_pool2d(x, size) for size in ((2, None), (H, 1), W // 4, 1))


def test_sizes_that_change_compile_once(device):
    """As with PyTorch's functions; sizes of windows are the only ones fixed, by both."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: list(sized(ours, x)), fullgraph=True, backend=counter, dynamic=True)
    for shape in ((3, 4, 8, 9), (6, 4, 9, 12), (2, 4, 11, 13)):
        x = normal(*shape, dtype=torch.float32).to(device)
        torch.testing.assert_close(compiled(x), list(sized(theirs, x)), rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1


def test_compile_frozen_batch_norm(device):
    """Its bias wants a gradient, its weight does not: the fused kernel's own backward, compiled."""
    torch._dynamo.reset()

    def fused(x, w, mean, var, b, r):
        return ours.conv_bn_act(x, w, mean, var, None, b, residual=r, activation="relu6")

    inputs = leaf(X), leaf(normal(6, 4, 1, 1)), MEAN, VAR, leaf(BIAS), leaf(normal(2, 6, 5, 4))
    inputs = [t.to(device).detach().requires_grad_(t.requires_grad) for t in inputs]
    results = []
    for function in (torch.compile(fused, fullgraph=True, backend="aot_eager"), fused):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y.sum(), [t for t in inputs if t.requires_grad])])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [False, True], ids=["inference", "gradients"])
def test_compile_prelu(wanted, device):
    """One kernel, or two and PyTorch's prelu, compiled as they are called."""
    torch._dynamo.reset()

    def fused(x, w, s):
        return ours.conv_act(x, w, activation="prelu", activation_arg=s)

    inputs = [t.to(device).requires_grad_(wanted) for t in (X.clone(), normal(6, 4, 1, 1), BIAS.clone())]
    results = []
    for function in (torch.compile(fused, fullgraph=True, backend="aot_eager"), fused):
        with cnnfast.trace() as trace:
            y = function(*inputs)
        results.append([y, *(torch.autograd.grad(y.sum(), inputs) if wanted else ())])
        assert [call.operation for call in trace] == (["conv_fprop"] if wanted else ["conv_act"])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_inductor(device):
    torch._dynamo.reset()

    def small(x, w):
        return ours.conv2d(x, w, padding=1).relu() + 1

    x, w = leaf(integers(1, 2, 4, 4).to(device)), leaf(integers(3, 2, 3, 3).to(device))
    results = []
    for function in (torch.compile(small, fullgraph=True), small):
        y = function(x, w)
        results.append([y, *torch.autograd.grad(y.sum(), (x, w))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Module(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        return ours.max_pool2d(ours.conv2d(x, self.weight, padding=1), 2)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device):
    """The exported program holds our operators, and takes any batch."""
    module = Module(integers(3, 2, 3, 3).to(device))
    x = integers(2, 2, 4, 4).to(device)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},), strict=strict
    )
    assert "cnnfast.conv_fprop" in str(program.graph)
    x = integers(3, 2, 4, 4, seed=4).to(device)
    assert torch.equal(program.module()(x), module(x))


def test_symbolic_trace(device):
    """torch.fx sees one call of each function, as of PyTorch's."""
    module = Module(integers(3, 2, 3, 3).to(device))
    traced = torch.fx.symbolic_trace(module)
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [ours.conv2d, ours.max_pool2d]
    x = integers(2, 2, 4, 4).to(device)
    assert torch.equal(traced(x), module(x))


class Logged(torch.Tensor):
    """Writes down what is called with it."""

    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclass(device):
    """Its __torch_function__ is asked once, with our function, whichever argument it is; the result is of its class."""
    x, w = integers(2, 2, 4, 4).to(device), integers(3, 2, 3, 3).to(device)
    for call in (lambda: ours.conv2d(x.as_subclass(Logged), w), lambda: ours.conv2d(x, weight=w.as_subclass(Logged))):
        Logged.calls.clear()
        y = call()
        assert type(y) is Logged
        assert Logged.calls == [ours.conv2d]
        assert torch.equal(y.as_subclass(torch.Tensor), ours.conv2d(x, w))


def test_tensor_that_wraps_others(device):
    """Such a class, DTensor for one, knows PyTorch's operators and not ours."""
    x, w = integers(2, 2, 4, 4).to(device), integers(3, 2, 3, 3).to(device)
    with cnnfast.trace() as trace:
        y = ours.conv2d(TwoTensor(x, 2 * x), TwoTensor(w, w.clone()))
    assert torch.equal(y.b, theirs.conv2d(2 * x, w))
    assert [(call.served_by, call.reason) for call in trace] == [("torch", "the tensor wraps others")]


V = normal(6, 4, 3, 3)
FLOPS = {
    "conv2d": lambda f, x, w: f.conv2d(x, w, None, 2, 1),
    "conv1d": lambda f, x, w: f.conv1d(x[..., 0], w[..., 0], padding="same"),
    "conv_transpose2d": lambda f, x, w: f.conv_transpose2d(x, w[:4], None, 2, 1, 1),
    "conv_bn_act": lambda f, x, w: f.conv_bn_act(x, w, training=True),
    "conv_bn_act eval": lambda f, x, w: f.conv_bn_act(x, w, MEAN.to(x), VAR.to(x)),
    "conv_act": lambda f, x, w: f.conv_act(x, w),
    "conv_act gelu": lambda f, x, w: f.conv_act(x, w, activation="gelu"),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops(name, device):
    """torch.utils.flop_counter counts of our operators, forward and backward, what it counts of PyTorch's.

    Not so with groups: of a weight's gradient it then counts as many times too many operations as there are groups.
    """
    counts = []
    for f in (ours, PyTorch):
        x, w = leaf(X.to(device)), leaf(V.to(device))
        with FlopCounterMode(display=False) as counter:
            FLOPS[name](f, x, w).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
