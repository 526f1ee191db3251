"""Whether Triton can compile and launch here: its C compiler, and kernels that a child process really launches."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import build

from cnnfast_kernels import launchable

from .. import children
from . import trial
from .finding import Command, Finding, in_a_line

TOPIC = "Triton"
CHILD = "cnnfast.diagnosing.trial"
LIMIT = 120.0  # seconds for the child, which imports torch, starts CUDA and cuDNN, and compiles three small kernels
PATIENCE = 5.0  # seconds that a killed child gets to end: one that waits for a hanging driver never does
PROBE = "#include <Python.h>\nint cnnfast_probe(void) { return 0; }\n"

MEANWHILE = 'Until that is mended, cnnfast.backend("torch") lets PyTorch serve.'


class Trial(NamedTuple):
    """What a child process found out. ended: what it was doing and what happened, if it did not end by itself."""

    outcomes: list[trial.Outcome]
    ended: str = ""

    @property
    def launches(self) -> bool:
        """Whether Triton launches: the smallest kernel ran on every GPU that was tried. Others may be wrong."""
        failed = any(o.wrong for o in self.outcomes if o.step in trial.LAUNCHING)
        return bool(self.outcomes) and not self.ended and not failed


# ----------------------------------------------------------------------------------------------------------------------
# The compiler


def compiler(beside_a_gpu: bool) -> Finding:
    """The C compiler and Python.h, with which Triton builds its driver and launchers: tried with the smallest library.

    If that fails it is a note: launchers that are in Triton's cache may still work, and trying to launch tells that.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cnnfast-") as folder, _quiet() as said:
        source = Path(folder, "probe.c")
        source.write_text(PROBE)
        try:
            build._build("cnnfast_probe", str(source), folder, [], [], [], [])
        except Exception as error:  # every launcher would fail in the same way
            wrong = launchable.reason(error)
        else:
            text = f"Triton's C compiler builds against Python.h, in {time.perf_counter() - started:.1f} s."
            return Finding(TOPIC, "C compiler", "ok", text)
    first = next(filter(None, map(str.strip, said)), "")
    text = f"Triton cannot build its launchers: {wrong}." + (f" The compiler said: {in_a_line(first)}" if first else "")
    needed = "Only what Triton's cache holds already can be launched."
    advice = needed if beside_a_gpu else "Without a GPU nothing needs them."
    return Finding(TOPIC, "C compiler", "note", text, advice)


def cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    return Path(knobs.cache.dir)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keeps standard error of this process and its children off the terminal: its lines are in the list afterwards."""
    lines: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().splitlines()


# ----------------------------------------------------------------------------------------------------------------------
# The child


def tried(
    devices: Sequence[torch.device], tell: Callable[[str], None] = lambda step: None, limit: float | None = None
) -> Trial:
    """Has a child process launch kernels on GPUs, and ends it after `limit` seconds, LIMIT by default. tell: called
    with each step.
    """
    limit = LIMIT if limit is None else limit
    arguments = [str(limit + PATIENCE), *map(str, devices)]
    with tempfile.TemporaryDirectory(prefix="cnnfast-") as folder:
        # Files, because a pipe ends only when every process that holds it does, compilers that the child started too.
        # They are opened again to be read: reading by a shared handle would move the place at which the child writes.
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        with output.open("w") as stdout, errors.open("w") as stderr:
            streams: dict[str, Any] = {"stdout": stdout, "stderr": stderr}
            child = children.start(
                CHILD, *arguments, environment={"PYTHONFAULTHANDLER": "1"}, start_new_session=True, **streams
            )
        deadline, doing = time.monotonic() + limit, ""
        try:
            while child.poll() is None and time.monotonic() < deadline:
                _, now = _read(output)
                if now != doing:
                    doing = now
                    tell(doing)
                time.sleep(0.05)
        finally:
            in_time = child.poll() is not None
            _end(child)
        outcomes, doing = _read(output)
        return Trial(
            outcomes, _ending(child.returncode if in_time else None, doing, errors.read_text(errors="replace"), limit)
        )


def here(device: torch.device) -> Trial:
    """The same in this process, for kernels that are interpreted: nothing can hang or crash there."""
    return Trial(list(trial.run([device])))


def _read(output: Path) -> tuple[list[trial.Outcome], str]:
    """What the child has found so far, and what it is doing; "starting" before its first step, "" after its last."""
    whole = (line for line in output.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n"))
    lines = [line for line in whole if line.startswith(trial.MARK)]
    found = [json.loads(line.removeprefix(trial.MARK)) for line in lines]
    outcomes = [trial.Outcome(**record) for record in found if "wrong" in record]
    if not found:
        return [], "starting"
    return outcomes, "" if "wrong" in found[-1] else f"{found[-1]['step']} on {found[-1]['device']}"


def _end(child: subprocess.Popen[Any]) -> None:
    """Kills the child, if it still runs, and what it has started."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.kill()
        with suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)


