"""`cnnfast augment`: a sheet of one photograph, or of a few, augmented many times."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..spelling import did_you_mean
from . import options
from .console import STANDARD_OUTPUT, JsonFile, Tell, announce, progress, refuse_unwritable, refused_by, write_json
from .predict import printable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..nn import Augment
    from ..sheets import View

EXAMPLES = (
    "cnnfast augment cat.jpg --out sheet.png",
    "cnnfast augment cat.jpg degrees=30 hue=0.1 crop_scale=0.3,1 --out sheet.png",
    "cnnfast augment cat.jpg dog.jpg cutmix_alpha=1 --columns 4 --count 12 --out sheet.png",
)
# What shows something of every kind: used where no option is given.
RECIPE = ("degrees=15", "brightness=0.3", "contrast=0.3", "saturation=0.3", "hue=0.05", "erasing_p=0.3")
# Pillow's name of a format, and the most pixels that a side has there.
FORMATS = {".png": ("PNG", 2**31 - 1), ".webp": ("WEBP", 16383)} | dict.fromkeys((".jpg", ".jpeg"), ("JPEG", 65500))
ELSEWHERE = {"size": "--size", "seed": "--seed", "generator": "--seed"}  # options of Augment that have one of their own
MOST_PIXELS = 2**25  # of all tiles together, each of which has three float32 a pixel while it is made
GROUP = 32  # images at a time
MIXING = ("mixup_alpha", "cutmix_alpha")
# Photographs of scikit-learn's, in the place of images that are not given.
SAMPLES = ("china.jpg", "flower.jpg")
IMAGES = "Images"


@dataclass(frozen=True)
class Photograph:
    """pixels: uint8, [H, W, 3]; whole: (width, height) of the image that it was shrunk from."""

    name: str
    pixels: Tensor
    whole: tuple[int, int]

    def __str__(self) -> str:
        H, W = self.extents
        shrunk = "" if (W, H) == self.whole else f", shrunk to {W} x {H}"
        return f"{self.name} ({self.whole[0]} x {self.whole[1]} pixels{shrunk})"

    @property
    def extents(self) -> tuple[int, int]:
        H, W, _ = self.pixels.shape
        return H, W


def augment(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, and options of cnnfast.nn.Augment, such as degrees=15 or crop_scale=0.3,1.",
            metavar="[IMAGE]... [NAME=VALUE]...",
            show_default=f"a photograph, and {' '.join(RECIPE)}",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="The sheet to write: a file of .png, .jpg or .webp.", metavar="FILE", rich_help_panel=options.OUTPUT
        ),
    ] = Path("augmented.png"),
    size: Annotated[
        int, typer.Option(min=1, max=4096, help="Pixels of each side of a result.", rich_help_panel=IMAGES)
    ] = 224,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of what is drawn.", rich_help_panel=IMAGES)] = 0,
    count: Annotated[
        int, typer.Option(min=1, max=1000, help="How many results.", metavar="N", rich_help_panel=IMAGES)
    ] = 24,
    columns: Annotated[
        int, typer.Option(min=1, max=1000, help="How many stand in a row.", metavar="N", rich_help_panel=options.OUTPUT)
    ] = 6,
    json_file: JsonFile = None,
) -> None:
    """Show a photograph augmented many times, by random crops, flips, rotations, colours and erased boxes.

    The first column has it as networks see it in evaluation. Below each result stands what was drawn for it: the share
    of the image that is seen, degrees clockwise, factors of colours, sizes of boxes in pixels. The same seed draws the
    same again, here and in training: result i is what cnnfast.nn.Augment makes of the image with index i, in epoch 0.

    A word with = after a name is an option; write ./a=b.jpg for a file of such a name. Several images take turns. Those
    that mixup_alpha or cutmix_alpha mix are different ones, so to a single image a photograph of scikit-learn's is
    added. Images larger than twice the size are shrunk before, as a user would store them for training.
    """
    given = words or []
    names = [word for word in given if not _is_option(word)]
    chosen = [word for word in given if _is_option(word)]
    _refuse_words(names, chosen)
    if out.suffix.lower() not in FORMATS:
        kind = f"{out} is no name of a picture" if out != STANDARD_OUTPUT else "a picture goes to a file"
        raise typer.BadParameter(f"{kind}: let it end with .png, .jpg or .webp", param_hint="--out")
    refuse_unwritable(out, "--out")
    refuse_unwritable(json_file)
    if count * size**2 > MOST_PIXELS:
        most = max(1, MOST_PIXELS // size**2)
        raise typer.BadParameter(
            f"{count} results of {size} x {size} are too many pixels: at most {most} of this size", param_hint="--count"
        )

    from .. import nn as cnn
    from ..engine.images.images import pillow

    with refused_by("IMAGE", ModuleNotFoundError):
        pillow()
    with refused_by("NAME=VALUE", ValueError, TypeError):
        keywords = cnn.augment_options(chosen or RECIPE)
        augmentation = cnn.Augment(size, **keywords, seed=seed)
    mixing = any(keywords.get(name) is not None for name in MIXING)
    with progress("reading images") as tell:
        photographs = _photographs(names, SAMPLES[: max(0, 1 + mixing - len(names))], 2 * size)
        with refused_by("NAME=VALUE", ValueError):  # a crop that an image is too small for
            results, drawn = _results(augmentation, photographs, count, mixing, tell)
        tell(count, count, "writing")
        call = _call(size, keywords, seed)
        picture = _picture(augmentation, photographs, results, drawn, columns, call)
        with refused_by("--out", OSError, ValueError):
            _write(picture, out)

    python = _python(call, len(photographs) if mixing else 0, count)
    what = " and ".join(str(one) for one in photographs)
    told = "" if chosen else " (none was given: these show something of each kind)"
    announce(json_file, f"{out} is written: {count} results of {size} x {size} pixels, of {what}.")
    announce(json_file, f"Options: {' '.join(chosen or RECIPE)}{told}")
    announce(json_file, f"In Python: {python}")
    tiles = [
        {"index": i, "image": photographs[i % len(photographs)].name, **view.as_dict()} for i, view in enumerate(drawn)
    ]
    data = {"file": str(out), "size": size, "seed": seed, "options": list(chosen or RECIPE), "python": python}
    write_json(json_file, {**data, "results": tiles})


# ----------------------------------------------------------------------------------------------------------------------
# Words


def _is_option(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and name.replace("-", "_").isidentifier()


def _refuse_words(names: Sequence[str], chosen: Sequence[str]) -> None:
    """Ends the command with exit code 2 for what needs no torch to be seen."""
    for word in chosen:
        name, _, value = word.partition("=")
        if name in ELSEWHERE:
            raise typer.BadParameter(f"{word}: write {ELSEWHERE[name]} {value}", param_hint="NAME=VALUE")
    for name in names:
        if not Path(name).exists():
            near = did_you_mean(name, map(str, Path(name).parent.glob("*")))
            advice = near or "; options are written NAME=VALUE, such as degrees=15"
            raise typer.BadParameter(f"there is no file {name}{advice}", param_hint="IMAGE")
        if Path(name).is_dir():
            raise typer.BadParameter(f"{name} is a folder: name images in it", param_hint="IMAGE")


def _call(size: int, keywords: Mapping[str, Any], seed: int) -> str:
    """The Augment that was used, in Python."""
    given = [str(size), *(f"{name}={value!r}" for name, value in keywords.items()), f"seed={seed}"]
    return f"cnnfast.nn.Augment({', '.join(given)})"


def _python(call: str, mixed: int, count: int) -> str:
    """What gives the same results of the shrunk images. mixed: how many of them are mixed with one another, or 0."""
    if not mixed:
        return f"results = {call}(images, index=torch.arange({count}))"
    batch = f"augment(images, index=torch.arange(i, i + {mixed})) for i in range(0, {count}, {mixed})"
    return f"augment = {call}; results = torch.cat([{batch}])"


# ----------------------------------------------------------------------------------------------------------------------
# Images


def _photographs(names: Sequence[str], samples: Sequence[str], shortest: int) -> list[Photograph]:
    """The images of these names, and then these of scikit-learn's, whose shorter side has so many pixels at most."""
    from ..demo.photograph import sample
    from ..engine.images.images import UnreadableImage, pillow, read, to_mode

    found = []
    for name in names:
        try:
            found.append(_shrunk(printable(name), to_mode(read(Path(name)), "RGB"), shortest))
        except UnreadableImage as error:
            raise typer.BadParameter(f"{name}: {error}", param_hint="IMAGE") from None
    if samples and importlib.util.find_spec("sklearn") is None:
        needed = "an image" if not names else "another image to mix with"
        raise typer.BadParameter(
            f'name {needed}, or install scikit-learn, which has photographs: pip install ".[demo]"', param_hint="IMAGE"
        )
    for name in samples:
        found.append(_shrunk(f"scikit-learn's {name}", pillow().fromarray(sample(name).numpy()), shortest))
    return found


