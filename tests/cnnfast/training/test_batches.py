"""Which images are in each batch, for one process or several, and that processes that read ahead change nothing."""

from __future__ import annotations

import collections
import gc
import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import distributed

from cnnfast.training.batches import Batch, EpochSampler, PackedImages, collate, loader
from cnnfast.training.orders import EPOCHS, PARTS, shuffled
from cnnfast.training.samples import ImageSet, Sample, UnreadableSample, open_images
from tests.support.labelled_images import class_folders, noise, save_noise

pytest.importorskip("PIL")


@pytest.fixture
def images(tmp_path) -> ImageSet:
    """Seven images of two classes and three sizes."""
    class_folders(tmp_path, cat=3, dog=2)
    save_noise(tmp_path / "dog" / "2.png", 5, 9, seed=20)
    save_noise(tmp_path / "dog" / "3.png", 1, 9, seed=21)
    return open_images(tmp_path, 8)


def batches_of(count: int, epoch: int = 0, **options) -> list[list[int]]:
    sampler = EpochSampler(torch.arange(count) + 100, **{"seed": 1, "batch": 4, "shuffle": True, **options})
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def all_of(lists: list[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


# ----------------------------------------------------------------------------------------------------------------------
# Orders


def test_an_order_is_philoxs():
    """On every machine, and in every version of numpy and PyTorch."""
    assert shuffled(8, 1, EPOCHS, 2).tolist() == [5, 4, 6, 0, 7, 2, 3, 1]
    assert shuffled(0, 1, EPOCHS, 2).tolist() == []


def test_orders_differ_by_each_number_that_they_follow_from():
    given = [(0, EPOCHS, 0), (1, EPOCHS, 0), (0, PARTS, 0), (0, EPOCHS, 1), (-1, EPOCHS, 0), (2**64, EPOCHS, 3)]
    orders = {tuple(shuffled(50, *numbers).tolist()) for numbers in given}
    assert len(orders) == len(given)
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(50))}


def test_each_place_gets_each_image():
    places = collections.Counter(shuffled(5, 7, EPOCHS, epoch)[0].item() for epoch in range(1000))
    assert min(places.values()) > 150


# ----------------------------------------------------------------------------------------------------------------------
# Training


def test_an_epoch_is_an_order_without_its_rest():
    first, again, next_one = (batches_of(11, epoch) for epoch in (0, 0, 1))
    assert first == again != next_one
    assert [len(batch) for batch in first] == [4, 4]
    seen = all_of(first)
    assert len(set(seen)) == 8
    assert set(seen) <= set(range(100, 111))
    assert seen == [100 + i for i in shuffled(11, 1, EPOCHS, 0).tolist()][:8]
    left_out = {frozenset(range(100, 111)) - frozenset(all_of(batches_of(11, epoch))) for epoch in range(20)}
    assert len(frozenset().union(*left_out)) == 11, "each image takes part in some epoch"


@pytest.mark.parametrize("count", [16, 17, 23, 24, 100])
def test_processes_divide_the_steps_of_one_process_with_the_whole_batch(count):
    """So that their gradients add up to its."""
    together = batches_of(count, 3, batch=8)
    ranks = [batches_of(count, 3, batch=4, rank=rank, world=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == together


@pytest.mark.parametrize(("count", "world", "sizes"), [(3, 1, [3]), (7, 2, [3]), (2, 2, [1]), (9, 2, [4]), (4, 1, [4])])
def test_fewer_images_than_a_step_are_one_step(count, world, sizes):
    ranks = [batches_of(count, rank=rank, world=world) for rank in range(world)]
    assert all([len(batch) for batch in rank] == sizes for rank in ranks)
    seen = all_of(all_of(ranks))
    assert len(seen) == len(set(seen)) == sizes[0] * world


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [2, 4, 64])
@pytest.mark.parametrize("count", [7, 8, 9, 13, 14, 15, 64, 65, 360])
def test_each_image_is_evaluated_once_and_processes_take_the_same_steps(count, batch, world):
    ranks = [batches_of(count, shuffle=False, batch=batch, rank=rank, world=world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    every = all_of(ranks)
    assert sorted(all_of(every)) == list(range(100, 100 + count))
    lengths = [len(one) for one in every]
    assert max(lengths) <= batch
    assert max(lengths) - min(lengths) <= 1
    assert len(ranks[0]) == -(-count // (batch * world)), "no more steps than need be"
    if world == 1:
        assert all_of(every) == list(range(100, 100 + count))


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"shuffle": False, "world": 3}),
        (5, {"shuffle": False, "world": 2, "batch": 1}),
        (2, {"shuffle": True, "world": 3}),
    ],
)
def test_what_processes_cannot_share_is_said_before_an_epoch_begins(count, options):
    says = f"{count} images in batches of {options.get('batch', 4)} cannot be shared among {options['world']} processes"
    sampler = EpochSampler(range(count), **{"seed": 0, "batch": 4, "rank": 0, **options})
    for ask in (len, list):
        with pytest.raises(ValueError, match=says):
            ask(sampler)


