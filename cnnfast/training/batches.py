"""Batches of labelled images: which images are in them, and how processes read them ahead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from ..functional import pack_images
from .orders import EPOCHS, shuffled
from .samples import ImageSet, Sample, UnreadableSample


class PackedImages(NamedTuple):
    """Images of different sizes as F.augment takes them: image n is [H, W, C] at flat[offsets[n]:].

    flat: uint8. offsets: int64 [N]. sizes: int32 [N, 2], of (H, W). A NamedTuple, because DataLoader makes a list
    of a plain tuple when it pins memory.
    """

    flat: Tensor
    offsets: Tensor
    sizes: Tensor


class Batch(NamedTuple):
    """images: uint8 [N, H, W, C]; PackedImages where they have different sizes, or so few rows that F.augment would
    take these for channels. labels: int64 [N]. index: int64 [N], of each image in its set.
    """

    images: Tensor | PackedImages
    labels: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]

    def to(self, device: torch.device | str) -> Batch:
        """Pixels and labels on the device, without waiting for pinned memory to be copied. What is read by value stays
        on the CPU: the sizes and offsets, and the index, from which augmentation draws. Lightning calls this.
        """
        pixels = self.images.flat if isinstance(self.images, PackedImages) else self.images
        pixels = pixels.to(device, non_blocking=True)
        images = self.images._replace(flat=pixels) if isinstance(self.images, PackedImages) else pixels
        return Batch(images, self.labels.to(device, non_blocking=True), self.index)


def collate(samples: Sequence[Sample]) -> Batch:
    """The batch of these samples; collate_fn of a DataLoader."""
    images = [sample.image for sample in samples]
    labels, index = (torch.tensor(column) for column in list(zip(*samples, strict=True))[1:])
    if len({image.shape for image in images}) == 1 and images[0].shape[0] not in (1, 3):
        return Batch(torch.stack(images), labels, index)
    # as [C, H, W], which nothing can be taken for: an image [1, 20000, 3] might have one channel
    return Batch(PackedImages(*pack_images([image.permute(2, 0, 1) for image in images])), labels, index)


class EpochSampler(Sampler[list[int]]):
    """The indices of each batch of an epoch, for one of several processes.

    shuffle (training): the order follows from (seed, epoch) alone, and each step takes the next world * batch images
    from it, `batch` for each process in turn; what is left at the end takes no part in this epoch. If there are fewer
    images than one step takes, there is one step, with as many for each process as there are for all.
    Otherwise (evaluation): each image is in one batch of one process exactly. The batches, at most `batch` images each,
    differ in size by one at most, and every process has the same number of them, as DDP needs. torch's
    DistributedSampler repeats images there, which are counted twice then.

    indices: int64 [n], of the images. rank, world: which of how many processes this is; without them torch.distributed
    is asked when an epoch begins, and before it is initialised there is one.

    Raises ValueError, when an epoch begins or is asked for its length, if the images cannot be shared like this.
    """

    def __init__(
        self,
        indices: Tensor | Sequence[int],
        *,
        seed: int,
        batch: int,
        shuffle: bool,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        if type(batch) is not int or batch < 1:
            raise ValueError(f"batch is {batch!r}, and must be a number of images, of 1 or more")
        self.indices = torch.as_tensor(indices, dtype=torch.int64)
        if shuffle and not len(self.indices):
            raise ValueError("there are no images to train with")
        self.seed, self.batch, self.shuffle, self.epoch = seed, batch, shuffle, 0
        self._place = (rank, world)
        self.sampler = self  # Lightning tells the epoch to a batch sampler's `sampler`

    def set_epoch(self, epoch: int) -> None:
        """From the next iteration on."""
        self.epoch = epoch

    def place(self) -> tuple[int, int]:
        """(rank, world)."""
        rank, world = self._place
        if rank is None or world is None:
            together = distributed.is_available() and distributed.is_initialized()
            return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
        return rank, world

    def __len__(self) -> int:
        return self.steps(self.place()[1])

    def steps(self, world: int) -> int:
        """How many batches each of so many processes has. Raises ValueError if the images cannot be shared so."""
        count = len(self.indices)
        whole = count / (world * self.batch)
        steps = max(1, math.floor(whole)) if self.shuffle else math.ceil(whole)
        if count < steps * world:
            raise ValueError(
                f"{count} images in batches of {self.batch} cannot be shared among {world} processes so that each has "
                "the same number of batches and no image comes twice: give other batches, or fewer processes"
            )
        return steps

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = self.place()
        count, steps = len(self.indices), len(self)
        order = self.indices
        if self.shuffle:
            order = order[shuffled(count, self.seed, EPOCHS, self.epoch)]
            count = steps * world * min(self.batch, count // world)
        for number in range(rank, steps * world, world):
            begin, end = (count * n // (steps * world) for n in (number, number + 1))
            yield order[begin:end].tolist()


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises UnreadableSample as an image's set does, also where another process reads the image. Of
    DataLoader's own errors each would carry the traceback of that process.
    """

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for batch in super().__iter__():
            if isinstance(batch, UnreadableSample):
                try:
                    raise batch
                finally:
                    # This frame, of which the error knows, shall not know the error: in such a circle the processes
                    # would be left to the garbage collector, which waits five seconds for each.
                    del batch
            yield batch


def loader(
    images: ImageSet,
    indices: Tensor | Sequence[int],
    *,
    batch: int,
    seed: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    pin: bool = False,
) -> ImageLoader:
    """The batches of these images in the order of an EpochSampler, which is its `batch_sampler`: call set_epoch there.

    workers: processes that read images ahead, with one thread each, and stay from epoch to epoch; 0: this process reads
    them when they are asked for. pin: batches lie in pinned memory, from which a GPU copies them while it computes.

    Raises ValueError for options that have no sense; iterating raises UnreadableSample where an image cannot be read.
    """
    sampler = EpochSampler(indices, seed=seed, batch=batch, shuffle=shuffle)
    if len(sampler.indices) and not 0 <= int(sampler.indices.min()) <= int(sampler.indices.max()) < len(images):
        ends = f"{int(sampler.indices.min())} to {int(sampler.indices.max())}"
        raise ValueError(f"indices are from {ends}, and must be from 0 to {len(images) - 1}, of the images of the set")
    return ImageLoader(
        _Attempts(images),
        batch_sampler=sampler,
        collate_fn=_collate_attempts,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
        # DataLoader draws a seed for its workers in each epoch: not from the generator that dropout uses.
        generator=torch.Generator(),
    )


class _Attempts(Dataset[Sample | UnreadableSample]):
    """The samples of a set, and where one cannot be read, the error in its place."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample | UnreadableSample:
        try:
            return self.images[i]
        except UnreadableSample as error:
            return error


def _collate_attempts(attempts: Sequence[Sample | UnreadableSample]) -> Batch | UnreadableSample:
    samples = []
    for attempt in attempts:
        if isinstance(attempt, UnreadableSample):
            return attempt
        samples.append(attempt)
    return collate(samples)
