from __future__ import annotations

import threading
import time

import pytest
import sympy

from cnnfast.engine.capturing.giving_up import within


def algebra_without_end() -> None:
    x, y = sympy.symbols("x y")
    while True:
        sympy.expand((x + y) ** 8)


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cnnfast capture"]


def test_what_is_done_in_time():
    assert within(60, lambda: 6 * 7) == 42
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)
    assert ours() == []


class Context:
    def __init__(self) -> None:
        self.left, self.finished = False, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.left = True
        began = time.monotonic()
        while time.monotonic() - began < 0.3:  # long enough to be met here, if that were allowed
            sympy.expand((sympy.Symbol("x") + 1) ** 3)
        self.finished = True


def test_the_thread_ends_and_leaves_its_contexts():
    context = Context()

    def work() -> None:
        with context:
            algebra_without_end()

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done within 0\.2 seconds"):
        within(0.2, work)
    assert context.left
    assert context.finished
    assert ours() == []
    assert time.monotonic() - began < 10


def test_a_context_that_is_being_left_is_not_disturbed():
    context = Context()

    def work() -> None:
        with context:
            time.sleep(0.15)
        algebra_without_end()

    with pytest.raises(TimeoutError):
        within(0.2, work)
    assert context.finished


def test_what_is_swallowed_is_raised_again():
    swallowed = []

    def work() -> None:
        while len(swallowed) < 2:
            try:
                algebra_without_end()
            except BaseException as error:
                swallowed.append(type(error).__name__)

    with pytest.raises(TimeoutError):
        within(0.1, lambda: (work(), algebra_without_end()))
    assert swallowed == ["_GivenUp"] * 2
    assert ours() == []


def test_what_does_no_algebra_comes_to_its_own_end():
    def work() -> str:
        time.sleep(0.3)
        return "done"

    assert within(0.05, work) == "done"
    assert ours() == []


def test_an_interrupted_caller_leaves_no_thread(monkeypatch):
    started = threading.Event()

    def work() -> None:
        started.set()
        algebra_without_end()

    join = threading.Thread.join

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        started.wait()
        monkeypatch.setattr(threading.Thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        within(60, work)
    assert ours() == []
