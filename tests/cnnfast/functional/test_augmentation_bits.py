"""The same image under the same numbers gets the same bits: in any batch and order, with any number of threads, in
another process, and where there is no triton.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

import cnnfast
import cnnfast.functional as F
from tests.support.child import run_compiled

N = 5
# Extents of images, and of their results: small images are converted whole, of large ones a part is cut out.
EXTENTS = {"small": ((13, 9), (12, 11)), "large": ((50, 60), (17, 13))}
COMMON: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
BACKENDS = ("kernels", "torch")


def batch(case: str, device: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Images and numbers of all kinds; some maps take pixels to pixels, some stay within their image."""
    (H, W), (P, Q) = EXTENTS[case]
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8, generator=generator)
    maps = torch.tensor([[0.5, 0.1, 1.3], [0.1, 0.4, 1.7]]).repeat(N, 1, 1)
    maps[1] = torch.tensor([[-1, 0, W], [0, 1, 2]])
    maps[2] = torch.tensor([[1.1, -0.3, 2.1], [0.4, 0.9, -1.2]])
    maps[3] = torch.tensor([[1e7, 0, 0.5], [0, 1, 0.5]])
    colours = torch.tensor([0.8, 1.3, 0.7, 0.1, 0]) + torch.arange(N)[:, None] * torch.tensor([0.1, -0.1, 0.1, -0.1, 0])
    colours[2], colours[3] = torch.tensor([1, 1, 1, 0, 1.0]), torch.tensor([1.5, 1, 1, 0, 0])
    boxes = torch.tensor([[[1, 2, 9, 8], [4, 4, 11.0, 11]]]).repeat(N, 1, 1)
    boxes[4] = 0
    noise = torch.arange(N) * 2**33 + 7
    options = {"maps": maps, "colours": colours, "boxes": boxes, "noise": noise, "size": (P, Q), "fill": 0.3}
    return images.to(device), COMMON | options


def part(options: dict[str, Any], which: list[int]) -> dict[str, Any]:
    return {name: value[which] if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def computed(backend: Any, images: Any, options: dict[str, Any], border: Any) -> torch.Tensor:
    with cnnfast.backend(backend):
        return F.augment(images, **options, border=border)


@pytest.mark.parametrize("border", ["constant", "reflection"])
@pytest.mark.parametrize("case", EXTENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_the_batch(backend, case, border, device):
    pytest.importorskip("triton")
    images, options = batch(case, device)
    if backend == "kernels":  # an interpreted kernel takes its time
        options = options | {"size": (6, 33)}
        options["boxes"] = options["boxes"].clamp(max=6)
    right = computed(backend, images, options, border)
    others = [[n] for n in range(N)] if backend == "torch" else []
    for which in [*others, [3, 0], [4, 2, 1, 3, 0]]:
        assert torch.equal(computed(backend, images[which], part(options, which), border), right[which])
    flat, offsets, sizes = F.pack_images(list(images.cpu().flip(0)))
    packed = flat.to(images.device), offsets, sizes
    backwards = list(range(N))[::-1]
    assert torch.equal(computed(backend, packed, part(options, backwards), border), right.flip(0))


@pytest.mark.cpu_tensors("threads are the CPU's")
@pytest.mark.parametrize("border", ["constant", "reflection"])
@pytest.mark.parametrize("case", EXTENTS)
def test_whatever_the_threads(case, border, monkeypatch):
    """Also where one image is cut into bands for them, and in however many steps a batch is taken."""
    from cnnfast.functional import plain_augmentation

    images, options = batch(case, "cpu")
    right = computed("torch", images, options, border)
    threads = torch.get_num_threads()
    try:
        for number, at_once in ((2, 1), (4, 2**30), (3, 1000)):
            monkeypatch.setattr(plain_augmentation, "AT_ONCE", at_once)
            torch.set_num_threads(number)
            assert torch.equal(computed("torch", images, options, border), right)
            alone = [computed("torch", images[[n]], part(options, [n]), border) for n in range(N)]
            assert torch.equal(torch.cat(alone), right)
    finally:
        torch.set_num_threads(threads)


def digests() -> list[str]:
    """Of what PyTorch's form computes of all cases on the CPU."""
    found = []
    for case in EXTENTS:
        for border in ("constant", "reflection"):
            y = computed("torch", *batch(case, "cpu"), border)
            found.append(hashlib.sha256(y.permute(0, 2, 3, 1).contiguous().numpy().tobytes()).hexdigest())
    return found


def without_triton() -> list:
    """In a process of its own: the same, and who served, also a compiled function."""
    import sys

    sys.modules["triton"] = None  # type: ignore[assignment]
    import torch

    import cnnfast
    import cnnfast.functional as F
    from tests.cnnfast.functional.test_augmentation_bits import batch, digests

    torch.set_num_threads(2)
    images, options = batch("small", "cpu")
    with cnnfast.trace() as trace:
        right = F.augment(images, **options)
    compiled = torch.compile(lambda x: F.augment(x, **options), backend="aot_eager", fullgraph=True)
    return [[str(call) for call in trace], digests(), torch.equal(compiled(images), right)]


@pytest.mark.compiled
@pytest.mark.cpu_tensors("the other process has the CPU alone")
def test_in_another_process_without_triton():
    (call,), theirs, compiled = run_compiled(without_triton)
    assert call == "augment 5x3x13x9 uint8: torch, because triton is not installed"
    assert theirs == digests()
    assert compiled
