"""The harness's own clockwork, on clocks that are told what to show."""

from __future__ import annotations

import time
import types
from pathlib import Path

import pytest
import torch

from cnnfast.measuring import timing
from cnnfast.measuring.budget import Budget
from cnnfast.measuring.machine import MATRIX, measure_peaks
from cnnfast.measuring.rotation import copies_for, rotating
from cnnfast.measuring.timing import DeviceClock, HostClock, Times, measure, warm_up


class FakeClock:
    """A step is worth the seconds that it returns."""

    least = 1.0

    def __init__(self) -> None:
        self.log: list[tuple[float, int]] = []

    def sample(self, step, calls):
        seconds = step()
        self.log.append((seconds, calls))
        return seconds


def falling(*values: float):
    """A step that takes these times, and then the last of them for ever."""
    left = list(values)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_percentiles():
    assert Times.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Times(3.5, 2.0, 5.0, 6)
    assert Times.of([2.0]) == Times(2.0, 2.0, 2.0, 1)


def test_a_step_is_warmed_up_until_it_is_stable():
    clock = FakeClock()
    assert warm_up(falling(8.0, 4.0, 2.0, 0.25, 0.25), clock) == 4  # calls, for a sample of one second
    assert [seconds for seconds, _ in clock.log] == [8.0, 4.0, 2.0, 0.25, 0.25]


def test_a_step_that_never_settles_is_measured_all_the_same():
    clock = FakeClock()
    values = [1.0 + i % 2 for i in range(100)]
    warm_up(falling(*values), clock)
    assert len(clock.log) == 1 + timing.WARM_UPS


def test_steps_take_turns_and_each_round_begins_with_another():
    order = []
    steps = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    measure(steps, FakeClock(), seconds=0, rounds=3)
    assert "".join(order[-9:]) == "abcbcacab"


def test_rounds_go_on_until_the_budget_is_spent():
    found = measure({"a": falling(2.0), "b": falling(1.0)}, FakeClock(), seconds=30, rounds=3)
    assert found["a"] == Times(2.0, 2.0, 2.0, 20)  # two steps share 60 seconds


def test_rounds_end_when_no_time_is_left():
    """After whole rounds; what was not even warmed up has no times."""
    left = iter([1.0, 1.0, 1.0, 1.0, 0.0])  # both warm-ups, two rounds
    found = measure({"a": falling(2.0), "b": falling(1.0)}, FakeClock(), seconds=30, left=lambda: next(left))
    assert found == {"a": Times(2.0, 2.0, 2.0, 2), "b": Times(1.0, 1.0, 1.0, 2)}
    left = iter([1.0, 0.0, 0.0])
    assert measure({"a": falling(2.0), "b": falling(1.0)}, FakeClock(), left=lambda: next(left)) == {}


def test_what_is_known_is_told_between_rounds(monkeypatch):
    """From the third on, and not more often than every PAUSE seconds."""
    now, told = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passing():
        now[0] += 0.9
        return 1.0

    def fails():
        raise RuntimeError

    measure({"a": passing, "fails": fails}, FakeClock(), seconds=0, rounds=9, found=told.append)
    assert [times["a"].samples for times in told] == [3, 6, 9]
    assert {type(times["fails"]) for times in told} == {RuntimeError}


def test_a_budget_counts_from_its_beginning(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    budget, endless = Budget(3), Budget()
    now[0] += 5
    assert (budget.left, endless.left) == (-2, float("inf"))
    assert (str(budget), str(endless)) == ("the budget of 3 s was spent", "")


def test_a_step_that_fails_leaves_the_others_alone():
    def fails(after: int):
        left = [1.0] * after
        return lambda: left.pop()

    found = measure({"at once": fails(0), "later": fails(4), "never": falling(1.0)}, FakeClock(), seconds=0, rounds=5)
    assert isinstance(found["at once"], IndexError)
    assert isinstance(found["later"], IndexError)
    assert found["never"].samples == 5


@pytest.fixture
def busy():
    x = torch.randn(150, 150)
    return lambda: x @ x


def test_a_planted_sleep_shows(busy):
    def slowed():
        busy()
        time.sleep(0.003)

    found = measure({"plain": busy, "slowed": slowed}, HostClock(), seconds=0.02)
    assert 0.003 <= found["slowed"].median - found["plain"].median <= 0.02


def test_the_same_step_twice_takes_the_same_time(busy):
    """Whatever else the machine does: a few attempts, as for every bound on time."""
    for _ in range(5):
        found = measure({"one": busy, "other": busy}, HostClock(), seconds=0.2)
        if abs(found["one"].median / found["other"].median - 1) <= 0.05:
            return
    pytest.fail(f"{found}")


def test_waiting_for_a_core_is_not_counted(monkeypatch, tmp_path):
    """Linux is made to tell of a second's wait in a step that takes two, half of a second of it at work."""
    told, now = Path(tmp_path, "schedstat"), {"clock": 0.0, "thread": 0.0}
    monkeypatch.setattr(timing, "SCHEDULER", told)
    monkeypatch.setattr(time, "perf_counter", lambda: now["clock"])
    monkeypatch.setattr(time, "thread_time", lambda: now["thread"])
    told.write_text("0 0 0")

    def step(wait: int):
        now["clock"] += 2
        now["thread"] += 0.5
        told.write_text(f"0 {wait} 0")

    assert HostClock().sample(lambda: step(10**9), 1) == 1
    assert HostClock().sample(lambda: step(10**10), 1) == 0.5  # a wait from before, told late: what it worked at least
    told.unlink()
    assert HostClock().sample(lambda: now.__setitem__("clock", now["clock"] + 3), 2) == 3  # a system that does not tell


def test_device_events_surround_the_calls(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end) -> float:
            return 8.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert DeviceClock().sample(lambda: log.append("step"), 4) == 0.002
    assert log == ["event", "step", "step", "step", "step", "event", "wait"]


def test_buffers_fill_the_cache_twice(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [copies_for(size, cpu) for size in (2**23, 2**30, 1, 0)] == [4, 1, 64, 64]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=60 * 2**20)
    )
    assert [copies_for(size, gpu) for size in (2**23, 2**30)] == [15, 1]


def test_steps_rotate():
    step = rotating([lambda: "a", lambda: "b"])
    assert [step() for _ in range(5)] == ["a", "b", "a", "b", "a"]


def test_peaks_are_those_of_the_best_sample():
    class Alternating(FakeClock):
        def sample(self, step, calls):
            step()
            self.log.append((0, calls))
            return (0.5, 0.25)[len(self.log) % 2]

    n = MATRIX["cpu"]
    peaks = measure_peaks(torch.device("cpu"), torch.float32, Alternating())
    assert peaks.flops == 2 * n**3 / 0.25
    assert peaks.bytes == 2 * 2**27 / 0.25
