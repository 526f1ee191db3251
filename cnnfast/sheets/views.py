"""What an augmented image shows, in words that people know: told from the numbers that nn.Augment drew for it.

A map A takes positions of the result to positions of the image; its inverse is what happened to the image. It is told
as mirroring, then scaling by (p, q), then a shear by t along x, then a turn by an angle, clockwise as in RandomAffine:

    A^-1 = [cos -sin; sin cos] [1 -t; 0 1] [p 0; 0 q] [+-1 0; 0 1]

There is exactly one such way, whatever options the map came from. So an image that was flipped upside down is told as
mirrored and turned by 180 degrees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.augment import Draws

COLOURS = ("brightness", "contrast", "saturation", "hue", "grey")
UNCHANGED = (1.0, 1.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class View:
    """One image of an augmented batch.

    map: as it was drawn, two rows of three numbers. share: of the image's area that the result covers, 1.0 for all.
    turned, sheared: degrees. brightness, contrast, saturation: factors; hue: a shift in turns; grey: whether the image
    became grey. erased: boxes of the result, (left, top, right, bottom) in pixels; noise: the seed of the noise in
    them, None where they have one colour. partner: the place in the batch of the image that is mixed in, None without;
    weight: of the image itself in the mix; replaced: the box in which only the partner is seen, or None.
    """

    map: tuple[tuple[float, ...], ...]
    share: float
    mirrored: bool
    turned: float
    sheared: float
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grey: bool = False
    erased: tuple[tuple[float, ...], ...] = ()
    noise: int | None = None
    partner: int | None = None
    weight: float = 1.0
    replaced: tuple[float, ...] | None = None

    @property
    def caption(self) -> str:
        """Up to four lines: what part is seen, which way round; its colours; what was erased; what was mixed in. A line
        may be broken after its commas.
        """
        seen = [f"{self.share:.0%} of it"] + ["mirrored"] * self.mirrored
        seen += [f"{name} {degrees:.0f}°" for name, degrees in (("turned", self.turned), ("sheared", self.sheared))
                 if round(degrees)]  # fmt: skip
        colours = [
            f"{name} {value:+.2f}" if name == "hue" else f"{name} {value:.2f}"
            for name, usual in zip(COLOURS[:4], UNCHANGED, strict=False)
            if f"{(value := getattr(self, name)):.2f}" != f"{usual:.2f}"
        ]
        colours += ["grey"] * self.grey
        erased = [f"erased {extents(box)}" for box in self.erased]
        mixed = [f"{1 - self.weight:.0%} of #{self.partner}"] if self.partner is not None and self.weight < 1 else []
        mixed += [f"{extents(self.replaced)} of #{self.partner}"] if self.replaced else []
        lines = [
            ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
            for parts in (seen, colours, erased, mixed)
        ]
        return "\n".join(filter(None, lines))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def extents(box: Sequence[float]) -> str:
    """Of a box, as "width x height" in pixels."""
    left, top, right, bottom = box
    return f"{right - left:.0f} x {bottom - top:.0f}"


def views(draws: Draws, sizes: Sequence[tuple[int, int]], size: tuple[int, int]) -> list[View]:
    """Of each image of a batch. sizes: (H, W) of each image, in pixels; size: (P, Q) of the results."""
    found = []
    for n, (H, W) in enumerate(sizes):
        told: dict[str, Any] = dict(zip(COLOURS, _row(draws.colours, n, UNCHANGED), strict=True))
        told["grey"] = bool(told["grey"])
        boxes = () if draws.boxes is None else tuple(tuple(box[:4]) for box in draws.boxes[n].tolist())
        told["erased"] = tuple(box for box in boxes if _is_seen(box))
        if told["erased"] and draws.noise is not None:
            told["noise"] = int(draws.noise[n])
        index, weight, *box = _row(draws.partners, n, (n, 1.0, 0.0, 0.0, 0.0, 0.0))
        if weight < 1 or _is_seen(box):
            told |= {"partner": int(index), "weight": weight, "replaced": tuple(box) if _is_seen(box) else None}
        found.append(View(**_told_from_map(draws.maps[n].tolist(), (H, W), size), **told))
    return found


def _row(numbers: Tensor | None, n: int, without: Sequence[float]) -> list[float]:
    return list(without) if numbers is None else numbers[n].tolist()


def _is_seen(box: Sequence[float]) -> bool:
    left, top, right, bottom = box
    return left < right and top < bottom


def _told_from_map(rows: list[list[float]], image: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    (a, b, _), (c, d, _) = rows
    determinant = a * d - b * c
    share = abs(determinant) * size[0] * size[1] / (image[0] * image[1])
    told = {"map": tuple(map(tuple, rows)), "share": share, "mirrored": determinant < 0}
    if not determinant:
        return {**told, "turned": 0.0, "sheared": 0.0}
    # The columns of the inverse: where the image's axes point in the result, the first one's sign undone if mirrored.
    sign = -1 if determinant < 0 else 1
    along_x = (sign * d / determinant, -sign * c / determinant)
    along_y = (-b / determinant, a / determinant)
    angle = math.atan2(along_x[1], along_x[0])
    cosine, sine = math.cos(angle), math.sin(angle)
    across, down = cosine * along_y[0] + sine * along_y[1], -sine * along_y[0] + cosine * along_y[1]
    turned, sheared = math.degrees(angle), math.degrees(math.atan(-across / down))
    # Rounded as far as float32 tells them, and 0.0 added, so that there is no -0.0.
    return {**told, "turned": round(turned, 3) + 0.0, "sheared": round(sheared, 3) + 0.0}
