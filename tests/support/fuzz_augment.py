"""Random augmentations of whole batches: every pixel within its bound of float64, by kernels and by plain PyTorch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import cnnfast
import cnnfast.functional as ours
from cnnfast.dispatch import backend
from cnnfast.recording import Trace
from tests.support.augmented import Given, Known, augmented
from tests.support.poison import embed

RAGGED = "a flat buffer"
LAYOUTS = ("NCHW", "channels_last", "NHWC", "a slice of NCHW", "a slice of NHWC", "every second pixel", RAGGED)
MAPS = ("none", "shift", "flip", "crop", "rotation", "shear", "all", "far away", "one point")
COLOURS = ("brightness", "contrast", "saturation", "hue", "grey")
BOXES = {"none": 0, "one": 1, "three": 3, "noise": 2}
PARTNERS = ("none", "mixup", "cutmix", "both")
CONTENTS = ("random", "smooth", "colours at the corners of the cube")


@dataclass(frozen=True)
class AugmentCase:
    """A batch and what is done to it; `seed` is that of all numbers."""

    sizes: tuple[tuple[int, int], ...]  # (H, W) of each image; all the same but in a flat buffer
    C: int
    layout: str
    dtype: torch.dtype
    content: str
    map: str
    border: str
    colours: tuple[str, ...]
    filling: str
    partner: str
    size: tuple[int, int]
    result: torch.dtype
    seed: int

    def counts(self) -> Counter[tuple[str, str]]:
        found = [
            ("layout", self.layout), ("dtype", str(self.dtype)), ("map", self.map), ("border", self.border),
            ("boxes", self.filling), ("partner", self.partner), ("result", str(self.result)), ("channels", str(self.C)),
            ("content", self.content), *(("colours", name) for name in self.colours or ["none"]),
        ]  # fmt: skip
        return Counter(found)


@dataclass(frozen=True)
class AugmentRun:
    """What one call launched, what it returned, and what is right."""

    trace: Trace
    y: Tensor
    right: Known

    @property
    def worst(self) -> float:
        """The largest error, as a part of its bound."""
        return float(((self.y.cpu().double() - self.right.value).abs() / self.right.error).max())


SIDES = st.sampled_from([1, 2, 3, 5, 8, 13, 17, 32, 33, 47, 70])
RESULT_SIDES = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33])


@st.composite
def augmentations(draw: st.DrawFn) -> AugmentCase:
    layout = draw(st.sampled_from(LAYOUTS))
    N = draw(st.integers(1, 3))
    one = draw(st.tuples(SIDES, SIDES))
    if layout.endswith("NHWC") and one[0] in (1, 3):  # would be taken for channels
        one = (one[0] + 1, one[1])
    sizes = tuple(draw(st.tuples(SIDES, SIDES)) for _ in range(N)) if layout == RAGGED else (one,) * N
    dtypes = [torch.uint8, torch.uint8, torch.float32, torch.float16, torch.bfloat16]
    size = draw(st.tuples(RESULT_SIDES, RESULT_SIDES))
    subsets = st.lists(st.sampled_from(COLOURS), unique=True, max_size=len(COLOURS)).map(
        lambda names: tuple(sorted(names))
    )
    return AugmentCase(
        sizes=sizes,
        C=draw(st.sampled_from([3, 3, 1])),
        layout=layout,
        dtype=torch.uint8 if layout == RAGGED else draw(st.sampled_from(dtypes)),
        content=draw(st.sampled_from(CONTENTS)),
        map=draw(st.sampled_from(MAPS)),
        border=draw(st.sampled_from(["constant", "reflection"])),
        colours=draw(st.one_of(st.just(()), subsets, st.just(tuple(sorted(COLOURS))))),
        filling=draw(st.sampled_from([*BOXES])),
        partner=draw(st.sampled_from(PARTNERS)),
        size=size,
        result=draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# What a case stands for


def make_images(case: AugmentCase) -> list[Tensor]:
    """[C, H, W] each."""
    generator = torch.Generator().manual_seed(case.seed)
    images = [make_image(case.content, (case.C, *size), generator) for size in case.sizes]
    if case.dtype == torch.uint8:
        images = [(image * 255).round() for image in images]
    return [image.to(case.dtype) for image in images]


def make_image(content: str, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    noise = torch.rand(shape, generator=generator)
    if content == "random":
        return noise
    if content == "smooth":
        C, H, W = shape
        along = torch.linspace(0, 3, H)[:, None] + torch.linspace(0, 2, W)
        return 0.5 + 0.5 * torch.sin(along + 2 * torch.arange(C)[:, None, None] + noise[:, :1, :1])
    return (noise * 2.99).floor() / 2  # 0, 1/2 and 1: hues at the sectors' edges, greys, black and white


def laid_out(images: list[Tensor], layout: str, device: torch.device) -> Any:
    """The argument `images` of F.augment."""
    if layout == RAGGED:
        offsets, parts, at = [], [], 3  # nothing is asked of where the first one begins
        parts.append(torch.full((at,), 255, dtype=torch.uint8))
        for image in images:
            offsets.append(at)
            parts.append(image.permute(1, 2, 0).reshape(-1))
            at += image.numel()
        sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int32)
        return torch.cat(parts).to(device), torch.tensor(offsets).to(device), sizes.to(device)
    batch = torch.stack(images).to(device)
    if layout == "channels_last":
        return batch.contiguous(memory_format=torch.channels_last)
    if layout == "a slice of NCHW":
        return embed(batch, 0 if batch.dtype == torch.uint8 else 1, 1)
    if layout == "every second pixel":
        return batch.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2]
    if layout.endswith("NHWC"):
        batch = batch.permute(0, 2, 3, 1).contiguous()
        return embed(batch) if layout.startswith("a slice") else batch
    return batch


def make_map(kind: str, image: tuple[int, int], size: tuple[int, int], random: Random) -> list[list[float]]:
    (H, W), (P, Q) = image, size

    def uniform(low: float, high: float) -> float:
        return random.uniform(low, high)

    if kind == "shift":
        return [[1, 0, random.randint(-W, W)], [0, 1, random.randint(-H, H)]]
    if kind == "flip":
        x, y = random.choice([(True, False), (False, True), (True, True)])
        return [[-1 if x else 1, 0, W if x else 0], [0, -1 if y else 1, H if y else 0]]
    if kind == "one point":
        return [[0, 0, uniform(-1, W + 1)], [0, 0, uniform(-1, H + 1)]]
    width, height = uniform(0.2, 1) * W, uniform(0.2, 1) * H
    left, top = uniform(0, W - width), uniform(0, H - height)
    if kind == "crop":
        return [[width / Q, 0, left], [0, height / P, top]]
    turn = math.radians(uniform(-180, 180)) if kind != "shear" else 0
    lean = math.tan(math.radians(uniform(-40, 40))) if kind != "rotation" else 0
    grow = 1 if kind == "rotation" else uniform(0.5, 2)
    far = 5 if kind == "far away" else 0.3
    cosine, sine = math.cos(turn) * grow, math.sin(turn) * grow
    a, b, c, d = cosine, cosine * lean - sine, sine, sine * lean + cosine
    if kind in ("all", "far away"):
        a, b, c, d = a * width / Q, b * width / Q, c * height / P, d * height / P
    x, y = W / 2 + uniform(-far, far) * W, H / 2 + uniform(-far, far) * H
    return [[a, b, x - a * Q / 2 - b * P / 2], [c, d, y - c * Q / 2 - d * P / 2]]


def make_colours(names: tuple[str, ...], random: Random) -> list[float]:
    usual = [1.0, 1.0, 1.0, 0.0, 0.0]
    drawn = [random.uniform(0, 2), random.uniform(0, 2.5), random.uniform(0, 3), random.uniform(-0.5, 0.5)]
    # Not every image of a batch is changed: some keep the number that changes nothing.
    drawn.append(float(random.random() < 0.6))
    return [
        mine if name in names and random.random() < 0.85 else none
        for name, mine, none in zip(COLOURS, drawn, usual, strict=True)
    ]


def make_box(size: tuple[int, int], random: Random, values: int = 0) -> list[float]:
    """Left, top, right, bottom, which are those of pixels or lie anywhere, and so many values."""
    P, Q = size
    x, y = (sorted(random.uniform(0, extent) for _ in range(2)) for extent in (Q, P))
    box = [x[0], y[0], x[1], y[1]]
    if random.random() < 0.5:
        box = [float(round(edge)) for edge in box]
    return box + [random.random() for _ in range(values)]


def make_given(case: AugmentCase) -> Given:
    random = Random(case.seed)
    N, C = len(case.sizes), case.C
    maps = colours = boxes = noise = partners = None
    if case.map != "none":
        maps = torch.tensor([make_map(case.map, size, case.size, random) for size in case.sizes], dtype=torch.float32)
    if case.colours:
        colours = torch.tensor([make_colours(case.colours, random) for _ in range(N)])
    if case.filling != "none":
        values = 0 if case.filling == "noise" else C
        boxes = torch.tensor(
            [[make_box(case.size, random, values) for _ in range(BOXES[case.filling])] for _ in range(N)]
        )
        if case.filling == "noise":
            noise = torch.tensor([random.randint(-(2**63), 2**63 - 1) for _ in range(N)])
    if case.partner != "none":
        partners = torch.tensor([make_partner(case, random) for _ in range(N)])
    each = C if case.layout == RAGGED else random.choice([1, C])  # a flat buffer has as many channels as `mean`
    mean = [random.uniform(0, 1) for _ in range(each)]
    std = [random.uniform(0.2, 1) for _ in range(each)]
    fill = [random.random() for _ in range(random.choice([1, C]))]
    return Given(maps, colours, boxes, partners, case.size, mean, std, case.result, case.border, fill, noise)


def make_partner(case: AugmentCase, random: Random) -> list[float]:
    index = float(random.randrange(len(case.sizes)))
    weight = 1.0 if case.partner == "cutmix" else random.random()
    box = [0.0] * 4 if case.partner == "mixup" else make_box(case.size, random)
    return [index, weight, *box]


# ----------------------------------------------------------------------------------------------------------------------
# The property


def augment(images: Any, given: Given, device: torch.device | None = None) -> Tensor:
    """F.augment of these numbers; with a device, they lie there."""
    numbers = given._asdict()
    if device is not None:
        numbers = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in numbers.items()}
    first = [numbers.pop(name) for name in ("maps", "colours", "boxes", "partners")]
    return ours.augment(images, *first, **numbers)


def check_augmentation(case: AugmentCase, device: torch.device) -> AugmentRun:
    """By kernels and by plain PyTorch; the numbers lie on the CPU for one half of the cases."""
    images, given = make_images(case), make_given(case)
    right = augmented(images, given)
    laid = laid_out(images, case.layout, device)
    where = device if case.seed % 2 else None
    runs = {}
    for name in ("kernels", "torch"):
        with backend(name), cnnfast.trace() as trace:
            runs[name] = AugmentRun(trace, augment(laid, given, where), right)
    for name, run in runs.items():
        assert run.y.dtype == case.result, name
        assert run.y.is_contiguous(memory_format=torch.channels_last), name
        assert not run.y.isnan().any(), name
        assert run.worst <= 1, f"by {name}: {run.worst:.2f} times what float32 may miss"
    assert not [str(call) for call in runs["kernels"].trace if call.served_by != "kernels"]
    return runs["kernels"]
