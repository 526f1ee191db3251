"""The folders that hold compiled kernels and measurements: whether they can be written, and what is in them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cnnfast_kernels import __version__, tables

from .finding import Command, Finding, in_a_line

TOPIC = "Kept on this machine"
COUNTING = 0.2  # seconds that counting a folder may take: a cache may hold tens of thousands of files
LITTLE = 2**30  # fewer free bytes are worth a note: the kernels of one network take some hundred megabytes
TUNE = "cnnfast tune MODEL --input 64x3x224x224"


class Held(NamedTuple):
    """Files and bytes in a folder; whole: whether all were counted in time."""

    files: int
    bytes: int
    whole: bool

    def __str__(self) -> str:
        least = "" if self.whole else "at least "
        return f"{least}{self.files:,} files, {self.bytes / 2**20:,.0f} MiB" if self.files else "nothing yet"


def why_unwritable(folder: Path) -> str:
    """Why a folder, which need not exist, cannot be written; "" if it can. Tries it, and leaves nothing there."""
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def held(folder: Path, seconds: float = COUNTING) -> Held:
    """What a folder holds, counted for at most so many seconds."""
    deadline, files, size, left = time.monotonic() + seconds, 0, 0, [folder]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        left.append(Path(entry.path))
                    else:
                        files, size = files + 1, size + entry.stat(follow_symlinks=False).st_size
                    if time.monotonic() > deadline:
                        return Held(files, size, False)
        except OSError:  # not there, or gone meanwhile
            continue
    return Held(files, size, True)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def triton_cache(folder: Path) -> Finding:
    """Where Triton keeps what it compiled."""
    why = why_unwritable(folder)
    if why:
        text = f"Triton's cache, {folder}, cannot be written ({why}), and without it no kernel compiles."
        advice = "Name another folder in TRITON_CACHE_DIR, or make room in this one."
        return Finding(TOPIC, "Triton's cache", "broken", text, advice)
    free = free_bytes(folder)
    if free < LITTLE:
        advice = "Make room, or name a folder on another disk in TRITON_CACHE_DIR; all of the cache may be deleted."
        text = (
            f"{folder}: {held(folder)}; only {free / 2**20:,.0f} MiB are free, and one network's kernels can take more."
        )
        return Finding(TOPIC, "Triton's cache", "note", text, advice)
    return Finding(TOPIC, "Triton's cache", "ok", f"{folder}: {held(folder)}; {free / 2**30:,.0f} GiB are free.")


# ----------------------------------------------------------------------------------------------------------------------
# Tables of measured tiles


def table_folder() -> Finding:
    """Where the user's tables are written."""
    folder = tables.user_folder()
    why = why_unwritable(folder)
    if why:
        text = (
            f"The folder of your tables, {folder}, cannot be written ({why}): what cnnfast tune measures would be lost."
        )
        return Finding(TOPIC, "your tables", "broken", text, "Give yourself the right to write there, or make room.")
    files = _files(folder)
    return Finding(TOPIC, "your tables", "ok", f"{folder}: {_counted(len(files), 'table') if files else 'none yet'}.")


def table_files(beside_a_gpu: bool) -> list[Finding]:
    """Each table that cannot be used, or only in part. beside_a_gpu: whether there is a GPU here on which it could be
    measured again.
    """
    found = []
    command = Command(TUNE, "a new table of your GPU") if beside_a_gpu else None
    for whose, folder in (("your table", tables.user_folder()), ("table of cnnfast's", tables.SHIPPED)):
        for file in _files(folder):
            _, complaint = _read(file)
            if complaint:
                state = "note" if _is_of_another_version(file) else "broken"
                text = f"Measurements are not used: {complaint}."
                advice = "" if beside_a_gpu else "If you do not have its GPU, the file may be deleted."
                found.append(Finding(TOPIC, f"{whose} {file.name}", state, text, advice, command))
    return found


def measured(gpus: Sequence[tuple[str, int]]) -> list[Finding]:
    """What was measured on each GPU here that our kernels cover, given as (name, architecture). Without such a GPU:
    what was measured on any.
    """
    rows = {
        whose: _rows(_files(folder))
        for whose, folder in (("yours", tables.user_folder()), ("cnnfast's", tables.SHIPPED))
    }
    found = []
    for gpu in dict.fromkeys(gpus):
        told = [
            f"{_told(here)} are {whose}"
            for whose, all_rows in rows.items()
            if (here := [r for r in all_rows if r.key[:2] == gpu])
        ]
        if told:
            found.append(Finding(TOPIC, f"measured on {gpu[0]}", "ok", f"{'; '.join(told)}."))
            continue
        text = "Nothing is measured on it: convolutions are the library's, but for those that need no measuring."
        advice = "Measure the model and the sizes that you will run."
        command = Command(TUNE, f"measures your model's convolutions on {gpu[0]}; whoever wins serves from then on")
        found.append(Finding(TOPIC, f"measured on {gpu[0]}", "note", text, advice, command))
    if not gpus:
        others = Counter(row.key.gpu for all_rows in rows.values() for row in all_rows)
        counts = [f"{_counted(count, 'row')} of {gpu}" for gpu, count in sorted(others.items())]
        found.append(Finding(TOPIC, "measured", "ok", f"{'; '.join(counts) or 'No table has rows of any GPU'}."))
    return found


def _told(rows: Sequence[tables.AnyRow]) -> str:
    """How many rows there are of each dtype, and how many the library won."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(Counter(row.key.dtype for row in rows).items()))
    library = sum(row.winner == "library" for row in rows)
    return f"{_counted(len(rows), 'row')} ({dtypes}), of which the library won {library},"


def _rows(files: Iterable[Path]) -> list[tables.AnyRow]:
    return [row for file in files for row in _read(file)[0]]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.rglob("*.json"))
    except OSError:
        return []


def _read(file: Path) -> tuple[list[tables.AnyRow], str]:
    """The rows that can be used, and what tables.py warns of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = tables.read(file)
    return rows, in_a_line(told[0].message) if told else ""


def _is_of_another_version(file: Path) -> bool:
    """Whether a file that is not used is a complete table of another version of cnnfast."""
    try:
        data = json.loads(file.read_text())
        return isinstance(data["rows"], list) and (data["format"], data["cnnfast"]) != (tables.FORMAT, __version__)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
