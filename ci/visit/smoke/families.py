"""The families of kernels, and the trials of each: a small problem and a ragged one at least.

A family is run in a process of its own. A test holds that every kernel of the package belongs to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .augmentation import everything, everything_grey
from .convolutions import (
    BODY,
    BOXES,
    DEPTHWISE,
    GENERAL,
    ONE_ROW,
    RAGGED,
    STEM,
    ChooseTile,
    SmokeConvolution,
    box_tile,
    dgrad,
    fprop,
    gather_tile,
    im2col,
    joined,
    packed_tile,
    row_tile,
    split_tile,
    stats,
    wgrad,
)
from .passes import PLANES, average, bits, gram, max_pool, moments, normalised_max_pool, normalize, plane_mean, ranks
from .trial import HALF, LAST, NCHW, SINGLE, SmokeTrial


@dataclass(frozen=True)
class Family:
    """`kernels` are the names of those that the trials launch and that no other family answers for."""

    kernels: tuple[str, ...]
    trials: tuple[SmokeTrial, ...]
    tensor_maps: bool = False


def of_all(
    trial: Callable[..., SmokeTrial], convolutions: tuple[SmokeConvolution, ...], tile: ChooseTile
) -> tuple[SmokeTrial, ...]:
    return tuple(map(partial(trial, tile=tile), convolutions))


FAMILIES: dict[str, Family] = {
    "fprop": Family(
        ("conv_fprop_kernel",),
        (*of_all(fprop, GENERAL, gather_tile), stats(BODY, gather_tile), joined(ONE_ROW, gather_tile)),
    ),
    "dgrad": Family(("conv_dgrad_kernel",), of_all(dgrad, GENERAL, gather_tile)),
    "wgrad": Family(
        ("conv_wgrad_kernel", "conv_wgrad_reduce_kernel"),
        (*of_all(wgrad, GENERAL, split_tile), wgrad(BODY, gather_tile)),
    ),
    "im2col": Family(("im2col_kernel", "col2im_kernel"), (im2col(BODY), im2col(RAGGED))),
    "depthwise-fprop": Family(
        ("depthwise_fprop_kernel",), (*of_all(fprop, DEPTHWISE, gather_tile), stats(DEPTHWISE[0], gather_tile))
    ),
    "depthwise-dgrad": Family(("depthwise_dgrad_kernel",), of_all(dgrad, DEPTHWISE, gather_tile)),
    "depthwise-wgrad": Family(("depthwise_wgrad_kernel",), of_all(wgrad, DEPTHWISE, gather_tile)),
    "tma-fprop": Family(
        ("tma_fprop_kernel",),
        (*of_all(fprop, BOXES, box_tile), stats(BODY, box_tile), joined(ONE_ROW, row_tile)),
        tensor_maps=True,
    ),
    "tma-dgrad": Family(("tma_dgrad_kernel",), of_all(dgrad, BOXES, box_tile), tensor_maps=True),
    "tma-wgrad": Family(("tma_wgrad_kernel",), of_all(wgrad, BOXES, box_tile), tensor_maps=True),
    "stem": Family(
        ("pack_pixels_kernel",), (*of_all(fprop, STEM, packed_tile), *of_all(wgrad, STEM, packed_tile))
    ),
    "tma-stem": Family(
        (), (*of_all(fprop, STEM, box_tile), *of_all(wgrad, STEM, box_tile)), tensor_maps=True
    ),
    "moments": Family(
        ("batch_moments_kernel", "combine_kernel", "update_running_kernel"),
        (*(moments(*planes) for planes in PLANES), moments((64, 8, 64, 64), HALF, LAST)),
    ),
    "ranks": Family(("combine_ranks_kernel",), (ranks((8, 24, 32), 32), ranks((24, 0, 40), 17))),
    "normalize": Family(("normalize_kernel",), tuple(normalize(*planes, gradients=False) for planes in PLANES)),
    "normalize-gradients": Family(
        ("gradient_sums_kernel", "normalize_backward_kernel"),
        tuple(normalize(*planes, gradients=True) for planes in PLANES),
    ),
    "bits": Family(("masked_gradient_kernel",), tuple(bits(*planes) for planes in PLANES)),
    "gram": Family(
        ("gram_statistics_kernel", "gram_weight_gradient_kernel", "gram_own_kernel"),
        (gram((4, 32, 8, 8), 128, 1, HALF), gram((3, 24, 9, 7), 40, 2, HALF)),
    ),
    "norm-max-pool": Family(
        ("normalised_max_pool_kernel", "normalised_max_pool_backward_kernel"),
        (
            normalised_max_pool((2, 32, 8, 8), 2, 2, 0, HALF, LAST),
            normalised_max_pool((3, 17, 9, 11), 3, 2, 1, SINGLE, NCHW),
        ),
    ),
    "max-pool": Family(
        ("max_pool_kernel", "max_pool_indices_kernel", "max_pool_backward_kernel"),
        (max_pool((2, 32, 8, 8), 2, 2, 0, HALF, LAST), max_pool((3, 17, 9, 11), 3, 2, 1, SINGLE, NCHW)),
    ),
    "average-pool": Family(
        ("avg_pool_kernel", "avg_pool_backward_kernel"),
        (average((2, 32, 8, 8), 2, 2, 0, HALF, LAST), average((3, 17, 6, 10), 3, 2, 1, SINGLE, NCHW)),
    ),
    "augmentation": Family(
        ("augment_kernel", "grey_mean_kernel"),
        (everything_grey((4, 1, 16, 32)), everything((3, 3, 40, 28)), everything((2, 3, 24, 24), different_sizes=True)),
    ),
    "global-pool": Family(
        ("plane_mean_kernel",),
        # the second is cut into parts
        (plane_mean((2, 32, 8, 8), HALF, LAST), plane_mean((1, 17, 128, 128), SINGLE, NCHW)),
    ),
}  # fmt: skip
