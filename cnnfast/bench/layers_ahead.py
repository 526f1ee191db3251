"""Kernels of single layers are compiled ahead, for several tasks at a time (ahead.py does so for models)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from .rows import LAYER
from .task import Task

WINDOW = 16  # tasks at a time: a short budget shall not be spent on kernels that are never measured
INPUT_GRADIENT = ("dgrad", "backward")


class LayersAhead:
    """Compiles for the layers among some tasks, WINDOW of them at a time. Its processes end with this context."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.until = 0
        self.traced: set[tuple[int, str]] = set()
        self.compiled: set[str] = set()
        self.stack = ExitStack()
        self.compile: Any = None

    def __enter__(self) -> LayersAhead:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stack.close()

    def before(self, i: int, tell: Callable[[str], None]) -> None:
        """Compiles for task `i`, and those after it, unless that was done. Called before task `i` is run."""
        if self.tasks[i].kind != LAYER or i < self.until:
            return
        self.until = i + WINDOW
        window = self.tasks[i : self.until]
        lines = [
            line
            for line in dict.fromkeys(line for task in window for line in self.lines(task))
            if line not in self.compiled
        ]
        if not lines:
            return
        self.compiled.update(lines)
        tell(f"compiling {len(lines)} kernels")
        if self.compile is None:
            from cnnfast_kernels import devices

            from .. import workers

            self.compile = self.stack.enter_context(workers.compiling(devices.gpu(self.tasks[i].job.device)))
        with suppress(OSError):  # no process can be started: kernels are compiled when they are launched
            self.compile(lines, lambda done, total: tell(f"compiling kernels, {done} of {total}"))

    def lines(self, task: Task) -> list[str]:
        """Descriptions of the kernels of a task's layer, in all its modes; none if another task had the same layer."""
        found: list[str] = []
        model = id(task.job.model)
        gradient = any(id(other.job.model) == model and other.job.mode in INPUT_GRADIENT for other in self.tasks)
        for provider in task.providers:
            if provider.ours and not provider.unavailable(task.job) and (model, provider.name) not in self.traced:
                self.traced.add((model, provider.name))
                with suppress(Exception):  # of whatever kind: the provider raises it again when it runs
                    found += provider.launches(task.job, gradient)
        return found
