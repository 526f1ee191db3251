"""Functions in threads of their own, begun together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SECONDS = 20  # for anything that has to come
MOMENT = 0.3  # for what does not come where a lock keeps it away


def together(*functions: Callable[[], Any]) -> list[Any]:
    """What they return, each called in a thread of its own, all at once. Raises what the first of them raised."""
    begin = threading.Barrier(len(functions), timeout=SECONDS)

    def run(function: Callable[[], Any]) -> Any:
        begin.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as threads:
        return [future.result(SECONDS) for future in [threads.submit(run, f) for f in functions]]


def elsewhere(function: Callable[[], Any]) -> Any:
    """What the function returns in another thread, while this one waits."""
    return together(function)[0]