def test_nothing_to_evaluate_is_no_batch():
    assert batches_of(0, shuffle=False) == []


@pytest.mark.parametrize(
    ("indices", "options", "says"),
    [
        ([], {"shuffle": True}, "there are no images to train with"),
        ([1], {"batch": 0}, "batch is 0, and must be a number of images, of 1 or more"),
        ([1], {"batch": 2.0}, "batch is 2.0, and must be"),
    ],
)
def test_wrong_options_of_a_sampler(indices, options, says):
    with pytest.raises(ValueError, match=says):
        EpochSampler(indices, **{"seed": 0, "batch": 4, "shuffle": False, **options})


def test_processes_are_asked_for_when_an_epoch_begins():
    """A launcher may initialise them after the loaders are made."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sampler = EpochSampler(range(20), seed=1, batch=4, shuffle=True)
    assert sampler.place() == (0, 1)
    alone = list(sampler)
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        assert sampler.place() == (1, 2)
        assert len(sampler) == 2
        assert list(sampler) == [alone[1], alone[3]]
    finally:
        distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def sample(index: int, *shape: int) -> Sample:
    return Sample(torch.from_numpy(noise(*shape, seed=index)), index % 3, index)


def test_images_of_one_size_are_stacked():
    samples = [sample(i, 4, 6, 3) for i in (7, 1, 5)]
    batch = collate(samples)
    assert isinstance(batch.images, torch.Tensor)
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images, torch.stack([s.image for s in samples]))
    assert (batch.labels.tolist(), batch.index.tolist()) == ([1, 1, 2], [7, 1, 5])
    assert batch.labels.dtype == batch.index.dtype == torch.int64


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "sizes", [[(4, 6), (6, 4), (4, 5)], [(1, 9), (1, 9)], [(3, 9), (3, 9)], [(1, 3), (3, 1), (3, 3), (9, 1)]], ids=str
)
def test_what_augment_makes_of_a_batch_it_makes_of_each_image(sizes, channels, device):
    """Where an image has one or three rows, these might be taken for its channels."""
    from cnnfast import backend
    from cnnfast import functional as F

    samples = [sample(i, *size, channels) for i, size in enumerate(sizes)]
    batch = collate(samples)
    assert isinstance(batch.images, PackedImages)
    assert batch.images.sizes.tolist() == [list(size) for size in sizes]
    options = {"size": 5, "mean": [0.0] * channels, "std": [1.0] * channels, "dtype": torch.float32}
    with backend("torch"):
        ours = F.augment(batch.to(device).images, None, **options)
        for i, one in enumerate(samples):
            chw = one.image.to(device).permute(2, 0, 1)[None]
            torch.testing.assert_close(ours[i], F.augment(chw, None, **options)[0])


def test_a_batch_goes_to_a_device_without_what_is_read_by_value():
    same, different = collate([sample(0, 4, 4, 3)]), collate([sample(0, 4, 4, 3), sample(1, 5, 4, 3)])
    for batch in (same, different):
        moved = batch.to("meta")
        assert isinstance(moved, Batch)
        pixels = moved.images.flat if isinstance(moved.images, PackedImages) else moved.images
        assert pixels.is_meta
        assert moved.labels.is_meta
        assert moved.index is batch.index
    assert isinstance(moved.images, PackedImages)
    assert isinstance(different.images, PackedImages)
    assert moved.images.sizes is different.images.sizes
    assert moved.images.offsets is different.images.offsets


def test_pinned_memory_keeps_the_kind_of_a_batch(monkeypatch):
    """A plain tuple in it would become a list, which is something else to functional.augment."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: t.clone())
    batch = collate([sample(0, 4, 4, 3), sample(1, 5, 4, 3)])
    pinned = pin_memory(batch)
    assert type(pinned) is Batch
    assert type(pinned.images) is PackedImages


