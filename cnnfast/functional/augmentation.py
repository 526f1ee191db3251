"""Augmentation of a batch of images by explicit numbers: what it takes, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, prod
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..dispatch import why_torch
from ..dtypes import argument
from ..image_numbers import MOST_ELEMENTS, MOST_PIXELS, GivenNumbers
from ..recording import record_torch
from ..spelling import unknown_value
from .arguments import as_float
from .entrance import operation
from .operators import ops
from .plain_augmentation import augment_plain

Border = Literal["constant", "reflection"]
BORDERS: tuple[Border, ...] = get_args(Border)
# What other libraries call them, as spelling.py folds words.
OTHER_BORDERS: dict[str, Border] = {
    **dict.fromkeys(("zeros", "fill"), "constant"),
    **dict.fromkeys(("reflect", "mirror", "symmetric"), "reflection"),
}
IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
RESULT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_IMAGES = 2**24  # whose indices float32 tells apart


class GivenImages(NamedTuple):
    """The images of a batch: [N, C, H, W]; or a flat buffer, and where in it they lie."""

    images: Tensor
    offsets: Tensor | None
    sizes: Tensor | None
    N: Any
    C: int


@operation
def augment(
    images: Tensor | tuple[Tensor, Tensor, Tensor],
    maps: Tensor | None = None,
    colours: Tensor | None = None,
    boxes: Tensor | None = None,
    partners: Tensor | None = None,
    *,
    size: int | Sequence[int],
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: torch.dtype | str = torch.float32,
    border: Border = "constant",
    fill: float | Sequence[float] = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """A batch of images, each augmented as its numbers say, and normalised: [N, C, P, Q] of `dtype`, channels_last.

    images: [N, C, H, W] or [N, H, W, C] with C 1 or 3 (a second extent of 1 or 3 is C), any strides, uint8 (which is
        divided by 255) or float16, bfloat16 or float32 of values within [0, 1]; or, of different sizes, (flat uint8
        buffer, offsets int64 [N], sizes int [N, 2] of (H, W)), image n being [H, W, C] from flat[offsets[n]] on, as
        pack_images makes them. C is then the length of `mean`.
    maps: float32 [N, 2, 3], which take a position (x, y) of the result to (m00 x + m01 y + m02, m10 x + m11 y + m12) in
        the image, where the value is bilinear. Pixel (p, q) covers [q, q + 1) x [p, p + 1). None: each whole image is
        resized.
    colours: float32 [N, 5]: factors of brightness, contrast and saturation, the shift of hue in turns (-0.5 to 0.5),
        and 1 for grey or 0, as torchvision's functions have them, in this order.
    boxes: float32 [N, B, 4 + C]: left, top, right, bottom in pixels of the result, and the value of each channel that
        fills the box. Later boxes lie over earlier ones.
    partners: float32 [N, 6]: the index of another image of the batch, the weight of this one (the other's is 1 -
        weight), and left, top, right, bottom of a box in which only the other is seen. mixup has an empty box, cutmix
        the weight 1.
    size: P and Q, or one number for both. mean, std: of each channel, or one for all; a result is (v - mean) / std.
    dtype: float16, bfloat16 or float32, or the name of one. border: "constant", where `fill` (of each channel or one
        for all, within [0, 1]) lies beyond an image, or "reflection".
    noise: int64 [N], seeds; boxes, then [N, B, 4], are filled with normal noise of the normalised image.

    Steps are taken in the order of the arguments: map, colours, boxes, partner, normalisation. There is no gradient.
    Numbers lie on the CPU, where they are checked by value and copied together to the device of the images, or there,
    where the kernel takes them unread and stays inside memory whatever they are. offsets and sizes are always read, and
    where PyTorch serves all numbers are.
    Raises TypeError and ValueError for arguments of another kind, shape or value, and RuntimeError where numbers on the
    CPU would be part of a CUDA graph.
    """
    given = _given_images(images, mean)
    numbers = GivenNumbers(maps, colours, boxes, noise, partners)
    _check_numbers(given, numbers)
    P, Q = _size(size)
    _check_extents(given, P, Q)
    means, stds, fills = (_of_channels(*each, given.C) for each in (("mean", mean), ("std", std), ("fill", fill)))
    if any(v == 0 for v in stds):
        raise ValueError(f"augment(): std must not be 0, but got std={std!r}")
    if not all(0 <= v <= 1 for v in fills):
        raise ValueError(f"augment(): fill must be within [0, 1], but got fill={fill!r}")
    if border not in BORDERS:
        raise unknown_value("augment", "border", border, BORDERS, OTHER_BORDERS)
    wanted = _dtype(dtype)
    arguments = (*given[:3], maps, colours, boxes, noise, partners, (P, Q), means, stds, fills)
    if reason := why_torch(given.images, dtypes=IMAGE_DTYPES, result=wanted):
        record_torch("augment", reason, given.images)
        return augment_plain(*arguments, border == "reflection", wanted)
    return ops.augment(*arguments, border == "reflection", wanted)


def _given_images(images: Any, mean: Any) -> GivenImages:
    if isinstance(images, Tensor):
        return _batch(images)
    if not isinstance(images, tuple | list) or len(images) != 3 or not all(isinstance(t, Tensor) for t in images):
        raise TypeError(
            "augment(): images must be a Tensor [N, C, H, W] or [N, H, W, C], or the tensors (flat, offsets, sizes) "
            f"that pack_images() makes of images of different sizes, but got {_kind(images)}"
        )
    flat, offsets, sizes = images
    _check_tensor("the buffer of images", flat, (torch.uint8,), (None,))
    _check_tensor("offsets", offsets, (torch.int64,), (None,))
    _check_tensor("sizes", sizes, (torch.int32, torch.int64), (offsets.shape[0], 2))
    C = len(mean) if isinstance(mean, Sequence) else 0
    if C not in (1, 3):
        raise ValueError(
            "augment(): mean must have 1 or 3 values, as many as images in a buffer have channels, but got "
            f"mean={mean!r}"
        )
    return GivenImages(flat.contiguous(), offsets, sizes, offsets.shape[0], C)


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, tuple | list) else f"a {kind}"


def _batch(images: Tensor) -> GivenImages:
    """The images as [N, C, H, W], whatever their order."""
    first, last = (_channels(images.shape[1]), _channels(images.shape[3])) if images.dim() == 4 else (0, 0)
    if not first and not last:
        raise ValueError(
            f"augment(): images must be [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, but got {list(images.shape)}"
        )
    images = images if first else images.permute(0, 3, 1, 2)
    _check_tensor("images", images, IMAGE_DTYPES, images.shape)
    return GivenImages(images, None, None, images.shape[0], first or last)


def _channels(extent: Any) -> int:
    """An extent that may be that of channels, as a number where torch.compile keeps it symbolic; else 0."""
    return 1 if extent == 1 else 3 if extent == 3 else 0


def _check_tensor(name: str, t: Any, dtypes: Sequence[torch.dtype], shape: Sequence[Any]) -> None:
    """Raises unless t is a Tensor of one of the dtypes and of this shape, in which None is any extent."""
    if not isinstance(t, Tensor):
        raise TypeError(f"augment(): {name} must be a Tensor, not {type(t).__name__}")
    if t.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"augment(): {name} must be of dtype {names}, but got {t.dtype}")
    if t.dim() != len(shape) or any(b is not None and a != b for a, b in zip(t.shape, shape, strict=True)):
        right = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"augment(): {name} must be of shape [{right}], but got {list(t.shape)}")
    if (t.requires_grad and torch.is_grad_enabled()) or _has_tangent(t):
        raise ValueError(f"augment(): it has no gradient, but {name} requires one: give {name}.detach()")


def _has_tangent(t: Tensor) -> bool:
    """Whether forward-mode AD is to carry a derivative through it."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def _check_numbers(given: GivenImages, numbers: GivenNumbers) -> None:
    N, C = given.N, given.C
    maps, colours, boxes, noise, partners = numbers
    single = (torch.float32,)
    if maps is not None:
        _check_tensor("maps", maps, single, (N, 2, 3))
    if colours is not None:
        _check_tensor("colours", colours, single, (N, 5))
    if boxes is not None:
        _check_tensor("boxes", boxes, single, (N, None, 4 if noise is not None else 4 + C))
    if noise is not None:
        _check_tensor("noise", noise, (torch.int64,), (N,))
        if boxes is None:
            raise ValueError("augment(): noise fills boxes, but got boxes=None")
    if partners is not None:
        _check_tensor("partners", partners, single, (N, 6))
        if N > MOST_IMAGES:
            raise ValueError(f"augment(): partners can be given for at most {MOST_IMAGES} images, but got {N}")
    device = given.images.device
    for name, t in zip(numbers._fields, numbers, strict=True):
        if t is not None and t.device.type != "cpu" and t.device != device:
            raise ValueError(
                f"augment(): {name} must be on the CPU or on {device}, where the images are, but got {t.device}"
            )


