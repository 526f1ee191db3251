"""Runs the providers of a task: setup, gate, times, memory. Each has a row, which is told whenever it has changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from math import isfinite
from typing import Any

import torch

from .. import recording
from ..measuring import failing
from ..measuring.budget import Budget
from ..measuring.machine import Machine, Peaks
from ..measuring.timing import Clock, Times, clock_of, measure
from .footprint import allocated, collect, kernels, peak, saved_bytes
from .gate import Expected
from .job import Job
from .numbers import Numbers
from .providers import EAGER, Prepared, Provider
from .rows import FAILED, LAYER, LEFT_OUT, OK, UNAVAILABLE, WRONG, BenchRow
from .surroundings import empty_caches
from .task import Task

Tell = Callable[[str], None]
Found = Callable[[list[BenchRow]], None]

ENDED = "the run ended before"  # why a row has no times as long as nothing else is known, whatever may end the run
ALONE = 3  # samples of a provider that is timed by itself
UNTIMED = {"median": None, "low": None, "high": None, "samples": 0, "alone": False}


def run(
    task: Task,
    machine: Machine,
    peaks: Peaks,
    *,
    seconds: float = 1.0,
    budget: Budget | None = None,
    clock: Clock | None = None,
    tell: Tell = lambda text: None,
    found: Found = lambda rows: None,
) -> list[BenchRow]:
    """A row for each provider.

    All providers are prepared, and then take turns in rounds. A model's provider may be ready minutes before the rounds
    begin, so it is also timed alone, at once: its row says so until the rounds replace that time. A layer's provider is
    ready only seconds before. What it needs may have been compiled earlier, so its row has no `first`.

    seconds: of timing for each provider. budget: for all of it. A provider is left out if it and the rounds of those
    that are prepared no longer fit into it. tell: called with what comes next. found: called with all rows whenever one
    has changed, and every few seconds during the rounds.

    Raises what the model itself raises in PyTorch. Raises ValueError if nothing can be judged by its results (gate.py),
    and if it is no baseline because it calls cnnfast itself. Raises what a provider raises if the GPU is lost with it.
    """
    job = replace(task.job, numbers=Numbers())  # the numbers are released when this returns
    budget, clock = budget or Budget(), clock or clock_of(job.device)
    # Forgets what was compiled for the last job. Between two providers this would make the first compile again.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    collect(job.device)
    tell("expected results")
    with recording.trace() as calls:
        expected = task.expected(job)
    if len(calls):
        raise ValueError(f"{job.name} calls cnnfast.functional itself, so there is no PyTorch baseline of it")
    rows: dict[str, dict[str, Any]] = {
        provider.name: {"status": LEFT_OUT, "reason": ENDED} for provider in task.providers
    }
    prepared: dict[str, Prepared] = {}

    def told() -> list[BenchRow]:
        made = [task.row(provider, machine, peaks, **rows[provider.name]) for provider in task.providers]
        found(made)
        return made

    def failed(name: str, error: Exception) -> None:
        rows[name] = {**rows[name], **UNTIMED, "status": FAILED, "reason": reason_of(error)}
        prepared.pop(name, None)
        if failing.lost(job.device):
            told()
            raise error

    def keep(times: Mapping[str, Times | Exception], alone: bool) -> None:
        for name, timed in times.items():
            if not isinstance(timed, Exception):
                each = {figure: getattr(timed, figure) / prepared[name].calls for figure in ("median", "low", "high")}
                rows[name] |= {**each, "samples": timed.samples, "alone": alone, "status": OK, "reason": ""}
            elif name in prepared:
                failed(name, timed)

    told()
    for provider in task.providers:
        name = provider.name
        if reason := provider.unavailable(job):
            rows[name] = {"status": UNAVAILABLE, "reason": reason}
        elif budget.left <= seconds * len(prepared):
            rows[name]["reason"] = str(budget)
        else:
            tell(f"{name}: first result")
            try:
                ready, figures = _first(job, provider, expected, task.kind == LAYER)
            except Exception as error:  # of whatever kind: it is that provider's
                failed(name, error)
            else:
                rows[name] |= figures
                if ready is not None:
                    prepared[name] = ready
                    if task.kind != LAYER:
                        keep(
                            measure({name: ready.step}, clock, 0, ALONE, lambda name: tell(f"{name}: timing")),
                            alone=True,
                        )
        told()
    times = measure(
        {name: ready.step for name, ready in prepared.items()},
        clock,
        seconds,
        tell=lambda name: tell(f"{name}: timing"),
        left=lambda: budget.left,
        found=lambda times: (keep(times, alone=False), told()),
    )
    keep(times, alone=False)
    for name in prepared:
        if rows[name]["status"] == LEFT_OUT:
            rows[name]["reason"] = str(budget)
    told()
    for name, ready in prepared.items():
        # After all timing: once a profiler has run, it may slow down what comes after it.
        if task.kind != LAYER and budget.left > 0:
            tell(f"{name}: kernels")
            with suppress(RuntimeError):  # the times are good without
                rows[name]["kernels"] = kernels(job, ready)
    return told()


def _first(job: Job, provider: Provider, expected: Expected, layer: bool) -> tuple[Prepared | None, dict[str, Any]]:
    """A provider that has run once and was judged, or None if it was wrong, and what its row says of that."""
    if not layer:
        collect(job.device)
    began, before = time.perf_counter(), allocated(job.device)
    with nullcontext() if layer else empty_caches(provider.how != EAGER):
        ready = provider.prepare(job)
        results = ready.read(ready.step())
    failing.wait(job.device)
    figures: dict[str, Any] = {}
    if not layer:
        figures["first"] = time.perf_counter() - began
        figures["peak_bytes"] = peak(job.device, before) if provider.in_torch else None
    verdict = provider.judge(expected, results)
    figures["error"] = verdict.error if isfinite(verdict.error) else None
    if verdict.message:
        return None, {**figures, "status": WRONG, "reason": verdict.message}
    return ready, {**figures, "saved_bytes": saved_bytes(job, provider, ready), **provider.counted(job, ready)}


def reason_of(error: BaseException) -> str:
    """Why a row has no times, in few words."""
    return "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else failing.in_a_line(error)
