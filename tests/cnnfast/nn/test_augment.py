"""cnn.Augment: what it draws depends on (seed, epoch, index) alone, no option on another, and forward does what it
drew; labels, evaluation, other images, errors.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnnfast.functional as F
import cnnfast.nn as cnn
from tests.support.packages import package

SIZES = ((40, 60), (33, 90), (200, 17), (64, 64), (224, 300), (50, 50), (31, 32), (99, 44))
INDEX = [3, 1, 4, 1_000_000_007, 5, 9, 2**40, 6]
# Every option that draws something.
EVERYTHING: dict[str, Any] = {
    "vertical_flip_p": 0.5, "degrees": 15, "translate": (0.1, 0.2), "scale": (0.8, 1.2), "shear": (-5, 5, -3, 3),
    "brightness": 0.4, "contrast": 0.4, "saturation": (0.5, 2), "hue": 0.1, "grayscale_p": 0.5, "erasing_p": 0.5,
    "mixup_alpha": 0.4, "cutmix_alpha": 1.0, "num_classes": 5, "seed": 17,
}  # fmt: skip


def augment(**options: Any) -> cnn.Augment:
    return cnn.Augment((24, 20), **(EVERYTHING | options))


def equal(a: cnn.Draws, b: cnn.Draws, but: tuple[str, ...] = ()) -> bool:
    return all(
        name in but or (x is y if x is None or y is None else torch.equal(x, y))
        for name, x, y in zip(a._fields, a, b, strict=True)
    )


def images(device: torch.device, dtype: torch.dtype = torch.uint8, shape: tuple[int, ...] = (4, 3, 30, 40)) -> Tensor:
    made = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return (made if dtype == torch.uint8 else made.to(dtype) / 255).to(device)


@pytest.mark.parametrize("value", [0.5, "random"])
def test_other_batches_orders_and_epochs(value):
    """An image has its map, colours, boxes, noise and weight wherever it is; the partner is the batch's."""
    module = augment(erasing_value=value, cutmix_alpha=None)
    whole = module.draw(SIZES, INDEX, epoch=3)
    places = [6, 2, 5]
    part = module.draw([SIZES[place] for place in places], torch.tensor(INDEX)[places], epoch=3)
    for name, of_whole, of_part in zip(whole._fields, whole, part, strict=True):
        if of_whole is None or of_part is None:
            assert name == "noise"
            assert value != "random"
        elif name == "partners":
            assert torch.equal(of_whole[places, 1:], of_part[:, 1:])
        else:
            assert torch.equal(of_whole[places], of_part), name
    assert not equal(whole, module.draw(SIZES, INDEX, epoch=4), but=("noise",))
    assert not equal(whole, augment(erasing_value=value, seed=18).draw(SIZES, INDEX, 3), but=("noise",))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_an_index_of_any_kind(device, dtype):
    given = torch.tensor([3, 1, 7], dtype=dtype, device=device)
    assert equal(augment().draw((40, 50), given), augment().draw((40, 50), [3, 1, 7]))
    assert equal(augment().draw((40, 50), range(4)), augment().draw(torch.tensor([[40, 50]] * 4), range(4)))


def test_other_threads_and_settings():
    """The default generator, its seed, and how many threads there are: nothing of it counts."""
    before = augment().draw(SIZES, INDEX)
    state = torch.get_rng_state()
    found: list[cnn.Draws] = []
    torch.manual_seed(9)
    thread = threading.Thread(target=lambda: found.append(augment().draw(SIZES, INDEX)))
    thread.start()
    thread.join()
    torch.set_rng_state(state)
    assert equal(before, found[0])


# Which of the draws an option may change; what no option here names stays to the bit.
CHANGES = {
    "horizontal_flip_p": ("maps",), "vertical_flip_p": ("maps",), "degrees": ("maps",), "translate": ("maps",),
    "scale": ("maps",), "shear": ("maps",), "crop_scale": ("maps",), "brightness": ("colours",),
    "contrast": ("colours",), "saturation": ("colours",), "hue": ("colours",), "grayscale_p": ("colours",),
    "erasing_p": ("boxes",), "mixup_alpha": ("partners",), "cutmix_alpha": ("partners",),
}  # fmt: skip
OFF = {"crop_scale": None, "translate": None, "scale": None, "shear": None, "mixup_alpha": None, "cutmix_alpha": None}


