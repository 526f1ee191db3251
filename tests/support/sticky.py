"""Hooks of pytest: a process whose CUDA context is broken runs no further test.

After an illegal address, an assertion that failed on the GPU and their like every later call of CUDA in the process
fails with the same error. So the test in which it came up is the last of its process: pytest-xdist starts another
worker in its place (and reports the test once more, as the one that the worker ended in), and without pytest-xdist the
run ends. Tests on a GPU run with CUDA_LAUNCH_BLOCKING=1: the error then comes up in the call that made it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator, Iterator

import pytest

# As the driver words them (cuGetErrorString), for errors after which it asks for the process to be ended.
STICKY = (
    "an illegal memory access was encountered",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert triggered",
    "an illegal instruction was encountered",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "hardware stack error",
    "the launch timed out and was terminated",
    "uncorrectable ECC error encountered",
)
# PyTorch writes "CUDA error: ...", Triton "Triton Error [CUDA]: ...".
PATTERN = re.compile(rf"CUDA(?: error|\]): (?:{'|'.join(map(re.escape, STICKY))})")
BROKEN = pytest.StashKey[str]()


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from or while handling."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        e = waiting.pop()
        if e is not None and not any(e is other for other in seen):
            seen.append(e)
            waiting += [e.__cause__, e.__context__, *getattr(e, "exceptions", ())]
    yield from seen


def sticky(error: BaseException | None) -> str:
    """The driver's words if `error`, or one that led to it, broke this process's CUDA context; else the empty string.

    What a child process reported is in an AssertionError, and broke the child's.
    """
    for e in chain(error):
        found = PATTERN.search(str(e)) if isinstance(e, RuntimeError) else None
        if found:
            return found.group()
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    words = sticky(call.excinfo.value) if call.excinfo else ""
    if words:
        item.config.stash[BROKEN] = words
        report.sections.append(
            ("CUDA", f"{words}: the CUDA context of this process is broken, so it runs no further test")
        )
    return report


class End:
    """Registered last: by then what pytest-xdist sends of a test is sent."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.session = config, None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        words = self.config.stash.get(BROKEN, "")
        if not words:
            return
        if hasattr(self.config, "workerinput"):  # a worker of pytest-xdist
            sys.stderr.flush()
            os._exit(1)
        assert self.session is not None
        self.session.shouldfail = f"{words} in {nodeid}: every later call of CUDA in this process would fail"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(End(config), "end-after-a-sticky-error")
