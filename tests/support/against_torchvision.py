"""Our augmentation against chains of torchvision's functions, which are right in float64 and good in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.augmented import UNIT, Known, hue_turned
from tests.support.packages import package

H, W = 16, 31  # of photographs: a result of that size is one program of a kernel
# What may be missed where torchvision happens to round nothing: five operations of float32 on numbers up to 1.
FLOOR = 5 * UNIT
# The same where a map is not exact: with it one rounding of a position as large as the image, which moves the value by
# the difference of two neighbours, at most 1.
SAMPLED = FLOOR + UNIT * max(H, W)


def photographs(N: int = 2, C: int = 3, height: int = H, width: int = W) -> Tensor:
    """[N, C, H, W] in [0, 1]: waves of all directions under noise, from black to white."""
    generator = torch.Generator().manual_seed(17)
    x, y = torch.linspace(0, 1, width), torch.linspace(0, 1, height)[:, None]
    waves = torch.rand((N, C, 3, 1, 1), generator=generator) * 12
    image = 0.5 + 0.5 * torch.sin(waves[:, :, 0] * x + waves[:, :, 1] * y + waves[:, :, 2])
    return (image * 1.2 - 0.1 + 0.2 * torch.rand(image.shape, generator=generator) - 0.1).clamp(0, 1)


def assert_as_good(
    mine: Tensor,
    images: Tensor,
    chain: Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
    floor: float = FLOOR,
) -> None:
    """`mine` misses chain(images in float64) by no more than twice what chain(images) does, and `floor`: at worst, and
    in the root of its mean square. `mask`: where alone it is asked for.
    """
    right, theirs = chain(images.double()), chain(images)
    assert right.dtype == torch.float64
    assert theirs.dtype == torch.float32
    errors = [(y.double() - right).abs() for y in (mine, theirs)]
    if mask is not None:
        assert mask.any()
        errors = [error[mask.expand_as(error)] for error in errors]
    worst, allowed = float(errors[0].max()), 2 * float(errors[1].max()) + floor
    assert worst <= allowed, f"missed by {worst:.2e}, may be {allowed:.2e}"
    mean, allowed = (float((error**2).mean()) ** 0.5 for error in errors)
    assert mean <= 2 * allowed + floor


def adjusted_hue(x: Tensor, turns: float) -> Tensor:
    """torchvision's adjust_hue of [N, C, H, W]; it turns hues in float32 whatever it is given: in float64, ours."""
    if x.dtype == torch.float32:
        return package("torchvision.transforms.v2.functional").adjust_hue(x, turns)
    return torch.stack([hue_turned(Known(image, torch.zeros_like(image)), turns).value for image in x])


def recoloured(x: Tensor, numbers: list[float]) -> Tensor:
    """All operations on colours in their order, by torchvision, of [N, C, H, W]."""
    brightness, contrast, saturation, hue, grey = numbers
    tv = package("torchvision.transforms.v2.functional")
    x = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(x, brightness), contrast), saturation)
    x = adjusted_hue(x, hue)
    return tv.rgb_to_grayscale(x, num_output_channels=3) if grey else x
