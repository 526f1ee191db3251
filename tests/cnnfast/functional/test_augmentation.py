"""F.augment: who serves it, by how many launches, and that both who serve it agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cnnfast
import cnnfast.functional as F

pytest.importorskip("triton")

N, C, H, W = 3, 3, 21, 30
P, Q = 19, 35
COMMON: dict[str, Any] = {"size": (P, Q), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


@pytest.fixture
def images(device) -> torch.Tensor:
    return torch.randint(0, 256, (N, C, H, W), dtype=torch.uint8).to(device)


def numbers(option: str) -> dict[str, Any]:
    maps = torch.randn(N, 2, 3) * torch.tensor([0.6, 0.6, 8]) + torch.eye(2, 3)
    colours = torch.tensor([[1.2, 1, 1.5, 0.2, 0], [0.8, 1, 0.2, -0.4, 1], [1, 1, 1, 0, 0]])
    boxes = torch.tensor([[[3, 4, 10, 15, 0.1, 0.2, 0.3], [5, 5, 20.5, 19, 0.5, 0.5, 0.5]]]).repeat(N, 1, 1)
    partners = torch.tensor([[1, 0.3, 0, 0, 0, 0], [0, 1, 3, 4, 10, 11], [0, 0.5, 0, 0, 35, 2]])
    return {
        "resize": {},
        "maps": {"maps": maps},
        "reflection": {"maps": maps, "border": "reflection"},
        "fill": {"maps": maps, "fill": (0.1, 0.5, 0.9)},
        "colours": {"maps": maps, "colours": colours},
        "contrast": {"maps": maps, "colours": colours + torch.tensor([0, 0.5, 0, 0, 0])},
        "boxes": {"maps": maps, "boxes": boxes},
        "noise": {"maps": maps, "boxes": boxes[..., :4], "noise": torch.tensor([1, -2, 2**40])},
        "partners": {"maps": maps, "colours": colours, "boxes": boxes, "partners": partners},
    }[option]


OPTIONS = ("resize", "maps", "reflection", "fill", "colours", "contrast", "boxes", "noise", "partners")


def both(images: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Our kernels' result, PyTorch's, and the launches of ours."""
    with cnnfast.backend("kernels"), cnnfast.trace() as trace:
        ours = F.augment(images, **COMMON | options)
    assert [(call.operation, call.served_by) for call in trace] == [("augment", "kernels")]
    with cnnfast.backend("torch"), cnnfast.trace() as plain:
        theirs = F.augment(images, **COMMON | options)
    assert [(call.operation, call.served_by) for call in plain] == [("augment", "torch")]
    assert ours.dtype == theirs.dtype == options.get("dtype", torch.float32)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in (ours, theirs))
    return ours, theirs, trace.launches


@pytest.mark.parametrize("option", OPTIONS)
def test_kernels_and_pytorch_agree(option, images):
    ours, theirs, launches = both(images, **numbers(option))
    assert launches == ["grey_mean_kernel"] * (option == "contrast") + ["augment_kernel"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_ragged_batch_is_as_its_images_are(images):
    several = [images[n % N, :, :h, :w].contiguous() for n, (h, w) in enumerate([(21, 30), (8, 11), (20, 7)])]
    given = numbers("colours")
    flat, offsets, sizes = F.pack_images([image.cpu() for image in several])
    packed = (flat.to(images.device), offsets, sizes)
    ours, theirs, launches = both(packed, **given)
    assert launches == ["augment_kernel"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for n, image in enumerate(several):
        alone = both(image[None], maps=given["maps"][n : n + 1], colours=given["colours"][n : n + 1])
        assert torch.equal(alone[0][0], ours[n])
        assert torch.equal(alone[1][0], theirs[n])
