"""A sheet: many images in one picture, each above a caption in small print. Drawn by Pillow, pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.images.images import pillow

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST_SIDE = 160  # pixels; images whose sides are shorter are enlarged, so that they and their captions can be seen
MARGIN, GAP, WIDE_GAP = 16, 10, 28  # pixels around the sheet, between images, and beside the images that stand apart
SMALLEST_FONT, LETTERS = 12, 16  # pixels; so many times as wide as a letter is high is an image
ABOVE = 3  # pixels between an image and its caption
PAPER, INK = "white", "#303030"


def sheet(
    images: Tensor,
    captions: Sequence[str] = (),
    columns: int = 6,
    *,
    headline: str = "",
    beside: Tensor | None = None,
    beside_captions: Sequence[str] = (),
) -> Image:
    """A picture of the images, `columns` in a row, as a PIL.Image in mode RGB.

    images: floating, [N, C, H, W] with N >= 1 and C 1 or 3, in [0, 1]: what lies outside is cut off, and what is no
        number is black. Small images are enlarged by a whole factor, so that each pixel stays a square.
    captions: a text below each image, or none; their lines end at line breaks, and at the width of an image.
    headline: a text above all of them.
    beside: some more images of the same size, which stand apart, in a column to the left; with captions of their own.

    Raises ValueError where shapes, captions or `columns` do not fit, and ModuleNotFoundError without Pillow.
    """
    _refuse(images, captions, "images", "captions")
    if columns < 1:
        raise ValueError(f"sheet(): columns must be at least 1, but got columns={columns}")
    if beside is not None:
        _refuse(beside, beside_captions, "beside", "beside_captions")
        if beside.shape[1:] != images.shape[1:]:
            sizes = f"{list(beside.shape)} and {list(images.shape)}"
            raise ValueError(f"sheet(): beside and images must have one size, but are {sizes}")
    columns = min(columns, len(images))
    factor = -(-SMALLEST_SIDE // min(images.shape[2:]))
    height, width = (factor * extent for extent in images.shape[2:])
    writer = Writer(max(SMALLEST_FONT, width // LETTERS))
    # Which image and text stand in a row: those in a column to the left come first.
    left = 0 if beside is None else width + WIDE_GAP
    placed = [(left + i % columns * (width + GAP), i // columns) for i in range(len(images))]
    tiles, texts = list(images), [writer.wrapped(text, width) for text in captions or [""] * len(images)]
    if beside is not None:
        placed += [(0, row) for row in range(len(beside))]
        tiles += list(beside)
        texts += [writer.wrapped(text, width) for text in beside_captions or [""] * len(beside)]

    whole = left + columns * (width + GAP) - GAP
    head = writer.wrapped(headline, whole)
    top = MARGIN + (writer.height(head) + GAP if head else 0)
    tops = []
    for row in range(1 + max(row for _, row in placed)):
        tops.append(top)
        lines = max(len(text) for text, (_, r) in zip(texts, placed, strict=True) if r == row)
        top += height + writer.height([""] * lines) + GAP
    picture = pillow().new("RGB", (whole + 2 * MARGIN, top - GAP + MARGIN), PAPER)
    writer.write(picture, head, MARGIN, MARGIN)
    for tile, text, (x, row) in zip(tiles, texts, placed, strict=True):
        picture.paste(_pixels(tile, factor), (MARGIN + x, tops[row]))
        writer.write(picture, text, MARGIN + x, tops[row] + height)
    return picture


def _refuse(images: Tensor, captions: Sequence[str], name: str, name_of_captions: str) -> None:
    if images.dim() != 4 or not images.numel() or images.shape[1] not in (1, 3) or not images.is_floating_point():
        given = f"{list(images.shape)} of {images.dtype}"
        raise ValueError(f"sheet(): {name} must be floating, [N, C, H, W] with C 1 or 3, and not empty, not {given}")
    if captions and len(captions) != len(images):
        raise ValueError(
            f"sheet(): {len(captions)} {name_of_captions} for {len(images)} {name}: give each one, or none"
        )


def _pixels(image: Tensor, factor: int) -> Image:
    """An image [C, H, W] in [0, 1], each of whose pixels becomes a square of factor x factor."""
    levels = (image.detach().float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    levels = levels.expand(3, -1, -1).permute(1, 2, 0)
    return pillow().fromarray(levels.repeat_interleave(factor, 0).repeat_interleave(factor, 1).contiguous().numpy())


class Writer:
    """Writes lines of text in Pillow's own font; `size` is in pixels."""

    def __init__(self, size: int) -> None:
        pillow()
        from PIL import ImageFont

        self.font = ImageFont.load_default(size)
        self.line = round(1.3 * size)

    def height(self, lines: Sequence[str]) -> int:
        return self.line * len(lines) + ABOVE * bool(lines)

    def wrapped(self, text: str, width: int) -> list[str]:
        """The text in lines of at most so many pixels, which end at spaces, but not at those that do not break; a
        longer word has a line of its own.
        """
        lines: list[str] = []
        for paragraph in text.splitlines():
            line = ""
            for word in paragraph.split(" "):
                longer = f"{line} {word}".strip()
                if line and self.font.getlength(longer) > width:
                    lines.append(line)
                    longer = word
                line = longer
            lines.append(line)
        return lines

    def write(self, picture: Any, lines: Sequence[str], x: int, y: int) -> None:
        from PIL import ImageDraw

        pen = ImageDraw.Draw(picture)
        for i, line in enumerate(lines):
            pen.text((x, y + ABOVE + i * self.line), line.replace("\N{NO-BREAK SPACE}", " "), INK, self.font)
