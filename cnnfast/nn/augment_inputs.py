"""What Augment is called with: images, labels, indices; checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import functional as F

Images = Tensor | tuple[Tensor, Tensor, Tensor] | Sequence[Any]
CHANNELS = (1, 3)


class ImagesToAugment(NamedTuple):
    """Images as functional.augment takes them, their (height, width), int [N, 2] on the CPU, and how many channels they
    have; None: packed ones do not say.
    """

    source: Tensor | tuple[Tensor, Tensor, Tensor]
    sizes: Tensor
    channels: int | None

    @classmethod
    def of(cls, images: Images) -> ImagesToAugment:
        """Raises TypeError and ValueError for what is no batch of images."""
        if isinstance(images, Tensor):
            return cls(images, *_of_one_size(images))
        if not isinstance(images, Sequence) or isinstance(images, str):
            raise TypeError(
                "Augment(): images must be a Tensor [N, C, H, W] or [N, H, W, C], a list of images [H, W, C] or "
                f"[C, H, W], or what pack_images() makes of one, but got {type(images).__name__}"
            )
        if len(images) == 3 and isinstance(images[0], Tensor) and images[0].dim() == 1:
            flat, offsets, sizes = images
            return cls((flat, offsets, sizes), torch.as_tensor(sizes).cpu(), None)
        flat, offsets, sizes = F.pack_images(images)
        pixels = int(sizes.long().prod(1).sum())
        if len(images) and isinstance(images[0], Tensor):
            flat = flat.to(images[0].device)
        return cls((flat, offsets, sizes), sizes, flat.numel() // pixels if pixels else None)


def _of_one_size(images: Tensor) -> tuple[Tensor, int]:
    """(sizes, channels) of [N, C, H, W] or [N, H, W, C]."""
    if images.dim() != 4:
        raise ValueError(
            f"Augment(): images must be [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, but got {list(images.shape)}"
        )
    N, C, H, W = images.shape
    if C not in CHANNELS:
        N, H, W, C = images.shape
    return torch.tensor([H, W]).expand(N, 2), C


def indices_of(
    index: Tensor | Sequence[int] | None, images: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """int64 [N] in the memory of the CPU; None: drawn. images: how many there must be."""
    if index is None:
        if generator is not None and torch.utils.data.get_worker_info() is not None:
            raise RuntimeError(
                "Augment(): in a worker of a DataLoader a generator draws the same indices as in every other worker. "
                "Give index, or leave generator out: PyTorch's default one has another seed in each worker"
            )
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**63 - 1, (images or 0,), generator=generator, device=device).cpu()
    given = torch.as_tensor(index).cpu()
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise TypeError(f"Augment(): index must be whole numbers, but got {given.dtype}")
    if given.dim() != 1 or (images is not None and len(given) != images):
        raise ValueError(
            f"Augment(): index must be [N]{'' if images is None else f', with N={images} images'}, but got "
            f"{list(given.shape)}"
        )
    return given.long()


def extents_of(sizes: Tensor | Sequence[Any], images: int) -> np.ndarray:
    """float64 [2, N], heights and widths, from (height, width) of each image or of all."""
    try:
        given = np.asarray(sizes, np.float64)
        H, W = np.broadcast_to(given.reshape(*given.shape[:-1], 2), (images, 2)).T
    except (TypeError, ValueError):
        raise ValueError(
            f"Augment(): sizes must be (height, width), or [N, 2] with N={images} indices, but got {sizes!r}"
        ) from None
    if not (given >= 1).all():
        raise ValueError(f"Augment(): sizes must be at least one pixel each, but got {given.min(initial=1):g}")
    return np.stack((H, W))


def check_labels(labels: Tensor, images: int, num_classes: int | None, mixes: bool) -> None:
    """Raises TypeError or ValueError for labels that do not fit the images, or cannot be mixed."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"Augment(): labels must be a tensor, but got {type(labels).__name__}")
    if labels.dim() not in (1, 2) or len(labels) != images:
        raise ValueError(
            f"Augment(): labels must be [N] (classes) or [N, K] (soft), with N={images} images, but got "
            f"{list(labels.shape)}"
        )
    if labels.dim() == 2:
        if num_classes is not None and labels.shape[1] != num_classes:
            raise ValueError(
                f"Augment(): soft labels must have num_classes={num_classes} columns, but got {list(labels.shape)}"
            )
        return
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"Augment(): labels [N] must be classes, whole numbers, but got {labels.dtype}")
    if not mixes:
        return
    if num_classes is None:
        raise ValueError(
            "Augment(): num_classes must be given to mix labels that are classes, but got num_classes=None"
        )
    if images and labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"Augment(): labels must be from 0 to num_classes - 1 = {num_classes - 1}, but got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
