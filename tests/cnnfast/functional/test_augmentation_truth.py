"""F.augment against float64, each option alone and all of them mixed at random, by our kernels and by plain PyTorch.

Every pixel has its own bound (tests/support/augmented.py says how it is derived), and what needs no rounding is exact.
Forty of the random batches are part of every run (test_fuzz.py); five hundred others are here, marked slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor

pytest.importorskip("triton")

import cnnfast
from cnnfast.dispatch import backend
from tests.support.augmented import Given, normal_noise, rounded, warped
from tests.support.child import run_compiled
from tests.support.fuzz_augment import (
    BOXES,
    COLOURS,
    CONTENTS,
    LAYOUTS,
    MAPS,
    RAGGED,
    AugmentCase,
    augment,
    check_augmentation,
    laid_out,
    make_given,
    make_images,
    make_map,
)
from tests.support.fuzz_properties import campaign

PLAIN = AugmentCase(
    sizes=((20, 27),) * 2,
    C=3,
    layout="NCHW",
    dtype=torch.float32,
    content="random",
    map="none",
    border="constant",
    colours=(),
    filling="none",
    partner="none",
    size=(16, 32),
    result=torch.float32,
    seed=1,
)


@pytest.fixture(params=["kernels", "torch"])
def path(request) -> Iterator[str]:
    """Who computes."""
    with backend(request.param):
        yield request.param


# ----------------------------------------------------------------------------------------------------------------------
# Each option alone


@pytest.mark.parametrize("border", ["constant", "reflection"])
@pytest.mark.parametrize("kind", MAPS)
def test_map(kind, border, device):
    check_augmentation(replace(PLAIN, map=kind, border=border), device)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", [*COLOURS, "all"])
def test_colour(name, content, device):
    check_augmentation(replace(PLAIN, content=content, colours=COLOURS if name == "all" else (name,), seed=2), device)


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_colour_of_one_channel(name, device):
    check_augmentation(replace(PLAIN, C=1, colours=(name,)), device)


@pytest.mark.parametrize("filling", [*BOXES][1:])
def test_boxes(filling, device):
    check_augmentation(replace(PLAIN, filling=filling), device)


@pytest.mark.parametrize("partner", ["mixup", "cutmix", "both"])
def test_partner(partner, device):
    check_augmentation(replace(PLAIN, partner=partner, sizes=PLAIN.sizes[:1] * 3), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, device):
    case = replace(PLAIN, layout=layout, dtype=torch.uint8, map="rotation")
    if layout == RAGGED:
        case = replace(case, sizes=((20, 27), (1, 1), (3, 70)))
    check_augmentation(case, device)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16])
def test_dtype_of_images(dtype, device):
    check_augmentation(replace(PLAIN, dtype=dtype, map="crop", layout="channels_last"), device)


@pytest.mark.parametrize("result", [torch.float16, torch.bfloat16])
def test_dtype_of_the_result(result, device):
    check_augmentation(replace(PLAIN, result=result), device)


@pytest.mark.slow
def test_five_hundred_random_batches(device):
    tally = campaign("augment", 500, device, start=1000)
    assert tally.cases == 500
    for aspect, kinds in (("map", MAPS), ("layout", LAYOUTS), ("boxes", BOXES), ("colours", COLOURS)):
        assert min(tally.spread[aspect, kind] for kind in kinds) >= 15, aspect


# ----------------------------------------------------------------------------------------------------------------------
# What is exact

H, W = 15, 31
# A result, and what maps to it: (map, what it does to images [C, H, W]).
EXACT = {
    (H, W): {
        "no-op": ([[1, 0, 0], [0, 1, 0]], lambda x: x),
        "horizontal flip": ([[-1, 0, W], [0, 1, 0]], lambda x: x.flip(2)),
        "vertical flip": ([[1, 0, 0], [0, -1, H]], lambda x: x.flip(1)),
        "a turn by 180 degrees": ([[-1, 0, W], [0, -1, H]], lambda x: x.rot90(2, (1, 2))),
    },
    (W, H): {
        "a turn by 90 degrees": ([[0, -1, W], [1, 0, 0]], lambda x: x.rot90(1, (1, 2))),
        "a turn by 270 degrees": ([[0, 1, 0], [-1, 0, H]], lambda x: x.rot90(3, (1, 2))),
        "transposed": ([[0, 1, 0], [1, 0, 0]], lambda x: x.transpose(1, 2)),
    },
    (6, 15): {
        "a crop": ([[1, 0, 4], [0, 1, 7]], lambda x: x[:, 7:13, 4:19]),
        "a crop, flipped": ([[-1, 0, 19], [0, 1, 7]], lambda x: x[:, 7:13, 4:19].flip(2)),
    },
}


def exact_images(C: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand((2, C, H, W), generator=generator)
    return (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)


def expected(y: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Normalised on the CPU, where a quotient by a number is no product with its inverse."""
    y = y.float() / 255 if y.dtype == torch.uint8 else y.float()
    return (y - torch.tensor(mean)) / torch.tensor(std)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", EXACT)
