"""A run's folder is one training's at a time."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

LOCK = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)  # what a system says where another process holds a lock
_own: set[Path] = set()  # a lock is a process's, and does not keep two of its threads apart


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else trains in `folder` while the context lasts. It is made, with those above it, if it is not there;
    those that were made here, and are empty at the end, are removed.

    A file in the folder, .lock, is locked, and removed at the end. The lock ends with its process, whatever ends that,
    and holds between machines too. Windows and some file systems have no such locks: there nothing keeps two trainings
    apart.

    Raises ValueError, and changes nothing, where another training is in the folder; OSError where it cannot be written.
    """
    new = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder):
            yield
    finally:
        for made in new:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    place, file = folder.resolve(), folder / LOCK
    if place in _own:
        raise _is_held(folder, "this process")
    descriptor = None if fcntl is None else _descriptor(file)
    _own.add(place)
    try:
        yield
    finally:
        _own.discard(place)
        if descriptor is not None:
            file.unlink(missing_ok=True)
            os.close(descriptor)


def _descriptor(file: Path) -> int:
    """Of a file that is locked, by a lock that is a process's own: those that read images for it do not inherit it, and
    so cannot hold it when it is killed.
    """
    assert fcntl is not None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in HELD:
                return descriptor
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            raise _is_held(file.parent, holder or "another process") from None
        if os.fstat(descriptor).st_nlink:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # its file was removed, by who held it, after it was opened


def _is_held(folder: Path, holder: str) -> ValueError:
    return ValueError(f"{holder} trains in {folder} now: wait until it ends, or write another folder")
