"""Batches for the augmentation kernels: maps by name, and images in every dtype and layout."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnfast_kernels.augment import Augmenting
from tests.support.poison import embed

IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("nchw", "nhwc", "cut from nchw", "cut from nhwc", "transposed", "repeated")


def whole(
    P: int,
    Q: int,
    dtype: torch.dtype = torch.float32,
    C: int = 3,
    fill: float = 0.0,
    mean: float = 0.0,
    std: float = 1.0,
    reflect: bool = False,
) -> Augmenting:
    """Results of P x Q pixels whose channels are treated alike; by default they are not normalised."""
    return Augmenting(P, Q, dtype, (fill,) * C, (mean,) * C, (std,) * C, reflect)


def maps(rows: list[list[float]], N: int, device: torch.device) -> Tensor:
    """The map with these two rows, for each of N images."""
    return torch.tensor(rows, dtype=torch.float32, device=device).expand(N, 2, 3).contiguous()


def identity(N: int, device: torch.device) -> Tensor:
    return maps([[1, 0, 0], [0, 1, 0]], N, device)


def images(N: int, H: int, W: int, dtype: torch.dtype, device: torch.device, C: int = 3, seed: int = 0) -> Tensor:
    """Of any bytes, or of floats from 0 to 1: [N, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (N, C, H, W), generator=generator, dtype=torch.uint8).to(device)
    return torch.rand(N, C, H, W, generator=generator).to(device, dtype)


def exact(x: Tensor) -> Tensor:
    """What images hold, on the CPU in float64: of bytes their parts of 255."""
    return x.cpu().double() / (255 if x.dtype == torch.uint8 else 1)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The images' values (but for repeats) in another layout of memory; what lies around a cut is NaN, or 255."""
    match layout:
        case "nchw":
            return x.contiguous()
        case "nhwc":
            return x.contiguous(memory_format=torch.channels_last)
        case "cut from nchw":
            return embed(x.contiguous(), 1, 2)
        case "cut from nhwc":
            return embed(x.contiguous(memory_format=torch.channels_last), (0, 0, 1, 1), (1, 2, 2, 1))
        case "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case "repeated":
            return x[:1].expand_as(x)
    raise ValueError(layout)


def ragged(each: list[Tensor], gap: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """(buffer, offsets, sizes) of images [C, H, W] of uint8, with bytes between them that belong to none."""
    parts, offsets = [], []
    at = 0
    for image in each:
        at += gap
        offsets.append(at)
        parts += [image.new_full((gap,), 255), image.permute(1, 2, 0).reshape(-1)]
        at += image.numel()
    device = each[0].device
    sizes = torch.tensor([image.shape[1:] for image in each], dtype=torch.int32, device=device)
    return torch.cat(parts), torch.tensor(offsets, device=device), sizes