@pytest.mark.parametrize(("C", "layout", "mean", "std"), [(3, "NHWC", 0.0, 1.0), (1, "NCHW", 0.485, 0.229)])
def test_exact_maps(size, dtype, C, layout, mean, std, device, path):
    image = exact_images(C, dtype)[0]
    maps = torch.tensor([one for one, _ in EXACT[size].values()]).float()
    given = Given(maps, None, None, None, size, [mean], [std])
    found = augment(laid_out([image] * len(maps), layout, device), given, device).cpu()
    for y, (name, (_, function)) in zip(found, EXACT[size].items(), strict=True):
        assert torch.equal(y, expected(function(image), mean, std)), name


def test_maps_to_centres_of_pixels_are_exact(device):
    """In the kernels also where a map leaves pixels out, or sees one again and again."""
    images = exact_images(3, torch.uint8)
    maps = torch.tensor([[[2, 0, -0.5], [0, 2, 0.5]], [[0, 0, 8.5], [0, 0, 2.5]]])
    with backend("kernels"):
        y = augment(images.to(device), Given(maps, None, None, None, (6, 15), [0.0], [1.0])).cpu()
    assert torch.equal(y[0], expected(images[0, :, 1:13:2, 0:30:2]))
    assert torch.equal(y[1], expected(images[1, :, 2:3, 8:9]).expand(3, 6, 15))


@pytest.mark.parametrize("border", ["constant", "reflection"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_exact_shifts(dtype, border, device, path):
    """By whole pixels, to every side and beyond the image. 0.5 is a fill that no rounding changes."""
    images = exact_images(3, dtype)
    shifts = [(0, 3), (-5, 0), (W - 1, -H + 1), (-W, 2), (7, H + 4)]
    batch = images[:1].expand(len(shifts), -1, -1, -1)
    maps = torch.tensor([[[1, 0, dx], [0, 1, dy]] for dx, dy in shifts]).float()
    fill = [0.0, 0.5, 1.0]
    given = Given(maps, None, None, None, (H, W), [0.0], [1.0], border=border, fill=fill)
    y = augment(batch.to(device), given)
    whole = expected(images[0])
    for found, (dx, dy) in zip(y.cpu(), shifts, strict=True):
        rows, columns = torch.arange(H) + dy, torch.arange(W) + dx
        if border == "reflection":
            again = torch.cat([whole, whole.flip(1)], 1)
            again = torch.cat([again, again.flip(2)], 2)  # it repeats from here
            assert torch.equal(found, again[:, rows % (2 * H)][:, :, columns % (2 * W)])
        else:
            inside = ((rows >= 0) & (rows < H))[:, None] & (columns >= 0) & (columns < W)
            there = whole[:, rows.clamp(0, H - 1)][:, :, columns.clamp(0, W - 1)]
            assert torch.equal(found, torch.where(inside, there, torch.tensor(fill)[:, None, None]))


def test_no_map_and_colours_that_change_nothing_are_exact(device, path):
    images = exact_images(3, torch.uint8)
    nothing = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]] * 2)
    alone = torch.tensor([[1.0, 1.0, 0, 0, 0, 0], [0.0, 1.0, 5, 5, 5, 9]])
    empty = torch.tensor([[[3.0, 4, 3, 9, 0, 0, 0]]] * 2)
    given = Given(None, nothing, empty, alone, (H, W), [0.0], [1.0])
    assert torch.equal(augment(images.to(device), given).cpu(), expected(images))