def _shrunk(name: str, image: Image, shortest: int) -> Photograph:
    import numpy as np
    import torch

    from ..engine.images.images import resampling

    whole = image.size
    if min(whole) > shortest:
        width, height = (max(1, round(extent * shortest / min(whole))) for extent in whole)
        image = image.resize((width, height), resampling("bicubic"), reducing_gap=3.0)
    return Photograph(name, torch.from_numpy(np.array(image)), whole)


# ----------------------------------------------------------------------------------------------------------------------
# The sheet


def _results(
    augmentation: Augment, photographs: Sequence[Photograph], count: int, mixing: bool, tell: Tell
) -> tuple[Tensor, list[View]]:
    """Results [count, 3, size, size] of photographs that take turns, and what was drawn for each. Where they are mixed,
    a batch has each of them once.
    """
    import torch

    from ..sheets import views

    results, drawn = [], []
    group = len(photographs) if mixing else GROUP
    for start in range(0, count, group):
        tell(start, count, "augmenting")
        index = range(start, start + group if mixing else min(start + group, count))
        results.append(_augmented(augmentation, photographs, index))
        sizes = [photographs[i % len(photographs)].extents for i in index]
        draws = augmentation.draw(sizes, torch.arange(index.start, index.stop))
        found = views(draws, sizes, augmentation.size)
        drawn += [v if v.partner is None else replace(v, partner=start + v.partner) for v in found]
    return torch.cat(results)[:count], drawn[:count]


