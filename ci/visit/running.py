"""Commands run to their limits: each in a process group of its own, with its log, and ended gently, then not."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, LATE, INTERRUPTED, SKIPPED = "passed", "failed", "out of time", "interrupted", "not begun"
GRACE = 6.0  # seconds before its limit that a command is asked to end
POLL = 0.05  # seconds between two looks at what runs
CORES = 16  # that a visit counts with, and that are used at most
# in a command's arguments: whole seconds that it may use itself, and processes
SECONDS, WORKERS = "{seconds}", "{workers}"
OVERHEAD = 5.0  # of these seconds, what a command needs to start and to write its last line


@dataclass(frozen=True)
class StageVerdict:
    """What became of a command: a state, and a note for the reader. `bad`: whether the visit found something wrong by
    it.
    """

    state: str
    note: str = ""
    bad: bool = False


def by_exit_code(code: int, log: Path) -> StageVerdict:
    """0 is right. A note names the signal that ended the process, if one did."""
    if code == 0:
        return StageVerdict(PASSED)
    said = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return StageVerdict(FAILED, said, True)


@dataclass(frozen=True)
class StageCommand:
    """`name` is its log's. limit: seconds, if they are fewer than its stage has. needs: the names of commands that must
    have passed before. judge: tells from the exit code and the log what became of it, unless its time was up. clue:
    what the log tells of where it was, if it did not pass. matters: whether being out of time is a fault, or only
    leaves a question open.
    """

    name: str
    argv: tuple[str, ...]
    limit: float = inf
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    judge: Callable[[int, Path], StageVerdict] = by_exit_code
    clue: Callable[[Path], str] = lambda log: ""
    matters: bool = True


@dataclass(frozen=True)
class Stage:
    """Commands of which `jobs` run at a time. limit: seconds for all of them; what an earlier stage leaves of its own
    comes on top.
    """

    commands: tuple[StageCommand, ...]
    limit: float
    jobs: int = 1


@dataclass
class Ran:
    """What became of a command. seconds: that it ran."""

    name: str
    state: str
    seconds: float = 0.0
    note: str = ""
    bad: bool = False


class Stop:
    """Whether somebody wants the visit to end: SIGINT or SIGTERM came, `count` of them."""

    def __init__(self) -> None:
        self.count = 0

    def __bool__(self) -> bool:
        return self.count > 0

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        def note(number: int, frame: Any) -> None:
            self.count += 1

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Process:
    """A command that runs. Its output goes to `log` as it is written."""

    def __init__(
        self, command: StageCommand, log: Path, environment: Mapping[str, str], end: float, grace: float
    ) -> None:
        self.command, self.log, self.begun = command, log, time.monotonic()
        self.grace = min(grace, (end - self.begun) / 4)
        self.ask = end - self.grace  # when it is asked to end
        self.why = ""
        self.sent: list[float] = []  # when each signal was sent
        own = max(1, int(self.ask - self.begun - min(OVERHEAD, (self.ask - self.begun) / 4)))
        argv = [word.replace(SECONDS, str(own)).replace(WORKERS, str(workers())) for word in command.argv]
        with log.open("wb") as output:
            output.write(f"$ {' '.join(argv)}\n".encode())
            output.flush()
            self.popen = subprocess.Popen(
                argv,
                cwd=ROOT,
                env={**environment, **command.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def tell(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def press(self, why: str, now: float, at_once: bool) -> None:
        """Asks once more, harder each time: SIGINT at first, SIGTERM after half of the grace, SIGKILL after nine tenths
        of it.
        """
        self.why = self.why or why
        since = now - self.sent[0] if self.sent else 0.0
        step = 2 if at_once or since > 0.9 * self.grace else 1 if since > 0.5 * self.grace else 0
        if step >= len(self.sent):
            self.sent.append(now)
            self.tell((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[step])

    def ended(self) -> Ran | None:
        """What became of the command, once its first process is gone; the rest of its group is ended then."""
        code = self.popen.poll()
        if code is None:
            return None
        self.tell(signal.SIGKILL)
        seconds = time.monotonic() - self.begun
        if self.why == LATE:
            how = "which ended it" if len(self.sent) == 1 else "and it did not end by SIGINT"
            verdict = StageVerdict(
                LATE, f"asked to end after {self.ask - self.begun:.0f} s, {how}", self.command.matters
            )
        else:
            verdict = StageVerdict(self.why) if self.why else self.command.judge(code, self.log)
        clue = "" if verdict.state == PASSED else self.command.clue(self.log)
        return Ran(
            self.command.name, verdict.state, seconds, "; ".join(filter(None, (verdict.note, clue))), verdict.bad
        )


def workers() -> int:
    """Processes that may be busy at a time: one a core."""
    return min(os.cpu_count() or 1, CORES)


def end_with_parent() -> None:
    """In the new process: should the visit itself be killed, this one gets SIGINT, and ends too."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGINT)


def run(
    stage: Stage,
    folder: Path,
    environment: Mapping[str, str],
    end: float,
    stop: Stop,
    before: Sequence[Ran] = (),
    tick: Callable[[Sequence[Ran]], None] = lambda ran: None,
    grace: float = GRACE,
) -> list[Ran]:
    """Runs a stage's commands; all of them are in the result, in the order in which they ended.

    folder: where their logs go, NAME.log. environment: of all of them, beside each one's own. end: when the stage must
    be over, by time.monotonic(). before: what ran in earlier stages. tick: called again and again with what has ended
    so far.
    """
    waiting, running, ran = list(stage.commands), list[Process](), list[Ran]()
    try:
        while waiting or running:
            now = time.monotonic()
            while waiting and (stop or now >= end or len(running) < stage.jobs):
                command = waiting.pop(0)
                if note := why_not(command, [*before, *ran], stop, now >= end):
                    ran.append(Ran(command.name, SKIPPED, note=note))
                    continue
                running.append(
                    Process(command, folder / f"{command.name}.log", environment, min(end, now + command.limit), grace)
                )
            for process in list(running):
                if (found := process.ended()) is not None:
                    running.remove(process)
                    ran.append(found)
                elif stop:
                    process.press(INTERRUPTED, now, at_once=stop.count > 1)
                elif now >= process.ask:
                    process.press(LATE, now, at_once=False)
            tick(ran)
            if running:
                time.sleep(POLL)
    finally:
        for process in running:  # none, unless something was raised here
            process.tell(signal.SIGKILL)
    return ran


def why_not(command: StageCommand, ran: Sequence[Ran], stop: Stop, late: bool) -> str:
    """Why a command is not begun; "" if it is."""
    if stop:
        return "the visit was interrupted"
    if late:
        return "no time was left for it"
    if missing := set(command.needs) - {r.name for r in ran if r.state == PASSED}:
        return f"{', '.join(sorted(missing))} did not pass"
    return "" if shutil.which(command.argv[0]) else f"{command.argv[0]} is not installed"