def test_boxes_and_partners_are_exact(device, path):
    images = exact_images(3, torch.float32)
    boxes = torch.tensor([[[2.0, 3, 12, 9, 0.25, 0.5, 1], [10.0, 0, 20, 5, 0, 0.125, 0.75]], [[0.0] * 7] * 2])
    partners = torch.tensor([[0.0, 1, 0, 0, 0, 0], [0.0, 1, 8, 2, 16, 7]])
    y = augment(images.to(device), Given(None, None, boxes, partners, (H, W), [0.0], [1.0])).cpu()
    first, second = images.clone()
    first[:, 3:9, 2:12] = torch.tensor([0.25, 0.5, 1])[:, None, None]
    first[:, 0:5, 10:20] = torch.tensor([0, 0.125, 0.75])[:, None, None]  # the later box lies over the earlier one
    second[:, 2:7, 8:16] = first[:, 2:7, 8:16]  # the partner is seen with its own boxes
    assert torch.equal(y, torch.stack([first, second]))


# ----------------------------------------------------------------------------------------------------------------------
# Borders against PyTorch's grid_sample


@pytest.mark.parametrize(("border", "padding"), [("constant", "zeros"), ("reflection", "reflection")])
@pytest.mark.parametrize("extents", [(23, 40), (1, 9), (6, 1)], ids=lambda extents: f"{extents[0]}x{extents[1]}")
def test_borders_are_those_of_grid_sample(border, padding, extents, device, path):
    """The reference's too."""
    P, Q = size = (16, 32)
    kinds = ["rotation", "shear", "all", "far away"]
    images = torch.stack(make_images(replace(PLAIN, sizes=(extents,) * len(kinds))))
    random = Random(11)
    maps = torch.tensor([make_map(kind, extents, size, random) for kind in kinds])
    x, y = torch.arange(Q).double() + 0.5, (torch.arange(P).double() + 0.5)[:, None]
    result = torch.stack([x.expand(size), y.expand(size), torch.ones(size).double()], -1)
    positions = torch.einsum("nij,pqj->npqi", maps.double(), result)
    grid = 2 * positions / torch.tensor([extents[1], extents[0]]) - 1
    right = theirs.grid_sample(images.double(), grid, "bilinear", padding, align_corners=False)
    found = augment(images.to(device), Given(maps, None, None, None, size, [0.0], [1.0], border=border)).cpu()
    for mine, image, one, exact in zip(found, images.double(), maps.double(), right, strict=True):
        known = rounded(warped(image, one, size, border, torch.zeros(3, 1, 1)), torch.float32)
        torch.testing.assert_close(known.value, exact, rtol=0, atol=1e-10)
        assert ((mine - exact).abs() <= known.error).all()


# ----------------------------------------------------------------------------------------------------------------------
# Noise


def test_noise_is_normal_and_independent(device, path):
    images = torch.full((2, 3, 8, 8), 0.5, device=device)
    boxes = torch.tensor([[[0.0, 0, 64, 32]]] * 2)
    mean, std = [0.4, 0.5, 0.1], [0.2, 0.3, 0.9]  # whatever they are, the normalised image's noise is standard
    given = Given(None, None, boxes, None, (32, 64), mean, std, noise=torch.tensor([5, 6]))
    noise = augment(images, given).cpu().double().flatten(2).flatten(0, 1)  # six rows of 2048 numbers
    deviation = 2048**-0.5  # of the mean of so many
    assert noise.mean(1).abs().max() < 4 * deviation
    assert ((noise**2).mean(1) - 1).abs().max() < 4 * 2**0.5 * deviation
    assert ((noise**4).mean(1) - 3).abs().max() < 4 * 96**0.5 * deviation
    assert (noise.corrcoef() - torch.eye(6)).abs().max() < 4 * deviation
    assert (noise[:, 1:] * noise[:, :-1]).mean(1).abs().max() < 4 * deviation


