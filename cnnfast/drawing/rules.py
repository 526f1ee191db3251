"""What values the options of augmentation may have: the rules of torchvision's transforms, in sentences that name the
option. Each function returns the value in one form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from ..dtypes import full_name
from ..spelling import unknown_value

Number = int | float
Range = Sequence[Number]  # two numbers, the smaller one first
NumberOrRange = Number | Range
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def refused(name: str, value: object, rule: str, kind: type[Exception] = ValueError) -> Exception:
    """The error for an option's value; `rule` says what it must be."""
    return kind(f"Augment(): {name} must be {rule}, but got {name}={value!r}")


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def numbers(name: str, value: Any, lengths: Sequence[int], rule: str) -> tuple[float, ...]:
    """Finite numbers, as many as one of `lengths` says."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(map(is_number, value)):
        raise refused(name, value, rule, TypeError)
    if len(value) not in lengths or not all(map(math.isfinite, value)):
        raise refused(name, value, rule)
    return tuple(map(float, value))


def number(name: str, value: Any, rule: str) -> float:
    """One finite number."""
    if not is_number(value):
        raise refused(name, value, rule, TypeError)
    if not math.isfinite(value):
        raise refused(name, value, rule)
    return float(value)


def probability(name: str, value: Any) -> float:
    p = number(name, value, rule := "a probability, from 0 to 1")
    if not 0 <= p <= 1:
        raise refused(name, value, rule)
    return p


def rising(name: str, value: Any, what: str, most: float = math.inf) -> tuple[float, float]:
    """Two positive numbers, the first at most the second: the least and the largest of `what`. The least may be 0 where
    `most` bounds both.
    """
    bounds = f"from 0 to {most:g}" if most < math.inf else "above 0"
    rule = f"two numbers {bounds}, the least and the largest {what}"
    low, high = numbers(name, value, [2], rule)
    if not (0 <= low <= high <= most and high > 0 and (low > 0 or most < math.inf)):
        raise refused(name, value, rule)
    return low, high


def around(name: str, value: Any, centre: float, least: float, most: float = math.inf) -> tuple[float, float]:
    """ColorJitter's range: a number v means [centre - v, centre + v], cut at `least`; or both ends are given."""
    bounds = f"from {least:g}" + (f" to {most:g}" if most < math.inf else "")
    rule = (
        f"a number from 0{f' to {most:g}' if most < math.inf else ''}, or two numbers {bounds}, the smaller one first"
    )
    if is_number(value):
        v = number(name, value, rule)
        low, high = centre - v, centre + v
        if v < 0 or high > most:
            raise refused(name, value, rule)
        return max(low, least), high
    low, high = numbers(name, value, [2], rule)
    if not least <= low <= high <= most:
        raise refused(name, value, rule)
    return low, high


def angles(name: str, value: Any, lengths: Sequence[int]) -> tuple[float, ...]:
    """RandomAffine's ranges in degrees: a number v means [-v, v]; or pairs are given."""
    many = " or four" if 4 in lengths else ""
    rule = f"a number of degrees from 0, or two{many} numbers, the smaller one of a pair first"
    if is_number(value):
        v = number(name, value, rule)
        if v < 0:
            raise refused(name, value, rule)
        return (-v, v)
    ends = numbers(name, value, lengths, rule)
    if any(low > high for low, high in zip(ends[::2], ends[1::2], strict=True)):
        raise refused(name, value, rule)
    return ends


def extents(name: str, value: Any) -> tuple[int, int]:
    """(height, width) of one number or two."""
    rule = "a positive whole number, or two: height and width"
    pair = (value, value) if is_whole(value) else value
    if isinstance(pair, str) or not isinstance(pair, Sequence) or not all(map(is_whole, pair)):
        raise refused(name, value, rule, TypeError)
    if len(pair) not in (1, 2) or min(pair) < 1:
        raise refused(name, value, rule)
    return int(pair[0]), int(pair[-1])


def sides(name: str, value: Any) -> tuple[int, int, int, int]:
    """RandomCrop's padding as (left, top, right, bottom); one number is that of all sides, two are those of left and
    right, top and bottom.
    """
    rule = "a whole number from 0, or two (left and right, top and bottom), or four (left, top, right, bottom)"
    given = [value] if is_whole(value) else value
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(map(is_whole, given)):
        raise refused(name, value, rule, TypeError)
    if len(given) not in (1, 2, 4) or min(given) < 0:
        raise refused(name, value, rule)
    left, top, right, bottom = (int(given[i % len(given)]) for i in range(4))
    return left, top, right, bottom


def parts(name: str, value: Any) -> tuple[float, ...]:
    """RandomAffine's translate: two parts, of width and height."""
    rule = "two numbers from 0 to 1, parts of width and height"
    ends = numbers(name, value, [2], rule)
    if not all(0 <= v <= 1 for v in ends):
        raise refused(name, value, rule)
    return ends


def positive(name: str, value: Any) -> float:
    v = number(name, value, rule := "a number above 0")
    if v <= 0:
        raise refused(name, value, rule)
    return v


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    rule = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    if not is_whole(value):
        raise refused(name, value, rule, TypeError)
    if value < least or (most is not None and value > most):
        raise refused(name, value, rule)
    return int(value)


def channels(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, above: bool = False, otherwise: str = ""
) -> tuple[float, ...]:
    """A number for all channels or one each, within bounds. above: `least` itself is too small. otherwise: what else
    the option may be.
    """
    bounds = f" above {least:g}" if above else f" from {least:g} to {most:g}" if least > -math.inf else ""
    rule = f"a number{bounds} for all channels, or one for each of them (1 or 3){otherwise}"
    values = numbers(name, [value] if is_number(value) else value, [1, 3], rule)
    if not all(least <= v <= most and not (above and v == least) for v in values):
        raise refused(name, value, rule)
    return values


def one_of(name: str, value: Any, known: Sequence[str], synonyms: Mapping[str, str]) -> Any:
    """synonyms: as spelling.did_you_mean has them."""
    if value not in known:
        raise unknown_value("Augment", name, value, known, synonyms)
    return value


def dtype(name: str, value: Any) -> torch.dtype:
    """Of results, by itself or its name."""
    rule = "torch.float32, torch.float16 or torch.bfloat16, or the name of one, such as 'bf16'"
    if not isinstance(value, torch.dtype | str):
        raise refused(name, value, rule, TypeError)
    try:
        found = DTYPES.get(full_name(str(value)))
    except ValueError:
        found = None
    if found is None:
        raise refused(name, value, rule)
    return found


def instance(name: str, value: Any, kind: type) -> Any:
    if value is not None and not isinstance(value, kind):
        raise refused(name, value, f"a {kind.__module__}.{kind.__name__} or None", TypeError)
    return value
