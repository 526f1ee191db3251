"""What a folder or a CSV says: files of images, and what they show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

FEW = 3  # examples in a sentence


@dataclass(frozen=True)
class Listing:
    """names: of the files, relative to `folder` or absolute. labels: an index into `classes` each. notes: sentences
    about what is unusual, and goes on.
    """

    folder: Path
    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def in_order(names: Sequence[str], classes: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The classes in the order of their labels: `classes` if they are given, and have all the names."""
    if classes is None:
        if len(names) == 1:
            raise ValueError(f"{where} has the class {names[0]!r} only, and a network learns to tell two or more apart")
        return tuple(names)
    refuse_unknown(names, classes, where)
    return tuple(classes)


def refuse_unknown(names: Iterable[str], classes: Sequence[str], where: str) -> None:
    """Raises ValueError unless all names are of the classes that are known."""
    unknown = [name for name in names if name not in set(classes)]
    if unknown:
        which = "the class" if len(unknown) == 1 else "the classes"
        known = f"the {len(classes)} known ones are {quoted_few(classes)}"
        raise ValueError(f"{where} has {which} {quoted_few(unknown)}, and {known}")


def note(count: int, one: str, several: str, rest: str) -> str:
    return f"{count} {one if count == 1 else several} {rest}" if count else ""


def quoted_few(names: Iterable[str]) -> str:
    """The first few, between quotes."""
    names = list(names)
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(map(repr, names[:FEW])) + more
