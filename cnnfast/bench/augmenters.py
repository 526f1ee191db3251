"""Who augments a batch: cnnfast, torchvision.transforms.v2 and kornia, each as its users call it.

All of them draw new numbers at every step, except where a name says otherwise. What they do differently:

- torchvision's transforms draw one set of numbers a call: on a batch all images get the same. So each image is
  augmented by itself, and "torchvision-batch" is there for reference only.
- torchvision and kornia do one step after the other, and so resample twice where a crop is turned; torchvision rounds
  to uint8 between two steps. They change colours in an order that is drawn, ours in a fixed one.
- kornia takes floating images: dividing by 255 belongs to its step. Its crops are cut and resized one by one, or, as
  "kornia-resample", all of a batch at once, where the centres of a crop's corners become those of the result's.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .. import functional as F
from ..torchvision_import import torchvision
from . import AUGMENT
from .augmentation import JUDGED, MEAN, STD, AugmentationJob, Recipe
from .counting import Count, by_operators, by_replaying
from .gate import Expected, Verdict
from .job import Job, Step
from .providers import COMPILE, EAGER, Prepared, Provider, compiler
from .surroundings import one_thread

Transform = Callable[[Tensor], Tensor]  # of images [N, 3, H, W] with any strides

UINT8 = 2 / 255 / min(STD)  # what rounding to uint8 between steps may do to a result
GREY_WEIGHTS = 1e-3  # what grey does to one that weighs red by 0.299 and not by 0.2989


@contextmanager
def graph_breaks_untold() -> Iterator[None]:
    """torch.compile warns, with a stack of calls, of what it cannot compile as a whole. Times show what that costs."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Augmenter(Provider):
    """package: what it needs. rounding: what its results may be off by, beyond what the dtype explains. own_resize:
    whether it resizes by a convention of its own, and is not judged by that.
    """

    modes: tuple[str, ...] = (AUGMENT,)
    package: str = "torch"
    rounding: float = 0.0
    own_resize: bool = False

    def refusal(self, job: Job) -> str:
        return super().refusal(job) or self.cannot_run_on(job.device)

    def cannot_run_on(self, device: torch.device) -> str:
        """What is missing on this machine, or the empty string."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install {self.package}"
        return ""

    def transform(self, recipe: Recipe, job: AugmentationJob) -> Transform:
        """What makes results, on the job's device, of images that are where `images_on` says."""
        raise NotImplementedError

    def images_on(self, job: AugmentationJob) -> torch.device:
        return job.device

    def prepare(self, job: Job) -> Prepared:
        assert isinstance(job, AugmentationJob)
        images = job.images().to(self.images_on(job))
        with compiler(self.how, False) as compiled, graph_breaks_untold():
            transform: Transform = compiled(self.transform(job.recipe, job))  # pyright: ignore[reportArgumentType]
            transform(images)

        def read(y: Tensor) -> list[Tensor]:
            right = (job.batch, 3, job.size, job.size), job.dtype
            if (tuple(y.shape), y.dtype) != right or not y.isfinite().all():
                raise ValueError(f"its batch is {list(y.shape)}, {y.dtype}, or not finite")
            return self.judged(job)

        return Prepared(lambda: transform(images), read=read)

    def judged(self, job: AugmentationJob) -> list[Tensor]:
        """What it makes of the pinned recipes that it is judged by."""
        pinned = job.recipe.pinned()[self.own_resize :]
        return [
            each.compared(self.transform(each.recipe, job)(each.images(job.size, self.images_on(job))))
            for each in pinned
        ]

    def judge(self, expected: Expected, results: Sequence[Tensor], by_drawn: bool = False) -> Verdict:
        """by_drawn: whether the batch with drawn numbers, which comes last, is among the results."""
        those = slice(self.own_resize, None if by_drawn else -1)
        exact, plain, floor = expected.exact[those], expected.plain[those], expected.floor + self.rounding
        return replace(expected, exact=exact, plain=plain, floor=floor).judge(results)

    def counted(self, job: Job, prepared: Prepared) -> dict[str, Any]:
        assert isinstance(job, AugmentationJob)
        count = self.count(job, prepared.step)
        version = getattr(sys.modules.get(self.package), "__version__", "")
        return {"package": f"{self.package} {version}"} | (count._asdict() if count else {})

    def count(self, job: AugmentationJob, step: Step) -> Count | None:
        """What a step launches and moves; None for one that is compiled, whose operators are no kernels."""
        return by_operators(step, job.size**2) if self.how == EAGER else None


