"""What the two operators of augmentation have in common, cnnfast::augment and cnnfast::augment_plain: their arguments,
their fake, and the values of numbers, checked. Shapes and dtypes have been checked before (functional/augmentation.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_PIXELS = 2**20  # along an axis of an image or of a result: pixels are then told apart in float32
MOST_ELEMENTS = 2**31  # of an image or of a result: their positions in memory are counted in 32 bits
# Of the operators: what F.augment takes, in its terms, C numbers for each of mean, std and fill.
ARGUMENTS = (
    "Tensor images, Tensor? offsets, Tensor? sizes, Tensor? maps, Tensor? colours, Tensor? boxes, Tensor? noise,"
    " Tensor? partners, SymInt[2] size, float[] mean, float[] std, float[] fill, bool reflect, ScalarType dtype"
)


def fake(images: Tensor, offsets: Tensor | None, *others: Any) -> Tensor:
    """The result of one of the operators, [N, C, P, Q] in channels_last, without its values."""
    size, mean, dtype = others[6], others[7], others[-1]
    N = images.shape[0] if offsets is None else offsets.shape[0]
    shape = (N, len(mean), *size)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


class GivenNumbers(NamedTuple):
    """The numbers of each image, as F.augment takes them; None: nothing of that kind is done."""

    maps: Tensor | None
    colours: Tensor | None
    boxes: Tensor | None
    noise: Tensor | None
    partners: Tensor | None


def check_numbers(numbers: GivenNumbers, P: int, Q: int) -> None:
    """Raises ValueError if a number has no meaning for results of P x Q pixels; all of them lie on the CPU."""
    maps, colours, boxes, _, partners = numbers
    if maps is not None:
        _check("maps", maps, maps.isfinite(), "finite")
    if colours is not None:
        _check_colours(colours)
    if boxes is not None:
        _check_boxes("boxes", boxes[..., :4], P, Q)
        _check("boxes", boxes[..., 4:], boxes[..., 4:].isfinite(), "finite where they are values to fill a box with")
    if partners is not None:
        _check_partners(partners, P, Q)


def _check(name: str, values: Tensor, right: Tensor, rule: str) -> None:
    """Raises ValueError unless all of `right` is true; its first extent counts the images."""
    if bool(right.all()):
        return
    n = int(right.reshape(len(values), -1).all(1).logical_not().nonzero()[0])
    raise ValueError(f"augment(): {name} must be {rule}, but got {name}[{n}] = {_shown(values[n])}")


def _shown(values: Tensor) -> str:
    listed = str([round(v, 6) for v in values.flatten().tolist()])
    return listed if len(listed) <= 200 else f"{listed[:200]}..."


def _check_colours(colours: Tensor) -> None:
    # The comparisons are false for what is no number.
    factors, hue, grey = colours[:, :3], colours[:, 3], colours[:, 4]
    right = ((factors >= 0) & factors.isfinite()).all(1)
    _check("colours", colours, right, "factors of brightness, contrast and saturation that are finite and not negative")
    _check("colours", colours, hue.abs() <= 0.5, "shifts of hue within [-0.5, 0.5] turns at position 3")
    _check("colours", colours, (grey == 0) | (grey == 1), "0 or 1, which says grey, at position 4")


def _check_boxes(name: str, boxes: Tensor, P: int, Q: int) -> None:
    left, top, right, bottom = boxes.unbind(-1)
    ordered = (left >= 0) & (left <= right) & (right <= Q) & (top >= 0) & (top <= bottom) & (bottom <= P)
    rule = f"left <= right within [0, {Q}] and top <= bottom within [0, {P}], in the order left, top, right, bottom"
    _check(name, boxes, ordered, rule)


def _check_partners(partners: Tensor, P: int, Q: int) -> None:
    index, weight, N = partners[:, 0], partners[:, 1], len(partners)
    whole = (index >= 0) & (index < N) & (index == index.floor())
    _check("partners", partners, whole, f"the index of an image of the batch, 0 to {N - 1}, at position 0")
    _check("partners", partners, (weight >= 0) & (weight <= 1), "weights within [0, 1] at position 1")
    _check_boxes("partners", partners[:, 2:], P, Q)


def read_extents(length: int, offsets: Tensor, sizes: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Offsets (int64 [N]) and sizes (int32 [N, 2]) on the CPU of images of C channels in a buffer of `length` elements:
    read back if they lie on a GPU, which waits for it. Raises ValueError if an image does not lie in the buffer.
    """
    offsets, sizes = offsets.cpu(), sizes.cpu().to(torch.int64)
    _check("offsets", offsets, offsets >= 0, "not negative")
    _check("sizes", sizes, (sizes > 0) & (sizes < MOST_PIXELS), f"positive and less than {MOST_PIXELS}")
    elements = sizes[:, 0] * sizes[:, 1] * C
    _check("sizes", sizes, elements < MOST_ELEMENTS, f"those of images with fewer than {MOST_ELEMENTS} elements")
    inside = offsets <= length - elements
    if not bool(inside.all()):
        n = int(inside.logical_not().nonzero()[0])
        raise ValueError(
            f"augment(): the buffer of images is too short: image {n} of size {sizes[n].tolist()} with {C} channels "
            f"takes {int(elements[n])} elements from {int(offsets[n])} on, but the buffer has {length}"
        )
    return offsets, sizes.to(torch.int32)


def whole_maps(sizes: Tensor, P: int, Q: int) -> Tensor:
    """float32 [N, 2, 3], on the CPU as sizes [N, 2] of (H, W) are: each whole image is resized to P x Q."""
    maps = torch.zeros(len(sizes), 2, 3)
    maps[:, 0, 0], maps[:, 1, 1] = sizes[:, 1] / Q, sizes[:, 0] / P
    return maps