@pytest.mark.parametrize("option", CHANGES)
def test_no_option_changes_what_another_draws(option):
    with_it, without = augment().draw(SIZES, INDEX), augment(**{option: OFF.get(option, 0)}).draw(SIZES, INDEX)
    assert equal(with_it, without, but=CHANGES[option])
    column = ["brightness", "contrast", "saturation", "hue", "grayscale_p"]
    if option in column:
        assert with_it.colours is not None
        assert without.colours is not None
        others = [i for i, name in enumerate(column) if name != option]
        assert torch.equal(with_it.colours[:, others], without.colours[:, others])
        assert not torch.equal(with_it.colours, without.colours)


def test_flips_do_not_change_crops():
    """The one that is not flipped, turned over, is the one that is."""
    never, always = (cnn.Augment(8, horizontal_flip_p=p).draw(SIZES, INDEX).maps for p in (0, 1))
    assert torch.equal(always[:, 0, 0], -never[:, 0, 0])
    assert torch.allclose(always[:, 0, 2], never[:, 0, 2] + 8 * never[:, 0, 0])
    assert torch.equal(always[:, 1], never[:, 1])


def test_what_is_not_asked_for_is_not_there():
    plain = cnn.Augment(8).draw(SIZES, INDEX)
    assert plain[1:] == (None, None, None, None)
    coloured = cnn.Augment(8, brightness=0.2).draw(SIZES, INDEX).colours
    assert coloured is not None
    assert torch.equal(coloured[:, 1:], torch.tensor([1.0, 1, 0, 0]).expand(8, 4))  # no launch for contrast


def test_known_draws():
    """Written down where they were first drawn: a machine that draws others is seen."""
    drawn = augment(erasing_value="random").draw((375, 500), [12345, 10], epoch=6)
    assert drawn.noise is not None
    assert drawn.noise.tolist() == NOISE
    for name, known in KNOWN.items():
        values = getattr(drawn, name).flatten().tolist()
        assert [float(v).hex() for v in values] == known, name


NOISE = [8568962579270830893, 8084461315093117867]
KNOWN = {
    "maps": [
        "-0x1.0c98980000000p+4",
        "0x1.b77d260000000p-5",
        "0x1.e92cd40000000p+8",
        "0x1.ea0ef20000000p-1",
        "-0x1.8cb36c0000000p+3",
        "0x1.55169a0000000p+8",
        "0x1.8052520000000p+4",
        "0x1.4885c00000000p+0",
        "0x1.87e3c60000000p+5",
        "-0x1.b25eaa0000000p+0",
        "0x1.0c7d240000000p+4",
        "0x1.1bb8e80000000p+5",
    ],
    "colours": [
        "0x1.32080a0000000p+0",
        "0x1.f0daa20000000p-1",
        "0x1.50dc1e0000000p-1",
        "-0x1.7109700000000p-5",
        "0x1.0000000000000p+0",
        "0x1.28559a0000000p+0",
        "0x1.8dfd5c0000000p-1",
        "0x1.8bdef60000000p-1",
        "-0x1.8e6c3c0000000p-4",
        "0x0.0p+0",
    ],
    "boxes": [
        "0x0.0p+0",
        "0x0.0p+0",
        "0x0.0p+0",
        "0x0.0p+0",
        "0x1.8000000000000p+2",
        "0x0.0p+0",
        "0x1.6000000000000p+3",
        "0x1.4000000000000p+3",
    ],
    "partners": [
        "0x1.0000000000000p+0",
        "0x1.0000000000000p+0",
        "0x1.c000000000000p+3",
        "0x1.a000000000000p+3",
        "0x1.4000000000000p+4",
        "0x1.7000000000000p+4",
        "0x0.0p+0",
        "0x1.0000000000000p+0",
        "0x0.0p+0",
        "0x0.0p+0",
        "0x1.0000000000000p+2",
        "0x1.0000000000000p+3",
    ],
}


def test_exact_maps():
    """Padded crops and flips are whole numbers, and so are quarter turns of squares."""
    maps = cnn.Augment(8, crop_scale=None, padding=2, vertical_flip_p=0.5).draw((9, 11), range(50)).maps
    assert torch.equal(maps, maps.round())
    assert set(maps[:, 0, 0].tolist()) == set(maps[:, 1, 1].tolist()) == {1, -1}
    assert not maps[:, 0, 1].any()
    turned = cnn.Augment(8, crop_scale=None, padding=0, degrees=(90, 90), horizontal_flip_p=0).draw((8, 8), [1]).maps
    assert turned.tolist() == [[[0, 1, 0], [-1, 0, 8]]]  # counter-clockwise


