"""Augmentation of a whole batch in one kernel: a module that draws the numbers and calls functional.augment."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from .. import functional as F
from ..drawing import (
    IDENTITY,
    CentreCrop,
    Dice,
    Erasing,
    Flips,
    Jitter,
    Mixing,
    PaddedCrop,
    ResizedCrop,
    Turn,
    mix_labels,
    onto,
    rules,
)
from ..drawing.rules import Number, NumberOrRange, Range
from ..functional.augmentation import BORDERS, OTHER_BORDERS, Border
from ..spelling import keywords_explained
from .augment_inputs import Images, ImagesToAugment, check_labels, extents_of, indices_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_PART = 0.875  # of the shorter side, in evaluation, as usual for ImageNet: 224 of 256 pixels


class Draws(NamedTuple):
    """The numbers of N images, as functional.augment takes them, in the memory of the CPU; None: that step is left out.

    maps: float32 [N, 2, 3]. colours: float32 [N, 5]. boxes: float32 [N, 1, 4 + C], or [N, 1, 4] with noise.
    noise: int64 [N]. partners: float32 [N, 6].
    """

    maps: Tensor
    colours: Tensor | None = None
    boxes: Tensor | None = None
    noise: Tensor | None = None
    partners: Tensor | None = None


def tensor_of(numbers: np.ndarray | None) -> Tensor | None:
    return None if numbers is None else torch.from_numpy(numbers)


class Augment(nn.Module):
    """Draws, for each image of a batch, a crop, flips, a rotation, colours, an erased box and a partner, and applies
    all of it and the normalisation in one kernel.

        augment = cnnfast.nn.Augment(224, brightness=0.4, erasing_p=0.25, mixup_alpha=0.2, num_classes=1000)
        for indices, images, labels in loader:  # images: uint8 [N, 3, H, W], or a list of [H, W, 3]
            images, labels = augment(images.cuda(), labels.cuda(), index=indices, epoch=epoch)

    The options have the names, meanings and rules of torchvision.transforms.v2:

    size: of the results, (height, width) or one number for both.
    crop_scale, crop_ratio: RandomResizedCrop's scale and ratio. crop_scale=None: the crop is not resized, but
        RandomCrop's of `size` where `padding` (RandomCrop's) is given, and else that of evaluation.
    horizontal_flip_p, vertical_flip_p, grayscale_p, erasing_p: p of RandomHorizontalFlip, RandomVerticalFlip,
        RandomGrayscale and RandomErasing.
    degrees, translate, scale, shear: RandomAffine's, of the frame that the crop and the flips left. One sampling does
        all of them, so that what the crop left out comes into view where torchvision's chain would show `fill`.
    brightness, contrast, saturation, hue: ColorJitter's, always in this order. contrast needs a second launch.
    erasing_scale, erasing_ratio, erasing_value: RandomErasing's, which stands after the normalisation: a value of 0 is
        the colour `mean`, "random" is normal noise. Extents are parts of the result.
    mixup_alpha, cutmix_alpha: MixUp's and CutMix's alpha, with a weight or box of each image's own; both: half of the
        batches each. num_classes: for labels that are classes.
    resize_size: in evaluation the shorter side becomes so many pixels (by default size / 0.875), and the centre is
        seen, as by Resize and CenterCrop. Nothing else is done there, and labels stay as they are.
    mean, std: a result is (v - mean) / std, with v within [0, 1]: numbers of each channel, or one for all.
    dtype: of the results: torch.float32, torch.float16 or torch.bfloat16 (or "fp32", "fp16", "bf16").
    border, fill: what padding and RandomAffine bring into view: fill (within [0, 1], one number or each channel's), or
        with border="reflection" the image's reflection.
    seed: another seed, other numbers. generator: a torch.Generator that draws the index of images that come without
        one; None: PyTorch's default one.

    Everything drawn for an image is a function of (seed, epoch, index of the image): the same in every batch, order,
    process and machine. Only the partner, and whether a batch is mixed by mixup or cutmix, come from the index of the
    batch's first image. No option changes what another one draws.

    Raises ValueError and TypeError, as the rules of torchvision's transforms say, naming the option.
    """

    @keywords_explained
    def __init__(
        self,
        size: int | Sequence[int],
        *,
        crop_scale: Range | None = (0.08, 1.0),
        crop_ratio: Range = (3 / 4, 4 / 3),
        padding: int | Sequence[int] | None = None,
        horizontal_flip_p: Number = 0.5,
        vertical_flip_p: Number = 0.0,
        degrees: NumberOrRange = 0,
        translate: Range | None = None,
        scale: Range | None = None,
        shear: NumberOrRange | None = None,
        brightness: NumberOrRange = 0,
        contrast: NumberOrRange = 0,
        saturation: NumberOrRange = 0,
        hue: NumberOrRange = 0,
        grayscale_p: Number = 0.0,
        erasing_p: Number = 0.0,
        erasing_scale: Range = (0.02, 0.33),
        erasing_ratio: Range = (0.3, 3.3),
        erasing_value: NumberOrRange | Literal["random"] = 0.0,
        mixup_alpha: Number | None = None,
        cutmix_alpha: Number | None = None,
        num_classes: int | None = None,
        resize_size: int | None = None,
        mean: NumberOrRange = IMAGENET_MEAN,
        std: NumberOrRange = IMAGENET_STD,
        dtype: torch.dtype | str = torch.float32,
        border: Border = "constant",
        fill: NumberOrRange = 0.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.given: dict[str, Any] = given
        self.size = rules.extents("size", size)
        self.mean = rules.channels("mean", mean)
        self.std = rules.channels("std", std, 0.0, above=True)
        self.fill = rules.channels("fill", fill, 0.0, 1.0)
        self.dtype = rules.dtype("dtype", dtype)
        self.border = rules.one_of("border", border, BORDERS, OTHER_BORDERS)
        self.num_classes = None if num_classes is None else rules.whole("num_classes", num_classes, 1)
        self.seed = rules.whole("seed", seed, -(2**63), 2**64 - 1)
        self.generator = rules.instance("generator", generator, torch.Generator)

        resize = int(max(self.size) / CROP_PART) if resize_size is None else resize_size
        self.centre = CentreCrop(rules.whole("resize_size", resize, 1))
        ratio = rules.rising("crop_ratio", crop_ratio, "ratio of width to height")
        self.crop = self.centre
        if crop_scale is not None:
            self.crop = ResizedCrop(rules.rising("crop_scale", crop_scale, "part of the image's area", 1.0), ratio)
            if padding is not None:
                raise rules.refused(
                    "padding", padding, "None unless crop_scale=None is given: a resized crop is not padded"
                )
        elif padding is not None:
            self.crop = PaddedCrop(rules.sides("padding", padding))
        self.flips = Flips(
            rules.probability("horizontal_flip_p", horizontal_flip_p),
            rules.probability("vertical_flip_p", vertical_flip_p),
        )
        self.turn = Turn(
            rules.angles("degrees", degrees, (2,)),
            None if translate is None else rules.parts("translate", translate),
            None if scale is None else rules.rising("scale", scale, "factor"),
            None if shear is None else rules.angles("shear", shear, (2, 4)),
        )
        self.jitter = Jitter(
            rules.around("brightness", brightness, 1.0, 0.0),
            rules.around("contrast", contrast, 1.0, 0.0),
            rules.around("saturation", saturation, 1.0, 0.0),
            rules.around("hue", hue, 0.0, -0.5, 0.5),
            rules.probability("grayscale_p", grayscale_p),
        )
        self.erasing = Erasing(
            rules.probability("erasing_p", erasing_p),
            rules.rising("erasing_scale", erasing_scale, "part of the area", 1.0),
            rules.rising("erasing_ratio", erasing_ratio, "ratio of height to width"),
            self.values_of_erased(erasing_value),
        )
        self.mixing = Mixing(
            None if mixup_alpha is None else rules.positive("mixup_alpha", mixup_alpha),
            None if cutmix_alpha is None else rules.positive("cutmix_alpha", cutmix_alpha),
        )
        kinds = (self.crop, self.flips, self.turn, self.jitter, self.erasing, self.mixing)
        self.draws: tuple[int, ...] = tuple(sorted({draw for kind in kinds for draw in kind.draws}))

    def values_of_erased(self, given: Any) -> tuple[float, ...] | None:
        """Of each channel, or one for all, before they are normalised; None: noise."""
        if isinstance(given, str) and given == "random":
            return None
        values = rules.channels("erasing_value", given, otherwise=", or 'random'")
        channels = max(map(len, (values, self.mean, self.std)))
        each = (numbers * (channels // len(numbers)) for numbers in (values, self.std, self.mean))
        return tuple(value * std + mean for value, std, mean in zip(*each, strict=True))

    @staticmethod
    def options() -> dict[str, inspect.Parameter]:
        """The names of the options, with their defaults and annotations; all but `size` have a default."""
        _, *options = inspect.signature(Augment.__init__).parameters.values()
        return {option.name: option for option in options}

    def extra_repr(self) -> str:
        options = self.options()
        changed = [f"{name}={value!r}" for name, value in self.given.items() if value != options[name].default]
        return ", ".join([repr(self.given["size"]), *changed[1:]])

    @property
    def seen_border(self) -> Border:
        """What to give functional.augment as border with this module's draws: where no map leaves the image, the
        pixels at its edges are not mixed with `fill`, as torchvision's resize does not.
        """
        crop = self.crop if self.training else self.centre
        leaves = crop.leaves(self.size) or bool(self.training and self.turn.draws)
        return self.border if leaves else "reflection"

    def draw(
        self, sizes: Tensor | Sequence[Any], index: Tensor | Sequence[int], epoch: int = 0, channels: int | None = None
    ) -> Draws:
        """The numbers of images by their indices (int [N]). sizes: (height, width) of each, int [N, 2], or of all.
        channels: of an image; None: as many as `mean` has. In evaluation only maps. Raises ValueError and TypeError for
        what does not fit.
        """
        drawn = indices_of(index).numpy()
        H, W = extents_of(sizes, len(drawn))
        dice = Dice(self.seed, rules.whole("epoch", epoch, 0, 2**32 - 1), drawn, self.draws if self.training else ())
        if not self.training:
            frame = self.centre.draw(dice, H, W, self.size)
            return Draws(torch.from_numpy(onto(frame, IDENTITY, self.size).rounded(len(drawn))))
        maps = self.flips.draw(dice, self.turn.draw(dice, self.size), self.size)
        maps = onto(self.crop.draw(dice, H, W, self.size), maps, self.size)
        boxes, noise = self.erasing.draw(dice, self.size, channels or len(self.mean))
        return Draws(
            torch.from_numpy(maps.rounded(len(drawn))),
            tensor_of(self.jitter.draw(dice)),
            tensor_of(boxes),
            tensor_of(noise),
            tensor_of(self.mixing.draw(dice, self.size)),
        )

    def forward(
        self,
        images: Images,
        labels: Tensor | None = None,
        *,
        index: Tensor | Sequence[int] | None = None,
        epoch: int = 0,
    ) -> Any:
        """[N, C, P, Q] in channels_last, or with labels (images, labels).

        images: uint8 or floating, [N, C, H, W] or [N, H, W, C]; or a list of uint8 images of different sizes, [H, W, C]
            or [C, H, W]; or what functional.pack_images makes of them.
        labels: int [N], or soft [N, K]; where images are mixed they become soft, [N, num_classes] in float32. Without
            labels, mixed images alone: `draw` says how.
        index: of each image in the data set, int [N]; None: drawn by `generator`. epoch: from 0.

        Raises what functional.augment raises, and ValueError or TypeError for labels and indices that do not fit.
        """
        augmented = self._augmented_aside if torch.compiler.is_compiling() else self._augmented
        return augmented(images, labels, index, epoch)

    def _augmented(
        self, images: Images, labels: Tensor | None, index: Tensor | Sequence[int] | None, epoch: int
    ) -> Any:
        to_augment = ImagesToAugment.of(images)
        N, channels = len(to_augment.sizes), to_augment.channels or len(self.mean)
        if labels is not None:
            check_labels(labels, N, self.num_classes, self.training and bool(self.mixing.draws))
        drawn = indices_of(index, N, self.generator) if self.training else torch.arange(N)
        draws = self.draw(to_augment.sizes, drawn, epoch, channels)
        result = F.augment(
            to_augment.source, draws.maps, draws.colours, draws.boxes, draws.partners, noise=draws.noise,
            size=self.size, mean=self.mean * channels if len(self.mean) == 1 else self.mean, std=self.std,
            dtype=self.dtype, border=self.seen_border, fill=self.fill,
        )  # fmt: skip
        if labels is None:
            return result
        if draws.partners is None:
            return result, labels
        return result, mix_labels(labels, draws.partners, self.size, self.num_classes)

    # Numbers are drawn in Python, which torch.compile is not to trace. torch.compiler.disable would import
    # torch._dynamo, which takes a second, also where nothing is compiled.
    _augmented_aside = _disable_dynamo(_augmented)
