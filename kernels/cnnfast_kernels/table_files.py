"""The files of tables of measured tiles: each is JSON, for one GPU and one version of cnnfast, a row a line."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from . import __version__
from .table_rows import AnyRow, row_from_dict

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where two processes that write one table at a time may lose rows of each other
    fcntl = None

FORMAT = 1


def read(file: Path) -> list[AnyRow]:
    """The rows of a table. A file that is no table of this version has none, and rows that cannot be understood are
    left out; a warning says so.
    """
    try:
        data = json.loads(file.read_text())
        made_by = data["format"], data["cnnfast"]
        gpu, arch, entries = data["gpu"], data["arch"], list(data["rows"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        warn(f"{file} is not used: {type(error).__name__}: {error}; cnnfast tune writes a new one")
        return []
    if made_by != (FORMAT, __version__):
        warn(f"{file} is not used: cnnfast {made_by[1]} wrote it, and this is {__version__}; run cnnfast tune again")
        return []
    rows: list[AnyRow] = []
    wrong: list[str] = []
    for entry in entries:
        try:
            rows.append(row_from_dict(gpu, arch, entry))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
    if wrong:
        warn(f"{len(wrong)} of {len(entries)} rows of {file} are not used: {wrong[0]}; run cnnfast tune again")
    return rows


def warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def refuse_foreign(file: Path, gpu: str, arch: int) -> None:
    """Raises ValueError if the file exists and is no table of this GPU and this version, to which rows could be added;
    OSError, naming the file, if it could not be written.
    """
    try:
        if file.exists():
            data = json.loads(file.read_text())
            made_by = data["format"], data["cnnfast"], data["gpu"], data["arch"]
            if made_by != (FORMAT, __version__, gpu, arch):
                raise ValueError(
                    f"{file} holds rows of {made_by[2]} by cnnfast {made_by[1]}, and these would be of {gpu} by "
                    f"{__version__}"
                )
        tempfile.TemporaryFile(dir=file.parent).close()
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
        raise ValueError(f"{file} is there, and is no table of cnnfast") from None
    except OSError as error:
        raise OSError(f"a table cannot be written to {file}: {error.strerror or error}") from error


def merge(file: Path, gpu: str, arch: int, rows: Iterable[AnyRow], about: Mapping[str, str]) -> None:
    """Adds rows to a table of a GPU, in the place of those of the same key.

    about: what else the head of the file shall say of the run (driver, versions), for people to read. A reader, even
    after this process was killed, finds either the old file or the new one; of processes that write at the same time
    none loses the rows of another.
    """
    with alone(file):
        merged = {row.key: row.to_dict() for row in (*(read(file) if file.exists() else ()), *rows)}
        head = json.dumps({"format": FORMAT, "cnnfast": __version__, "gpu": gpu, "arch": arch, **about}, indent=1)
        lines = ",\n  ".join(json.dumps(row) for row in merged.values())
        # Always the same name: what a killed process left there is overwritten by the next one.
        fresh = file.with_name(f"{file.name}.fresh")
        fresh.write_text(f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
        fresh.replace(file)


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Waits until no other process or thread writes the file. The lock is a file beside it, which exists only while
    somebody writes.
    """
    if fcntl is None:
        yield
        return
    lock = file.with_name(f"{file.name}.lock")
    while True:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(held.fileno()), lock.stat())
            except FileNotFoundError:
                current = False
            if not current:  # its last holder has removed the file: what we hold is no longer the lock
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