def _size(size: Any) -> tuple[Any, Any]:
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int | torch.SymInt) for v in pair):
        raise TypeError(f"augment(): size must be an int or a pair of ints, but got size={size!r}")
    if not all(0 < v < MOST_PIXELS for v in pair):
        raise ValueError(f"augment(): size must be positive and less than {MOST_PIXELS}, but got size={size!r}")
    return pair


def _check_extents(given: GivenImages, P: Any, Q: Any) -> None:
    if P * Q * given.C >= MOST_ELEMENTS:
        raise ValueError(
            f"augment(): a result must have fewer than {MOST_ELEMENTS} elements, but got size={(P, Q)} with "
            f"{given.C} channels"
        )
    if given.offsets is None:
        _, C, H, W = given.images.shape
        if not (0 < H < MOST_PIXELS and 0 < W < MOST_PIXELS and H * W * C < MOST_ELEMENTS):
            raise ValueError(
                f"augment(): images must have from 1 to {MOST_PIXELS - 1} rows and columns and fewer than "
                f"{MOST_ELEMENTS} elements each, but got {H} x {W} with {C} channels"
            )


def _of_channels(name: str, value: Any, C: int) -> tuple[float, ...]:
    values = value if isinstance(value, Iterable) else (value,)
    numbers = tuple(as_float("augment", name, v) for v in values)
    if len(numbers) != 1 and len(numbers) != C:
        raise ValueError(
            f"augment(): {name} must be one number, or one for each of the {C} channels, but got {name}={value!r}"
        )
    if not all(-inf < v < inf for v in numbers):
        raise ValueError(f"augment(): {name} must be finite, but got {name}={value!r}")
    return numbers if len(numbers) == C else numbers * C