# ----------------------------------------------------------------------------------------------------------------------
# Loaders


def contents(batch: Batch) -> list[object]:
    images = batch.images if isinstance(batch.images, PackedImages) else [batch.images]
    return [t.tolist() for t in (*images, batch.labels, batch.index)]


def test_processes_that_read_ahead_change_nothing(images):
    """In two epochs, in which they stay, and after an epoch that was left in its middle."""
    alone, ahead = (loader(images, range(7), batch=2, seed=5, shuffle=True, workers=workers) for workers in (0, 2))
    assert len(alone) == len(ahead) == 3
    for epoch in (0, 1):
        for each in (alone, ahead):
            each.batch_sampler.set_epoch(epoch)
        next(iter(ahead))
        assert list(map(contents, alone)) == list(map(contents, ahead))
    workers = ahead._iterator._workers
    assert all(worker.is_alive() for worker in workers)


def test_a_started_process_reads_as_a_forked_one(images):
    """Windows and macOS start them anew, and send them the set."""
    ahead = loader(images, range(7), batch=4, workers=1)
    ahead.multiprocessing_context = "spawn"
    assert list(map(contents, ahead)) == list(map(contents, loader(images, range(7), batch=4)))


def test_an_epoch_draws_nothing_from_the_generator_of_dropout(images):
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(loader(images, range(7), batch=2, shuffle=True, workers=workers))
        assert torch.equal(torch.get_rng_state(), before)


def error_of(batches: Iterable[Batch]) -> tuple[str, int]:
    """Of the UnreadableSample that they raise; the error itself would keep the frames alive, and their processes."""
    try:
        list(batches)
    except UnreadableSample as error:
        return str(error), error.number
    raise AssertionError("all images can be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_sentence(images, tmp_path, workers):
    file = tmp_path / "dog" / "1.png"
    file.write_bytes(b"no image")
    batches = iter(loader(images, range(7), batch=2, workers=workers))
    assert next(batches).index.tolist() == [0]
    assert next(batches).index.tolist() == [1, 2]
    assert error_of(batches) == (f"{file} cannot be read: Pillow knows no image format like this", 4)


def test_processes_end_with_their_loader_also_after_an_error(images, tmp_path):
    """At once, and not when the garbage collector finds them."""
    (tmp_path / "dog" / "1.png").write_bytes(b"no image")
    ahead = loader(images, range(7), batch=2, workers=1)
    assert error_of(ahead)
    workers = ahead._iterator._workers
    gc.disable()
    try:
        del ahead
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()


@pytest.mark.parametrize("indices", [[0, 7], [-1, 3]])
def test_indices_are_of_the_set(images, indices):
    says = f"indices are from {indices[0]} to {indices[1]}, and must be from 0 to 6, of the images of the set"
    with pytest.raises(ValueError, match=says):
        loader(images, indices, batch=2)


def test_lightning_finds_whom_to_tell_the_epoch(images):
    """It looks for a set_epoch there alone."""
    each = loader(images, range(7), batch=2, shuffle=True)
    each.batch_sampler.sampler.set_epoch(4)
    assert each.batch_sampler.epoch == 4