@pytest.mark.parametrize("padding", [None, 1])
def test_without_resizing_the_whole_image_is_seen(device, padding):
    """A crop of size 6 from 6 x 6 pixels: the image itself, padded or not."""
    x = images(device, shape=(5, 3, 6, 6))
    module = cnn.Augment(6, crop_scale=None, padding=padding, resize_size=6, horizontal_flip_p=0, mean=0, std=1)
    y = module(x, index=range(5))
    padded = nn.functional.pad(x, (1, 1, 1, 1)).float() / 255 if padding else x.float() / 255
    for n in range(5):
        left, top = (int(v) + (padding or 0) for v in module.draw((6, 6), range(5)).maps[n, :, 2])
        assert torch.equal(y[n], padded[n, :, top : top + 6, left : left + 6])


def test_forward_does_what_was_drawn(device):
    """The numbers, the border, the channels and the dtype reach functional.augment; labels are mixed alike."""
    module, x = augment(dtype="fp16"), images(device)
    labels = torch.tensor([0, 4, 2, 2], device=device)
    y, soft = module(x, labels, index=range(4), epoch=2)
    drawn = module.draw((30, 40), range(4), epoch=2)
    assert drawn.partners is not None
    other = F.augment(
        x, drawn.maps, drawn.colours, drawn.boxes, drawn.partners, size=(24, 20), mean=module.mean, std=module.std,
        dtype=torch.float16,
    )  # fmt: skip
    assert torch.equal(y, other)
    assert y.is_contiguous(memory_format=torch.channels_last)
    hot = torch.eye(5, device=device)[labels]
    _, weight, left, top, right, bottom = drawn.partners.to(device).unbind(1)
    weight = (weight * (1 - (right - left) * (bottom - top) / 480))[:, None]
    assert torch.allclose(soft, weight * hot + (1 - weight) * hot[drawn.partners[:, 0].long().to(device)], atol=1e-6)


def test_an_edge_is_not_mixed_with_fill_where_no_map_leaves_the_image(device):
    """An image larger than its source, of one colour: of that colour, as torchvision's resize gives it."""
    x = torch.full((2, 3, 5, 5), 255, dtype=torch.uint8, device=device)
    crop = cnn.Augment(16, mean=0, std=1, crop_scale=(1, 1), crop_ratio=(1, 1))
    assert crop(x, index=range(2)).min() > 0.9999
    assert crop.seen_border == "reflection"
    assert crop.eval()(x).min() > 0.9999
    turned = cnn.Augment(16, mean=0, std=1, degrees=(45, 45), crop_scale=(1, 1), crop_ratio=(1, 1))
    assert turned.seen_border == "constant"
    assert (turned(x, index=range(2))[:, :, 0, 0] < 1).all()
    assert turned.eval().seen_border == "reflection"
    assert cnn.Augment(16, resize_size=12).eval().seen_border == "constant"
    assert cnn.Augment(4, crop_scale=None, padding=1).seen_border == "constant"


@pytest.mark.parametrize("shape", [(41, 30), (30, 57), (33, 33)])
def test_evaluation_is_resize_centre_crop_and_normalize(device, shape):
    v2 = package("torchvision.transforms.v2")
    x = images(device, torch.float32, (2, 3, *shape))
    module = augment(resize_size=27).eval()
    theirs = v2.Compose(
        [v2.Resize(27, antialias=False), v2.CenterCrop((24, 20)), v2.Normalize(module.mean, module.std)]
    )(x)
    labels = torch.tensor([3, 1], device=device)
    y, same = module(x, labels)
    assert same is labels
    assert (y - theirs).abs().max() < 2e-5
    assert torch.equal(y, module(x, index=[7, 8], epoch=3))
    assert augment().eval().centre.resize == int(24 / 0.875)


