"""A CSV that names a file and its label in each line."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .listing import Listing, in_order, note, quoted_few, refuse_unknown

COLUMNS = ("file", "label")
SHARED = ": training and validation may both see it"
DELIMITERS = (",", ";", "\t")
WHOLE_NUMBER = re.compile("0|-?[1-9][0-9]{0,17}")  # as numbers are written: 007 is a name


def list_csv(file: Path, classes: Sequence[str] | None) -> Listing:
    """An image for each line below the header, which names the columns `file` and `label`; others are not looked at.
    Files are relative to the CSV's folder. Columns stand between commas, semicolons or tabs.

    Labels are names, and the classes are in their order. If all of them are whole numbers, the classes are in the order
    of the numbers; or, where the names of classes are known, and a number is none of them, numbers from 0 into these.

    Raises ValueError that names the line, for anything else.
    """
    rows = _rows(file)
    columns = _columns(file, rows)
    names: list[str] = []
    texts: list[str] = []
    lines: list[int] = []
    for line, row in rows[1:]:
        if len(row) != len(rows[0][1]):
            raise ValueError(f"{file}, line {line}: the header has {len(rows[0][1])} columns, and this line {len(row)}")
        name, text = (row[column].strip() for column in columns)
        if not name or not text:
            raise ValueError(f"{file}, line {line}: the column {COLUMNS[0 if not name else 1]!r} is empty")
        names.append(name)
        texts.append(text)
        lines.append(line)
    if not names:
        raise ValueError(f"{file} lists no images: there is no line below its header")
    missing = [i for i, name in enumerate(names) if not os.path.isfile(os.path.join(file.parent, name))]
    if missing:
        more = f"; {len(missing) - 1} more lines name files that are not there" if missing[1:] else ""
        place = os.path.join(file.parent, names[missing[0]])
        raise ValueError(f"{file}, line {lines[missing[0]]}: there is no file {place}{more}")
    known, labels = _labels(file, texts, lines, classes)
    return Listing(file.parent, names, labels, known, tuple(filter(None, _repeated(names, labels))))


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """Lines that are not empty: number of the last line of each, and its columns."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            header = text.readline()
            text.seek(0)
            reader = csv.reader(text, delimiter=max(DELIMITERS, key=header.count), strict=True)
            try:
                rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
            except csv.Error as error:
                raise ValueError(f"{file}, line {reader.line_num}: {error}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text in UTF-8") from None
    if not rows:
        raise ValueError(f"{file} is empty: it needs a header with the columns file and label")
    return rows


def _columns(file: Path, rows: Sequence[tuple[int, list[str]]]) -> list[int]:
    header = [name.strip() for name in rows[0][1]]
    if any(header.count(name) != 1 for name in COLUMNS):
        found = quoted_few(header)
        raise ValueError(f"{file}, line 1: the header must have one column 'file' and one 'label', but has {found}")
    return [header.index(name) for name in COLUMNS]


def _labels(
    file: Path, texts: Sequence[str], lines: Sequence[int], classes: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    """The classes, and the index of each label."""
    first: dict[str, int] = {}  # the line in which each stands first
    for text, line in zip(texts, lines, strict=True):
        first.setdefault(text, line)
    numbers = all(WHOLE_NUMBER.fullmatch(text) for text in first)
    if classes is not None and numbers and not first.keys() <= set(classes):
        for text, line in first.items():
            if not 0 <= int(text) < len(classes):
                raise ValueError(f"{file}, line {line}: the label {text} is none of 0 to {len(classes) - 1}")
        return tuple(classes), [int(text) for text in texts]
    if classes is not None:
        for text, line in first.items():
            refuse_unknown([text], classes, f"{file}, line {line}")
    known = in_order(sorted(first, key=int if numbers else None), classes, str(file))
    index = {name: i for i, name in enumerate(known)}
    return known, [index[text] for text in texts]


def _repeated(names: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Notes about files that are named twice."""
    seen: dict[str, set[int]] = {}
    for name, label in zip(names, labels, strict=True):
        seen.setdefault(name, set()).add(label)
    several = sum(len(own) > 1 for own in seen.values())
    return [
        note(len(names) - len(seen), "line names", "lines name", f"a file that a line before has named{SHARED}"),
        note(several, "file has", "files have", "labels of several classes"),
    ]
