"""Files that are replaced as a whole: whenever the writer is killed, and whatever fails."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from cnnfast.engine.storage import replacing
from cnnfast.engine.storage.replacing import replace
from tests.support.child import run_compiled


def test_a_new_file_has_the_permissions_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        replace(tmp_path / "new", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["new"]


def test_what_was_there_keeps_its_permissions_and_a_link_stays_one(tmp_path):
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_bytes(b"old")
    there.chmod(0o600)
    link.symlink_to(there)
    replace(link, bytearray(b"new"))
    assert (there.read_bytes(), stat.S_IMODE(there.stat().st_mode)) == (b"new", 0o600)
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


def test_who_reads_the_old_file_goes_on_reading_it(tmp_path):
    path = tmp_path / "file"
    replace(path, b"old")
    with path.open("rb") as opened:
        replace(path, b"new")
        assert opened.read() == b"old"


def test_where_nothing_can_be_written(tmp_path):
    missing = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError, match=rf"{missing} cannot be written: there is no folder {missing.parent}"):
        replace(missing, b"")
    with pytest.raises(IsADirectoryError, match=rf"{tmp_path} cannot be written: it is a folder"):
        replace(tmp_path, b"")
    with pytest.raises(OSError, match="/dev/full cannot be written: it is not a regular file"):
        replace(Path("/dev/full"), b"")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"there is no folder .*file"):
        replace(tmp_path / "file" / "below", b"")


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, OSError, "No space left on device"),
        (errno.EACCES, PermissionError, "Permission denied"),
        (errno.EROFS, OSError, "Read-only file system"),
    ],
)
def test_what_the_system_refuses_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, number, kind, words):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(replacing.os, "fsync", refuse)
    with pytest.raises(kind, match=f"{path} cannot be written: {words}") as raised:
        replace(path, b"new")
    assert raised.value.errno == number
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_who_interrupts_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(replacing.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_it_reaches_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(replacing.os, "fsync", lambda descriptor: events.append("fsync"))
    renamed = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: events.append("rename") or renamed(self, target))
    replace(tmp_path / "file", b"content")
    assert events == ["fsync", "rename", "fsync"]  # the last one is of the folder


def test_several_that_write_one_file_wait_for_one_another(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 10**6 for i in range(8)]
    threads = [threading.Thread(target=replace, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


def killed_writers(folder: str, random_kills: int) -> dict:
    """In a process that has imported everything, and whose children write until they are killed."""
    import os
    import random
    import signal
    import time
    from pathlib import Path
    from typing import Any

    import torch

    from cnnfast.engine.storage import file, replacing
    from tests.support.frozen_networks import residual_network

    torch.set_num_threads(1)
    path = Path(folder) / "network.cnnfast"
    contents, networks = [], []
    for seed in range(2):
        network = residual_network(seed)
        network.graph.constants["much"] = torch.full((2**17,), float(seed))  # so that writing takes a while
        file.write(network, path)
        networks.append(network)
        contents.append(path.read_bytes())

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def child(work: Any) -> int:
        """Runs until it is killed."""
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(7)
        return pid

    def ended(pid: int) -> None:
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        found = path.read_bytes()
        assert found in contents, "neither the old file nor the new one"
        file.read(path)
        assert set(os.listdir(folder)) <= {path.name, f"{path.name}.fresh", f"{path.name}.lock"}, os.listdir(folder)
        seen.append(contents.index(found))

    seen: list[int] = []
    choose = random.Random(0)
    for turn in range(random_kills):

        def work(turn: int = turn) -> None:
            while True:
                turn += 1
                replacing.replace(path, contents[turn % 2])

        pid = child(work)
        time.sleep(choose.uniform(0, 0.04))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    randomly = [seen.count(0), seen.count(1)]

    def half(fresh: Path, content: bytes) -> None:
        with fresh.open("wb") as opened:
            opened.write(content[: len(content) // 2])
            opened.flush()
            kill()

    renamed = Path.replace

    def after(self, target) -> None:
        renamed(self, target)
        kill()

    stages = {
        "in the middle": (replacing, "_write", half),
        "before it is on the disk": (replacing.os, "fsync", lambda descriptor: kill()),
        "before it is renamed": (Path, "replace", lambda self, target: kill()),
        "after it was renamed": (Path, "replace", after),
        "before the folder is on the disk": (replacing, "_keep", lambda folder: kill()),
    }
    found = {}
    for stage, (where, name, stand_in) in stages.items():
        replacing.replace(path, contents[0])

        def work(where: Any = where, name: str = name, stand_in: Any = stand_in) -> None:
            setattr(where, name, stand_in)
            file.write(networks[1], path)

        ended(child(work))
        found[stage] = ["old", "new"][seen[-1]]
    file.write(networks[0], path)
    return {"randomly": randomly, "stages": found, "left": os.listdir(folder)}


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    """kill -9, at fifty moments, and at each stage; the next one that writes clears away what is left."""
    found = run_compiled(killed_writers, str(tmp_path), 50)
    assert min(found["randomly"]) > 0
    assert sum(found["randomly"]) == 50
    assert found["stages"] == {
        "in the middle": "old",
        "before it is on the disk": "old",
        "before it is renamed": "old",
        "after it was renamed": "new",
        "before the folder is on the disk": "new",
    }
    assert found["left"] == ["network.cnnfast"]


def written_beyond_the_limit(folder: str) -> list:
    """With a limit on the size of files, as a full disk sets one."""
    import os
    import resource
    from pathlib import Path

    from cnnfast.engine.storage.replacing import replace

    path = Path(folder) / "file"
    replace(path, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
    try:
        replace(path, bytes(10**6))
    except OSError as error:
        return [str(error), path.read_bytes().decode(), os.listdir(folder)]
    return []


def test_a_file_that_finds_no_room_is_not_left_behind(tmp_path):
    message, content, left = run_compiled(written_beyond_the_limit, str(tmp_path))
    assert f"{tmp_path}/file cannot be written: File too large" in message
    assert (content, left) == ("old", ["file"])
