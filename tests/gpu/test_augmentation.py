"""Augmentation on a GPU: numbers that lie there are not read back, so a batch can be captured, replayed with others,
and launched while its images are still on their way; and results of more than 2^31 elements.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cnnfast_kernels.augment import ImageNumbers, ImageSource, augment_batch
from tests.support.augmenting import exact, images, maps, ragged, whole
from tests.support.gpu_ring import aside, asynchronous, needs_memory

N, SIZE = 8, (96, 80)
HOW = {"dtype": torch.float16, "fill": 0.3, "mean": 0.45, "std": 0.22}


def numbers(device: torch.device, seed: int = 0, noise: bool = False) -> ImageNumbers:
    """All kinds, another one for each image."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    m = torch.cat((torch.eye(2) + drawn(N, 2, 2) - 0.5, 40 * drawn(N, 2, 1) - 20), 2)
    colours = torch.cat((drawn(N, 3) + 0.5, drawn(N, 1) - 0.5, drawn(N, 1).round()), 1)
    boxes = torch.cat((40 * drawn(N, 2, 2), 40 + 40 * drawn(N, 2, 2), drawn(N, 2, 0 if noise else 3)), 2)
    partners = torch.cat((drawn(N, 1) * N, drawn(N, 1), 40 * drawn(N, 2), 40 + 40 * drawn(N, 2)), 1)
    seeds = torch.randint(0, 2**40, (N,), generator=generator) if noise else None
    return ImageNumbers(*(None if t is None else t.to(device) for t in (m, colours, boxes, seeds, partners)))


def of_different_sizes(device: torch.device, seed: int = 0) -> ImageSource:
    return ImageSource(*ragged([images(1, 50 + n, 90 - n, torch.uint8, device, seed=seed)[0] for n in range(N)]))


@pytest.mark.parametrize("noise", [False, True])
def test_the_same_bits_again(noise, device):
    """In the interpreter too, that the judge is run before it is needed."""
    source, own = of_different_sizes(device), numbers(device, noise=noise)
    size = SIZE if device.type == "cuda" else (9, 33)
    first = augment_batch(source, own, whole(*size, **HOW))
    assert first.isfinite().all()
    for _ in range(20 if device.type == "cuda" else 1):
        assert torch.equal(augment_batch(source, own, whole(*size, **HOW)), first)


@pytest.mark.gpu
@asynchronous
@pytest.mark.parametrize("noise", [False, True])
def test_a_graph_is_replayed_with_other_numbers(noise, device):
    source, own = of_different_sizes(device), numbers(device, noise=noise)
    with aside(device):
        augment_batch(source, own, whole(*SIZE, **HOW))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = augment_batch(source, own, whole(*SIZE, **HOW))
    for seed in (1, 2, 3):
        other, others = of_different_sizes(device, seed), numbers(device, seed, noise)
        source.images.copy_(other.images)
        for kept, new in zip(own, others, strict=True):
            if kept is not None:
                kept.copy_(new)
        graph.replay()
        assert torch.equal(captured, augment_batch(other, others, whole(*SIZE, **HOW))), seed


@pytest.mark.gpu
@asynchronous
def test_it_waits_for_what_its_stream_does_before_it(device, side_stream):
    """Images and numbers are written late; both launches come after them."""
    x, own = images(N, 64, 64, torch.float32, device), numbers(device)
    right = augment_batch(ImageSource(x), own, whole(*SIZE, **HOW))  # compiles, too
    late = torch.full_like(x, float("nan"))
    colours = torch.full_like(own.colours, float("nan"))
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side_stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        colours.copy_(own.colours)
        y = augment_batch(ImageSource(late), own._replace(colours=colours), whole(*SIZE, **HOW))
    ended = torch.cuda.Event()
    ended.record(side_stream)
    assert not ended.query(), "the sleep was over before the kernels were launched: the test shows nothing"
    torch.cuda.current_stream(device).wait_event(ended)
    assert torch.equal(y, right)


def run_large(device: torch.device, count: int, height: int, width: int, places: list[int]) -> None:
    """`count` results of three images in turn, each flipped: one batch of many elements."""
    x = images(3, height, width, torch.uint8, device)
    flat, offsets, sizes = ragged([*x])
    turn = torch.arange(count, device=device) % 3
    source = ImageSource(flat, offsets[turn].contiguous(), sizes[turn].contiguous())
    own = ImageNumbers(maps([[-1, 0, width], [0, 1, 0]], count, device))
    y = augment_batch(source, own, whole(height, width, torch.float16))
    for n in places:
        assert torch.equal(y[n].cpu(), exact(x[n % 3]).flip(2).float().half()), n


@pytest.mark.gpu
def test_results_of_more_than_31_bits(roomy):
    needs_memory(roomy, 6)
    height, width = 256, 224
    boundary = 2**31 // (3 * height * width)
    run_large(roomy, boundary + 3, height, width, [0, 1, boundary - 1, boundary, boundary + 1, boundary + 2])


def test_the_judge_of_large_results_on_few_images(device):
    run_large(device, 4, 9, 7, [*range(4)])
