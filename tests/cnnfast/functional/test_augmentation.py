"""F.augment: who serves it and by how many launches, that both who serve it agree, and which results are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import cnnfast
import cnnfast.functional as F
from cnnfast import dispatch

pytest.importorskip("triton")

N, C, H, W = 3, 3, 11, 14
P, Q = 9, 20
COMMON: dict[str, Any] = {"size": (P, Q), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
PLAIN: dict[str, Any] = {"mean": 0.0, "std": 1.0}


@pytest.fixture
def images(device) -> torch.Tensor:
    return torch.randint(0, 256, (N, C, H, W), dtype=torch.uint8).to(device)


def numbers(option: str) -> dict[str, Any]:
    maps = torch.randn(N, 2, 3) * torch.tensor([0.6, 0.6, 8]) + torch.eye(2, 3)
    colours = torch.tensor([[1.2, 1, 1.5, 0.2, 0], [0.8, 1, 0.2, -0.4, 1], [1, 1, 1, 0, 0]])
    boxes = torch.tensor([[[3, 2, 10, 7, 0.1, 0.2, 0.3], [5, 4, 18.5, 9, 0.5, 0.5, 0.5]]]).repeat(N, 1, 1)
    partners = torch.tensor([[1, 0.3, 0, 0, 0, 0], [0, 1, 3, 4, 10, 8], [0, 0.5, 0, 0, 20, 2]])
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
    assert [(call.operation, call.served_by, call.reason) for call in plain] == [
        ("augment", "torch", 'backend("torch")')
    ]
    assert ours.dtype == theirs.dtype == options.get("dtype", torch.float32)
    assert ours.shape == theirs.shape
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in (ours, theirs))
    return ours, theirs, trace.launches


def assert_agree(images: Any, **options: Any) -> list[str]:
    """Positions differ by some 1e-5 pixels between the two, and the steepest images by 1 / std a pixel."""
    ours, theirs, launches = both(images, **options)
    atol = 1e-4 if ours.dtype == torch.float32 else 4 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    return launches


@pytest.mark.parametrize("option", OPTIONS)
def test_kernels_and_pytorch_agree(option, images):
    launches = assert_agree(images, **numbers(option))
    assert launches == ["grey_mean_kernel"] * (option == "contrast") + ["augment_kernel"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_images_and_of_results(dtype, images):
    given = numbers("partners")
    assert_agree(images, **given, dtype=dtype)
    assert_agree((images / 255).to(dtype), **given)


def test_one_channel(images):
    given = numbers("contrast") | {"boxes": numbers("boxes")["boxes"][..., :5], "mean": 0.4, "std": 0.2}
    assert_agree(images[:, :1], **given, fill=0.25)
    packed = F.pack_images(list(images[:, :1].cpu()))
    assert_agree((packed[0].to(images.device), *packed[1:]), **given | {"mean": [0.4]}, fill=0.25)


def test_what_a_small_result_sees_of_a_large_image(device):
    """PyTorch's form converts that part alone."""
    image = torch.randint(0, 256, (1, 3, 64, 80), dtype=torch.uint8).to(device)
    turned = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    for x, y in [(30, 20), (-3, -2), (75, 60), (-90, 10), (10, 200)]:
        maps = torch.cat([turned, torch.tensor([[x + 0.25], [y + 0.5]])], 1)[None]
        for border in ("constant", "reflection"):
            assert_agree(image, maps=maps, size=(8, 9), border=border, fill=0.5)


@pytest.mark.parametrize("scale", [1e5, 1e37])
def test_maps_that_lead_far_away(scale, images):
    """What is far beyond the border is `fill`, and nothing is read from there."""
    maps = torch.tensor([[scale, 0.5, scale], [0.5, scale, scale]]).repeat(N, 1, 1)
    for result in both(images, maps=maps, fill=0.5, **PLAIN)[:2]:
        assert torch.equal(result, torch.full_like(result, 0.5))
    for result in both(images, maps=maps, border="reflection", **PLAIN)[:2]:
        assert result.min() >= 0
        assert result.max() <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Exact results

