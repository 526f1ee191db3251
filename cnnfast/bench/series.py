"""Tasks are run one after the other, within a budget. Whatever ends them, each provider of each task has a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..measuring import failing
from ..measuring.budget import Budget
from ..measuring.machine import Machine, Peaks
from .layers_ahead import LayersAhead
from .rows import FAILED, LEFT_OUT, BenchRow
from .running import ENDED, reason_of, run
from .task import Task


class Series:
    """A run of several tasks.

    results: the rows of each task, which are "left out" until something else is known. changed: called with the number
    of a task whenever its rows have changed. errors: why PyTorch itself could not do a task, by the task's number.
    lost: why the GPU can no longer be used, or the empty string.
    """

    def __init__(
        self, tasks: Sequence[Task], machine: Machine, peaks: Peaks, changed: Callable[[int], None] = lambda i: None
    ) -> None:
        self.tasks, self.machine, self.peaks, self.changed = tasks, machine, peaks, changed
        self.results = [task.left_out(machine, peaks, ENDED) for task in tasks]
        self.errors: dict[int, str] = {}
        self.lost = ""

    @property
    def rows(self) -> list[BenchRow]:
        return [row for rows in self.results for row in rows]

    def run(self, seconds: float, budget: Budget, tell: Callable[[int, int, str], None]) -> None:
        """Runs the tasks. seconds: of timing, for each provider and task. tell: called with (tasks done, tasks in all,
        what comes next).
        """
        with LayersAhead(self.tasks) as ahead:
            for i, task in enumerate(self.tasks):
                if self.lost or budget.left <= 0:
                    self.ended(self.lost or str(budget))
                    return
                self._one(
                    i, seconds, budget, ahead, lambda text, i=i, task=task: tell(i, len(self.tasks), f"{task}: {text}")
                )
        tell(len(self.tasks), len(self.tasks), "done")

    def _one(self, i: int, seconds: float, budget: Budget, ahead: LayersAhead, tell: Callable[[str], None]) -> None:
        task = self.tasks[i]
        try:
            ahead.before(i, tell)
            run(
                task,
                self.machine,
                self.peaks,
                seconds=seconds,
                budget=budget,
                tell=tell,
                found=lambda rows: self._set(i, rows),
            )
        except Exception as error:  # whatever the model raises in PyTorch: the other tasks may work
            reason = reason_of(error)  # not the error itself, which would keep tensors alive
            if failing.lost(task.job.device):
                self.lost = f"the GPU answers no more since {task}: {reason}"
                self._not_done(i, LEFT_OUT, self.lost)
            else:
                self.errors[i] = reason
                self._not_done(i, FAILED, reason)

    def ended(self, reason: str) -> None:
        """Gives all rows of which nothing is known yet the reason why they are left out."""
        for i in range(len(self.tasks)):
            self._not_done(i, LEFT_OUT, reason)

    def _not_done(self, i: int, status: str, reason: str) -> None:
        to_do = [(row.status, row.reason) == (LEFT_OUT, ENDED) for row in self.results[i]]
        if any(to_do):
            rows = zip(self.results[i], to_do, strict=True)
            self._set(i, [replace(row, status=status, reason=reason) if other else row for row, other in rows])

    def _set(self, i: int, rows: list[BenchRow]) -> None:
        self.results[i] = rows
        self.changed(i)