@dataclass(frozen=True)
class OurAugmenter(Augmenter):
    """cnn.Augment. drawn: the numbers are drawn before, and lie where the images do."""

    baseline: bool = False
    drawn: bool = False

    def transform(self, recipe: Recipe, job: AugmentationJob) -> Callable[..., Tensor]:
        augment = recipe.ours(job.size, job.dtype)
        if not self.drawn:
            return augment
        numbers: list[Any] = []

        def with_numbers(images: Tensor) -> Tensor:
            if not numbers:
                draws = augment.draw(tuple(images.shape[2:]), range(len(images)))
                numbers.extend(t if t is None else t.to(images.device) for t in draws)
            maps, colours, boxes, noise, partners = numbers
            return F.augment(
                images, maps, colours, boxes, partners, size=job.size, mean=MEAN, std=STD, dtype=job.dtype,
                border=augment.seen_border, noise=noise,
            )  # fmt: skip

        return with_numbers

    def judged(self, job: AugmentationJob) -> list[Tensor]:
        images = job.images()[:JUDGED]
        transform = self.transform(job.recipe, job)
        drawn = transform(images) if self.drawn else transform(images, index=range(len(images)))
        return [*super().judged(job), drawn]

    def judge(self, expected: Expected, results: Sequence[Tensor], by_drawn: bool = True) -> Verdict:
        return super().judge(expected, results, by_drawn)

    def count(self, job: AugmentationJob, step: Step) -> Count | None:
        images = torch.empty_like(job.images(), device="meta")
        return by_replaying(lambda: self.transform(job.recipe, job)(images)) or super().count(job, step)


class OursByTorch(OurAugmenter):
    """The same, served by PyTorch's operators."""

    def cannot_run_on(self, device: torch.device) -> str:
        return "" if device.type == "cuda" else "without a GPU it is cnnfast"

    def transform(self, recipe: Recipe, job: AugmentationJob) -> Callable[..., Tensor]:
        augment = super().transform(recipe, job)

        def by_torch(images: Tensor, **others: Any) -> Tensor:
            with dispatch.backend("torch"):
                return augment(images, **others)

        return by_torch

    def count(self, job: AugmentationJob, step: Step) -> Count | None:
        return Augmenter.count(self, job, step)


def torchvision_chain(recipe: Recipe, size: int, dtype: torch.dtype) -> Transform:
    """A recipe by torchvision.transforms.v2, of an image [3, H, W] or of a batch. Raises ImportError without it."""
    torchvision()
    from torchvision.transforms import v2

    r = recipe
    steps: list[Any] = [
        v2.RandomResizedCrop(size, r.crop_scale, r.crop_ratio, antialias=False),
        v2.RandomHorizontalFlip(r.horizontal_flip_p),
    ]
    if r.degrees:
        steps.append(v2.RandomAffine(r.degrees, interpolation=v2.InterpolationMode.BILINEAR))
    if r.jitters:
        steps.append(v2.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue))
    if r.grayscale_p:
        steps.append(v2.RandomGrayscale(r.grayscale_p))
    steps += [v2.ToDtype(dtype, scale=True), v2.Normalize(MEAN, STD)]
    if r.erasing_p:
        steps.append(v2.RandomErasing(r.erasing_p))
    return v2.Compose(steps)


@dataclass(frozen=True)
class TorchvisionAugmenter(Augmenter):
    """torchvision.transforms.v2 on one image after the other, as in torchvision's own recipes."""

    package: str = "torchvision"
    rounding: float = UINT8

    def transform(self, recipe: Recipe, job: AugmentationJob) -> Transform:
        one = torchvision_chain(recipe, job.size, job.dtype)
        return lambda images: torch.stack([one(image) for image in images])