FLIPPED, SHIFTED = [[-1.0, 0, W], [0, 1, 0]], [[1.0, 0, -4], [0, 1, 3]]
EXACT = {
    "no-op": ([[1.0, 0, 0], [0, 1, 0]], lambda x: x),
    "flip": (FLIPPED, lambda x: x.flip(3)),
    "vertical flip": ([[1.0, 0, 0], [0, -1, H]], lambda x: x.flip(2)),
    "half a turn": ([[-1.0, 0, W], [0, -1, H]], lambda x: x.flip(2, 3)),
    "a quarter turn": ([[0, -1.0, W], [1, 0, 0]], lambda x: x.rot90(1, (2, 3))),
    "a quarter turn back": ([[0, 1.0, 0], [-1, 0, H]], lambda x: x.rot90(-1, (2, 3))),
    "transposed": ([[0, 1.0, 0], [1, 0, 0]], lambda x: x.transpose(2, 3)),
    "crop": ([[1.0, 0, 5], [0, 1, 2]], lambda x: x[:, :, 2:9, 5:12]),
    "flipped crop": ([[-1.0, 0, 12], [0, 1, 2]], lambda x: x[:, :, 2:9, 5:12].flip(3)),
}


def as_floats(images: torch.Tensor) -> torch.Tensor:
    """Quotients that are rounded to nearest, on a GPU too."""
    return (images.cpu().double() / 255).float().to(images.device) if images.dtype == torch.uint8 else images.float()


@pytest.mark.parametrize("kind", ["uint8", "float32", "ragged"])
@pytest.mark.parametrize("case", EXACT)
def test_what_takes_pixels_to_pixels_is_exact(case, kind, images):
    m, right = EXACT[case]
    source = images if kind != "float32" else torch.rand(N, C, H, W).to(images.device)
    wanted = right(as_floats(source))
    if kind == "ragged":
        source = F.pack_images(list(images.cpu()))
        source = (source[0].to(images.device), *source[1:])
    given = PLAIN | {"mean": [0.0] * 3, "maps": torch.tensor(m).repeat(N, 1, 1), "size": tuple(wanted.shape[2:])}
    for border in ("constant", "reflection"):
        for result in both(source, border=border, fill=0.3, **given)[:2]:
            assert torch.equal(result, wanted)


@pytest.mark.parametrize("m", [SHIFTED, [[-1.0, 0, W + 9], [0, 1, 3]], [[0, 1.0, -7], [-1, 0, 40]]])
def test_beyond_the_border_too(m, images):
    """Both agree to the bit, also on what lies beyond: far enough for several reflections."""
    maps, fill = torch.tensor([m]), (0.3, 0.1, 0.7)
    for border in ("constant", "reflection"):
        ours, theirs, _ = both(images[:1], maps=maps, size=(30, 32), border=border, fill=fill, **PLAIN)
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours[:, :, :9], torch.zeros_like(ours[:, :, :9]))


def test_shifted_by_whole_pixels(images):
    """One image is seen at its place, and the fill around it, or the image's reflection."""
    x = as_floats(images)
    wanted = torch.full((N, C, H, W), 0.5, device=images.device)
    wanted[:, :, :-3, 4:] = x[:, :, 3:, :-4]
    reflected = torch.cat([x[:, :, 3:], x[:, :, -3:].flip(2)], 2)
    reflected = torch.cat([reflected[..., :4].flip(3), reflected[..., :-4]], 3)
    given = PLAIN | {"maps": torch.tensor(SHIFTED).repeat(N, 1, 1), "size": (H, W)}
    for border, right in (("constant", wanted), ("reflection", reflected)):
        for result in both(images, border=border, fill=0.5, **given)[:2]:
            assert torch.equal(result, right)


def test_a_whole_image_of_the_size_of_the_result_is_itself(images):
    for result in both(images, size=(H, W), **PLAIN)[:2]:
        assert torch.equal(result, as_floats(images))


def test_normalised_as_arithmetic_says(images):
    x = as_floats(images).cpu()
    mean, std = (torch.tensor(COMMON[name]).view(3, 1, 1) for name in ("mean", "std"))
    for result in both(images, size=(H, W))[:2]:
        assert torch.equal(result.cpu(), (x - mean) / std)


def test_at_weight_1_a_partner_adds_nothing(device):
    """Not even what is no number."""
    images = torch.rand(2, 3, 5, 6).to(device)
    images[1] = float("nan")
    partners = torch.tensor([[1.0, 1, 0, 0, 2, 3], [1, 1, 0, 0, 0, 0]])
    for result in both(images, partners=partners, size=(5, 6), **PLAIN)[:2]:
        assert torch.equal(result[0, :, 3:], images[0, :, 3:])
        assert result[0, :, :3, :2].isnan().all()
        assert result[1].isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# Images in any order of memory, of different sizes, and none


