"""A sheet has every image where it belongs, pixel by pixel, with its caption below it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnnfast.sheets import sheet
from cnnfast.sheets.composing import GAP, MARGIN, SMALLEST_SIDE, WIDE_GAP, Writer

pytest.importorskip("PIL.Image")
SIDE = SMALLEST_SIDE


def pixels(*arguments, **options) -> np.ndarray:
    return np.asarray(sheet(*arguments, **options)).astype(int)


def grey(*levels: float, size: int = SIDE) -> torch.Tensor:
    """Images of one level of grey each, of 255."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, size, size) / 255


def box(picture: np.ndarray, x: int, y: int, side: int = SIDE) -> np.ndarray:
    return picture[MARGIN + y : MARGIN + y + side, MARGIN + x : MARGIN + x + side]


def test_images_stand_row_by_row(device):
    picture = pixels(grey(10, 20, 30, 40, 50).to(device), columns=2)
    assert picture.shape == (2 * MARGIN + 3 * SIDE + 2 * GAP, 2 * MARGIN + 2 * SIDE + GAP, 3)
    for i, level in enumerate((10, 20, 30, 40, 50)):
        place = (i % 2 * (SIDE + GAP), i // 2 * (SIDE + GAP))
        assert (box(picture, *place) == level).all(), i
    rest = picture.sum() - sum(level * 3 * SIDE**2 for level in (10, 20, 30, 40, 50))
    assert rest == 255 * 3 * (picture.shape[0] * picture.shape[1] - 5 * SIDE**2), "all else is white"


def test_colours_are_rounded_and_what_lies_outside_is_cut_off():
    image = torch.tensor([-3.0, 0.4 / 255, 0.6 / 255, 1.0, 2.0, float("nan"), float("inf")])
    image = image.view(1, 1, 1, 7).expand(1, 1, SIDE, 7).repeat_interleave(SIDE, 3)
    picture = pixels(image, columns=1)
    found = picture[MARGIN, MARGIN + SIDE // 2 :: SIDE][:7]
    assert found.tolist() == [[level] * 3 for level in (0, 0, 1, 255, 255, 0, 255)]
    colours = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
    assert pixels(colours.bfloat16())[MARGIN, MARGIN].tolist() == [51, 102, 153]


def test_small_images_are_enlarged_and_pixels_stay_squares():
    levels = torch.arange(9.0).view(1, 1, 3, 3) * 20 / 255
    picture = pixels(levels)
    factor = -(-SIDE // 3)
    found = picture[MARGIN : MARGIN + 3 * factor, MARGIN : MARGIN + 3 * factor, 0]
    expected = (levels[0, 0] * 255).round().int().numpy().repeat(factor, 0).repeat(factor, 1)
    assert (found == expected).all()
    assert SIDE <= found.shape[0] < SIDE + 3


def test_captions_stand_below_their_images_and_inside_their_columns():
    """A caption that is longer than an image is wide is wrapped, and the next row lies below the longest of a row."""
    long = "brightness 1.12, contrast 0.93, saturation 0.81, hue +0.03, grey, and more than that"
    picture = pixels(grey(100, 100, 100, 100), ["", long, "x", ""], columns=2)
    writer = Writer(12)
    lines = writer.wrapped(long, SIDE)
    assert len(lines) >= 3
    assert all(writer.font.getlength(line) <= SIDE for line in lines)
    height = writer.height(lines)
    below = picture[MARGIN + SIDE : MARGIN + SIDE + height]
    right = MARGIN + SIDE + GAP
    left, right = below[:, : right - 2], below[:, right - 2 : right + SIDE]
    assert (left == 255).all(), "the first has no caption"
    assert (right < 128).any()
    assert (picture[:, MARGIN + 2 * SIDE + GAP :] == 255).all()
    row = next(y for y in range(MARGIN + SIDE, len(picture)) if (picture[y, MARGIN : MARGIN + SIDE] == 100).all())
    assert (box(picture, 0, row - MARGIN) == 100).all()
    assert (picture[row - GAP : row] == 255).all(), "the longest caption ends above the next row"
    assert row == MARGIN + SIDE + height + GAP
    assert writer.wrapped("a a\N{NO-BREAK SPACE}a", 10) == ["a", "a\N{NO-BREAK SPACE}a"]


def test_what_stands_beside_has_a_column_of_its_own():
    picture = pixels(grey(10, 20, 30, 40), columns=2, beside=grey(90, 80), beside_captions=["a", "b"], headline="of it")
    top = next(y for y in range(len(picture)) if (picture[y, MARGIN : MARGIN + SIDE] == 90).all()) - MARGIN
    assert top > 12, "below the headline"
    assert (picture[MARGIN : MARGIN + top] < 128).any()
    assert (box(picture, 0, top) == 90).all()
    assert (box(picture, SIDE + WIDE_GAP, top) == 10).all()
    assert (box(picture, 2 * SIDE + WIDE_GAP + GAP, top) == 20).all()
    below = next(
        y for y in range(top + SIDE, len(picture)) if (picture[y + MARGIN, MARGIN : MARGIN + SIDE] == 80).all()
    )
    assert (box(picture, SIDE + WIDE_GAP, below) == 30).all()


def test_letters_grow_with_the_images():
    heights = {}
    for size in (SIDE, 4 * SIDE):
        picture = pixels(grey(0, size=size), ["I"])[MARGIN + size :, :, 0]
        heights[size] = (picture < 128).any(1).sum()
    assert 3 * heights[SIDE] <= heights[4 * SIDE] <= 5 * heights[SIDE]


@pytest.mark.parametrize(
    ("images", "change", "says"),
    [
        ((3, 4, 4), {}, r"images must be floating, \[N, C, H, W\] with C 1 or 3"),
        ((0, 3, 4, 4), {}, "not empty"),
        ((2, 4, 4, 3), {}, r"not \[2, 4, 4, 3\] of torch.float32"),
        ((2, 3, 4, 4), {"captions": ["one"]}, "1 captions for 2 images: give each one, or none"),
        ((2, 3, 4, 4), {"columns": 0}, "columns must be at least 1, but got columns=0"),
        ((2, 3, 4, 4), {"beside": (1, 3, 4, 5)}, r"one size, but are \[1, 3, 4, 5\] and \[2, 3, 4, 4\]"),
        ((2, 3, 4, 4), {"beside": (1, 3, 4, 4), "beside_captions": ["a", "b"]}, "2 beside_captions for 1 beside"),
    ],
)
def test_what_is_no_sheet_is_refused(images, change, says):
    if "beside" in change:
        change = {**change, "beside": torch.zeros(change["beside"])}
    with pytest.raises(ValueError, match=rf"sheet\(\): .*{says}"):
        sheet(torch.zeros(images), **change)


def test_images_of_integers_are_refused():
    with pytest.raises(ValueError, match=r"must be floating.*torch\.uint8"):
        sheet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        sheet(torch.zeros(1, 3, 4, 4))
