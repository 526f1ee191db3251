"""Times of steps that take turns: on a GPU by its own events, on a CPU by the clock.

A step is warmed up until it is no longer getting faster. Then come rounds. In each of them every step gives one sample,
and each round begins with another step, so that what heats or slows the machine does so to all of them. A sample is the
mean of so many calls in a row that the clock can be trusted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

Step = Callable[[], Any]

# Linux tells here for how many nanoseconds this thread has run, and for how many it has waited for a core.
SCHEDULER = Path("/proc/thread-self/schedstat")

ROUNDS = 9  # at least, if there is time for them
FEWEST = 3  # rounds, before times are told
PAUSE = 2.0  # seconds from one telling of times to the next
STABLE = 0.03  # two warm-up samples in a row agree if they differ by no more than that
WARM_UPS = 20  # samples, at most
GROWTH = 10  # a warm-up sample has at most so many times the calls of the one before


class Clock(Protocol):
    """sample: the seconds of one call, as the mean of `calls` in a row. least: seconds that a sample should take."""

    least: float

    def sample(self, step: Step, calls: int) -> float: ...


class DeviceClock:
    """CUDA events on the current stream: the time in which the GPU works, or waits for the host."""

    least = 0.005

    def sample(self, step: Step, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls


class HostClock:
    """The time that passes, without the time that this thread waited for a core, if Linux tells it: so what other
    processes do is not counted.
    """

    least = 0.005

    def sample(self, step: Step, calls: int) -> float:
        start, waited, worked = time.perf_counter(), _waited(), time.thread_time()
        for _ in range(calls):
            step()
        passed, waited, worked = time.perf_counter() - start, _waited() - waited, time.thread_time() - worked
        # Linux counts a wait when it ends, also one that began before `start`: `worked` is a lower bound all the same.
        return max(passed - waited, worked) / calls


def _waited() -> float:
    """Seconds for which this thread could have run, and waited for a core."""
    try:
        return int(SCHEDULER.read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def clock_of(device: torch.device) -> Clock:
    return DeviceClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Times:
    """Seconds of one step: the median of all samples, and what 20 % and 80 % of them stay below."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[-1], len(samples))


def warm_up(step: Step, clock: Clock) -> int:
    """Calls `step` until two samples in a row agree, and returns how many calls a sample needs."""
    taken = clock.sample(step, 1)
    calls = 1
    for _ in range(WARM_UPS):
        calls = max(1, min(GROWTH * calls, round(clock.least / max(taken, 1e-7))))
        before, taken = taken, clock.sample(step, calls)
        if before * (1 - STABLE) <= taken <= before * (1 + STABLE):
            break
    return calls


def measure(
    steps: Mapping[str, Step],
    clock: Clock,
    seconds: float = 1.0,
    rounds: int = ROUNDS,
    tell: Callable[[str], None] = lambda name: None,
    *,
    left: Callable[[], float] = lambda: math.inf,
    found: Callable[[dict[str, Times | Exception]], object] = lambda times: None,
) -> dict[str, Times | Exception]:
    """The times of each step, or what it raised.

    seconds: of timing for each step, without its warm-up. At least `rounds` samples of each are taken. tell: called
    with the name of what is measured next. left: the seconds that are left for all of this. Once there are none, the
    round under way is the last one, and what has no sample by then is not in the result. found: called between two
    rounds, every few seconds, with what is known by then.
    """
    results: dict[str, Times | Exception] = {}
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in steps}

    def attempt(name: str, take: Callable[[], None]) -> None:
        try:
            take()
        except Exception as error:  # that step is out; the others go on
            results[name] = error
            calls.pop(name, None)

    def so_far() -> dict[str, Times | Exception]:
        return {
            name: results[name] if name in results else Times.of(samples[name])
            for name in steps
            if name in results or samples[name]
        }

    for name, step in steps.items():
        if left() <= 0:
            break
        tell(name)
        attempt(name, lambda name=name, step=step: calls.__setitem__(name, warm_up(step, clock)))
    spent, done, told = 0.0, 0, time.monotonic()
    while calls and (spent < seconds * len(steps) or done < rounds) and left() > 0:
        names = list(calls)
        for name in names[done % len(names) :] + names[: done % len(names)]:
            tell(name)
            attempt(name, lambda name=name: samples[name].append(clock.sample(steps[name], calls[name])))
            if name in calls:
                spent += samples[name][-1] * calls[name]
        done += 1
        if done >= FEWEST and time.monotonic() - told >= PAUSE:
            found(so_far())
            told = time.monotonic()
    return so_far()


@contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """Says whether cuDNN tries all its algorithms, as long as the context lasts.

    torch.backends.cudnn.flags would do it too, but it reads allow_tf32, and PyTorch raises there once fp32_precision
    has been set.
    """
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