def test_crop_flip_and_colours_as_torchvision_does_them(device):
    """One image at a time, with the numbers that were drawn; the crops are smaller than the result only at their own
    edges, which are left out.
    """
    v2 = package("torchvision.transforms.v2")
    f = v2.functional
    x = images(device, torch.float32, (6, 3, 90, 80))
    options: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale_p": 0.3}
    module = cnn.Augment((20, 20), crop_scale=(0.4, 1), mean=0, std=1, **options)
    y, drawn = module(x, index=range(6)), module.draw((90, 80), range(6))
    assert drawn.colours is not None
    flipped = 0
    for n, (map_, (brightness, contrast, saturation, hue, grey)) in enumerate(
        zip(drawn.maps, drawn.colours.tolist(), strict=True)
    ):
        (m00, _, m02), (_, m11, m12) = map_.tolist()
        width, height = round(abs(m00) * 20), round(m11 * 20)
        flipped += m00 < 0
        left = round(m02 + min(m00 * 20, 0))
        v = f.resized_crop(x[n], round(m12), left, height, width, [20, 20], antialias=False)
        v = f.horizontal_flip(v) if m00 < 0 else v
        v = f.adjust_contrast(f.adjust_brightness(v, brightness), contrast)
        v = f.adjust_hue(f.adjust_saturation(v, saturation), hue)
        v = f.rgb_to_grayscale(v, 3) if grey else v
        assert (y[n] - v).abs().max() < 1e-4, n
    assert 0 < flipped < 6


def test_without_an_index_pytorchs_generator_draws(device):
    module, x = cnn.Augment(8), images(device)
    torch.manual_seed(4)
    first, second = module(x), module(x)
    torch.manual_seed(4)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)
    own = cnn.Augment(8, generator=torch.Generator().manual_seed(4))
    state = torch.get_rng_state()
    assert torch.equal(own(x), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_images_of_different_sizes(device, layout):
    """A list, or what pack_images makes of it, gives each image what it gets alone, and where the images are."""
    several = [images(device, shape=(1, 3, h, w))[0] for h, w in ((20, 31), (50, 17), (9, 9))]
    module = cnn.Augment(12, brightness=0.3, erasing_p=1, mean=0.5, std=0.5)
    given = several if layout == "CHW" else [image.permute(1, 2, 0) for image in several]
    y = module(given, index=[4, 5, 6])
    for n, image in enumerate(several):
        assert torch.equal(module(image[None], index=[4 + n])[0], y[n])
    flat, offsets, sizes = F.pack_images(given)
    packed = cnn.Augment(12, brightness=0.3, erasing_p=1, mean=(0.5,) * 3, std=0.5)
    assert torch.equal(packed((flat.to(device), offsets, sizes), index=[4, 5, 6]), y)


def test_one_channel(device):
    x = images(device, shape=(3, 1, 20, 20))
    module = cnn.Augment(8, mean=0.5, std=0.25, erasing_p=1, brightness=0.2)
    assert module(x, index=range(3)).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="one for each channel of the images, which have 1, but got 3"):
        cnn.Augment(8, erasing_p=1)(x)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (2.0, 2.0), ((1.0, -1.0, 0.0), (1.0, -1.0, 0.0))])
def test_erased_boxes_have_their_value_after_the_normalisation(device, value, expected):
    """As RandomErasing has it behind Normalize: 0 is the mean."""
    module = cnn.Augment(16, erasing_p=1, erasing_value=value, crop_scale=(1, 1))
    y, boxes = module(images(device), index=range(4)), module.draw((30, 40), range(4)).boxes
    assert boxes is not None
    for n, box in enumerate(boxes[:, 0]):
        left, top, right, bottom = map(int, box[:4])
        inside = y[n, :, top:bottom, left:right]
        assert inside.numel() > 0
        assert torch.allclose(inside, torch.tensor(expected, device=device).expand(3)[:, None, None], atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([0, 1, 2], {}, ValueError, r"labels must be \[N\] \(classes\) or \[N, K\] \(soft\), with N=4 images.*\[3\]"),
        ([0, 1, 2, 5], {}, ValueError, r"labels must be from 0 to num_classes - 1 = 4, but got 0 to 5"),
        ([0, 1, 2, -1], {}, ValueError, r"labels must be from 0 to num_classes - 1 = 4, but got -1 to 2"),
        ([0, 1, 2, 3], {"num_classes": None}, ValueError, "num_classes must be given to mix labels that are classes"),
        ([0.0, 1.0, 2.0, 3.0], {}, TypeError, r"labels \[N\] must be classes, whole numbers, but got torch.float32"),
        ([[0.5, 0.5]] * 4, {}, ValueError, r"soft labels must have num_classes=5 columns, but got \[4, 2\]"),
        ([[[0]]] * 4, {}, ValueError, r"labels must be \[N\].*but got \[4, 1, 1\]"),
    ],
)
def test_labels_that_do_not_fit(labels, options, error, message):
    with pytest.raises(error, match=message):
        augment(**options)(images(torch.device("cpu")), torch.tensor(labels))


