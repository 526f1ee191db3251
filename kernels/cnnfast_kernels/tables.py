"""Tables of measured tiles: which kernel serves a convolution on a GPU, or whether the library's is faster there.

A table is a file of JSON for one GPU, with one row for each convolution that was measured and checked on it. The user's
lies in the platform's cache folder and is written by `cnnfast tune`, row by row. Those that come with cnnfast lie in
tables/ beside this file, in a folder for each GPU, and say in their heads what they were measured with; `cnnfast tune
--table` writes such a file. The user's rows go before them; where there is none, the defaults in code run.

A row serves a convolution that agrees with it in everything but the batch: GPU, operation, epilogue, dtype, layout,
channels, image, filters, strides, padding. Another batch only makes more or fewer tiles: the row of the nearest one is
taken, up to FARTHEST_BATCH times as large or as small. Another image also changes how tiles fit it, and has to be
measured.

Tables of another version of cnnfast are not used: their kernels were others. Nothing here is asked twice for one
convolution: plans keep the answer (launch.planned).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import __version__
from .problem import ConvProblem
from .tiling import Operation, StripTile, TileConfig
from .tma.tiles import BoxTile

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where two processes that write one table at a time may lose rows of each other
    fcntl = None

Winner = Literal["kernels", "library"]

FORMAT = 1  # of the file
FAMILIES: dict[str, type] = {"gather": TileConfig, "depthwise": StripTile, "tma": BoxTile}
FARTHEST_BATCH = 2
SHIPPED = Path(__file__).parent / "tables"


class Key(NamedTuple):
    """What a row is looked up by.

    gpu: as CUDA names it; "" where there is none, which has no rows. arch: 90 for sm_90. epilogue: what the kernel does
    besides, as "norm residual relu", "stats" or ""; a bias is not counted. dtype: as PyTorch prints it without
    "torch.", or "tf32" for float32 multiplied as that. layout: of x, w and y, or their gradients: "NHWC NHWC NHWC" if
    channels are adjacent in all, "NCHW" where apart.
    """

    gpu: str
    arch: int
    operation: Operation
    epilogue: str
    dtype: str
    layout: str
    problem: ConvProblem

    @property
    def but_for_batch(self) -> Key:
        return self._replace(problem=replace(self.problem, N=1))


@dataclass(frozen=True, slots=True)
class TableRow:
    """One measurement. tile: the fastest of ours. winner: who is faster, it or the library.

    microseconds: medians, of "kernels" (the tile), "default" (what runs unmeasured) and "library", as far as they could
    be measured.
    """

    key: Key
    tile: Any
    winner: Winner
    microseconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """What the table of the row's GPU holds."""
        family = next(name for name, kind in FAMILIES.items() if isinstance(self.tile, kind))
        key = {**self.key._asdict(), "problem": asdict(self.key.problem)}
        tile = {"family": family, **asdict(self.tile)}
        named = {name: value for name, value in key.items() if name not in ("gpu", "arch")}
        return {**named, "tile": tile, "winner": self.winner, "microseconds": self.microseconds}

    @classmethod
    def from_dict(cls, gpu: str, arch: int, data: Mapping[str, Any]) -> TableRow:
        """Raises KeyError, TypeError or ValueError for what no row of this version says."""
        problem: ConvProblem = _whole(ConvProblem, data["problem"])
        key = Key(gpu, arch, data["operation"], data["epilogue"], data["dtype"], data["layout"], problem)
        if data["winner"] not in ("kernels", "library") or problem.N < 1:
            raise ValueError(f"winner is {data['winner']!r}, and the batch {problem.N}")
        tile = dict(data["tile"])
        times = {str(name): float(time) for name, time in data["microseconds"].items()}
        return cls(key, _whole(FAMILIES[tile.pop("family")], tile), data["winner"], times)


def _whole(kind: type, numbers: Mapping[str, Any]) -> Any:
    """An instance of a dataclass of integers, all of them given, none below zero."""
    if set(numbers) != {field.name for field in fields(kind)}:
        raise ValueError(f"{kind.__name__} has other fields than {', '.join(numbers)}")
    if not all(type(n) is int and n >= 0 for n in numbers.values()):
        raise TypeError(f"{kind.__name__} takes integers that are not negative")
    return kind(**numbers)


# ----------------------------------------------------------------------------------------------------------------------
# Looking up

Table = dict[Key, list[TableRow]]  # by key, but for the batch

# Whether the library may serve any call; as long as no table has been read, nobody knows.
library = True
_tables: tuple[Table, Table] | None = None  # the user's, and what comes with cnnfast
_reading = threading.Lock()


def find(key: Key) -> TableRow | None:
    """The row that serves a convolution, if it was measured: of the nearest batch, the smaller of two as near."""
    for table in _read():
        near = [row for row in table.get(key.but_for_batch, ()) if _apart(row, key.problem.N) <= FARTHEST_BATCH]
        if near:
            return min(near, key=lambda row: (_apart(row, key.problem.N), row.key.problem.N))
    return None


def _apart(row: TableRow, N: int) -> float:
    """How many times as large or as small as a batch of N images the one is that was measured."""
    return max(row.key.problem.N, N) / min(row.key.problem.N, N) if N else inf


