"""A plugin of pytest, -p ci.visit.pytest_lines --lines FILE: each test leaves a line of JSON when it begins and when it
ends.

So a run that is killed tells what failed before, and which tests were under way. With pytest-xdist the one process that
hears of all tests writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--lines", metavar="FILE", help="write a line of JSON there for each test that begins or ends")


def pytest_configure(config: Any) -> None:
    file = config.getoption("lines")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(Path(file)), "lines")


class Lines:
    """file: each line is in it as soon as it is written."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, **said: str) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(said) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(begun=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        # setting up and taking down matter where they fail or skip
        if report.when == "call" or report.outcome != "passed":
            lines = str(report.longrepr or "").strip().splitlines()
            self.write(
                test=report.nodeid, outcome=report.outcome, said=lines[-1][:300] if report.failed and lines else ""
            )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write(ended=nodeid)


@dataclass
class Tests:
    """What the lines tell: how many passed and were skipped, what failed with its last line, what had begun and not
    ended.
    """

    passed: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped"
        return told + f", {len(self.unfinished)} under way at the end" * bool(self.unfinished)


def read(file: Path) -> Tests:
    """What a run has left, whole or not: a last line that breaks off is none."""
    tests, begun = Tests(), dict[str, None]()
    for line in file.read_text().splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if "begun" in said:
            begun[said["begun"]] = None
        elif "ended" in said:
            begun.pop(said["ended"], None)
        elif said["outcome"] == "failed":
            tests.failed.setdefault(said["test"], said["said"])
        elif said["outcome"] == "skipped":
            tests.skipped += 1
        else:
            tests.passed += 1
    tests.unfinished = list(begun)
    return tests
