"""How much of this machine there is to have, beside what else runs on it."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_for(processes: int) -> float:
    """As how many cores so many processes will get on with their work, if the load of the last minute lasts: each gets
    one, or the same share as all others.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return processes * min(1.0, usable_cores() / (load + processes))
