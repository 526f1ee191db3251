"""What compute-sanitizer reports of a family of kernels, told apart: findings in our kernels, and findings elsewhere.

A finding is blamed on the kernels that its lines name after " at ". Ours are told by their names, which are those of
the package's jit functions; PyTorch's own kernels are run beside them, to fill operands, and what is reported of those
is counted, but is no fault of ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..running import FAILED, PASSED, StageVerdict, by_exit_code

LAUNCHING = "    launching "  # what a process of smoke says before the name of each kernel
PROGRAM = "compute-sanitizer"
# What each tool looks for. Uninitialised memory is found only where outputs were not filled before.
TOOLS = {
    "memcheck": "accesses out of bounds",
    "racecheck": "races in shared memory",
    "initcheck": "reads of memory never written",
}
MARK = "========="
PLACE = re.compile(r"\bat ([A-Za-z_]\w*)")


def last_launched(log: Path) -> str:
    """The kernel that a process of smoke was at when it ended."""
    names = [
        line.removeprefix(LAUNCHING)
        for line in log.read_text(errors="replace").splitlines()
        if line.startswith(LAUNCHING)
    ]
    return f"the last kernel launched was {names[-1]}" if names else "no kernel was launched"


def command(tool: str) -> tuple[str, ...]:
    """The words that run a command under the tool, to be put before it."""
    return PROGRAM, "--tool", tool, "--target-processes", "all", "--print-limit", "20"


def options(tool: str) -> tuple[str, ...]:
    """What a process of smoke is told under a tool: initcheck finds nothing in memory that was filled beforehand."""
    return ("--no-poison",) if tool == "initcheck" else ()


def blocks(text: str) -> Iterable[str]:
    """The reports of the tool: runs of marked lines, each up to one that is empty behind the mark."""
    block: list[str] = []
    for line in text.splitlines():
        said = line.removeprefix(MARK).strip() if line.startswith(MARK) else None
        if said:
            block.append(said)
        elif said == "" and block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def findings(text: str, ours: Iterable[str]) -> tuple[Counter[str], int]:
    """How many findings there are in each of our kernels, and how many elsewhere."""
    known, found, elsewhere = set(ours), Counter[str](), 0
    for block in blocks(text):
        places = set(PLACE.findall(block))
        mine = places & known
        found.update(mine)
        elsewhere += bool(places) and not mine
    return found, elsewhere


def judge(ours: Iterable[str], code: int, log: Path) -> StageVerdict:
    """A finding in a kernel of ours is a fault. That the tool does not work here is none: the family itself has passed
    without it.
    """
    text = log.read_text(errors="replace")
    found, elsewhere = findings(text, ours)
    if found:
        told = ", ".join(f"{count} in {kernel}" for kernel, count in sorted(found.items()))
        return StageVerdict(FAILED, told, True)
    if "ERROR SUMMARY" not in text and "RACECHECK SUMMARY" not in text:
        said = next(
            (line.removeprefix(MARK).strip() for line in text.splitlines() if line.startswith(f"{MARK} Error")), ""
        )
        return StageVerdict(FAILED, f"{PROGRAM} did not come to an end: {said or by_exit_code(code, log).note}")
    return StageVerdict(PASSED, f"{elsewhere} findings in kernels that are not ours" if elsewhere else "")
