"""Files that are there as a whole or not at all: written aside, in the same folder, and renamed."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from cnnfast_kernels.table_files import alone


def replace(path: Path, content: bytes | bytearray) -> None:
    """Writes a file in the place of whatever was there, with the permissions of what was there, or a new file's.

    A reader finds the old file or the new one, even after this process was killed or the power went. What it leaves
    then are two files beside, `<name>.fresh` and `<name>.lock`, which the next one overwrites and removes. Processes
    that write one file at a time wait for one another. Raises OSError, which names the path and says what is wrong.
    """
    target = path.resolve()  # of a symbolic link: what it leads to is replaced, and it stays
    if target.is_dir():
        raise _error(errno.EISDIR, path, "it is a folder")
    if target.exists() and not target.is_file():
        raise _error(errno.EINVAL, path, "it is not a regular file")
    if not target.parent.is_dir():
        raise _error(errno.ENOENT, path, f"there is no folder {target.parent}")
    fresh = target.with_name(f"{target.name}.fresh")
    try:
        with alone(target):
            try:
                _write(fresh, content)
                if target.exists():
                    fresh.chmod(target.stat().st_mode & 0o7777)
                fresh.replace(target)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise
            _keep(target.parent)
    except OSError as error:
        raise _error(error.errno, path, error.strerror or str(error)) from error


def _write(file: Path, content: bytes | bytearray) -> None:
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _keep(folder: Path) -> None:
    """Has the system put the names of the files of a folder where they outlast a power cut. Windows does not let a
    program open a folder, and some file systems do not do it.
    """
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _error(number: int | None, path: Path, reason: str) -> OSError:
    """Of the class that Python has for the number: FileNotFoundError, PermissionError."""
    return OSError(number or errno.EIO, f"{path} cannot be written: {reason}")
