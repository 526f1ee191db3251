"""Kernels of single layers compiled ahead, for several tasks at a time (ahead.py does so for models)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from .rows import LAYER
from .task import Task

WINDOW = 16  # tasks that are compiled for at a time: a short budget shall not be spent on what is never measured
INPUT_GRADIENT = ("dgrad", "backward")


class LayersAhead:
    """Compiles for the layers among some tasks, a window of them at a time; a context, in which its processes live."""

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
        """Called before task `i` is run."""
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

            from .. import warming

            self.compile = self.stack.enter_context(warming.compiling(devices.gpu(self.tasks[i].job.device)))
        with suppress(OSError):  # as above
            self.compile(lines, lambda done, total: tell(f"compiling kernels, {done} of {total}"))

    def lines(self, task: Task) -> list[str]:
        """For all tasks of the same layer; none for the second of them."""
        found: list[str] = []
        model = id(task.job.model)
        gradient = any(id(other.job.model) == model and other.job.mode in INPUT_GRADIENT for other in self.tasks)
        for provider in task.providers:
            if provider.ours and not provider.unavailable(task.job) and (model, provider.name) not in self.traced:
                self.traced.add((model, provider.name))
                with suppress(Exception):  # of whatever kind: it raises again, and is then that provider's
                    found += provider.launches(task.job, gradient)
        return found
