"""A folder with a folder of images for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..engine.images.images import find
from .listing import FEW, Listing, in_order, note, quoted_few

# Folders that hold a part of a data set each, and not a class.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


def list_folder(root: Path, classes: Sequence[str] | None) -> Listing:
    """A class for each folder in `root`, by name, as torchvision.datasets.ImageFolder has it: the images in its folders
    are of the class, too. A file is an image if its extension is one that Pillow reads; hidden files and folders, with
    a dot before their name, are left out.

    classes: the names in the order of the labels, if they are known; not all of them need a folder then.

    Raises ValueError where this is not the layout of the folder.
    """
    folders, loose, hidden = _look_into(root)
    if not folders:
        held = f"{len(loose)} files but no folder" if loose else "nothing"
        raise ValueError(f"{root} holds {held}: there must be a folder with images for each class")
    _refuse_parts(root, folders)
    names: list[str] = []
    counts: dict[str, int] = {}
    others: dict[str, int] = {}
    for name in folders:
        found = find([root / name])
        for place, reason in found.unreadable.items():
            raise ValueError(f"the folder {place} cannot be looked into: {reason}")
        names += (os.path.relpath(file, root) for file in found.files)
        counts[name] = len(found.files)
        hidden += len(found.hidden)
        for extension, count in found.others.items():
            others[extension] = others.get(extension, 0) + count
    empty = [name for name, count in counts.items() if not count]
    if empty and (classes is None or len(empty) == len(counts)):
        raise ValueError(f"there is no image in {_named(empty)} of {root}{_kinds(others)}")
    known = in_order(list(counts), classes, str(root))
    labels = [label for name, count in counts.items() for label in [known.index(name)] * count]
    notes = [
        note(len(loose), "file lies", "files lie", f"in {root} itself, outside of the classes' folders"),
        note(sum(others.values()), "file is", "files are", f"left out as no image{_kinds(others)}"),
        note(hidden, "hidden file or folder is", "hidden files and folders are", "left out"),
        f"there is no image of the class {quoted_few(empty)}" if empty else "",
    ]
    return Listing(root, names, labels, known, tuple(filter(None, notes)))


def _look_into(root: Path) -> tuple[list[str], list[str], int]:
    """The names of the folders in `root`, in order, and of other things, and how many are hidden."""
    try:
        with os.scandir(root) as entries:
            seen = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        raise ValueError(f"the folder {root} cannot be looked into: {error.strerror}") from None
    shown = [(name, is_folder) for name, is_folder in seen if not name.startswith(".")]
    folders = [name for name, is_folder in shown if is_folder]
    return folders, [name for name, is_folder in shown if not is_folder], len(seen) - len(shown)


def _refuse_parts(root: Path, folders: Sequence[str]) -> None:
    """Two classes "train" and "val" would be learned without a complaint."""
    if all(name.lower() in PARTS for name in folders):
        inner = [name for name in folders if _look_into(root / name)[0]]
        if inner:
            raise ValueError(
                f"{_named(folders)} of {root} are parts of a data set and no classes: give one of them, such as "
                f"{root / inner[0]}"
            )


def _kinds(others: dict[str, int]) -> str:
    most = sorted(others, key=lambda extension: (-others[extension], extension))[:FEW]
    told = ", ".join(f"{others[extension]} {extension or 'without an extension'}" for extension in most)
    return f" ({told})" if told else ""


def _named(names: Sequence[str]) -> str:
    return f"the {'folder' if len(names) == 1 else 'folders'} {quoted_few(names)}"
