"""What is told of an augmented image is what its numbers do: told from maps that were put together from known parts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from cnnfast.sheets import View, views


def turn(degrees: float) -> torch.Tensor:
    """Of positions whose y points down, clockwise as it is seen."""
    a = math.radians(degrees)
    return torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)


def shear(degrees: float) -> torch.Tensor:
    return torch.tensor([[1.0, -math.tan(math.radians(degrees))], [0.0, 1.0]], dtype=torch.float64)


def map_of(happened: torch.Tensor) -> torch.Tensor:
    """The map [1, 2, 3] from the result to the image, of what happened [2, 2] to the image."""
    return torch.cat([happened.inverse(), torch.zeros(2, 1)], 1).float()[None]


def view_of(maps, image=(100, 200), size=(10, 10), **numbers) -> View:
    draws = SimpleNamespace(**{"colours": None, "boxes": None, "noise": None, "partners": None, **numbers}, maps=maps)
    (found,) = views(draws, [image], size)  # pyright: ignore[reportArgumentType]
    return found


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    ("turned", "sheared"), [(0, 0), (15, 0), (-170, 0), (100, 20), (180, 0), (-90, -45), (30, -10)]
)
def test_a_map_is_told_by_its_parts(mirrored, turned, sheared):
    happened = turn(turned) @ shear(sheared) @ torch.diag(torch.tensor([0.2, 0.7])).double()
    happened = happened @ torch.diag(torch.tensor([-1.0 if mirrored else 1.0, 1.0])).double()
    found = view_of(map_of(happened))
    assert found.mirrored == mirrored
    assert (found.turned - turned + 180) % 360 - 180 == pytest.approx(0, abs=1e-3)
    assert found.sheared == pytest.approx(sheared, abs=1e-3)
    assert found.share == pytest.approx(10 * 10 / (0.2 * 0.7) / (100 * 200), rel=1e-5)


def test_upside_down_is_mirrored_and_turned():
    found = view_of(torch.tensor([[[1.0, 0, 0], [0, -1, 10]]]))
    assert (found.mirrored, abs(found.turned), found.sheared) == (True, 180, 0)
    assert view_of(torch.tensor([[[0.0, 0, 0], [0, 0, 0]]])).share == 0, "one place of the image everywhere"


def test_rotation_is_as_in_torchvision():
    """A mark above the middle goes to the right at 90 degrees."""
    from tests.support.packages import package

    F = package("torchvision.transforms.v2.functional")
    image = torch.zeros(1, 9, 9)
    image[0, 1, 4] = 1
    turned = F.affine(image, angle=90, translate=[0, 0], scale=1.0, shear=[0.0, 0.0])
    assert turned[0, 4, 7] == 1
    x, y = (turn(90) @ torch.tensor([0.0, -3.0], dtype=torch.float64)).tolist()
    assert (round(x), round(y)) == (3, 0)


def said(view: View) -> str:
    return view.caption.replace("\N{NO-BREAK SPACE}", " ")


def whole() -> torch.Tensor:
    """The map that shows all of an image of 100 x 200 pixels in 10 x 10, on the CPU, as draws are."""
    return torch.tensor([[[20.0, 0, 0], [0, 10, 0]]])


def test_a_caption_names_what_was_changed_and_nothing_else():
    assert said(view_of(whole())) == "100% of it"
    colours = torch.tensor([[1.1, 1.0, 0.504, -0.02, 0.0]])
    assert said(view_of(whole(), colours=colours)) == "100% of it\nbrightness 1.10, saturation 0.50, hue -0.02"
    assert said(view_of(whole(), colours=torch.tensor([[1.0, 1, 1, 0, 1]]))) == "100% of it\ngrey"
    assert said(view_of(whole(), colours=torch.tensor([[1.001, 1, 1, 0.001, 0]]))) == "100% of it"
    boxes = torch.tensor([[[1.0, 2, 4, 9, 0.5, 0.5, 0.5], [0, 0, 0, 0, 1, 1, 1], [3, 3, 5, 3, 0, 0, 0]]])
    erased = view_of(whole(), boxes=boxes)
    assert said(erased) == "100% of it\nerased 3 x 7"
    assert " " not in erased.caption.replace(", ", ""), "what belongs together is not broken"
    assert (erased.erased, erased.noise) == (((1.0, 2.0, 4.0, 9.0),), None)
    assert view_of(whole(), boxes=boxes[..., :4], noise=torch.tensor([7])).noise == 7
    assert view_of(whole(), boxes=boxes[:, 1:, :4], noise=torch.tensor([7])).noise is None, "there is no box"
    turned = view_of(map_of(turn(-12.4) @ shear(8) @ torch.diag(torch.tensor([-0.1, 0.1])).double()))
    assert said(turned) == "50% of it, mirrored, turned -12°, sheared 8°"


def test_partners_are_told_as_they_are_mixed():
    mixup, cutmix = torch.tensor([[3.0, 0.75, 0, 0, 0, 0]]), torch.tensor([[3.0, 1.0, 2, 3, 7, 10]])
    found = view_of(whole(), partners=mixup)
    assert said(found) == "100% of it\n25% of #3"
    assert (found.partner, found.weight, found.replaced) == (3, 0.75, None)
    found = view_of(whole(), partners=cutmix)
    assert said(found) == "100% of it\n5 x 7 of #3"
    assert (found.partner, found.weight, found.replaced) == (3, 1.0, (2.0, 3.0, 7.0, 10.0))
    assert view_of(whole(), partners=torch.tensor([[3.0, 1.0, 4, 4, 4, 9]])).partner is None, "nothing of it is seen"


def test_each_image_is_told_from_its_own_numbers():
    draws = SimpleNamespace(
        maps=torch.cat([whole(), whole() / 2]),
        colours=torch.tensor([[1.0, 1, 1, 0, 0], [2.0, 1, 1, 0, 0]]),
        boxes=None, noise=None, partners=torch.tensor([[1.0, 0.5, 0, 0, 0, 0], [0, 0.25, 0, 0, 0, 0]]),
    )  # fmt: skip
    first, second = views(draws, [(100, 200), (100, 100)], (10, 10))  # pyright: ignore[reportArgumentType]
    assert (first.share, second.share) == (1.0, 0.5)
    assert (first.brightness, second.brightness) == (1.0, 2.0)
    assert (first.partner, second.partner, second.weight) == (1, 0, 0.25)
    assert second.as_dict()["map"] == ((10.0, 0.0, 0.0), (0.0, 5.0, 0.0))