def test_labels_without_mixing_stay(device):
    labels = torch.tensor([7, 8, 9, 10], device=device)
    module = augment(mixup_alpha=None, cutmix_alpha=None, num_classes=None)
    assert module(images(device), labels)[1] is labels
    with pytest.raises(TypeError, match="labels must be a tensor, but got list"):
        module(images(device), [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("index", "epoch", "error", "message"),
    [
        ([1, 2, 3], 0, ValueError, r"index must be \[N\], with N=4 images, but got \[3\]"),
        (
            [[0], [1], [2], [3]],
            0,
            ValueError,
            r"index must be \[N\], with N=4 images, but got \[4, 1\]",
        ),
        ([0.0, 1.0, 2.0, 3.0], 0, TypeError, "index must be whole numbers, but got torch.float32"),
        ([True] * 4, 0, TypeError, "index must be whole numbers, but got torch.bool"),
        (range(4), -1, ValueError, "epoch must be a whole number from 0 to 4294967295, but got epoch=-1"),
        (range(4), 0.5, TypeError, "epoch must be a whole number from 0 to 4294967295, but got epoch=0.5"),
    ],
)
def test_indices_and_epochs_that_do_not_fit(index, epoch, error, message):
    with pytest.raises(error, match=message):
        augment()(images(torch.device("cpu")), index=index, epoch=epoch)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((3, 8, 8), ValueError, r"images must be \[N, C, H, W\] or \[N, H, W, C\].*but got \[3, 8, 8\]"),
        ((2, 5, 8, 8), ValueError, "1 or 3 channels"),
        ("photograph.png", TypeError, "images must be a Tensor.*but got str"),
        ([[[[1.0, 2, 3]]]], ValueError, "uint8"),
    ],
)
def test_what_is_no_batch_of_images(device, given, error, message):
    """A tuple stands for a tensor of that shape."""
    given = torch.zeros(given, device=device) if isinstance(given, tuple) else given
    with pytest.raises(error, match=message):
        cnn.Augment(8)(given)


def test_an_image_too_small_for_a_padded_crop():
    message = r"size \(24, 20\) is larger than image 1, of 20 x 30 pixels, with padding=\(1, 1, 1, 1\)"
    with pytest.raises(ValueError, match=message):
        augment(crop_scale=None, padding=1).draw(torch.tensor([[22, 18], [20, 30]]), range(2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([[20, 30]] * 3, r"sizes must be \(height, width\), or \[N, 2\] with N=4 indices"),
        ((20,), r"sizes must be \(height, width\)"),
        ((20, 30, 3), r"sizes must be \(height, width\)"),
        ("large", r"sizes must be \(height, width\)"),
        ((0, 20), "sizes must be at least one pixel each, but got 0"),
        ((20, float("nan")), "sizes must be at least one pixel each"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        augment().draw(sizes, range(4))


def test_no_image(device):
    y, labels = augment()(images(device, shape=(0, 3, 30, 40)), torch.zeros(0, dtype=torch.int64, device=device))
    assert y.shape == (0, 3, 24, 20)
    assert labels.shape == (0, 5)
    assert augment().eval()(images(device, shape=(0, 3, 30, 40))).shape == (0, 3, 24, 20)


def test_a_single_image_is_mixed_with_none(device):
    y, labels = augment()(images(device, shape=(1, 3, 30, 40)), torch.tensor([3], device=device), index=[5])
    alone = augment(mixup_alpha=None, cutmix_alpha=None)(images(device, shape=(1, 3, 30, 40)), index=[5])
    assert torch.equal(y, alone)
    assert labels.tolist() == [[0, 0, 0, 1, 0]]


def test_coins_fall_as_often_as_their_p_says():
    """Each within four standard errors, and no coin says what another does."""
    drawn = cnn.Augment(
        64, horizontal_flip_p=0.3, vertical_flip_p=0.6, grayscale_p=0.2, erasing_p=0.7, erasing_scale=(0.1, 0.2)
    ).draw((64, 64), range(20_000))
    assert drawn.colours is not None
    assert drawn.boxes is not None
    coins = torch.stack(
        [drawn.maps[:, 0, 0] < 0, drawn.maps[:, 1, 1] < 0, drawn.colours[:, 4] == 1, drawn.boxes[:, 0, 2] > 0]
    ).double()
    p = torch.tensor([0.3, 0.6, 0.2, 0.7], dtype=torch.float64)
    assert ((coins.mean(1) - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all()
    assert (torch.corrcoef(coins) - torch.eye(4, dtype=torch.float64)).abs().max() < 4 / 20_000**0.5