def test_a_ragged_batch_is_as_its_images_are(images):
    several = [images[n % N, :, :h, :w].contiguous() for n, (h, w) in enumerate([(11, 14), (5, 9), (10, 4)])]
    given = numbers("contrast")
    flat, offsets, sizes = F.pack_images([image.cpu() for image in several])
    ours, theirs, launches = both((flat.to(images.device), offsets, sizes), **given)
    assert launches == ["grey_mean_kernel", "augment_kernel"]
    for n, image in enumerate(several):
        alone = both(image[None], maps=given["maps"][n : n + 1], colours=given["colours"][n : n + 1])
        assert torch.equal(alone[0][0], ours[n])
        assert torch.equal(alone[1][0], theirs[n])


def test_any_strides(images):
    given = numbers("maps")
    right = both(images, **given)[:2]
    nhwc = images.permute(0, 2, 3, 1).contiguous()
    wide = torch.zeros(N, C, H, 2 * W, dtype=torch.uint8, device=images.device)[..., ::2].copy_(images)
    last = images.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for other in (nhwc, nhwc.permute(0, 3, 1, 2), wide, last):
        assert all(torch.equal(*pair) for pair in zip(both(other, **given)[:2], right, strict=True))
    columns = given["maps"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(both(images, maps=columns)[0], right[0])


def test_empty_batches(images):
    given = {name: value[:0] if isinstance(value, torch.Tensor) else value for name, value in numbers("noise").items()}
    flat, offsets, sizes = F.pack_images([])
    for empty in (images[:0], images[:0].permute(0, 2, 3, 1), (flat.to(images.device), offsets, sizes)):
        ours, theirs, launches = both(empty, **given)
        assert launches == []
        assert ours.shape == theirs.shape == (0, C, P, Q)
    no_box = numbers("noise") | {"boxes": torch.zeros(N, 0, 4)}
    assert torch.equal(both(images, **no_box)[0], both(images, maps=no_box["maps"])[0])


def test_packed_images_are_there_again():
    arrays = [np.random.default_rng(n).integers(0, 256, (4 + n, 5, 3), np.uint8) for n in range(4)]
    arrays[1].flags.writeable = False
    given = [
        arrays[0], arrays[1][:, ::-1], torch.from_numpy(arrays[2]), torch.from_numpy(arrays[3]).permute(2, 0, 1),
    ]  # fmt: skip
    flat, offsets, sizes = F.pack_images(given)
    assert (offsets.dtype, sizes.dtype, flat.dtype) == (torch.int64, torch.int32, torch.uint8)
    assert sizes.tolist() == [[4, 5], [5, 5], [6, 5], [7, 5]]
    assert flat.numel() == sum(array.size for array in arrays)
    for n, (offset, array) in enumerate(zip(offsets.tolist(), arrays, strict=True)):
        seen = flat[offset : offset + array.size].view(array.shape).numpy()
        assert np.array_equal(seen, array[:, ::-1] if n == 1 else array)


# ----------------------------------------------------------------------------------------------------------------------
# Who serves


def test_the_bare_interpreter_leaves_bfloat16_to_pytorch(images, monkeypatch):
    if images.is_cuda:
        pytest.skip("interpreter ring: a GPU computes bfloat16")
    monkeypatch.setattr(dispatch, "_interpreter_rounds_bf16", lambda: False)
    for given, dtype in [(images, torch.bfloat16), ((images / 255).bfloat16(), torch.float32)]:
        with cnnfast.trace() as trace:
            y = F.augment(given, **COMMON, dtype=dtype)
        assert [call.reason for call in trace] == ["Triton's interpreter computes bfloat16 wrongly"]
        assert y.dtype == dtype
    with cnnfast.trace() as trace:
        F.augment(images, **COMMON)
    assert trace.launches == ["augment_kernel"]


def test_under_transforms_pytorch_serves(images):
    """The images of a batch of batches, one by one; and what a transform does not reach, as without it."""
    given = numbers("partners")
    with cnnfast.backend("torch"):
        right = F.augment(images, **COMMON, **given)
    with cnnfast.trace() as trace:
        stacked = torch.vmap(lambda x: F.augment(x, **COMMON, **given))(torch.stack([images, images]))
        scale = torch.tensor(2.0, device=images.device)
        slope = torch.func.grad(lambda s: (F.augment(images, **COMMON, **given) * s).sum())(scale)
    assert torch.equal(stacked, torch.stack([right, right]))
    torch.testing.assert_close(slope, right.sum())
    assert {call.reason for call in trace} == {"a functorch transform or forward-mode AD is active"}


@pytest.mark.parametrize("dtype", ["half", "float16", torch.float16])
def test_dtypes_by_name(dtype, images):
    assert F.augment(images, **COMMON, dtype=dtype).dtype == torch.float16
