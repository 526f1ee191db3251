"""Tables of measured tiles: which kernel serves a convolution on a GPU, or whether the library's is faster there.

A table (table_files.py) is for one GPU, with one row (table_rows.py) for each convolution that was measured and checked
on it, and one for each residual block in training. The user's tables lie in the platform's cache folder, where `cnnfast
tune` writes them row by row. Those that come with cnnfast lie in tables/ beside this file, in a folder for each GPU,
and say in their heads what they were measured with; `cnnfast tune --table` writes such a file. The user's rows go
before them; where there is none, the defaults in code run.

A row serves a convolution that agrees with it in everything but the batch: GPU, operation, epilogue, dtype, layout,
channels, image, filters, strides, padding. A block's serves a block of the same convolutions. Another batch only makes
more or fewer tiles: the row of the nearest one is taken, up to FARTHEST_BATCH times as large or as small. Another image
also changes how tiles fit it, and has to be measured.

Tables of another version of cnnfast are not used: its kernels were others. Nothing here is asked twice for one
convolution, because plans keep the answer (launch.planned).
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path

from .problem import ConvProblem
from .table_files import FORMAT as FORMAT
from .table_files import merge, read, warn
from .table_files import refuse_foreign as refuse_foreign
from .table_rows import AnyRow as AnyRow
from .table_rows import BlockKey as BlockKey
from .table_rows import BlockRow as BlockRow
from .table_rows import Key, TableRow

FARTHEST_BATCH = 2
SHIPPED = Path(__file__).parent / "tables"

Table = dict[Key | BlockKey, list[AnyRow]]  # by key, but for the batch

# ----------------------------------------------------------------------------------------------------------------------
# Looking up

_tables: tuple[Table, Table] | None = None  # the user's, and what comes with cnnfast
_reading = threading.Lock()


def find(key: Key) -> TableRow | None:
    """The row that serves a convolution, if it was measured: that of the nearest batch, or of the smaller one of two
    that are equally near.
    """
    row = _nearest(key)
    assert not isinstance(row, BlockRow)
    return row


def find_block(key: BlockKey) -> BlockRow | None:
    """The same of a residual block."""
    row = _nearest(key)
    assert not isinstance(row, TableRow)
    return row


def _nearest(key: Key | BlockKey) -> AnyRow | None:
    for table in _read():
        near = [row for row in table.get(key.but_for_batch, ()) if _apart(row, key.batch) <= FARTHEST_BATCH]
        if near:
            return min(near, key=lambda row: (_apart(row, key.batch), row.key.batch))
    return None


def _apart(row: AnyRow, N: int) -> float:
    """How many times as large, or as small, the measured batch is as one of N images."""
    return max(row.key.batch, N) / min(row.key.batch, N) if N else inf


def was_measured(gpu: str, arch: int, problem: ConvProblem) -> bool:
    """Whether a GPU has a row for the forward pass of a convolution, in any dtype and layout, and at a batch near
    enough to serve `problem`.
    """
    near = (
        row.key
        for table in _read()
        for rows in table.values()
        for row in rows
        if isinstance(row, TableRow) and _apart(row, problem.N) <= FARTHEST_BATCH
    )
    return any(
        (k.gpu, k.arch, k.operation) == (gpu, arch, "fprop") and replace(k.problem, N=problem.N) == problem
        for k in near
    )


def forget() -> None:
    """Tables are read again when next asked for. Plans hold what they said before: see launch.forget_plans."""
    global _tables
    with _reading:
        _tables = None


def _read() -> tuple[Table, Table]:
    global _tables
    with _reading:
        if _tables is None:
            _tables = (_folder(user_folder(), "*.json"), _folder(SHIPPED, "*/*.json"))
        return _tables


def _folder(folder: Path, pattern: str) -> Table:
    """All tables of a folder, which need not exist."""
    table: Table = {}
    try:
        files = sorted(folder.glob(pattern))
    except OSError as error:
        warn(f"the tables in {folder} cannot be read: {error}")
        files = []
    for file in files:
        for row in read(file):
            table.setdefault(row.key.but_for_batch, []).append(row)
    return table


# ----------------------------------------------------------------------------------------------------------------------
# The user's tables


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


def writable() -> None:
    """Makes the user's folder. Raises OSError, naming the folder, if a table could not be written there."""
    folder = user_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"the user's tables cannot be written to {folder}: {error.strerror or error}") from error


def write(gpu: str, arch: int, rows: Iterable[AnyRow], about: Mapping[str, str], file: Path | None = None) -> Path:
    """Adds rows to the user's table of a GPU, or to another file, as table_files.merge does, and returns its path.

    Raises OSError as `writable` does.
    """
    if file is None:
        writable()
        file = user_file(gpu, arch)
    merge(file, gpu, arch, rows, about)
    forget()
    return file