def _dtype(dtype: Any) -> torch.dtype:
    try:
        found, products = argument(dtype, "augment")
    except ValueError:
        found = products = None
    if found not in RESULT_DTYPES or products == "tf32":
        raise unknown_value("augment", "dtype", dtype, RESULT_DTYPES)
    return found


def pack_images(images: Sequence[Any], pin_memory: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Images of different sizes in one buffer, as augment takes them: (flat uint8 buffer, offsets int64 [N], sizes
    int32 [N, 2] of (H, W)), on the CPU. A DataLoader's collate_fn makes a batch of them.

    images: uint8 tensors or numpy arrays on the CPU, [H, W, C] or [C, H, W] (a first extent of 1 or 3 is C) with the
    same 1 or 3 channels. pin_memory: the buffer is in page-locked memory, which a GPU can copy while the CPU goes on.
    Raises TypeError and ValueError for anything else.
    """
    arrays = [_image(n, image) for n, image in enumerate(images)]
    channels = sorted({array.shape[2] for array in arrays})
    if len(channels) > 1:
        raise ValueError(f"pack_images(): images must have the same number of channels, but got {channels}")
    sizes = torch.tensor([array.shape[:2] for array in arrays], dtype=torch.int32).view(-1, 2)
    ends = torch.tensor([0, *(prod(array.shape) for array in arrays)]).cumsum(0)
    flat = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=pin_memory)
    for begin, end, array in zip(ends.tolist(), ends[1:].tolist(), arrays, strict=False):
        place = flat[begin:end].view(array.shape)
        if isinstance(array, Tensor):
            place.copy_(array)
        else:  # numpy's own, also where it is read only or its strides are negative, which no tensor takes
            place.numpy()[...] = array
    return flat, ends[:-1].clone(), sizes


def _image(n: int, image: Any) -> Any:
    """Image n as [H, W, C], a tensor or an array."""
    array = image if isinstance(image, Tensor) else np.asarray(image)
    first, last = (array.shape[0], array.shape[2]) if array.ndim == 3 else (0, 0)
    if str(array.dtype) not in ("torch.uint8", "uint8") or 0 in array.shape or not {first, last} & {1, 3}:
        raise ValueError(
            "pack_images(): images must be uint8 of shape [H, W, C] or [C, H, W] with 1 or 3 channels, but image "
            f"{n} is {array.dtype} of shape {list(array.shape)}"
        )
    if first not in (1, 3):
        return array
    return array.permute(1, 2, 0) if isinstance(array, Tensor) else array.transpose(1, 2, 0)
