"""Work shared out to processes: Triton compiles in one thread of a process at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Result = TypeVar("Result")


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def in_processes(
    function: Callable[..., Result],
    work: Sequence[tuple[Any, ...]],
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """function(*item) for each item of `work`, in that order, by `jobs` processes of their own (default: one a core).

    `progress` is called with (items done, all items).
    """
    progress(0, len(work))
    with ProcessPoolExecutor(jobs or usable_cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, *item) for item in work]
        for done, _ in enumerate(as_completed(futures), 1):
            progress(done, len(work))
    return [future.result() for future in futures]
