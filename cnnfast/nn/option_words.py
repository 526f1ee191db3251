"""Options of Augment as words of a command line: NAME=VALUE."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

from ..spelling import did_you_mean
from .augment import Augment

# What commands give themselves, or no word can say.
OTHERS = ("size", "generator")
# What other libraries and their scripts call them, as spelling.py folds words.
SYNONYMS = {
    **dict.fromkeys(("hflip", "hflipprob", "randomhorizontalflip", "fliplr"), "horizontal_flip_p"),
    **dict.fromkeys(("vflip", "vflipprob", "randomverticalflip", "flipud"), "vertical_flip_p"),
    **dict.fromkeys(("reprob", "randomerase", "randomerasing", "cutout", "erasing"), "erasing_p"),
    **dict.fromkeys(("rotation", "rotate", "angle"), "degrees"),
    **dict.fromkeys(("randomgrayscale", "greyscalep", "greyscale", "grayscale"), "grayscale_p"),
    **dict.fromkeys(("translation", "shift"), "translate"),
    **dict.fromkeys(("paddingmode", "fillmode"), "border"),
}


def augment_options(words: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of Augment from words such as brightness=0.4, crop_scale=0.2,1, crop_ratio=3/4,4/3,
    border=reflection or crop_scale=none: a number, numbers with commas between them, none, or a name.

        augment = cnnfast.nn.Augment(224, **cnnfast.nn.augment_options(["degrees=15", "erasing_value=random"]))

    Raises ValueError for a word that is not NAME=VALUE, a name that is none of Augment.options() or stands twice, and a
    value that Augment refuses. `size` and `generator` cannot be given so.
    """
    known = [name for name in Augment.options() if name not in OTHERS]
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip()
        if not equals:
            raise ValueError(f"an option of augmentation is NAME=VALUE, such as brightness=0.4, but got {word!r}")
        if name not in known:
            advice = did_you_mean(name, known, SYNONYMS) or f". There are {', '.join(known)}"
            raise ValueError(f"{name!r} is no option of augmentation{advice}")
        if name in options:
            raise ValueError(f"the option {name} of augmentation is given twice: {name}={options[name]!r} and {word!r}")
        options[name] = value_of(text.strip())
    try:
        Augment(1, **options)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return options


def value_of(text: str) -> Any:
    """None, a number, or a tuple of numbers; any other word as it is."""
    if text.lower() == "none":
        return None
    numbers = [number_of(part.strip()) for part in text.strip("()[]").split(",") if part.strip()]
    if not numbers or None in numbers:
        return text
    return numbers[0] if len(numbers) == 1 and "," not in text else tuple(numbers)


def number_of(text: str) -> int | float | None:
    """Of 3, 0.75 or 3/4; None for anything else."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text)
    with suppress(ValueError, ZeroDivisionError):
        return float(Fraction(text))
    return None
