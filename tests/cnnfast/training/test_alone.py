"""Two trainings in one folder: the second is refused, and what a killed one has left keeps nobody out."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnfast.training import Module, alone
from cnnfast.training.alone import LOCK, alone_in
from tests.support.trainable import small_fit, weights

fcntl = pytest.importorskip("fcntl")
PROCESSES = multiprocessing.get_context("fork")  # what is imported here need not be imported by each


class WaitsToBeKilled(Module):
    """In the second batch of the second epoch, when it makes a file `waits` beside the run's folder."""

    folder = Path()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if (self.current_epoch, batch_idx) == (1, 1):
            (self.folder.parent / "waits").touch()
            time.sleep(600)
        return super().training_step(batch, batch_idx)


def until(there: Callable[[], bool]) -> None:
    ends = time.monotonic() + 120
    while not there():
        assert time.monotonic() < ends
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def train_and_wait(folder: Path) -> None:
    os.close(2)
    torch.set_num_threads(1)
    WaitsToBeKilled.folder = folder
    small_fit(out=folder, module=WaitsToBeKilled)


def test_a_second_training_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "run"
    first = PROCESSES.Process(target=train_and_wait, args=(folder,))
    first.start()
    try:
        until((tmp_path / "waits").exists)
        before = contents(folder)
        with pytest.raises(ValueError, match=rf"^process {first.pid} on .* trains in {folder} now: wait until it ends"):
            small_fit(out=folder, resume=True)
        assert contents(folder) == before
    finally:
        os.kill(first.pid or 0, signal.SIGKILL)
        first.join()
    small_fit(out=folder, resume=True)
    small_fit(out=tmp_path / "whole")
    resumed, whole = weights(folder), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], t) for name, t in whole.items())
    assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}


def holds(folder: Path, told: Any) -> None:
    """Holds the folder, and has a child, as one that reads images."""
    context = alone_in(folder)
    context.__enter__()
    child = os.fork()
    if not child:
        time.sleep(600)
    told.send(child)
    time.sleep(600)


def test_children_of_a_killed_training_hold_nothing(tmp_path):
    ours, theirs = PROCESSES.Pipe()
    first = PROCESSES.Process(target=holds, args=(tmp_path, theirs))
    first.start()
    child = ours.recv()
    try:
        with pytest.raises(ValueError, match="trains in"), alone_in(tmp_path):
            pass
        os.kill(first.pid or 0, signal.SIGKILL)
        first.join()
        os.kill(child, 0)  # it lives
        with alone_in(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    assert not [*tmp_path.iterdir()]


def test_one_process_does_not_train_twice_in_a_folder(tmp_path):
    with alone_in(tmp_path / "run"):
        with pytest.raises(ValueError, match="this process trains in"), alone_in(tmp_path / "a" / ".." / "run"):
            pass
        with alone_in(tmp_path / "other"):
            pass
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    with alone_in(tmp_path / "run"):
        pass


def test_folders_without_files_are_removed(tmp_path):
    with alone_in(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "file").touch()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with alone_in(tmp_path / "empty" / "run"):
        pass
    assert [*(tmp_path / "empty").iterdir()] == []


def test_a_lock_whose_file_was_removed_is_none(tmp_path, monkeypatch):
    """The other training ended between the opening of the file and its locking."""
    lockf, locked = fcntl.lockf, []

    def lock(descriptor: int, operation: int) -> None:
        if not locked:
            (tmp_path / LOCK).unlink()
        locked.append(descriptor)
        lockf(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", lock)
    with alone_in(tmp_path):
        assert len(locked) == 2
        assert (tmp_path / LOCK).exists()


def test_where_there_are_no_locks_training_begins(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with alone_in(tmp_path):
        pass
    monkeypatch.setattr(alone, "fcntl", None)
    with alone_in(tmp_path):
        assert not [*tmp_path.iterdir()]
    assert not [*tmp_path.iterdir()]