def _augmented(augmentation: Augment, photographs: Sequence[Photograph], index: range) -> Tensor:
    """The results of these indices, before they were normalised."""
    import torch

    from ..dispatch import backend

    pixels = [photographs[i % len(photographs)].pixels for i in index]
    with backend("torch"):  # what else there might be on a CPU is the interpreter, if the user asked for it
        results = augmentation(pixels, index=torch.arange(index.start, index.stop))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (augmentation.mean, augmentation.std))
    return results.float() * std + mean


def _picture(
    augmentation: Augment,
    photographs: Sequence[Photograph],
    results: Tensor,
    drawn: Sequence[View],
    columns: int,
    headline: str,
) -> Image:
    from ..sheets import sheet

    rows = -(-len(results) // columns)
    first = photographs[:rows]
    plain = _augmented(augmentation.eval(), first, range(len(first)))
    beside = [f"{_legible(Path(one.name).name)}\nas eval() shows it" for one in first]
    numbered = any(view.partner is not None for view in drawn)
    captions = [f"#{i}: {view.caption}" if numbered else view.caption for i, view in enumerate(drawn)]
    return sheet(results, captions, columns, headline=headline, beside=plain, beside_captions=beside)


def _legible(name: str) -> str:
    """A name without the letters that Pillow's own font does not have."""
    return name.encode("latin-1", "replace").decode("latin-1")


def _write(picture: Image, file: Path) -> None:
    kind, most = FORMATS[file.suffix.lower()]
    width, height = picture.size
    if max(width, height) > most:
        raise ValueError(f"the sheet of {width} x {height} pixels is too large for {kind}: write a .png, or --columns")
    encoded = io.BytesIO()
    picture.save(encoded, kind, quality=92)
    file.write_bytes(encoded.getvalue())