def test_noise_of_random123():
    """The known answer of Philox4x32-10 for a counter and a key of zeros (kat_vectors of the Random123 library)."""
    from tests.support.augmented import philox

    torch_zero = torch.zeros(1).numpy()
    assert [f"{int(word[0]):08x}" for word in philox(torch_zero, 0)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert normal_noise(7, (2, 3)).value.shape == (3, 2, 3)


# ----------------------------------------------------------------------------------------------------------------------
# The same bits

BUSY = replace(
    PLAIN,
    sizes=((20, 27),) * 3,
    map="all",
    colours=COLOURS,
    filling="noise",
    partner="mixup",
    content="random",
    dtype=torch.uint8,
    seed=5,
)


def chosen(given: Given, indices: list[int]) -> Given:
    """The numbers of these images, whose partners go along as they stand."""
    numbers = {name: value[indices] if isinstance(value, Tensor) else value for name, value in given._asdict().items()}
    return Given(**numbers)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", RAGGED])
def test_an_image_has_the_same_bits_in_every_batch(layout, device, path):
    case = replace(
        BUSY, layout=layout, partner="none", sizes=((20, 27), (33, 8), (5, 60)) if layout == RAGGED else BUSY.sizes
    )
    images, given = make_images(case), make_given(case)
    whole = augment(laid_out(images, layout, device), given)
    for indices in ([0], [2], [2, 0], [1, 1, 2, 0]):
        again = augment(laid_out([images[i] for i in indices], layout, device), chosen(given, indices))
        assert torch.equal(again, whole[indices])


def test_the_same_bits_whatever_the_layout(device, path):
    case = replace(BUSY, sizes=BUSY.sizes[:2])
    images, given = make_images(case), make_given(case)
    first = augment(laid_out(images, "NCHW", device), given)
    for layout in LAYOUTS[1:]:
        given = given._replace(mean=given.mean * (3 // len(given.mean)), std=given.std * (3 // len(given.std)))
        assert torch.equal(augment(laid_out(images, layout, device), given), first), layout


def test_the_same_bits_with_other_numbers_of_threads(device, path):
    images, given = make_images(BUSY), make_given(BUSY)
    laid = laid_out(images, "channels_last", device)
    first, threads = augment(laid, given), torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(augment(laid, given), first)
    finally:
        torch.set_num_threads(threads)


def digest_elsewhere(path, interpreted):
    """In another process."""
    import os

    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from tests.cnnfast.functional.test_augmentation_truth import digest

    return digest(path, torch.device("cpu" if interpreted or path == "torch" else "cuda"))


def digest(path: str, device: torch.device) -> str:
    import hashlib

    images, given = make_images(BUSY), make_given(BUSY)
    with backend(path):
        y = augment(laid_out(images, "NCHW", device), given)
    return hashlib.sha256(y.cpu().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_the_same_bits_in_another_process(path, device):
    here = torch.device("cpu") if path == "torch" else device
    assert run_compiled(digest_elsewhere, path, device.type == "cpu") == digest(path, here)


# ----------------------------------------------------------------------------------------------------------------------
# Launches


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", RAGGED])
@pytest.mark.parametrize("partner", ["none", "both"])
@pytest.mark.parametrize(
    ("colours", "launches"), [((), 1), (("brightness", "hue", "saturation", "grey"), 1), (COLOURS, 2)]
)
def test_launches_of_a_batch(layout, partner, colours, launches, device):
    case = replace(BUSY, layout=layout, partner=partner, colours=colours, size=(5, 6))
    images, given = make_images(case), make_given(case)
    laid = laid_out(images, layout, device)
    with backend("kernels"), cnnfast.trace() as trace:
        augment(laid, given)
    assert len(trace.launches) == launches