def was_measured(gpu: str, arch: int, problem: ConvProblem) -> bool:
    """Whether a row for a GPU is of a convolution's forward pass, in any dtype and layout, at a batch from which it may
    serve `problem`.
    """
    near = (
        row.key
        for table in _read()
        for rows in table.values()
        for row in rows
        if _apart(row, problem.N) <= FARTHEST_BATCH
    )
    return any(
        (k.gpu, k.arch, k.operation) == (gpu, arch, "fprop") and replace(k.problem, N=problem.N) == problem
        for k in near
    )


def forget() -> None:
    """Tables are read again when next asked for. Plans hold what they said before: see launch.forget_plans."""
    global _tables, library
    with _reading:
        _tables, library = None, True


def _read() -> tuple[Table, Table]:
    global _tables, library
    with _reading:
        if _tables is None:
            _tables = (_folder(user_folder(), "*.json"), _folder(SHIPPED, "*/*.json"))
            library = any(row.winner == "library" for table in _tables for rows in table.values() for row in rows)
        return _tables


def _folder(folder: Path, pattern: str) -> Table:
    """All tables of a folder, which need not exist."""
    table: Table = {}
    try:
        files = sorted(folder.glob(pattern))
    except OSError as error:
        _warn(f"the tables in {folder} cannot be read: {error}")
        files = []
    for file in files:
        for row in read(file):
            table.setdefault(row.key.but_for_batch, []).append(row)
    return table


# ----------------------------------------------------------------------------------------------------------------------
# Files


def user_folder() -> Path:
    """Where the user's tables lie; it need not exist."""
    try:
        import platformdirs
    except ModuleNotFoundError:  # cnnfast runs from a checkout, without what an installation brings
        return Path.home() / ".cache" / "cnnfast" / "tables"
    return platformdirs.user_cache_path("cnnfast") / "tables"


def slug(gpu: str, arch: int) -> str:
    """A GPU's name as files and folders have it: nvidia-h200-sm_90."""
    return re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-") + f"-sm_{arch}"


def user_file(gpu: str, arch: int) -> Path:
    return user_folder() / f"{slug(gpu, arch)}.json"


def read(file: Path) -> list[TableRow]:
    """The rows of a table. Of what is no table of this version, none or only those that can be understood, with a
    warning.
    """
    try:
        data = json.loads(file.read_text())
        made_by = data["format"], data["cnnfast"]
        gpu, arch, entries = data["gpu"], data["arch"], list(data["rows"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        _warn(f"{file} is not used: {type(error).__name__}: {error}; cnnfast tune writes a new one")
        return []
    if made_by != (FORMAT, __version__):
        _warn(f"{file} is not used: cnnfast {made_by[1]} wrote it, and this is {__version__}; run cnnfast tune again")
        return []
    rows: list[TableRow] = []
    wrong: list[str] = []
    for entry in entries:
        try:
            rows.append(TableRow.from_dict(gpu, arch, entry))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
    if wrong:
        _warn(f"{len(wrong)} of {len(entries)} rows of {file} are not used: {wrong[0]}; run cnnfast tune again")
    return rows


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def writable() -> None:
    """Makes the user's folder. Raises OSError, saying which it is, if a table could not be written there."""
    folder = user_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"the user's tables cannot be written to {folder}: {error.strerror or error}") from error


def refuse_foreign(file: Path, gpu: str, arch: int) -> None:
    """Raises ValueError if rows of a GPU cannot be added to a file: it is there, and is no table of that GPU and this
    version; OSError, saying which it is, if it could not be written.
    """
    try:
        if file.exists():
            data = json.loads(file.read_text())
            made_by = data["format"], data["cnnfast"], data["gpu"], data["arch"]
            if made_by != (FORMAT, __version__, gpu, arch):
                raise ValueError(
                    f"{file} holds rows of {made_by[2]} by cnnfast {made_by[1]}, and these would be of {gpu} by {__version__}"
                )
        tempfile.TemporaryFile(dir=file.parent).close()
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
        raise ValueError(f"{file} is there, and is no table of cnnfast") from None
    except OSError as error:
        raise OSError(f"a table cannot be written to {file}: {error.strerror or error}") from error


def write(gpu: str, arch: int, rows: Iterable[TableRow], about: Mapping[str, str], file: Path | None = None) -> Path:
    """Adds rows to the user's table of a GPU, or to another file, in the place of those of the same key, and returns
    its path.

    about: what else the file shall say of the run (driver, versions): for people, nobody reads it. Whoever reads the
    file meanwhile, or after this process was killed, finds the old or the new one; of processes that write at the same
    time none loses the other's rows. Raises OSError as `writable` does.
    """
    if file is None:
        writable()
        file = user_file(gpu, arch)
    with _alone(file):
        merged = {row.key: row.to_dict() for row in (*(read(file) if file.exists() else ()), *rows)}
        head = json.dumps({"format": FORMAT, "cnnfast": __version__, "gpu": gpu, "arch": arch, **about}, indent=1)
        lines = ",\n  ".join(json.dumps(row) for row in merged.values())
        # Always the same name: what a killed process left there is overwritten by the next one.
        fresh = file.with_name(f"{file.name}.fresh")
        fresh.write_text(f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
        fresh.replace(file)
    forget()
    return file


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Waits until no other process, or thread, writes the file. Its lock is a file beside it, which is gone when nobody
    writes.
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
            if not current:  # whoever held it has removed it: what was waited for is no longer the lock
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