def _ending(code: int | None, doing: str, errors: str, limit: float) -> str:
    """How the child ended, "" if as it should. code: its exit code, or None if it had to be killed."""
    where = f"at {doing}" if doing else "after its last step"
    if code is None:
        return f"it hung {where}, and was killed after {limit:g} s"
    if code < 0:
        return f"it crashed {where}, by {_name(-code)}{_last(errors)}"
    if code:
        return f"it ended with {code} {where}{_last(errors)}"
    return f"it ended {where}" if doing else ""


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last(errors: str) -> str:
    """The most telling line of standard error: the last one of an exception, the place in Python of a crash."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if not lines:
        return ""
    crashed = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    if crashed is None:
        return f": {in_a_line(lines[-1])}"
    place = next((line for line in lines[crashed:] if re.match(r"File .* line \d+ in ", line)), "")
    return f": {in_a_line(f'{lines[crashed]} {place}')}"


# ----------------------------------------------------------------------------------------------------------------------
# What that means


def findings(found: Trial, names: dict[str, str]) -> list[Finding]:
    """What the child found: a finding for each device, and one if it ended early. names: device -> what to call it."""
    told: list[Finding] = []
    for device, name in names.items():
        outcomes = [o for o in found.outcomes if o.device == device]
        wrong = [o for o in outcomes if o.wrong]
        if wrong:
            told += [_broken(o, f"{name} ({device})") for o in wrong]
        elif outcomes and len(outcomes) == len(trial.steps(torch.device(device))):
            seconds = sum(o.seconds for o in outcomes)
            text = f"On {name} kernels launch, and small convolutions are right to the last bit"
            text += f" ({seconds:.1f} s, compilation included)."
            told.append(Finding(TOPIC, f"launch on {device}", "ok", text))
        elif not any(o.fatal for o in found.outcomes) and not found.ended:
            text = f"The process that launches kernels ended before it had tried all on {name}, and did not say why."
            told.append(Finding(TOPIC, f"launch on {device}", "broken", text, MEANWHILE))
    if found.ended:
        text = f"A process that launched kernels did not come through, and yours would not: {found.ended}."
        advice = f"nvidia-smi and dmesg tell of GPUs that fail. {MEANWHILE}"
        told.append(Finding(TOPIC, "launch", "broken", text, advice))
    return told


def _broken(outcome: trial.Outcome, name: str) -> Finding:
    if outcome.step == trial.LAUNCHER:
        text = f"{outcome.wrong}. So PyTorch serves every call on {name}."
        line = _line_for(outcome.wrong)
        return Finding(TOPIC, "launch", "broken", text, "" if line else "Mend what is named there.", line)
    if outcome.step == trial.PYTORCH:
        text = f"PyTorch's own convolution fails on {name}, and with it every network: {outcome.wrong}"
        advice = "Install torch again; if that does not help, the GPU or its driver is at fault."
        return Finding(TOPIC, "launch", "broken", text, advice)
    matters = "fails" if outcome.fatal else "computes wrong numbers, as every kernel of ours may"
    text = f"{outcome.step[0].upper()}{outcome.step[1:]} on {name} {matters}: {outcome.wrong}."
    return Finding(TOPIC, "launch", "broken", text, MEANWHILE)


def _line_for(reason: str) -> Command | None:
    """What mends the commonest reasons, on Debian and Ubuntu."""
    if "Python.h" in reason:
        why = "Python's headers; elsewhere the package has another name, such as python3-devel"
        return Command("sudo apt-get install python3-dev", why)
    if launchable.WHAT_IT_NEEDS in reason and "cache" not in reason:
        why = "a C compiler; elsewhere by another package manager, such as conda install gcc"
        return Command("sudo apt-get install gcc", why)
    return None
