"""Visits of made-up parts, in a process of their own: what ci/visit runs, without a GPU and in seconds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.support.child import REPOSITORY, environment

MOST_FILES = 8

DRIVER = """
import json, sys
from pathlib import Path
from ci.visit import visiting
from ci.visit.parts import Part
from ci.visit.running import Stage, StageCommand

visiting.EVERY = 0.2
parts, out, budget, grace = json.loads(sys.argv[1])


def part(work, name, code, limit):
    command = StageCommand(name, (sys.executable, "-c", code.replace("WORK", str(work / name))))
    return Part(name, "a made-up part", (Stage((command,), limit),), (f"{name}.json",))


def made(work):
    return [part(work, *told) for told in parts]


machine = {"device": "a made-up GPU", "commit": "abc"}
raise SystemExit(visiting.visit(made, Path(out), machine, {}, budget=budget, grace=grace))
"""


@dataclass(frozen=True)
class Fake:
    """A part that runs Python `code`, in which WORK is its folder."""

    name: str
    code: str = "print('it ran')"
    limit: float = 30.0


def start(fakes: Sequence[Fake], out: Path, budget: float = 60.0, grace: float = 1.0) -> subprocess.Popen[str]:
    told = json.dumps([[(fake.name, fake.code, fake.limit) for fake in fakes], str(out), budget, grace])
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, told],
        cwd=REPOSITORY,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(stream: IO[str] | None, words: str) -> None:
    """Reads lines until one has these words."""
    assert stream is not None
    for line in stream:
        if words in line:
            return
    raise AssertionError(f"nothing said {words!r}")


def run(fakes: Sequence[Fake], out: Path, **how: float) -> tuple[int, str]:
    """Exit code and output of a whole visit."""
    process = start(fakes, out, **how)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def interrupt(fakes: Sequence[Fake], out: Path, words: str, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
    """The same of a visit that gets a signal once it has said `words`."""
    process = start(fakes, out)
    wait_for(process.stdout, words)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for it; fails if it takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.05)


@dataclass(frozen=True)
class Left:
    """What lies in the folder of a visit: the names of its files, the summary, the archive's members, states by
    part.
    """

    files: set[str]
    summary: str
    members: dict[str, str]
    states: dict[str, str]


def states(out: Path) -> dict[str, str]:
    """Of the parts, as far as anything was left yet."""
    return left(out).states if (out / "visit.tar.gz").exists() and (out / "summary.md").exists() else {}


def log(out: Path, part: str) -> str:
    """What the archive holds of a part's log so far."""
    return left(out).members.get(f"{part}/{part}.log", "") if states(out) else ""


def left(out: Path) -> Left:
    """Fails if there are more files than a visit may leave."""
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert len(files) <= MOST_FILES
    with tarfile.open(out / "visit.tar.gz") as tar:
        members = {name: tar.extractfile(name).read().decode() for name in tar.getnames()}  # type: ignore[union-attr]
    states = {outcome["part"]: outcome["state"] for outcome in json.loads(members["visit.json"])}
    return Left(files, (out / "summary.md").read_text(), members, states)
