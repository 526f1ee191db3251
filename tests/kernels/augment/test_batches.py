"""Batches: partners, everything at once, the same image among others, and what is compiled and planned for a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cnnfast_kernels import launch
from cnnfast_kernels.augment import ImageNumbers, ImageSource, augment_batch, batches
from tests.support.augmenting import exact, identity, images, ragged, whole
from tests.support.child import run_compiled

H, W = 11, 37
INF, NAN = float("inf"), float("nan")


def partnered(x: Tensor, rows: list[list[float]], **how) -> Tensor:
    numbers = ImageNumbers(identity(len(x), x.device), partners=torch.tensor(rows, device=x.device))
    return augment_batch(ImageSource(x), numbers, whole(*x.shape[2:], **how)).cpu()


def test_mixup(device):
    """Weights whose products are exact: the sum is what float64 has."""
    x = images(4, H, W, torch.float16, device)
    weights = [0.25, 0.0, 1.0, 0.5]
    y = partnered(x, [[(n + 1) % 4, weight, 0, 0, 0, 0] for n, weight in enumerate(weights)])
    share = torch.tensor(weights, dtype=torch.float64).view(4, 1, 1, 1)
    assert torch.equal(y, (share * exact(x) + (1 - share) * exact(x).roll(-1, 0)).float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_cutmix(dtype, device):
    """A box in one tile, one across all of them, one at the edge, and none."""
    x = images(4, H, W, dtype, device)
    boxes = [(3, 2, 9, 6), (20, 1, 36, 10), (-4, 9, 5, 99), (8, 8, 8, 10)]
    y = partnered(x, [[(n + 1) % 4, 1, *box] for n, box in enumerate(boxes)])
    right = exact(x).float()
    other = right.roll(-1, 0)
    for n, (left, top, end, bottom) in enumerate(boxes):
        cut = n, slice(None), slice(max(top, 0), bottom), slice(max(left, 0), end)
        right[cut] = other[cut]
    assert torch.equal(y, right)


def test_a_box_beside_a_weight(device):
    x = images(2, H, W, torch.float16, device)
    y = partnered(x, [[1, 0.25, 3, 2, 9, 6], [0, 1, 0, 0, 0, 0]])
    right = exact(x).float()
    right[0] = 0.25 * right[0] + 0.75 * right[1]
    right[0, :, 2:6, 3:9] = right[1, :, 2:6, 3:9]
    assert torch.equal(y, right)


@pytest.mark.parametrize(
    ("index", "taken"),
    [(-5, 0), (NAN, 0), (-INF, 0), (2.9, 2), (3, 2), (99, 2), (2.0**31, 2), (3e38, 2), (INF, 2)],
)
def test_a_partner_that_is_not_there_is_another(index, taken, device):
    """Nothing but the images is read: the batch lies amid NaN."""
    memory = torch.full((5, 3, 8, 8), NAN, device=device)
    x = memory[1:4]
    x.copy_(images(3, 8, 8, torch.float32, device))
    y = partnered(x, [[index, 0, 0, 0, 0, 0]] * 3)
    assert torch.equal(y, x[taken].cpu().expand(3, 3, 8, 8))


def test_a_partner_shows_where_it_is_to_and_nowhere_else(device):
    """At weight 1 its pixels add nothing outside the box, be they no numbers; nor does the image within."""
    x = images(2, H, W, torch.float32, device)
    x[1] = NAN
    y = partnered(x, [[1, 1, 3, 2, 9, 6], [0, 1, 0, 0, W, H]])
    right = exact(x).float()
    right[0, :, 2:6, 3:9] = NAN
    right[1] = exact(x)[0]
    torch.testing.assert_close(y, right, rtol=0, atol=0, equal_nan=True, check_stride=False)


# ----------------------------------------------------------------------------------------------------------------------
# Everything at once


def everything(N: int, device: torch.device, noise: bool = False, seed: int = 0) -> ImageNumbers:
    """All kinds of numbers, another one for each image."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.rand(N, 2, 3, generator=generator) - 0.5
    m[:, :, 2] = m[:, :, 2] * 20 + 5
    m[:, 0, 0] += 1
    m[:, 1, 1] += 1
    colours = torch.rand(N, 5, generator=generator) + 0.5
    colours[:, 3] -= 1
    colours[:, 4] = (torch.arange(N) % 3 == 0).float()
    corners = torch.rand(N, 2, 4, generator=generator) * 8 + torch.tensor([0.0, 0, 9, 5])
    values = torch.rand(N, 2, 3, generator=generator)
    partners = torch.rand(N, 6, generator=generator)
    partners[:, 0] = (torch.arange(N) + 1) % N
    partners[:, 2:] = torch.tensor([4.0, 2, 20, 7])
    boxes = corners if noise else torch.cat((corners, values), 2)
    seeds = torch.arange(N) * 1000003 if noise else None
    return ImageNumbers(*(None if t is None else t.to(device) for t in (m, colours, boxes, seeds, partners)))


HOW = {"fill": 0.3, "mean": 0.45, "std": 0.22}


def test_all_of_it_is_each_after_the_other(device):
    """One pass gives what several give: the views of images without partners, mixed and normalised in float64."""
    x, numbers = images(3, 14, 20, torch.uint8, device), everything(3, device)
    y = augment_batch(ImageSource(x), numbers, whole(H, 20, **HOW)).cpu().double()
    views = augment_batch(ImageSource(x), numbers._replace(partners=None), whole(H, 20, fill=0.3)).cpu().double()
    assert numbers.partners is not None
    weight = numbers.partners[:, 1].cpu().double().view(3, 1, 1, 1)
    other = views.roll(-1, 0)
    mixed = weight * views + (1 - weight) * other
    mixed[:, :, 2:7, 4:20] = other[:, :, 2:7, 4:20]
    torch.testing.assert_close(y, (mixed - 0.45) / 0.22, rtol=0, atol=2e-6, check_stride=False)