class TorchvisionBatch(TorchvisionAugmenter):
    """The same on the whole batch at once."""

    def transform(self, recipe: Recipe, job: AugmentationJob) -> Transform:
        return torchvision_chain(recipe, job.size, job.dtype)


class TorchvisionWorker(TorchvisionAugmenter):
    """The same on the CPU by one thread, as in a process of a DataLoader, and the batch copied to the GPU."""

    def cannot_run_on(self, device: torch.device) -> str:
        return super().cannot_run_on(device) or ("" if device.type == "cuda" else "without a GPU it is torchvision")

    def images_on(self, job: AugmentationJob) -> torch.device:
        return torch.device("cpu")

    def transform(self, recipe: Recipe, job: AugmentationJob) -> Transform:
        augment = super().transform(recipe, job)

        def on_one_thread(images: Tensor) -> Tensor:
            with one_thread(torch.device("cpu")):
                return augment(images).to(job.device)

        return on_one_thread

    def count(self, job: AugmentationJob, step: Step) -> None:
        """On the GPU it launches nothing."""


@dataclass(frozen=True)
class KorniaAugmenter(Augmenter):
    """kornia.augmentation on a batch. cropping_mode: of its RandomResizedCrop."""

    package: str = "kornia"
    rounding: float = GREY_WEIGHTS
    cropping_mode: str = "slice"

    def transform(self, recipe: Recipe, job: AugmentationJob) -> Transform:
        augmentation: Any = importlib.import_module("kornia.augmentation")
        r, mode = recipe, {"align_corners": False, "cropping_mode": self.cropping_mode}
        steps: list[Any] = [
            augmentation.RandomResizedCrop((job.size, job.size), r.crop_scale, r.crop_ratio, **mode),
            augmentation.RandomHorizontalFlip(p=r.horizontal_flip_p),
        ]
        if r.degrees:
            steps.append(augmentation.RandomAffine(r.degrees, p=1.0))
        if r.jitters:
            colours = (each or 0.0 for each in (r.brightness, r.contrast, r.saturation, r.hue))
            steps.append(augmentation.ColorJitter(*colours, p=1.0))
        if r.grayscale_p:
            steps.append(augmentation.RandomGrayscale(p=r.grayscale_p))
        steps.append(augmentation.Normalize(MEAN, STD))
        if r.erasing_p:
            steps.append(augmentation.RandomErasing(p=r.erasing_p))
        chain = augmentation.AugmentationSequential(*steps, data_keys=["input"], same_on_batch=False)
        return lambda images: chain(images.float() / 255).to(job.dtype)


BY_DRAWN = "cnnfast.functional.augment by numbers that were drawn before: for reference only"
BY_BATCH = "torchvision.transforms.v2 on the batch, all images by the same numbers: for reference only"
BY_WORKER = "torchvision by one thread of the CPU, as in a worker of a DataLoader, and the copy to the GPU"
RESAMPLED = "the same, all crops of a batch resampled at once, by align_corners, so that its resize is not judged"
COMPILED = "torch.compile of kornia-resample, whose code is judged before it is compiled"
# In the order in which they run: what compiles comes last.
AUGMENTERS = {
    augmenter.name: augmenter
    for augmenter in (
        OurAugmenter("cnnfast", "cnnfast.nn.Augment", ours=True),
        OurAugmenter("cnnfast-drawn", BY_DRAWN, drawn=True),
        OursByTorch("cnnfast-torch", "cnnfast.nn.Augment served by PyTorch's operators: for reference only"),
        TorchvisionAugmenter("torchvision", "torchvision.transforms.v2 on uint8, image by image"),
        TorchvisionWorker("torchvision-worker", BY_WORKER),
        TorchvisionBatch("torchvision-batch", BY_BATCH, baseline=False),
        KorniaAugmenter("kornia", "kornia.augmentation on the batch, same_on_batch=False"),
        KorniaAugmenter("kornia-resample", RESAMPLED, own_resize=True, cropping_mode="resample"),
        KorniaAugmenter("kornia-compile", COMPILED, how=COMPILE, own_resize=True, cropping_mode="resample"),
    )
}