@pytest.mark.parametrize("noise", [False, True])
def test_an_image_is_the_same_in_every_batch(noise, device):
    """To the bit, wherever it stands, beside its partner; and a second time."""
    x, numbers = images(3, 14, 20, torch.uint8, device), everything(3, device, noise)
    augmenting = whole(H, 20, torch.float16, **HOW)
    y = augment_batch(ImageSource(x), numbers, augmenting)
    assert torch.equal(augment_batch(ImageSource(x), numbers, augmenting), y)
    order = [1, 2]  # and 2 is the partner of 1
    fewer = ImageNumbers(*(None if t is None else t[order].contiguous() for t in numbers))
    assert fewer.partners is not None
    fewer.partners[0, 0] = 1
    fewer.partners[1, 1:] = torch.tensor([1.0, 0, 0, 0, 0], device=device)  # whose partner has left
    assert torch.equal(augment_batch(ImageSource(x[order]), fewer, augmenting)[0], y[1])
    assert torch.equal(augment_batch(ImageSource(*ragged([*x[order]])), fewer, augmenting)[0], y[1])


def test_an_empty_batch_launches_nothing(device, launches):
    x, numbers = images(0, 8, 8, torch.uint8, device), everything(0, device)
    y = augment_batch(ImageSource(x), numbers, whole(H, W))
    assert y.shape == (0, 3, H, W)
    offsets, sizes = (
        torch.empty(0, dtype=torch.int64, device=device),
        torch.empty(0, 2, dtype=torch.int32, device=device),
    )
    assert augment_batch(ImageSource(x.view(-1), offsets, sizes), numbers, whole(H, W)).shape == (0, 3, H, W)
    assert not launches


# ----------------------------------------------------------------------------------------------------------------------
# What is made once


def test_a_buffer_of_another_length_makes_no_plan(device):
    launch.forget_plans()
    for seed, sizes in enumerate([(5, 6), (7, 3), (1, 40)]):
        each = [images(1, *sizes, torch.uint8, device, seed=seed)[0], images(1, 4, 4, torch.uint8, device)[0]]
        augment_batch(ImageSource(*ragged(each, gap=seed)), ImageNumbers(identity(2, device)), whole(8, 8))
    assert batches._plan.cache_info().misses == 1


def test_strides_that_nothing_steps_by_make_no_plan(device):
    """Of one image, and of one channel, the strides say nothing."""
    launch.forget_plans()
    x = images(3, 8, 8, torch.float32, device, C=1)
    for one in (x[:1], x[::2][:1], x[:1].contiguous(memory_format=torch.channels_last), x.expand(3, 3, 8, 8)[:1, :1]):
        augment_batch(ImageSource(one), ImageNumbers(identity(1, device)), whole(8, 8, C=1))
    assert batches._plan.cache_info().misses == 1


def compiled_for_sizes():
    """How many binaries there are for each kind of images, after batches of each size."""
    import torch

    from cnnfast_kernels.aot.stub_driver import stub_driver
    from cnnfast_kernels.augment import Augmenting, ImageNumbers, ImageSource, augment_batch

    def call(N, H, W, P, Q, boxes=1, odd=0, fmt=torch.contiguous_format, different=False):
        def numbers(*shape, dtype=torch.float32):
            count = torch.Size(shape).numel()
            return torch.zeros(count + odd, dtype=dtype)[odd:].view(shape)

        x = torch.zeros(N, 3, H, W, dtype=torch.uint8).contiguous(memory_format=fmt)
        source = ImageSource(x)
        if different:
            flat = torch.zeros(N * H * W * 3 + odd, dtype=torch.uint8)[odd:]
            source = ImageSource(flat, numbers(N, dtype=torch.int64), numbers(N, 2, dtype=torch.int32))
        own = ImageNumbers(numbers(N, 2, 3), numbers(N, 5), numbers(N, boxes, 7), None, numbers(N, 6))
        three = (0.1 * N, 0.2, 0.3)
        augment_batch(source, own, Augmenting(P, Q, torch.float16, three, three, three))

    sizes = [(4, 32, 48, 16, 64), (3, 33, 47, 224, 224), (16, 16, 16, 1, 16), (5, 7, 2, 512, 9), (1, 16, 1, 1, 1)]
    found = {}
    with stub_driver() as gpu:
        for name, how in {
            "channels adjacent": {"fmt": torch.channels_last},
            "of different sizes": {"different": True},
            "channels apart": {},
        }.items():
            before = gpu.compiles
            counts = []
            for each in sizes:
                for boxes, odd in ((1, 0), (1, 1), (3, 3), (16, 0)):
                    call(*each, boxes, odd, **how)
                counts.append(gpu.compiles - before)
            found[name] = counts
    return found


@pytest.mark.compiled
def test_nothing_is_compiled_for_sizes_counts_or_addresses():
    """Two kernels for each kind of images, whatever the extents, the number of boxes and images, the numbers of a
    channel, and where numbers begin in memory.
    """
    found = run_compiled(compiled_for_sizes)
    assert found == dict.fromkeys(("channels adjacent", "of different sizes", "channels apart"), [2] * 5)
